"""Calibration with human labels, estimates of label quality, and the refusal guard."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from rlaif.pair import human_calibration, label_quality, refusal_guard, routing
from rlaif.pair.candidates import PanelMember

N = 600


def make_judged_pairs(
    rng: np.random.Generator, accuracies: dict[str, float], *, lengths: bool = False
) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray]:
    """Routed pairs, the hard verdicts of judges of known accuracy, and which answer is better."""
    truth = rng.random(N) < 0.5
    votes = {
        judge: np.where(rng.random(N) < accuracy, truth, ~truth).astype(float) for judge, accuracy in accuracies.items()
    }
    p = np.mean(list(votes.values()), axis=0)
    a, b = [f"{i}-a" for i in range(N)], [f"{i}-b" for i in range(N)]
    judge_votes = pl.concat(
        [
            pl.DataFrame({"a": a, "b": b, "panel_judge": judge, "weight": 1.0, "p_ab": vote, "p_ba": vote})
            for judge, vote in votes.items()
        ]
    )
    chars = np.where(truth, 200, 100) if lengths else np.full(N, 100)
    pairs = pl.DataFrame({
        "pair_id": [f"{i:04}" for i in range(N)], "prompt_id": [f"p{i}" for i in range(N)], "a": a, "b": b, "prob_a": p,
        "preferred": ["a" if x > 0.5 else "b" for x in p], "decided_by": "panel", "outcome": "win", "route": "judge",
        "route_reason": "", "inclusion_probability": 0.1,
        "drop_reason": pl.Series([None] * N, dtype=pl.String), "chars_a": chars,
        "chars_b": 300 - chars if lengths else chars, "flags": pl.Series([[]] * N, dtype=pl.List(pl.String)),
        "humans_only": False, "score_a": pl.Series([None] * N, dtype=pl.Float64),
        "score_b": pl.Series([None] * N, dtype=pl.Float64),
    })  # fmt: skip
    return pairs, judge_votes, truth


def human_labels_for(truth: np.ndarray, n: int) -> pl.DataFrame:
    rows = [(f"{i:04}", "a" if truth[i] else "b") for i in range(n)]
    return pl.DataFrame(rows, schema={"pair_id": pl.String, "label": pl.String}, orient="row")


def put_in_queue(pairs: pl.DataFrame, n: int) -> pl.DataFrame:
    return pairs.with_columns(route=pl.when(pl.col("pair_id") < f"{n:04}").then(pl.lit("audit")).otherwise("route"))


def accuracy(pairs: pl.DataFrame, truth: np.ndarray, n: int) -> float:
    return float(((pairs["preferred"] == "a").to_numpy() == truth)[n:].mean())


def calibrate(*frames: pl.DataFrame, **settings: Any) -> tuple[pl.DataFrame, human_calibration.Calibration | None]:
    """Return the pairs and the first calibration, or None."""
    after, calibrations = human_calibration.apply_human_calibration(*frames, **settings)
    return after, calibrations[0] if calibrations else None


SETTINGS: dict[str, Any] = {"min_confidence": 0.5, "max_tie_drop_fraction": 0.0, "num_judged": N}


def test_sixty_labels_raise_the_weight_of_the_better_judge() -> None:
    pairs, judge_votes, truth = make_judged_pairs(np.random.default_rng(1), {"good": 0.95, "bad": 0.6, "worse": 0.55})
    after, calibration = calibrate(put_in_queue(pairs, 60), judge_votes, human_labels_for(truth, 60), **SETTINGS)
    assert calibration is not None
    assert calibration.n == 60
    assert calibration.weights["good"] > 1.5 * max(calibration.weights["bad"], calibration.weights["worse"])
    assert accuracy(after, truth, 60) > accuracy(pairs, truth, 60) + 0.1
    assert calibration.flipped == (after["preferred"] != pairs["preferred"]).to_numpy()[60:].sum() > 0
    assert after["prob_a_by_judges"].equals(pairs["prob_a"])
    assert after["preferred_by_judges"].equals(pairs["preferred"])


def test_length_gets_a_weight_only_if_human_labels_depend_on_it() -> None:
    pairs, judge_votes, truth = make_judged_pairs(np.random.default_rng(2), {"weak": 0.6}, lengths=True)
    after, calibration = calibrate(put_in_queue(pairs, 100), judge_votes, human_labels_for(truth, 100), **SETTINGS)
    assert calibration is not None
    assert calibration.weights["length"] > 0.3
    assert accuracy(after, truth, 100) > 0.9
    shuffled = np.random.default_rng(3).permutation(truth)
    _, shuffled_calibration = calibrate(
        put_in_queue(pairs, 100), judge_votes, human_labels_for(shuffled, 100), **SETTINGS
    )
    assert shuffled_calibration is not None
    assert abs(shuffled_calibration.weights["length"]) < 0.3


def test_too_few_labels_change_nothing_and_ratings_replace_missing_judges() -> None:
    pairs, judge_votes, truth = make_judged_pairs(np.random.default_rng(4), {"one": 0.9})
    unchanged, calibration = calibrate(put_in_queue(pairs, 29), judge_votes, human_labels_for(truth, 29), **SETTINGS)
    assert calibration is None
    assert unchanged.select(pairs.columns).equals(put_in_queue(pairs, 29))
    ties = human_labels_for(truth, 60).with_columns(label=pl.lit("tie"))
    assert calibrate(put_in_queue(pairs, 60), judge_votes, ties, **SETTINGS)[1] is None
    rated = calibrate(put_in_queue(pairs, 60), judge_votes.clear(), human_labels_for(truth, 60), **SETTINGS)[1]
    assert rated is not None
    assert set(rated.weights) == {"ratings", "length"}


def test_swapping_the_answers_of_every_pair_swaps_every_label() -> None:
    pairs, judge_votes, truth = make_judged_pairs(np.random.default_rng(5), {"good": 0.9, "bad": 0.6}, lengths=True)
    swapped = pairs.with_columns(
        a="b", b="a", prob_a=1.0 - pl.col("prob_a"), chars_a="chars_b", chars_b="chars_a",
        preferred=pl.when(pl.col("preferred") == "a").then(pl.lit("b")).otherwise(pl.lit("a")),
    )  # fmt: skip
    swapped_votes = judge_votes.with_columns(a="b", b="a", p_ab=1.0 - pl.col("p_ba"), p_ba=1.0 - pl.col("p_ab"))
    original, _ = calibrate(put_in_queue(pairs, 80), judge_votes, human_labels_for(truth, 80), **SETTINGS)
    swapped_result, _ = calibrate(put_in_queue(swapped, 80), swapped_votes, human_labels_for(~truth, 80), **SETTINGS)
    assert np.allclose(original["prob_a"].to_numpy(), 1.0 - swapped_result["prob_a"].to_numpy(), atol=1e-12)
    assert (original["preferred"] != swapped_result["preferred"]).all()


def test_calibration_labels_the_pairs_that_judges_could_not_decide() -> None:
    """Labels of other kinds of pairs do not: it is tested on labels of undecided pairs."""
    pairs, judge_votes, truth = make_judged_pairs(np.random.default_rng(12), {"coin": 0.5}, lengths=True)
    open_ = pl.col("pair_id") >= "0400"
    undecided = pairs.with_columns(
        prob_a=pl.when(open_).then(0.5).otherwise("prob_a"),
        outcome=pl.when(open_).then(pl.lit("tie")).otherwise("outcome"),
        preferred=pl.when(open_).then(pl.lit(None, pl.String)).otherwise("preferred"),
        route=pl.when(open_).then(pl.lit("dropped")).otherwise("route"),
        drop_reason=pl.when(open_).then(pl.lit("undecided")),
    )
    judge_votes = judge_votes.with_columns(
        p_ba=pl.when(pl.col("a").str.head(1) >= "4").then(1.0 - pl.col("p_ab")).otherwise("p_ba")
    )
    queued = pl.col("pair_id").is_between(pl.lit("0400"), pl.lit("0459"))
    with_queue = undecided.with_columns(
        route=pl.when(queued).then(pl.lit("targeted")).otherwise("route"),
        drop_reason=pl.when(~queued).then("drop_reason"),
    )
    labels = human_labels_for(truth, 460).filter(queued)
    after, calibrations = human_calibration.apply_human_calibration(with_queue, judge_votes, labels, **SETTINGS)
    assert [(c.group, c.n, c.tested, c.labeled) for c in calibrations] == [("undecided", 60, 60, 140)]
    assert set(after["route"][460:]) == {"judge"}
    assert after["drop_reason"].is_null().all()
    assert set(after["route_reason"][460:]) == {human_calibration.REASON_HUMAN_CALIBRATED}
    assert accuracy(after, truth, 460) > 0.9
    assert after.head(400).select(pairs.columns).equals(pairs.head(400))
    of_decided, _ = calibrate(put_in_queue(undecided, 80), judge_votes, human_labels_for(truth, 80), **SETTINGS)
    assert set(of_decided["drop_reason"][400:]) == {"undecided"}


def test_a_label_does_not_change_its_own_pair_and_checks_stay() -> None:
    pairs, judge_votes, truth = make_judged_pairs(np.random.default_rng(6), {"good": 0.9, "bad": 0.6})
    pairs = pairs.with_columns(
        decided_by=pl.when(pl.col("pair_id") == "0300").then(pl.lit("check")).otherwise("decided_by")
    )
    original, _ = calibrate(put_in_queue(pairs, 40), judge_votes, human_labels_for(truth, 40), **SETTINGS)
    wrong_labels = human_labels_for(truth, 40).with_columns(
        label=pl.when(pl.col("pair_id") == "0007").then(pl.lit("b" if truth[7] else "a")).otherwise("label")
    )
    changed, _ = calibrate(put_in_queue(pairs, 40), judge_votes, wrong_labels, **SETTINGS)
    assert original["prob_a"][7] == changed["prob_a"][7]
    assert original["prob_a"][8] != changed["prob_a"][8] or original["prob_a"][9] != changed["prob_a"][9]
    assert original["prob_a"][300] == pairs["prob_a"][300]


def test_new_near_ties_are_dropped_as_far_as_allowed() -> None:
    pairs, judge_votes, _ = make_judged_pairs(np.random.default_rng(7), {"coin": 0.5})
    noise = human_labels_for(np.random.default_rng(8).random(N) < 0.5, 200)
    all_dropped, calibration = calibrate(
        put_in_queue(pairs, 200), judge_votes, noise, min_confidence=0.65, max_tie_drop_fraction=1.0, num_judged=N
    )
    assert calibration is not None
    assert set(all_dropped["route"]) == {"audit", "dropped"}  # a judge at chance labels nothing
    dropped = routing.describe_drops(all_dropped).filter(pl.col("route") == "dropped")
    assert set(dropped["drop_reason"]) == {"near_tie_after_calibration"}
    assert dropped["route_reason"].str.starts_with("near tie after calibration with human labels (p 0.").all()
    few_dropped, _ = calibrate(
        put_in_queue(pairs, 200), judge_votes, noise, min_confidence=0.65, max_tie_drop_fraction=0.1, num_judged=N
    )
    assert few_dropped.filter(pl.col("route") == "dropped").height == N // 10


REVIEWS = {
    "pair_id": pl.String,
    "annotator": pl.String,
    "choice": pl.String,
    "preferred": pl.String,
    "created_at": pl.Float64,
}


def reviews(*rows: tuple[str, str, str, str | None]) -> pl.DataFrame:
    return pl.DataFrame([(*row, float(i)) for i, row in enumerate(rows)], schema=REVIEWS, orient="row")


def as_judged(pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs as they are if no human label calibrates the judges."""
    return pairs.with_columns(prob_a_by_judges="prob_a", preferred_by_judges="preferred")


