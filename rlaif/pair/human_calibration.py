"""Calibrate the panel with human labels: the weight of each judge, and the effect of an answer's length.

**Model.** logit P(a better) = sum over judges of w_j logit p_j + w x tanh(log(length of a / length of b)). Each term
changes its sign when a and b are swapped, so a pair and the swapped pair get opposite labels. The weights start from
the panel's (and zero for length), which count as ``PRIOR_LABELS`` labels, so few labels change little and many labels
decide. A pair's own label never predicts it: labeled pairs are predicted from the labels of other prompts.

**Selection.** Routing chooses pairs because they are different, so labels of reviewed pairs do not speak for the
others without further ado. Three rules follow.

- Pairs of a kind that routing forces to people (:data:`GROUPS`) are fitted, tested and changed apart from all others.
  Pairs that only people may decide calibrate nothing.
- All else that routing selects by (confidence, stakes, topic, suspicion) is in the inclusion probability pi. Each label
  weighs pi ** -FLATTENING (Shimodaira 2000): between no weights, which are biased if the model is wrong anywhere, and
  1 / pi, which a few labels would decide. The weights sum to the effective number of labels (Kish 1965).
- Nothing changes unless it helps on held-out labels: :func:`held_out_gain`. Only labels drawn by chance (pi < 1) count
  in this test, each for the (1 - pi) / pi similar unreviewed pairs, which makes the test valid no matter
  whether the model is (Sugiyama, Krauledat and Müller 2007). Labels outside the queue have no inclusion probability, so
  they are not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from rlaif.records import hash_to_unit_interval
from rlaif.stats import Estimate, cross_fit, fit_antisymmetric_logistic, ppi_mean
from rlaif.stats.calibration import CLIP, logit
from rlaif.stats.intervals import Floats, normal_quantile, student_t_quantile

MIN_LABELS = 30
PRIOR_LABELS = 10
MAX_LOGIT = float(logit(1 - CLIP))
"""Logit of the most confident verdict: the unit of all features."""
FOLDS = 10
FLATTENING = 0.5
MIN_EFFECTIVE_LABELS = 5
"""Effective number of labels drawn by chance below which calibration is not tested, and so not applied."""
TEST_CONFIDENCE = 0.90
"""Confidence of the two intervals of the test. A calibration that helps neither loss passes with a probability of at
most 2 x 5 %."""
GROUPS = ("decided", "undecided", "flagged")
"""Groups of pairs that are calibrated separately: those that the judges decided, those that they could not decide, and
those with an answer that addresses the judge."""
REASON_HUMAN_CALIBRATED = "the judges could not decide; human labels of other pairs do"


@dataclass(frozen=True)
class Calibration:
    """Result of the calibration of one group of pairs with ``n`` labels.

    ``group``: one of ``GROUPS``. ``weights``: by panel judge, and of ``length``. ``applied``: the probabilities of the
    group were replaced; if not, ``reason`` says why. ``tested``: labels drawn by chance, on which it was tested.
    ``log_loss_gain``: improvement per pair, and ``decision_gain``: per pair whose decision would change, with 90 %
    intervals (see :func:`held_out_gain`).
    ``flipped``: pairs whose label changed. ``labeled``: pairs that the judges could not decide and that got a label.
    ``near_ties``: pairs dropped because they became near ties. ``low_ratings``: pairs dropped because the new winner is
    rated too low.
    """

    group: str
    weights: dict[str, float]
    n: int
    applied: bool
    reason: str
    tested: int = 0
    log_loss_gain: Estimate | None = None
    decision_gain: Estimate | None = None
    flipped: int = 0
    labeled: int = 0
    near_ties: int = 0
    low_ratings: int = 0


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


def fit_and_predict(
    x: Floats, prior: Floats, labels: Floats, prompts: pl.Series, row_weights: Floats | None = None
) -> tuple[Floats, Floats]:
    """Return P(a better) for each row of features, cross-fitted by prompt, and the weights fitted to all labels.

    ``labels``: 1, 0 or nan. ``row_weights``: number of labels that each row counts as (default 1).
    """
    l2 = PRIOR_LABELS * MAX_LOGIT**2 / 4.0  # information in PRIOR_LABELS fully confident verdicts on an even pair
    labeled = ~np.isnan(labels)
    row_weights = np.ones(len(labels)) if row_weights is None else row_weights
    folds = [
        int(FOLDS * hash_to_unit_interval("fold", prompt)) if is_labeled else -1
        for prompt, is_labeled in zip(prompts, labeled, strict=True)
    ]
    return (
        cross_fit(x, labels, folds, prior, l2=l2, row_weights=row_weights),
        fit_antisymmetric_logistic(x[labeled], labels[labeled], prior, l2=l2, row_weights=row_weights[labeled]),
    )


def flattened_weights(inclusion_probability: Floats) -> Floats:
    """Return pi ** -FLATTENING for each row, scaled to sum to the effective number of rows (Kish 1965)."""
    weights = inclusion_probability**-FLATTENING
    return np.asarray(weights * (weights.sum() / (weights**2).sum())) if len(weights) else weights


def held_out_gain(
    gain_if_a: Floats, gain_if_b: Floats, labels: Floats, p: Floats, weights: Floats, target_mean: float
) -> Estimate | None:
    """Estimate the mean gain over the unreviewed pairs, with an interval of ``TEST_CONFIDENCE``.

    ``gain_if_a`` and ``gain_if_b``: gain of each reviewed pair if its label is a, and if it is b. ``labels``: 1 or 0.
    ``p``: predicted P(a better). ``weights``: number of similar pairs that each label represents. ``target_mean``: mean
    predicted gain over the unreviewed pairs.

    The estimate is that mean, corrected by the weighted mean of gain minus predicted gain over the labels (the
    difference estimator of Cassel, Särndal and Wretman 1976; PPI with lambda 1). It is unbiased whether or not the
    predictions are right. The interval has Student's quantile with the degrees of freedom of the effective number of
    labels (Kish 1965). One observation of average weight is added, in which every label is the opposite, because labels
    that all agree have no variance. None with fewer than ``MIN_EFFECTIVE_LABELS`` effective labels.
    """
    total = float(weights.sum())
    effective = total**2 / float(weights @ weights) if total else 0.0
    if effective < MIN_EFFECTIVE_LABELS:
        return None
    expected = p * gain_if_a + (1 - p) * gain_if_b
    opposite = float(weights @ np.where(labels > 0.5, gain_if_b, gain_if_a)) / total
    estimate = ppi_mean(
        np.append(np.where(labels > 0.5, gain_if_a, gain_if_b), opposite),
        np.append(expected, weights @ expected / total),
        [target_mean],
        np.append(weights, total / effective),
        confidence_level=TEST_CONFIDENCE,
        lambda_=1.0,
    )
    if estimate is None:
        return None
    widening = student_t_quantile(TEST_CONFIDENCE, effective - 1) / normal_quantile(TEST_CONFIDENCE)
    # ppi_mean corrects the variance for the number of labels; their effective number is smaller.
    n = len(labels)
    widening *= math.sqrt(effective / (effective - 1) * n / (n + 1))
    half = (estimate.high - estimate.value) * widening
    return Estimate(estimate.value, estimate.value - half, estimate.value + half, n)


def apply_human_calibration(
    pairs: pl.DataFrame,
    judge_votes: pl.DataFrame,
    labels: pl.DataFrame,
    *,
    min_confidence: float,
    max_tie_drop_fraction: float,
    num_judged: int,
    num_lost: int = 0,
    min_chosen_rating: float = 0.0,
) -> tuple[pl.DataFrame, list[Calibration]]:
    """Re-aggregate routed ``pairs`` from human ``labels`` (pair_id, label), group by group.

    A group with fewer than ``MIN_LABELS`` labels is not calibrated. prob_a and preferred change only in groups for
    which the held-out labels show that this helps. There, a judge-labeled pair that becomes a near tie is dropped, as
    far as ``max_tie_drop_fraction`` allows, and a kept pair on which the judges could not decide gets a label. A
    judge-labeled pair whose winner is then rated below ``min_chosen_rating`` is dropped too. Decisions by a check stay.
    The columns prob_a_by_judges and preferred_by_judges keep the earlier values. ``num_judged``: judged prompts;
    ``num_lost``: those that have already lost their pair to near ties.
    """
    pairs = pairs.with_columns(prob_a_by_judges="prob_a", preferred_by_judges="preferred")
    pairs = pairs.with_columns(undecided=(pl.col("drop_reason") == "undecided").fill_null(False))
    rows = _calibrated_rows(pairs, labels)
    allowed = max(0, int(max_tie_drop_fraction * num_judged + 1e-9) - num_lost)
    threshold = min_confidence if allowed else 0.5
    fitted = [_calibrate_group(rows, group, judge_votes, threshold) for group in GROUPS]
    calibrations = [calibration for calibration, _ in fitted if calibration]
    n = rows.filter(pl.col("y").is_not_nan()).height
    if n >= MIN_LABELS and not calibrations:
        calibrations = [Calibration("decided", {}, n, False, f"no kind of pair has {MIN_LABELS} of these labels")]
    replaced = [predictions for calibration, predictions in fitted if calibration and calibration.applied]
    if not replaced:
        return pairs.drop("undecided"), calibrations
    predictions = pl.concat(replaced)
    predicted = pairs.join(predictions, on="pair_id", how="left", maintain_order="left")
    near_ties = _near_ties_to_drop(predicted, min_confidence, allowed)
    result = _apply_predictions(pairs, predictions, near_ties, min_chosen_rating)
    return result, [_count_changes(calibration, rows, result) for calibration in calibrations]


def _calibrated_rows(pairs: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs whose probability calibration may change, with group, y and weight, sorted by id.

    ``y``: 1 (a), 0 (b) or nan. ``weight``: number of unreviewed pairs that a label represents; 0 without a
    label. Only labels of the review queue count. If it is labeled in part, each label represents more.
    """
    adjustable = ((pl.col("route") != "dropped") | pl.col("undecided")) & (pl.col("decided_by") != "check")
    rows = (
        pairs.filter(adjustable & ~pl.col("humans_only"))
        .join(labels.select("pair_id", "label"), on="pair_id", how="left", maintain_order="left")
        .sort("pair_id")
    )
    is_queued, pi = pl.col("route").is_in(["audit", "targeted"]), pl.col("inclusion_probability")
    y = pl.when(is_queued & (pl.col("label") == "a")).then(1.0).when(is_queued & (pl.col("label") == "b")).then(0.0)
    response_rate = pl.col("label").is_not_null().mean().over("route")
    group = (
        pl.when(pl.col("flags").list.len() > 0)
        .then(pl.lit("flagged"))
        .when(pl.col("preferred").is_null())
        .then(pl.lit("undecided"))
        .otherwise(pl.lit("decided"))
    )
    return rows.with_columns(
        group=group, y=y.otherwise(float("nan")),
        weight=pl.when(y.is_not_null()).then((1.0 - pi).clip(0.0) / (pi * response_rate)).otherwise(0.0),
    )  # fmt: skip


