"""Shared by several commands: their options, the settings that result from them, and the output of results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli import console
from rlaif.cli.settings_help import SETTINGS_HELP
from rlaif.config import choices
from rlaif.errors import UsageError

if TYPE_CHECKING:
    from rlaif.config.models import Config, JudgeConfig, PanelMemberConfig
    from rlaif.labeling.build_dataset import BuildResult
    from rlaif.run.run import Run


def setting_option(name: str, *flags: str, metavar: str | None = None) -> Any:
    """Return the option for the setting ``name`` (dotted). Its help, with unit and default, comes from the setting.

    ``flags`` are its names; by default the one that follows from the parameter.
    """
    option = typer.Option(*flags, metavar=metavar, help=SETTINGS_HELP[name], show_default=False)
    option.setting = name  # for docs/reference/commands.md
    return option


RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run directory", show_default=False, callback=console.remember_run)
]
Models = Annotated[list[str] | None, setting_option("sampler.model", "--model", "-m", metavar="M")]
BaseUrls = Annotated[list[str] | None, setting_option("sampler.base_url", metavar="URL")]
JudgeModel = Annotated[str | None, setting_option("judge.model", "--model", "-m", metavar="M")]
JudgeBaseUrls = Annotated[list[str] | None, setting_option("judge.base_url", metavar="URL")]
Concurrency = Annotated[int | None, setting_option("client.concurrency")]
Seed = Annotated[int | None, setting_option("seed")]
Limit = Annotated[int | None, setting_option("prompts.limit")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show one request, the number of requests and the estimated cost; send none")
]
MaxFailures = Annotated[int | None, setting_option("client.max_failures")]
Budget = Annotated[float | None, setting_option("client.budget_usd")]
Batch = Annotated[bool | None, setting_option("client.use_batch_api", "--batch")]
OnBadRow = Annotated[choices.OnBadRow | None, setting_option("prompts.on_bad_row")]


def open_run_with_config(path: Path, flags: Mapping[str, Any], *, creates_run: bool = False) -> tuple[Run, Config]:
    """Return the run at ``path`` and its settings. ``flags`` have dotted names; None means that it was not given.

    Raises :class:`rlaif.errors.RunError` if `path` is not a run, unless the command ``creates_run``.
    """
    from rlaif.config import loader
    from rlaif.run.run import Run, open_run

    return Run(path) if creates_run else open_run(path), loader.load(path, flags)


def config_as_judged(run: Run, settings: Config, *, keep_seed: bool = False) -> Config:
    """Return ``settings`` with the policies, panel, pair rules and seed that the run was judged with.

    These may have come from flags of the earlier command. The servers of the judges come from ``settings``, if they
    name the same models. ``keep_seed``: use the seed of ``settings`` if a flag, the environment or the file sets it.
    Raises :class:`UsageError` if nothing was judged yet.
    """
    from rlaif.config.models import Config

    stages = run.manifest()["stages"]
    judge_stage, generate_stage = stages.get("judge"), stages.get("generate")
    if not judge_stage:
        raise UsageError("nothing was judged yet", location=str(run.path), hint=f"Run `rlaif judge {run.path}` first.")
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
    """Return [judge] and [[panel]] of ``before`` with the base_url and vllm of ``now``: a server may have moved."""
    from rlaif.config.loader import CONFIG_FILE

    updates: dict[str, Any] = {}
    if "base_url" in now.judge.model_fields_set and now.judge.model in (None, before.judge.model):
        updates["base_url"] = now.judge.base_url
    if (run.path / CONFIG_FILE).exists():  # the only place for vLLM options: those deleted from it are gone
        updates["vllm"] = now.judge.vllm
    current = {(member.name, member.model): member for member in now.panel}
    panel = [
        current.get((member.name, member.model), member).model_copy(update={"weight": member.weight})
        for member in before.panel
    ]
    return before.judge.model_copy(update=updates), panel


def client_flags(
    concurrency: int | None, seed: int | None, max_failures: int | None, budget_usd: float | None
) -> dict[str, Any]:
    """Return the settings of the flags that every command with requests has."""
    return {
        "client.concurrency": concurrency,
        "seed": seed,
        "client.max_failures": max_failures,
        "client.budget_usd": budget_usd,
    }


def backends_for(run: Run, settings: Config) -> Any:
    """Return the context manager that starts and ends the servers of a command."""
    from rlaif.llm.backends import ModelBackends

    return ModelBackends(run.log, settings.client, console.log, settings.cluster)


def log_early_stop(reason: str | None, settings: Config) -> None:
    """Log why the command stopped early. ``reason``: a :class:`~rlaif.llm.stop_reason.StopReason`, or its value."""
    from rlaif.llm.stop_reason import StopReason, describe_stop

    if reason:
        text = describe_stop(StopReason(reason), settings.client.budget_usd)
        console.log(f"stopped early: {text}. Rerun the same command to resume.")


def print_dry_run(plan: Any) -> None:
    console.echo_json(plan.request)
    console.log(plan.summary())


def print_pair_summary(built: BuildResult, run: Path) -> None:
    from rlaif.display_names import LABEL_DROP_REASONS

    def format_counts(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()) or "none"

    console.log(f"{built.candidates:,} candidate pairs: {format_counts(built.outcomes)}")
    console.log(f"routes: {format_counts(built.routes)}")
    if built.dropped_completions:
        console.log(f"answers dropped: {format_counts(built.dropped_completions)}")
    if built.prompts_without_pair:
        console.log(f"{built.prompts_without_pair:,} prompts have no candidate pair")
    if built.dataset_counts.dropped:
        console.log(f"not in the dataset: {format_counts(built.dataset_counts.dropped)}")
    if built.dataset_counts.carried:
        console.log(f"{built.dataset_counts.carried:,} pairs have a human label from outside the current review queue")
    for reason, count in built.dropped_labels.items():
        console.log(f"{count:,} human labels not used: {LABEL_DROP_REASONS[reason]}")
    if built.dataset_counts.human_written:
        console.log(f"{built.dataset_counts.human_written:,} pairs have a chosen answer written by an annotator")
    if unknown := built.describe_unknown_answers():
        console.log(unknown)
    for line in built.describe_labels():
        console.log(line)
    for warning in built.warnings:
        console.log(f"warning: {warning}")
    console.echo(
        f"{built.dataset_counts.train:,} pairs to train on and {built.dataset_counts.test:,} to test on in "
        f"{run / 'dataset'}, {built.dataset_counts.dropped['awaiting_review']:,} await review"
    )
    print_next_step(run)


def print_next_step(run: Path) -> None:
    """Print what the run needs next, as `rlaif status` and the report do."""
    from rlaif.report.next_step import next_step
    from rlaif.run.run import Run

    console.echo(f"Next: {next_step(Run(run))}")
