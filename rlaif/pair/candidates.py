"""Which answers may be compared, what they were rated, and which pairs of a prompt to compare, the best first.

Everything depends on keys, scores and settings alone, never on the order in which rows came: in every pair, ``a`` is
the completion with the smaller key. Frames hold keys and byte offsets, not texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

Strategy = Literal["rate-then-compare", "round-robin", "rate-only"]
MANY_ANSWERS = 8
"""From this many answers on, the rejected one is the one nearest to mean - 2 sd: a moderate margin makes a better
pair than the very worst of many (Xiao et al. 2025, arXiv:2502.16825)."""


@dataclass(frozen=True)
class PanelMember:
    """One seat of the panel as the frames know it."""

    judge: str
    judge_hash: str
    model: str
    weight: float
    num_aspects: int = 0
    low: int = 1
    high: int = 5


def summarize_texts(completions: pl.DataFrame) -> pl.DataFrame:
    """A block of completions with its text replaced by what is needed of it: length, emptiness, and a fingerprint
    that ignores line ends and spaces. No more than those: a sign, a capital or a comma can be all that makes one
    answer right and the other wrong. Columns: key, prompt_id, model, finish_reason, offset, chars, empty, text_hash."""
    text = pl.col("text").str.replace_all("\r\n?", "\n").str.replace_all(r"[ \t]+", " ").str.replace_all(" ?\n ?", "\n")
    return completions.select(
        "key",
        "prompt_id",
        "model",
        "finish_reason",
        "offset",
        chars=pl.col("text").str.len_chars(),
        empty=pl.col("text").str.strip_chars().str.len_bytes() == 0,
        text_hash=text.str.strip_chars().hash(seed=0),
    )


def drop_unusable(completions: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The completions (as :func:`summarize_texts` gives them) that may stand in a pair, and how many do not and why.

    Of answers to one prompt that differ in line ends or spaces only, the one with the smallest key stays.
    """
    truncated = (pl.col("finish_reason") == "length").fill_null(False)
    marked = completions.with_columns(
        drop_reason=pl.when("empty").then(pl.lit("empty")).when(truncated).then(pl.lit("truncated"))
    )
    usable = marked.filter(pl.col("drop_reason").is_null()).drop("drop_reason").sort("key")
    distinct = usable.unique(["prompt_id", "text_hash"], keep="first", maintain_order=True)
    left_out = dict(
        marked.filter(pl.col("drop_reason").is_not_null()).group_by("drop_reason").len().sort("drop_reason").iter_rows()
    )
    if usable.height > distinct.height:
        left_out["duplicate"] = usable.height - distinct.height
    return distinct, left_out


def join_panel(verdicts: pl.DataFrame, panel: Sequence[PanelMember]) -> pl.DataFrame:
    """The verdicts of the panel's seats, each with its seat's weight, aspects, low and high."""
    members = pl.DataFrame(
        [
            (member.judge, member.judge_hash, member.model, member.weight, member.num_aspects, member.low, member.high)
            for member in panel
        ],
        schema={
            "judge": pl.String,
            "judge_hash": pl.String,
            "model": pl.String,
            "weight": pl.Float64,
            "num_aspects": pl.Int64,
            "low": pl.Int64,
            "high": pl.Int64,
        },
        orient="row",
    )
    judge_columns = ("judge", "judge_hash", "model")
    return verdicts.join(members.cast({name: verdicts.schema[name] for name in judge_columns}), on=judge_columns)


def rating_scores(verdicts: pl.DataFrame, panel: Sequence[PanelMember]) -> pl.DataFrame:
    """What each completion was rated: columns key, score (1 to 5, whatever the judge's scale), variance (of
    the score). A seat that did not give every aspect gave no rating."""
    by_aspect = (
        join_panel(verdicts.filter(pl.col("kind") == "rate"), panel)
        .with_columns(rating_scale=4.0 / (pl.col("high") - pl.col("low")))
        .with_columns(
            score=1.0 + (pl.col("score") - pl.col("low")) * pl.col("rating_scale"),
            # A whole-number scale hides the third of a step on either side (Sheppard's correction, 1/12).
            variance=(pl.col("variance") + 1.0 / 12.0) * pl.col("rating_scale") ** 2,
        )
        .group_by("a", "judge", "model", "weight", "num_aspects", "aspect")
        .agg(pl.col("score").mean(), pl.col("variance").mean())
    )
    by_judge = (
        by_aspect.group_by("a", "judge", "model", "weight", "num_aspects")
        .agg(pl.col("score").mean(), variance=pl.col("variance").sum() / pl.len() ** 2, num_rated_aspects=pl.len())
        .filter(pl.col("num_rated_aspects") == pl.col("num_aspects"))
    )
    weight = pl.col("weight")
    return (
        by_judge.group_by("a")
        .agg(
            score=(pl.col("score") * weight).sum() / weight.sum(),
            variance=(pl.col("variance") * weight**2).sum() / weight.sum() ** 2,
        )
        .rename({"a": "key"})
        .sort("key")
    )


