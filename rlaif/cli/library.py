"""The commands about what comes with rlaif and with the machine: judges, prompts, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.options import BaseUrls, Budget, Concurrency, DryRun, MaxFailures, Seed, client_flags, print_dry_run

if TYPE_CHECKING:
    from rlaif.judge.exam_metrics import ExamReport

Json = Annotated[bool, typer.Option("--json", help="The same as JSON.")]

MAX_ROWS_SHOWN = 20

judges = typer.Typer(help="The judges: list, show, new, check, exam.", no_args_is_help=True)
prompts = typer.Typer(help="Prompt sets: list, show, new, check.", no_args_is_help=True)


@judges.command("list")
def list_judges(json: Json = False) -> None:
    """The judges there are: packaged, and in ./judges."""
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
def show_judge(name: str) -> None:
    """A judge's prompt and settings."""
    from rlaif.judge import judge_file

    judge = judge_file.find_judge(name)
    console.echo(f"# {judge.folder}\n")
    console.echo((judge.folder / "judge.toml").read_text(encoding="utf-8"))
    if (judge.folder / "prompt.md").exists():  # a reward model needs none
        console.echo((judge.folder / "prompt.md").read_text(encoding="utf-8"))


@judges.command("new")
def new_judge(
    name: str,
    kind: Annotated[
        Literal["compare", "rate", "classify", "reward"], typer.Option(help="What it says of answers.")
    ] = "compare",
) -> None:
    """Write a judge of your own into ./judges."""
    from rlaif.judge import judge_scaffold

    folder = judge_scaffold.create_judge(name, kind)
    console.echo(f"{folder} is a judge to edit. Next: rlaif judges check {name}")


@judges.command("check")
def check_judge(
    name: str,
    lock: Annotated[bool, typer.Option("--lock", help="Write this version's line into checksums.txt.")] = False,
) -> None:
    """Read a judge's files and gold, and hold its text to its version."""
    from rlaif.judge import gold, judge_file, version_lock

    judge = judge_file.find_judge(name)
    lock_status = version_lock.check_version_lock(judge, lock=lock)
    console.echo(f"{judge.name} version {judge.file.version} ({judge.file.kind}), hash {judge.hash}: good")
    console.echo(f"version: {lock_status}")
    path = judge.folder / gold.GOLD_FILE
    if not path.exists():
        console.echo(f"gold: none in {path}; an exam needs some, or --gold FILE")
        return
    rows = gold.read_gold(path, judge)
    console.echo(f"gold: {len(rows)} rows in {path}")
    for warning in gold.gold_bias_warnings(rows):
        console.log(f"warning: {warning}")


