"""Calibration with labels of pairs that were selected for being different, and its test on held-out labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from benchmarks.calibration import calibrate, simulate
from rlaif.display_names import describe_calibration
from rlaif.pair import aggregation, human_calibration, refusal_guard
from rlaif.pair.human_calibration import Calibration, held_out_gain


def by_judges(pairs: pl.DataFrame) -> pl.DataFrame:
    return pairs.filter(pl.col("route") == "judge")


def accuracy(pairs: pl.DataFrame) -> float:
    return pairs.filter(pl.col("preferred") == pl.col("better")).height / pairs.height


@pytest.mark.parametrize(("name", "n"), [("borderline", 2000), ("flagged", 2000), ("flagged", 6000)])
def test_pairs_that_routing_forces_to_people_do_not_change_the_others(name: str, n: int) -> None:
    judged = simulate(name, n, 0)
    after, _ = calibrate(judged)
    ordinary = pl.col("flags").list.len() == 0
    before, kept = by_judges(judged.pairs.filter(ordinary)), by_judges(after.filter(ordinary))
    assert kept.height >= 0.99 * before.height
    assert kept["pair_id"].is_in(before["pair_id"].implode()).all()
    assert accuracy(kept) >= accuracy(before) - 1e-9
    assert (kept["preferred"] == kept["preferred_by_judges"]).all()


def test_labels_of_pairs_that_only_people_decide_have_no_effect() -> None:
    judged = simulate("borderline", 2000, 1)
    turned = judged.labels.join(judged.pairs.select("pair_id", "humans_only"), on="pair_id").with_columns(
        label=pl.when("humans_only").then(pl.lit("a")).otherwise("label")
    )
    assert (turned["label"] != judged.labels.join(turned.select("pair_id"), on="pair_id")["label"]).any()
    after, calibrations = calibrate(judged)
    judged.labels = turned.select("pair_id", "label")
    after_turning, calibrations_after_turning = calibrate(judged)
    assert after.equals(after_turning)
    assert calibrations == calibrations_after_turning


def test_flagged_pairs_are_calibrated_by_their_own_labels() -> None:
    judged = simulate("flagged", 6000, 0)
    after, calibrations = calibrate(judged)
    is_flagged = pl.col("flags").list.len() > 0
    flagged = next(calibration for calibration in calibrations if calibration.group == "flagged")
    assert flagged.applied
    assert flagged.near_ties + flagged.flipped > 0
    before = by_judges(judged.pairs.filter(is_flagged))
    wrong_before = before.filter(pl.col("preferred") != pl.col("better")).height
    kept = by_judges(after.filter(is_flagged))
    assert kept.filter(pl.col("preferred") != pl.col("better")).height < 0.5 * wrong_before


@pytest.mark.parametrize("name", ["undecided", "wrong if unsure"])
def test_a_difference_of_the_unsure_pairs_is_not_applied_to_the_sure_ones(name: str) -> None:
    judged = simulate(name, 2000, 0)
    after, _ = calibrate(judged)
    before = by_judges(judged.pairs)
    sure = after.filter(pl.col("pair_id").is_in(before["pair_id"].implode()))
    assert by_judges(sure).height >= 0.97 * before.height
    assert accuracy(by_judges(sure)) >= accuracy(before) - 0.003


def test_a_calibration_that_helps_is_applied() -> None:
    """One good judge among three, and a judge that prefers longer answers."""
    for name, gain in (("three judges", 0.05), ("length bias", 0.02)):
        judged = simulate(name, 6000, 2)
        after, (calibration,) = calibrate(judged)
        assert calibration.applied, calibration.reason
        assert calibration.reason == ""
        assert accuracy(by_judges(after)) >= accuracy(by_judges(judged.pairs)) + gain
        assert "human labels calibrated the panel on pairs that the judges decided" in describe_calibration(
            vars(calibration)
        )


def test_a_calibration_that_does_not_help_changes_nothing_and_says_why() -> None:
    for seed in range(5):
        judged = simulate("good judge", 2000, seed)
        after, (calibration,) = calibrate(judged)
        assert not calibration.applied
        assert after.select(judged.pairs.columns).equals(judged.pairs)
        assert calibration.tested < calibration.n == 200
        text = describe_calibration(vars(calibration))
        assert "with 200 human labels was not applied" in text
        assert f"{calibration.tested} of these labels" in text


def test_too_few_labels_drawn_by_chance_do_not_test_anything() -> None:
    judged = simulate("coin", 400, 0)
    after, (calibration,) = calibrate(judged)
    assert not calibration.applied
    assert "too few" in calibration.reason
    assert after.select(judged.pairs.columns).equals(judged.pairs)


def test_labels_outside_the_queue_do_not_count() -> None:
    """Their selection is unknown."""
    judged = simulate("three judges", 2000, 0)
    after, calibrations = calibrate(judged)
    others = by_judges(judged.pairs).head(300).select("pair_id", label=pl.lit("b"))
    judged.labels = pl.concat([judged.labels, others])
    after_all, calibrations_of_all = calibrate(judged)
    assert [(c.n, c.weights) for c in calibrations] == [(c.n, c.weights) for c in calibrations_of_all]
    assert after.equals(after_all)


def test_the_order_of_rows_and_the_names_of_the_sides_have_no_effect() -> None:
    judged = simulate("three judges", 6000, 2)
    after, (calibration,) = calibrate(judged)
    assert calibration.applied
    judged.pairs = judged.pairs.sample(fraction=1.0, shuffle=True, seed=1)
    judged.votes = judged.votes.sample(fraction=1.0, shuffle=True, seed=2)
    judged.labels = judged.labels.sample(fraction=1.0, shuffle=True, seed=3)
    shuffled, (calibration_of_shuffled,) = calibrate(judged)
    assert shuffled.sort("pair_id").equals(after.sort("pair_id"))
    assert calibration_of_shuffled == calibration
    other_side = {"a": "b", "b": "a"}
    judged.pairs = judged.pairs.with_columns(
        a="b", b="a", chars_a="chars_b", chars_b="chars_a", prob_a=1.0 - pl.col("prob_a"),
        preferred=pl.col("preferred").replace(other_side),
    )  # fmt: skip
    judged.votes = judged.votes.with_columns(a="b", b="a", p_ab=1.0 - pl.col("p_ba"), p_ba=1.0 - pl.col("p_ab"))
    judged.labels = judged.labels.with_columns(pl.col("label").replace(other_side))
    swapped, (calibration_of_swapped,) = calibrate(judged)
    assert calibration_of_swapped.applied
    assert (swapped.sort("pair_id")["preferred"].replace(other_side) == after.sort("pair_id")["preferred"]).all()
    assert swapped.sort("pair_id")["route"].equals(after.sort("pair_id")["route"])


def is_rejected(rng: np.random.Generator, size: int) -> tuple[bool, bool]:
    """Return if the interval lies above the true gain of 0, and if below it, with ``size`` labels of unequal weight."""
    gain_if_a, gain_if_b = rng.normal(0.3, 0.1, 4000), rng.normal(-0.7, 0.1, 4000)
    labels = (rng.random(4000) < 0.7).astype(float)  # the mean gain is 0
    q = np.full(4000, 0.8)  # and the predictions are too confident
    pi = np.clip(rng.beta(1, 4, 4000), 0.02, 1)
    pi *= size / pi.sum()
    drawn = rng.random(4000) < pi
    target_mean = float((q * gain_if_a + (1 - q) * gain_if_b).mean())
    estimate = held_out_gain(gain_if_a[drawn], gain_if_b[drawn], labels[drawn], q[drawn], 1 / pi[drawn], target_mean)
    return (False, False) if estimate is None else (estimate.low > 0, estimate.high < 0)


@pytest.mark.parametrize("size", [12, 20, 60])
def test_the_interval_of_the_gain_is_wrong_in_at_most_five_per_cent_on_the_side_that_matters(size: int) -> None:
    rng = np.random.default_rng(size)
    too_high, _ = np.mean([is_rejected(rng, size) for _ in range(1000)], axis=0)
    assert too_high <= 0.05 + 2.33 * (0.05 * 0.95 / 1000) ** 0.5


def test_labels_that_all_agree_do_not_prove_a_gain() -> None:
    """Ten labels, all right, do not show that the judges are right in more than 90 %."""
    ones = np.ones(10)
    estimate = held_out_gain(0.1 * ones, -0.9 * ones, ones, 0.99 * ones, ones, 0.09)
    assert estimate is not None
    assert estimate.low < 0 < estimate.value
    assert held_out_gain(0.1 * ones[:4], -0.9 * ones[:4], ones[:4], ones[:4], ones[:4], 0.1) is None


def rated(judged: Any, better: float, worse: float) -> Any:
    """Give the side that the judges preferred the rating ``better``."""
    a_preferred = pl.col("preferred") == "a"
    judged.pairs = judged.pairs.with_columns(
        score_a=pl.when(a_preferred).then(better).otherwise(worse),
        score_b=pl.when(a_preferred).then(worse).otherwise(better),
    )
    return judged


def test_a_turned_pair_whose_winner_is_rated_too_low_is_dropped() -> None:
    judged = rated(simulate("reversed judge", 6000, 0), 4.0, 1.4)
    turned, (calibration,) = calibrate(judged, max_tie_drop_fraction=0.0)
    assert calibration.applied
    assert calibration.flipped > 3000
    after, (calibration,) = calibrate(judged, max_tie_drop_fraction=0.0, min_chosen_rating=2.0)
    kept = by_judges(after)
    chosen = kept.select(pl.when(pl.col("preferred") == "a").then("score_a").otherwise("score_b")).to_series()
    assert (chosen >= 2.0).all()
    assert (calibration.flipped, calibration.low_ratings) == (0, by_judges(turned).height - kept.height)
    assert set(after.filter(pl.col("route") == "dropped")["drop_reason"]) == {"low_rating"}


def test_a_turned_pair_still_obeys_checks_and_the_refusal_guard() -> None:
    judged = simulate("reversed judge", 6000, 0)
    by_check = pl.int_range(pl.len()) % 7 == 0
    judged.pairs = judged.pairs.with_columns(
        decided_by=pl.when(by_check).then(pl.lit("check")).otherwise("decided_by"),
        prompt_class=pl.lit("benign"),
        answer_label_a=pl.when(pl.col("preferred") == "a").then(pl.lit("comply")).otherwise(pl.lit("refuse")),
        answer_label_b=pl.when(pl.col("preferred") == "b").then(pl.lit("comply")).otherwise(pl.lit("refuse")),
    )
    after, (calibration,) = calibrate(judged, max_tie_drop_fraction=0.0)
    assert calibration.flipped > 3000
    checked = pl.col("decided_by") == "check"
    assert after.filter(checked).select(judged.pairs.columns).equals(judged.pairs.filter(checked))
    guarded = by_judges(refusal_guard.reapply_refusal_guard(after, has_prompt_classes=True))
    assert guarded.height > 0
    assert (guarded["preferred"] == guarded["preferred_by_judges"]).all()


def decide(ratings: tuple[float, float], p: float, strategy: Any, min_chosen_rating: float) -> pl.DataFrame:
    """Decide one near tie without a limit on the pairs that must be rescued."""
    candidate = pl.DataFrame({
        "prompt_id": ["p"], "a": ["x"], "b": ["y"], "score_a": ratings[0], "score_b": ratings[1], "variance_a": 0.1,
        "variance_b": 0.1, "rating_margin": ratings[0] - ratings[1],
    }).with_columns(rank=pl.lit(1, pl.UInt32))  # fmt: skip
    votes = pl.DataFrame({"a": ["x"], "b": ["y"], "p_ab": p, "p_ba": p, "decided_by": "panel"}).with_columns(
        flags=pl.lit([], pl.List(pl.String))
    )
    decided = aggregation.decide_outcomes(
        candidate, votes, strategy, min_confidence=0.65, max_per_prompt=1, min_chosen_rating=min_chosen_rating
    )
    lost = aggregation.prompts_lost_to_ties(decided)
    return aggregation.keep_ties(decided, aggregation.most_confident_ties(lost, 1, 0.0))


@pytest.mark.parametrize(
    ("ratings", "p", "kept"),
    [
        ((3.0, 1.4), 0.6, True),
        ((3.0, 1.4), 0.4, False),  # the winner is rated too low, and lower than the loser
        ((1.9, 1.4), 0.6, False),  # the better of two bad answers
        ((3.0, 2.5), 0.4, False),  # contradicts the ratings
        ((2.5, 3.0), 0.4, True),
        ((3.0, 1.4), 0.5, True),  # annotators decide
        ((1.9, 1.4), 0.5, False),
    ],
)
def test_a_rescued_near_tie_obeys_the_rules_of_a_win(ratings: tuple[float, float], p: float, kept: bool) -> None:
    row = decide(ratings, p, "rate-then-compare", 2.0)
    assert row["kept"].item() is kept
    assert (row["drop_reason"].item() is None) is kept
    preferred = None if p == 0.5 or not kept else "a" if p > 0.5 else "b"
    assert row["preferred"].item() == preferred


def test_the_reasons_of_groups_without_enough_labels() -> None:
    judged = simulate("good judge", 2000, 0)
    judged.labels = judged.labels.head(29)
    assert calibrate(judged)[1] == []
    mixed = simulate("flagged", 2000, 0)
    is_flagged = pl.col("flags").list.len() > 0
    flagged = mixed.pairs.filter(is_flagged).select("pair_id")
    labels = mixed.labels.join(flagged, on="pair_id", how="semi").head(25)
    mixed.labels = pl.concat([labels, mixed.labels.join(flagged, on="pair_id", how="anti").head(5)])
    (calibration,) = calibrate(mixed)[1]
    assert calibration == Calibration("decided", {}, 30, False, "no kind of pair has 30 of these labels")
    assert human_calibration.MIN_LABELS == 30