def test_every_estimate_has_its_n_and_missing_ones_are_not_described() -> None:
    pairs, _, truth = make_judged_pairs(np.random.default_rng(9), {"good": 0.9})
    after = as_judged(put_in_queue(pairs, 100))
    quality = label_quality.estimate_label_quality(after, human_labels_for(truth, 100), reviews(), seed=0)
    agree = ((pairs["preferred"] == "a").to_numpy() == truth)[:100].mean()
    assert quality.reviewed == 100
    assert quality.agreement is not None
    assert quality.agreement.value == pytest.approx(agree)
    assert quality.agreement.n == 100
    assert quality.agreement.low < 0.9 < quality.agreement.high
    assert quality.kappa is not None
    assert quality.kappa.value == pytest.approx(2 * agree - 1, abs=0.05)
    assert quality.remaining_error is not None
    assert quality.remaining_error.value == pytest.approx(1 - agree, abs=0.02)
    assert quality.noise_rate == pytest.approx(quality.remaining_error.value * 500 / 600, abs=1e-3)
    assert quality.human_agreement is None
    assert sum(agrees.n for _, agrees in quality.reliability) == 100
    confidence = pairs.head(100).select(pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))).to_series().to_numpy()
    is_right = (pairs["preferred"] == "a").to_numpy()[:100] == truth[:100]
    for index, (mean, agrees) in enumerate(quality.reliability):
        in_bin = np.floor(confidence * 10).clip(max=9) == np.unique(np.floor(confidence * 10).clip(max=9))[index]
        assert mean == pytest.approx(confidence[in_bin].mean())
        assert agrees.value == pytest.approx(is_right[in_bin].mean())
    without_labels = label_quality.estimate_label_quality(after, human_labels_for(truth, 0), reviews(), seed=0)
    assert label_quality.describe(without_labels.summary()) == []
    text = " ".join(label_quality.describe(quality.summary()))
    assert "(n = 100)" in text
    assert "certified" in text


