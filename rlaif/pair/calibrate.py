"""People's labels put the panel right: how much each seat counts, and what an answer's length is worth.

logit P(a better) = sum over seats of w_j logit p_j + w x tanh(log(length of a / length of b)): each term turns its sign
when a and b change places, so that a pair and the same pair turned get opposite labels. The weights start from the
panel's own (and nothing for length), which count as ``PRIOR`` labels do, so that few labels change little and many
decide. A pair's own label never calibrates it: labelled pairs are predicted from the other prompts' labels. Labels are
not weighted by their inclusion probability: which pairs people saw depends on nothing but what the model conditions on,
so the fit is consistent as it is, and weights would only make it noisier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from rlaif.records import unit_interval
from rlaif.stats import antisymmetric, cross_fitted
from rlaif.stats.calibration import CLIP, logit
from rlaif.stats.intervals import Floats

MIN_LABELS = 30
PRIOR = 10
SURE = float(logit(1 - CLIP))
"""The logit of a verdict without doubt: the unit of all features."""
FOLDS = 10
TOLD = "the judges could not tell; people's labels of other pairs do"


@dataclass(frozen=True)
class Calibration:
    """``weights`` by seat, and of ``length``; from ``n`` labels. ``flipped``: pairs that now have the other label."""

    weights: dict[str, float]
    n: int
    flipped: int = 0
    near_ties: int = 0


def features(pairs: pl.DataFrame, seats: pl.DataFrame) -> tuple[Floats, list[str], Floats]:
    """The features of ``pairs`` (a, b, p_a, chars_a, chars_b), their names, and the weights to start from. A seat that
    said nothing of a pair stands in with the panel's probability; without seats that is the only one."""
    panel = logit(pairs["p_a"].to_numpy())
    names, columns, weights = [], [], []
    known = seats.with_columns(p=(pl.col("p_ab") + pl.col("p_ba")) / 2.0)
    for (seat,), said in sorted(known.partition_by("seat", as_dict=True).items()):
        p = pairs.select("a", "b").join(said.select("a", "b", "p"), on=["a", "b"], how="left", maintain_order="left")[
            "p"
        ]
        columns.append(np.where(p.is_null(), panel, logit(p.fill_null(0.5).to_numpy())))
        names.append(str(seat))
        weights.append(float(said["weight"][0]))
    if not names:
        columns, names, weights = [panel], ["ratings"], [1.0]
    first, second = (pairs[name].to_numpy().astype(float) for name in ("chars_a", "chars_b"))
    columns.append((first**2 - second**2) / np.maximum(1.0, first**2 + second**2) * SURE)
    prior = np.array([*(weight / sum(weights) for weight in weights), 0.0])
    return np.column_stack(columns), [*names, "length"], prior


def calibrated(x: Floats, prior: Floats, labels: Floats, prompts: pl.Series) -> tuple[Floats, Floats]:
    """P(a better) for each row of features, cross-fitted by prompt, and the weights from all labels. ``labels``: 1, 0
    or nan."""
    l2 = PRIOR * SURE**2 / 4.0  # what PRIOR verdicts without doubt, about an even pair, would weigh
    labelled = ~np.isnan(labels)
    folds = [int(FOLDS * unit_interval("fold", prompt)) if known else -1
             for prompt, known in zip(prompts, labelled, strict=True)]  # fmt: skip
    return (
        cross_fitted(x, labels, folds, prior, l2=l2),
        antisymmetric(x[labelled], labels[labelled], prior, l2=l2),
    )


def recalibrate(
    pairs: pl.DataFrame,
    seats: pl.DataFrame,
    labels: pl.DataFrame,
    *,
    min_probability: float,
    max_near_ties: float,
    judged: int,
    dropped: int = 0,
) -> tuple[pl.DataFrame, Calibration | None]:
    """Routed ``pairs`` settled anew from people's labels (pair_id, label), where there are ``MIN_LABELS`` of them.

    p_a and preferred change; a pair labelled by judges that is a near-tie now is dropped, as far as ``max_near_ties``
    allows, and one that was kept though the judges could not tell has a label. What a check decided stays. The columns
    p_said and preferred_said keep what was known before. ``judged``: how many pairs there are that could be judged,
    and ``dropped``: how many of them were left out as near-ties, ``pairs`` not counted.
    """
    pairs = pairs.with_columns(p_said="p_a", preferred_said="preferred")
    undecided = (
        (pl.col("route") == "dropped")
        & pl.col("preferred").is_null()
        & pl.col("inclusion_probability").is_not_null()
        & pl.col("only_people").is_null()
    )
    pairs = pairs.with_columns(undecided=undecided)
    open_ = ((pl.col("route") != "dropped") | pl.col("undecided")) & (pl.col("by") != "check")
    some = pairs.filter(open_).join(labels.select("pair_id", "label"), on="pair_id", how="left", maintain_order="left")
    label = some.select(
        pl.when(pl.col("label") == "a").then(1.0).when(pl.col("label") == "b").then(0.0).otherwise(float("nan"))
    ).to_series().to_numpy()  # fmt: skip
    n = int((~np.isnan(label)).sum())
    if n < MIN_LABELS:
        return pairs.drop("undecided"), None
    x, names, prior = features(some, seats)
    p, weights = calibrated(x, prior, label, some["prompt_id"])
    some = some.with_columns(pl.Series("p_new", p)).with_columns(
        near=pl.max_horizontal("p_new", 1.0 - pl.col("p_new")) < min_probability
    )
    dropped += pairs.filter(
        pl.col("outcome").is_in(["tie", "inconsistent"]), pl.col("route") == "dropped", ~pl.col("undecided")
    ).height
    allowed = max(0, int(max_near_ties * judged) - dropped)
    near = (
        some.filter(pl.col("near") & ((pl.col("route") == "judge") | pl.col("undecided")))
        .sort(pl.max_horizontal("p_new", 1.0 - pl.col("p_new")).round(9), "pair_id")
        .head(allowed)
    )
    new = some.select("pair_id", "p_new", near=pl.col("pair_id").is_in(near["pair_id"].implode()))
    both = pairs.join(new, on="pair_id", how="left", maintain_order="left")
    p_a, gone = pl.coalesce("p_new", "p_a"), pl.col("near").fill_null(False)
    reason = pl.format("near-tie by what people say: p {} is below {}",
                       pl.max_horizontal(p_a, 1.0 - p_a).round(3), pl.lit(min_probability))  # fmt: skip
    told = pl.col("undecided") & pl.col("p_new").is_not_null() & (pl.col("p_new") != 0.5)
    both = both.with_columns(
        p_a=p_a,
        preferred=pl.when(pl.col("p_new").is_null() | (pl.col("p_new") == 0.5))
        .then("preferred")
        .when(pl.col("p_new") > 0.5)
        .then(pl.lit("a"))
        .otherwise(pl.lit("b")),
        route=pl.when(gone).then(pl.lit("dropped")).when(told).then(pl.lit("judge")).otherwise("route"),
        route_reason=pl.when(gone).then(reason).when(told).then(pl.lit(TOLD)).otherwise("route_reason"),
    ).drop("p_new", "near", "undecided")
    flipped = both.filter(pl.col("route") == "judge", pl.col("preferred") != pl.col("preferred_said")).height
    return both, Calibration(
        dict(zip(names, (round(float(w), 4) for w in weights), strict=True)), n, flipped, near.height
    )
