"""Calibration error of probabilities, with an interval that holds in small samples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, Floats, student_t_quantile


def expected_calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 10,
    confidence_level: float = 0.95,
    rounds: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """Mean absolute difference between confidence and accuracy over ``bins`` equal bins of [0, 1], weighted by their
    number of rows (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599), corrected for bias. None without rows.

    The error of a sample is never negative, so chance alone makes it positive. The expected excess of each bin, if its
    difference is normal with the variance of a calibrated judge, is subtracted (Kumar, Liang and Ma 2019,
    arXiv:1909.10155).

    The interval does not resample, because a resample contains chance twice. Let e be the error of the sample, b its
    mean and q its upper quantile if all confidences were right (consistency resampling, Bröcker and Smith 2007), and s
    the standard error of the mean difference between confidence and correctness. The absolute value of a normal
    variable exceeds that of its mean by at most as much as for a mean of 0, and on average never falls below it. So
    the interval is from e - max(q, b + ts) to e + ts, with Student's t. It contains 0 unless calibration is rejected,
    and it is conservative.
    """
    confidences, is_correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    n = len(confidences)
    if not n:
        return None
    used, bin_index = np.unique(np.minimum((confidences * bins).astype(int), bins - 1), return_inverse=True)
    inside = np.zeros((n, len(used)))
    inside[np.arange(n), bin_index] = 1 / n
    gaps = np.abs((is_correct - confidences) @ inside)
    error = float(gaps.sum())
    value = max(0.0, error - float(_excess(gaps, np.sqrt((confidences * (1 - confidences)) @ inside**2)).sum()))
    random = np.random.default_rng(seed)
    calibrated = np.concatenate([
        np.abs(((random.random((min(50, rounds - start), n)) < confidences) - confidences) @ inside).sum(axis=1)
        for start in range(0, rounds, 50)
    ])  # fmt: skip
    # One row of each kind is added, so that the variance is never 0.
    standard_error = math.sqrt((float(((is_correct - confidences) ** 2).sum()) + 0.5) / (n + 2) / n)
    half = student_t_quantile(confidence_level, n - 1) * standard_error
    excess = max(float(np.quantile(calibrated, 0.5 + confidence_level / 2)), float(calibrated.mean()) + half)
    return Estimate(value, min(value, max(0.0, error - excess)), min(1.0, error + half), n)


def _excess(means: Floats, deviations: Floats) -> Floats:
    """Return by how much the mean absolute value of normal variables exceeds ``means``, which are not negative."""
    sd = np.maximum(deviations, 1e-12)
    ratio = means / sd
    density = np.exp(-(ratio**2) / 2) * math.sqrt(2 / math.pi)
    normal = np.array([math.erf(x / math.sqrt(2)) for x in ratio])
    result: Floats = sd * density + means * (normal - 1)
    return result
