"""Estimates of label quality in small runs, and over the right population."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from benchmarks import coverage
from rlaif.pair import label_quality
from rlaif.report import next_step
from rlaif.stats import Estimate
from tests.pair.test_label_quality import reviews


def as_judged(pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs as they are if no human label calibrates the judges."""
    return pairs.with_columns(prob_a_by_judges="prob_a", preferred_by_judges="preferred")


def hundred_pairs(certain: int, drawn: int) -> pl.DataFrame:
    """A hundred kept pairs: ``certain`` are queued with certainty, and ``drawn`` of the others by chance."""
    rest = 100 - certain
    return as_judged(
        pl.DataFrame(
            {
                "pair_id": [f"{i:04}" for i in range(100)],
                "prob_a": [0.6] * certain + [0.9] * rest,
                "preferred": "a",
                "route": ["targeted"] * certain + ["audit"] * drawn + ["judge"] * (rest - drawn),
                "inclusion_probability": [1.0] * certain + [max(drawn, 1) / max(rest, 1)] * rest,
            }
        )
    )


def labels_of(*labels: str) -> pl.DataFrame:
    return pl.DataFrame({"pair_id": [f"{i:04}" for i in range(len(labels))], "label": labels})


def estimate(pairs: pl.DataFrame, labels: pl.DataFrame, *skipped: int) -> label_quality.LabelQuality:
    skips = reviews(*((f"{i:04}", "ada", "skip", None) for i in skipped))
    return label_quality.estimate_label_quality(pairs, labels, skips, seed=0)


def test_pairs_that_nobody_saw_are_unknown_and_not_left_out() -> None:
    """Ten of a hundred pairs are reviewed because they are most likely wrong, and the judges were wrong in all ten."""
    quality = estimate(hundred_pairs(10, 0), labels_of(*"b" * 10))
    assert (quality.agreement, quality.kappa, quality.remaining_error, quality.noise_rate) == (None, None, None, None)
    assert list(next_step.estimate_problems(quality.summary())) == []


def test_one_random_label_stands_for_all_pairs_that_were_not_certain() -> None:
    quality = estimate(hundred_pairs(9, 1), labels_of(*"b" * 9, "a"))
    assert quality.agreement is not None
    assert quality.agreement.value == pytest.approx(0.91)
    assert quality.agreement.low < 0.1
    assert quality.agreement.high == pytest.approx(0.91)
    # A tie tells nothing about the pairs in which annotators choose.
    assert estimate(hundred_pairs(9, 1), labels_of(*"b" * 9, "tie")).agreement is None


def test_two_wrong_labels_do_not_stop_the_training() -> None:
    quality = estimate(hundred_pairs(8, 2), labels_of(*"b" * 10))
    assert quality.noise_rate is not None
    assert quality.noise_rate > 0.45
    assert list(next_step.estimate_problems(quality.summary())) == []
    many = estimate(hundred_pairs(0, 60), labels_of(*"b" * 50, *"a" * 10)).summary()
    assert len(list(next_step.estimate_problems(many))) == 1
    assert len(list(next_step.estimate_problems(many | {"agreement": None, "noise_rate": 0.48}))) == 1


def test_agreement_is_exact_only_if_every_pair_is_labeled() -> None:
    all_labeled = estimate(hundred_pairs(100, 0), labels_of(*"a" * 80, *"b" * 20)).agreement
    assert all_labeled == Estimate(0.8, 0.8, 0.8, 100)
    one_missing = estimate(hundred_pairs(100, 0), labels_of(*"a" * 80, *"b" * 19)).agreement
    assert one_missing is not None
    assert one_missing.high - one_missing.low > 0.1


def test_ties_and_skips_are_counted_over_all_kept_pairs() -> None:
    labels = labels_of(*"b" * 6, *["tie"] * 4, *"a" * 12, *["both_bad"] * 3, "disagreement")
    pairs = hundred_pairs(10, 20)
    quality = estimate(pairs, labels, 26, 27, 28, 29, 0)
    assert quality.tie_rate is not None
    assert quality.tie_rate.value == pytest.approx(0.1 * 4 / 10 + 0.9 * 3 / 16)
    assert quality.tie_rate.n == 26
    assert quality.skip_rate is not None
    assert quality.skip_rate.value == pytest.approx(0.9 * 4 / 20)  # another annotator labeled the first pair
    assert quality.skip_rate.n == 30
    assert quality.agreement is not None
    decided = np.array([0.1 * 6 / 10, 0.9 * 12 / 16])
    assert quality.agreement.value == pytest.approx(decided[1] / decided.sum())
    text = " ".join(label_quality.describe(quality.summary()))
    assert str(quality.tie_rate) in text
    assert str(quality.skip_rate) in text


def test_wrong_labels_are_counted_among_the_rows_of_the_dataset() -> None:
    """Judges err in a fifth of the pairs that later rules dropped, and in a twentieth of those that stayed."""
    n = 4000
    rng = np.random.default_rng(1)
    kind = rng.choice(["stays", "near tie", "refusal", "humans"], n, p=[0.4, 0.2, 0.2, 0.2])
    stays = kind == "stays"
    wrong = rng.random(n) < np.where(stays, 0.05, 0.2)
    drawn = rng.random(n) < 0.2
    reason = {"stays": None, "near tie": "near_tie_after_calibration", "refusal": "benign_refusal",
              "humans": "borderline_prompt"}  # fmt: skip
    pairs = as_judged(
        pl.DataFrame(
            {
                "pair_id": [f"{i:04}" for i in range(n)],
                "prob_a": np.where(kind == "near tie", 0.6, 0.9),
                "preferred": "a",
                "route": np.where(drawn, "audit", np.where(stays, "judge", "dropped")),
                "drop_reason": pl.Series([None if d else reason[k] for k, d in zip(kind, drawn, strict=True)],
                                         dtype=pl.String),
                "inclusion_probability": 0.2,
                "humans_only": kind == "humans",
                "prompt_class": np.where(kind == "refusal", "benign", "harmful"),
                "answer_label_a": "refuse",
                "answer_label_b": "refuse",
            }
        )
    )  # fmt: skip
    labels = pairs.select("pair_id", label=pl.when(pl.Series(wrong)).then(pl.lit("b")).otherwise(pl.lit("a")))
    error = estimate(pairs, labels.filter(pl.Series(drawn))).remaining_error
    assert error is not None
    assert error.n == (stays & drawn).sum()
    assert error.low <= wrong[stays & ~drawn].mean() <= error.high
    assert error.high < wrong[~drawn].mean()


@pytest.mark.parametrize("n", [20, 100, 300])
@pytest.mark.parametrize("overconfidence", [0.0, 0.15])
def test_intervals_of_small_runs_cover_the_truth_and_stop_none(n: int, overconfidence: float) -> None:
    """`python -m benchmarks.coverage` prints the full table."""
    for discrete, undecided in ((False, 0.2), (True, 0.0)):
        trials, stops = coverage.simulate_runs(
            n, 40, overconfidence=overconfidence, undecided=undecided, discrete=discrete
        )
        assert stops == 0
        for figure in trials.values():
            assert coverage.coverage(figure)[0] >= 0.93
            assert all(one.estimate is None or one.estimate.high > one.estimate.low for one in figure)
