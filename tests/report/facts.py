"""Facts of a run without problems, to be overridden one at a time."""

from __future__ import annotations

from typing import Any

from rlaif.report.judge_stats import PairStats, PositionStats
from rlaif.report.run_facts import RunFacts, StageSummary
from rlaif.report.run_status import JournalCounts, RunStatus
from rlaif.stats import Estimate


def make_estimate(value: float, low: float, high: float, n: int = 100) -> dict[str, Any]:
    """An estimate as JSON files hold it."""
    return {"value": value, "low": low, "high": high, "n": n}


def make_pair_stats(**overrides: Any) -> PairStats:
    defaults: dict[str, Any] = {
        "kept": 90,
        "longer_preferred": None,
        "confidence": [],
        "rating_margin": [],
        "log2_length_ratio": [],
        "drop_reasons": {},
        "awaiting_review": {},
    }
    return PairStats(**defaults | overrides)


def position_bias() -> PositionStats:
    return PositionStats("j", "m", Estimate(0.1, 0.05, 0.2, 100), Estimate(0.9, 0.8, 1.0, 100))


def make_facts(
    *,
    answers: int = 10,
    busy: bool = False,
    unfinished: str | None = None,
    train_pairs: int = 85,
    awaiting_review: dict[str, int] | None = None,
    judge_ended: str = "today",
    train_ended: str | None = None,
    refusal: str | None = None,
    **facts: Any,
) -> RunFacts:
    ended = {"judge": judge_ended} | ({"train": train_ended} if train_ended else {})
    summaries = [
        StageSummary(
            name=name,
            started="today",
            ended=None if name == unfinished else end,
            starts=1,
            seconds=1.0,
            failures={},
            refusal=refusal if name == "train" else None,
        )
        for name, end in ended.items()
    ]
    counts = JournalCounts(answers=answers, failed={}, cost_usd=0.0)
    status = RunStatus(
        run="RUN",
        busy=busy,
        prompts=10,
        heldout=0,
        completions=counts,
        verdicts=counts,
        reviews=JournalCounts(answers=0, failed={}, cost_usd=0.0),
        stages={},
        pairs={
            "outcomes": {"win": 90, "tie": 10, "unparsable": 0},
            "dataset": {"train": train_pairs, "test": 5},
            "dropped_from_dataset": {},
        },
        batches=[],
    )
    defaults: dict[str, Any] = {
        "path": "RUN",
        "status": status,
        "stages": summaries,
        "missing_answers": 0,
        "labels": None,
        "pairs": make_pair_stats(awaiting_review=awaiting_review or {}),
        "position_stats": [],
        "training": None,
        "evaluation": None,
        "stale_evaluation": None,
    }
    return RunFacts(**defaults | facts)
