"""How well two or more labellers agree, beyond chance, and what that says of one label's error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, normal_quantile, resampled_sums, wilson_lower_if_all_succeed


def cohen_kappa(table: ArrayLike, *, confidence_level: float = 0.95, n: float | None = None) -> Estimate | None:
    """Cohen's kappa of a square table of counts (Cohen 1960) with the interval of its asymptotic variance (Fleiss,
    Cohen and Everitt 1969). ``n``: the effective number of labels where the table holds weights. None where it is not
    defined: no labels, or everybody always says the same. Where no label differs, the lower end is that of the observed
    agreement's Wilson interval."""
    counts = np.asarray(table, dtype=float)
    total = counts.sum()
    if total <= 0:
        return None
    size = total if n is None else n
    p = counts / total
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    observed, expected = float(np.trace(p)), float(rows @ columns)
    if expected >= 1:
        return None
    kappa = (observed - expected) / (1 - expected)
    margins = columns[:, None] + rows[None, :]  # column share of the row's category, row share of the column's
    diagonal = float((np.diag(p) * (1 - np.diag(margins) * (1 - kappa)) ** 2).sum())
    off_diagonal = float((p * margins**2).sum() - (np.diag(p) * np.diag(margins) ** 2).sum()) * (1 - kappa) ** 2
    variance = (diagonal + off_diagonal - (kappa - expected * (1 - kappa)) ** 2) / ((1 - expected) ** 2 * size)
    half = normal_quantile(confidence_level) * math.sqrt(max(0.0, variance))
    if observed >= 1 - 1e-12:  # that variance is zero, and few labels of which none differs are no certainty
        half = (1 - wilson_lower_if_all_succeed(size, confidence_level)) / (1 - expected)
    return Estimate(kappa, max(-1.0, kappa - half), min(1.0, kappa + half), round(size))


def krippendorff_alpha(
    units: Sequence[Sequence[str]], *, confidence_level: float = 0.95, rounds: int = 1000, seed: int = 0
) -> Estimate | None:
    """Krippendorff's alpha for nominal labels (Krippendorff 2011), with a bootstrap interval over the units. Each unit
    holds the labels that it was given, one or more; units with one label say nothing. Where no label differs, the lower
    end is that of the share of such units by Wilson. None where it is not defined."""
    paired = [unit for unit in units if len(unit) >= 2]
    names = sorted({label for unit in paired for label in unit})
    if len(names) < 2:
        return None
    column_of = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(paired), len(names)))
    for row, unit in zip(counts, paired, strict=True):
        for label in unit:
            row[column_of[label]] += 1
    size = counts.sum(axis=1)
    disagreeing = (size**2 - (counts**2).sum(axis=1)) / (size - 1)  # ordered pairs that differ, each unit's by its size
    sums = np.column_stack([disagreeing, counts])

    def alpha(resampled: np.ndarray) -> np.ndarray:
        total = resampled[:, 1:].sum(axis=1)
        by_chance = total**2 - (resampled[:, 1:] ** 2).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            result: np.ndarray = 1 - (total - 1) * resampled[:, 0] / by_chance
        return result

    if not disagreeing.any():
        total, label_counts = float(size.sum()), counts.sum(axis=0)
        by_chance = float(total**2 - (label_counts**2).sum()) / (total * (total - 1))
        return Estimate(
            1.0,
            max(-1.0, 1 - (1 - wilson_lower_if_all_succeed(len(paired), confidence_level)) / by_chance),
            1.0,
            len(paired),
        )
    alphas = alpha(resampled_sums(sums, rounds, np.random.default_rng(seed)))
    low, high = np.nanquantile(alphas, [0.5 - confidence_level / 2, 0.5 + confidence_level / 2])
    return Estimate(float(alpha(sums.sum(axis=0)[None])[0]), float(low), float(high), len(paired))


def single_rater_error(disagreement: float) -> float:
    """How often one person errs, where two who err alike and on their own disagree this often: e of d = 2e(1 - e)
    (two equal coins of Dawid and Skene 1979). Half at most."""
    return (1 - math.sqrt(max(0.0, 1 - 2 * disagreement))) / 2


def noise_rate(judge_error: float, judged: int, human_error: float, reviewed: int) -> float:
    """The share of wrong labels in a dataset of ``judged`` rows labelled by judges and ``reviewed`` by people: what
    the robust DPO loss (Chowdhury et al. 2024, arXiv:2403.00409) takes as its label flip rate. Below half."""
    rows = judged + reviewed
    return min(0.499, (judge_error * judged + human_error * reviewed) / rows) if rows else 0.0
