"""Agreement of two or more annotators beyond chance, and the error rate of a single label that it implies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, normal_quantile, resampled_sums, wilson_lower_if_all_succeed


def cohen_kappa(table: ArrayLike, *, confidence_level: float = 0.95, n: float | None = None) -> Estimate | None:
    """Cohen's kappa (Cohen 1960) of a square table of counts, with the interval from its asymptotic variance (Fleiss,
    Cohen and Everitt 1969).

    ``n``: effective number of labels, if the table has weights instead of counts. None if kappa is not defined: without
    labels, or if both annotators always give the same label. If no label differs, the lower bound is derived from the
    Wilson interval of the observed agreement.
    """
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
    # At [i, j]: the share of column i, which is the row's category, plus the share of row j, the column's category.
    margins = columns[:, None] + rows[None, :]
    diagonal = float((np.diag(p) * (1 - np.diag(margins) * (1 - kappa)) ** 2).sum())
    off_diagonal = float((p * margins**2).sum() - (np.diag(p) * np.diag(margins) ** 2).sum()) * (1 - kappa) ** 2
    variance = (diagonal + off_diagonal - (kappa - expected * (1 - kappa)) ** 2) / ((1 - expected) ** 2 * size)
    half = normal_quantile(confidence_level) * math.sqrt(max(0.0, variance))
    if observed >= 1 - 1e-12:  # the variance is then zero, but a few labels that all agree are not certainty
        half = (1 - wilson_lower_if_all_succeed(size, confidence_level)) / (1 - expected)
    return Estimate(kappa, max(-1.0, kappa - half), min(1.0, kappa + half), round(size))


def krippendorff_alpha(
    units: Sequence[Sequence[str]], *, confidence_level: float = 0.95, rounds: int = 1000, seed: int = 0
) -> Estimate | None:
    """Krippendorff's alpha for nominal labels (Krippendorff 2011), with a bootstrap interval over the units.

    Each unit is the sequence of its labels; units with fewer than two labels are ignored. If no label differs, the
    lower bound is derived from the Wilson interval of the share of units that agree. None if alpha is not defined.
    """
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
    # Ordered pairs of different labels in each unit, weighted by 1 / (size - 1).
    disagreeing = (size**2 - (counts**2).sum(axis=1)) / (size - 1)
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
        lower = 1 - (1 - wilson_lower_if_all_succeed(len(paired), confidence_level)) / by_chance
        return Estimate(1.0, max(-1.0, lower), 1.0, len(paired))
    alphas = alpha(resampled_sums(sums, rounds, np.random.default_rng(seed)))
    low, high = np.nanquantile(alphas, [0.5 - confidence_level / 2, 0.5 + confidence_level / 2])
    return Estimate(float(alpha(sums.sum(axis=0)[None])[0]), float(low), float(high), len(paired))


def single_rater_error(disagreement: float) -> float:
    """Error rate e of one annotator, from the rate d at which two annotators disagree.

    Solves d = 2e(1 - e), which assumes equal error rates and independent errors (Dawid and Skene 1979). At most 0.5.
    """
    return (1 - math.sqrt(max(0.0, 1 - 2 * disagreement))) / 2


CHANCE_NOISE_RATE = 0.45
"""Share of wrong labels from which on labels are close to chance: training on them is refused."""


def noise_rate(judge_error: float, judged: int, human_error: float, reviewed: int) -> float:
    """Share of wrong labels in a dataset with ``judged`` rows labeled by judges and ``reviewed`` rows labeled by
    people.

    This is the label flip rate of the robust DPO loss (Chowdhury et al. 2024, arXiv:2403.00409). Always below 0.5.
    """
    rows = judged + reviewed
    return min(0.499, (judge_error * judged + human_error * reviewed) / rows) if rows else 0.0
