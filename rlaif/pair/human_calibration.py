"""Calibrate the panel with human labels: the weight of each judge, and the effect of an answer's length.

logit P(a better) = sum over judges of w_j logit p_j + w x tanh(log(length of a / length of b)). Each term changes its
sign when a and b are swapped, so a pair and the swapped pair get opposite labels. The weights start from the panel's
(and zero for length), which count as ``PRIOR_LABELS`` labels, so few labels change little and many labels decide. A
pair's own label never calibrates it: labeled pairs are predicted from the labels of other prompts. Labels are not
weighted by their inclusion probability. Which pairs were reviewed depends only on what the model conditions on, so the
unweighted fit is consistent, and weights would only add noise.
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
"""Logit of the most confident verdict: the unit of all features."""
FOLDS = 10
REASON_HUMAN_CALIBRATED = "the judges could not decide; human labels of other pairs do"


@dataclass(frozen=True)
class Calibration:
    """Result of the calibration with ``n`` labels.

    ``weights``: by panel judge, and of ``length``. ``flipped``: pairs whose label changed. ``near_ties``: pairs dropped
    because they became near ties.
    """

    weights: dict[str, float]
    n: int
    flipped: int = 0
    near_ties: int = 0


def calibration_features(pairs: pl.DataFrame, judge_votes: pl.DataFrame) -> tuple[Floats, list[str], Floats]:
    """Return the features of ``pairs`` (a, b, prob_a, chars_a, chars_b), their names, and the initial weights.

    A judge without a vote on a pair gets the panel's probability. Without judges that is the only feature besides
    length.
    """
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
    """Return P(a better) for each row of features, cross-fitted by prompt, and the weights fitted to all labels.

    ``labels``: 1, 0 or nan.
    """
    l2 = PRIOR_LABELS * MAX_LOGIT**2 / 4.0  # information in PRIOR_LABELS fully confident verdicts on an even pair
    labeled = ~np.isnan(labels)
    folds = [
        int(FOLDS * hash_to_unit_interval("fold", prompt)) if is_labeled else -1
        for prompt, is_labeled in zip(prompts, labeled, strict=True)
    ]
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
    num_lost: int = 0,
) -> tuple[pl.DataFrame, Calibration | None]:
    """Re-aggregate routed ``pairs`` from human ``labels`` (pair_id, label), if there are at least ``MIN_LABELS``.

    prob_a and preferred change. A judge-labeled pair that becomes a near tie is dropped, as far as
    ``max_tie_drop_fraction`` allows, and a kept pair on which the judges could not decide gets a label. Decisions by a
    check stay. The columns prob_a_by_judges and preferred_by_judges keep the earlier values. ``num_judged``: judged
    prompts; ``num_lost``: those that have already lost their pair to near ties.
    """
    pairs = pairs.with_columns(prob_a_by_judges="prob_a", preferred_by_judges="preferred")
    pairs = pairs.with_columns(undecided=(pl.col("drop_reason") == "undecided").fill_null(False))
    rows, label = _calibrated_rows(pairs, labels)
    n = int((~np.isnan(label)).sum())
    if n < MIN_LABELS:
        return pairs.drop("undecided"), None
    x, names, prior = calibration_features(rows, judge_votes)
    p, weights = fit_and_predict(x, prior, label, rows["prompt_id"])
    rows = rows.with_columns(pl.Series("new_prob_a", p))
    allowed = max(0, int(max_tie_drop_fraction * num_judged + 1e-9) - num_lost)
    predictions = rows.select("pair_id", "new_prob_a")
    predicted = pairs.join(predictions, on="pair_id", how="left", maintain_order="left")
    near_ties = _near_ties_to_drop(predicted, min_confidence, allowed)
    result = _apply_predictions(pairs, rows, near_ties)
    flipped = result.filter(pl.col("route") == "judge", pl.col("preferred") != pl.col("preferred_by_judges")).height
    weight_by_name = dict(zip(names, (round(float(w), 4) for w in weights), strict=True))
    return result, Calibration(weight_by_name, n, flipped, near_ties.len())


def _calibrated_rows(pairs: pl.DataFrame, labels: pl.DataFrame) -> tuple[pl.DataFrame, Floats]:
    """Return the pairs whose probability calibration may change, and the label of each: 1 (a), 0 (b) or nan."""
    adjustable = ((pl.col("route") != "dropped") | pl.col("undecided")) & (pl.col("decided_by") != "check")
    rows = pairs.filter(adjustable).join(
        labels.select("pair_id", "label"), on="pair_id", how="left", maintain_order="left"
    )
    label = pl.when(pl.col("label") == "a").then(1.0).when(pl.col("label") == "b").then(0.0).otherwise(float("nan"))
    return rows, rows.select(label).to_series().to_numpy()


def _near_ties_to_drop(pairs: pl.DataFrame, min_confidence: float, allowed: int) -> pl.Series:
    """Return the ids of the judge-labeled pairs that became near ties and are dropped.

    At most ``allowed`` prompts lose their last pair by that, those with the least confident near ties. A prompt beyond
    that keeps its most confident one, and a prompt that keeps another pair keeps none. ``pairs``: all pairs, with
    ``new_prob_a`` (null if it does not change).
    """
    confidence = pl.max_horizontal("new_prob_a", 1.0 - pl.col("new_prob_a")).round(9)
    is_tie = ((confidence < min_confidence) & ((pl.col("route") == "judge") | pl.col("undecided"))).fill_null(False)
    is_labeled = (pl.col("route") != "dropped") | (pl.col("undecided") & pl.col("new_prob_a").is_not_null())
    has_other_pair = (is_labeled & ~is_tie).any().over("prompt_id")
    near_ties = (
        pairs.with_columns(confidence=confidence, is_tie=is_tie, has_other_pair=has_other_pair)
        .filter("is_tie")
        .sort("confidence", "pair_id", descending=[True, False])
        .with_columns(is_most_confident=pl.int_range(pl.len()).over("prompt_id") == 0)
    )
    last_pairs = near_ties.filter("is_most_confident", ~pl.col("has_other_pair"))
    kept = last_pairs.head(max(0, last_pairs.height - allowed))
    return near_ties.join(kept.select("pair_id"), on="pair_id", how="anti", maintain_order="left")["pair_id"]


def _apply_predictions(pairs: pl.DataFrame, rows: pl.DataFrame, near_ties: pl.Series) -> pl.DataFrame:
    """Replace prob_a, preferred and route of ``pairs`` by the predictions in ``rows`` (pair_id, new_prob_a)."""
    predictions = rows.select("pair_id", "new_prob_a")
    result = pairs.join(predictions, on="pair_id", how="left", maintain_order="left")
    new_prob_a = pl.col("new_prob_a")
    is_near_tie = pl.col("pair_id").is_in(near_ties.implode())
    newly_labeled = pl.col("undecided") & new_prob_a.is_not_null() & (new_prob_a != 0.5)
    return result.with_columns(
        prob_a=pl.coalesce("new_prob_a", "prob_a"),
        preferred=pl.when(new_prob_a.is_null() | (new_prob_a == 0.5))
        .then("preferred")
        .when(new_prob_a > 0.5)
        .then(pl.lit("a"))
        .otherwise(pl.lit("b")),
        route=pl.when(is_near_tie).then(pl.lit("dropped")).when(newly_labeled).then(pl.lit("judge")).otherwise("route"),
        drop_reason=pl.when(is_near_tie)
        .then(pl.lit("near_tie_after_calibration"))
        .when(~newly_labeled)
        .then("drop_reason"),
        route_reason=pl.when(newly_labeled).then(pl.lit(REASON_HUMAN_CALIBRATED)).otherwise("route_reason"),
    ).drop("new_prob_a", "undecided")
