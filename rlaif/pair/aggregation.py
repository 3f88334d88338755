"""Aggregate verdicts into one outcome per candidate pair, and choose the pairs to keep.

A pair's probability is the weighted mean over the panel judges of each judge's mean over both orders. A judge without a
readable verdict in both orders does not count, nor does a sample that lacks one of them. Probabilities are averaged,
not put to a majority vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from rlaif.pair import strengths
from rlaif.pair.candidates import PanelMember, Strategy, add_check_scores, join_panel


def votes_by_judge(
    verdicts: pl.DataFrame, panel: Sequence[PanelMember], pairs: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Return one row per pair and panel judge.

    Columns: a, b, panel_judge ("judge@model"), weight, p_ab and p_ba (probability that ``a`` is better, if shown first
    and if shown second), flags. Reward models vote on the pairs in ``pairs`` (columns a, b), or, without them, on all
    pairs of answers to one prompt.
    """
    votes = join_panel(verdicts.filter(pl.col("kind").is_in(["compare", "reward"])), panel)
    votes = votes.with_columns(panel_judge=pl.format("{}@{}", "judge", "model"))
    return pl.concat([_comparison_votes(votes), _reward_votes(votes, pairs)]).sort("a", "b", "panel_judge")


def _comparison_votes(votes: pl.DataFrame) -> pl.DataFrame:
    """Return the votes of comparing judges: the mean over the samples that have a verdict in both orders."""
    judge = ("a", "b", "panel_judge", "weight")
    flags = pl.col("flags").list.explode(keep_nulls=False, empty_as_null=False).unique().sort()
    return (
        votes.filter(pl.col("kind") == "compare")
        .group_by(*judge, "sample", maintain_order=True)
        .agg(
            p_ab=pl.col("prob_a").filter(pl.col("order") == "ab").mean(),
            p_ba=pl.col("prob_a").filter(pl.col("order") == "ba").mean(),
            flags=flags,
        )
        .filter(pl.col("p_ab").is_not_null() & pl.col("p_ba").is_not_null())
        .sort(*judge, "sample")
        .group_by(*judge, maintain_order=True)
        .agg(pl.col("p_ab").mean(), pl.col("p_ba").mean(), flags)
    )


def _reward_votes(votes: pl.DataFrame, pairs: pl.DataFrame | None) -> pl.DataFrame:
    """Return the votes of reward models.

    A reward model sees one answer at a time, so its probability is the same in both orders: the sigmoid of the
    difference of the scores (Bradley and Terry 1952).
    """
    reward_scores = votes.filter(pl.col("kind") == "reward").select(
        "prompt_id", "panel_judge", "weight", "score", "flags", key="a"
    )
    if pairs is None:
        pairs = reward_scores.join(reward_scores, on=["prompt_id", "panel_judge"], suffix="_b").filter(
            pl.col("key") < pl.col("key_b")
        )
        pairs = pairs.select(a="key", b="key_b").unique()
    return (
        pairs.select("a", "b")
        .join(reward_scores.rename({"key": "a"}), on="a")
        .join(reward_scores.select("panel_judge", "score", "flags", b="key"), on=["b", "panel_judge"], suffix="_b")
        .with_columns(p_ab=1.0 / (1.0 + (pl.col("score_b") - pl.col("score")).exp()))
        .select("a", "b", "panel_judge", "weight", "p_ab", p_ba="p_ab", flags=_merge_flags())
    )


def _merge_flags() -> pl.Expr:
    """Merge a reward model's flags of two answers into flags of the pair, each with the answer's side."""
    flags_a, flags_b = (
        pl.col(flags).list.eval(pl.format(f"{side}_{{}}", pl.element()))
        for side, flags in (("a", "flags"), ("b", "flags_b"))
    )
    return flags_a.list.concat(flags_b)


