"""The stages of a run, one function each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif.config.models import Config
from rlaif.errors import DatasetChangedError, MissingDependencyError, UsageError, write_error
from rlaif.generate import ingest, sampling
from rlaif.generate.import_completions import CompletionImport, import_source
from rlaif.labeling import judge_exam
from rlaif.labeling.build_dataset import BuildResult, build_dataset
from rlaif.labeling.judging import JudgingRounds, load_panel, resolve_strategy
from rlaif.llm.backends import ModelBackends
from rlaif.llm.reporter import Reporter
from rlaif.llm.stage_limits import StageLimits, new_meter, raise_if_too_many_failures
from rlaif.llm.stop_reason import StopReason
from rlaif.llm.usage import UsageMeter
from rlaif.records import PromptDropReason
from rlaif.run.run import Run, require_completions

if TYPE_CHECKING:
    from rlaif.train.artifacts import TrainResult
    from rlaif.train.prepare import PreparedTraining


@dataclass
class GenerateResult:
    """Counts after ``generate``. ``completions``: all answers in the journal; ``dropped``: prompts by reason."""

    prompts: int
    heldout: int
    completions: int
    dropped: dict[PromptDropReason, int]
    usage: UsageMeter
    stop_reason: StopReason | None = None


@dataclass
class JudgeResult:
    """Outcome of ``judge``. ``build``: the pairs and the dataset; ``failed``: the number of requests without a
    verdict."""

    build: BuildResult
    usage: UsageMeter
    failed: int
    stop_reason: StopReason | None


def generate(
    run: Run,
    config: Config,
    reporter: Reporter,
    backends: ModelBackends,
    *,
    limits: StageLimits | None = None,
    max_prompts: int | None = None,
    ingested: ingest.IngestResult | None = None,
) -> GenerateResult:
    """Ingest the prompts, unless ``ingested`` is given, and sample their pending answers.

    ``max_prompts``: number of prompts to answer, in journal order; None for all.
    Raises :class:`TooManyFailuresError` at the end.
    """
    config.policies_resolved()
    with run.lock():
        run.start_stage("generate", config)
        ingested = ingested or ingest.ingest_prompts(run, config, reporter.log)
        usage = new_meter("generate", config, limits)
        usage.total = min(ingested.prompts - ingested.heldout, max_prompts or ingested.prompts) * config.sampler.n
        try:
            with reporter.progress(usage):
                usage.skipped = _count_answers(run)
                sampling.sample(run, config, backends, usage, max_prompts=max_prompts)
        finally:
            run.finish_stage("generate", **usage.summary(), prompts=ingested.prompts, heldout=ingested.heldout)
        with run.journal("completions") as journal:
            completed = len(journal.answered_keys)
    raise_if_too_many_failures(config, usage)
    return GenerateResult(
        prompts=ingested.prompts,
        heldout=ingested.heldout,
        completions=completed,
        dropped=dict(ingested.dropped),
        usage=usage,
        stop_reason=usage.stop_reason(),
    )


def run_ingest(run: Run, config: Config, reporter: Reporter) -> ingest.IngestResult:
    """Ingest the prompts: the first half of :func:`generate`."""
    config.policies_resolved()
    with run.lock():
        run.start_stage("generate", config)
        return ingest.ingest_prompts(run, config, reporter.log)


def import_completions(run: Run, config: Config, source: str, reporter: Reporter) -> CompletionImport:
    """Journal the prompts and answers of ``source``: ``rlaif generate --import``."""
    with run.lock():
        run.start_stage("import", config)
        imported = import_source(run, config, source, reporter.log)
        run.finish_stage("import", source=source, prompts=imported.prompts, completions=imported.completions)
    return imported


def _count_answers(run: Run) -> int:
    with run.journal("completions") as journal:
        return len(journal.answered_keys)


def judge(
    run: Run,
    config: Config,
    reporter: Reporter,
    backends: ModelBackends,
    *,
    restart: bool = False,
    limits: StageLimits | None = None,
) -> JudgeResult:
    """Ask the panel, aggregate verdicts, route pairs, and write tables/ and dataset/.

    ``restart``: allow settings that differ from those of earlier starts. Raises :class:`TooManyFailuresError` at the
    end.
    """
    panel = load_panel(config)
    strategy = resolve_strategy(config, panel)
    require_completions(run)
    exams = judge_exam.require_passed_exam(panel, config, reporter.log)
    with run.lock():
        run.start_stage("judge", config, restart=restart)
        run.update_manifest("judge", exams=[exam.as_json() for exam in exams])
        usage = new_meter("judge", config, limits)
        try:
            with run.journal("verdicts") as journal, reporter.progress(usage):
                rounds = JudgingRounds(run, config, backends, panel, strategy, journal, usage)
                candidates = rounds.judge_all()
        finally:
            run.finish_stage("judge", **usage.summary())
        with _disk_errors_as_run_errors(run):
            build_result = build_dataset(rounds, candidates)
    raise_if_too_many_failures(config, usage)
    return JudgeResult(build_result, usage, usage.failed, usage.stop_reason())


def rebuild_dataset(run: Run, config: Config) -> BuildResult:
    """Rebuild tables/ and dataset/ from the journals, reviews included. Asks no model."""
    panel = load_panel(config)
    strategy = resolve_strategy(config, panel)
    require_completions(run)
    with run.lock():
        rounds = JudgingRounds(run, config, None, panel, strategy, None, UsageMeter())
        with _disk_errors_as_run_errors(run):
            return build_dataset(rounds, rounds.judge_all())


@contextlib.contextmanager
def _disk_errors_as_run_errors(run: Run) -> Iterator[None]:
    """Re-raise errors of the disk (full, read-only) as :class:`RunError`."""
    try:
        yield
    except OSError as error:
        raise write_error(run.path, error) from None


def plan_train(run: Run, config: Config) -> tuple[PreparedTraining, str]:
    """Return the preflight of the current dataset, and one line about how it would be trained on. Writes nothing."""
    from rlaif.train import trainer

    _reject_ppo(run, config)
    return trainer.plan(run, config)


def train(run: Run, config: Config, reporter: Reporter, *, restart_if_dataset_changed: bool = False) -> TrainResult:
    """Merge new human labels into the dataset, then train.

    ``restart_if_dataset_changed``: if an earlier training had other rows, start over, as with ``train.overwrite``. The
    earlier model stays until the new one is written.
    """
    from rlaif.train import distributed, trainer

    if distributed.detect_placement(config.train).rank:  # of several machines, only the first locks the run
        return distributed.train(run, config, log=reporter.log)
    if run.pairs_path.exists():
        rebuild_dataset(run, _with_judging_seed(run, config))
    _reject_ppo(run, config)
    with run.lock():
        run.start_stage("train", config)
        run_training = distributed.train if config.train.launcher == "accelerate" else trainer.train
        try:
            result = _train_or_restart(run_training, run, config, reporter, restart=restart_if_dataset_changed)
        except (UsageError, MissingDependencyError) as error:
            # Refused before anything was trained: only an interrupted training stays unfinished.
            run.finish_stage("train", refusal=error.message)
            raise
        run.finish_stage("train", pairs=result.pairs, steps=result.steps, seconds=result.seconds)
    return result


def _train_or_restart(
    run_training: Callable[..., TrainResult], run: Run, config: Config, reporter: Reporter, *, restart: bool
) -> TrainResult:
    try:
        return run_training(run, config, log=reporter.log)
    except DatasetChangedError as error:
        if not restart:
            raise
        reporter.log(f"{error.message}: training starts over, in the same directory")
        restart_config = config.train.model_copy(update={"overwrite": True})
        return run_training(run, config.model_copy(update={"train": restart_config}), log=reporter.log)


def _with_judging_seed(run: Run, config: Config) -> Config:
    """Return ``config`` with the seed of the judge stage.

    Assignments and the test split depend on that seed, and training must not change them.
    """
    judge_config = run.manifest()["stages"].get("judge", {}).get("config", {})
    return config.model_copy(update={"seed": judge_config.get("seed", config.seed)})


def _reject_ppo(run: Run, config: Config) -> None:
    if config.train.method == "ppo":
        raise UsageError(
            "rlaif does not train with ppo itself: it exports the data and verl trains",
            location="train.method",
            hint=f"Export with `rlaif train {run.path} --method ppo`, or train here with `--method rloo`.",
        )


def export_for_verl(run: Run, config: Config) -> Path:
    """Merge new human labels into the dataset, then export it for verl. Returns the export's directory."""
    from rlaif.train import verl_export

    if run.pairs_path.exists():
        rebuild_dataset(run, _with_judging_seed(run, config))
    with run.lock():
        return verl_export.export_verl(run, config)
