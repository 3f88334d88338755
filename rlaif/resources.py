"""Paths of the data in the package: prompt sets and judges, documentation and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE_DIR = Path(__file__).resolve().parent


def data_dir(kind: Literal["prompts", "judges", "docs", "examples"]) -> Path:
    """Return a data folder: inside an installed wheel, or at the top of a checkout."""
    installed = _PACKAGE_DIR / "data" / kind
    return installed if installed.is_dir() else _PACKAGE_DIR.parent / kind


def prompt_sets() -> dict[str, Path]:
    """Return the file of each packaged prompt set, by name."""
    return {path.stem: path for path in sorted(data_dir("prompts").glob("*.jsonl"))}


def judges() -> dict[str, Path]:
    """Return the folder of each packaged judge, by name."""
    return {path.parent.name: path.parent for path in sorted(data_dir("judges").glob("*/judge.toml"))}
