"""What several commands share: their options, the settings that these make, and how results are told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlaif.cli import console
from rlaif.errors import UsageError

if TYPE_CHECKING:
    from rlaif.config.models import Config, JudgeConfig, PanelMemberConfig
    from rlaif.labeling.build_dataset import BuildResult
    from rlaif.run.run import Run

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


def open_run_with_config(path: Path, flags: Mapping[str, Any], *, creates_run: bool = False) -> tuple[Run, Config]:
    """The run at ``path``, and its settings with ``flags`` (dotted names; None is not given) over them.

    Raises :class:`rlaif.errors.RunError` where there is none, unless the command ``creates_run``."""
    from rlaif.config import loader
    from rlaif.run.run import Run, open_run

    return Run(path) if creates_run else open_run(path), loader.load(path, flags)


def config_as_judged(run: Run, settings: Config, *, keep_seed: bool = False) -> Config:
    """``settings`` with the policies that answered and the panel, rules and seed that the run was judged with, which
    flags may have given then. Where the judges are served is what ``settings`` say, if they say it of the same models.
    ``keep_seed``: the seed is that of ``settings`` where one was given, by flag, environment or file."""
    from rlaif.config.models import Config

    stages = run.manifest()["stages"]
    judge_stage, generate_stage = stages.get("judge"), stages.get("generate")
    if not judge_stage:
        raise UsageError("nothing was judged yet", location=str(run.path), hint=f"Run first: rlaif judge {run.path}")
    if generate_stage:
        generate_config = Config.model_validate(generate_stage["config"])
        sampler = settings.sampler.model_copy(
            update={"model": generate_config.sampler.model, "base_url": generate_config.sampler.base_url}
        )
        settings = settings.model_copy(update={"policies": generate_config.policies, "sampler": sampler})
    judged_config = Config.model_validate(judge_stage["config"])
    judge, panel = _with_current_servers(run, judged_config, settings)
    seed = settings.seed if keep_seed and "seed" in settings.model_fields_set else judged_config.seed
    return settings.model_copy(update={"judge": judge, "panel": panel, "pairs": judged_config.pairs, "seed": seed})


def _with_current_servers(run: Run, before: Config, now: Config) -> tuple[JudgeConfig, list[PanelMemberConfig]]:
    """[judge] and [[panel]] of ``before``, with the base_url and vllm of ``now``: a server may have moved since."""
    from rlaif.config.loader import CONFIG_FILE

    updates: dict[str, Any] = {}
    if "base_url" in now.judge.model_fields_set and now.judge.model in (None, before.judge.model):
        updates["base_url"] = now.judge.base_url
    if (run.path / CONFIG_FILE).exists():  # vLLM's settings stand nowhere else: what is gone there is gone
        updates["vllm"] = now.judge.vllm
    current = {(member.name, member.model): member for member in now.panel}
    panel = [current.get((member.name, member.model), member).model_copy(update={"weight": member.weight})
             for member in before.panel]  # fmt: skip
    return before.judge.model_copy(update=updates), panel


def client_flags(
    concurrency: int | None, seed: int | None, max_failures: int | None, budget_usd: float | None
) -> dict[str, Any]:
    return {
        "client.concurrency": concurrency,
        "seed": seed,
        "client.max_failures": max_failures,
        "client.budget_usd": budget_usd,
    }


def backends_for(run: Run, settings: Config) -> Any:
    from rlaif.llm.backends import ModelBackends

    return ModelBackends(run.log, settings.client, console.log, settings.cluster)


def log_early_stop(reason: str | None) -> None:
    if reason:
        console.log(f"stopped early: {reason}. The same command goes on from here.")


def print_dry_run(plan: Any) -> None:
    console.echo_json(plan.request)
    console.log(plan.summary())


def print_pair_summary(built: BuildResult, run: Path) -> None:
    def format_counts(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()) or "none"

    console.log(f"{built.candidates:,} candidate pairs: {format_counts(built.outcomes)}")
    console.log(f"routes: {format_counts(built.routes)}")
    if built.left_out:
        console.log(f"answers left out: {format_counts(built.left_out)}")
    if built.prompts_without_pair:
        console.log(f"{built.prompts_without_pair:,} prompts gave no pair worth comparing")
    if built.dataset_counts.left_out:
        console.log(f"not in the dataset: {format_counts(built.dataset_counts.left_out)}")
    if built.dataset_counts.human_written:
        console.log(f"in {built.dataset_counts.human_written:,} pairs the chosen answer is one that a person wrote")
    for line in built.describe_labels():
        console.log(line)
    for warning in built.warnings:
        console.log(f"warning: {warning}")
    waiting = built.dataset_counts.left_out["awaiting_review"]
    following = f"rlaif review {run} (the page), or rlaif train {run}" if waiting else f"rlaif train {run}"
    console.echo(
        f"{built.dataset_counts.train:,} pairs to train on and {built.dataset_counts.test:,} to test on in {run / 'dataset'}, "
        f"{waiting:,} wait for review. Next: {following}"
    )
