"""Filter the completions of each prompt, compute their ratings, and rank the pairs to compare.

Results depend on keys, scores and settings only, never on the order of rows: in every pair, ``a`` is the completion
with the smaller key. Frames hold keys and byte offsets, not texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from rlaif.pair import strengths
from rlaif.records import CompletionDropReason

Strategy = Literal["rate-then-compare", "round-robin", "rate-only"]
MANY_ANSWERS = 8
"""With this many answers or more, the rejected one is the one closest to mean - 2 sd: a moderate margin makes a better
pair than the worst of many (Xiao et al. 2025, arXiv:2502.16825)."""
COMPLETE_FINISH_REASONS = ("stop", "stop_sequence", "end_turn", "eos", "eos_token")
"""Finish reasons of a complete answer, in lower case. OpenAI's protocol and vLLM have "stop". The others are what
servers with OpenAI's protocol pass on from their engine: "stop_sequence" and "end_turn" (Anthropic, Bedrock), "eos"
(Together), "eos_token" (Text Generation Inference). Any other reason, also an unknown one, is not a complete answer:
"content_filter" and, of vLLM, "abort", "error" and "repetition"."""
TRUNCATED_FINISH_REASONS = ("length", "max_tokens", "model_length")
"""Finish reasons of an answer at the token limit ("max_tokens": Anthropic; "model_length": Mistral)."""
TOOL_CALL_FINISH_REASONS = ("tool_calls", "function_call", "tool_use")
"""Finish reasons of an answer that calls a tool. Judges and the dataset see the text of an answer only, so such an
answer would be judged and learned without its call."""


@dataclass(frozen=True)
class PanelMember:
    """One panel judge, as the frames refer to it. ``low`` and ``high``: its rating scale."""

    judge: str
    judge_hash: str
    model: str
    weight: float
    num_aspects: int = 0
    low: int = 1
    high: int = 5


def summarize_texts(completions: pl.DataFrame) -> pl.DataFrame:
    """Replace the text of ``completions`` by its length, emptiness and fingerprint.

    The fingerprint ignores line endings and spaces only: a sign, a capital or a comma can be all that makes one answer
    right and the other wrong. Columns: key, prompt_id, model, finish_reason, source, offset, chars, empty, text_hash.
    """
    text = pl.col("text").str.replace_all("\r\n?", "\n").str.replace_all(r"[ \t]+", " ").str.replace_all(" ?\n ?", "\n")
    return completions.select(
        "key",
        "prompt_id",
        "model",
        "finish_reason",
        "source",
        "offset",
        chars=pl.col("text").str.len_chars(),
        empty=pl.col("text").str.strip_chars().str.len_bytes() == 0,
        text_hash=text.str.strip_chars().hash(seed=0),
    )


def drop_unusable(completions: pl.DataFrame) -> tuple[pl.DataFrame, dict[CompletionDropReason, int]]:
    """Return the completions that can be part of a pair, and the number of dropped ones by reason.

    ``completions``: :func:`summarize_texts`. Of answers to one prompt that differ in line endings or spaces only, the
    one with the smallest key is kept.
    """
    reason = pl.col("finish_reason").cast(pl.String).str.to_lowercase()
    marked = completions.with_columns(
        drop_reason=pl.when(reason.is_in(TOOL_CALL_FINISH_REASONS))
        .then(pl.lit("tool_call"))
        .when("empty")
        .then(pl.lit("empty"))
        .when(reason.is_in(TRUNCATED_FINISH_REASONS))
        .then(pl.lit("truncated"))
        .when(~is_complete())
        .then(pl.lit("incomplete"))
    )
    usable = marked.filter(pl.col("drop_reason").is_null()).drop("drop_reason").sort("key")
    distinct = usable.unique(["prompt_id", "text_hash"], keep="first", maintain_order=True)
    dropped: dict[CompletionDropReason, int] = dict(
        marked.filter(pl.col("drop_reason").is_not_null()).group_by("drop_reason").len().sort("drop_reason").iter_rows()
    )
    if usable.height > distinct.height:
        dropped["duplicate"] = usable.height - distinct.height
    return distinct, dropped


def is_complete() -> pl.Expr:
    """Return True for a complete answer (columns finish_reason, source).

    Only an imported answer may have no finish reason, because files of answers have none. A server that sends none does
    not follow the protocol, and its answer may be cut off.
    """
    reason = pl.col("finish_reason").cast(pl.String).str.to_lowercase()
    is_imported = pl.col("source").cast(pl.String).eq_missing("imported")
    return pl.when(reason.is_null()).then(is_imported).otherwise(reason.is_in(COMPLETE_FINISH_REASONS))


def join_panel(verdicts: pl.DataFrame, panel: Sequence[PanelMember]) -> pl.DataFrame:
    """Return the verdicts of the ``panel``, each with its judge's weight, num_aspects, low and high."""
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