def _calibrate_group(
    rows: pl.DataFrame, group: str, judge_votes: pl.DataFrame, threshold: float
) -> tuple[Calibration | None, pl.DataFrame]:
    """Return the calibration of one group of ``rows`` and its predictions (pair_id, new_prob_a).

    None if the group has too few labels, or no unreviewed pair. ``threshold``: confidence from which a pair
    gets a label.
    """
    rows = rows.filter(pl.col("group") == group)
    y = rows["y"].to_numpy()
    labeled = ~np.isnan(y)
    is_target = ((rows["route"] == "judge") | rows["undecided"]).to_numpy()
    if labeled.sum() < MIN_LABELS or not is_target.any():
        return None, rows
    x, names, prior = calibration_features(rows, judge_votes)
    row_weights = np.zeros(len(y))
    row_weights[labeled] = flattened_weights(rows["inclusion_probability"].to_numpy()[labeled])
    q, fitted = fit_and_predict(x, prior, y, rows["prompt_id"], row_weights)
    weight_by_name = dict(zip(names, (round(float(w), 4) for w in fitted), strict=True))
    p = rows["prob_a"].to_numpy()
    preferred = rows["preferred"].to_list()
    weights = rows["weight"].to_numpy()
    in_test = weights > 1e-9

    def gain(rows_of: np.ndarray, if_a: Floats, if_b: Floats) -> Estimate | None:
        target, test = is_target & rows_of, in_test & rows_of
        if not target.any():
            return None
        target_mean = float((q * if_a + (1 - q) * if_b)[target].mean())
        return held_out_gain(if_a[test], if_b[test], y[test], q[test], weights[test], target_mean)

    every = np.ones(len(y), dtype=bool)
    log_loss_gain = gain(every, _log_loss(p, 1.0) - _log_loss(q, 1.0), _log_loss(p, 0.0) - _log_loss(q, 0.0))
    before, after = np.array([_SIDES[side] for side in preferred]), _decisions(q, threshold)
    # Over the changed pairs alone: if no label is one of these, the gain over all pairs would seem certain.
    decision_gain = gain(
        before != after,
        _decision_value(after, 1, threshold) - _decision_value(before, 1, threshold),
        _decision_value(after, -1, threshold) - _decision_value(before, -1, threshold),
    )
    reason = _reason_not_to_apply(int(in_test.sum()), log_loss_gain, decision_gain)
    calibration = Calibration(
        group, weight_by_name, int(labeled.sum()), not reason, reason, int(in_test.sum()), log_loss_gain, decision_gain
    )
    return calibration, rows.select("pair_id", pl.Series("new_prob_a", q))


