"""``rlaif export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.options import RunPath
from rlaif.errors import UsageError


def export(
    run: RunPath,
    format_: Annotated[
        Literal["trl", "h4", "llama-factory", "axolotl", "openrlhf"] | None,
        typer.Option("--format", help="Whose. With --to: as it is, if not given.", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", show_default=False)] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="URL", help="hf:OWNER/NAME, or s3://, gs://, az:// BUCKET/PATH.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository of the hub: not private.")] = False,
) -> None:
    """Write the dataset as another trainer reads it, or to the hub or object storage."""
    from rlaif.run.run import open_run

    target = open_run(run)
    if to is not None:
        if output is not None:
            raise UsageError("--to and -o are two places: give one of them")
        from rlaif.pair import publish

        for url in publish.publish(target, to, format_, public=public):
            console.echo(url)
        return
    if format_ is None or output is None:
        raise UsageError("where to and how?", hint="Give --format FORMAT -o DIR, or --to hf:OWNER/NAME or a URL.")
    from rlaif.pair import export_formats

    for path in export_formats.export_dataset(target.dataset, format_, output):
        console.echo(str(path))
