"""The facts that decide what a run needs next: counts, stages, label quality, the newest training and evaluation.

Reads the run and writes nothing. A fact that was not measured is None, never zero. Other stages leave their facts here:

    manifest stages.judge.labels                agreement, remaining error, calibration
    OUTPUT/training.json                        settings, results and history of a training
    RUN/evaluation/evaluation.json              results of ``rlaif evaluate``
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from rlaif.report.run_status import RunStatus, run_status
from rlaif.run.run import Run
from rlaif.run.training_output import trained_model_name
from rlaif.stats import Estimate

if TYPE_CHECKING:
    from rlaif.report.judge_stats import PairStats, PositionStats

PIPELINE_STAGE = "run"
"""The stage of `rlaif run`. Its time and cost are those of the stages inside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """Time, usage and failures of one stage, over all its starts."""

    name: str
    started: str
    """Time of the first start"""
    ended: str | None
    """Time of the last end; None while it runs, or if it was killed"""
    starts: int
    seconds: float
    """Time by the clock, server start included"""
    failures: dict[str, int]
    """Failures of the last start, by kind: each start retries the failures before it"""
    refusal: str | None = None
    """Reason for which the last start was refused"""
    requests: int = 0
    answers: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of one run."""

    path: str
    status: RunStatus
    stages: list[StageSummary]
    missing_answers: int
    """Sampled answers that were requested and are missing"""
    labels: dict[str, Any] | None
    """:meth:`rlaif.pair.label_quality.LabelQuality.summary`"""
    pairs: PairStats | None
    position_stats: list[PositionStats] | None
    training: dict[str, Any] | None
    """training.json and, under "output", its folder"""
    evaluation: dict[str, Any] | None
    """evaluation.json of the newest training"""
    stale_evaluation: str | None
    """Name of the evaluated model, if that is an earlier one"""


def collect_facts(run: Run) -> RunFacts:
    """Collect the facts of ``run``. Raises :class:`rlaif.errors.RunError` for a damaged manifest or journal."""
    stages: dict[str, Any] = run.manifest()["stages"]
    status = run_status(run)
    training = load_training(run, stages)
    evaluation, stale_evaluation = load_evaluation(run, training)
    judge_stage = stages.get("judge", {})
    pairs, position_stats = _label_stats(run, judge_stage)
    return RunFacts(
        path=str(run.path),
        status=status,
        stages=[_stage_summary(name, stage) for name, stage in stages.items() if name != PIPELINE_STAGE],
        missing_answers=_missing_answers(stages, status),
        labels=judge_stage.get("labels") or None,
        pairs=pairs,
        position_stats=position_stats,
        training=training,
        evaluation=evaluation,
        stale_evaluation=stale_evaluation,
    )


def load_training(run: Run, stages: Mapping[str, Any]) -> dict[str, Any] | None:
    """Load the settings, results and history of the newest training; None if nothing was trained."""
    config = stages.get("train", {}).get("config", {}).get("train", {})
    output = Path(config["output"]) if config.get("output") else run.model
    stored = _read_json(output / "training.json")
    return None if stored is None else {"output": str(output), **stored}


def load_evaluation(run: Run, training: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
    """Load the evaluation of the newest training; or None, and the name of the earlier model that was evaluated."""
    evaluation = _read_json(run.path / "evaluation" / "evaluation.json")
    if evaluation is None or training is None:
        return evaluation, None
    is_current = evaluation.get("trained") == trained_model_name(Path(training["output"]), training)
    return (evaluation, None) if is_current else (None, str(evaluation.get("trained")))


def find_estimate(group: Mapping[str, Any] | None, name: str) -> Estimate | None:
    """Return the estimate ``name`` of the JSON object ``group``; None if it is missing or has no observations."""
    value = (group or {}).get(name)
    if not isinstance(value, Mapping) or not value.get("n") or "low" not in value:
        return None
    return Estimate(value["value"], value["low"], value["high"], value["n"])


def _label_stats(run: Run, judge_stage: Mapping[str, Any]) -> tuple[PairStats | None, list[PositionStats] | None]:
    if not run.pairs_path.exists():
        return None, None
    from rlaif.report import judge_stats

    judges = [(judge["hash"], judge["model"]) for judge in judge_stage.get("judges", [])]
    has_verdicts = run.journal_path("verdicts").exists()
    return judge_stats.pair_stats(run), judge_stats.position_stats(run, judges) if has_verdicts else []


def _missing_answers(stages: Mapping[str, Any], status: RunStatus) -> int:
    config = stages.get("generate", {}).get("config")
    if not config or "import" in stages:
        return 0
    requested: int = (status.prompts - status.heldout) * config["sampler"]["n"]
    return max(0, requested - status.completions.answers)


def _stage_summary(name: str, stage: Mapping[str, Any]) -> StageSummary:
    starts = stage.get("history", [])
    last_start = starts[-1] if starts else {}

    def total(field: str) -> Any:
        return sum(start.get(field) or 0 for start in starts)

    return StageSummary(
        name=name,
        started=(starts or [stage])[0].get("started", ""),
        ended=stage.get("ended"),
        starts=len(starts) + (stage.get("ended") is None),
        seconds=round(sum(_wall_seconds(start) for start in starts), 1),
        failures=dict(last_start.get("failures", {})),
        refusal=last_start.get("refusal") if stage.get("ended") else None,
        requests=total("requests"),
        answers=total("answers"),
        retries=total("retries"),
        prompt_tokens=total("prompt_tokens"),
        cached_tokens=total("cached_tokens"),
        completion_tokens=total("completion_tokens"),
        cost_usd=total("cost_usd"),
    )


def _wall_seconds(start: Mapping[str, Any]) -> float:
    """Return the duration of one start by the clock, which includes the server's start."""
    counted = float(start.get("seconds", 0.0))
    try:
        began, ended = (datetime.datetime.fromisoformat(start[name]) for name in ("started", "ended"))
    except (KeyError, TypeError, ValueError):
        return counted
    return max((ended - began).total_seconds(), counted)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