def pair_answers(answers: pl.DataFrame, ratings: pl.DataFrame | None = None) -> pl.DataFrame:
    """Every pair of answers to one prompt. Columns: prompt_id, a, b, and with ``ratings`` score_a, score_b, variance_a,
    variance_b, rating_margin (of the higher over the lower score; null where one has no rating)."""
    side = answers.select("prompt_id", "key")
    if ratings is not None:
        side = side.join(ratings, on="key", how="left")
    else:
        side = side.with_columns(score=pl.lit(None, pl.Float64), variance=pl.lit(None, pl.Float64))
    side = side.sort("prompt_id", "key").with_columns(index=pl.int_range(pl.len(), dtype=pl.UInt32))
    pairs = side.join(side, on="prompt_id", suffix="_b").filter(pl.col("index") < pl.col("index_b"))
    return pairs.select(
        "prompt_id",
        pl.col("key").alias("a"),
        pl.col("key_b").alias("b"),
        pl.col("score").alias("score_a"),
        "score_b",
        pl.col("variance").alias("variance_a"),
        "variance_b",
        rating_margin=(pl.col("score") - pl.col("score_b")).abs(),
    )


def rank_candidates(
    answers: pl.DataFrame,
    ratings: pl.DataFrame | None,
    strategy: Strategy,
    *,
    min_rating_margin: float,
    max_candidates: int,
    check_scores: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The pairs worth judging, with ``rank``: the 1st of each prompt is judged first, the 2nd where that is no win.

    rate-then-compare and rate-only: best against worst (of 8 or more: against the one nearest mean - 2 sd), then by
    falling margin; pairs below ``min_rating_margin`` are no candidates, and those of an answer without a rating are
    where they are compared and the prompt has no other. round-robin: every pair, all of rank 1.

    ``check_scores`` (key, check): the share of the prompt's checks that an answer meets. Pairs that differ in it come
    before all others, by the largest difference, then by how far the ratings are on the check's side, and need no
    margin.
    """
    if strategy == "round-robin":
        return pair_answers(answers, ratings).with_columns(rank=pl.lit(1, pl.UInt32)).sort("prompt_id", "a", "b")
    assert ratings is not None
    pairs = add_check_scores(pair_answers(answers, ratings), check_scores)
    check_gap = pl.col("check_a") - pl.col("check_b")
    checks_differ = (check_gap != 0).fill_null(False)
    qualifies = (pl.col("rating_margin") >= min_rating_margin).fill_null(False) | checks_differ
    # A comparison needs no rating, so a failed one does not lose its prompt.
    unrated = pl.col("rating_margin").is_null() & ~qualifies.any().over("prompt_id") & (strategy != "rate-only")
    pairs = pairs.filter(qualifies | unrated)
    scores = (
        answers.select("prompt_id", "key")
        .join(ratings, on="key")
        .group_by("prompt_id")
        .agg(
            has_many_answers=pl.len() >= MANY_ANSWERS,
            best_score=pl.col("score").max(),
            target_score=pl.col("score").mean() - 2.0 * pl.col("score").std(ddof=0),
        )
    )
    lower_score = pl.min_horizontal("score_a", "score_b")
    higher_score = pl.max_horizontal("score_a", "score_b")
    # For many answers: only pairs with the best on one side, by how near the other is to the target.
    distance = (
        pl.when(checks_differ)
        .then(-check_gap.sign() * (pl.col("score_a") - pl.col("score_b")).fill_null(0.0))
        .when("has_many_answers")
        .then((pl.col("best_score") - higher_score) * 100.0 + (lower_score - pl.col("target_score")).abs())
        .otherwise(-pl.col("rating_margin"))
    )
    return (
        pairs.join(scores, on="prompt_id", how="left")
        .with_columns(distance=distance, check_distance=-check_gap.abs().fill_null(0.0))
        .sort("prompt_id", "check_distance", "distance", "a", "b")
        .with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over("prompt_id"))
        .filter(pl.col("rank") <= max_candidates)
        .drop("has_many_answers", "best_score", "target_score", "distance", "check_distance", "check_a", "check_b")
    )


def add_check_scores(pairs: pl.DataFrame, check_scores: pl.DataFrame | None) -> pl.DataFrame:
    """``pairs`` (columns a, b) with check_a and check_b: null where an answer has no check score."""
    if check_scores is None:
        return pairs.with_columns(check_a=pl.lit(None, pl.Float64), check_b=pl.lit(None, pl.Float64))
    return pairs.join(check_scores.select(a="key", check_a="check"), on="a", how="left").join(
        check_scores.select(b="key", check_b="check"), on="b", how="left"
    )
