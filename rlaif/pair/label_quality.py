"""What people's labels say of all the others: every figure with its n and interval, or None where nothing is known.

Agreement is estimated from all reviewed pairs, each weighted with the inverse of its inclusion probability (Hájek); the
labelled part of a queue is a random part of it, whoever stops when, so a half-labelled queue only weighs more a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

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
    """``agreement`` and ``kappa``: judges with people, over all kept pairs. ``human_agreement``: how often two people
    who labelled one pair say the same, and ``alpha`` of it (Krippendorff). ``remaining_error``: wrong labels among
    those that judges gave (PPI++). ``certificate``: for which share of the pairs judges agree with people
    ``TARGET_AGREEMENT`` of the time or more. ``noise_rate``: share of wrong labels in the dataset, for the trainer's
    robust loss. ``reliability``: of each tenth of how sure the judges were before any label, the mean of that, and how
    far people agree."""

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
        """As JSON values, for the manifest."""
        result: dict[str, Any] = {"reviewed": self.reviewed, "noise_rate": self.noise_rate}
        for name in ("agreement", "kappa", "human_agreement", "alpha", "remaining_error"):
            estimate: Estimate | None = getattr(self, name)
            result[name] = estimate.as_dict() if estimate else None
        result["reliability"] = [
            {"p": round(confidence, 4), **agreement.as_dict()} for confidence, agreement in self.reliability
        ]
        if self.certificate is None:
            return result | {"certificate": None}
        certificate = self.certificate
        return result | {
            "certificate": {
                "agreement": TARGET_AGREEMENT,
                "confidence": 1 - ALPHA,
                "share": certificate.share,
                "threshold": certificate.threshold,
                "n": certificate.tested,
            }
        }


def estimate_label_quality(
    pairs: pl.DataFrame, labels: pl.DataFrame, reviews: pl.DataFrame, *, seed: int
) -> LabelQuality:
    """``pairs``: routed and calibrated, with prob_a_by_judges and preferred_by_judges. ``labels``: pair_id, label.
    ``reviews``: the journal, from which comes how far people agree among themselves."""
    queue = pairs.filter(pl.col("route").is_in(["audit", "targeted"])).join(
        labels.select("pair_id", "label"), on="pair_id", how="left"
    )
    queue = queue.with_columns(response_rate=(pl.col("label").is_not_null().mean()).over("route"))
    reviewed = queue.filter(pl.col("label").is_in(["a", "b"]) & pl.col("preferred_by_judges").is_not_null()).sort(
        "pair_id"
    )
    reviewed = reviewed.with_columns(
        agrees_with_judges=(pl.col("label") == pl.col("preferred_by_judges")).cast(pl.Float64),
        weight=1.0 / (pl.col("inclusion_probability") * pl.col("response_rate")),
    )
    certain = reviewed.filter((pl.col("inclusion_probability") == 1.0) & (pl.col("response_rate") == 1.0))
    sampled = reviewed.join(certain.select("pair_id"), on="pair_id", how="anti", maintain_order="left")
    agreement = hajek_mean(
        sampled["agrees_with_judges"].to_numpy(),
        sampled["weight"].to_numpy(),
        certain_values=certain["agrees_with_judges"].to_numpy(),
    )
    human_agreement, alpha = _inter_annotator_agreement(reviews)
    remaining_error = _estimate_remaining_error(pairs, queue)
    num_judge_labels = pairs.filter(pl.col("route") == "judge").height
    num_human_labels = labels.filter(pl.col("label").is_in(["a", "b"])).height
    human_error = single_rater_error(1 - human_agreement.value) if human_agreement else 0.0
    judge_error = remaining_error.value if remaining_error else None
    return LabelQuality(
        reviewed=labels.height,
        agreement=agreement,
        kappa=_kappa(reviewed),
        human_agreement=human_agreement,
        alpha=alpha,
        remaining_error=remaining_error,
        certificate=_certify(pairs, reviewed, seed) if reviewed.height else None,
        noise_rate=None
        if judge_error is None
        else round(noise_rate(judge_error, num_judge_labels, human_error, num_human_labels), 4),
        reliability=_reliability(reviewed),
    )


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
    """Over all kept pairs, each label weighted; the interval is that of Kish's effective number of them."""
    if not reviewed.height:
        return None
    weights = reviewed["weight"].to_numpy()
    table = np.zeros((2, 2))
    np.add.at(table, ((reviewed["label"] == "b").to_numpy().astype(int),
                      (reviewed["preferred_by_judges"] == "b").to_numpy().astype(int)), weights)  # fmt: skip
    estimate = cohen_kappa(table, n=float(weights.sum() ** 2 / (weights**2).sum()))
    return estimate and replace(estimate, n=reviewed.height)


def _inter_annotator_agreement(reviews: pl.DataFrame) -> tuple[Estimate | None, Estimate | None]:
    """Agreement among the first two who labelled a pair, and alpha over all labels of pairs with several."""
    latest = reviews.sort("created_at", maintain_order=True).unique(
        ["pair_id", "annotator"], keep="last", maintain_order=True
    )
    # An adjudicator has seen what the others said, and a gold pair's label is known.
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
    """Wrong labels among the pairs that judges labelled: a pair drawn with probability q stands for the (1 - q) / q
    pairs like it that were not drawn; the calibrated probabilities are the predictions."""
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
    # PPI's own interval is normal, from the spread of labels of which a few may stand for nearly all that is left.
    return estimate and hajek_mean(error, weights, mean=estimate.value)


def _certify(pairs: pl.DataFrame, reviewed: pl.DataFrame, seed: int) -> Certificate:
    """Labels drawn with unequal probabilities are thinned to the smallest, which makes them a simple random sample; the
    order is that of the probabilities from before any label."""
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
    """What :meth:`LabelQuality.summary` says, a sentence a figure."""

    def format_estimate(name: str) -> str:
        estimate = quality[name]
        return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}] (n = {estimate['n']})"

    lines = []
    if quality["agreement"]:
        kappa = f", kappa {format_estimate('kappa')}" if quality["kappa"] else ""
        lines.append(f"Over all kept pairs, people agree with the judges on {format_estimate('agreement')}{kappa}.")
    if quality["human_agreement"]:
        lines.append(f"Two people who labelled one pair agree on {format_estimate('human_agreement')}.")
    if quality["remaining_error"]:
        lines.append(
            f"Of the labels that judges gave, {format_estimate('remaining_error')} are wrong by people's measure."
        )
    if quality["certificate"]:
        certificate = quality["certificate"]
        lines.append(
            f"For the surest {certificate['share']:.0%} of the pairs it is certified (confidence {certificate['confidence']:.0%}, n = "
            f"{certificate['n']}) that judges agree with people at least {certificate['agreement']:.0%} of the time."
            if certificate["share"]
            else f"No share of the pairs can be certified to agree with people {certificate['agreement']:.0%} of the time: too "
            "few labels, or too little agreement."
        )
    if quality["noise_rate"] is not None:
        lines.append(f"Noise rate for training (share of wrong labels, below one half): {quality['noise_rate']:.3f}.")
    return lines
