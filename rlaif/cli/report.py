"""``rlaif report``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.options import RunPath


def report(
    run: RunPath,
    json: Annotated[bool, typer.Option("--json", help="The facts as JSON, and no page.")] = False,
) -> None:
    """Write the morning page. What the night gave, whether its labels can be trusted, what it needs."""
    from rlaif.report import html_report, report_data
    from rlaif.run.run import open_run

    target = open_run(run)
    if json:
        console.echo_json(report_data.collect_report(target))
        return
    path = html_report.write_report(target)
    console.echo(f"wrote {path}")
