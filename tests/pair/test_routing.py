"""Routing: which pairs are drawn for review, with which probability, and the reason recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.pair import aggregation, routing
from rlaif.run.human_agreement import estimate_agreement


def make_pairs(n: int, **columns: Any) -> pl.DataFrame:
    p = columns.get("prob_a") or [0.66 + (i * 37 % n) / n * 0.34 for i in range(n)]
    base = {
        "pair_id": [f"{i:04}" for i in range(n)],
        "prompt_id": [f"p{i}" for i in range(n)],
        "prob_a": p,
        "preferred": [None if x == 0.5 else "a" if x > 0.5 else "b" for x in p],
        "kept": [True] * n,
        "drop_reason": [None] * n,
        "flags": [[] for _ in range(n)],
    }
    return pl.DataFrame(
        base | columns,
        schema_overrides={
            "drop_reason": pl.String,
            "flags": pl.List(pl.String),
            "preferred": pl.String,
            "kept": pl.Boolean,
            "pair_id": pl.String,
            "prompt_id": pl.String,
            "prob_a": pl.Float64,
        },
    )


def tagged(n: int, **tags: str) -> pl.DataFrame:
    """prompt_id and tags; ``p3="law"`` gives prompt p3 a tag."""
    names = [f"p{i}" for i in range(n)]
    return pl.DataFrame(
        {"prompt_id": names, "tags": [[tags[name]] if name in tags else [] for name in names]},
        schema={"prompt_id": pl.String, "tags": pl.List(pl.String)},
    )


def queue(routed: pl.DataFrame) -> pl.DataFrame:
    return routed.filter(pl.col("route").is_in(["audit", "targeted"]))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.sampled_from([1.0, 2.0]), st.booleans(), st.booleans(),
                       st.sampled_from([None, "x", "y"])), min_size=1, max_size=60),
    st.floats(0, 1),
)  # fmt: skip
def test_inclusion_probabilities_sum_to_the_budget_and_are_never_zero(
    rows: list[tuple[Any, ...]], share: float
) -> None:
    error_probabilities, stakes, suspicious, prioritized, topics = (list(column) for column in zip(*rows, strict=True))
    budget = round(share * len(rows))
    pi_by_risk, pi = routing.inclusion_probabilities(
        np.array(error_probabilities), np.array(stakes), np.array(suspicious), np.array(prioritized), topics, budget
    )
    assert pi.sum() == pytest.approx(budget)
    assert (pi_by_risk <= pi + 1e-9).all()
    assert (pi <= 1 + 1e-9).all()
    assert (pi > 0).all() == (budget > 0)


@settings(deadline=None)
@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 5))
def test_the_queue_has_the_requested_share(n: int, share: float, seed: int) -> None:
    routed = routing.route_pairs(make_pairs(n), tagged(n), human_fraction=share, seed=seed)
    assert abs(queue(routed).height - share * n) <= 0.5
    assert routed.height == n


def test_the_least_confident_pairs_are_always_drawn_and_every_other_pair_can_be() -> None:
    routed = routing.route_pairs(make_pairs(400), tagged(400), human_fraction=0.1, seed=0)
    certain = routed.filter(pl.col("inclusion_probability") == 1.0)
    assert certain.height == 36  # 0.9 x 40
    assert set(certain["route"]) == {"targeted"}
    assert certain["prob_a"].max() < routed.filter(pl.col("inclusion_probability") < 1.0)["prob_a"].min()
    assert routed["inclusion_probability"].min() > 0
    assert routed["inclusion_probability"].sum() == pytest.approx(40)
    reasons = dict(routed.select("route", "route_reason").iter_rows())
    assert reasons["targeted"].startswith("probability of a wrong label 0.")
    assert reasons["audit"].startswith("drawn with probability 0.")
    assert reasons["judge"].startswith("not drawn (probability 0.0")


def test_pairs_are_drawn_as_often_as_their_probability_says() -> None:
    pairs = make_pairs(60)
    times_drawn, probabilities = np.zeros(60), np.zeros(60)
    for seed in range(600):
        routed = routing.route_pairs(pairs, tagged(60), human_fraction=0.2, seed=seed)
        times_drawn += routed["route"].is_in(["audit", "targeted"]).to_numpy()
        probabilities = routed["inclusion_probability"].to_numpy()
    assert np.abs(times_drawn / 600 - probabilities).max() < 0.07


def test_agreement_is_estimated_without_bias() -> None:
    """Annotators mostly review the pairs that judges get wrong."""
    rng = np.random.default_rng(0)
    p = 0.5 + rng.random(600) / 2
    is_right = rng.random(600) < p
    pairs = make_pairs(600, prob_a=p.tolist()).with_columns(right=pl.Series(is_right.astype(float)))
    estimates, plain = [], []
    for seed in range(300):
        routed = routing.route_pairs(pairs, tagged(600), human_fraction=0.2, seed=seed)
        routed = routed.with_columns(preferred_by_judges=pl.lit("a"))
        queued = queue(routed)
        labels = queued.select("pair_id", label=pl.when(pl.col("right") > 0).then(pl.lit("a")).otherwise(pl.lit("b")))
        estimate = estimate_agreement(routed, labels, pl.DataFrame()).agreement
        assert estimate is not None
        estimates.append(estimate.value)
        plain.append(queued["right"].mean())
    assert abs(np.mean(estimates) - is_right.mean()) < 0.01
    assert np.mean(plain) < is_right.mean() - 0.05


def test_chance_decides_among_equally_confident_pairs() -> None:
    routed = routing.route_pairs(make_pairs(100, prob_a=[0.9] * 100), tagged(100), human_fraction=0.2, seed=0)
    assert set(routed["inclusion_probability"].round(9)) == {0.2}
    assert set(queue(routed)["route"]) == {"audit", "targeted"}


def test_high_stakes_and_answers_that_address_the_judge_come_first() -> None:
    columns = {"prob_a": [0.9] * 20, "flags": [["a_addresses_judge"] if i == 3 else [] for i in range(20)]}
    routed = routing.route_pairs(make_pairs(20, **columns), tagged(20, p5="medical"), human_fraction=0.2, seed=1)
    by_id = {row["pair_id"]: row for row in routed.iter_rows(named=True)}
    assert by_id["0003"]["inclusion_probability"] == by_id["0005"]["inclusion_probability"] == 1.0
    assert by_id["0003"]["route_reason"] == "answer a addresses the judge"
    assert by_id["0005"]["route_reason"] == "probability of a wrong label 0.1; stakes x2.0"


def test_no_topic_takes_the_whole_budget() -> None:
    n = 200
    p = [0.66 if i < 60 else 0.7 + i / 1000 for i in range(n)]  # the 60 least confident pairs share a topic
    routed = routing.route_pairs(
        make_pairs(n, prob_a=p), tagged(n, **{f"p{i}": "chess" for i in range(60)}), human_fraction=0.2, seed=0
    )
    chess = routed.filter(pl.col("prob_a") == 0.66)
    assert chess["inclusion_probability"].sum() == pytest.approx(0.3 * 40, abs=3)
    everything = routing.route_pairs(
        make_pairs(n, prob_a=p), tagged(n, **{f"p{i}": "chess" for i in range(n)}), human_fraction=0.2, seed=0
    )
    assert queue(everything).height == 40


def test_pairs_that_only_humans_may_decide_are_queued_or_dropped() -> None:
    humans_only = {"humans_only": [True] * 5 + [False] * 35}
    routed = routing.route_pairs(
        make_pairs(40, prob_a=[0.99] * 40, **humans_only), tagged(40), human_fraction=0.1, seed=0
    )
    theirs = routed.head(5)
    assert not set(theirs["route"]) & {"judge"}
    assert theirs.filter(pl.col("route") != "dropped").height >= 3
    assert set(theirs.filter(pl.col("route") == "dropped")["drop_reason"]) == {"borderline_prompt"}


def test_undecided_pairs_are_never_labeled_by_the_judges() -> None:
    routed = routing.route_pairs(make_pairs(40, prob_a=[0.5] * 20 + [0.9] * 20), tagged(40), human_fraction=0.1, seed=0)
    ties = routed.filter(pl.col("prob_a") == 0.5)
    assert set(ties["route"]) <= {"audit", "targeted", "dropped"}
    assert set(ties.filter(pl.col("route") == "dropped")["drop_reason"]) == {"undecided"}


def test_the_drop_reason_is_written_as_text_with_the_probability_of_a_near_tie() -> None:
    pairs = make_pairs(3, prob_a=[0.6, 0.9, 0.9], kept=[False, False, True]).with_columns(
        drop_reason=pl.Series(["near_tie", "another_pair_kept", None])
    )
    routed = routing.route_pairs(pairs, tagged(3), human_fraction=0.0, seed=0)
    described = routing.describe_drops(routed.with_columns(drop_reason=pl.col("drop_reason").fill_null("near_tie")))
    near_tie, other, labeled = described.select("route", "drop_reason", "route_reason").rows()
    assert near_tie == ("dropped", "near_tie", "near tie (p 0.6)")
    assert other == ("dropped", "another_pair_kept", "another pair of this prompt is kept")
    assert labeled[:2] == ("judge", None)
    assert labeled[2].startswith("not drawn")


def test_suspicious_pairs_are_drawn_three_times_as_often_among_confident_ones() -> None:
    doubt = {"suspicion": ["the winner is 3.0 times as long" if i % 2 else None for i in range(400)]}
    p = {"prob_a": [0.6] * 40 + [0.95] * 360}
    routed = routing.route_pairs(make_pairs(400, **p, **doubt), tagged(400), human_fraction=0.1, seed=0)
    confident = routed.filter(pl.col("prob_a") == 0.95)
    by_doubt = dict(
        confident.group_by(pl.col("suspicion").is_null()).agg(pl.col("inclusion_probability").mean()).iter_rows()
    )
    assert by_doubt[False] == pytest.approx(3 * by_doubt[True])
    queued = queue(confident).filter(pl.col("suspicion").is_not_null())
    assert queued.height
    assert queued["route_reason"].str.ends_with("the winner is 3.0 times as long").all()


def test_the_order_of_rows_does_not_change_routes() -> None:
    pairs = make_pairs(60)
    one = routing.route_pairs(pairs, tagged(60), human_fraction=0.2, seed=1)
    assert one.equals(routing.route_pairs(pairs.reverse(), tagged(60).reverse(), human_fraction=0.2, seed=1))
    assert not one.equals(routing.route_pairs(pairs, tagged(60), human_fraction=0.2, seed=2))


def test_most_of_the_queue_stays_when_a_run_grows() -> None:
    before = queue(routing.route_pairs(make_pairs(1000, prob_a=[0.9] * 1000), tagged(1000), human_fraction=0.1, seed=0))
    after = queue(routing.route_pairs(make_pairs(1100, prob_a=[0.9] * 1100), tagged(1100), human_fraction=0.1, seed=0))
    assert len(set(before["pair_id"]) & set(after["pair_id"])) >= 90


def test_suspicion_names_the_evidence_against_a_label() -> None:
    pairs = make_pairs(4, prob_a=[0.9] * 4).with_columns(
        a=pl.Series(["a0", "a1", "a2", "a3"]), b=pl.Series(["b0", "b1", "b2", "b3"]),
        decided_by=pl.Series(["panel", "panel", "check", "panel"]), score_a=pl.Series([1.0, 4.0, None, None]),
        score_b=pl.Series([3.0, 3.0, None, None]),
    )  # fmt: skip
    judge_votes = pl.DataFrame(
        {
            "a": ["a1", "a2", "a3"],
            "b": ["b1", "b2", "b3"],
            "panel_judge": ["j@m"] * 3,
            "p_ab": [0.9, 0.1, 0.2],
            "p_ba": [0.9, 0.2, 0.9],
        }
    )
    keys = [f"{side}{i}" for side in "ab" for i in range(4)]
    lengths = pl.DataFrame({"key": keys, "chars": [100, 100, 100, 500, 100, 100, 100, 100]})
    reasons = routing.add_suspicion(pairs, judge_votes, lengths)["suspicion"].to_list()
    assert reasons == [
        "the winner was rated lower",
        None,
        "j@m disagrees with the check",
        "the winner is 5.0 times as long",
    ]


def candidate(*pairs: tuple[str, float, float]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Candidates of one prompt each, and the panel's votes: (name, p_ab, p_ba)."""
    none = pl.lit(None, pl.Float64)
    names = pl.DataFrame({"prompt_id": [name for name, _, _ in pairs]}).with_columns(
        a=pl.format("{}-a", "prompt_id"),
        b=pl.format("{}-b", "prompt_id"),
        score_a=none,
        score_b=none,
        variance_a=none,
        variance_b=none,
        rating_margin=none,
        rank=pl.lit(1, pl.UInt32),
    )
    votes = names.select("a", "b").with_columns(
        p_ab=pl.Series([p for _, p, _ in pairs]),
        p_ba=pl.Series([p for _, _, p in pairs]),
        flags=pl.lit([], pl.List(pl.String)),
        decided_by=pl.lit("panel"),
    )
    return names, votes


