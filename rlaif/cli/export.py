"""``rlaif export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.options import RunPath
from rlaif.errors import UsageError


def export(
    run: RunPath,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Export format, such as trl, h4, llama-factory, axolotl or openrlhf [default with `--to`: the dataset "
            "unchanged]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Output directory on this machine"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Destination: hf:OWNER/NAME, or s3://, gs:// or az://BUCKET/PATH", show_default=False
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new Hugging Face repository public [default: private]")
    ] = False,
) -> None:
    """Export the dataset in another trainer's format, or publish it"""
    from rlaif.run.run import open_run

    target = open_run(run)
    if to is not None:
        if output is not None:
            raise UsageError("`--to` and `--output` cannot be combined", hint="Use one of them.")
        from rlaif.pair import publish

        for url in publish.publish(target, to, format_, public=public):
            console.echo(url)
        return
    if format_ is None or output is None:
        raise UsageError(
            "`--format` and `--output` are required (or `--to`)",
            hint=f"Run `rlaif export {run} --format trl --output DIR`.",
        )
    from rlaif.pair import export_formats

    for path in export_formats.export_dataset(target.dataset, format_, output):
        console.echo(str(path))
