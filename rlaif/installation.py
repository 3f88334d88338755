"""Commands that install what is missing, which depend on how this copy of rlaif was installed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "rlaif-pipeline"
"""The name on PyPI, where `rlaif` is another project. The package and the command are called `rlaif`."""


def install_command(extra: str) -> str:
    """Return the command that installs the optional dependencies named ``extra`` (several: separated by commas).

    In a checkout that was installed with ``pip install -e``, that is an editable installation again.
    """
    # vLLM's CPU build needs the CPU build of torch, which uv can be asked for.
    program = "uv pip install" if extra == "cpu" else "pip install"
    checkout = editable_checkout()
    if checkout is None:
        options = " --torch-backend cpu" if extra == "cpu" else ""
        return f"{program}{options} '{DISTRIBUTION}[{extra}]'"
    path = "." if checkout == Path.cwd() else checkout
    return f"{program} -e '{path}[{extra}]'"


def editable_checkout() -> Path | None:
    """Return the folder of the checkout that this copy runs from, or None if it was installed from a package."""
    try:
        text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    source = json.loads(text) if text else {}
    if not source.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlsplit(source["url"]).path))
