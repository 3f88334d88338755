"""Ninety and ten: which kept pairs go to people, and for what reason.

Of N kept pairs, round(share x N) go to the queue. First an audit slice, a simple random sample with its inclusion
probability stored: the only rows from which agreement may be estimated. Then a targeted slice: those whose label is
most likely wrong, what is at stake counted in. Both depend on the seed and the pair's id, not on the order of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from rlaif.records import unit_interval

AUDIT_GOAL = 250
STAKES = {"safety": 2.0, "harmful": 2.0, "borderline": 2.0, "legal": 2.0, "law": 2.0, "medical": 2.0, "medicine": 2.0}


def sizes(kept: int, human_share: float, audited: int) -> tuple[int, int]:
    """How many pairs are audited and how many are targeted. Half of the budget is audit until ``AUDIT_GOAL`` audited
    labels exist, then a quarter."""
    budget = round(human_share * kept)
    audit = budget / 2 if audited < AUDIT_GOAL else budget / 4
    audit = min(budget, max(1, round(audit))) if budget else 0
    return audit, budget - audit


def route(settled: pl.DataFrame, tags: pl.DataFrame, *, human_share: float, seed: int, audited: int) -> pl.DataFrame:
    """``settled`` (with pair_id) plus route, route_reason and inclusion_probability.

    ``tags``: prompt_id and tags (list of str). ``audited``: audited labels that exist for these judges.
    """
    kept = settled.filter("kept")
    audit_size, targeted_size = sizes(kept.height, human_share, audited)
    draw = pl.Series("draw", [unit_interval(seed, "audit", pair) for pair in kept["pair_id"]], dtype=pl.Float64)
    kept = kept.with_columns(draw).sort("draw", "pair_id")
    audit = kept.head(audit_size).with_columns(
        route=pl.lit("audit"),
        route_reason=pl.lit(f"random sample of {audit_size} from {kept.height}"),
        inclusion_probability=pl.lit(audit_size / max(1, kept.height)),
    )
    rest = kept.slice(audit_size).join(tags, on="prompt_id", how="left", maintain_order="left")
    wrong = 1.0 - pl.max_horizontal("p_a", 1.0 - pl.col("p_a"))
    stakes = _stakes(rest["tags"]) if rest.height else pl.Series("stakes", [], dtype=pl.Float64)
    speaks = pl.col("flags").list.len().fill_null(0) > 0
    rest = rest.with_columns(stakes.alias("stakes"), wrong=wrong).with_columns(
        # An answer that speaks to the judge may have persuaded it: as good as a coin until a person has looked.
        risk=pl.when(speaks).then(pl.max_horizontal("wrong", pl.lit(0.5))).otherwise("wrong") * pl.col("stakes")
    )
    rest = rest.sort(["risk", "draw", "pair_id"], descending=[True, False, False])
    reason = (
        pl.when(speaks)
        .then(pl.col("flags").list.join("; "))
        .otherwise(pl.format("chance of a wrong label {}", pl.col("wrong").round(3).cast(pl.String)))
    )
    reason = pl.when(pl.col("stakes") > 1).then(pl.format("{}, at stake x{}", reason, "stakes")).otherwise(reason)
    targeted = rest.head(targeted_size).with_columns(
        route=pl.lit("targeted"), route_reason=reason, inclusion_probability=pl.lit(None, pl.Float64)
    )
    judged = rest.slice(targeted_size).with_columns(
        route=pl.lit("judge"),
        route_reason=pl.lit("judges are sure enough"),
        inclusion_probability=pl.lit(None, pl.Float64),
    )
    dropped = settled.filter(~pl.col("kept")).with_columns(
        route=pl.lit("dropped"), route_reason=pl.col("why"), inclusion_probability=pl.lit(None, pl.Float64)
    )
    columns = [*settled.columns, "route", "route_reason", "inclusion_probability"]
    return pl.concat([frame.select(columns) for frame in (audit, targeted, judged, dropped)]).sort("pair_id")


def _stakes(tags: pl.Series) -> pl.Series:
    def worth(names: Sequence[str] | None) -> float:
        return max((STAKES.get(name.casefold(), 1.0) for name in names or ()), default=1.0)

    return pl.Series("stakes", [worth(names) for names in tags.to_list()], dtype=pl.Float64)
