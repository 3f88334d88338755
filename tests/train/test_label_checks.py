"""Preflight checks of the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import TrainConfig
from rlaif.run.run import Run
from rlaif.stats import noise_rate
from rlaif.train import label_checks

PAIRS = {"routes": {"judge": 90, "audit": 5, "targeted": 5}, "dropped_from_dataset": {"awaiting_review": 4}}
BALANCE = [
    {"prompt": "benign", "chosen": "comply", "pairs": 95},
    {"prompt": "harmful", "chosen": "refuse", "pairs": 5},
]


def findings_by_name(
    tmp_path: Path, train: dict[str, Any] | None = None, **judge: Any
) -> dict[str, label_checks.PreflightFinding]:
    run = Run(tmp_path)
    run.update_manifest("judge", **judge)
    return {
        finding.name: finding for finding in label_checks.check_labels(run, TrainConfig.model_validate(train or {}))
    }


def test_a_run_without_judging_has_no_findings(tmp_path: Path) -> None:
    assert label_checks.check_labels(Run(tmp_path), TrainConfig()) == []


def test_pairs_in_the_review_queue_are_counted(tmp_path: Path) -> None:
    queue = findings_by_name(tmp_path, pairs=PAIRS)["queue"]
    assert queue.level == "warn"
    assert queue.message.startswith("4 of 10 pairs in the review queue")
    assert "rlaif review" in (queue.hint or "")
    assert findings_by_name(tmp_path, pairs={**PAIRS, "dropped_from_dataset": {}})["queue"].level == "pass"


@pytest.mark.parametrize(
    ("rate", "train", "level"),
    [
        (None, {}, "pass"),
        (0.05, {}, "pass"),
        (0.2, {}, "warn"),
        (0.2, {"loss": ["robust"]}, "pass"),
        (0.2, {"method": "sft"}, "pass"),
        (0.46, {"loss": ["robust"]}, "refuse"),
    ],
)
def test_noise_suggests_a_loss_that_tolerates_it(tmp_path: Path, rate: Any, train: Any, level: str) -> None:
    noise = findings_by_name(tmp_path, train, pairs=PAIRS, labels={"noise_rate": rate})["noise"]
    assert noise.level == level
    assert (rate is None) == ("not measured" in noise.message)
    assert (level == "warn") == ("label_smoothing = 0.20" in (noise.hint or ""))


@pytest.mark.parametrize(("low", "high", "n", "level"), [(0.3, 1.0, 3, "warn"), (0.4, 0.55, 200, "refuse")])
def test_a_few_wrong_labels_refuse_no_training(tmp_path: Path, low: float, high: float, n: int, level: str) -> None:
    labels = {"noise_rate": 0.48, "remaining_error": {"value": 0.48, "low": low, "high": high, "n": n}}
    assert findings_by_name(tmp_path, {}, pairs=PAIRS, labels=labels)["noise"].level == level


@pytest.mark.parametrize(("low", "is_reversed"), [(0.51, True), (0.49, False)])
def test_labels_are_reversed_if_the_judges_error_is_above_one_half(
    tmp_path: Path, low: float, is_reversed: bool
) -> None:
    """The noise rate alone cannot show it: it is below one half even if every label is wrong."""
    capped = noise_rate(judge_error=0.57, judged=100, human_error=0.0, reviewed=0)
    labels = {"noise_rate": capped, "remaining_error": {"value": 0.57, "low": low, "high": 0.63, "n": 400}}
    finding = findings_by_name(tmp_path, {}, pairs=PAIRS, labels=labels)["noise"]
    assert (finding.level, "reversed" in finding.message) == ("refuse", is_reversed)


def test_refusals_are_compared_with_harmful_prompts(tmp_path: Path) -> None:
    assert "not measured" in findings_by_name(tmp_path, pairs=PAIRS)["refusals"].message
    assert findings_by_name(tmp_path, pairs=PAIRS, balance=BALANCE)["refusals"].level == "pass"
    refusing = [*BALANCE, {"prompt": "benign", "chosen": "refuse", "pairs": 7}]
    finding = findings_by_name(tmp_path, pairs=PAIRS, balance=refusing)["refusals"]
    assert (finding.level, finding.message[:28]) == ("warn", "12 of 107 chosen answers ref")
    complying = [*BALANCE, {"prompt": "harmful", "chosen": "comply", "pairs": 2}]
    assert "2 chosen answers comply" in findings_by_name(tmp_path, pairs=PAIRS, balance=complying)["refusals"].message
