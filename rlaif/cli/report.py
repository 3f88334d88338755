"""``rlaif report``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.shared import RunPath


def report(
    run: RunPath,
    json: Annotated[bool, typer.Option("--json", help="The facts as JSON, and no page.")] = False,
) -> None:
    """Write the morning page. What the night gave, whether its labels can be trusted, what it needs."""
    from rlaif.report import gather, page
    from rlaif.run.directory import open_run

    target = open_run(run)
    if json:
        console.put_json(gather.gather(target))
        return
    path = page.write(target)
    console.put(f"wrote {path}")
