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
    from rlaif.report import facts
    from rlaif.run.directory import open_run

    found = [open_run(run)] if run else facts.runs_below(Path())
    told = [facts.of(each) for each in found]
    if json:
        console.put_json(told[0] if run else told)
    elif not told:
        console.put("There is no run here. Make one: rlaif init RUN")
    else:
        console.put("\n\n".join(facts.as_text(each) for each in told))
