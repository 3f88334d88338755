"""From verdicts on candidates to an outcome for each, and which are kept.

A pair's probability is the weighted mean over the panel of each seat's mean over both orders; a seat that did not
give a readable verdict in both orders gives none. Probabilities are averaged, verdicts are never voted on.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from rlaif.pair.select import Judged, Strategy, of_panel, with_checks


def by_seat(verdicts: pl.DataFrame, panel: Sequence[Judged], pairs: pl.DataFrame | None = None) -> pl.DataFrame:
    """What each seat of the panel said of each pair. Columns: a, b, seat ("judge@model"), weight, p_ab and p_ba
    (probability that ``a`` is better, when shown first and when shown second), flags.

    A reward model sees one answer at a time, so its probability is the same in both orders: sigmoid of the scores'
    difference (Bradley and Terry 1952). It is given for the pairs in ``pairs`` (columns a, b), or, without them, for
    all pairs of answers to one prompt.
    """
    known = of_panel(verdicts.filter(pl.col("kind").is_in(["compare", "reward"])), panel)
    known = known.with_columns(seat=pl.format("{}@{}", "judge", "model"))
    compared = (
        known.filter(pl.col("kind") == "compare")
        .group_by("a", "b", "seat", "weight")
        .agg(
            p_ab=pl.col("p_a").filter(pl.col("order") == "ab").mean(),
            p_ba=pl.col("p_a").filter(pl.col("order") == "ba").mean(),
            flags=pl.col("flags").list.explode(keep_nulls=False, empty_as_null=False).unique().sort(),
        )
        .filter(pl.col("p_ab").is_not_null() & pl.col("p_ba").is_not_null())
    )
    rewarded = known.filter(pl.col("kind") == "reward").select("prompt_id", "seat", "weight", "score", "flags", key="a")
    if pairs is None:
        pairs = rewarded.join(rewarded, on=["prompt_id", "seat"], suffix="_b").filter(pl.col("key") < pl.col("key_b"))
        pairs = pairs.select(a="key", b="key_b").unique()
    scores = (
        pairs.select("a", "b")
        .join(rewarded.rename({"key": "a"}), on="a")
        .join(rewarded.select("seat", "score", "flags", b="key"), on=["b", "seat"], suffix="_b")
        .with_columns(p_ab=1.0 / (1.0 + (pl.col("score_b") - pl.col("score")).exp()))
        .select("a", "b", "seat", "weight", "p_ab", p_ba="p_ab", flags=_flags_of_both())
    )
    return pl.concat([compared, scores]).sort("a", "b", "seat")


def _flags_of_both() -> pl.Expr:
    """A reward model's flags are told of one answer each; of a pair they say which one."""
    first, second = (
        pl.col(flags).list.eval(pl.format(f"{side} {{}}", pl.element()))
        for side, flags in (("a", "flags"), ("b", "flags_b"))
    )
    return first.list.concat(second)


def checked(verdicts: pl.DataFrame) -> pl.DataFrame:
    """The share of its prompt's checks that each answer meets, by the newest run of the checks. Columns: key, check."""
    told = verdicts.filter(pl.col("kind") == "check").unique("a", keep="last", maintain_order=True)
    return told.select(key="a", check="score")


def comparisons(verdicts: pl.DataFrame, panel: Sequence[Judged], pairs: pl.DataFrame | None = None) -> pl.DataFrame:
    """What is known of each pair (``pairs`` as for :func:`by_seat`). Columns: a, b, p_ab and p_ba (probability that
    ``a`` is better, when shown first and when shown second), flags, by ("panel": the weighted mean over the seats;
    "check": one answer meets more of the prompt's checks than the other, which outranks every model).
    """
    seats = by_seat(verdicts, panel, pairs)
    weight = pl.col("weight")
    said = seats.group_by("a", "b").agg(
        p_ab=(pl.col("p_ab") * weight).sum() / weight.sum(),
        p_ba=(pl.col("p_ba") * weight).sum() / weight.sum(),
        flags=pl.col("flags").list.explode(keep_nulls=False, empty_as_null=False).unique().sort(),
    )
    checks = checked(verdicts)
    wanted = said.select("a", "b") if pairs is None else pairs.select("a", "b")
    decided = (
        with_checks(wanted, checks)
        .filter(pl.col("check_a") != pl.col("check_b"))
        .select("a", "b", won=(pl.col("check_a") > pl.col("check_b")).cast(pl.Float64))
    )
    won = pl.col("won")
    return said.join(decided, on=["a", "b"], how="full", coalesce=True).select(
        "a",
        "b",
        p_ab=won.fill_null(pl.col("p_ab")),
        p_ba=won.fill_null(pl.col("p_ba")),
        flags=pl.col("flags").fill_null([]),
        by=pl.when(won.is_not_null()).then(pl.lit("check")).otherwise(pl.lit("panel")),
    )