def check_scores(verdicts: pl.DataFrame) -> pl.DataFrame:
    """Return the share of its prompt's checks that each answer meets. Columns: key, check.

    An answer has one verdict by the present version of its prompt's checks. Of several, the lowest counts.
    """
    checked = (
        verdicts.filter(pl.col("kind") == "check").sort("a", "score").unique("a", keep="first", maintain_order=True)
    )
    return checked.select(key="a", check="score")


def aggregate_votes(
    verdicts: pl.DataFrame, panel: Sequence[PanelMember], pairs: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Aggregate the votes on each pair (``pairs`` as for :func:`votes_by_judge`).

    Columns: a, b, p_ab and p_ba (probability that ``a`` is better, if shown first and if shown second), flags,
    decided_by. ``decided_by`` is "panel" for the weighted mean over the panel judges, and "check" if one answer meets
    more of the prompt's checks than the other, which overrides every model.
    """
    judge_votes = votes_by_judge(verdicts, panel, pairs)
    weight = pl.col("weight")
    panel_votes = judge_votes.group_by("a", "b", maintain_order=True).agg(
        p_ab=(pl.col("p_ab") * weight).sum() / weight.sum(),
        p_ba=(pl.col("p_ba") * weight).sum() / weight.sum(),
        flags=pl.col("flags").list.explode(keep_nulls=False, empty_as_null=False).unique().sort(),
    )
    checks = check_scores(verdicts)
    requested = panel_votes.select("a", "b") if pairs is None else pairs.select("a", "b")
    check_decisions = (
        add_check_scores(requested, checks)
        .filter(pl.col("check_a") != pl.col("check_b"))
        .select("a", "b", check_winner=(pl.col("check_a") > pl.col("check_b")).cast(pl.Float64))
    )
    check_winner = pl.col("check_winner")
    return panel_votes.join(check_decisions, on=["a", "b"], how="full", coalesce=True).select(
        "a",
        "b",
        p_ab=check_winner.fill_null(pl.col("p_ab")),
        p_ba=check_winner.fill_null(pl.col("p_ba")),
        flags=pl.col("flags").fill_null([]),
        decided_by=pl.when(check_winner.is_not_null()).then(pl.lit("check")).otherwise(pl.lit("panel")),
    )


def decide_outcomes(
    candidates: pl.DataFrame,
    votes: pl.DataFrame,
    strategy: Strategy,
    *,
    min_confidence: float,
    max_per_prompt: int,
    min_chosen_rating: float = 0.0,
) -> pl.DataFrame:
    """Add prob_a, likelier, preferred, outcome, flags, kept, drop_reason (null if kept) and rescuable.

    Outcomes: "win" if one side has a probability of at least ``min_confidence``; otherwise "inconsistent" if the two
    orders contradict each other, else "tie"; "unparsable" without a verdict. A winner rated below ``min_chosen_rating``
    is not kept, because it is not an example to learn from. Only a limited share of the judged prompts may lose their
    pair to near ties alone: :func:`prompts_lost_to_ties`, :func:`count_judged_prompts` and :func:`most_confident_ties`
    select the near ties that :func:`keep_ties` keeps. ``likelier``: the side with the higher probability, or null;
    ``rescuable``: a near tie that would have been kept if it were a win for that side.
    """
    pairs = candidates.join(votes, on=["a", "b"], how="left")
    if strategy == "rate-only":
        pairs = pairs.with_columns(
            p_ab=pl.col("p_ab").fill_null(_prob_from_ratings()),
            p_ba=pl.col("p_ba").fill_null(_prob_from_ratings()),
            flags=pl.col("flags").fill_null([]),
            decided_by=pl.col("decided_by").fill_null("panel"),
        )
    pairs = _add_outcomes(pairs, min_confidence)
    return _select_kept(_rank_strength(pairs, strategy), max_per_prompt, min_chosen_rating)


def _add_outcomes(pairs: pl.DataFrame, min_confidence: float) -> pl.DataFrame:
    """Add prob_a, outcome, likelier and preferred to ``pairs`` with p_ab and p_ba."""
    # Rounded, so that a pair at the threshold is a win no matter which answer is called a.
    confidence = pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")).round(9)
    pairs = pairs.with_columns(prob_a=(pl.col("p_ab") + pl.col("p_ba")) / 2.0).with_columns(
        outcome=pl.when(pl.col("prob_a").is_null())
        .then(pl.lit("unparsable"))
        .when((confidence >= min_confidence) & (pl.col("prob_a") != 0.5))
        .then(pl.lit("win"))
        .when((pl.col("p_ab") - 0.5) * (pl.col("p_ba") - 0.5) < 0)
        .then(pl.lit("inconsistent"))
        .otherwise(pl.lit("tie"))
    )
    likelier = pl.when(pl.col("prob_a") > 0.5).then(pl.lit("a")).when(pl.col("prob_a") < 0.5).then(pl.lit("b"))
    return pairs.with_columns(likelier=likelier).with_columns(
        preferred=pl.when(pl.col("outcome") == "win").then("likelier")
    )


def count_judged_prompts(pairs: pl.DataFrame) -> int:
    """Count the prompts that have a judged pair."""
    return pairs.filter(pl.col("prob_a").is_not_null())["prompt_id"].n_unique()


def prompts_lost_to_ties(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the most confident near tie of each prompt that lost its pair to near ties alone.

    A near tie that would be dropped as a win too, such as one whose likelier winner is rated too low, is not lost.
    Columns: a, b, confidence.
    """
    judged = pairs.filter(pl.col("prob_a").is_not_null())
    ties = judged.filter(~pl.col("kept").any().over("prompt_id"), "rescuable")
    return (
        ties.with_columns(confidence=pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")).round(9))
        .sort("confidence", "a", "b", descending=[True, False, False])
        .unique("prompt_id", keep="first", maintain_order=True)
        .select("a", "b", "confidence")
    )


def most_confident_ties(ties: pl.DataFrame, num_judged: int, max_tie_drop_fraction: float) -> pl.DataFrame:
    """Return the near ties to keep: those beyond the share of judged prompts that may be lost. Columns: a, b.

    ``ties``: :func:`prompts_lost_to_ties`. ``num_judged``: :func:`count_judged_prompts`.
    """
    surplus = max(0, ties.height - int(max_tie_drop_fraction * num_judged + 1e-9))
    return ties.sort("confidence", "a", "b", descending=[True, False, False]).head(surplus).select("a", "b")


def keep_ties(pairs: pl.DataFrame, ties: pl.DataFrame) -> pl.DataFrame:
    """Keep the near ties in ``ties`` (columns a, b).

    ``preferred`` stays null if both answers are equally likely to be better: annotators decide.
    """
    marked = ties.with_columns(rescued=pl.lit(True))
    joined = pairs.join(marked, on=["a", "b"], how="left", maintain_order="left")
    is_win = pl.col("rescued").is_not_null() & (pl.col("prob_a") != 0.5)
    return joined.with_columns(
        kept=pl.col("kept") | pl.col("rescued").is_not_null(),
        drop_reason=pl.when(pl.col("rescued").is_null()).then("drop_reason"),
        outcome=pl.when(is_win).then(pl.lit("win")).otherwise("outcome"),
        preferred=pl.when(is_win)
        .then(pl.when(pl.col("prob_a") > 0.5).then(pl.lit("a")).otherwise(pl.lit("b")))
        .otherwise("preferred"),
    ).drop("rescued")


def _prob_from_ratings() -> pl.Expr:
    """Return P(score of a > score of b) for normal scores, with the logistic approximation of Bowling et al. (2009)."""
    z = (pl.col("score_a") - pl.col("score_b")) / (pl.col("variance_a") + pl.col("variance_b")).sqrt()
    return 1.0 / (1.0 + (-1.702 * z).exp())


def _rank_strength(pairs: pl.DataFrame, strategy: Strategy) -> pl.DataFrame:
    """Add ``rank_gap``, which orders the pairs of a prompt, and ``agrees_with_ranking``.

    ``agrees_with_ranking``: the winner is also the stronger answer overall. The strategies with ratings take the
    strength from the ratings. Round-robin takes it from :func:`rlaif.pair.strengths.mean_wins`.
    """
    if strategy != "round-robin":
        sign = pl.when(pl.col("likelier") == "b").then(-1.0).otherwise(1.0)
        rating_agrees = ((pl.col("score_a") - pl.col("score_b")) * sign >= 0).fill_null(True)
        return pairs.with_columns(
            rank_gap=-pl.col("rank").cast(pl.Float64),
            agrees_with_ranking=rating_agrees | (pl.col("decided_by") == "check").fill_null(False),
        )
    return _rank_round_robin(pairs)


def _rank_round_robin(pairs: pl.DataFrame) -> pl.DataFrame:
    judged = pairs.filter(pl.col("prob_a").is_not_null())
    wins = strengths.mean_wins(judged)
    joined = pairs.join(wins.rename({"key": "a", "strength": "strength_a"}), on=["prompt_id", "a"], how="left").join(
        wins.rename({"key": "b", "strength": "strength_b"}), on=["prompt_id", "b"], how="left"
    )
    sign = pl.when(pl.col("likelier") == "b").then(-1.0).otherwise(1.0)
    rank_gap = ((pl.col("strength_a") - pl.col("strength_b")) * sign).round(9)
    return joined.with_columns(
        rank_gap=rank_gap,
        agrees_with_ranking=(rank_gap >= 0).fill_null(False) | (pl.col("decided_by") == "check").fill_null(False),
    ).drop("strength_a", "strength_b")


def _select_kept(pairs: pl.DataFrame, max_per_prompt: int, min_chosen_rating: float) -> pl.DataFrame:
    """Keep up to ``max_per_prompt`` wins of each prompt, by decreasing gap, then by key."""
    winner_rating = (
        pl.when(pl.col("likelier") == "a")
        .then("score_a")
        .when(pl.col("likelier") == "b")
        .then("score_b")
        .otherwise(pl.max_horizontal("score_a", "score_b"))  # annotators decide
    )
    decided_by_check = (pl.col("decided_by") == "check").fill_null(False)  # a check overrides ratings
    rating_ok = (winner_rating >= min_chosen_rating).fill_null(True) | decided_by_check
    ordered = pairs.with_columns(
        eligible=(pl.col("outcome") == "win") & pl.col("agrees_with_ranking") & rating_ok
    ).sort(
        ["prompt_id", "eligible", "rank_gap", "a", "b"], descending=[False, True, True, False, False], nulls_last=True
    )
    position = pl.int_range(pl.len()).over("prompt_id")
    ordered = ordered.with_columns(kept=pl.col("eligible") & (position < max_per_prompt))
    drop_reason = (
        pl.when("kept")
        .then(pl.lit(None, pl.String))
        .when(pl.col("outcome").is_in(["unparsable", "inconsistent"]))
        .then("outcome")
        .when(pl.col("outcome") == "tie")
        .then(pl.lit("near_tie"))
        .when(~rating_ok)
        .then(pl.lit("low_rating"))
        .when(~pl.col("agrees_with_ranking"))
        .then(pl.lit("contradicts_comparisons"))
        .otherwise(pl.lit("another_pair_kept"))
    )
    agrees = pl.col("agrees_with_ranking") | pl.col("likelier").is_null()
    rescuable = pl.col("outcome").is_in(["tie", "inconsistent"]) & agrees & rating_ok
    return (
        ordered.with_columns(drop_reason=drop_reason, rescuable=rescuable)
        .drop("eligible", "agrees_with_ranking", "rank_gap")
        .sort("prompt_id", "rank", "a", "b")
    )
