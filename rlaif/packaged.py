"""The data that comes with the package: ``prompts/`` and ``judges/``, files that a person edits without Python."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_HERE = Path(__file__).resolve().parent


def folder(kind: Literal["prompts", "judges"]) -> Path:
    """In an installed wheel they lie inside the package; in a checkout they stand at its top."""
    inside = _HERE / "data" / kind
    return inside if inside.is_dir() else _HERE.parent / kind


def prompt_sets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder("prompts").glob("*.jsonl"))}


def judges() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(folder("judges").glob("*/judge.toml"))}
