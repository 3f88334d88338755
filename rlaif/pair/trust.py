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

from rlaif.records import unit_interval
from rlaif.stats import (
    Certificate,
    Estimate,
    certify,
    cohen_kappa,
    error_of_one,
    hajek,
    krippendorff_alpha,
    noise_rate,
    ppi_mean,
    wilson,
)

TARGET = 0.85
ALPHA = 0.10


@dataclass(frozen=True)
class Trust:
    """``agreement`` and ``kappa``: judges with people, over all kept pairs. ``people``: how often two people who
    labelled one pair say the same, and ``alpha`` of it (Krippendorff). ``error_left``: wrong labels among those that
    judges gave (PPI++). ``certificate``: for which share of the pairs judges agree with people ``TARGET`` of the time
    or more. ``noise``: share of wrong labels in the dataset, for the trainer's robust loss. ``reliability``: of each
    tenth of how sure the judges were before any label, the mean of that, and how far people agree."""

    reviewed: int
    agreement: Estimate | None
    kappa: Estimate | None
    people: Estimate | None
    alpha: Estimate | None
    error_left: Estimate | None
    certificate: Certificate | None
    noise: float | None
    reliability: list[tuple[float, Estimate]]

    def facts(self) -> dict[str, Any]:
        """As JSON values, for the manifest."""
        told: dict[str, Any] = {"reviewed": self.reviewed, "noise_rate": self.noise}
        for name in ("agreement", "kappa", "people", "alpha", "error_left"):
            estimate: Estimate | None = getattr(self, name)
            told[name] = estimate.facts() if estimate else None
        told["reliability"] = [{"p": round(sure, 4), **agrees.facts()} for sure, agrees in self.reliability]
        if self.certificate is None:
            return told | {"certificate": None}
        certificate = self.certificate
        return told | {"certificate": {"agreement": TARGET, "confidence": 1 - ALPHA, "share": certificate.share,
                                       "threshold": certificate.threshold, "n": certificate.tested}}  # fmt: skip


def measure(pairs: pl.DataFrame, labels: pl.DataFrame, reviews: pl.DataFrame, *, seed: int) -> Trust:
    """``pairs``: routed and calibrated, with p_said and preferred_said. ``labels``: pair_id, label. ``reviews``: the
    journal, from which comes how far people agree among themselves."""
    queue = pairs.filter(pl.col("route").is_in(["audit", "targeted"])).join(
        labels.select("pair_id", "label"), on="pair_id", how="left"
    )
    queue = queue.with_columns(answered=(pl.col("label").is_not_null().mean()).over("route"))
    seen = queue.filter(pl.col("label").is_in(["a", "b"]) & pl.col("preferred_said").is_not_null()).sort("pair_id")
    seen = seen.with_columns(
        agrees=(pl.col("label") == pl.col("preferred_said")).cast(pl.Float64),
        stands_for=1.0 / (pl.col("inclusion_probability") * pl.col("answered")),
    )
    known = seen.filter((pl.col("inclusion_probability") == 1.0) & (pl.col("answered") == 1.0))
    drawn = seen.join(known.select("pair_id"), on="pair_id", how="anti", maintain_order="left")
    agreement = hajek(drawn["agrees"].to_numpy(), drawn["stands_for"].to_numpy(), known=known["agrees"].to_numpy())
    people, alpha = _among_people(reviews)
    left = _error_left(pairs, queue)
    judged = pairs.filter(pl.col("route") == "judge").height
    by_people = labels.filter(pl.col("label").is_in(["a", "b"])).height
    human_error = error_of_one(1 - people.value) if people else 0.0
    guess = left.value if left else None
    return Trust(
        reviewed=labels.height,
        agreement=agreement,
        kappa=_kappa(seen),
        people=people,
        alpha=alpha,
        error_left=left,
        certificate=_certificate(pairs, seen, seed) if seen.height else None,
        noise=None if guess is None else round(noise_rate(guess, judged, human_error, by_people), 4),
        reliability=_reliability(seen),
    )


def _reliability(seen: pl.DataFrame) -> list[tuple[float, Estimate]]:
    sure = pl.max_horizontal("p_said", 1.0 - pl.col("p_said"))
    binned = seen.with_columns(sure=sure, bin=(sure * 10).floor().clip(upper_bound=9))
    points = []
    for _, rows in binned.sort("bin", "pair_id").group_by("bin", maintain_order=True):
        agrees, weights = rows["agrees"].to_numpy(), rows["stands_for"].to_numpy()
        if estimate := hajek(agrees, weights):
            points.append((float(np.average(rows["sure"].to_numpy(), weights=weights)), estimate))
    return points


