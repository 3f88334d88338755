"""Candidates, aggregation and the dataset, on small frames whose result can be worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.pair import aggregation, candidates, dataset_writer, strengths
from rlaif.run.human_labels import human_labels

COMPARER = candidates.PanelMember("helpful", "h", "m", 1.0)
RATER = candidates.PanelMember("quality", "q", "m", 1.0, num_aspects=2)


def completions(*rows: tuple[str, str, str, str | None], source: str = "imported") -> pl.DataFrame:
    """(key, prompt, text, finish_reason)."""
    frame = pl.DataFrame(
        rows,
        schema={"key": pl.String, "prompt_id": pl.String, "text": pl.String, "finish_reason": pl.String},
        orient="row",
    )
    columns = {"model": pl.lit("p"), "offset": pl.lit(0, pl.Int64), "source": pl.lit(source)}
    return candidates.summarize_texts(frame.with_columns(**columns))


def verdict(a: str, b: str | None, **fields: Any) -> dict[str, Any]:
    kind = "rate" if b is None else "compare"
    member = RATER if b is None else COMPARER
    base = {
        "kind": kind,
        "judge": member.judge,
        "judge_hash": member.judge_hash,
        "model": member.model,
        "prompt_id": "p",
        "a": a,
        "b": b,
        "order": None,
        "aspect": None,
        "sample": 0,
        "prob_a": None,
        "score": None,
        "variance": None,
        "label": None,
        "flags": [],
    }
    return base | fields


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    schema = {"kind": pl.String, "judge": pl.String, "judge_hash": pl.String, "model": pl.String,
              "prompt_id": pl.String, "a": pl.String,
              "b": pl.String, "order": pl.String, "aspect": pl.String, "sample": pl.Int64, "prob_a": pl.Float64,
              "score": pl.Float64, "variance": pl.Float64, "label": pl.String, "flags": pl.List(pl.String)}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def compare(a: str, b: str, p_ab: float | None, p_ba: float | None, **fields: Any) -> list[dict[str, Any]]:
    orders = [("ab", p_ab), ("ba", p_ba)]
    return [verdict(a, b, order=order, prob_a=p, **fields) for order, p in orders if p is not None]


def rate(key: str, *scores: float, variance: float = 0.0) -> list[dict[str, Any]]:
    return [verdict(key, None, aspect=f"aspect{i}", score=score, variance=variance) for i, score in enumerate(scores)]


def test_unusable_answers_are_counted_by_reason() -> None:
    frame = completions(
        ("1", "p", "Yes, it is.", "stop"),
        ("2", "p", " Yes,  it is. \r\n", "stop"),
        ("3", "p", "", "stop"),
        ("4", "p", "   \n", None),
        ("5", "p", "cut o", "length"),
        ("6", "other", "Yes, it is.", None),
        ("7", "p", "?!", None),
        ("8", "p", "...", None),
        # One sign, capital or comma apart is not the same answer.
        ("a", "p", "-5", None),
        ("b", "p", "5", None),
        ("c", "p", "yes, it is.", None),
        ("d", "p", "Yes it is.", None),
    )
    answers, dropped = candidates.drop_unusable(frame)
    assert sorted(answers["key"]) == ["1", "6", "7", "8", "a", "b", "c", "d"]
    assert dropped == {"empty": 2, "truncated": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("finish_reason", "source", "drop_reason"),
    [
        ("stop", "sampled", None),
        ("STOP", "sampled", None),
        ("eos", "sampled", None),
        ("eos_token", "sampled", None),
        ("stop_sequence", "sampled", None),
        ("end_turn", "sampled", None),
        (None, "imported", None),
        (None, "sampled", "incomplete"),
        ("length", "sampled", "truncated"),
        ("length", "imported", "truncated"),
        ("model_length", "sampled", "truncated"),
        ("max_tokens", "sampled", "truncated"),
        ("content_filter", "sampled", "incomplete"),
        ("error", "sampled", "incomplete"),
        ("abort", "sampled", "incomplete"),
        ("repetition", "sampled", "incomplete"),
        ("anything else", "imported", "incomplete"),
        ("", "sampled", "incomplete"),
        ("tool_calls", "sampled", "tool_call"),
        ("function_call", "sampled", "tool_call"),
        ("tool_use", "sampled", "tool_call"),
    ],
)
def test_only_a_complete_answer_is_paired(finish_reason: str | None, source: str, drop_reason: str | None) -> None:
    answers, dropped = candidates.drop_unusable(completions(("1", "p", "Some text", finish_reason), source=source))
    assert (answers.height, dropped) == ((1, {}) if drop_reason is None else (0, {drop_reason: 1}))


def test_ratings_need_every_aspect_and_are_scaled_to_one_to_five() -> None:
    wide = candidates.PanelMember("wide", "w", "m", 3.0, num_aspects=1, low=0, high=9)
    by_wide = verdict("z", None, judge="wide", judge_hash="w", aspect="it", score=9.0, variance=0.0)
    rows = [*rate("x", 2.0, 4.0), *rate("y", 5.0), by_wide, *rate("z", 1.0, 1.0)]
    answers, _ = candidates.drop_unusable(completions(*[(key, "p", f"text {key}", None) for key in "uxyz"]))
    pairs = candidates.pair_answers(
        answers, candidates.panel_ratings(frame([*rows, *rate("u", 2.0, 2.0)]), [RATER, wide])
    )
    scores = {
        (a, b): (score_a, score_b) for a, b, score_a, score_b in pairs.select("a", "b", "score_a", "score_b").rows()
    }
    assert scores == {("u", "x"): (2.0, 3.0), ("u", "z"): (2.0, 1.0), ("x", "z"): (3.0, 1.0), ("u", "y"): (None, None),
                      ("x", "y"): (None, None), ("y", "z"): (None, None)}  # fmt: skip
    only_wide = candidates.pair_answers(answers, candidates.panel_ratings(
        frame([by_wide, by_wide | {"a": "y", "score": 4.5}, *rate("y", 1.0, 1.0), *rate("z", 1.0, 1.0)]), [RATER, wide]
    ))  # fmt: skip
    assert only_wide.filter(pl.col("b") == "z", pl.col("a") == "y").select("score_a", "score_b").row(0) == (
        pytest.approx((3 * 3 + 1 * 1) / 4), pytest.approx((3 * 5 + 1 * 1) / 4),
    )  # fmt: skip


STRICT = candidates.PanelMember("strict", "s", "m", 1.0, num_aspects=1)
LENIENT = candidates.PanelMember("lenient", "l", "m", 1.0, num_aspects=1)


def rating(member: candidates.PanelMember, key: str, score: float, **fields: Any) -> dict[str, Any]:
    base = {"judge": member.judge, "judge_hash": member.judge_hash, "aspect": "it", "score": score, "variance": 0.1}
    return verdict(key, None, **base | fields)


def paired_by(rows: list[dict[str, Any]], *panel: candidates.PanelMember) -> pl.DataFrame:
    answers, _ = candidates.drop_unusable(
        completions(*[(key, "p", f"text {key}", None) for key in sorted({row["a"] for row in rows})])
    )
    return candidates.pair_answers(answers, candidates.panel_ratings(frame(rows), panel))


def test_a_strict_judge_that_is_missing_on_one_side_does_not_turn_the_pair() -> None:
    """Both judges prefer x. With a mean over the judges of each, y would win by (2 + 4) / 2 against 3.5."""
    rows = [rating(STRICT, "x", 2.0), rating(LENIENT, "x", 4.0), rating(LENIENT, "y", 3.5)]
    row = paired_by(rows, STRICT, LENIENT).row(0, named=True)
    assert (row["score_a"], row["score_b"], row["rating_margin"]) == (4.0, 3.5, 0.5)
    decided = aggregation.decide_outcomes(
        paired_by(rows, STRICT, LENIENT).with_columns(rank=pl.lit(1, pl.UInt32)),
        aggregation.aggregate_votes(frame(rows), []), "rate-only", min_confidence=0.5, max_per_prompt=1,
    )  # fmt: skip
    assert decided["preferred"].item() == "a"
    apart = [rating(STRICT, "x", 2.0), rating(LENIENT, "y", 3.5)]
    assert paired_by(apart, STRICT, LENIENT)["rating_margin"].to_list() == [None]


def test_a_sample_that_is_missing_on_one_side_does_not_turn_the_pair() -> None:
    rows = [rating(STRICT, "x", 2.0, sample=0), rating(STRICT, "x", 5.0, sample=1), rating(STRICT, "y", 3.0, sample=0)]
    assert paired_by(rows, STRICT).select("score_a", "score_b").row(0) == (2.0, 3.0)
    rows = [*compare("x", "y", 0.9, 0.1, sample=0), *compare("x", "y", 1.0, None, sample=1)]
    (votes,) = aggregation.votes_by_judge(frame(rows), [COMPARER]).rows(named=True)
    assert (votes["p_ab"], votes["p_ba"]) == (0.9, 0.1)


def test_the_best_of_many_answers_is_chosen_by_common_judges() -> None:
    """The strict judge rated all but answer 7, which so has the highest mean; 6 is the best for both judges."""
    rows = [rating(LENIENT, str(i), 2.0 + i * 0.4) for i in range(7)] + [rating(LENIENT, "7", 4.3)]
    rows += [rating(STRICT, str(i), 1.0 + i * 0.4) for i in range(7)]
    answers, _ = candidates.drop_unusable(completions(*[(str(i), "p", f"text {i}", None) for i in range(8)]))
    ratings = candidates.panel_ratings(frame(rows), [STRICT, LENIENT])
    ranked = candidates.rank_candidates(
        answers, ratings, "rate-then-compare", min_rating_margin=0.5, max_candidates=1
    )  # fmt: skip
    assert ranked.select("a", "b").row(0) == ("0", "6")


def one_judge(scores: dict[str, float]) -> pl.DataFrame:
    """Return the ratings by one judge, with a variance of 0.1."""
    n = len(scores)
    return pl.DataFrame(
        {"key": list(scores), "judge": ["q"] * n, "model": ["m"] * n, "aspect": ["it"] * n, "sample": [0] * n,
         "weight": [1.0] * n, "num_aspects": [1] * n, "score": list(scores.values()), "variance": [0.1] * n}
    )  # fmt: skip


def test_candidates_go_from_best_against_worst_to_smaller_margins() -> None:
    answers, _ = candidates.drop_unusable(completions(*[(str(i), "p", f"text {i}", None) for i in range(4)]))
    rated = one_judge({"0": 1.0, "1": 2.5, "2": 4.0, "3": 5.0})
    ranked = candidates.rank_candidates(answers, rated, "rate-then-compare", min_rating_margin=1.0, max_candidates=8)
    assert ranked.select("a", "b", "rank").rows() == [("0", "3", 1), ("0", "2", 2), ("1", "3", 3), ("0", "1", 4),
                                                      ("1", "2", 5), ("2", "3", 6)]  # fmt: skip
    assert (
        candidates.rank_candidates(answers, rated, "rate-then-compare", min_rating_margin=2.6, max_candidates=8).height
        == 2
    )
    assert (
        candidates.rank_candidates(answers, rated, "rate-then-compare", min_rating_margin=0.0, max_candidates=1).height
        == 1
    )


def test_a_failed_rating_does_not_drop_the_prompt() -> None:
    """Two answers are compared even if one has no rating; so are three if the rated ones are too close."""
    keys = [("1", "two"), ("2", "two"), ("3", "near"), ("4", "near"), ("5", "near"), ("6", "far"), ("7", "far"),
             ("8", "far")]  # fmt: skip
    answers, _ = candidates.drop_unusable(completions(*[(key, prompt, f"text {key}", None) for key, prompt in keys]))
    scores = {"1": 4.0, "3": 4.0, "4": 3.9, "6": 4.0, "7": 1.0}
    rated = one_judge(scores)
    ranked = candidates.rank_candidates(answers, rated, "rate-then-compare", min_rating_margin=1.0, max_candidates=8)
    assert ranked.select("prompt_id", "a", "b", "rank").rows() == [
        ("far", "6", "7", 1), ("near", "3", "5", 1), ("near", "4", "5", 2), ("two", "1", "2", 1)]  # fmt: skip
    by_ratings = candidates.rank_candidates(answers, rated, "rate-only", min_rating_margin=1.0, max_candidates=8)
    assert by_ratings["prompt_id"].to_list() == ["far"]  # without ratings there is nothing to rank by


def test_the_rejected_one_of_eight_answers_is_not_the_worst_outlier() -> None:
    answers, _ = candidates.drop_unusable(completions(*[(str(i), "p", f"text {i}", None) for i in range(8)]))
    scores = [1.0, 2.9, 3.6, 3.8, 4.0, 4.2, 4.4, 4.6]  # mean 3.56, sd 1.07: the target is 1.42
    rated = one_judge({str(i): score for i, score in enumerate(scores)})
    assert candidates.rank_candidates(
        answers, rated, "rate-then-compare", min_rating_margin=1.0, max_candidates=1
    ).select("a", "b").row(0) == (
        "0",
        "7",
    )
    scores[0] = -9.0  # mean 2.3, sd 4.4: the target is -6.4, still nearest to the outlier
    scores[1] = -6.0
    rated = rated.with_columns(score=pl.Series(scores))
    chosen = (
        candidates.rank_candidates(answers, rated, "rate-then-compare", min_rating_margin=1.0, max_candidates=1)
        .select("a", "b")
        .row(0)
    )
    mean = sum(scores) / 8
    target = mean - 2 * (sum((s - mean) ** 2 for s in scores) / 8) ** 0.5
    nearest = min(range(7), key=lambda i: abs(scores[i] - target))
    assert chosen == (str(nearest), "7")


REWARD = candidates.PanelMember("reward", "r", "rm", 3.0)


def scored(key: str, score: float, kind: str = "reward", **fields: Any) -> dict[str, Any]:
    member = REWARD if kind == "reward" else candidates.PanelMember("check", "c", "", 1.0)
    base = {"kind": kind, "judge": member.judge, "judge_hash": member.judge_hash, "model": member.model, "score": score}
    return verdict(key, None, **base | fields)


def test_a_reward_model_is_a_panel_judge() -> None:
    """Bradley-Terry in both orders, weighted; answers to another prompt or scores by another model do not count."""
    rows = [*compare("x", "y", 0.9, 0.7), scored("x", 1.0), scored("y", 3.0, flags=["addresses_judge"]),
            scored("z", 0.0, prompt_id="other"), scored("y", -9.0, judge_hash="stale")]  # fmt: skip
    judge_votes = aggregation.votes_by_judge(frame(rows), [COMPARER, REWARD])
    p = 1 / (1 + math.exp(2))
    assert judge_votes.columns == ["a", "b", "panel_judge", "weight", "p_ab", "p_ba", "flags"]
    assert judge_votes.rows() == [("x", "y", "helpful@m", 1.0, 0.9, 0.7, []),
                            ("x", "y", "reward@rm", 3.0, pytest.approx(p), pytest.approx(p),
                             ["b_addresses_judge"])]  # fmt: skip
    (row,) = aggregation.aggregate_votes(frame(rows), [COMPARER, REWARD]).rows(named=True)
    assert row == {"a": "x", "b": "y", "p_ab": pytest.approx((0.9 + 3 * p) / 4),
                    "p_ba": pytest.approx((0.7 + 3 * p) / 4), "flags": ["b_addresses_judge"],
                    "decided_by": "panel"}  # fmt: skip
    requested = pl.DataFrame({"a": ["x"], "b": ["z"]})
    assert aggregation.votes_by_judge(frame(rows), [COMPARER, REWARD], requested).filter(pl.col("b") == "z").height == 1


def test_a_check_overrides_every_model_unless_it_is_equal() -> None:
    rows = [*compare("x", "y", 0.99, 0.99), *compare("x", "z", 0.8, 0.6), scored("x", 0.5, "check"),
            scored("y", 1.0, "check"), scored("z", 0.5, "check")]  # fmt: skip
    pairs = pl.DataFrame({"a": ["x", "x", "y"], "b": ["y", "z", "z"]})
    outcomes = {(a, b): rest for a, b, *rest in aggregation.aggregate_votes(frame(rows), [COMPARER], pairs).rows()}
    assert outcomes == {("x", "y"): [0.0, 0.0, [], "check"], ("x", "z"): [0.8, 0.6, [], "panel"],
                    ("y", "z"): [1.0, 1.0, [], "check"]}  # fmt: skip
    assert aggregation.aggregate_votes(frame(rows), [COMPARER]).height == 2


def test_a_check_decides_under_every_strategy() -> None:
    rows = [*compare("x", "y", 0.9, 0.9), scored("x", 0.0, "check"), scored("y", 1.0, "check")]
    pairs = candidate(("p", "x", "y")).with_columns(score_a=5.0, score_b=1.0, variance_a=0.1, variance_b=0.1)
    compared = aggregation.aggregate_votes(frame(rows), [COMPARER], pairs)
    for strategy in ("rate-then-compare", "round-robin", "rate-only"):
        decided = aggregation.decide_outcomes(pairs, compared, strategy, min_confidence=0.65, max_per_prompt=1)
        assert decided.select("preferred", "prob_a", "outcome", "kept", "decided_by").row(0) == (
            "b",
            0.0,
            "win",
            True,
            "check",
        )


def candidate(*pairs: tuple[str, str, str]) -> pl.DataFrame:
    none = pl.lit(None, pl.Float64)
    return pl.DataFrame(pairs, schema=["prompt_id", "a", "b"], orient="row").with_columns(
        score_a=none, score_b=none, variance_a=none, variance_b=none, rating_margin=none,
        rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over("prompt_id"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("p_ab", "p_ba", "outcome", "preferred"),
    [
        (0.9, 0.8, "win", "a"),
        (0.1, 0.3, "win", "b"),
        (1.0, 0.5, "win", "a"),  # a verdict and a tie
        (0.7, 0.6, "win", "a"),  # at the threshold, whichever answer is called a: the mean is an ulp below 0.65
        (0.4, 0.3, "win", "b"),
        (0.99, 0.4, "win", "a"),  # confident enough on average
        (0.9, 0.1, "inconsistent", None),
        (0.6, 0.6, "tie", None),
        (0.5, 0.5, "tie", None),
        (0.9, None, "unparsable", None),  # one order is not enough
        (None, None, "unparsable", None),
    ],
)
def test_outcomes(p_ab: float | None, p_ba: float | None, outcome: str, preferred: str | None) -> None:
    compared = aggregation.aggregate_votes(frame(compare("x", "y", p_ab, p_ba)), [COMPARER])
    row = aggregation.decide_outcomes(
        candidate(("p", "x", "y")), compared, "rate-then-compare", min_confidence=0.65, max_per_prompt=1
    )
    assert (row["outcome"].item(), row["preferred"].item()) == (outcome, preferred)
    assert row["kept"].item() == (outcome == "win")
    assert (row["drop_reason"].item() is None) == (outcome == "win")


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.5, 1))
def test_swapping_a_pair_swaps_its_label(p_ab: float, p_ba: float, threshold: float) -> None:
    """With a and b swapped everywhere, the same answer wins."""

    def outcome(first: float, second: float) -> tuple[str, str | None]:
        compared = aggregation.aggregate_votes(frame(compare("x", "y", first, second)), [COMPARER])
        row = aggregation.decide_outcomes(
            candidate(("p", "x", "y")), compared, "round-robin", min_confidence=threshold, max_per_prompt=1
        )
        return row["outcome"].item(), row["preferred"].item()

    swapped_side = {"a": "b", "b": "a", None: None}
    original, swapped_result = outcome(p_ab, p_ba), outcome(1 - p_ba, 1 - p_ab)
    if abs(max((p_ab + p_ba) / 2, 1 - (p_ab + p_ba) / 2) - threshold) > 1e-9 and abs(p_ab + p_ba - 1) > 1e-9:
        assert (original[0], original[1]) == (swapped_result[0], swapped_side[swapped_result[1]])


def test_round_robin_keeps_the_strongest_against_the_weakest() -> None:
    rows = [*compare("x", "y", 0.9, 0.9), *compare("x", "z", 0.8, 0.8), *compare("y", "z", 0.7, 0.7)]
    decided = aggregation.decide_outcomes(
        candidate(("p", "x", "y"), ("p", "x", "z"), ("p", "y", "z")).with_columns(rank=pl.lit(1, pl.UInt32)),
        aggregation.aggregate_votes(frame(rows), [COMPARER]), "round-robin", min_confidence=0.65, max_per_prompt=1,
    )  # fmt: skip
    # Strengths: x 0.85, y 0.4, z 0.25.
    assert decided.filter("kept").select("a", "b").rows() == [("x", "z")]
    assert set(decided.filter(~pl.col("kept"))["drop_reason"]) == {"another_pair_kept"}


def test_round_robin_with_missing_comparisons_does_not_depend_on_the_opponents() -> None:
    """x beats y, but met the strongest answer s, while y met the weakest. Mean wins: x 0.4, y 0.65."""
    rows = [*compare("s", "x", 0.9, 0.9), *compare("x", "y", 0.7, 0.7), *compare("s", "w", 0.99, 0.99),
            *compare("w", "y", 0.0, 0.0)]  # fmt: skip
    pairs = [("p", a, b) for a, b in (("s", "w"), ("s", "x"), ("s", "y"), ("w", "x"), ("w", "y"), ("x", "y"))]
    decided = aggregation.decide_outcomes(
        candidate(*pairs).with_columns(rank=pl.lit(1, pl.UInt32)), aggregation.aggregate_votes(frame(rows), [COMPARER]),
        "round-robin", min_confidence=0.65, max_per_prompt=6,
    )  # fmt: skip
    reasons = {(a, b): reason for a, b, reason in decided.select("a", "b", "drop_reason").rows()}
    assert reasons == {("s", "w"): None, ("s", "x"): None, ("x", "y"): None, ("w", "y"): None,
                       ("s", "y"): "unparsable", ("w", "x"): "unparsable"}  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.05, 0.95), min_size=6, max_size=6))
def test_strengths_of_a_complete_round_robin_are_mean_wins(probabilities: list[float]) -> None:
    """The Bradley-Terry fit has the same mean wins as the data, so a missing comparison changes nothing by itself."""
    sides = [("1", "2"), ("1", "3"), ("1", "4"), ("2", "3"), ("2", "4"), ("3", "4")]
    judged = pl.DataFrame(
        {"prompt_id": ["p"] * 6, "a": [a for a, _ in sides], "b": [b for _, b in sides], "prob_a": probabilities}
    )
    wins = dict(strengths.mean_wins(judged).select("key", "strength").iter_rows())
    design = np.array([[float(key == a) - float(key == b) for key in "1234"] for a, b in sides])
    fitted = strengths._predicted_mean_wins(design, np.array(probabilities))
    assert [wins[key] for key in "1234"] == pytest.approx(fitted, abs=1e-3)


def test_verdicts_by_another_judge_version_or_model_do_not_count() -> None:
    rows = compare("x", "y", 0.9, 0.9, judge_hash="older") + compare("x", "y", 0.9, 0.9, model="other")
    assert aggregation.aggregate_votes(frame(rows), [COMPARER]).height == 0


def reviews(*rows: tuple[str, str, str, str | None, float]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, schema={"pair_id": pl.String, "annotator": pl.String, "choice": pl.String, "preferred": pl.String,
                      "created_at": pl.Float64}, orient="row",
    )  # fmt: skip


def test_the_newest_label_of_each_annotator_counts_and_annotators_must_agree() -> None:
    labels = human_labels(
        reviews(
            ("1", "ada", "left", "a", 1.0), ("1", "ada", "right", "b", 2.0),
            ("2", "ada", "left", "a", 1.0), ("2", "bob", "right", "a", 1.0),
            ("3", "ada", "left", "a", 1.0), ("3", "bob", "left", "b", 1.0),
            ("4", "ada", "tie", None, 1.0), ("5", "ada", "skip", None, 1.0),
            ("6", "ada", "skip", None, 1.0), ("6", "bob", "both_bad", None, 1.0),
        )
    )  # fmt: skip
    result = dict(labels.select("pair_id", "label").iter_rows())
    assert result == {"1": "b", "2": "a", "3": "disagreement", "4": "tie", "6": "both_bad"}


def review(pair: str, name: str, preferred: str | None, choice: str = "left", **more: Any) -> dict[str, Any]:
    return {
        "pair_id": pair,
        "annotator": name,
        "choice": choice,
        "preferred": preferred,
        "created_at": 1.0,
        "edited_response": None,
        "role": "annotator",
        "route": "audit",
        **more,
    }


def test_a_majority_decides_and_an_adjudicator_overrides_it() -> None:
    rows = [
        *(review("majority", name, side) for name, side in (("ada", "a"), ("bob", "b"), ("cyd", "b"))),
        *(review("split", name, side) for name, side in (("ada", "a"), ("bob", "b"))),
        *(review("outranked", name, "a") for name in ("ada", "bob", "cyd")),
        review("outranked", "lead", None, "tie", role="adjudicator"),
        review("outranked", "lead", "b", role="adjudicator", created_at=2.0),
        *(review("passed on", name, "a") for name in ("ada", "bob")),
        review("passed on", "lead", None, "skip", role="adjudicator"),
        review("gold", "ada", "a", route="gold"),
        review("three ways", "ada", "a"), review("three ways", "bob", "b"), review("three ways", "cyd", None, "tie"),
    ]  # fmt: skip
    schema = {"edited_response": pl.String, "preferred": pl.String}
    result = {row["pair_id"]: row for row in human_labels(pl.DataFrame(rows, schema_overrides=schema)).to_dicts()}
    assert {pair: (row["label"], row["decided_by"], row["num_annotators"]) for pair, row in result.items()} == {
        "majority": ("b", "majority", 3),
        "split": ("disagreement", "majority", 2),
        "outranked": ("b", "adjudicated", 4),
        "passed on": ("a", "majority", 2),
        "three ways": ("disagreement", "majority", 3),
    }


def metadata(n: int) -> pl.DataFrame:
    """Metadata of a table of ``n`` pairs."""
    return pl.DataFrame(
        {"pair_id": [str(i) for i in range(n)], "model_a": ["small"] * n, "model_b": ["large"] * n,
         "tags": [["t"]] * n, "tools": [None] * n, "has_tool_calls": [False] * n},
        schema_overrides={"tools": pl.String},
    )  # fmt: skip


def test_an_edit_is_chosen_and_the_answer_not_preferred_is_rejected(tmp_path: Path) -> None:
    """If neither was good, the rejected one is the answer that the judges preferred. An edit is not used if its author
    was outvoted or the pair is undecided."""
    rows = [
        review("0", "ada", "b", edited_response="better"),
        review("1", "ada", None, "both_bad", edited_response="rewritten"),
        review("2", "ada", "a", edited_response="lost"),
        review("2", "bob", "b"),
        review("2", "cyd", "b"),
        review("3", "ada", "a", edited_response="undecided"),
        review("3", "bob", "b"),
        review("4", "ada", "a", edited_response="hers"),
        review("4", "lead", "a", role="adjudicator", edited_response="the lead's"),
    ]
    n = 5
    pl.DataFrame(
        {"pair_id": [str(i) for i in range(n)], "prompt_id": [f"p{i}" for i in range(n)],
         "prompt": ['[{"role":"user","content":"q"}]'] * n, "response_a": ["A"] * n, "response_b": ["B"] * n,
         "completion_a": ["x"] * n, "completion_b": ["y"] * n, "prob_a": [0.2] * n, "preferred": ["b"] * n,
         "route": ["audit"] * n, "rating_margin": [-1.0] * n, "split": ["train"] * n}
    ).write_parquet(tmp_path / "pairs.parquet")  # fmt: skip
    labels = human_labels(pl.DataFrame(rows, schema_overrides={"preferred": pl.String, "edited_response": pl.String}))
    counts = dataset_writer.write_dataset(tmp_path / "pairs.parquet", labels, [metadata(n)], tmp_path / "set")
    result = {
        row["pair_id"]: (row["chosen"][0]["content"], row["rejected"][0]["content"], row["chosen_model"],
                         row["rejected_model"], row["rating_margin"], row["decided_by"], row["num_annotators"])
        for row in pl.read_parquet(tmp_path / "set" / "train.parquet").iter_rows(named=True)
    }  # fmt: skip
    assert result == {
        "0": ("better", "A", "human:ada", "small", None, "single", 1),
        "1": ("rewritten", "B", "human:ada", "large", None, "single", 1),
        "2": ("B", "A", "large", "small", 1.0, "majority", 3),
        "4": ("the lead's", "B", "human:lead", "large", None, "adjudicated", 2),
    }
    assert counts.human_written == 3
    assert dict(counts.dropped) == {"annotators_disagree": 1}


def test_an_edit_that_changed_nothing_does_not_count(tmp_path: Path) -> None:
    """The annotator started from an answer, left it unchanged and chose: no answer is paired with itself."""
    rows = [
        review("0", "ada", "a", edited_response="B\nb\n"),
        review("1", "ada", "a", edited_response=" A"),
        review("2", "ada", None, "both_bad", edited_response="B\nb"),
        review("3", "ada", None, "tie", edited_response="A"),
        review("4", "ada", "b", edited_response="B b"),
    ]
    n = 5
    pl.DataFrame(
        {"pair_id": [str(i) for i in range(n)], "prompt_id": [f"p{i}" for i in range(n)],
         "prompt": ['[{"role":"user","content":"q"}]'] * n, "response_a": ["A"] * n, "response_b": ["B\r\nb"] * n,
         "completion_a": ["x"] * n, "completion_b": ["y"] * n, "prob_a": [0.2] * n, "preferred": ["b"] * n,
         "route": ["audit"] * n, "rating_margin": [-1.0] * n, "split": ["train"] * n}
    ).write_parquet(tmp_path / "pairs.parquet")  # fmt: skip
    labels = human_labels(pl.DataFrame(rows, schema_overrides={"preferred": pl.String}))
    counts = dataset_writer.write_dataset(tmp_path / "pairs.parquet", labels, [metadata(n)], tmp_path / "set")
    result = {
        row["pair_id"]: (row["chosen"][0]["content"], row["rejected"][0]["content"], row["chosen_model"])
        for row in pl.read_parquet(tmp_path / "set" / "train.parquet").iter_rows(named=True)
    }
    assert result == {
        "0": ("A", "B\r\nb", "small"),
        "1": ("A", "B\r\nb", "small"),
        "4": ("B b", "A", "human:ada"),
    }
    assert counts.human_written == 1
    assert dict(counts.dropped) == {"both_bad": 1, "tie": 1}


def test_human_labels_override_judges_and_unreviewed_pairs_are_dropped(tmp_path: Path) -> None:
    n = 8
    routes = ["judge", "judge", "audit", "audit", "targeted", "targeted", "dropped", "dropped"]
    pairs = pl.DataFrame(
        {
            "pair_id": [str(i) for i in range(n)],
            "prompt_id": [f"p{i}" for i in range(n)],
            "prompt": ['[{"role":"user","content":"q"}]'] * n,
            "response_a": ["left"] * n,
            "response_b": ["right"] * n,
            "completion_a": ["x"] * n,
            "completion_b": ["y"] * n,
            "prob_a": [0.9] * 6 + [0.5, None],
            "preferred": ["a"] * 6 + [None] * 2,
            "route": routes,
            "rating_margin": [2.0] * n,
            "split": ["train"] * n,
        }
    )
    pairs.write_parquet(tmp_path / "pairs.parquet")
    labels = human_labels(
        reviews(("2", "ada", "left", "b", 1.0), ("3", "ada", "tie", None, 1.0),
                ("4", "ada", "left", "a", 1.0), ("4", "bob", "left", "b", 1.0))
    )  # fmt: skip
    counts = dataset_writer.write_dataset(tmp_path / "pairs.parquet", labels, [metadata(n)], tmp_path / "set")
    rows = {row["pair_id"]: row for row in pl.read_parquet(tmp_path / "set" / "train.parquet").iter_rows(named=True)}
    assert sorted(rows) == ["0", "1", "2"]
    assert dict(counts.dropped) == {
        "tie": 1, "annotators_disagree": 1, "awaiting_review": 1, "dropped": 2,
    }  # fmt: skip
    assert rows["0"] == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "left"}],
        "rejected": [{"role": "assistant", "content": "right"}],
        "pair_id": "0",
        "prompt_id": "p0",
        "label_source": "judge",
        "confidence": 0.9,
        "rating_margin": 2.0,
        "chosen_model": "small",
        "rejected_model": "large",
        "tags": ["t"],
        "decided_by": "judges",
        "num_annotators": 0,
    }
    assert (rows["2"]["decided_by"], rows["2"]["num_annotators"]) == ("single", 1)
    assert rows["2"]["label_source"] == "human"
    assert rows["2"]["chosen"][0]["content"] == "right"
    assert (rows["2"]["rating_margin"], rows["2"]["chosen_model"]) == (-2.0, "large")
    assert pl.read_parquet(tmp_path / "set" / "test.parquet").height == 0


def test_the_split_is_by_prompt(tmp_path: Path) -> None:
    n = 400
    pairs = pl.DataFrame(
        {"pair_id": [str(i) for i in range(n)], "prompt_id": [f"p{i // 4}" for i in range(n)],
         "prompt": ['[{"role":"user","content":"q"}]'] * n, "response_a": ["l"] * n, "response_b": ["r"] * n,
         "completion_a": ["x"] * n, "completion_b": ["y"] * n, "prob_a": [0.9] * n, "preferred": ["a"] * n,
         "route": ["judge"] * n, "rating_margin": [None] * n,
         "split": [dataset_writer.draw_split(f"p{i // 4}", seed=0, test_fraction=0.2) for i in range(n)]},
        schema_overrides={"rating_margin": pl.Float64},
    )  # fmt: skip
    pairs.write_parquet(tmp_path / "pairs.parquet")
    labels = human_labels(reviews())
    dataset_writer.write_dataset(tmp_path / "pairs.parquet", labels, [metadata(n)], tmp_path / "set")
    train, test = (pl.read_parquet(tmp_path / "set" / f"{name}.parquet") for name in ("train", "test"))
    assert train.height + test.height == n
    assert not set(train["prompt_id"]) & set(test["prompt_id"])
    assert 40 <= test.height <= 120