def settle(
    candidates: pl.DataFrame,
    compared: pl.DataFrame,
    strategy: Strategy,
    *,
    min_probability: float,
    per_prompt: int,
    min_score: float = 0.0,
) -> pl.DataFrame:
    """``candidates`` with p_a, preferred, outcome, flags, kept and why (the reason, where it is not kept).

    win: p at least ``min_probability`` for one side; inconsistent: less, and the orders contradict each other; tie:
    less, and they do not; unparsed: no verdict. A winner that was rated below ``min_score`` is no example to learn
    from, whatever it was compared with. Of the prompts that could be judged, at most a share may be left without a
    pair for near-ties alone: :func:`lost`, :func:`judged` and :func:`surest` say which of them :func:`rescue` keeps.
    """
    settled = candidates.join(compared, on=["a", "b"], how="left")
    if strategy == "rate-only":
        settled = settled.with_columns(
            p_ab=pl.col("p_ab").fill_null(_p_from_scores()),
            p_ba=pl.col("p_ba").fill_null(_p_from_scores()),
            flags=pl.col("flags").fill_null([]),
            by=pl.col("by").fill_null("panel"),
        )
    # Rounded, so that a pair at the threshold is a win whichever of its answers is called a.
    sure = pl.max_horizontal("p_a", 1.0 - pl.col("p_a")).round(9)
    settled = settled.with_columns(p_a=(pl.col("p_ab") + pl.col("p_ba")) / 2.0).with_columns(
        outcome=pl.when(pl.col("p_a").is_null())
        .then(pl.lit("unparsed"))
        .when((sure >= min_probability) & (pl.col("p_a") != 0.5))
        .then(pl.lit("win"))
        .when((pl.col("p_ab") - 0.5) * (pl.col("p_ba") - 0.5) < 0)
        .then(pl.lit("inconsistent"))
        .otherwise(pl.lit("tie"))
    )
    settled = settled.with_columns(
        preferred=pl.when(pl.col("outcome") == "win").then(
            pl.when(pl.col("p_a") > 0.5).then(pl.lit("a")).otherwise(pl.lit("b"))
        )
    )
    return _keep(_strength(settled, strategy), per_prompt, min_probability, min_score)


def judged(settled: pl.DataFrame) -> int:
    """How many prompts have a pair that could be judged."""
    return settled.filter(pl.col("p_a").is_not_null())["prompt_id"].n_unique()


def lost(settled: pl.DataFrame) -> pl.DataFrame:
    """The surest near-tie of each prompt that lost its pair for near-ties alone. Columns: a, b, sure."""
    seen = settled.filter(pl.col("p_a").is_not_null())
    near = seen.filter(~pl.col("kept").any().over("prompt_id"), pl.col("outcome").is_in(["tie", "inconsistent"]))
    return (
        near.with_columns(sure=pl.max_horizontal("p_a", 1.0 - pl.col("p_a")).round(9))
        .sort("sure", "a", "b", descending=[True, False, False])
        .unique("prompt_id", keep="first", maintain_order=True)
        .select("a", "b", "sure")
    )


def surest(lost: pl.DataFrame, judged: int, max_near_ties: float) -> pl.DataFrame:
    """Those of :func:`lost` beyond the share ``max_near_ties`` of the prompts :func:`judged`. Columns: a, b."""
    over = max(0, lost.height - int(max_near_ties * judged + 1e-9))
    return lost.sort("sure", "a", "b", descending=[True, False, False]).head(over).select("a", "b")


def rescue(settled: pl.DataFrame, spared: pl.DataFrame) -> pl.DataFrame:
    """Keeps the pairs in ``spared`` (columns a, b) all the same. Which of two equal answers is ``preferred`` stays open
    (null): that is for people."""
    rescued = spared.with_columns(rescued=pl.lit(True))
    both = settled.join(rescued, on=["a", "b"], how="left", maintain_order="left")
    tells = pl.col("rescued").is_not_null() & (pl.col("p_a") != 0.5)
    return both.with_columns(
        kept=pl.col("kept") | pl.col("rescued").is_not_null(),
        why=pl.when(pl.col("rescued").is_null()).then("why"),
        outcome=pl.when(tells).then(pl.lit("win")).otherwise("outcome"),
        preferred=pl.when(tells)
        .then(pl.when(pl.col("p_a") > 0.5).then(pl.lit("a")).otherwise(pl.lit("b")))
        .otherwise("preferred"),
    ).drop("rescued")


