"""Prediction-powered inference: a mean over many predictions, corrected by a few labels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, normal_quantile


def ppi_mean(
    labels: ArrayLike,
    predictions: ArrayLike,
    unlabeled: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    confidence_level: float = 0.95,
    lambda_: float | None = None,
) -> Estimate | None:
    """Estimate the mean label of a population by PPI++ (Angelopoulos, Duchi and Zrnic 2023, arXiv:2311.01453).

    ``labels`` and ``predictions``: values of the n labeled rows. ``unlabeled``: predictions for the population.
    ``weights``: inverse inclusion probabilities of the labeled rows (Horvitz and Thompson 1952, normalized as by Hajek;
    default equal). ``lambda_``: the paper's lambda, the trust in the predictions, from 0 (labels alone) to 1 (classical
    PPI); default the value of least variance. The interval is normal, with n the number of labels. None with fewer than
    two labels or without predictions.
    """
    y, f, rest = (np.asarray(array, dtype=float) for array in (labels, predictions, unlabeled))
    n, n_unlabeled = len(y), len(rest)
    if n < 2 or not n_unlabeled:
        return None
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    w = w / w.sum()
    if lambda_ is None:
        lambda_ = _lambda_of_least_variance(y, f, rest, w)
    rectified = y - lambda_ * f
    value = lambda_ * float(rest.mean()) + float(w @ rectified)
    spread = float((w**2) @ (rectified - w @ rectified) ** 2) * n / (n - 1)
    half = normal_quantile(confidence_level) * math.sqrt(spread + lambda_**2 * float(rest.var()) / n_unlabeled)
    return Estimate(value, value - half, value + half, n)


def _lambda_of_least_variance(y: np.ndarray, f: np.ndarray, rest: np.ndarray, w: np.ndarray) -> float:
    """Return the lambda of least variance: weighted Cov(y, f) / Var(f), less if there are few unlabeled rows."""
    squared = w**2 * len(y) / (len(y) - 1)
    centered = f - w @ f
    within = float(squared @ centered**2) + float(rest.var()) / len(rest)
    if within <= 0:
        return 0.0
    return min(1.0, max(0.0, float(squared @ (centered * (y - w @ y))) / within))