def panel_ratings(verdicts: pl.DataFrame, panel: Sequence[PanelMember]) -> pl.DataFrame:
    """Return every rating by the ``panel``, on a scale from 1 to 5.

    Columns: key, judge, model, aspect, sample, weight, num_aspects, score, variance (of the score).
    """
    return (
        join_panel(verdicts.filter(pl.col("kind") == "rate"), panel)
        .with_columns(rating_scale=4.0 / (pl.col("high") - pl.col("low")))
        .select(
            pl.col("a").alias("key"),
            "judge",
            "model",
            "aspect",
            "sample",
            "weight",
            "num_aspects",
            score=1.0 + (pl.col("score") - pl.col("low")) * pl.col("rating_scale"),
            # Rounding to whole numbers hides a variance of 1/12 (Sheppard's correction).
            variance=(pl.col("variance") + 1.0 / 12.0) * pl.col("rating_scale") ** 2,
        )
    )


def pair_answers(answers: pl.DataFrame, ratings: pl.DataFrame | None = None) -> pl.DataFrame:
    """Return every pair of answers to one prompt, with both ratings (``ratings``: :func:`panel_ratings`).

    Columns: prompt_id, a, b, score_a, score_b, variance_a, variance_b, rating_margin (higher minus lower score). The
    scores of a pair are means over the same judges, aspects and samples for both answers: what only one of them has is
    ignored, because a strict judge that is missing on one side would decide the pair. A judge that did not rate every
    aspect of both answers does not count. Without a common judge the scores are null.
    """
    side = answers.select("prompt_id", "key").sort("prompt_id", "key")
    side = side.with_columns(index=pl.int_range(pl.len(), dtype=pl.UInt32))
    pairs = (
        side.join(side, on="prompt_id", suffix="_b", maintain_order="left_right")
        .filter(pl.col("index") < pl.col("index_b"))
        .select("prompt_id", a="key", b="key_b")
    )
    if ratings is None:
        columns = ("score_a", "score_b", "variance_a", "variance_b")
        pairs = pairs.with_columns(pl.lit(None, pl.Float64).alias(name) for name in columns)
    else:
        scores = _pair_scores(side.select("prompt_id", "key"), ratings)
        pairs = pairs.join(scores, on=["a", "b"], how="left", maintain_order="left")
    return pairs.with_columns(rating_margin=(pl.col("score_a") - pl.col("score_b")).abs())


