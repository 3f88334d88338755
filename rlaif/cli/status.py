"""``rlaif status``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console


def status(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            show_default=False,
            help="Run directory [default: all runs below this one]",
            callback=console.remember_run,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Output as JSON")] = False,
) -> None:
    """Show what a run has and what it needs next"""
    from rlaif.report.next_step import decide
    from rlaif.report.run_facts import collect_facts
    from rlaif.report.run_status import find_runs, format_status
    from rlaif.run.run import open_run

    runs = [open_run(run)] if run else find_runs(Path())
    statuses = [(facts.status, decide(facts)) for facts in map(collect_facts, runs)]
    if json:
        entries = [{**dataclasses.asdict(status), "next": dataclasses.asdict(step)} for status, step in statuses]
        console.echo_json(entries[0] if run else entries)
    elif not statuses:
        console.echo("No run in this directory. Create one with `rlaif init RUN`.")
    else:
        console.echo("\n\n".join(format_status(status, step) for status, step in statuses))