def _p_from_scores() -> pl.Expr:
    """P(score of a > score of b) for two normal scores; the logistic stands for the normal (Bowling et al. 2009)."""
    z = (pl.col("score_a") - pl.col("score_b")) / (pl.col("spread_a") + pl.col("spread_b")).sqrt()
    return 1.0 / (1.0 + (-1.702 * z).exp())


def _strength(settled: pl.DataFrame, strategy: Strategy) -> pl.DataFrame:
    """Adds ``gap``, by which the pairs of a prompt are preferred, and ``agrees``: whether the pair's winner is also
    the stronger answer over all. For the rated strategies the rank says it; for round-robin Bradley-Terry, whose order
    in a complete round robin is the order of mean wins (Ford 1957)."""
    if strategy != "round-robin":
        towards_a = pl.when(pl.col("preferred") == "b").then(-1.0).otherwise(1.0)
        rated = ((pl.col("score_a") - pl.col("score_b")) * towards_a >= 0).fill_null(True)
        return settled.with_columns(
            gap=-pl.col("rank").cast(pl.Float64), agrees=rated | (pl.col("by") == "check").fill_null(False)
        )
    seen = settled.filter(pl.col("p_a").is_not_null())
    wins = (
        pl.concat(
            [
                seen.select("prompt_id", key="a", p=pl.col("p_a")),
                seen.select("prompt_id", key="b", p=1.0 - pl.col("p_a")),
            ]
        )
        .group_by("prompt_id", "key")
        .agg(strength=pl.col("p").sort().mean())
    )
    joined = settled.join(wins.rename({"key": "a", "strength": "s_a"}), on=["prompt_id", "a"], how="left").join(
        wins.rename({"key": "b", "strength": "s_b"}), on=["prompt_id", "b"], how="left"
    )
    towards_a = pl.when(pl.col("preferred") == "b").then(-1.0).otherwise(1.0)
    gap = ((pl.col("s_a") - pl.col("s_b")) * towards_a).round(9)
    return joined.with_columns(
        gap=gap, agrees=(gap >= 0).fill_null(False) | (pl.col("by") == "check").fill_null(False)
    ).drop("s_a", "s_b")


def _keep(settled: pl.DataFrame, per_prompt: int, min_probability: float, min_score: float) -> pl.DataFrame:
    """The first ``per_prompt`` wins of each prompt are kept, by falling gap, then by key."""
    score = pl.when(pl.col("preferred") == "a").then("score_a").otherwise("score_b")
    good = (score >= min_score).fill_null(True) | (pl.col("by") == "check").fill_null(False)  # a check outranks ratings
    ordered = settled.with_columns(eligible=(pl.col("outcome") == "win") & pl.col("agrees") & good).sort(
        ["prompt_id", "eligible", "gap", "a", "b"], descending=[False, True, True, False, False], nulls_last=True
    )
    place = pl.int_range(pl.len()).over("prompt_id")
    ordered = ordered.with_columns(kept=pl.col("eligible") & (place < per_prompt))
    sure = pl.max_horizontal("p_a", 1.0 - pl.col("p_a")).round(3).cast(pl.String)
    why = (
        pl.when("kept")
        .then(pl.lit(None, pl.String))
        .when(pl.col("outcome") == "unparsed")
        .then(pl.lit("no readable verdict in both orders"))
        .when(pl.col("outcome") == "inconsistent")
        .then(pl.lit("the two orders contradict each other"))
        .when(pl.col("outcome") == "tie")
        .then(pl.format("near-tie: p {} is below {}", sure, pl.lit(min_probability)))
        .when(~good)
        .then(pl.format("the better answer was rated {}, below {}", score.round(2), pl.lit(min_score)))
        .when(~pl.col("agrees"))
        .then(pl.lit("contradicts the prompt's other comparisons"))
        .otherwise(pl.lit("another pair of this prompt is kept"))
    )
    return ordered.with_columns(why=why).drop("eligible", "agrees", "gap").sort("prompt_id", "rank", "a", "b")
