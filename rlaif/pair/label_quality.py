"""Estimate the quality of all labels from the human ones. Every figure has an n and an interval, or is None.

Agreement is estimated from all reviewed pairs, each weighted by the inverse of its inclusion probability (Hájek). The
labeled part of the queue is a random part of it, no matter when annotators stop, so in a half-labeled queue each pair
only weighs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from rlaif.display_names import describe_certificate
from rlaif.records import hash_to_unit_interval
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

TARGET_AGREEMENT = 0.85
ALPHA = 0.10


@dataclass(frozen=True)
class LabelQuality:
    """Quality of the labels.

    ``agreement`` and ``kappa``: judges with annotators, over all kept pairs. ``human_agreement``: how often two
    annotators of one pair agree, and ``alpha`` (Krippendorff) over them. ``remaining_error``: share of wrong labels
    among those by judges (PPI++). ``certificate``: the share of pairs on which judges agree with annotators at least
    ``TARGET_AGREEMENT`` of the time. ``noise_rate``: share of wrong labels in the dataset, for the trainer's robust
    loss. ``reliability``: for each tenth of the judges' confidence before any human label, its mean and the agreement.
    """

    reviewed: int
    agreement: Estimate | None
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
        for name in ("agreement", "kappa", "human_agreement", "alpha", "remaining_error"):
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
    queue = pairs.filter(pl.col("route").is_in(["audit", "targeted"])).join(
        labels.select("pair_id", "label"), on="pair_id", how="left"
    )
    queue = queue.with_columns(response_rate=(pl.col("label").is_not_null().mean()).over("route"))
    reviewed = _add_agreement(queue)
    human_agreement, alpha = _inter_annotator_agreement(reviews)
    remaining_error = _estimate_remaining_error(pairs, queue)
    return LabelQuality(
        reviewed=labels.height,
        agreement=_agreement(reviewed),
        kappa=_kappa(reviewed),
        human_agreement=human_agreement,
        alpha=alpha,
        remaining_error=remaining_error,
        certificate=_certify(pairs, reviewed, seed) if reviewed.height else None,
        noise_rate=_noise_rate(pairs, labels, remaining_error, human_agreement),
        reliability=_reliability(reviewed),
    )


def _add_agreement(queue: pl.DataFrame) -> pl.DataFrame:
    """Return the queued pairs that judges and annotators both decided, with agrees_with_judges and weight."""
    decided = pl.col("label").is_in(["a", "b"]) & pl.col("preferred_by_judges").is_not_null()
    return (
        queue.filter(decided)
        .sort("pair_id")
        .with_columns(
            agrees_with_judges=(pl.col("label") == pl.col("preferred_by_judges")).cast(pl.Float64),
            weight=1.0 / (pl.col("inclusion_probability") * pl.col("response_rate")),
        )
    )


def _agreement(reviewed: pl.DataFrame) -> Estimate | None:
    certain = reviewed.filter((pl.col("inclusion_probability") == 1.0) & (pl.col("response_rate") == 1.0))
    sampled = reviewed.join(certain.select("pair_id"), on="pair_id", how="anti", maintain_order="left")
    return hajek_mean(
        sampled["agrees_with_judges"].to_numpy(),
        sampled["weight"].to_numpy(),
        certain_values=certain["agrees_with_judges"].to_numpy(),
    )


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


def _kappa(reviewed: pl.DataFrame) -> Estimate | None:
    """Return kappa over all kept pairs. Labels are weighted; the interval uses Kish's effective sample size."""
    if not reviewed.height:
        return None
    weights = reviewed["weight"].to_numpy()
    table = np.zeros((2, 2))
    by_annotators = (reviewed["label"] == "b").to_numpy().astype(int)
    by_judges = (reviewed["preferred_by_judges"] == "b").to_numpy().astype(int)
    np.add.at(table, (by_annotators, by_judges), weights)
    estimate = cohen_kappa(table, n=float(weights.sum() ** 2 / (weights**2).sum()))
    return estimate and replace(estimate, n=reviewed.height)


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


def _estimate_remaining_error(pairs: pl.DataFrame, queue: pl.DataFrame) -> Estimate | None:
    """Estimate the share of wrong labels among the judge-labeled pairs.

    A pair drawn with probability q represents the (1 - q) / q similar pairs that were not drawn. The calibrated
    probabilities are the predictions.
    """
    error_probability = 1.0 - pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))
    judge_labeled = pairs.filter(pl.col("route") == "judge").select(error_probability).to_series().to_numpy()
    reviewed = queue.filter(
        (pl.col("inclusion_probability") < 1.0) & pl.col("label").is_in(["a", "b"]) & pl.col("preferred").is_not_null()
    ).sort("pair_id")
    reviewed = reviewed.with_columns(
        error=(pl.col("label") != pl.col("preferred")).cast(pl.Float64),
        expected=error_probability,
        weight=1.0 / pl.col("inclusion_probability") - 1.0,
    )
    error, weights = reviewed["error"].to_numpy(), reviewed["weight"].to_numpy()
    estimate = ppi_mean(error, reviewed["expected"].to_numpy(), judge_labeled, weights)
    # PPI's interval assumes a normal mean, but a few labels may carry nearly all the weight: use Hájek's interval.
    return estimate and hajek_mean(error, weights, mean=estimate.value)


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
        lines.append(f"Annotators agree with the judges on {figure('agreement')} of all kept pairs{kappa}.")
    if quality["human_agreement"]:
        lines.append(f"Two annotators of the same pair agree on {figure('human_agreement')}.")
    if quality["remaining_error"]:
        lines.append(f"Of the labels by judges, {figure('remaining_error')} are wrong by human judgment.")
    if quality["certificate"]:
        lines.append(describe_certificate(quality["certificate"]))
    if quality["noise_rate"] is not None:
        lines.append(f"Noise rate for training (share of wrong labels, below one half): {quality['noise_rate']:.3f}.")
    return lines