def test_a_hundred_labels_without_an_error_still_have_an_interval() -> None:
    pairs, _, _ = make_judged_pairs(np.random.default_rng(9), {"good": 0.9})
    truth = (pairs["preferred"] == "a").to_numpy()
    after = as_judged(put_in_queue(pairs, 100))
    quality = label_quality.estimate_label_quality(after, human_labels_for(truth, 100), reviews(), seed=0)
    assert quality.remaining_error is not None
    assert quality.remaining_error.value == 0.0
    assert 0.01 < quality.remaining_error.high < 0.1


def test_half_a_queue_estimates_the_same_agreement() -> None:
    """Reviewed pairs represent the unreviewed ones of the same route."""
    pairs, _, truth = make_judged_pairs(np.random.default_rng(10), {"good": 0.9})
    risky = pl.col("pair_id") < "0100"
    pairs = pairs.with_columns(
        route=pl.when(risky).then(pl.lit("targeted")).when(pl.col("pair_id") < "0200").then(pl.lit("audit"))
        .otherwise("route"),
        inclusion_probability=pl.when(risky).then(1.0).otherwise(0.2),
    )  # fmt: skip
    after = as_judged(pairs)
    every = human_labels_for(truth, 200)
    half = every.filter(pl.int_range(pl.len()) % 2 == 0)
    full, part = (
        label_quality.estimate_label_quality(after, labels, reviews(), seed=0).agreement for labels in (every, half)
    )
    assert full is not None
    assert part is not None
    assert part.n == 100
    is_right = ((pairs["preferred"] == "a").to_numpy() == truth).astype(float)
    assert full.value == pytest.approx((is_right[:100].mean() * 100 + is_right[100:200].mean() * 500) / 600)
    assert part.high - part.low > full.high - full.low


