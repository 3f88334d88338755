"""People's labels put the panel right: how much each seat counts, and what an answer's length is worth.

logit P(a better) = sum over seats of w_j logit p_j + w x tanh(log(length of a / length of b)): each term turns its sign
when a and b change places, so that a pair and the same pair turned get opposite labels. The weights start from the
panel's own (and nothing for length), which count as ``PRIOR_LABELS`` labels do, so that few labels change little and
many decide. A pair's own label never calibrates it: labelled pairs are predicted from the other prompts' labels. Labels
are not weighted by their inclusion probability: which pairs people saw depends on nothing but what the model conditions
on, so the fit is consistent as it is, and weights would only make it noisier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from rlaif.records import hash_to_unit_interval
from rlaif.stats import cross_fit, fit_antisymmetric_logistic
from rlaif.stats.calibration import CLIP, logit
from rlaif.stats.intervals import Floats

MIN_LABELS = 30
PRIOR_LABELS = 10
MAX_LOGIT = float(logit(1 - CLIP))
"""The logit of a verdict without doubt: the unit of all features."""
FOLDS = 10
REASON_HUMAN_CALIBRATED = "the judges could not tell; people's labels of other pairs do"


@dataclass(frozen=True)
class Calibration:
    """``weights`` by seat, and of ``length``; from ``n`` labels. ``flipped``: pairs that now have the other label."""

    weights: dict[str, float]
    n: int
    flipped: int = 0
    near_ties: int = 0


def calibration_features(pairs: pl.DataFrame, judge_votes: pl.DataFrame) -> tuple[Floats, list[str], Floats]:
    """The features of ``pairs`` (a, b, prob_a, chars_a, chars_b), their names, and the weights to start from. A seat
    that said nothing of a pair stands in with the panel's probability; without seats that is the only one."""
    panel_logit = logit(pairs["prob_a"].to_numpy())
    names, columns, weights = [], [], []
    votes = judge_votes.with_columns(p=(pl.col("p_ab") + pl.col("p_ba")) / 2.0)
    for (judge,), rows in sorted(votes.partition_by("panel_judge", as_dict=True).items()):
        p = pairs.select("a", "b").join(rows.select("a", "b", "p"), on=["a", "b"], how="left", maintain_order="left")[
            "p"
        ]
        columns.append(np.where(p.is_null(), panel_logit, logit(p.fill_null(0.5).to_numpy())))
        names.append(str(judge))
        weights.append(float(rows["weight"][0]))
    if not names:
        columns, names, weights = [panel_logit], ["ratings"], [1.0]
    chars_a, chars_b = (pairs[name].to_numpy().astype(float) for name in ("chars_a", "chars_b"))
    columns.append((chars_a**2 - chars_b**2) / np.maximum(1.0, chars_a**2 + chars_b**2) * MAX_LOGIT)
    prior = np.array([*(weight / sum(weights) for weight in weights), 0.0])
    return np.column_stack(columns), [*names, "length"], prior


def fit_and_predict(x: Floats, prior: Floats, labels: Floats, prompts: pl.Series) -> tuple[Floats, Floats]:
    """P(a better) for each row of features, cross-fitted by prompt, and the weights from all labels. ``labels``: 1, 0
    or nan."""
    l2 = PRIOR_LABELS * MAX_LOGIT**2 / 4.0  # what PRIOR_LABELS verdicts without doubt, about an even pair, would weigh
    labeled = ~np.isnan(labels)
    folds = [int(FOLDS * hash_to_unit_interval("fold", prompt)) if is_labeled else -1
             for prompt, is_labeled in zip(prompts, labeled, strict=True)]  # fmt: skip
    return (
        cross_fit(x, labels, folds, prior, l2=l2),
        fit_antisymmetric_logistic(x[labeled], labels[labeled], prior, l2=l2),
    )