def _pair_scores(answers: pl.DataFrame, ratings: pl.DataFrame) -> pl.DataFrame:
    """Return the scores of pairs of ``answers`` (prompt_id, key) that have a judge in common.

    Columns: a, b, score_a, score_b, variance_a, variance_b.
    """
    rows = answers.join(ratings, on="key", maintain_order="left_right")
    other = rows.select("prompt_id", "judge", "model", "aspect", "sample", "key", "score", "variance")
    judge = ["a", "b", "judge", "model", "weight", "num_aspects"]
    score_a, score_b, variance_a, variance_b = map(pl.col, ("score_a", "score_b", "variance_a", "variance_b"))
    by_aspect = (
        rows.join(
            other, on=["prompt_id", "judge", "model", "aspect", "sample"], suffix="_b", maintain_order="left_right"
        )
        .filter(pl.col("key") < pl.col("key_b"))
        .rename({"key": "a", "key_b": "b", "score": "score_a", "variance": "variance_a"})
        .group_by(*judge, "aspect", maintain_order=True)
        .agg(score_a.mean(), score_b.mean(), variance_a.mean(), variance_b.mean())
    )
    by_judge = (
        by_aspect.group_by(judge, maintain_order=True)
        .agg(
            score_a.mean(),
            score_b.mean(),
            variance_a.sum() / pl.len() ** 2,
            variance_b.sum() / pl.len() ** 2,
            num_rated_aspects=pl.len(),
        )
        .filter(pl.col("num_rated_aspects") == pl.col("num_aspects"))
    )
    weight = pl.col("weight")
    return by_judge.group_by("a", "b", maintain_order=True).agg(
        *((score * weight).sum() / weight.sum() for score in (score_a, score_b)),
        *((variance * weight**2).sum() / weight.sum() ** 2 for variance in (variance_a, variance_b)),
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
    """Return the pairs to judge, with ``rank``: a pair is judged if those of lower rank of its prompt gave no win.

    round-robin: every pair, all of rank 1. rate-then-compare and rate-only: best against worst (of 8 or more answers:
    against the one closest to mean - 2 sd), then by decreasing margin. Pairs below ``min_rating_margin`` are not
    candidates. Pairs with an unrated answer are candidates only for rate-then-compare, if the prompt has no other.

    ``check_scores`` (key, check): share of the prompt's checks that an answer meets. Pairs that differ in it come first
    and need no margin. They are ordered by decreasing difference, then by the rating margin in favor of the answer that
    meets more checks.
    """
    if strategy == "round-robin":
        return pair_answers(answers, ratings).with_columns(rank=pl.lit(1, pl.UInt32)).sort("prompt_id", "a", "b")
    assert ratings is not None
    pairs = add_check_scores(pair_answers(answers, ratings), check_scores)
    check_gap = pl.col("check_a") - pl.col("check_b")
    checks_differ = (check_gap != 0).fill_null(False)
    qualifies = (pl.col("rating_margin") >= min_rating_margin).fill_null(False) | checks_differ
    # A comparison needs no rating, so a failed rating does not drop the prompt.
    unrated = pl.col("rating_margin").is_null() & ~qualifies.any().over("prompt_id") & (strategy != "rate-only")
    scores = strengths.scores_from_margins(pairs)
    prompts = scores.group_by("prompt_id").agg(
        has_many_answers=pl.len() >= MANY_ANSWERS,
        best_score=pl.col("score").max(),
        target_score=pl.col("score").mean() - 2.0 * pl.col("score").std(ddof=0),
    )
    pairs = pairs.filter(qualifies | unrated)
    for side in ("a", "b"):
        relative = scores.select("prompt_id", pl.col("key").alias(side), pl.col("score").alias(f"relative_{side}"))
        pairs = pairs.join(relative, on=["prompt_id", side], how="left", maintain_order="left")
    lower_score = pl.min_horizontal("relative_a", "relative_b")
    higher_score = pl.max_horizontal("relative_a", "relative_b")
    # With many answers: only pairs that include the best one, by the other's distance from the target.
    distance = (
        pl.when(checks_differ)
        .then(-check_gap.sign() * (pl.col("score_a") - pl.col("score_b")).fill_null(0.0))
        .when("has_many_answers")
        .then(((pl.col("best_score") - higher_score) * 100.0 + (lower_score - pl.col("target_score")).abs()).round(9))
        .otherwise(-pl.col("rating_margin"))
    )
    return (
        pairs.join(prompts, on="prompt_id", how="left")
        .with_columns(distance=distance, check_distance=-check_gap.abs().fill_null(0.0))
        .sort("prompt_id", "check_distance", "distance", "a", "b")
        .with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over("prompt_id"))
        .filter(pl.col("rank") <= max_candidates)
        .drop("has_many_answers", "best_score", "target_score", "relative_a", "relative_b")
        .drop("distance", "check_distance", "check_a", "check_b")
    )


def add_check_scores(pairs: pl.DataFrame, check_scores: pl.DataFrame | None) -> pl.DataFrame:
    """Add check_a and check_b to ``pairs`` (columns a, b); null if an answer has no check score."""
    if check_scores is None:
        return pairs.with_columns(check_a=pl.lit(None, pl.Float64), check_b=pl.lit(None, pl.Float64))
    return pairs.join(check_scores.select(a="key", check_a="check"), on="a", how="left").join(
        check_scores.select(b="key", check_b="check"), on="b", how="left"
    )
