"""Choose which kept pairs go to human review (about 10 %), and record why.

Of N kept pairs, round(human_fraction x N) are queued by one draw in which every kept pair has a known, nonzero
probability (``inclusion_probability``). Most of the budget goes to the pairs whose label is most likely wrong, weighted
by their stakes: no other rule finds more errors. The rest, ``RANDOM_AUDIT_FRACTION`` of it, is spread over all other
pairs, with more weight on less confident pairs and on confident but suspicious ones. The first are ``targeted``, the
others ``audit``. If more pairs are equally unsure than the budget allows, chance decides among the targeted ones too.
Weighted with their inclusion probabilities, the labels of both give an unbiased estimate of how often judges and
annotators agree over all kept pairs (Horvitz and Thompson 1952).

The draw depends on the seed and the pair's id, not on the order of rows. A pair keeps its random number when the run
grows, so most of the queue stays the same (permanent random numbers; Pareto sampling, Rosén 1997).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from rlaif.display_names import PAIR_DROP_REASONS, VERDICT_FLAGS
from rlaif.records import hash_to_unit_interval
from rlaif.stats.intervals import Floats

RANDOM_AUDIT_FRACTION = 0.10
"""Part of the budget drawn from the pairs that judges are sure of. It estimates the errors that remain there and finds
confident mistakes, at the price of a tenth of the errors that the budget could find. A plain random sample of half of
the budget would give narrower estimates, but find little over half of the errors."""
TOPIC_CAP = 0.30
SUSPICION_WEIGHT = 3.0
"""Weight of a suspicious pair in the random draw, relative to another pair of the same probability."""
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
    """Add route, route_reason and inclusion_probability (both null for dropped pairs) to ``pairs`` with pair_id.

    ``tags``: prompt_id and tags (list of str) of the prompts that have some. Optional columns of ``pairs``:
    ``suspicion`` (text: evidence against a confident label, or null), ``humans_only`` (judges may not decide) and
    ``prompt_class`` (benign, borderline, harmful or null; it words the reason of ``humans_only``). Pairs
    that only humans may decide come first, and are dropped if the budget does not cover them. Pairs on which the judges
    cannot decide (null ``preferred``) are dropped too if they are not drawn.
    """
    pairs = pairs.with_columns(
        default.alias(name)
        for name, default in (
            ("suspicion", pl.lit(None, pl.String)),
            ("humans_only", pl.lit(value=False)),
            ("prompt_class", pl.lit(None, pl.String)),
        )
        if name not in pairs.columns
    )
    kept = pairs.filter("kept").sort("pair_id").join(tags, on="prompt_id", how="left", maintain_order="left")
    kept = _draw_for_review(_add_risk(kept, tags, seed), human_fraction=human_fraction, seed=seed)
    drop_reason = (
        pl.when(pl.col("chosen"))
        .then(pl.lit(None, pl.String))
        .when("humans_only")
        .then(_humans_only_reason())
        .when(pl.col("preferred").is_null())
        .then(pl.lit("undecided"))
    )
    kept = kept.with_columns(drop_reason=drop_reason).with_columns(
        route=pl.when("chosen")
        .then(pl.when("drawn_for_risk").then(pl.lit("targeted")).otherwise(pl.lit("audit")))
        .when(pl.col("drop_reason").is_not_null())
        .then(pl.lit("dropped"))
        .otherwise(pl.lit("judge")),
        route_reason=pl.when(pl.col("drop_reason").is_null()).then(_route_reason()),
        kept=pl.col("drop_reason").is_null(),
    )
    columns = [*pairs.columns, "route", "route_reason", "inclusion_probability"]
    return pl.concat([kept.select(columns), mark_dropped(pairs.filter(~pl.col("kept"))).select(columns)]).sort(
        "pair_id"
    )


def _add_risk(kept: pl.DataFrame, tags: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Add stakes, topic, draw (a uniform random number per pair) and error_probability."""
    by_tags = {
        names: (_stakes_weight(names), _topic_of_tags(names))
        for names in {(), *(tuple(names or ()) for names in tags["tags"].to_list())}
    }
    rows = [by_tags[tuple(names or ())] for names in kept["tags"].to_list()]
    draws = [hash_to_unit_interval(seed, "audit", pair) for pair in kept["pair_id"]]
    is_flagged = pl.col("flags").list.len().fill_null(0) > 0
    return kept.with_columns(
        pl.Series("stakes", [stakes for stakes, _ in rows], dtype=pl.Float64),
        pl.Series("topic", [topic for _, topic in rows], dtype=pl.String),
        pl.Series("draw", draws, dtype=pl.Float64),
        # An answer that addresses the judge may have persuaded it: the label is a coin flip until it is reviewed.
        error_probability=pl.when(is_flagged)
        .then(pl.lit(0.5))
        .otherwise(1.0 - pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))),
    )


