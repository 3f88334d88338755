"""``rlaif judges``: list, show, create, check and examine judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.options import (
    Budget,
    Concurrency,
    DryRun,
    JudgeBaseUrls,
    JudgeModel,
    MaxFailures,
    Seed,
    client_flags,
    print_dry_run,
)

if TYPE_CHECKING:
    from rlaif.judge.exam_metrics import ExamReport

judges = typer.Typer(help="List, show, create, check and examine judges", no_args_is_help=True)


@judges.command("list")
def list_judges(json: Annotated[bool, typer.Option("--json", help="Output as JSON")] = False) -> None:
    """List the packaged judges and those in ./judges"""
    from rlaif.judge import judge_file

    loaded = [judge_file.load_judge(folder) for folder in judge_file.judge_folders().values()]
    if json:
        console.echo_json(
            [{**judge.file.model_dump(), "hash": judge.hash, "folder": str(judge.folder)} for judge in loaded]
        )
        return
    for judge in loaded:
        console.echo(f"{judge.name:<16} {judge.file.kind:<8} version {judge.file.version:<4} {judge.file.description}")


@judges.command("show")
def show_judge(name: Annotated[str, typer.Argument(metavar="JUDGE", help="Judge name or folder")]) -> None:
    """Print a judge's settings and prompt"""
    from rlaif.judge import judge_file

    judge = judge_file.find_judge(name)
    console.echo(f"# {judge.folder}\n")
    console.echo((judge.folder / "judge.toml").read_text(encoding="utf-8"))
    if (judge.folder / "prompt.md").exists():  # optional for a reward model
        console.echo((judge.folder / "prompt.md").read_text(encoding="utf-8"))


@judges.command("new")
def new_judge(
    name: Annotated[str, typer.Argument(metavar="JUDGE", help="Name of the new judge")],
    kind: Annotated[
        Literal["compare", "rate", "classify", "reward"], typer.Option(help="Kind of verdict the judge gives")
    ] = "compare",
) -> None:
    """Create a judge to edit in ./judges"""
    from rlaif.judge import judge_scaffold

    folder = judge_scaffold.create_judge(name, kind)
    console.echo(f"created {folder}. Edit it, then run: rlaif judges check {name}")


@judges.command("check")
def check_judge(
    name: Annotated[str, typer.Argument(metavar="JUDGE", help="Judge name or folder")],
    lock: Annotated[bool, typer.Option("--lock", help="Add this version to checksums.txt")] = False,
) -> None:
    """Validate a judge's files, gold labels and version lock"""
    from rlaif.judge import gold, judge_file, version_lock

    judge = judge_file.find_judge(name)
    lock_status = version_lock.check_version_lock(judge, lock=lock)
    console.echo(f"{judge.name} version {judge.file.version} ({judge.file.kind}), hash {judge.hash}: valid")
    console.echo(f"version: {lock_status}")
    path = judge.folder / gold.GOLD_FILE
    if not path.exists():
        console.echo(f"gold: {path} does not exist; an exam needs it, or --gold FILE")
        return
    rows = gold.read_gold(path, judge)
    console.echo(f"gold: {len(rows)} rows in {path}")
    for warning in gold.gold_bias_warnings(rows):
        console.log(f"warning: gold: {warning}")


@judges.command("exam")
def exam_judge(
    name: Annotated[
        str, typer.Argument(metavar="JUDGE", help='Judge name or folder, or "check" for the programmatic checks')
    ],
    gold: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Gold labels [default: the judge's gold.jsonl]", show_default=False),
    ] = None,
    model: JudgeModel = None,
    base_url: JudgeBaseUrls = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of gold rows to use [default: all]", show_default=False, min=1)
    ] = None,
    concurrency: Concurrency = None,
    seed: Seed = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
    json: Annotated[bool, typer.Option("--json", help="Output as JSON")] = False,
) -> None:
    """Measure a judge on gold-labeled answers"""
    from rlaif.config.loader import load
    from rlaif.config.models import CHECK_JUDGE
    from rlaif.errors import UsageError
    from rlaif.labeling import judge_exam

    if name == CHECK_JUDGE:
        if gold is None:
            raise UsageError(
                "an exam of the programmatic checks needs --gold",
                hint="Give --gold FILE; each of its rows needs `checks`.",
            )
        print_exam(judge_exam.run_check_exam(gold), json)
        return
    flags = client_flags(concurrency, seed, max_failures, budget_usd)
    config = load(Path(), {"judge.model": model, "judge.base_url": base_url, **flags})
    if dry_run:
        print_dry_run(judge_exam.plan_exam(name, model, gold, config, limit))
        return
    exam_run = judge_exam.run_exam(name, model, gold, config, console.Console(), limit)
    for warning in exam_run.gold_warnings:
        console.log(f"warning: gold: {warning}")
    print_exam(exam_run.report, json)
    console.log(f"saved in {exam_run.path}; `rlaif judge` reads it")


def print_exam(report: ExamReport, json: bool) -> None:
    """Print the metrics, the reliability plot and the conclusion, or all of it as JSON."""
    from rlaif.display_names import field_name
    from rlaif.judge import exam_metrics

    if json:
        console.echo_json(report.as_json())
        return
    for name, value in report.metrics.items():
        if value is not None:
            figures = [_format_figure(figure) for figure in (value.value, value.low, value.high)]
            console.echo("{:<46} {:>7} [{}, {}]  n = {:,}".format(field_name(name), *figures, value.n))
    if report.reliability:
        console.echo("\nreliability: | mean confidence, o accuracy, - its confidence interval")
        for line in exam_metrics.ascii_reliability_plot(report.reliability):
            console.echo(line)
    problems = f"{'; '.join(report.problems)}: " if report.problems else ""
    console.echo(f"\n{problems}{_conclusion(report)}")


def _format_figure(figure: float) -> str:
    return f"{figure:.3f}" if abs(figure) < 10 else f"{figure:,.0f}"


def _conclusion(report: ExamReport) -> str:
    if report.status == "bad":
        return "do not use its labels"
    if report.kind == "classify":
        return "better than always choosing the most common label"
    if report.status == "unproven":
        return "not shown to be better than always choosing the longer answer"
    return "better than always choosing the longer answer"
