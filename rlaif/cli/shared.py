"""What several commands share: their options, the settings that these make, and how results are told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlaif.cli import console
from rlaif.errors import UsageError

if TYPE_CHECKING:
    from rlaif.config import Config, JudgeConfig, JudgeEntry
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
        help="An OpenAI-compatible server; several, or file:PATH, for the least loaded. Without it rlaif runs vLLM.",
    ),
]
Concurrency = Annotated[int | None, typer.Option(help="Requests in flight at most.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Fixes every choice left to chance.", show_default=False)]
Limit = Annotated[int | None, typer.Option(help="Stop after this many prompts.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show one request, the number of calls and the cost.")]
MaxFailures = Annotated[int | None, typer.Option(help="Answers that may be missing.", show_default=False)]
Budget = Annotated[float | None, typer.Option(help="Send nothing more once this is spent.", show_default=False)]
Batch = Annotated[
    bool | None,
    typer.Option("--batch", help="By the provider's batch API: half the price, within a day.", show_default=False),
]
OnBadRow = Annotated[
    Literal["stop", "skip"] | None, typer.Option(help="Stop at bad rows, or leave them out.", show_default=False)
]


def open_with(path: Path, flags: Mapping[str, Any], *, begins: bool = False) -> tuple[Run, Config]:
    """The run at ``path``, and its settings with ``flags`` (dotted names; None is not given) over them.

    Raises :class:`rlaif.errors.RunError` where there is none, unless the command ``begins`` one."""
    from rlaif import settings
    from rlaif.run.directory import Run, open_run

    return Run(path) if begins else open_run(path), settings.load(path, flags)


def as_judged(run: Run, settings: Config, *, own_seed: bool = False) -> Config:
    """``settings`` with the policies that answered and the panel, rules and seed that the run was judged with, which
    flags may have given then. Where the judges are served is what ``settings`` say, if they say it of the same models.
    ``own_seed``: the seed is that of ``settings`` where one was given, by flag, environment or file."""
    from rlaif.config import Config

    stages = run.manifest()["stages"]
    stage, answered = stages.get("judge"), stages.get("generate")
    if not stage:
        raise UsageError("nothing was judged yet", where=str(run.path), mend=f"Run first: rlaif judge {run.path}")
    if answered:
        asked = Config.model_validate(answered["config"])
        sampler = settings.sampler.model_copy(update={"model": asked.sampler.model, "base_url": asked.sampler.base_url})
        settings = settings.model_copy(update={"policies": asked.policies, "sampler": sampler})
    before = Config.model_validate(stage["config"])
    judge, seats = _served_as_now(run, before, settings)
    seed = settings.seed if own_seed and "seed" in settings.model_fields_set else before.seed
    return settings.model_copy(update={"judge": judge, "judges": seats, "pairs": before.pairs, "seed": seed})


def _served_as_now(run: Run, before: Config, now: Config) -> tuple[JudgeConfig, list[JudgeEntry]]:
    """[judge] and [[judges]] of ``before``, with the base_url and vllm of ``now``: a server may have moved since."""
    from rlaif.settings import FILE_NAME

    moved: dict[str, Any] = {}
    if "base_url" in now.judge.model_fields_set and now.judge.model in (None, before.judge.model):
        moved["base_url"] = now.judge.base_url
    if (run.path / FILE_NAME).exists():  # vLLM's settings stand nowhere else: what is gone there is gone
        moved["vllm"] = now.judge.vllm
    known = {(seat.name, seat.model): seat for seat in now.judges}
    seats = [known.get((seat.name, seat.model), seat).model_copy(update={"weight": seat.weight})
             for seat in before.judges]  # fmt: skip
    return before.judge.model_copy(update=moved), seats


def client_flags(
    concurrency: int | None, seed: int | None, max_failures: int | None, budget_usd: float | None
) -> dict[str, Any]:
    return {
        "client.concurrency": concurrency,
        "seed": seed,
        "client.max_failures": max_failures,
        "client.budget_usd": budget_usd,
    }


def engines_for(run: Run, settings: Config) -> Any:
    from rlaif.llm.engines import Engines

    return Engines(run.log, settings.client, console.say, settings.cluster)


def say_stopped(reason: str | None) -> None:
    if reason:
        console.say(f"stopped early: {reason}. The same command goes on from here.")


def show_plan(plan: Any) -> None:
    console.put_json(plan.request)
    console.say(plan.summary())


def show_pairs(built: Built, run: Path) -> None:
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
    if built.merged.edited:
        console.say(f"in {built.merged.edited:,} pairs the chosen answer is one that a person wrote")
    for line in built.sentences():
        console.say(line)
    for warning in built.warnings:
        console.say(f"warning: {warning}")
    waiting = built.merged.left_out["waits for review"]
    following = f"rlaif review {run} (the page), or rlaif train {run}" if waiting else f"rlaif train {run}"
    console.put(
        f"{built.merged.train:,} pairs to train on and {built.merged.test:,} to test on in {run / 'dataset'}, "
        f"{waiting:,} wait for review. Next: {following}"
    )
