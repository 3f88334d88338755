"""Ninety and ten: which kept pairs go to people, and for what reason.

Of N kept pairs round(human_fraction x N) go to the queue, by one draw in which every kept pair has a known chance above
nothing (``inclusion_probability``). Most of the budget goes to the pairs whose label is likeliest wrong, stakes
counted in: no other rule finds more errors. The rest, ``RANDOM_AUDIT_FRACTION`` of it, is spread over all others, more
on the less sure and on those that are confident but suspicious. The first are ``targeted``, the others ``audit``; where
more pairs are equally unsure than there is budget for, chance decides among the targeted too. Weighted with their
inclusion probabilities, the labels of both say without bias how far judges and people agree over all kept pairs
(Horvitz and Thompson 1952).

The draw depends on the seed and the pair's id, not on the order of rows; a pair's number stays the same when a run
grows, so most of what was queued stays queued (permanent random numbers; Pareto sampling, Rosén 1997).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from rlaif.records import hash_to_unit_interval
from rlaif.stats.intervals import Floats

RANDOM_AUDIT_FRACTION = 0.10
"""Part of the budget that is drawn from the pairs that judges are sure of: it estimates what is left there and finds
confident mistakes, and whatever it finds, 0.9 of the errors that can be found are found. Half of the budget as a plain
random sample would estimate more narrowly and find little over half."""
TOPIC_CAP = 0.30
SUSPICION_WEIGHT = 3.0
"""How much likelier a suspicious pair is to be drawn by chance than another of the same probability."""
SUSPICIOUS_LENGTH_RATIO = 2.0
STAKES_BY_TAG = {
    "safety": 2.0,
    "harmful": 2.0,
    "borderline": 2.0,
    "legal": 2.0,
    "law": 2.0,
    "medical": 2.0,
    "medicine": 2.0,
}
CLASS_TAGS = {"benign", "borderline", "harmful"}


def route_pairs(pairs: pl.DataFrame, tags: pl.DataFrame, *, human_fraction: float, seed: int) -> pl.DataFrame:
    """``pairs`` (with pair_id) plus route, route_reason and inclusion_probability (null for dropped pairs).

    ``tags``: prompt_id and tags (list of str), of prompts that have some. Optional columns of ``pairs``:
    ``suspicion`` (why a confident label may be wrong, or null) and ``human_only_reason`` (why judges may not decide, or
    null): such pairs come first, and are dropped where the budget does not reach them. So is a pair of which the judges
    cannot tell (no ``preferred``).
    """
    pairs = pairs.with_columns(
        pl.lit(None, pl.String).alias(name)
        for name in ("suspicion", "human_only_reason")
        if name not in pairs.columns
    )  # fmt: skip
    kept = pairs.filter("kept").sort("pair_id").join(tags, on="prompt_id", how="left", maintain_order="left")
    stakes_and_topic = {
        names: (_stakes_weight(names), _topic_of_tags(names))
        for names in {(), *(tuple(names or ()) for names in tags["tags"].to_list())}
    }
    stakes, topics = (
        zip(*(stakes_and_topic[tuple(names or ())] for names in kept["tags"].to_list()), strict=True)
        if kept.height
        else ((), ())
    )
    is_flagged = pl.col("flags").list.len().fill_null(0) > 0
    kept = kept.with_columns(
        pl.Series("stakes", stakes, dtype=pl.Float64),
        pl.Series("draw", [hash_to_unit_interval(seed, "audit", pair) for pair in kept["pair_id"]], dtype=pl.Float64),
        # An answer that speaks to the judge may have persuaded it: as good as a coin until a person has looked.
        error_probability=pl.when(is_flagged)
        .then(pl.lit(0.5))
        .otherwise(1.0 - pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))),
    )
    pi_by_risk, pi = inclusion_probabilities(
        kept["error_probability"].to_numpy(),
        kept["stakes"].to_numpy(),
        kept["suspicion"].is_not_null().to_numpy(),
        kept["human_only_reason"].is_not_null().to_numpy(),
        topics,
        round(human_fraction * kept.height),
    )
    chosen = pareto_sample(pi, kept["draw"].to_numpy())
    kept = kept.with_columns(
        pl.Series("inclusion_probability", pi, dtype=pl.Float64),
        pl.Series("chosen", chosen, dtype=pl.Boolean),
        # A pair may owe its place to either part of the budget: which of them it counts for is drawn as well.
        pl.Series(
            "drawn_for_risk",
            [
                is_chosen and hash_to_unit_interval(seed, "part", pair) * p < p_by_risk
                for pair, is_chosen, p, p_by_risk in zip(kept["pair_id"], chosen, pi, pi_by_risk, strict=True)
            ],
            dtype=pl.Boolean,
        ),
    )
    undecidable = pl.col("human_only_reason").is_not_null() | pl.col("preferred").is_null()
    kept = kept.with_columns(
        route=pl.when("chosen")
        .then(pl.when("drawn_for_risk").then(pl.lit("targeted")).otherwise(pl.lit("audit")))
        .when(undecidable)
        .then(pl.lit("dropped"))
        .otherwise(pl.lit("judge")),
        route_reason=_route_reason(),
    )
    kept = kept.with_columns(kept=pl.col("route") != "dropped")
    columns = [*pairs.columns, "route", "route_reason", "inclusion_probability"]
    return pl.concat([kept.select(columns), mark_dropped(pairs.filter(~pl.col("kept"))).select(columns)]).sort(
        "pair_id"
    )


def mark_dropped(pairs: pl.DataFrame) -> pl.DataFrame:
    """What :func:`route_pairs` makes of pairs that are not kept."""
    return pairs.with_columns(
        route=pl.lit("dropped"), route_reason=pl.col("drop_reason"), inclusion_probability=pl.lit(None, pl.Float64)
    )


def _route_reason() -> pl.Expr:
    error_text = pl.format("chance of a wrong label {}", pl.col("error_probability").round(3))
    details = pl.concat_str(
        pl.coalesce(
            "human_only_reason",
            pl.when(pl.col("flags").list.len() > 0).then(pl.col("flags").list.join("; ")),
            error_text,
        ),
        pl.when(pl.col("stakes") > 1).then(pl.format("at stake x{}", "stakes")),
        pl.col("suspicion"),
        separator=", ",
        ignore_nulls=True,
    )
    drawn_text = pl.format("drawn with probability {}: {}", pl.col("inclusion_probability").round(4), details)
    return (
        pl.when(pl.col("chosen") & (pl.col("inclusion_probability") < 1.0))
        .then(drawn_text)
        .when("chosen")
        .then(details)
        .when(pl.col("human_only_reason").is_not_null())
        .then(pl.format("{}, and the people's share is spent", "human_only_reason"))
        .when(pl.col("preferred").is_null())
        .then(pl.lit("the judges cannot tell, and the people's share is spent"))
        .otherwise(
            pl.format(
                "left to the judges, chance to be drawn {}: {}", pl.col("inclusion_probability").round(4), details
            )
        )
    )


def inclusion_probabilities(
    error_probabilities: Floats,
    stakes: Floats,
    suspicious: np.ndarray,
    prioritized: np.ndarray,
    topics: Sequence[str | None],
    budget: int,
) -> tuple[Floats, Floats]:
    """Each row's inclusion probability by its risk alone, and in all; the sum of the latter is ``budget``.

    (1 - RANDOM_AUDIT_FRACTION) of it goes to the rows of largest ``error_probabilities`` x ``stakes`` (before all to
    those marked ``prioritized``); rows of one level share alike, and no topic gets more than TOPIC_CAP of it, or than
    its share of the rows where that is more. What is left is spread over the rows that got nothing, in proportion to
    the label's standard deviation, which estimates the mean with the least variance (Neyman 1934).
    """
    n = len(error_probabilities)
    pi = np.zeros(n)
    if not n or not budget:
        return pi, pi
    topic_index = {name: i for i, name in enumerate(sorted({name or "" for name in topics}))}
    topic_names, topic = np.array(list(topic_index)), np.array([topic_index[name or ""] for name in topics])
    remaining = (1 - RANDOM_AUDIT_FRACTION) * budget
    topic_budget = np.maximum(TOPIC_CAP, np.bincount(topic) / n) * remaining
    topic_budget[topic_names == ""] = np.inf
    risk = np.where(prioritized, 2.0 * max(STAKES_BY_TAG.values()), np.round(error_probabilities * stakes, 4))
    order = np.argsort(-risk, kind="stable")
    ends = np.flatnonzero(np.diff(risk[order], append=-1.0)) + 1
    for rows in np.split(order, ends[:-1]):
        if remaining <= 1e-9:
            break
        sizes = np.bincount(topic[rows], minlength=len(topic_names)).astype(float)
        granted = sizes if prioritized[rows[0]] else np.minimum(sizes, np.maximum(0.0, topic_budget))
        granted = granted * min(1.0, remaining / granted.sum()) if granted.sum() else granted
        pi[rows] = (granted / np.maximum(sizes, 1.0))[topic[rows]]
        topic_budget, remaining = topic_budget - granted, remaining - granted.sum()
    clipped = np.clip(error_probabilities, 0.02, 0.5)
    weight = np.sqrt(clipped * (1 - clipped)) * stakes * np.where(suspicious, SUSPICION_WEIGHT, 1.0)
    not_granted = pi == 0
    spread_pi = (
        _distribute_budget(np.where(not_granted, 0.0, 1.0), weight, budget - float(pi.sum()))
        if not_granted.any()
        else pi
    )
    pi_total = np.where(not_granted, spread_pi, pi)
    return pi, _distribute_budget(pi_total, weight, budget - float(pi_total.sum()))


def _distribute_budget(pi: Floats, weight: Floats, budget: float) -> Floats:
    """``budget`` added to ``pi`` in proportion to ``weight``, where none may pass 1."""
    pi = np.where(pi > 1 - 1e-9, 1.0, pi)
    while budget > 1e-9 and (free := pi < 1).any():
        share = budget * weight * free / (weight * free).sum()
        raised = np.minimum(1.0, pi + share)
        full = free & (raised > 1 - 1e-9)
        if not full.any():
            return np.asarray(raised)
        # Those that are full first: what they could not take goes to the others.
        budget -= float((1.0 - pi[full]).sum())
        pi = np.where(full, 1.0, pi)
    return pi


def pareto_sample(pi: Floats, draw: Floats) -> np.ndarray:
    """Which rows are drawn: round(sum(pi)) of them, row i with probability ``pi[i]``, by Pareto sampling (Rosén 1997)
    on the rows' own uniform numbers ``draw``."""
    size = round(float(pi.sum()))
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = np.where(pi >= 1, -1.0, np.where(pi > 0, draw / (1 - draw) / (pi / (1 - pi)), np.inf))
    chosen = np.zeros(len(pi), dtype=bool)
    chosen[np.lexsort((draw, rank))[:size]] = True
    return chosen


