"""From verdicts on candidates to an outcome for each, and which are kept.

A pair's probability is the weighted mean over the panel of each seat's mean over both orders; a seat that did not
give a readable verdict in both orders gives none. Probabilities are averaged, verdicts are never voted on.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from rlaif.pair.candidates import PanelMember, Strategy, add_check_scores, join_panel


def votes_by_judge(
    verdicts: pl.DataFrame, panel: Sequence[PanelMember], pairs: pl.DataFrame | None = None
) -> pl.DataFrame:
    """What each seat of the panel said of each pair. Columns: a, b, panel_judge ("judge@model"), weight, p_ab and p_ba
    (probability that ``a`` is better, when shown first and when shown second), flags.

    A reward model sees one answer at a time, so its probability is the same in both orders: sigmoid of the scores'
    difference (Bradley and Terry 1952). It is given for the pairs in ``pairs`` (columns a, b), or, without them, for
    all pairs of answers to one prompt.
    """
    votes = join_panel(verdicts.filter(pl.col("kind").is_in(["compare", "reward"])), panel)
    votes = votes.with_columns(panel_judge=pl.format("{}@{}", "judge", "model"))
    compared = (
        votes.filter(pl.col("kind") == "compare")
        .group_by("a", "b", "panel_judge", "weight")
        .agg(
            p_ab=pl.col("prob_a").filter(pl.col("order") == "ab").mean(),
            p_ba=pl.col("prob_a").filter(pl.col("order") == "ba").mean(),
            flags=pl.col("flags").list.explode(keep_nulls=False, empty_as_null=False).unique().sort(),
        )
        .filter(pl.col("p_ab").is_not_null() & pl.col("p_ba").is_not_null())
    )
    reward_scores = votes.filter(pl.col("kind") == "reward").select(
        "prompt_id", "panel_judge", "weight", "score", "flags", key="a"
    )
    if pairs is None:
        pairs = reward_scores.join(reward_scores, on=["prompt_id", "panel_judge"], suffix="_b").filter(
            pl.col("key") < pl.col("key_b")
        )
        pairs = pairs.select(a="key", b="key_b").unique()
    reward_votes = (
        pairs.select("a", "b")
        .join(reward_scores.rename({"key": "a"}), on="a")
        .join(reward_scores.select("panel_judge", "score", "flags", b="key"), on=["b", "panel_judge"], suffix="_b")
        .with_columns(p_ab=1.0 / (1.0 + (pl.col("score_b") - pl.col("score")).exp()))
        .select("a", "b", "panel_judge", "weight", "p_ab", p_ba="p_ab", flags=_merge_flags())
    )
    return pl.concat([compared, reward_votes]).sort("a", "b", "panel_judge")


def _merge_flags() -> pl.Expr:
    """A reward model's flags are told of one answer each; of a pair they say which one."""
    flags_a, flags_b = (
        pl.col(flags).list.eval(pl.format(f"{side} {{}}", pl.element()))
        for side, flags in (("a", "flags"), ("b", "flags_b"))
    )
    return flags_a.list.concat(flags_b)


def check_scores(verdicts: pl.DataFrame) -> pl.DataFrame:
    """The share of its prompt's checks that each answer meets, by the newest run of the checks. Columns: key, check."""
    latest = verdicts.filter(pl.col("kind") == "check").unique("a", keep="last", maintain_order=True)
    return latest.select(key="a", check="score")


