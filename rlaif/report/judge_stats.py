"""Statistics of verdicts and pairs that need no human labels, from the journals and tables/pairs.parquet.

They show position bias, preference for length, confidence, and why pairs were dropped. All rows count. Frames hold
numbers only, so texts are never all in memory. Shares are :class:`rlaif.stats.Estimate`, counted by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import polars as pl

from rlaif.records import hash_to_unit_interval
from rlaif.run import frames
from rlaif.run.human_labels import human_labels
from rlaif.run.run import Run
from rlaif.stats import Estimate, bounded_mean_of_moments, wilson

CONFIDENCE_BINS = [0.5 + i * 0.025 for i in range(21)]
MARGIN_BINS = [-4.0 + i * 0.5 for i in range(17)]
LENGTH_BINS = [-3.0 + i * 0.5 for i in range(13)]
SAMPLES_PER_ROUTE = {"audit": 5, "targeted": 5, "judge": 7, "dropped": 3}


@dataclass(frozen=True, slots=True)
class PositionStats:
    """Position bias of one judge with one model, over pairs that have a verdict in both orders."""

    judge: str
    model: str
    swap_consistency: Estimate | None
    """Share of the decided pairs in which both orders prefer the same answer"""
    first_position_rate: Estimate
    """Mean probability that the answer shown first is better; 0.5 without bias"""


@dataclass(frozen=True, slots=True)
class HistogramBin:
    """Number of values in one interval."""

    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStats:
    """Counts and histograms of the candidate pairs. The histograms are over kept pairs."""

    kept: int
    longer_preferred: Estimate | None
    """Share of the kept pairs whose preferred answer is the longer one"""
    confidence: list[HistogramBin]
    """Probability of the preferred answer"""
    rating_margin: list[HistogramBin]
    """Score of the preferred answer minus the other's; empty without ratings"""
    log2_length_ratio: list[HistogramBin]
    """log2 of the preferred answer's length over the other's"""
    drop_reasons: dict[str, int]
    """Dropped pairs by :data:`rlaif.records.PairDropReason`"""
    awaiting_review: dict[str, int]
    """Queued pairs without a human label, by route"""


def position_stats(run: Run, judges: Sequence[tuple[str, str]] | None = None) -> list[PositionStats]:
    """Measure how each judge answers when the two answers change places.

    ``judges``: the current judges as (judge hash, model). Verdicts of others in the journal are ignored.
    """
    pairs = (
        _read_comparisons(run, judges)
        .group_by("judge", "model", "pair")
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
        variance=pl.col("first_position_rate").var(ddof=0),
    )
    return [
        PositionStats(
            judge=row["judge"],
            model=row["model"],
            swap_consistency=wilson(row["swap_consistency"], row["num_decided"]),
            first_position_rate=bounded_mean_of_moments(row["first_position_rate"], row["variance"], row["n"]),
        )
        for row in stats.sort("judge", "model").iter_rows(named=True)
    ]


def _read_comparisons(run: Run, judges: Sequence[tuple[str, str]] | None) -> pl.DataFrame:
    """Read the comparisons by ``judges``. Columns: key and pair (hashed), judge, model, order, prob_a."""
    columns = ("key", "kind", "judge", "judge_hash", "model", "a", "b", "order", "prob_a")
    current = [(pl.col("judge_hash") == judge_hash) & (pl.col("model") == model) for judge_hash, model in judges or ()]
    return frames.read_journal_frame(
        run.journal_path("verdicts"),
        {name: frames.VERDICTS[name] for name in columns},
        lambda block: (
            block.filter((pl.col("kind") == "compare") & pl.col("prob_a").is_not_null())
            .filter(pl.any_horizontal(current) if current else True)
            .select(pl.col("key").hash(), pl.struct("a", "b").hash().alias("pair"), "judge", "model", "order", "prob_a")
        ),
    )


