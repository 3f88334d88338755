"""Estimate the quality of all labels from the human ones. Every figure has an n and an interval, or is None.

Agreement comes from :mod:`rlaif.run.human_agreement`: each reviewed pair is weighted by the inverse of its inclusion
probability, within strata of known size. The labeled part of the queue is a random part of it, no matter when
annotators stop, so in a half-labeled queue each pair only weighs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from rlaif.display_names import describe_certificate
from rlaif.pair import refusal_guard
from rlaif.records import hash_to_unit_interval
from rlaif.run import human_agreement
from rlaif.stats import (
    Certificate,
    Estimate,
    certify,
    cohen_kappa,
    hajek_mean,
    krippendorff_alpha,
    noise_rate,
    ppi_mean,
    single_rater_error,
    wilson,
)
from rlaif.stats.stratified import MIN_KNOWN_SHARE

TARGET_AGREEMENT = 0.85
ALPHA = 0.10
ESTIMATES = ("agreement", "tie_rate", "skip_rate", "kappa", "human_agreement", "alpha", "remaining_error")
"""Figures of :class:`LabelQuality` with an interval."""


@dataclass(frozen=True)
class LabelQuality:
    """Quality of the labels.

    ``agreement`` and ``kappa``: judges with annotators, over all kept pairs in which annotators choose an answer.
    ``tie_rate`` and ``skip_rate``: shares of kept pairs in which annotators prefer neither answer, and that they skip.
    ``human_agreement``: how often two annotators of one pair agree, and ``alpha`` (Krippendorff) over them.
    ``remaining_error``: share of wrong labels among the dataset's rows that judges labeled (PPI++).
    ``certificate``: the share of pairs on which judges agree with annotators at least ``TARGET_AGREEMENT`` of the time.
    ``noise_rate``: share of wrong labels in the dataset, for the trainer's robust loss. ``reliability``: for each tenth
    of the judges' confidence before any human label, its mean and the agreement.
    """

    reviewed: int
    agreement: Estimate | None
    tie_rate: Estimate | None
    skip_rate: Estimate | None
    kappa: Estimate | None
    human_agreement: Estimate | None
    alpha: Estimate | None
    remaining_error: Estimate | None
    certificate: Certificate | None
    noise_rate: float | None
    reliability: list[tuple[float, Estimate]]

    def summary(self) -> dict[str, Any]:
        """Return the figures as JSON values, for the manifest."""
        result: dict[str, Any] = {"reviewed": self.reviewed, "noise_rate": self.noise_rate}
        for name in ESTIMATES:
            estimate: Estimate | None = getattr(self, name)
            result[name] = estimate.as_dict() if estimate else None
        result["reliability"] = [
            {"p": round(confidence, 4), **agreement.as_dict()} for confidence, agreement in self.reliability
        ]
        certificate = self.certificate
        result["certificate"] = certificate and {
            "agreement": TARGET_AGREEMENT,
            "confidence": 1 - ALPHA,
            "share": certificate.share,
            "threshold": certificate.threshold,
            "n": certificate.tested,
        }
        return result


def estimate_label_quality(
    pairs: pl.DataFrame, labels: pl.DataFrame, reviews: pl.DataFrame, *, seed: int
) -> LabelQuality:
    """Estimate the label quality.

    ``pairs``: routed and calibrated, with prob_a_by_judges and preferred_by_judges. ``labels``: pair_id, label.
    ``reviews``: the reviews journal, for the agreement among annotators.
    """
    population = human_agreement.judged_population(pairs)
    labeled = human_agreement.weigh(population, labels)
    reviewed = _add_agreement(labeled)
    rates = human_agreement.estimate_agreement(pairs, labels, reviews)
    inter_annotator_agreement, alpha = _inter_annotator_agreement(reviews)
    remaining_error = _estimate_remaining_error(pairs, labels)
    return LabelQuality(
        reviewed=labels.height,
        agreement=rates.agreement,
        tie_rate=rates.tie_rate,
        skip_rate=rates.skip_rate,
        kappa=_kappa(population, labeled) if rates.agreement else None,
        human_agreement=inter_annotator_agreement,
        alpha=alpha,
        remaining_error=remaining_error,
        certificate=_certify(pairs, reviewed, seed) if reviewed.height else None,
        noise_rate=_noise_rate(pairs, labels, remaining_error, inter_annotator_agreement),
        reliability=_reliability(reviewed),
    )


def _add_agreement(labeled: pl.DataFrame) -> pl.DataFrame:
    """Return the labeled pairs in which annotators chose an answer, with agrees_with_judges."""
    agrees = (pl.col("label") == pl.col("preferred_by_judges")).cast(pl.Float64)
    return labeled.filter(pl.col("label").is_in(["a", "b"])).with_columns(agrees_with_judges=agrees)


def _noise_rate(
    pairs: pl.DataFrame, labels: pl.DataFrame, remaining_error: Estimate | None, human_agreement: Estimate | None
) -> float | None:
    if remaining_error is None:
        return None
    num_judge_labels = pairs.filter(pl.col("route") == "judge").height
    num_human_labels = labels.filter(pl.col("label").is_in(["a", "b"])).height
    human_error = single_rater_error(1 - human_agreement.value) if human_agreement else 0.0
    return round(noise_rate(remaining_error.value, num_judge_labels, human_error, num_human_labels), 4)


def _reliability(reviewed: pl.DataFrame) -> list[tuple[float, Estimate]]:
    confidence = pl.max_horizontal("prob_a_by_judges", 1.0 - pl.col("prob_a_by_judges"))
    binned = reviewed.with_columns(confidence=confidence, bin=(confidence * 10).floor().clip(upper_bound=9))
    points = []
    for _, rows in binned.sort("bin", "pair_id").group_by("bin", maintain_order=True):
        agreement, weights = rows["agrees_with_judges"].to_numpy(), rows["weight"].to_numpy()
        if estimate := hajek_mean(agreement, weights):
            points.append((float(np.average(rows["confidence"].to_numpy(), weights=weights)), estimate))
    return points


def _kappa(population: pl.DataFrame, labeled: pl.DataFrame) -> Estimate | None:
    """Return kappa over all kept pairs, each stratum with its known size.

    The interval uses Kish's effective sample size. A stratum without a label could have any kappa.
    """
    scaled, known_share = _scale_to_strata(population, labeled)
    reviewed = scaled.filter(pl.col("label").is_in(["a", "b"]))
    weights = reviewed["weight"].to_numpy()
    table = np.zeros((2, 2))
    by_annotators = (reviewed["label"] == "b").to_numpy().astype(int)
    by_judges = (reviewed["preferred_by_judges"] == "b").to_numpy().astype(int)
    np.add.at(table, (by_annotators, by_judges), weights)
    estimate = cohen_kappa(table, n=float(weights.sum() ** 2 / (weights**2).sum())) if len(weights) else None
    return estimate and Estimate(
        estimate.value,
        known_share * estimate.low - (1 - known_share),
        known_share * estimate.high + (1 - known_share),
        reviewed.height,
    )


def _scale_to_strata(population: pl.DataFrame, labeled: pl.DataFrame) -> tuple[pl.DataFrame, float]:
    """Scale the weights of ``labeled`` so that they add up to the size of their stratum of ``population``.

    Also returns the share of the population that is in strata with a label.
    """
    sizes = population.group_by("stratum").agg(size=pl.len())
    scaled = labeled.join(sizes, on="stratum", how="inner", maintain_order="left").with_columns(
        weight=pl.col("weight") * pl.col("size") / pl.col("weight").sum().over("stratum")
    )
    known = population.filter(pl.col("stratum").is_in(scaled["stratum"].unique().implode())).height
    return scaled.drop("size"), known / population.height if population.height else 0.0


def _inter_annotator_agreement(reviews: pl.DataFrame) -> tuple[Estimate | None, Estimate | None]:
    """Return the agreement of the first two annotators of a pair, and alpha over all pairs with several labels."""
    latest = reviews.sort("created_at", maintain_order=True).unique(
        ["pair_id", "annotator"], keep="last", maintain_order=True
    )
    # An adjudicator has seen the other labels, and a gold pair's label is known.
    for column, default in (("role", "annotator"), ("route", "audit")):
        if column in latest.columns:
            latest = latest.filter(~pl.col(column).fill_null(default).is_in(["adjudicator", "gold"]))
    labeled = latest.filter(pl.col("choice") != "skip").with_columns(label=pl.coalesce("preferred", "choice"))
    label_lists = (
        labeled.sort("created_at", "annotator").group_by("pair_id").agg("label").filter(pl.col("label").list.len() >= 2)
    )
    repeated = label_lists.sort("pair_id")["label"].to_list()
    return wilson(sum(labels[0] == labels[1] for labels in repeated), len(repeated)), krippendorff_alpha(repeated)


def _estimate_remaining_error(pairs: pl.DataFrame, labels: pl.DataFrame) -> Estimate | None:
    """Estimate the share of wrong labels among the dataset's rows that judges labeled.

    These rows were not drawn, and neither calibration nor the refusal guard dropped them. Only reviewed pairs that
    would be in the dataset without a review too (:func:`_judges_would_label`) represent them. A pair drawn
    with probability q represents (1 - q) / q of them, and the weights in each stratum add up to its number of rows. The
    calibrated probabilities are the predictions. A stratum of rows without a label could have any error rate. None with
    fewer than two labels, or if the strata without a label are the larger part.
    """
    error_probability = 1.0 - pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))
    pairs = human_agreement.add_stratum(pairs)
    drawable = pairs.filter(pl.col("inclusion_probability") < 1.0)
    rows = drawable.filter(pl.col("route") == "judge").join(labels, on="pair_id", how="anti", maintain_order="left")
    labeled = human_agreement.weigh(drawable.filter(_judges_would_label(pairs)), labels)
    labeled = labeled.filter(pl.col("label").is_in(["a", "b"]))
    labeled = labeled.with_columns(weight=pl.col("weight") * (1.0 - pl.col("inclusion_probability")))
    reviewed, known_share = _scale_to_strata(rows, labeled)
    if known_share < MIN_KNOWN_SHARE:
        return None
    error = (reviewed["label"] != reviewed["preferred"]).to_numpy().astype(float)
    predictions, weights = reviewed.select(error_probability).to_series().to_numpy(), reviewed["weight"].to_numpy()
    estimate = ppi_mean(error, predictions, rows.select(error_probability).to_series().to_numpy(), weights)
    # PPI's interval assumes a normal mean, but a few labels may carry nearly all the weight: use Hájek's interval.
    interval = estimate and hajek_mean(error, weights, mean=estimate.value)
    return interval and replace(
        interval, low=known_share * interval.low, high=known_share * interval.high + 1 - known_share
    )


def _judges_would_label(pairs: pl.DataFrame) -> pl.Expr:
    """Return True for the pairs whose label by the judges would be in the dataset if they had not been queued.

    The rules are those that dropped pairs after the draw: no decision, only annotators decide, the refusal guard, and
    three cutoffs. A cutoff is the highest value at which a pair was dropped.
    """
    drawable = pairs.filter(pl.col("inclusion_probability").is_not_null())
    confidence = pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")).round(9)
    a_is_chosen = pl.col("preferred") == "a"

    def cutoff(reason: str, value: pl.Expr) -> float:
        highest = drawable.filter(pl.col("drop_reason") == reason).select(value.max()).item()
        return -1.0 if highest is None else float(highest)

    result = pl.col("preferred").is_not_null()
    if "drop_reason" in pairs.columns:
        result &= confidence > cutoff("near_tie_after_calibration", confidence)
    if {"drop_reason", "score_a", "score_b"} <= set(pairs.columns):
        rating = pl.when(a_is_chosen).then("score_a").otherwise("score_b")
        result &= (rating > cutoff("low_rating", rating)).fill_null(value=True)
    if "humans_only" in pairs.columns:
        result &= ~pl.col("humans_only")
    if {"prompt_class", "answer_label_a", "answer_label_b"} <= set(pairs.columns):
        chosen_label = pl.when(a_is_chosen).then("answer_label_a").otherwise("answer_label_b")
        is_unclassified_refusal = pl.col("prompt_class").is_null() & (chosen_label == "refuse").fill_null(value=False)
        result &= refusal_guard.guard_violation().is_null()
        result &= ~(is_unclassified_refusal & (confidence <= cutoff("surplus_refusal", confidence)))
    return result


def _certify(pairs: pl.DataFrame, reviewed: pl.DataFrame, seed: int) -> Certificate:
    """Certify a share of the pairs, most confident first by the probabilities before any human label.

    Labels drawn with unequal probabilities are thinned to the smallest one, which makes them a simple random sample.
    """
    confidence = pl.max_horizontal("prob_a_by_judges", 1.0 - pl.col("prob_a_by_judges"))
    kept = pairs.filter(pl.col("inclusion_probability").is_not_null() & pl.col("preferred_by_judges").is_not_null())
    lowest = float(kept["inclusion_probability"].min() or 0.0)  # type: ignore[arg-type]
    draws = np.array([hash_to_unit_interval(seed, "thin", pair) for pair in reviewed["pair_id"]])
    thinned = reviewed.filter(pl.Series(draws * reviewed["inclusion_probability"].to_numpy() < lowest))
    return certify(
        thinned.select(confidence).to_series().to_numpy(),
        thinned["agrees_with_judges"].to_numpy(),
        kept.select(confidence).to_series().to_numpy(),
        target=TARGET_AGREEMENT,
        alpha=ALPHA,
    )


def describe(quality: Mapping[str, Any]) -> list[str]:
    """Describe :meth:`LabelQuality.summary`, one sentence per figure."""

    def figure(name: str) -> str:
        return str(Estimate(**quality[name]))

    lines = []
    if quality["agreement"]:
        kappa = f", kappa {figure('kappa')}" if quality["kappa"] else ""
        lines.append(
            f"Annotators agree with the judges on {figure('agreement')} of the kept pairs in which they choose an "
            f"answer{kappa}."
        )
    if quality.get("tie_rate"):
        lines.append(f"Annotators prefer neither answer in {figure('tie_rate')} of all kept pairs.")
    if quality.get("skip_rate"):
        lines.append(f"Annotators skip {figure('skip_rate')} of all kept pairs.")
    if quality["human_agreement"]:
        lines.append(f"Two annotators of the same pair agree on {figure('human_agreement')}.")
    if quality["remaining_error"]:
        lines.append(f"Of the dataset's labels by judges, {figure('remaining_error')} are wrong by human judgment.")
    if quality["certificate"]:
        lines.append(describe_certificate(quality["certificate"]))
    if quality["noise_rate"] is not None:
        lines.append(f"Noise rate for training (share of wrong labels, below one half): {quality['noise_rate']:.3f}.")
    return lines
