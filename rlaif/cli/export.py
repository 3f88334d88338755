"""``rlaif export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.shared import RunPath


def export(
    run: RunPath,
    format_: Annotated[
        Literal["trl", "h4", "llama-factory", "axolotl", "openrlhf"], typer.Option("--format", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", show_default=False)],
) -> None:
    """Write the dataset as another trainer reads it."""
    from rlaif.pair import formats
    from rlaif.run.directory import open_run

    target = open_run(run)
    for path in formats.export_dataset(target.dataset, format_, output):
        console.put(str(path))
