"""The commands of a run: init, generate, judge, review, train, export, status."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlaif.cli import console
from rlaif.errors import RlaifError, UsageError

if TYPE_CHECKING:
    from rlaif.config import Config
    from rlaif.pipeline.build import Built
    from rlaif.run.directory import Run

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", show_default=False)]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", metavar="M", show_default=False, help="The model that answers; several make a pool."),
]
BaseUrls = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL",
        show_default=False,
        help="An OpenAI-compatible server, several for the least loaded. Without it rlaif runs vLLM itself.",
    ),
]
Concurrency = Annotated[int | None, typer.Option(help="Requests in flight at most.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Fixes every choice left to chance.", show_default=False)]
Limit = Annotated[int | None, typer.Option(help="Stop after this many prompts.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show one request, the number of calls and the cost.")]
MaxFailures = Annotated[int | None, typer.Option(help="Answers that may be missing.", show_default=False)]
Budget = Annotated[float | None, typer.Option(help="Send nothing more once this is spent.", show_default=False)]
OnBadRow = Annotated[
    Literal["stop", "skip"] | None, typer.Option(help="Stop at bad rows, or leave them out.", show_default=False)
]


def init(run: RunPath) -> None:
    """Make a run: a directory with a commented rlaif.toml."""
    from rlaif import config

    path = run / config.FILE_NAME
    if path.exists():
        raise UsageError("there is one already", where=str(path), mend="Edit it, or name another directory.")
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(config.template(), encoding="utf-8")
    except OSError as error:
        raise RlaifError(f"cannot be written: {error.strerror}", where=str(path)) from None
    console.put(f"wrote {path}. Edit it, then: rlaif generate {run}")


def generate(
    run: RunPath,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", show_default=False, help="A packaged set, a file, or hf:NAME."),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", show_default=False, help="Bring your own answers."),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Answers to each prompt.", show_default=False)] = None,
    model: Models = None,
    base_url: BaseUrls = None,
    temperature: Annotated[float | None, typer.Option(help="Of the sampling.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of an answer at most.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt for prompts without one.")] = None,
    heldout_share: Annotated[float | None, typer.Option(help="Share of prompts set aside for evaluation.")] = None,
    decontaminate: Annotated[
        list[str] | None, typer.Option(metavar="SRC", help="Leave out prompts that overlap this evaluation file.")
    ] = None,
    on_bad_row: OnBadRow = None,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
) -> None:
    """Sample several answers to each prompt, or --import answers that exist."""
    target, settings = _open(
        run,
        {
            "prompts.source": prompts,
            "sampler.n": n,
            "sampler.model": model,
            "sampler.base_url": base_url,
            "sampler.temperature": temperature,
            "sampler.max_tokens": max_tokens,
            "sampler.system": system,
            "prompts.heldout_share": heldout_share,
            "prompts.decontaminate": decontaminate,
            "prompts.on_bad_row": on_bad_row,
            "prompts.limit": limit,
            **_client(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import pipeline

    if import_ is not None:
        if prompts or model:
            raise UsageError("--import brings prompts and answers: --prompts and --model do not go with it")
        brought = pipeline.import_completions(target, settings, str(import_), console.Console())
        console.put(
            f"{brought.prompts:,} prompts with {brought.completions:,} answers ({brought.new:,} new) in {run}. "
            f"Next: rlaif judge {run}"
        )
        return
    if dry_run:
        _show_plan(pipeline.plan_generate(target, settings))
        return
    with _engines(target, settings) as engines:
        done = pipeline.generate(target, settings, console.Console(), engines)
    for reason, count in done.left_out.items():
        console.say(f"left out {count:,} prompts: {reason}")
    if done.heldout:
        console.say(f"held out {done.heldout:,} prompts for evaluation")
    _stopped(done.stopped)
    console.put(f"{done.completions:,} answers to {done.prompts:,} prompts in {run}. Next: rlaif judge {run}")


def judge(
    run: RunPath,
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[@MODEL]", show_default=False, help="A judge; several make a panel."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="J", show_default=False, help="The model that judges.")
    ] = None,
    base_url: BaseUrls = None,
    strategy: Annotated[
        Literal["auto", "rate-then-compare", "round-robin", "rate-only"] | None,
        typer.Option(help="Which pairs are compared.", show_default=False),
    ] = None,
    human_share: Annotated[float | None, typer.Option(help="Share of pairs for people.", show_default=False)] = None,
    min_probability: Annotated[float | None, typer.Option(help="Keep a pair from here on.", show_default=False)] = None,
    min_margin: Annotated[float | None, typer.Option(help="Least gap of ratings.", show_default=False)] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Judge anew under changed settings.")] = False,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
) -> None:
    """Judge the answers, build the pairs, fill the review queue, write the dataset."""
    target, settings = _open(
        run,
        {
            "judge.judges": judge,
            "judge.model": model,
            "judge.base_url": base_url,
            "judge.strategy": strategy,
            "judge.limit": limit,
            "pairs.human_share": human_share,
            "pairs.min_probability": min_probability,
            "pairs.min_margin": min_margin,
            **_client(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import pipeline

    if dry_run:
        _show_plan(pipeline.plan_judge(target, settings))
        return
    with _engines(target, settings) as engines:
        done = pipeline.judge(target, settings, console.Console(), engines, restart=restart)
    _stopped(done.stopped)
    _show_pairs(done.built, run)


def review(
    run: RunPath,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Write the queue for a person, blind.")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", show_default=False, help="Read their choices back.")
    ] = None,
    format_: Annotated[
        Literal["csv", "jsonl"] | None, typer.Option("--format", help="By FILE's ending otherwise.")
    ] = None,
    annotator: Annotated[str, typer.Option(metavar="NAME", help="Whose labels these are.")] = "reviewer",
    merge: Annotated[bool, typer.Option("--merge", help="Write the dataset anew with what people said.")] = False,
    on_bad_row: OnBadRow = None,
) -> None:
    """Hand the review queue to a person, and take their labels back."""
    from rlaif import pipeline
    from rlaif.review import exchange

    if sum((export is not None, import_ is not None, merge)) != 1:
        raise UsageError("say what to do with the queue", mend="One of --export FILE, --import FILE, --merge.")
    target, settings = _open(run, {})
    if export is not None:
        chosen = format_ or ("jsonl" if export.suffix == ".jsonl" else "csv")
        count = exchange.export_queue(target, export, format=chosen, annotator=annotator, seed=settings.seed)
        console.put(
            f"{count:,} pairs for {annotator} in {export}. Fill in choice (left, right, tie, both_bad, skip), "
            f"then: rlaif review {run} --import {export} --annotator {annotator}"
        )
        return
    if import_ is not None:
        result = exchange.import_reviews(
            target, import_, annotator=annotator, seed=settings.seed, on_bad_row=on_bad_row or "stop"
        )
        for problem in result.bad:
            console.say(f"skipped: {problem}")
        console.say(
            f"{result.added:,} labels read, {result.changed:,} changed, {result.unchanged:,} known before, "
            f"{result.unlabelled:,} rows still without a choice"
        )
    _show_pairs(pipeline.rebuild(target, _as_judged(target, settings)), run)


def train(
    run: RunPath,
    method: Annotated[Literal["dpo"] | None, typer.Option(help="How to train.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", show_default=False, help="Default: the run's policy.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Default: RUN/model.")
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora/--full", help="An adapter, or all weights.", show_default=False)
    ] = None,
    loss: Annotated[list[str] | None, typer.Option(help="A DPO loss of TRL by name.", show_default=False)] = None,
    beta: Annotated[float | None, typer.Option(help="Strength of the KL term.", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="By method if not given.", show_default=False)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the pairs.", show_default=False)] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many.", show_default=False)] = None,
    seed: Seed = None,
) -> None:
    """Train on the dataset with TRL's DPOTrainer."""
    target, settings = _open(
        run,
        {
            "train.method": method,
            "train.model": model,
            "train.output": str(output) if output else None,
            "train.lora": lora,
            "train.loss": loss,
            "train.beta": beta,
            "train.learning_rate": learning_rate,
            "train.epochs": epochs,
            "train.max_steps": max_steps,
            "seed": seed,
        },
    )
    from rlaif import pipeline

    result = pipeline.train(target, _as_judged(target, settings), console.Console())
    console.put(f"trained on {result.pairs:,} pairs in {result.steps:,} steps ({result.seconds:,.0f} s)")
    for name, path in result.paths().items():
        console.put(f"{name}: {path}")