def apply_human_calibration(
    pairs: pl.DataFrame,
    judge_votes: pl.DataFrame,
    labels: pl.DataFrame,
    *,
    min_confidence: float,
    max_tie_drop_fraction: float,
    num_judged: int,
    num_dropped: int = 0,
) -> tuple[pl.DataFrame, Calibration | None]:
    """Routed ``pairs`` settled anew from people's labels (pair_id, label), where there are ``MIN_LABELS`` of them.

    prob_a and preferred change; a pair labelled by judges that is a near-tie now is dropped, as far as
    ``max_tie_drop_fraction`` allows, and one that was kept though the judges could not tell has a label. What a check
    decided stays. The columns prob_a_by_judges and preferred_by_judges keep what was known before. ``num_judged``: how
    many pairs there are that could be judged, and ``num_dropped``: how many of them were left out as near-ties,
    ``pairs`` not counted.
    """
    pairs = pairs.with_columns(prob_a_by_judges="prob_a", preferred_by_judges="preferred")
    undecided = (
        (pl.col("route") == "dropped")
        & pl.col("preferred").is_null()
        & pl.col("inclusion_probability").is_not_null()
        & pl.col("human_only_reason").is_null()
    )
    pairs = pairs.with_columns(undecided=undecided)
    adjustable = ((pl.col("route") != "dropped") | pl.col("undecided")) & (pl.col("decided_by") != "check")
    rows = pairs.filter(adjustable).join(
        labels.select("pair_id", "label"), on="pair_id", how="left", maintain_order="left"
    )
    label = rows.select(
        pl.when(pl.col("label") == "a").then(1.0).when(pl.col("label") == "b").then(0.0).otherwise(float("nan"))
    ).to_series().to_numpy()  # fmt: skip
    n = int((~np.isnan(label)).sum())
    if n < MIN_LABELS:
        return pairs.drop("undecided"), None
    x, names, prior = calibration_features(rows, judge_votes)
    p, weights = fit_and_predict(x, prior, label, rows["prompt_id"])
    rows = rows.with_columns(pl.Series("new_prob_a", p)).with_columns(
        near_tie=pl.max_horizontal("new_prob_a", 1.0 - pl.col("new_prob_a")) < min_confidence
    )
    num_dropped += pairs.filter(
        pl.col("outcome").is_in(["tie", "inconsistent"]), pl.col("route") == "dropped", ~pl.col("undecided")
    ).height
    allowed = max(0, int(max_tie_drop_fraction * num_judged) - num_dropped)
    near_ties = (
        rows.filter(pl.col("near_tie") & ((pl.col("route") == "judge") | pl.col("undecided")))
        .sort(pl.max_horizontal("new_prob_a", 1.0 - pl.col("new_prob_a")).round(9), "pair_id")
        .head(allowed)
    )
    updates = rows.select("pair_id", "new_prob_a", near_tie=pl.col("pair_id").is_in(near_ties["pair_id"].implode()))
    result = pairs.join(updates, on="pair_id", how="left", maintain_order="left")
    prob_a, newly_dropped = pl.coalesce("new_prob_a", "prob_a"), pl.col("near_tie").fill_null(False)
    reason = pl.format("near-tie by what people say: p {} is below {}",
                       pl.max_horizontal(prob_a, 1.0 - prob_a).round(3), pl.lit(min_confidence))  # fmt: skip
    newly_labeled = pl.col("undecided") & pl.col("new_prob_a").is_not_null() & (pl.col("new_prob_a") != 0.5)
    result = result.with_columns(
        prob_a=prob_a,
        preferred=pl.when(pl.col("new_prob_a").is_null() | (pl.col("new_prob_a") == 0.5))
        .then("preferred")
        .when(pl.col("new_prob_a") > 0.5)
        .then(pl.lit("a"))
        .otherwise(pl.lit("b")),
        route=pl.when(newly_dropped)
        .then(pl.lit("dropped"))
        .when(newly_labeled)
        .then(pl.lit("judge"))
        .otherwise("route"),
        route_reason=pl.when(newly_dropped)
        .then(reason)
        .when(newly_labeled)
        .then(pl.lit(REASON_HUMAN_CALIBRATED))
        .otherwise("route_reason"),
    ).drop("new_prob_a", "near_tie", "undecided")
    flipped = result.filter(pl.col("route") == "judge", pl.col("preferred") != pl.col("preferred_by_judges")).height
    return result, Calibration(
        dict(zip(names, (round(float(w), 4) for w in weights), strict=True)), n, flipped, near_ties.height
    )