_SIDES = {"a": 1, "b": -1, None: 0}


def _decisions(p: Floats, threshold: float) -> np.ndarray:
    """Return 1 for a, -1 for b and 0 for no label, which ``p`` gets if its confidence is below ``threshold``."""
    is_confident = (np.maximum(p, 1 - p).round(9) >= threshold) & (p != 0.5)
    return np.where(is_confident, np.where(p > 0.5, 1, -1), 0)


def _decision_value(decisions: np.ndarray, label: int, threshold: float) -> Floats:
    """Return the value of decisions (1, -1, 0): 1 - threshold if right, -threshold if wrong, 0 without a label.

    A label with a probability of ``threshold`` is then worth as much as none, so labeling from this confidence on has
    the highest expected value (Chow 1970). A threshold of one half compares accuracies.
    """
    return np.where(decisions == 0, 0.0, np.where(decisions == label, 1 - threshold, -threshold))


def _log_loss(p: Floats, label: float) -> Floats:
    """Return the log loss of probabilities clipped as the features are, so that no single label decides."""
    clipped = np.clip(p, CLIP, 1 - CLIP)
    return np.asarray(-np.log(clipped) if label else -np.log(1 - clipped))


def _reason_not_to_apply(tested: int, log_loss_gain: Estimate | None, decision_gain: Estimate | None) -> str:
    """Return "" if one of the gains is above 0 with its entire interval and neither is below 0.

    ``decision_gain`` is None if too few labels are of pairs whose decision would change.
    """
    if log_loss_gain is None:
        return f"only {tested} of these labels were drawn by chance, too few to test it"
    gains = [gain for gain in (log_loss_gain, decision_gain) if gain]
    if min(gain.value for gain in gains) < -1e-9:
        return f"it did worse than the judges on the {tested} of these labels that were drawn by chance"
    if max(gain.low for gain in gains) <= 1e-9:
        return f"it was not significantly better than the judges on the {tested} of these labels drawn by chance"
    return ""


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


