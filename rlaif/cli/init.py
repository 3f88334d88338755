"""``rlaif init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.options import RunPath
from rlaif.errors import RlaifError, UsageError


def init(
    run: RunPath,
    previous: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", show_default=False, help="Previous run; its trained model answers in this one"
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", show_default=False, help="New prompts, with --from [default: the previous run's]"),
    ] = None,
) -> None:
    """Create a run: a directory with a commented rlaif.toml"""
    from rlaif.config import loader
    from rlaif.config.template import render_template

    path = run / loader.CONFIG_FILE
    if path.exists():
        raise UsageError("already exists", location=str(path), hint="Edit it, or choose another directory.")
    if previous:
        from rlaif.orchestrator import next_iteration
        from rlaif.run.run import open_run

        text = next_iteration.next_iteration_config(open_run(previous), run, prompts or [])
    elif prompts:
        raise UsageError(
            "--prompts needs --from", hint="Run `rlaif init` without --prompts and set prompts.sources in rlaif.toml."
        )
    else:
        text = render_template({})
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RlaifError(f"cannot be written: {error.strerror}", location=str(path)) from None
    console.echo(f"created {path}. Edit it, then run: rlaif generate {run}")
