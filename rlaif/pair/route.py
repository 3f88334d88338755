"""Ninety and ten: which kept pairs go to people, and for what reason.

Of N kept pairs round(share x N) go to the queue, by one draw in which every kept pair has a known chance above
nothing (``inclusion_probability``). Most of the budget goes to the pairs whose label is likeliest wrong, stakes
counted in: no other rule finds more errors. The rest, ``BY_CHANCE`` of it, is spread over all others, more on the less
sure and on those that are confident but suspicious. The first are ``targeted``, the others ``audit``; where more pairs
are equally unsure than there is budget for, chance decides among the targeted too. Weighted with their inclusion
probabilities, the labels of both say without bias how far judges and people agree over all kept pairs (Horvitz and
Thompson 1952).

The draw depends on the seed and the pair's id, not on the order of rows; a pair's number stays the same when a run
grows, so most of what was queued stays queued (permanent random numbers; Pareto sampling, Rosén 1997).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from rlaif.records import unit_interval
from rlaif.stats.intervals import Floats

BY_CHANCE = 0.10
"""Part of the budget that is drawn from the pairs that judges are sure of: it estimates what is left there and finds
confident mistakes, and whatever it finds, 0.9 of the errors that can be found are found. Half of the budget as a plain
random sample would estimate more narrowly and find little over half."""
TOPIC_CAP = 0.30
SUSPICIOUS = 3.0
"""How much likelier a suspicious pair is to be drawn by chance than another of the same probability."""
FAR_LONGER = 2.0
STAKES = {"safety": 2.0, "harmful": 2.0, "borderline": 2.0, "legal": 2.0, "law": 2.0, "medical": 2.0, "medicine": 2.0}
NO_TOPIC = {"benign", "borderline", "harmful"}


def route(settled: pl.DataFrame, tags: pl.DataFrame, *, human_share: float, seed: int) -> pl.DataFrame:
    """``settled`` (with pair_id) plus route, route_reason and inclusion_probability (null for dropped pairs).

    ``tags``: prompt_id and tags (list of str), of prompts that have some. Optional columns of ``settled``:
    ``suspicion`` (why a confident label may be wrong, or null) and ``only_people`` (why judges may not decide, or
    null): such pairs come first, and are dropped where the budget does not reach them. So is a pair of which the judges
    cannot tell (no ``preferred``).
    """
    settled = settled.with_columns(
        pl.lit(None, pl.String).alias(name)
        for name in ("suspicion", "only_people")
        if name not in settled.columns
    )  # fmt: skip
    kept = settled.filter("kept").sort("pair_id").join(tags, on="prompt_id", how="left", maintain_order="left")
    told = {
        names: (_stakes(names), _topic(names))
        for names in {(), *(tuple(names or ()) for names in tags["tags"].to_list())}
    }
    stakes, topics = (
        zip(*(told[tuple(names or ())] for names in kept["tags"].to_list()), strict=True) if kept.height else ((), ())
    )
    speaks = pl.col("flags").list.len().fill_null(0) > 0
    kept = kept.with_columns(
        pl.Series("stakes", stakes, dtype=pl.Float64),
        pl.Series("draw", [unit_interval(seed, "audit", pair) for pair in kept["pair_id"]], dtype=pl.Float64),
        # An answer that speaks to the judge may have persuaded it: as good as a coin until a person has looked.
        wrong=pl.when(speaks).then(pl.lit(0.5)).otherwise(1.0 - pl.max_horizontal("p_a", 1.0 - pl.col("p_a"))),
    )
    by_risk, pi = inclusion(
        kept["wrong"].to_numpy(),
        kept["stakes"].to_numpy(),
        kept["suspicion"].is_not_null().to_numpy(),
        kept["only_people"].is_not_null().to_numpy(),
        topics,
        round(human_share * kept.height),
    )
    chosen = pareto(pi, kept["draw"].to_numpy())
    kept = kept.with_columns(
        pl.Series("inclusion_probability", pi, dtype=pl.Float64),
        pl.Series("chosen", chosen, dtype=pl.Boolean),
        # A pair may owe its place to either part of the budget: which of them it counts for is drawn as well.
        pl.Series(
            "for_risk",
            [
                c and unit_interval(seed, "part", pair) * one < risk
                for pair, c, one, risk in zip(kept["pair_id"], chosen, pi, by_risk, strict=True)
            ],
            dtype=pl.Boolean,
        ),
    )
    unfit = pl.col("only_people").is_not_null() | pl.col("preferred").is_null()
    kept = kept.with_columns(
        route=pl.when("chosen")
        .then(pl.when("for_risk").then(pl.lit("targeted")).otherwise(pl.lit("audit")))
        .when(unfit)
        .then(pl.lit("dropped"))
        .otherwise(pl.lit("judge")),
        route_reason=_reason(),
    )
    kept = kept.with_columns(kept=pl.col("route") != "dropped")
    columns = [*settled.columns, "route", "route_reason", "inclusion_probability"]
    return pl.concat([kept.select(columns), dropped(settled.filter(~pl.col("kept"))).select(columns)]).sort("pair_id")


def dropped(settled: pl.DataFrame) -> pl.DataFrame:
    """What :func:`route` makes of pairs that are not kept."""
    return settled.with_columns(
        route=pl.lit("dropped"), route_reason=pl.col("why"), inclusion_probability=pl.lit(None, pl.Float64)
    )


def _reason() -> pl.Expr:
    chance = pl.format("chance of a wrong label {}", pl.col("wrong").round(3))
    what = pl.concat_str(
        pl.coalesce(
            "only_people", pl.when(pl.col("flags").list.len() > 0).then(pl.col("flags").list.join("; ")), chance
        ),
        pl.when(pl.col("stakes") > 1).then(pl.format("at stake x{}", "stakes")),
        pl.col("suspicion"),
        separator=", ",
        ignore_nulls=True,
    )
    drawn = pl.format("drawn with probability {}: {}", pl.col("inclusion_probability").round(4), what)
    return (
        pl.when(pl.col("chosen") & (pl.col("inclusion_probability") < 1.0))
        .then(drawn)
        .when("chosen")
        .then(what)
        .when(pl.col("only_people").is_not_null())
        .then(pl.format("{}, and the people's share is spent", "only_people"))
        .when(pl.col("preferred").is_null())
        .then(pl.lit("the judges cannot tell, and the people's share is spent"))
        .otherwise(
            pl.format("left to the judges, chance to be drawn {}: {}", pl.col("inclusion_probability").round(4), what)
        )
    )


def inclusion(
    wrong: Floats, stakes: Floats, suspicious: np.ndarray, first: np.ndarray, topics: Sequence[str | None], budget: int
) -> tuple[Floats, Floats]:
    """Each row's inclusion probability by its risk alone, and in all; the sum of the latter is ``budget``.

    (1 - BY_CHANCE) of it goes to the rows of largest ``wrong`` x ``stakes`` (before all to those marked ``first``);
    rows of one level share alike, and no topic gets more than TOPIC_CAP of it, or than its share of the rows where
    that is more. What is left is spread over the rows that got nothing, in proportion to the label's standard
    deviation, which estimates the mean with the least variance (Neyman 1934).
    """
    n = len(wrong)
    pi = np.zeros(n)
    if not n or not budget:
        return pi, pi
    place = {name: i for i, name in enumerate(sorted({name or "" for name in topics}))}
    names, topic = np.array(list(place)), np.array([place[name or ""] for name in topics])
    left = (1 - BY_CHANCE) * budget
    room = np.maximum(TOPIC_CAP, np.bincount(topic) / n) * left
    room[names == ""] = np.inf
    level = np.where(first, 2.0 * max(STAKES.values()), np.round(wrong * stakes, 4))
    order = np.argsort(-level, kind="stable")
    ends = np.flatnonzero(np.diff(level[order], append=-1.0)) + 1
    for rows in np.split(order, ends[:-1]):
        if left <= 1e-9:
            break
        sizes = np.bincount(topic[rows], minlength=len(names)).astype(float)
        granted = sizes if first[rows[0]] else np.minimum(sizes, np.maximum(0.0, room))
        granted = granted * min(1.0, left / granted.sum()) if granted.sum() else granted
        pi[rows] = (granted / np.maximum(sizes, 1.0))[topic[rows]]
        room, left = room - granted, left - granted.sum()
    likely = np.clip(wrong, 0.02, 0.5)
    worth = np.sqrt(likely * (1 - likely)) * stakes * np.where(suspicious, SUSPICIOUS, 1.0)
    rest = pi == 0
    chance = _spread(np.where(rest, 0.0, 1.0), worth, budget - float(pi.sum())) if rest.any() else pi
    pi_in_all = np.where(rest, chance, pi)
    return pi, _spread(pi_in_all, worth, budget - float(pi_in_all.sum()))


def _spread(pi: Floats, worth: Floats, budget: float) -> Floats:
    """``budget`` added to ``pi`` in proportion to ``worth``, where none may pass 1."""
    pi = np.where(pi > 1 - 1e-9, 1.0, pi)
    while budget > 1e-9 and (free := pi < 1).any():
        share = budget * worth * free / (worth * free).sum()
        grown = np.minimum(1.0, pi + share)
        full = free & (grown > 1 - 1e-9)
        if not full.any():
            return np.asarray(grown)
        # Those that are full first: what they could not take goes to the others.
        budget -= float((1.0 - pi[full]).sum())
        pi = np.where(full, 1.0, pi)
    return pi


def pareto(pi: Floats, draw: Floats) -> np.ndarray:
    """Which rows are drawn: round(sum(pi)) of them, row i with probability ``pi[i]``, by Pareto sampling (Rosén 1997)
    on the rows' own uniform numbers ``draw``."""
    size = round(float(pi.sum()))
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = np.where(pi >= 1, -1.0, np.where(pi > 0, draw / (1 - draw) / (pi / (1 - pi)), np.inf))
    chosen = np.zeros(len(pi), dtype=bool)
    chosen[np.lexsort((draw, rank))[:size]] = True
    return chosen


