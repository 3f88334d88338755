"""``rlaif report``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.options import RunPath


def report(
    run: RunPath,
    json: Annotated[bool, typer.Option("--json", help="Output the facts as JSON and write no page")] = False,
) -> None:
    """Write RUN/report.html: results, label quality and the next step"""
    from rlaif.report import html_report, report_data
    from rlaif.run.run import open_run

    target = open_run(run)
    collected = report_data.collect_report(target)
    if json:
        console.echo_json(collected)
        return
    console.echo(f"wrote {html_report.write_report(target, collected)}")
    console.echo(f"Next: {collected.next_step}")