def _apply_predictions(
    pairs: pl.DataFrame, predictions: pl.DataFrame, near_ties: pl.Series, min_chosen_rating: float
) -> pl.DataFrame:
    """Replace prob_a, preferred and route of ``pairs`` by ``predictions`` (pair_id, new_prob_a)."""
    result = pairs.join(predictions, on="pair_id", how="left", maintain_order="left")
    new_prob_a = pl.col("new_prob_a")
    newly_labeled = pl.col("undecided") & new_prob_a.is_not_null() & (new_prob_a != 0.5)
    result = result.with_columns(
        preferred=pl.when(new_prob_a.is_null() | (new_prob_a == 0.5))
        .then("preferred")
        .when(new_prob_a > 0.5)
        .then(pl.lit("a"))
        .otherwise(pl.lit("b")),
    )
    winner_rating = pl.when(pl.col("preferred") == "a").then("score_a").otherwise("score_b")
    is_low_rated = (
        new_prob_a.is_not_null()
        & ((pl.col("route") == "judge") | newly_labeled)
        & (winner_rating < min_chosen_rating).fill_null(False)
    )
    is_near_tie = pl.col("pair_id").is_in(near_ties.implode())
    return result.with_columns(
        prob_a=pl.coalesce("new_prob_a", "prob_a"),
        route=pl.when(is_near_tie | is_low_rated)
        .then(pl.lit("dropped"))
        .when(newly_labeled)
        .then(pl.lit("judge"))
        .otherwise("route"),
        drop_reason=pl.when(is_near_tie)
        .then(pl.lit("near_tie_after_calibration"))
        .when(is_low_rated)
        .then(pl.lit("low_rating"))
        .when(~newly_labeled)
        .then("drop_reason"),
        route_reason=pl.when(newly_labeled).then(pl.lit(REASON_HUMAN_CALIBRATED)).otherwise("route_reason"),
    ).drop("new_prob_a", "undecided")


def _count_changes(calibration: Calibration, rows: pl.DataFrame, result: pl.DataFrame) -> Calibration:
    """Return ``calibration`` with the number of changes in its group."""
    if not calibration.applied:
        return calibration
    before = rows.filter(pl.col("group") == calibration.group).select("pair_id", "undecided")
    after = result.join(before, on="pair_id", maintain_order="left")
    by_judges = after.filter(pl.col("route") == "judge")
    return replace(
        calibration,
        flipped=by_judges.filter(pl.col("preferred") != pl.col("preferred_by_judges")).height,
        labeled=by_judges.filter("undecided").height,
        near_ties=after.filter(pl.col("drop_reason") == "near_tie_after_calibration").height,
        low_ratings=after.filter(pl.col("drop_reason") == "low_rating").height,
    )