def test_no_more_near_ties_are_dropped_than_allowed() -> None:
    names, votes = candidate(("x", 1.0, 0.0), ("y", 0.6, 0.6), ("z", 0.62, 0.62), ("u", 1.0, 1.0))
    for allowed, kept in ((1.0, {"u"}), (0.5, {"u", "z"}), (0.25, {"u", "z", "y"}), (0.0, {"u", "z", "y", "x"})):
        decided = aggregation.decide_outcomes(names, votes, "round-robin", min_confidence=0.65, max_per_prompt=1)
        kept_ties = aggregation.most_confident_ties(
            aggregation.prompts_lost_to_ties(decided), aggregation.count_judged_prompts(decided), allowed
        )
        decided = aggregation.keep_ties(decided, kept_ties)
        assert set(decided.filter("kept")["prompt_id"]) == kept
        assert decided.filter("kept")["drop_reason"].is_null().all()
        assert decided.filter(pl.col("prompt_id") == "x")["preferred"].item() is None


def test_the_better_of_two_bad_answers_is_dropped() -> None:
    names, votes = candidate(("x", 0.9, 0.9), ("y", 0.1, 0.1), ("z", 0.9, 0.9))
    rated = names.with_columns(score_a=pl.Series([1.5, 1.0, None]), score_b=pl.Series([1.0, 2.5, None]))
    decided = aggregation.decide_outcomes(
        rated, votes, "round-robin", min_confidence=0.65, max_per_prompt=1, min_chosen_rating=2.0
    )
    assert set(decided.filter("kept")["prompt_id"]) == {"y", "z"}
    assert decided.filter(pl.col("prompt_id") == "x")["drop_reason"].item() == "low_rating"
