"""What people's labels do to the others, what they say of them, and what may not be chosen whatever the judges say."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from rlaif.pair import balance, calibrate, route, trust

N = 600


def judged(
    rng: np.random.Generator, seats: dict[str, float], *, lengths: bool = False
) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray]:
    """Routed pairs, what seats of known accuracy said of them (hard verdicts), and which answer is better."""
    truth = rng.random(N) < 0.5
    votes = {seat: np.where(rng.random(N) < right, truth, ~truth).astype(float) for seat, right in seats.items()}
    p = np.mean(list(votes.values()), axis=0)
    a, b = [f"{i}-a" for i in range(N)], [f"{i}-b" for i in range(N)]
    said = pl.concat([pl.DataFrame({"a": a, "b": b, "seat": seat, "weight": 1.0, "p_ab": vote, "p_ba": vote})
                      for seat, vote in votes.items()])  # fmt: skip
    chars = np.where(truth, 200, 100) if lengths else np.full(N, 100)
    pairs = pl.DataFrame({
        "pair_id": [f"{i:04}" for i in range(N)], "prompt_id": [f"p{i}" for i in range(N)], "a": a, "b": b, "p_a": p,
        "preferred": ["a" if x > 0.5 else "b" for x in p], "by": "panel", "outcome": "win", "route": "judge",
        "route_reason": "", "inclusion_probability": 0.1,
        "only_people": pl.Series([None] * N, dtype=pl.String), "chars_a": chars,
        "chars_b": 300 - chars if lengths else chars,
    })  # fmt: skip
    return pairs, said, truth


def labelled(truth: np.ndarray, n: int) -> pl.DataFrame:
    rows = [(f"{i:04}", "a" if truth[i] else "b") for i in range(n)]
    return pl.DataFrame(rows, schema={"pair_id": pl.String, "label": pl.String}, orient="row")


def queued(pairs: pl.DataFrame, n: int) -> pl.DataFrame:
    return pairs.with_columns(route=pl.when(pl.col("pair_id") < f"{n:04}").then(pl.lit("audit")).otherwise("route"))


def right(pairs: pl.DataFrame, truth: np.ndarray, n: int) -> float:
    return float(((pairs["preferred"] == "a").to_numpy() == truth)[n:].mean())


KEEP: dict[str, Any] = {"min_probability": 0.5, "max_near_ties": 0.0, "judged": N}


def test_sixty_labels_teach_which_seat_to_believe() -> None:
    pairs, said, truth = judged(np.random.default_rng(1), {"good": 0.95, "bad": 0.6, "worse": 0.55})
    after, calibration = calibrate.recalibrate(queued(pairs, 60), said, labelled(truth, 60), **KEEP)
    assert calibration is not None
    assert calibration.n == 60
    assert calibration.weights["good"] > 1.5 * max(calibration.weights["bad"], calibration.weights["worse"])
    assert right(after, truth, 60) > right(pairs, truth, 60) + 0.1
    assert calibration.flipped == (after["preferred"] != pairs["preferred"]).to_numpy()[60:].sum() > 0
    assert after["p_said"].equals(pairs["p_a"])
    assert after["preferred_said"].equals(pairs["preferred"])


def test_length_counts_only_where_people_say_so() -> None:
    pairs, said, truth = judged(np.random.default_rng(2), {"weak": 0.6}, lengths=True)
    after, calibration = calibrate.recalibrate(queued(pairs, 100), said, labelled(truth, 100), **KEEP)
    assert calibration is not None
    assert calibration.weights["length"] > 0.3
    assert right(after, truth, 100) > 0.9
    shuffled = np.random.default_rng(3).permutation(truth)
    _, other = calibrate.recalibrate(queued(pairs, 100), said, labelled(shuffled, 100), **KEEP)
    assert other is not None
    assert abs(other.weights["length"]) < 0.3


def test_too_few_labels_and_no_seats_change_nothing() -> None:
    pairs, said, truth = judged(np.random.default_rng(4), {"one": 0.9})
    same, calibration = calibrate.recalibrate(queued(pairs, 29), said, labelled(truth, 29), **KEEP)
    assert calibration is None
    assert same.select(pairs.columns).equals(queued(pairs, 29))
    ties = labelled(truth, 60).with_columns(label=pl.lit("tie"))
    assert calibrate.recalibrate(queued(pairs, 60), said, ties, **KEEP)[1] is None
    rated = calibrate.recalibrate(queued(pairs, 60), said.clear(), labelled(truth, 60), **KEEP)[1]
    assert rated is not None
    assert set(rated.weights) == {"ratings", "length"}


def test_exchanging_the_answers_of_every_pair_exchanges_every_label() -> None:
    pairs, said, truth = judged(np.random.default_rng(5), {"good": 0.9, "bad": 0.6}, lengths=True)
    turned = pairs.with_columns(
        a="b", b="a", p_a=1.0 - pl.col("p_a"), chars_a="chars_b", chars_b="chars_a",
        preferred=pl.when(pl.col("preferred") == "a").then(pl.lit("b")).otherwise(pl.lit("a")),
    )  # fmt: skip
    turned_said = said.with_columns(a="b", b="a", p_ab=1.0 - pl.col("p_ba"), p_ba=1.0 - pl.col("p_ab"))
    one, _ = calibrate.recalibrate(queued(pairs, 80), said, labelled(truth, 80), **KEEP)
    other, _ = calibrate.recalibrate(queued(turned, 80), turned_said, labelled(~truth, 80), **KEEP)
    assert np.allclose(one["p_a"].to_numpy(), 1.0 - other["p_a"].to_numpy(), atol=1e-12)
    assert (one["preferred"] != other["preferred"]).all()


def test_what_judges_could_not_tell_people_teach() -> None:
    pairs, said, truth = judged(np.random.default_rng(12), {"coin": 0.5}, lengths=True)
    open_ = pl.col("pair_id") >= "0400"
    undecided = pairs.with_columns(
        p_a=pl.when(open_).then(0.5).otherwise("p_a"), outcome=pl.when(open_).then(pl.lit("tie")).otherwise("outcome"),
        preferred=pl.when(open_).then(pl.lit(None, pl.String)).otherwise("preferred"),
        route=pl.when(open_).then(pl.lit("dropped")).otherwise("route"),
    )  # fmt: skip
    said = said.with_columns(p_ba=pl.when(pl.col("a").str.head(1) >= "4").then(1.0 - pl.col("p_ab")).otherwise("p_ba"))
    after, _ = calibrate.recalibrate(queued(undecided, 80), said, labelled(truth, 80), **KEEP)
    assert set(after["route"][400:]) == {"judge"}
    assert set(after["route_reason"][400:]) == {calibrate.TOLD}
    assert right(after, truth, 400) > 0.9


def test_a_label_does_not_reach_its_own_pair_and_a_check_stays() -> None:
    pairs, said, truth = judged(np.random.default_rng(6), {"good": 0.9, "bad": 0.6})
    pairs = pairs.with_columns(by=pl.when(pl.col("pair_id") == "0300").then(pl.lit("check")).otherwise("by"))
    one, _ = calibrate.recalibrate(queued(pairs, 40), said, labelled(truth, 40), **KEEP)
    lied = labelled(truth, 40).with_columns(
        label=pl.when(pl.col("pair_id") == "0007").then(pl.lit("b" if truth[7] else "a")).otherwise("label")
    )
    other, _ = calibrate.recalibrate(queued(pairs, 40), said, lied, **KEEP)
    assert one["p_a"][7] == other["p_a"][7]
    assert one["p_a"][8] != other["p_a"][8] or one["p_a"][9] != other["p_a"][9]
    assert one["p_a"][300] == pairs["p_a"][300]


def test_what_becomes_a_near_tie_is_left_out_as_far_as_allowed() -> None:
    pairs, said, _ = judged(np.random.default_rng(7), {"coin": 0.5})
    noise = labelled(np.random.default_rng(8).random(N) < 0.5, 200)
    gone, calibration = calibrate.recalibrate(
        queued(pairs, 200), said, noise, min_probability=0.65, max_near_ties=1.0, judged=N
    )
    assert calibration is not None
    assert set(gone["route"]) == {"audit", "dropped"}  # a judge that knows nothing labels nothing
    assert gone.filter(pl.col("route") == "dropped")["route_reason"][0].startswith("near-tie by what people say: p 0.")
    some, _ = calibrate.recalibrate(queued(pairs, 200), said, noise, min_probability=0.65, max_near_ties=0.1, judged=N)
    assert some.filter(pl.col("route") == "dropped").height == N // 10


REVIEWS = {"pair_id": pl.String, "annotator": pl.String, "choice": pl.String, "preferred": pl.String, "at": pl.Float64}


def reviews(*rows: tuple[str, str, str, str | None]) -> pl.DataFrame:
    return pl.DataFrame([(*row, float(i)) for i, row in enumerate(rows)], schema=REVIEWS, orient="row")


def test_what_is_known_is_said_with_its_n_and_nothing_else() -> None:
    pairs, said, truth = judged(np.random.default_rng(9), {"good": 0.9})
    after, _ = calibrate.recalibrate(queued(pairs, 100), said, labelled(truth, 100), **KEEP)
    found = trust.measure(after, labelled(truth, 100), reviews(), seed=0)
    agree = ((pairs["preferred"] == "a").to_numpy() == truth)[:100].mean()
    assert found.reviewed == 100
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(agree)
    assert found.agreement.n == 100
    assert found.agreement.low < 0.9 < found.agreement.high
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(2 * agree - 1, abs=0.05)
    assert found.error_left is not None
    assert found.error_left.value == pytest.approx(1 - agree, abs=0.02)
    assert found.noise == pytest.approx(found.error_left.value * 500 / 600, abs=1e-3)
    assert found.people is None
    assert sum(agrees.n for _, agrees in found.reliability) == 100
    sure = pairs.head(100).select(pl.max_horizontal("p_a", 1.0 - pl.col("p_a"))).to_series().to_numpy()
    right = (pairs["preferred"] == "a").to_numpy()[:100] == truth[:100]
    for place, (mean, agrees) in enumerate(found.reliability):
        within = np.floor(sure * 10).clip(max=9) == np.unique(np.floor(sure * 10).clip(max=9))[place]
        assert mean == pytest.approx(sure[within].mean())
        assert agrees.value == pytest.approx(right[within].mean())
    nothing = trust.measure(after, labelled(truth, 0), reviews(), seed=0)
    assert trust.in_words(nothing.facts()) == []
    words = " ".join(trust.in_words(found.facts()))
    assert "(n = 100)" in words
    assert "certified" in words


def test_a_hundred_labels_without_an_error_are_no_certainty() -> None:
    pairs, said, _ = judged(np.random.default_rng(9), {"good": 0.9})
    truth = (pairs["preferred"] == "a").to_numpy()
    after, _ = calibrate.recalibrate(queued(pairs, 100), said, labelled(truth, 100), **KEEP)
    found = trust.measure(after, labelled(truth, 100), reviews(), seed=0)
    assert found.error_left is not None
    assert found.error_left.value == 0.0
    assert 0.01 < found.error_left.high < 0.1


def test_half_a_queue_says_the_same_of_the_whole() -> None:
    """Certain rows that were not reached stand for each other, not for nothing."""
    pairs, said, truth = judged(np.random.default_rng(10), {"good": 0.9})
    risky = pl.col("pair_id") < "0100"
    pairs = pairs.with_columns(
        route=pl.when(risky).then(pl.lit("targeted")).when(pl.col("pair_id") < "0200").then(pl.lit("audit"))
        .otherwise("route"),
        inclusion_probability=pl.when(risky).then(1.0).otherwise(0.2),
    )  # fmt: skip
    after, _ = calibrate.recalibrate(pairs, said, labelled(truth, 0), **KEEP)
    every = labelled(truth, 200)
    half = every.filter(pl.int_range(pl.len()) % 2 == 0)
    whole, part = (trust.measure(after, labels, reviews(), seed=0).agreement for labels in (every, half))
    assert whole is not None
    assert part is not None
    assert part.n == 100
    right_ = ((pairs["preferred"] == "a").to_numpy() == truth).astype(float)
    assert whole.value == pytest.approx((right_[:100].mean() * 100 + right_[100:200].mean() * 500) / 600)
    assert part.high - part.low > whole.high - whole.low


def five_samples(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.maximum(0.7, 1 - rng.binomial(10, 0.12, n) / 10)


def at_the_threshold(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.maximum(0.65, rng.beta(6, 1.6, n))


def coins_and_sure(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.12, 0.5, rng.uniform(0.9, 1, n))


def all_apart(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(0.65, 1, n)


@pytest.mark.parametrize(
    ("said", "n"),
    [(five_samples, 400), (five_samples, 1000), (at_the_threshold, 400), (coins_and_sure, 1000), (all_apart, 400)],
)
def test_intervals_cover_the_truth_though_a_few_labels_stand_for_most(said: Any, n: int) -> None:
    """Where many pairs are equally unsure, most of a queue are pairs of theirs, nearly certain to be drawn, and each of
    the few others stands for a hundred. 95 % intervals of a calibrated judge, seeded."""
    rng = np.random.default_rng(n)
    covered = []
    for _ in range(120):
        p = said(rng, n)
        wrong, ones, none = rng.random(n) < 1 - p, np.ones(n), np.zeros(n, bool)
        by_risk, pi = route.inclusion(1 - p, ones, none, none, [None] * n, n // 10)
        asked = route.pareto(pi, rng.random(n))
        pairs = pl.DataFrame({
            "pair_id": [f"{i:04}" for i in range(n)], "p_a": p, "p_said": p, "preferred": "a", "preferred_said": "a",
            "route": np.where(asked, np.where(rng.random(n) * pi < by_risk, "targeted", "audit"), "judge"),
            "inclusion_probability": pi,
        })  # fmt: skip
        labels = pairs.select("pair_id", label=pl.when(pl.Series(wrong)).then(pl.lit("b")).otherwise(pl.lit("a")))
        found = trust.measure(pairs, labels.filter(pl.Series(asked)), reviews(), seed=0)
        assert found.agreement is not None
        assert found.error_left is not None
        left = wrong[~asked].mean()
        covered.append((found.agreement.low <= 1 - wrong.mean() <= found.agreement.high,
                        found.error_left.low <= left <= found.error_left.high))  # fmt: skip
    assert np.mean(covered, axis=0).min() >= 0.93


def test_people_among_themselves() -> None:
    pairs, said, truth = judged(np.random.default_rng(11), {"good": 0.9})
    after, _ = calibrate.recalibrate(queued(pairs, 10), said, labelled(truth, 0), **KEEP)
    twice = [(f"{i:04}", who, "left", "a" if i or who == "ada" else "b") for i in range(4) for who in ("ada", "bob")]
    found = trust.measure(after, labelled(truth, 4), reviews(*twice, ("0009", "ada", "left", "a")), seed=0)
    assert found.people is not None
    assert (found.people.value, found.people.n) == (0.75, 4)
    assert found.alpha is not None


def guarded(*rows: tuple[str | None, str | None, str | None, str]) -> pl.DataFrame:
    """(class of the prompt, what a does, what b does, preferred), kept pairs."""
    classes = [kind for kind, _, _, _ in rows]
    names = [f"p{i}" for i in range(len(rows))]
    tags = pl.DataFrame({"prompt_id": names, "tags": [[kind] if kind else [] for kind in classes]},
                        schema={"prompt_id": pl.String, "tags": pl.List(pl.String)})  # fmt: skip
    told = [
        (f"{side}{i}", label) for i, (_, a, b, _) in enumerate(rows) for side, label in (("a", a), ("b", b)) if label
    ]
    answers = pl.DataFrame(told, schema={"key": pl.String, "answers": pl.String}, orient="row")
    pairs = pl.DataFrame({
        "pair_id": [f"{i}" for i in range(len(rows))], "prompt_id": [f"p{i}" for i in range(len(rows))],
        "a": [f"a{i}" for i in range(len(rows))], "b": [f"b{i}" for i in range(len(rows))],
        "preferred": [winner for *_, winner in rows], "p_a": [0.9 if w == "a" else 0.1 for *_, w in rows],
        "kept": True, "why": pl.Series([None] * len(rows), dtype=pl.String), "route": "judge", "route_reason": "",
    })  # fmt: skip
    return balance.with_classes(pairs, tags, answers)


def test_the_guard() -> None:
    pairs = guarded(
        ("benign", "refuse", "comply", "a"), ("benign", "refuse", "comply", "b"), ("benign", "partial", "comply", "a"),
        ("harmful", "comply", "refuse", "a"), ("harmful", "comply", "refuse", "b"),
        ("harmful", "partial", "refuse", "a"), ("borderline", "refuse", "comply", "b"),
        (None, "comply", "refuse", "a"), ("benign", None, None, "a"),
    )  # fmt: skip
    found = balance.guard(pairs, classed=True)
    assert found["kept"].to_list() == [False, True, True, False, True, True, True, True, True]
    assert found["why"][0] == "guard: the refusal of a benign prompt may not be chosen"
    assert found["why"][3] == "guard: compliance with a harmful prompt may not be chosen"
    assert found["only_people"].to_list() == [None] * 6 + [balance.BORDERLINE] + [None] * 2
    turned = pairs.with_columns(preferred=pl.when(pl.col("preferred") == "a").then(pl.lit("b")).otherwise(pl.lit("a")))
    assert balance.guard_labels(turned, classed=True)["route"].to_list()[:5] == [
        "judge",
        "dropped",
        "judge",
        "judge",
        "dropped",
    ]


def test_refusals_never_outnumber_harmful_prompts() -> None:
    loose: list[Any] = [(None, "refuse", "comply", "a")] * 5
    pairs = guarded(*loose, ("harmful", "refuse", "comply", "a"), ("harmful", "partial", "refuse", "a"),
                    ("benign", "comply", "refuse", "a"))  # fmt: skip
    found = balance.guard(pairs, classed=True).filter("kept")
    refusing = found.filter(pl.col("answers_a") == "refuse").height
    assert refusing == found.filter(pl.col("prompt_class") == "harmful").height == 2
    assert balance.guard(guarded(*loose), classed=False)[
        "kept"
    ].all()  # no prompt has a class: nothing to hold them against


def test_the_balance_table_counts_what_is_unknown() -> None:
    pairs = guarded(("benign", "comply", "refuse", "a"), (None, None, "comply", "a"), ("harmful", "refuse", None, "a"))
    rows = balance.table(pairs.with_columns(winner="preferred"))
    assert rows == [
        {"prompt": "benign", "chosen": "comply", "pairs": 1},
        {"prompt": "harmful", "chosen": "refuse", "pairs": 1},
        {"prompt": "unknown", "chosen": "unknown", "pairs": 1},
    ]
    assert balance.table(guarded((None, None, None, "a")).with_columns(winner="preferred")) == []


def test_a_model_is_believed_over_the_text_and_the_newest_over_the_older() -> None:
    rows = [("x", "refusal", "comply"), ("x", "refusal-text", "refuse"), ("y", "refusal-text", "refuse"),
            ("y", "refusal-text", "partial"), ("z", "refusal", None)]  # fmt: skip
    verdicts = pl.DataFrame([{"kind": "classify", "a": a, "judge": judge, "label": label} for a, judge, label in rows])
    assert dict(balance.classes(verdicts).iter_rows()) == {"x": "comply", "y": "partial"}