def aggregate_votes(
    verdicts: pl.DataFrame, panel: Sequence[PanelMember], pairs: pl.DataFrame | None = None
) -> pl.DataFrame:
    """What is known of each pair (``pairs`` as for :func:`votes_by_judge`). Columns: a, b, p_ab and p_ba (probability
    that
    ``a`` is better, when shown first and when shown second), flags, decided_by ("panel": the weighted mean over the
    seats; "check": one answer meets more of the prompt's checks than the other, which outranks every model).
    """
    judge_votes = votes_by_judge(verdicts, panel, pairs)
    weight = pl.col("weight")
    panel_votes = judge_votes.group_by("a", "b").agg(
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
    """``candidates`` with prob_a, preferred, outcome, flags, kept and drop_reason (the reason, where it is not kept).

    win: p at least ``min_confidence`` for one side; inconsistent: less, and the orders contradict each other; tie:
    less, and they do not; unparsable: no verdict. A winner that was rated below ``min_chosen_rating`` is no example to
    learn from, whatever it was compared with. Of the prompts that could be judged, at most a share may be left without
    a pair for near-ties alone: :func:`prompts_lost_to_ties`, :func:`count_judged_prompts` and
    :func:`most_confident_ties` select those that :func:`keep_ties` keeps.
    """
    pairs = candidates.join(votes, on=["a", "b"], how="left")
    if strategy == "rate-only":
        pairs = pairs.with_columns(
            p_ab=pl.col("p_ab").fill_null(_prob_from_ratings()),
            p_ba=pl.col("p_ba").fill_null(_prob_from_ratings()),
            flags=pl.col("flags").fill_null([]),
            decided_by=pl.col("decided_by").fill_null("panel"),
        )
    # Rounded, so that a pair at the threshold is a win whichever of its answers is called a.
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
    pairs = pairs.with_columns(
        preferred=pl.when(pl.col("outcome") == "win").then(
            pl.when(pl.col("prob_a") > 0.5).then(pl.lit("a")).otherwise(pl.lit("b"))
        )
    )
    return _select_kept(_rank_strength(pairs, strategy), max_per_prompt, min_confidence, min_chosen_rating)


def count_judged_prompts(pairs: pl.DataFrame) -> int:
    """How many prompts have a pair that could be judged."""
    return pairs.filter(pl.col("prob_a").is_not_null())["prompt_id"].n_unique()


def prompts_lost_to_ties(pairs: pl.DataFrame) -> pl.DataFrame:
    """The surest near-tie of each prompt that lost its pair for near-ties alone. Columns: a, b, confidence."""
    judged = pairs.filter(pl.col("prob_a").is_not_null())
    ties = judged.filter(~pl.col("kept").any().over("prompt_id"), pl.col("outcome").is_in(["tie", "inconsistent"]))
    return (
        ties.with_columns(confidence=pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")).round(9))
        .sort("confidence", "a", "b", descending=[True, False, False])
        .unique("prompt_id", keep="first", maintain_order=True)
        .select("a", "b", "confidence")
    )


def most_confident_ties(ties: pl.DataFrame, num_judged: int, max_tie_drop_fraction: float) -> pl.DataFrame:
    """Those of :func:`prompts_lost_to_ties` beyond the share ``max_tie_drop_fraction`` of the prompts
    :func:`count_judged_prompts`. Columns: a, b."""
    surplus = max(0, ties.height - int(max_tie_drop_fraction * num_judged + 1e-9))
    return ties.sort("confidence", "a", "b", descending=[True, False, False]).head(surplus).select("a", "b")


def keep_ties(pairs: pl.DataFrame, ties: pl.DataFrame) -> pl.DataFrame:
    """Keeps the pairs in ``ties`` (columns a, b) all the same. Which of two equal answers is ``preferred`` stays open
    (null): that is for people."""
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
    """P(score of a > score of b) for two normal scores; the logistic stands for the normal (Bowling et al. 2009)."""
    z = (pl.col("score_a") - pl.col("score_b")) / (pl.col("variance_a") + pl.col("variance_b")).sqrt()
    return 1.0 / (1.0 + (-1.702 * z).exp())


def _rank_strength(pairs: pl.DataFrame, strategy: Strategy) -> pl.DataFrame:
    """Adds ``rank_gap``, by which the pairs of a prompt are preferred, and ``agrees_with_ranking``: whether the pair's
    winner is also the stronger answer over all. For the rated strategies the rank says it; for round-robin
    Bradley-Terry, whose order in a complete round robin is the order of mean wins (Ford 1957)."""
    if strategy != "round-robin":
        sign = pl.when(pl.col("preferred") == "b").then(-1.0).otherwise(1.0)
        rating_agrees = ((pl.col("score_a") - pl.col("score_b")) * sign >= 0).fill_null(True)
        return pairs.with_columns(
            rank_gap=-pl.col("rank").cast(pl.Float64),
            agrees_with_ranking=rating_agrees | (pl.col("decided_by") == "check").fill_null(False),
        )
    judged = pairs.filter(pl.col("prob_a").is_not_null())
    wins = (
        pl.concat(
            [
                judged.select("prompt_id", key="a", p=pl.col("prob_a")),
                judged.select("prompt_id", key="b", p=1.0 - pl.col("prob_a")),
            ]
        )
        .group_by("prompt_id", "key")
        .agg(strength=pl.col("p").sort().mean())
    )
    joined = pairs.join(wins.rename({"key": "a", "strength": "strength_a"}), on=["prompt_id", "a"], how="left").join(
        wins.rename({"key": "b", "strength": "strength_b"}), on=["prompt_id", "b"], how="left"
    )
    sign = pl.when(pl.col("preferred") == "b").then(-1.0).otherwise(1.0)
    rank_gap = ((pl.col("strength_a") - pl.col("strength_b")) * sign).round(9)
    return joined.with_columns(
        rank_gap=rank_gap,
        agrees_with_ranking=(rank_gap >= 0).fill_null(False) | (pl.col("decided_by") == "check").fill_null(False),
    ).drop("strength_a", "strength_b")


def _select_kept(
    pairs: pl.DataFrame, max_per_prompt: int, min_confidence: float, min_chosen_rating: float
) -> pl.DataFrame:
    """The first ``max_per_prompt`` wins of each prompt are kept, by falling gap, then by key."""
    winner_rating = pl.when(pl.col("preferred") == "a").then("score_a").otherwise("score_b")
    rating_ok = (winner_rating >= min_chosen_rating).fill_null(True) | (pl.col("decided_by") == "check").fill_null(
        False
    )  # a check outranks ratings
    ordered = pairs.with_columns(
        eligible=(pl.col("outcome") == "win") & pl.col("agrees_with_ranking") & rating_ok
    ).sort(
        ["prompt_id", "eligible", "rank_gap", "a", "b"], descending=[False, True, True, False, False], nulls_last=True
    )
    position = pl.int_range(pl.len()).over("prompt_id")
    ordered = ordered.with_columns(kept=pl.col("eligible") & (position < max_per_prompt))
    confidence = pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")).round(3).cast(pl.String)
    drop_reason = (
        pl.when("kept")
        .then(pl.lit(None, pl.String))
        .when(pl.col("outcome") == "unparsable")
        .then(pl.lit("no readable verdict in both orders"))
        .when(pl.col("outcome") == "inconsistent")
        .then(pl.lit("the two orders contradict each other"))
        .when(pl.col("outcome") == "tie")
        .then(pl.format("near-tie: p {} is below {}", confidence, pl.lit(min_confidence)))
        .when(~rating_ok)
        .then(pl.format("the better answer was rated {}, below {}", winner_rating.round(2), pl.lit(min_chosen_rating)))
        .when(~pl.col("agrees_with_ranking"))
        .then(pl.lit("contradicts the prompt's other comparisons"))
        .otherwise(pl.lit("another pair of this prompt is kept"))
    )
    return (
        ordered.with_columns(drop_reason=drop_reason)
        .drop("eligible", "agrees_with_ranking", "rank_gap")
        .sort("prompt_id", "rank", "a", "b")
    )
