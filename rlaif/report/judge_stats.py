"""What the verdicts and the pairs say about the labels, from the journals and tables/pairs.parquet alone.

Nothing here needs a person's label: how the judges answer in both orders, how far they follow length, how sure they
are, and what was left out. Everything is counted over all rows, in frames of numbers: texts never stand in memory.
Shares come as :class:`rlaif.stats.Estimate`, by pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import polars as pl

from rlaif.run import frames
from rlaif.run.run import Run
from rlaif.stats import Estimate, wilson

BINS = 20
LENGTH_BINS = [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def position_stats(run: Run, judges: Sequence[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
    """How each judge (a judge file filled by a model) answers when the two answers change places.

    ``swap_consistency``: the share of pairs in which both orders prefer the same answer. ``first_position_rate``: the
    mean probability that the answer shown first is better; 0.5 is no position bias. Pairs with a verdict in both orders
    only;
    ``judges`` keeps to those versions of judges (their hash) by those models: the journal has what others said too.
    """
    columns = ("key", "kind", "judge", "judge_hash", "model", "a", "b", "order", "prob_a")
    current = [(pl.col("judge_hash") == version) & (pl.col("model") == model) for version, model in judges or ()]
    verdicts = frames.read_journal_frame(
        run.journal_path("verdicts"),
        {name: frames.VERDICTS[name] for name in columns},
        lambda block: (
            block.filter((pl.col("kind") == "compare") & pl.col("prob_a").is_not_null())
            .filter(pl.any_horizontal(current) if current else True)
            .select(pl.col("key").hash(), pl.struct("a", "b").hash().alias("pair"), "judge", "model", "order", "prob_a")
        ),
    )
    pairs = (
        verdicts.group_by("judge", "model", "pair")
        .agg(
            ab=pl.col("prob_a").filter(pl.col("order") == "ab").mean(),
            ba=pl.col("prob_a").filter(pl.col("order") == "ba").mean(),
        )
        .drop_nulls()
        .with_columns(
            first_position_rate=(pl.col("ab") + 1.0 - pl.col("ba")) / 2.0,
            order_product=(pl.col("ab") - 0.5) * (pl.col("ba") - 0.5),
        )
    )
    stats = pairs.group_by("judge", "model").agg(
        n=pl.len(),
        num_decided=(pl.col("order_product") != 0).sum(),
        swap_consistency=(pl.col("order_product") > 0).sum(),
        first_position_rate=pl.col("first_position_rate").mean(),
        std=pl.col("first_position_rate").std(),
    )
    return [
        {
            "judge": row["judge"],
            "model": row["model"],
            "swap_consistency": wilson(row["swap_consistency"], row["num_decided"]),
            "first_position_rate": _mean_estimate(row["first_position_rate"], row["std"], row["n"]),
        }
        for row in stats.sort("judge", "model").iter_rows(named=True)
    ]


def _mean_estimate(value: float, std: float | None, n: int) -> Estimate:
    """A mean of probabilities with its normal 95 % interval."""
    half = 1.96 * (std or 0.0) / math.sqrt(n)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), n)


def pair_stats(run: Run) -> dict[str, Any]:
    """Counts and histograms over tables/pairs.parquet.

    ``longer_preferred``: the share of kept pairs whose preferred answer is the longer one. ``confidence``,
    ``rating_margin`` and
    ``log2_length_ratio`` are histograms over kept pairs, as lists of {low, high, count}: the probability of the
    preferred answer, its rated score less the other's, and log2 of its length over the other's. ``dropped``: candidates
    left out by reason, without the numbers in the reason.
    """
    frame = (
        pl.scan_parquet(run.pairs_path)
        .select(
            "route",
            "reviewed",
            "preferred",
            "prob_a",
            "rating_margin",
            reason=pl.col("route_reason").str.replace(r":[^:]*\d.*$", ""),
            a=pl.col("response_a").str.len_chars().cast(pl.Int64),
            b=pl.col("response_b").str.len_chars().cast(pl.Int64),
        )
        .collect(engine="streaming")
    )
    towards = pl.when(pl.col("preferred") == "a").then(1.0).otherwise(-1.0)
    kept = frame.filter((pl.col("route") != "dropped") & pl.col("preferred").is_not_null()).with_columns(
        confidence=pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")),
        rating_margin=pl.col("rating_margin") * towards,
        log2_length_ratio=((pl.col("a") + 1) / (pl.col("b") + 1)).log(2) * towards,
    )
    unequal = kept.filter(pl.col("a") != pl.col("b"))
    margins = kept["rating_margin"].drop_nulls()
    awaiting_review = frame.filter(pl.col("route").is_in(["audit", "targeted"]) & ~pl.col("reviewed"))
    dropped = frame.filter(pl.col("route") == "dropped").group_by("reason").len().sort("len", descending=True)
    return {
        "kept": kept.height,
        "longer_preferred": wilson(int((unequal["log2_length_ratio"] > 0).sum()), unequal.height),
        "confidence": histogram(kept["confidence"], [0.5 + i * 0.025 for i in range(BINS + 1)]),
        "rating_margin": histogram(margins, [-4.0 + i * 0.5 for i in range(17)]) if margins.len() else [],
        "log2_length_ratio": histogram(kept["log2_length_ratio"], LENGTH_BINS),
        "dropped": {reason or "no reason recorded": count for reason, count in dropped.iter_rows()},
        "awaiting_review": dict(awaiting_review.group_by("route").len().sort("route").iter_rows()),
    }


def histogram(values: pl.Series, edges: Sequence[float]) -> list[dict[str, float]]:
    """How many ``values`` lie between neighbouring ``edges``; what lies outside stands in the first or last bin."""
    inside = values.drop_nulls().clip(edges[0], edges[-1])
    counts = [
        int(((inside >= low) & ((inside < high) | ((high == edges[-1]) & (inside == high)))).sum())
        for low, high in pairwise(edges)
    ]
    bins = zip(pairwise(edges), counts, strict=True)
    return [{"low": low, "high": high, "count": count} for (low, high), count in bins]


SAMPLES_PER_ROUTE = {"audit": 5, "targeted": 5, "judge": 7, "dropped": 3}


def sample_pairs(run: Run, *, seed: int = 0) -> list[dict[str, Any]]:
    """Twenty pairs with their texts, drawn at random within each route; where one has fewer, the others give more."""
    from rlaif.records import hash_to_unit_interval

    candidates = pl.scan_parquet(run.pairs_path).select("pair_id", "route").collect(engine="streaming")
    sampled: list[str] = []
    spare: list[str] = []
    for route, quota in SAMPLES_PER_ROUTE.items():
        pair_ids = candidates.filter(pl.col("route") == route)["pair_id"]
        # Ids are hashes, so any part of them is a random one; only so many are drawn from as to choose by seed.
        pool = pair_ids.sort().gather_every(max(1, pair_ids.len() // 1000)).to_list()
        pool.sort(key=lambda pair_id: hash_to_unit_interval(seed, "sample", pair_id))
        sampled += pool[:quota]
        spare += pool[quota:]
    sampled += spare[: sum(SAMPLES_PER_ROUTE.values()) - len(sampled)]
    rows = pl.scan_parquet(run.pairs_path).filter(pl.col("pair_id").is_in(sampled)).collect(engine="streaming")
    return sorted(rows.to_dicts(), key=lambda row: (list(SAMPLES_PER_ROUTE).index(row["route"]), row["pair_id"]))
