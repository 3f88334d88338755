"""``rlaif init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.shared import RunPath
from rlaif.errors import RlaifError, UsageError


def init(
    run: RunPath,
    previous: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", show_default=False, help="The next round: its trained model answers."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", show_default=False, help="Fresh prompts for it. Default: the same."),
    ] = None,
) -> None:
    """Make a run: a directory with a commented rlaif.toml."""
    from rlaif import settings

    path = run / settings.FILE_NAME
    if path.exists():
        raise UsageError("there is one already", where=str(path), mend="Edit it, or name another directory.")
    if previous:
        from rlaif.pipeline import series
        from rlaif.run.directory import open_run

        text = series.following(open_run(previous), run, prompts or [])
    elif prompts:
        raise UsageError("--prompts goes with --from", mend="Set source under [prompts] in the new rlaif.toml.")
    else:
        text = settings.template()
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RlaifError(f"cannot be written: {error.strerror}", where=str(path)) from None
    console.put(f"wrote {path}. Edit it, then: rlaif generate {run}")