def five_samples(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.maximum(0.7, 1 - rng.binomial(10, 0.12, n) / 10)


def at_the_threshold(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.maximum(0.65, rng.beta(6, 1.6, n))


def coins_and_sure(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.12, 0.5, rng.uniform(0.9, 1, n))


def all_apart(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(0.65, 1, n)


@pytest.mark.parametrize(
    ("draw_confidences", "n"),
    [(five_samples, 400), (five_samples, 1000), (at_the_threshold, 400), (coins_and_sure, 1000), (all_apart, 400)],
)
def test_intervals_cover_the_truth_if_a_few_labels_have_most_of_the_weight(draw_confidences: Any, n: int) -> None:
    """If many pairs are equally unsure, they fill most of the queue with a probability near 1, and each of the few
    others represents a hundred pairs. 95 % intervals of a calibrated judge, seeded."""
    rng = np.random.default_rng(n)
    covered = []
    for _ in range(120):
        p = draw_confidences(rng, n)
        wrong, ones, none = rng.random(n) < 1 - p, np.ones(n), np.zeros(n, bool)
        by_risk, pi = routing.inclusion_probabilities(1 - p, ones, none, none, [None] * n, n // 10)
        reviewed = routing.pareto_sample(pi, rng.random(n))
        pairs = pl.DataFrame(
            {
                "pair_id": [f"{i:04}" for i in range(n)],
                "prob_a": p,
                "prob_a_by_judges": p,
                "preferred": "a",
                "preferred_by_judges": "a",
                "route": np.where(reviewed, np.where(rng.random(n) * pi < by_risk, "targeted", "audit"), "judge"),
                "inclusion_probability": pi,
            }
        )
        labels = pairs.select("pair_id", label=pl.when(pl.Series(wrong)).then(pl.lit("b")).otherwise(pl.lit("a")))
        quality = label_quality.estimate_label_quality(pairs, labels.filter(pl.Series(reviewed)), reviews(), seed=0)
        if quality.agreement is None or quality.remaining_error is None:
            continue  # no pair of the larger part was drawn
        true_error = wrong[~reviewed].mean()
        covered.append(
            (
                quality.agreement.low <= 1 - wrong.mean() <= quality.agreement.high,
                quality.remaining_error.low <= true_error <= quality.remaining_error.high,
            )
        )
    assert len(covered) >= 0.9 * 120
    assert np.mean(covered, axis=0).min() >= 0.93


def test_agreement_among_annotators() -> None:
    pairs, _, truth = make_judged_pairs(np.random.default_rng(11), {"good": 0.9})
    after = as_judged(put_in_queue(pairs, 10))
    twice = [(f"{i:04}", who, "left", "a" if i or who == "ada" else "b") for i in range(4) for who in ("ada", "bob")]
    quality = label_quality.estimate_label_quality(
        after, human_labels_for(truth, 4), reviews(*twice, ("0009", "ada", "left", "a")), seed=0
    )
    assert quality.human_agreement is not None
    assert (quality.human_agreement.value, quality.human_agreement.n) == (0.75, 4)
    assert quality.alpha is not None


def make_guarded_pairs(*rows: tuple[str | None, str | None, str | None, str]) -> pl.DataFrame:
    """Kept pairs from (class of the prompt, class of a, class of b, preferred)."""
    classes = [kind for kind, _, _, _ in rows]
    names = [f"p{i}" for i in range(len(rows))]
    tags = pl.DataFrame(
        {"prompt_id": names, "tags": [[kind] if kind else [] for kind in classes]},
        schema={"prompt_id": pl.String, "tags": pl.List(pl.String)},
    )
    labeled = [
        (f"{side}{i}", label) for i, (_, a, b, _) in enumerate(rows) for side, label in (("a", a), ("b", b)) if label
    ]
    answers = pl.DataFrame(labeled, schema={"key": pl.String, "answer_label": pl.String}, orient="row")
    pairs = pl.DataFrame(
        {
            "pair_id": [f"{i}" for i in range(len(rows))],
            "prompt_id": [f"p{i}" for i in range(len(rows))],
            "a": [f"a{i}" for i in range(len(rows))],
            "b": [f"b{i}" for i in range(len(rows))],
            "preferred": [winner for *_, winner in rows],
            "prob_a": [0.9 if w == "a" else 0.1 for *_, w in rows],
            "kept": True,
            "drop_reason": pl.Series([None] * len(rows), dtype=pl.String),
            "route": "judge",
            "route_reason": "",
        }
    )
    return refusal_guard.add_prompt_class(pairs, tags, answers)


def test_the_guard_drops_forbidden_choices_and_marks_borderline_prompts() -> None:
    pairs = make_guarded_pairs(
        ("benign", "refuse", "comply", "a"), ("benign", "refuse", "comply", "b"), ("benign", "partial", "comply", "a"),
        ("harmful", "comply", "refuse", "a"), ("harmful", "comply", "refuse", "b"),
        ("harmful", "partial", "refuse", "a"), ("borderline", "refuse", "comply", "b"),
        (None, "comply", "refuse", "a"), ("benign", None, None, "a"),
    )  # fmt: skip
    result = refusal_guard.apply_refusal_guard(pairs, has_prompt_classes=True)
    assert result["kept"].to_list() == [False, True, True, False, True, True, True, True, True]
    assert result["drop_reason"][0] == "benign_refusal"
    assert result["drop_reason"][3] == "harmful_compliance"
    assert result["humans_only"].to_list() == [False] * 6 + [True, False, True]
    turned = pairs.with_columns(preferred=pl.when(pl.col("preferred") == "a").then(pl.lit("b")).otherwise(pl.lit("a")))
    assert refusal_guard.reapply_refusal_guard(turned, has_prompt_classes=True)["route"].to_list()[:5] == [
        "judge",
        "dropped",
        "judge",
        "judge",
        "dropped",
    ]


def test_only_annotators_decide_if_the_judges_chose_an_unknown_answer_for_a_tagged_prompt() -> None:
    """An unknown answer may refuse or comply. The one that was not chosen does not matter."""
    pairs = make_guarded_pairs(
        ("benign", None, "refuse", "a"), ("harmful", None, "comply", "a"), ("benign", None, "comply", "b"),
        ("harmful", None, "refuse", "b"), (None, None, "refuse", "a"), ("borderline", None, None, "a"),
    )  # fmt: skip
    result = refusal_guard.apply_refusal_guard(pairs, has_prompt_classes=True)
    assert result["kept"].all()
    assert result["drop_reason"].null_count() == len(pairs)
    assert result["humans_only"].to_list() == [True, True, False, False, False, True]
    undecided = pairs.with_columns(preferred=pl.lit(None, pl.String))
    assert not refusal_guard.apply_refusal_guard(undecided, has_prompt_classes=True)["humans_only"][:5].any()

    no_tags = pl.DataFrame(schema={"prompt_id": pl.String, "tags": pl.List(pl.String)})
    routed = routing.route_pairs(result.drop("route", "route_reason").with_columns(
        flags=pl.lit([], pl.List(pl.String))), no_tags, human_fraction=0.0, seed=0)  # fmt: skip
    reasons = dict(routed.select("pair_id", "drop_reason").iter_rows())
    assert reasons == {"0": "unknown_refusal", "1": "unknown_refusal", "2": None, "3": None, "4": None,
                       "5": "borderline_prompt"}  # fmt: skip
    turned = refusal_guard.reapply_refusal_guard(
        routed.with_columns(preferred=pl.lit("a")), has_prompt_classes=True
    ).sort("pair_id")
    assert turned["drop_reason"].to_list()[2:5] == ["unknown_refusal", "unknown_refusal", None]


def test_refusals_never_outnumber_harmful_prompts() -> None:
    unclassified: list[Any] = [(None, "refuse", "comply", "a")] * 5
    pairs = make_guarded_pairs(
        *unclassified,
        ("harmful", "refuse", "comply", "a"),
        ("harmful", "partial", "refuse", "a"),
        ("benign", "comply", "refuse", "a"),
    )
    result = refusal_guard.apply_refusal_guard(pairs, has_prompt_classes=True).filter("kept")
    refusing = result.filter(pl.col("answer_label_a") == "refuse").height
    assert refusing == result.filter(pl.col("prompt_class") == "harmful").height == 2
    assert refusal_guard.apply_refusal_guard(make_guarded_pairs(*unclassified), has_prompt_classes=False)[
        "kept"
    ].all()  # the limit needs prompt classes


def test_the_refusal_table_counts_unknown_classes() -> None:
    pairs = make_guarded_pairs(
        ("benign", "comply", "refuse", "a"), (None, None, "comply", "a"), ("harmful", "refuse", None, "a")
    )
    rows = refusal_guard.refusal_table(pairs.with_columns(winner="preferred"))
    assert rows == [
        {"prompt": "benign", "chosen": "comply", "pairs": 1},
        {"prompt": "harmful", "chosen": "refuse", "pairs": 1},
        {"prompt": "unknown", "chosen": "unknown", "pairs": 1},
    ]
    assert (
        refusal_guard.refusal_table(make_guarded_pairs((None, None, None, "a")).with_columns(winner="preferred")) == []
    )


def test_the_panel_overrides_the_text_classifier_in_any_order_of_the_verdicts() -> None:
    """Two refusal judges disagree on v and w: 0.9 against 2 x 0.5 or 2 x 0.4. A judge that has left does not count."""
    rows = [("x", "refusal", "comply", "model", 0.95), ("x", "refusal-text", "refuse", "now", 0.95),
            ("y", "refusal-text", "refuse", "now", 0.95), ("y", "refusal", "comply", "has left", 0.95),
            ("z", "refusal", None, "model", 0.95), ("v", "refusal", "refuse", "model", 0.9),
            ("v", "second", "comply", "model", 0.5), ("w", "refusal", "refuse", "model", 0.9),
            ("w", "second", "comply", "model", 0.4)]  # fmt: skip
    expected = {"x": "comply", "y": "refuse", "v": "comply", "w": "refuse"}
    assert known_labels(*rows) == known_labels(*reversed(rows)) == expected


def test_an_unsure_or_outdated_verdict_of_the_text_classifier_is_no_class() -> None:
    assert known_labels(
        ("sure", "refusal-text", "refuse", "now", 0.9),
        ("unsure", "refusal-text", "comply", "now", 0.89),
        ("outdated", "refusal-text", "comply", "before", 0.98),
        ("judged", "refusal-text", "comply", "now", 0.5),
        ("judged", "refusal", "refuse", "model", 0.4),
    ) == {"sure": "refuse", "judged": "refuse"}


def known_labels(*rows: tuple[str, str, str | None, str, float]) -> dict[str, str]:
    names = ("a", "judge", "label", "judge_hash", "score")
    panel = [PanelMember("refusal", "model", "m", 1.0), PanelMember("second", "model", "m", 2.0)]
    verdicts = pl.DataFrame([{"kind": "classify", "model": "m", **dict(zip(names, row, strict=True))} for row in rows])
    labels = refusal_guard.answer_labels(verdicts, panel, text_classifier_hash="now", min_confidence=0.9)
    return dict(labels.iter_rows())


def test_unknown_answers_are_counted_once_each() -> None:
    pairs = make_guarded_pairs((None, "refuse", None, "a"), (None, None, None, "a"))
    assert refusal_guard.count_unknown_answers(pairs) == (4, 3)
    assert refusal_guard.count_unknown_answers(pl.concat([pairs, pairs])) == (4, 3)
    assert refusal_guard.count_unknown_answers(pairs.clear()) == (0, 0)
