"""``rlaif status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console


def status(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """What a run has and what it needs next. Without RUN: every run below this directory."""
    from rlaif.report import run_status
    from rlaif.run.run import open_run

    runs = [open_run(run)] if run else run_status.find_runs(Path())
    statuses = [run_status.run_status(found_run) for found_run in runs]
    if json:
        console.echo_json(statuses[0] if run else statuses)
    elif not statuses:
        console.echo("There is no run here. Make one: rlaif init RUN")
    else:
        console.echo("\n\n".join(run_status.format_status(entry) for entry in statuses))
