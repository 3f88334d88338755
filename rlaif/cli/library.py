"""The commands about what comes with rlaif and with the machine: judges, prompts, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.shared import BaseUrls, Budget, Concurrency, DryRun, MaxFailures, Seed, client_flags, show_plan

if TYPE_CHECKING:
    from rlaif.judge.exam import Result

Json = Annotated[bool, typer.Option("--json", help="The same as JSON.")]

SHOWN = 20

judges = typer.Typer(help="The judges: list, show, new, check, exam.", no_args_is_help=True)
prompts = typer.Typer(help="Prompt sets: list, show, new, check.", no_args_is_help=True)


@judges.command("list")
def list_judges(json: Json = False) -> None:
    """The judges there are: packaged, and in ./judges."""
    from rlaif.judge import definition

    found = [definition.load(folder) for folder in definition.folders().values()]
    if json:
        console.put_json(
            [{**judge.file.model_dump(), "hash": judge.hash, "folder": str(judge.folder)} for judge in found]
        )
        return
    for judge in found:
        console.put(f"{judge.name:<16} {judge.file.kind:<8} version {judge.file.version:<4} {judge.file.description}")


@judges.command("show")
def show_judge(name: str) -> None:
    """A judge's prompt and settings."""
    from rlaif.judge import definition

    judge = definition.find(name)
    console.put(f"# {judge.folder}\n")
    console.put((judge.folder / "judge.toml").read_text(encoding="utf-8"))
    if (judge.folder / "prompt.md").exists():  # a reward model needs none
        console.put((judge.folder / "prompt.md").read_text(encoding="utf-8"))


@judges.command("new")
def new_judge(
    name: str,
    kind: Annotated[
        Literal["compare", "rate", "classify", "reward"], typer.Option(help="What it says of answers.")
    ] = "compare",
) -> None:
    """Write a judge of your own into ./judges."""
    from rlaif.judge import draft

    folder = draft.write(name, kind)
    console.put(f"{folder} is a judge to edit. Next: rlaif judges check {name}")


@judges.command("check")
def check_judge(
    name: str,
    lock: Annotated[bool, typer.Option("--lock", help="Write this version's line into checksums.txt.")] = False,
) -> None:
    """Read a judge's files and gold, and hold its text to its version."""
    from rlaif.judge import definition, gold, versions

    judge = definition.find(name)
    locked = versions.check(judge, lock=lock)
    console.put(f"{judge.name} version {judge.file.version} ({judge.file.kind}), hash {judge.hash}: good")
    console.put(f"version: {locked}")
    path = judge.folder / gold.FILE_NAME
    if not path.exists():
        console.put(f"gold: none in {path}; an exam needs some, or --gold FILE")
        return
    rows = gold.read(path, judge)
    console.put(f"gold: {len(rows)} rows in {path}")
    for warning in gold.balance(rows):
        console.say(f"warning: {warning}")


@judges.command("exam")
def examine_judge(
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
    from rlaif.config import CHECK
    from rlaif.errors import UsageError
    from rlaif.pipeline import exam
    from rlaif.settings import load

    if name == CHECK:
        if gold is None:
            raise UsageError(
                "the checks have no gold of their own", mend="Give --gold FILE, with `checks` in its rows."
            )
        _show_exam(exam.take_checks(gold), json)
        return
    settings = load(Path(), {"judge.model": model, "judge.base_url": base_url,
                             **client_flags(concurrency, seed, max_failures, budget_usd)})  # fmt: skip
    if dry_run:
        show_plan(exam.plan(name, model, gold, settings, limit))
        return
    done = exam.take(name, model, gold, settings, console.Console(), limit)
    for warning in done.gold_warnings:
        console.say(f"warning: of this gold, {warning}")
    _show_exam(done.result, json)
    console.say(f"kept in {done.path}; rlaif judge goes by it")


def _show_exam(result: Result, json: bool) -> None:
    from rlaif.judge import exam

    if json:
        console.put_json(result.as_json())
        return
    for name, value in result.figures.items():
        if value is not None:
            figures = (f"{number:.3f}" if abs(number) < 10 else f"{number:,.0f}"
                       for number in (value.value, value.low, value.high))  # fmt: skip
            console.put("{:<30} {:>7} [{}, {}]  n = {:,}".format(name, *figures, value.n))
    if result.reliability:
        console.put("\nreliability: | how sure, o how often right, - its interval")
        for line in exam.plot(result.reliability):
            console.put(line)
    verdict = {
        "good": "better than always choosing the longer answer",
        "unproven": "not shown to be better than always choosing the longer answer",
        "bad": "its labels are worth nothing",
    }[result.standing if result.kind != "classify" or result.standing == "bad" else "good"]
    if result.kind == "classify" and result.standing != "bad":
        verdict = "better than always the commonest label"
    console.put(f"\n{'; '.join(result.faults) + ': ' if result.faults else ''}{verdict}")


@prompts.command("list")
def list_prompts(json: Json = False) -> None:
    """The packaged prompt sets."""
    from rlaif import packaged

    sizes = {name: sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
             for name, path in packaged.prompt_sets().items()}  # fmt: skip
    if json:
        console.put_json(sizes)
        return
    for name, size in sizes.items():
        console.put(f"{name:<16} {size:>6,} prompts")


@prompts.command("show")
def show_prompts(name: str) -> None:
    """A set's prompts, as JSON Lines."""
    from rlaif import packaged
    from rlaif.errors import UsageError, did_you_mean

    sets = packaged.prompt_sets()
    if name not in sets:
        raise UsageError(f"there is no prompt set {name!r}. {did_you_mean(name, sets)}")
    console.put(sets[name].read_text(encoding="utf-8").rstrip("\n"))


@prompts.command("new")
def new_prompts(name: str) -> None:
    """Write a prompt file of your own into ./prompts."""
    from rlaif.generate import draft

    path = draft.write(name)
    console.put(f"{path} is a prompt file to edit, a row a line. Next: rlaif prompts check {path}")


@prompts.command("check")
def check_prompts(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="What generate takes as --prompts.")],
    json: Json = False,
) -> None:
    """Read prompts as generate would: bad rows, checks that no answer can be held to, and duplicates."""
    from rlaif.pipeline import sources as looking
    from rlaif.settings import load

    found = looking.look(sources, load(Path(), {}))
    if json:
        console.put_json(found.__dict__)
    else:
        for told in found.bad[:SHOWN]:
            console.say(told)
        if len(found.bad) > SHOWN:
            console.say(f"and {len(found.bad) - SHOWN:,} more bad rows")
        console.put(f"{found.prompts:,} prompts would be taken, {len(found.bad):,} rows are bad")
        for reason, places in found.left_out.items():
            more = ", ..." if len(places) > SHOWN else ""
            console.put(f"{len(places):,} would be left out ({reason}): {', '.join(places[:SHOWN])}{more}")
    if found.bad:
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
    from rlaif import settings
    from rlaif.report import doctor as examining
    from rlaif.run.directory import open_run

    models = dict.fromkeys(model or [], "sampler.vllm")
    if run:
        config = settings.load(open_run(run).path, {})
        judged = {seat.model: "judge.vllm" for seat in config.panel() if not seat.base_url}
        models = {**judged, **{each.model: "sampler.vllm" for each in config.pool() if not each.base_url}, **models}
    findings = examining.examine(models)
    if json:
        console.put_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            console.put(f"{finding.mark:<5} {finding.what:<18} {finding.told}")
            if finding.mend:
                console.put(f"{'':<24} {finding.mend}")
    if any(finding.mark == "lacks" for finding in findings):
        raise typer.Exit(4)