def export(
    run: RunPath,
    format_: Annotated[
        Literal["trl", "h4", "llama-factory", "axolotl", "openrlhf"], typer.Option("--format", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", show_default=False)],
) -> None:
    """Write the dataset as another trainer reads it."""
    from rlaif.pair import formats
    from rlaif.run.directory import open_run

    target = open_run(run)
    for path in formats.export_dataset(target.dataset, format_, output):
        console.put(str(path))


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


def _open(path: Path, flags: Mapping[str, Any]) -> tuple[Run, Config]:
    from rlaif import config
    from rlaif.run.directory import Run

    return Run(path), config.load(path, flags)


def _as_judged(run: Run, settings: Config) -> Config:
    """``settings`` with the panel and rules that the run was judged with, which flags may have given then."""
    from rlaif.config import Config

    stage = run.manifest()["stages"].get("judge")
    if not stage:
        raise UsageError("nothing was judged yet", where=str(run.path), mend=f"Run first: rlaif judge {run.path}")
    before = Config.model_validate(stage["config"])
    return settings.model_copy(update={"judge": before.judge, "judges": before.judges, "pairs": before.pairs,
                                       "seed": before.seed})  # fmt: skip


def _client(
    concurrency: int | None, seed: int | None, max_failures: int | None, budget_usd: float | None
) -> dict[str, Any]:
    return {
        "client.concurrency": concurrency,
        "seed": seed,
        "client.max_failures": max_failures,
        "client.budget_usd": budget_usd,
    }


def _engines(run: Run, settings: Config) -> Any:
    from rlaif.llm.server import Engines

    return Engines(run.log, settings.client, console.say)


def _stopped(reason: str | None) -> None:
    if reason:
        console.say(f"stopped early: {reason}. The same command goes on from here.")


def _show_plan(plan: Any) -> None:
    console.put_json(plan.request)
    console.say(plan.summary())


def _show_pairs(built: Built, run: Path) -> None:
    def listed(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"

    console.say(f"{built.candidates:,} candidate pairs: {listed(built.outcomes)}")
    console.say(f"routes: {listed(built.routes)}")
    if built.left_out:
        console.say(f"answers left out: {listed(built.left_out)}")
    if built.without_pair:
        console.say(f"{built.without_pair:,} prompts gave no pair worth comparing")
    if built.merged.left_out:
        console.say(f"not in the dataset: {listed(built.merged.left_out)}")
    if built.agreement:
        console.say(f"people agree with the judges on {built.agreement} of audited pairs")
    for warning in built.warnings:
        console.say(f"warning: {warning}")
    waiting = built.merged.left_out["waits for review"]
    following = f"rlaif review {run} --export queue.csv, or rlaif train {run}" if waiting else f"rlaif train {run}"
    console.put(
        f"{built.merged.train:,} pairs to train on and {built.merged.test:,} to test on in {run / 'dataset'}, "
        f"{waiting:,} wait for review. Next: {following}"
    )