def add_suspicion(pairs: pl.DataFrame, judge_votes: pl.DataFrame, lengths: pl.DataFrame) -> pl.DataFrame:
    """``pairs`` plus ``suspicion``: what speaks against a label that the judges are sure of, or null.

    ``judge_votes``: :func:`rlaif.pair.aggregation.votes_by_judge`. ``lengths``: key, chars.
    """
    a_wins = pl.col("preferred") == "a"
    dissenters = (
        judge_votes.join(pairs.select("a", "b", "preferred"), on=["a", "b"])
        .with_columns(p=(pl.col("p_ab") + pl.col("p_ba")) / 2.0)
        .filter(pl.when(a_wins).then(pl.col("p") < 0.5).otherwise(pl.col("p") > 0.5))
        .group_by("a", "b")
        .agg(dissenters=pl.col("panel_judge").sort().str.join(", "))
    )
    pairs = (
        pairs.join(dissenters, on=["a", "b"], how="left")
        .join(lengths.select(a="key", chars_a="chars"), on="a", how="left")
        .join(lengths.select(b="key", chars_b="chars"), on="b", how="left")
    )
    length_ratio = (
        pl.when(a_wins).then(pl.col("chars_a") / pl.col("chars_b")).otherwise(pl.col("chars_b") / pl.col("chars_a"))
    )
    rating_margin = (pl.col("score_a") - pl.col("score_b")) * pl.when(a_wins).then(1.0).otherwise(-1.0)
    suspicion = pl.concat_str(
        pl.when(pl.col("decided_by") == "check")
        .then(pl.format("{} contradicts the check", "dissenters"))
        .otherwise(pl.format("{} contradicts the others", "dissenters")),
        pl.when(rating_margin < 0).then(pl.lit("the winner was rated lower")),
        pl.when(length_ratio >= SUSPICIOUS_LENGTH_RATIO).then(
            pl.format("the winner is {} times as long", length_ratio.round(1))
        ),
        separator=", ",
        ignore_nulls=True,
    )
    reason = pl.when(suspicion.str.len_bytes() > 0).then(suspicion)
    return pairs.with_columns(suspicion=pl.when(pl.col("preferred").is_not_null()).then(reason)).drop("dissenters")


def _stakes_weight(tags: Sequence[str] | None) -> float:
    return max((STAKES_BY_TAG.get(name.casefold(), 1.0) for name in tags or ()), default=1.0)


def _topic_of_tags(tags: Sequence[str] | None) -> str | None:
    return next((name for name in tags or () if name.casefold() not in CLASS_TAGS and ":" not in name), None)