def _draw_for_review(kept: pl.DataFrame, *, human_fraction: float, seed: int) -> pl.DataFrame:
    """Add inclusion_probability, chosen and drawn_for_risk."""
    pi_by_risk, pi = inclusion_probabilities(
        kept["error_probability"].to_numpy(),
        kept["stakes"].to_numpy(),
        kept["suspicion"].is_not_null().to_numpy(),
        kept["humans_only"].to_numpy(),
        kept["topic"].to_list(),
        round(human_fraction * kept.height),
    )
    chosen = pareto_sample(pi, kept["draw"].to_numpy())
    # Either part of the budget may have chosen a pair: which of them it counts for is drawn as well.
    drawn_for_risk = [
        is_chosen and hash_to_unit_interval(seed, "part", pair) * p < p_by_risk
        for pair, is_chosen, p, p_by_risk in zip(kept["pair_id"], chosen, pi, pi_by_risk, strict=True)
    ]
    return kept.with_columns(
        pl.Series("inclusion_probability", pi, dtype=pl.Float64),
        pl.Series("chosen", chosen, dtype=pl.Boolean),
        pl.Series("drawn_for_risk", drawn_for_risk, dtype=pl.Boolean),
    )


def mark_dropped(pairs: pl.DataFrame) -> pl.DataFrame:
    """Add the columns of :func:`route_pairs` to pairs that are not kept."""
    return pairs.with_columns(
        route=pl.lit("dropped"),
        route_reason=pl.lit(None, pl.String),
        inclusion_probability=pl.lit(None, pl.Float64),
    )


def describe_drops(pairs: pl.DataFrame) -> pl.DataFrame:
    """Write the drop reason of routed ``pairs`` as text into ``route_reason``, and clear the reason of all others."""
    is_dropped, reason = pl.col("route") == "dropped", pl.col("drop_reason")
    confidence = pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")).round(3)
    text = reason.replace_strict(PAIR_DROP_REASONS, return_dtype=pl.String)
    text = (
        pl.when(reason.is_in(["near_tie", "near_tie_after_calibration"]))
        .then(pl.format("{} (p {})", text, confidence))
        .otherwise(text)
    )
    return pairs.with_columns(
        drop_reason=pl.when(is_dropped).then(reason),
        route_reason=pl.when(is_dropped).then(text).otherwise("route_reason"),
    )


def _humans_only_reason() -> pl.Expr:
    is_tagged = pl.col("prompt_class").is_in(["benign", "harmful"])
    return pl.when(is_tagged).then(pl.lit("unknown_refusal")).otherwise(pl.lit("borderline_prompt"))


