"""The data that comes with the package: ``prompts/`` and ``judges/``, files that a person edits without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE_DIR = Path(__file__).resolve().parent


def data_dir(kind: Literal["prompts", "judges"]) -> Path:
    """In an installed wheel they lie inside the package; in a checkout they stand at its top."""
    installed = _PACKAGE_DIR / "data" / kind
    return installed if installed.is_dir() else _PACKAGE_DIR.parent / kind


def prompt_sets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(data_dir("prompts").glob("*.jsonl"))}


def judges() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(data_dir("judges").glob("*/judge.toml"))}