@judges.command("exam")
def exam_judge(
    name: Annotated[str, typer.Argument(help='A judge, or "check" for the programmatic checks.')],
    gold: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Known labels; the judge's own by default.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", show_default=False, help="The model that judges.")
    ] = None,
    base_url: BaseUrls = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows of gold.", show_default=False, min=1)] = None,
    concurrency: Concurrency = None,
    seed: Seed = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Ask a judge what is known, before its labels are paid for."""
    from rlaif.config.loader import load
    from rlaif.config.models import CHECK_JUDGE
    from rlaif.errors import UsageError
    from rlaif.labeling import judge_exam

    if name == CHECK_JUDGE:
        if gold is None:
            raise UsageError(
                "the checks have no gold of their own", hint="Give --gold FILE, with `checks` in its rows."
            )
        print_exam(judge_exam.run_check_exam(gold), json)
        return
    settings = load(Path(), {"judge.model": model, "judge.base_url": base_url,
                             **client_flags(concurrency, seed, max_failures, budget_usd)})  # fmt: skip
    if dry_run:
        print_dry_run(judge_exam.plan_exam(name, model, gold, settings, limit))
        return
    exam_run = judge_exam.run_exam(name, model, gold, settings, console.Console(), limit)
    for warning in exam_run.gold_warnings:
        console.log(f"warning: of this gold, {warning}")
    print_exam(exam_run.report, json)
    console.log(f"kept in {exam_run.path}; rlaif judge goes by it")


def print_exam(result: ExamReport, json: bool) -> None:
    from rlaif.judge import exam_metrics

    if json:
        console.echo_json(result.as_json())
        return
    for name, value in result.metrics.items():
        if value is not None:
            figures = (f"{bound:.3f}" if abs(bound) < 10 else f"{bound:,.0f}"
                       for bound in (value.value, value.low, value.high))  # fmt: skip
            console.echo("{:<30} {:>7} [{}, {}]  n = {:,}".format(name.replace("_", " "), *figures, value.n))
    if result.reliability:
        console.echo("\nreliability: | how sure, o how often right, - its interval")
        for line in exam_metrics.ascii_reliability_plot(result.reliability):
            console.echo(line)
    conclusion = {
        "good": "better than always choosing the longer answer",
        "unproven": "not shown to be better than always choosing the longer answer",
        "bad": "its labels are worth nothing",
    }[result.status if result.kind != "classify" or result.status == "bad" else "good"]
    if result.kind == "classify" and result.status != "bad":
        conclusion = "better than always the commonest label"
    console.echo(f"\n{'; '.join(result.problems) + ': ' if result.problems else ''}{conclusion}")


@prompts.command("list")
def list_prompts(json: Json = False) -> None:
    """The packaged prompt sets."""
    from rlaif import resources

    sizes = {name: sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
             for name, path in resources.prompt_sets().items()}  # fmt: skip
    if json:
        console.echo_json(sizes)
        return
    for name, size in sizes.items():
        console.echo(f"{name:<16} {size:>6,} prompts")


@prompts.command("show")
def show_prompts(name: str) -> None:
    """A set's prompts, as JSON Lines."""
    from rlaif import resources
    from rlaif.errors import UsageError, did_you_mean

    sets = resources.prompt_sets()
    if name not in sets:
        raise UsageError(f"there is no prompt set {name!r}. {did_you_mean(name, sets)}")
    console.echo(sets[name].read_text(encoding="utf-8").rstrip("\n"))


@prompts.command("new")
def new_prompts(name: str) -> None:
    """Write a prompt file of your own into ./prompts."""
    from rlaif.generate import prompt_scaffold

    path = prompt_scaffold.create_prompt_file(name)
    console.echo(f"{path} is a prompt file to edit, a row a line. Next: rlaif prompts check {path}")


@prompts.command("check")
def check_prompts(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="What generate takes as --prompts.")],
    json: Json = False,
) -> None:
    """Read prompts as generate would: bad rows, checks that no answer can be held to, and duplicates."""
    from rlaif.config.loader import load
    from rlaif.orchestrator import check_sources

    result = check_sources.check_sources(sources, load(Path(), {}))
    if json:
        console.echo_json(result.__dict__)
    else:
        for error in result.invalid[:MAX_ROWS_SHOWN]:
            console.log(error)
        if len(result.invalid) > MAX_ROWS_SHOWN:
            console.log(f"and {len(result.invalid) - MAX_ROWS_SHOWN:,} more bad rows")
        console.echo(f"{result.prompts:,} prompts would be taken, {len(result.invalid):,} rows are bad")
        for reason, locations in result.left_out.items():
            ellipsis_ = ", ..." if len(locations) > MAX_ROWS_SHOWN else ""
            console.echo(
                f"{len(locations):,} would be left out ({reason}): {', '.join(locations[:MAX_ROWS_SHOWN])}{ellipsis_}"
            )
    if result.invalid:
        raise typer.Exit(2)


def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", show_default=False, help="Propose settings for its models.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", metavar="M", show_default=False, help="Or for this one.")
    ] = None,
    json: Json = False,
) -> None:
    """What this machine has and lacks, and how vLLM would use its GPUs."""
    from rlaif.config import loader
    from rlaif.report import doctor as examining
    from rlaif.run.run import open_run

    models = dict.fromkeys(model or [], "sampler.vllm")
    if run:
        config = loader.load(open_run(run).path, {})
        judge_models = {member.model: "judge.vllm" for member in config.panel_members() if not member.base_url}
        models = {
            **judge_models,
            **{policy.model: "sampler.vllm" for policy in config.policies_resolved() if not policy.base_url},
            **models,
        }
    findings = examining.diagnose(models)
    if json:
        console.echo_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            console.echo(f"{finding.level:<5} {finding.subject:<18} {finding.message}")
            if finding.hint:
                console.echo(f"{'':<24} {finding.hint}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(4)