def suspicions(pairs: pl.DataFrame, seats: pl.DataFrame, lengths: pl.DataFrame) -> pl.DataFrame:
    """``pairs`` plus ``suspicion``: what speaks against a label that the judges are sure of, or null.

    ``seats``: :func:`rlaif.pair.settle.by_seat`. ``lengths``: key, chars.
    """
    won = pl.col("preferred") == "a"
    against = (
        seats.join(pairs.select("a", "b", "preferred"), on=["a", "b"])
        .with_columns(p=(pl.col("p_ab") + pl.col("p_ba")) / 2.0)
        .filter(pl.when(won).then(pl.col("p") < 0.5).otherwise(pl.col("p") > 0.5))
        .group_by("a", "b")
        .agg(against=pl.col("seat").sort().str.join(", "))
    )
    pairs = (
        pairs.join(against, on=["a", "b"], how="left")
        .join(lengths.select(a="key", chars_a="chars"), on="a", how="left")
        .join(lengths.select(b="key", chars_b="chars"), on="b", how="left")
    )
    longer = pl.when(won).then(pl.col("chars_a") / pl.col("chars_b")).otherwise(pl.col("chars_b") / pl.col("chars_a"))
    margin = (pl.col("score_a") - pl.col("score_b")) * pl.when(won).then(1.0).otherwise(-1.0)
    suspicion = pl.concat_str(
        pl.when(pl.col("by") == "check").then(pl.format("{} contradicts the check", "against"))
        .otherwise(pl.format("{} contradicts the others", "against")),
        pl.when(margin < 0).then(pl.lit("the winner was rated lower")),
        pl.when(longer >= FAR_LONGER).then(pl.format("the winner is {} times as long", longer.round(1))),
        separator=", ", ignore_nulls=True,
    )  # fmt: skip
    named = pl.when(suspicion.str.len_bytes() > 0).then(suspicion)
    return pairs.with_columns(suspicion=pl.when(pl.col("preferred").is_not_null()).then(named)).drop("against")


def _stakes(names: Sequence[str] | None) -> float:
    return max((STAKES.get(name.casefold(), 1.0) for name in names or ()), default=1.0)


def _topic(names: Sequence[str] | None) -> str | None:
    return next((name for name in names or () if name.casefold() not in NO_TOPIC and ":" not in name), None)
