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
MANY = 8
"""From this many answers on, the rejected one is the one nearest to mean - 2 sd: a moderate margin makes a better
pair than the very worst of many (Xiao et al. 2025, arXiv:2502.16825)."""


@dataclass(frozen=True)
class Judged:
    """One seat of the panel as the frames know it."""

    judge: str
    judge_hash: str
    model: str
    weight: float
    aspects: int = 0
    low: int = 1
    high: int = 5


def shorten(completions: pl.DataFrame) -> pl.DataFrame:
    """A block of completions with its text replaced by what is needed of it: length, emptiness, and a fingerprint
    that ignores line ends and spaces. No more than those: a sign, a capital or a comma can be all that makes one
    answer right and the other wrong. Columns: key, prompt_id, model, finish_reason, offset, chars, empty, same."""
    text = pl.col("text").str.replace_all("\r\n?", "\n").str.replace_all(r"[ \t]+", " ").str.replace_all(" ?\n ?", "\n")
    return completions.select(
        "key",
        "prompt_id",
        "model",
        "finish_reason",
        "offset",
        chars=pl.col("text").str.len_chars(),
        empty=pl.col("text").str.strip_chars().str.len_bytes() == 0,
        same=text.str.strip_chars().hash(seed=0),
    )


def usable(completions: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The completions (as :func:`shorten` gives them) that may stand in a pair, and how many do not and why.

    Of answers to one prompt that differ in line ends or spaces only, the one with the smallest key stays.
    """
    truncated = (pl.col("finish_reason") == "length").fill_null(False)
    counted = completions.with_columns(
        why=pl.when("empty").then(pl.lit("empty")).when(truncated).then(pl.lit("truncated"))
    )
    good = counted.filter(pl.col("why").is_null()).drop("why").sort("key")
    distinct = good.unique(["prompt_id", "same"], keep="first", maintain_order=True)
    left_out = dict(counted.filter(pl.col("why").is_not_null()).group_by("why").len().sort("why").iter_rows())
    if good.height > distinct.height:
        left_out["duplicate"] = good.height - distinct.height
    return distinct, left_out


def of_panel(verdicts: pl.DataFrame, panel: Sequence[Judged]) -> pl.DataFrame:
    """The verdicts of the panel's seats, each with its seat's weight, aspects, low and high."""
    seats = pl.DataFrame(
        [(s.judge, s.judge_hash, s.model, s.weight, s.aspects, s.low, s.high) for s in panel],
        schema={
            "judge": pl.String,
            "judge_hash": pl.String,
            "model": pl.String,
            "weight": pl.Float64,
            "aspects": pl.Int64,
            "low": pl.Int64,
            "high": pl.Int64,
        },
        orient="row",
    )
    seat = ("judge", "judge_hash", "model")
    return verdicts.join(seats.cast({name: verdicts.schema[name] for name in seat}), on=seat)


def ratings(verdicts: pl.DataFrame, panel: Sequence[Judged]) -> pl.DataFrame:
    """What each completion was rated: columns key, score (1 to 5, whatever the judge's scale), spread (variance of
    the score). A seat that did not give every aspect gave no rating."""
    by_aspect = (
        of_panel(verdicts.filter(pl.col("kind") == "rate"), panel)
        .with_columns(unit=4.0 / (pl.col("high") - pl.col("low")))
        .with_columns(
            score=1.0 + (pl.col("score") - pl.col("low")) * pl.col("unit"),
            # A whole-number scale hides the third of a step on either side (Sheppard's correction, 1/12).
            variance=(pl.col("variance") + 1.0 / 12.0) * pl.col("unit") ** 2,
        )
        .group_by("a", "judge", "model", "weight", "aspects", "aspect")
        .agg(pl.col("score").mean(), pl.col("variance").mean())
    )
    by_seat = (
        by_aspect.group_by("a", "judge", "model", "weight", "aspects")
        .agg(pl.col("score").mean(), variance=pl.col("variance").sum() / pl.len() ** 2, given=pl.len())
        .filter(pl.col("given") == pl.col("aspects"))
    )
    weight = pl.col("weight")
    return (
        by_seat.group_by("a")
        .agg(
            score=(pl.col("score") * weight).sum() / weight.sum(),
            spread=(pl.col("variance") * weight**2).sum() / weight.sum() ** 2,
        )
        .rename({"a": "key"})
        .sort("key")
    )


def all_pairs(answers: pl.DataFrame, rated: pl.DataFrame | None = None) -> pl.DataFrame:
    """Every pair of answers to one prompt. Columns: prompt_id, a, b, and with ``rated`` score_a, score_b, spread_a,
    spread_b, margin (of the higher over the lower score; null where one has no rating)."""
    side = answers.select("prompt_id", "key")
    if rated is not None:
        side = side.join(rated, on="key", how="left")
    else:
        side = side.with_columns(score=pl.lit(None, pl.Float64), spread=pl.lit(None, pl.Float64))
    side = side.sort("prompt_id", "key").with_columns(place=pl.int_range(pl.len(), dtype=pl.UInt32))
    pairs = side.join(side, on="prompt_id", suffix="_b").filter(pl.col("place") < pl.col("place_b"))
    return pairs.select(
        "prompt_id",
        pl.col("key").alias("a"),
        pl.col("key_b").alias("b"),
        pl.col("score").alias("score_a"),
        "score_b",
        pl.col("spread").alias("spread_a"),
        "spread_b",
        margin=(pl.col("score") - pl.col("score_b")).abs(),
    )


def candidates(
    answers: pl.DataFrame,
    rated: pl.DataFrame | None,
    strategy: Strategy,
    *,
    min_margin: float,
    tries: int,
    checked: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The pairs worth judging, with ``rank``: the 1st of each prompt is judged first, the 2nd where that is no win.

    rate-then-compare and rate-only: best against worst (of 8 or more: against the one nearest mean - 2 sd), then by
    falling margin; pairs below ``min_margin`` are no candidates, and those of an answer without a rating are where they
    are compared and the prompt has no other. round-robin: every pair, all of rank 1.

    ``checked`` (key, check): the share of the prompt's checks that an answer meets. Pairs that differ in it come before
    all others, by the largest difference, then by how far the ratings are on the check's side, and need no margin.
    """
    if strategy == "round-robin":
        return all_pairs(answers, rated).with_columns(rank=pl.lit(1, pl.UInt32)).sort("prompt_id", "a", "b")
    assert rated is not None
    pairs = with_checks(all_pairs(answers, rated), checked)
    gap = pl.col("check_a") - pl.col("check_b")
    differ = (gap != 0).fill_null(False)
    enough = (pl.col("margin") >= min_margin).fill_null(False) | differ
    # A comparison needs no rating, so a failed one does not lose its prompt.
    unknown = pl.col("margin").is_null() & ~enough.any().over("prompt_id") & (strategy != "rate-only")
    pairs = pairs.filter(enough | unknown)
    scores = (
        answers.select("prompt_id", "key")
        .join(rated, on="key")
        .group_by("prompt_id")
        .agg(
            many=pl.len() >= MANY,
            best=pl.col("score").max(),
            target=pl.col("score").mean() - 2.0 * pl.col("score").std(ddof=0),
        )
    )
    low = pl.min_horizontal("score_a", "score_b")
    high = pl.max_horizontal("score_a", "score_b")
    # For many answers: only pairs with the best on one side, by how near the other is to the target.
    distance = (
        pl.when(differ)
        .then(-gap.sign() * (pl.col("score_a") - pl.col("score_b")).fill_null(0.0))
        .when("many")
        .then((pl.col("best") - high) * 100.0 + (low - pl.col("target")).abs())
        .otherwise(-pl.col("margin"))
    )
    return (
        pairs.join(scores, on="prompt_id", how="left")
        .with_columns(distance=distance, apart=-gap.abs().fill_null(0.0))
        .sort("prompt_id", "apart", "distance", "a", "b")
        .with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over("prompt_id"))
        .filter(pl.col("rank") <= tries)
        .drop("many", "best", "target", "distance", "apart", "check_a", "check_b")
    )


def with_checks(pairs: pl.DataFrame, checked: pl.DataFrame | None) -> pl.DataFrame:
    """``pairs`` (columns a, b) with check_a and check_b: null where an answer has no check score."""
    if checked is None:
        return pairs.with_columns(check_a=pl.lit(None, pl.Float64), check_b=pl.lit(None, pl.Float64))
    return pairs.join(checked.select(a="key", check_a="check"), on="a", how="left").join(
        checked.select(b="key", check_b="check"), on="b", how="left"
    )