def _kappa(seen: pl.DataFrame) -> Estimate | None:
    """Over all kept pairs, each label weighted; the interval is that of Kish's effective number of them."""
    if not seen.height:
        return None
    weights = seen["stands_for"].to_numpy()
    table = np.zeros((2, 2))
    np.add.at(table, ((seen["label"] == "b").to_numpy().astype(int),
                      (seen["preferred_said"] == "b").to_numpy().astype(int)), weights)  # fmt: skip
    estimate = cohen_kappa(table, n=float(weights.sum() ** 2 / (weights**2).sum()))
    return estimate and replace(estimate, n=seen.height)


def _among_people(reviews: pl.DataFrame) -> tuple[Estimate | None, Estimate | None]:
    """Agreement among the first two who labelled a pair, and alpha over all labels of pairs with several."""
    latest = reviews.sort("at", maintain_order=True).unique(["pair_id", "annotator"], keep="last", maintain_order=True)
    # An adjudicator has seen what the others said, and a gold pair's label is known.
    for column, own in (("role", "annotator"), ("route", "audit")):
        if column in latest.columns:
            latest = latest.filter(~pl.col(column).fill_null(own).is_in(["adjudicator", "gold"]))
    said = latest.filter(pl.col("choice") != "skip").with_columns(label=pl.coalesce("preferred", "choice"))
    units = said.sort("at", "annotator").group_by("pair_id").agg("label").filter(pl.col("label").list.len() >= 2)
    twice = units.sort("pair_id")["label"].to_list()
    return wilson(sum(one[0] == one[1] for one in twice), len(twice)), krippendorff_alpha(twice)


def _error_left(pairs: pl.DataFrame, queue: pl.DataFrame) -> Estimate | None:
    """Wrong labels among the pairs that judges labelled: a pair drawn with probability q stands for the (1 - q) / q
    pairs like it that were not drawn; the calibrated probabilities are the predictions."""
    wrong = 1.0 - pl.max_horizontal("p_a", 1.0 - pl.col("p_a"))
    rest = pairs.filter(pl.col("route") == "judge").select(wrong).to_series().to_numpy()
    some = queue.filter(
        (pl.col("inclusion_probability") < 1.0) & pl.col("label").is_in(["a", "b"]) & pl.col("preferred").is_not_null()
    ).sort("pair_id")
    some = some.with_columns(
        error=(pl.col("label") != pl.col("preferred")).cast(pl.Float64),
        expected=wrong,
        stands_for=1.0 / pl.col("inclusion_probability") - 1.0,
    )
    error, stands_for = some["error"].to_numpy(), some["stands_for"].to_numpy()
    estimate = ppi_mean(error, some["expected"].to_numpy(), rest, stands_for)
    # PPI's own interval is normal, from the spread of labels of which a few may stand for nearly all that is left.
    return estimate and hajek(error, stands_for, mean=estimate.value)


def _certificate(pairs: pl.DataFrame, seen: pl.DataFrame, seed: int) -> Certificate:
    """Labels drawn with unequal probabilities are thinned to the smallest, which makes them a simple random sample; the
    order is that of the probabilities from before any label."""
    sure = pl.max_horizontal("p_said", 1.0 - pl.col("p_said"))
    kept = pairs.filter(pl.col("inclusion_probability").is_not_null() & pl.col("preferred_said").is_not_null())
    least = float(kept["inclusion_probability"].min() or 0.0)  # type: ignore[arg-type]
    chance = np.array([unit_interval(seed, "thin", pair) for pair in seen["pair_id"]])
    fair = seen.filter(pl.Series(chance * seen["inclusion_probability"].to_numpy() < least))
    return certify(
        fair.select(sure).to_series().to_numpy(),
        fair["agrees"].to_numpy(),
        kept.select(sure).to_series().to_numpy(),
        target=TARGET,
        alpha=ALPHA,
    )


def in_words(facts: Mapping[str, Any]) -> list[str]:
    """What :meth:`Trust.facts` says, a sentence a figure."""

    def told(name: str) -> str:
        one = facts[name]
        return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}] (n = {one['n']})"

    lines = []
    if facts["agreement"]:
        kappa = f", kappa {told('kappa')}" if facts["kappa"] else ""
        lines.append(f"Over all kept pairs, people agree with the judges on {told('agreement')}{kappa}.")
    if facts["people"]:
        lines.append(f"Two people who labelled one pair agree on {told('people')}.")
    if facts["error_left"]:
        lines.append(f"Of the labels that judges gave, {told('error_left')} are wrong by people's measure.")
    if facts["certificate"]:
        one = facts["certificate"]
        lines.append(
            f"For the surest {one['share']:.0%} of the pairs it is certified (confidence {one['confidence']:.0%}, n = "
            f"{one['n']}) that judges agree with people at least {one['agreement']:.0%} of the time."
            if one["share"]
            else f"No share of the pairs can be certified to agree with people {one['agreement']:.0%} of the time: too "
            "few labels, or too little agreement."
        )
    if facts["noise_rate"] is not None:
        lines.append(f"Noise rate for training (share of wrong labels, below one half): {facts['noise_rate']:.3f}.")
    return lines