def _route_reason() -> pl.Expr:
    error_text = pl.format("probability of a wrong label {}", pl.col("error_probability").round(3))
    details = pl.concat_str(
        pl.when(pl.col("humans_only"))
        .then(
            _humans_only_reason().replace_strict(
                {
                    "borderline_prompt": "only annotators decide on borderline prompts",
                    "unknown_refusal": "it is unknown whether the better answer refuses",
                }
            )
        )
        .when(pl.col("flags").list.len() > 0)
        .then(pl.col("flags").list.eval(pl.element().replace(VERDICT_FLAGS)).list.join("; "))
        .otherwise(error_text),
        pl.when(pl.col("stakes") > 1).then(pl.format("stakes x{}", "stakes")),
        pl.col("suspicion"),
        separator="; ",
        ignore_nulls=True,
    )
    probability = pl.col("inclusion_probability").round(4)
    return (
        pl.when(pl.col("chosen") & (pl.col("inclusion_probability") < 1.0))
        .then(pl.format("drawn with probability {}; {}", probability, details))
        .when("chosen")
        .then(details)
        .otherwise(pl.format("not drawn (probability {}); {}", probability, details))
    )


def inclusion_probabilities(
    error_probabilities: Floats,
    stakes: Floats,
    suspicious: np.ndarray,
    prioritized: np.ndarray,
    topics: Sequence[str | None],
    budget: int,
) -> tuple[Floats, Floats]:
    """Return each row's inclusion probability by its risk alone, and in total. The totals sum to ``budget``.

    The part (1 - RANDOM_AUDIT_FRACTION) goes to the rows with the largest ``error_probabilities`` x ``stakes``, after
    those marked ``prioritized``. Rows of equal risk share equally. A topic gets at most TOPIC_CAP of this part, or its
    share of the rows if that is larger. The rest is spread over the rows that got nothing, in proportion to the label's
    standard deviation, which estimates the mean with the least variance (Neyman 1934).
    """
    n = len(error_probabilities)
    pi = np.zeros(n)
    if not n or not budget:
        return pi, pi
    pi = _spend_on_risk(error_probabilities, stakes, prioritized, topics, (1 - RANDOM_AUDIT_FRACTION) * budget)
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


def _spend_on_risk(
    error_probabilities: Floats, stakes: Floats, prioritized: np.ndarray, topics: Sequence[str | None], remaining: float
) -> Floats:
    """Return the inclusion probabilities that the budget ``remaining`` buys for the rows of highest risk."""
    n = len(error_probabilities)
    pi = np.zeros(n)
    topic_index = {name: i for i, name in enumerate(sorted({name or "" for name in topics}))}
    topic_names, topic = np.array(list(topic_index)), np.array([topic_index[name or ""] for name in topics])
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
    return pi


def _distribute_budget(pi: Floats, weight: Floats, budget: float) -> Floats:
    """Add ``budget`` to ``pi`` in proportion to ``weight``, with no probability above 1."""
    pi = np.where(pi > 1 - 1e-9, 1.0, pi)
    while budget > 1e-9 and (free := pi < 1).any():
        share = budget * weight * free / (weight * free).sum()
        raised = np.minimum(1.0, pi + share)
        full = free & (raised > 1 - 1e-9)
        if not full.any():
            return np.asarray(raised)
        # Fill these up first: what exceeds 1 goes to the others.
        budget -= float((1.0 - pi[full]).sum())
        pi = np.where(full, 1.0, pi)
    return pi


def pareto_sample(pi: Floats, draw: Floats) -> np.ndarray:
    """Draw round(sum(pi)) rows, row i with probability ``pi[i]``, and return a mask.

    Pareto sampling (Rosén 1997) on the rows' uniform random numbers ``draw``.
    """
    size = round(float(pi.sum()))
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = np.where(pi >= 1, -1.0, np.where(pi > 0, draw / (1 - draw) / (pi / (1 - pi)), np.inf))
    chosen = np.zeros(len(pi), dtype=bool)
    chosen[np.lexsort((draw, rank))[:size]] = True
    return chosen


def add_suspicion(pairs: pl.DataFrame, judge_votes: pl.DataFrame, lengths: pl.DataFrame) -> pl.DataFrame:
    """Add ``suspicion`` to ``pairs``: text on the evidence against a confident label, or null.

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
        .then(pl.format("{} disagrees with the check", "dissenters"))
        .otherwise(pl.format("{} disagrees with the panel", "dissenters")),
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