def pair_stats(run: Run) -> PairStats:
    """Count the pairs of tables/pairs.parquet. Labels given since it was written count as reviewed."""
    frame = _read_pairs(run)
    kept = _kept_pairs(frame)
    unequal = kept.filter(pl.col("a") != pl.col("b"))
    margins = kept["rating_margin"].drop_nulls()
    labeled_ids = human_labels(run.reviews())["pair_id"]
    awaiting_review = frame.filter(
        pl.col("route").is_in(["audit", "targeted"]),
        ~pl.col("reviewed"),
        ~pl.col("pair_id").is_in(labeled_ids.implode()),
    )
    return PairStats(
        kept=kept.height,
        longer_preferred=wilson(int((unequal["log2_length_ratio"] > 0).sum()), unequal.height),
        confidence=histogram(kept["confidence"], CONFIDENCE_BINS),
        rating_margin=histogram(margins, MARGIN_BINS) if margins.len() else [],
        log2_length_ratio=histogram(kept["log2_length_ratio"], LENGTH_BINS),
        drop_reasons=_counts(frame.drop_nulls("drop_reason"), "drop_reason"),
        awaiting_review=dict(sorted(_counts(awaiting_review, "route").items())),
    )


def _read_pairs(run: Run) -> pl.DataFrame:
    """Read the columns that are counted; ``a`` and ``b`` are the answers' lengths in characters."""
    return (
        pl.scan_parquet(run.pairs_path)
        .select(
            "pair_id",
            "route",
            "drop_reason",
            "reviewed",
            "preferred",
            "prob_a",
            "rating_margin",
            a=pl.col("response_a").str.len_chars().cast(pl.Int64),
            b=pl.col("response_b").str.len_chars().cast(pl.Int64),
        )
        .collect(engine="streaming")
    )


def _kept_pairs(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the kept pairs that have a preferred answer, with their figures seen from that answer."""
    towards = pl.when(pl.col("preferred") == "a").then(1.0).otherwise(-1.0)
    return pairs.filter((pl.col("route") != "dropped") & pl.col("preferred").is_not_null()).with_columns(
        confidence=pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")),
        rating_margin=pl.col("rating_margin") * towards,
        log2_length_ratio=((pl.col("a") + 1) / (pl.col("b") + 1)).log(2) * towards,
    )


def _counts(rows: pl.DataFrame, column: str) -> dict[str, int]:
    """Count the values of ``column``, the most frequent first."""
    return dict(rows.group_by(column).len().sort(["len", column], descending=[True, False]).iter_rows())


def histogram(values: pl.Series, edges: Sequence[float]) -> list[HistogramBin]:
    """Count ``values`` between neighboring ``edges``. Values outside count in the first or last bin."""
    inside = values.drop_nulls().clip(edges[0], edges[-1])
    return [
        HistogramBin(low, high, int(((inside >= low) & ((inside < high) | (high == edges[-1]))).sum()))
        for low, high in pairwise(edges)
    ]


def sample_pairs(run: Run, *, seed: int = 0) -> list[dict[str, Any]]:
    """Draw twenty pairs with their texts, at random within each route; other routes fill the gaps."""
    candidates = pl.scan_parquet(run.pairs_path).select("pair_id", "route").collect(engine="streaming")
    sampled: list[str] = []
    spare: list[str] = []
    for route, quota in SAMPLES_PER_ROUTE.items():
        pair_ids = candidates.filter(pl.col("route") == route)["pair_id"]
        # Ids are hashes, so evenly spaced ones are a random sample; the seed then chooses among about a thousand.
        pool = pair_ids.sort().gather_every(max(1, pair_ids.len() // 1000)).to_list()
        pool.sort(key=lambda pair_id: hash_to_unit_interval(seed, "sample", pair_id))
        sampled += pool[:quota]
        spare += pool[quota:]
    sampled += spare[: sum(SAMPLES_PER_ROUTE.values()) - len(sampled)]
    rows = pl.scan_parquet(run.pairs_path).filter(pl.col("pair_id").is_in(sampled)).collect(engine="streaming")
    return sorted(rows.to_dicts(), key=lambda row: (list(SAMPLES_PER_ROUTE).index(row["route"]), row["pair_id"]))
