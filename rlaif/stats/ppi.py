"""Prediction-powered inference: a mean over many predictions, put right by labels on a few."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, two_sided


def ppi_mean(
    labels: ArrayLike,
    predictions: ArrayLike,
    unlabelled: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    level: float = 0.95,
    trust: float | None = None,
) -> Estimate | None:
    """The mean label of the population that ``unlabelled`` predictions cover, by PPI++ (Angelopoulos, Duchi and Zrnic
    2023, arXiv:2311.01453).

    ``labels`` and ``predictions`` belong to the same n rows, ``weights`` say how many of the population each stands for
    (Horvitz and Thompson 1952, normalised as by Hajek; equal where not given). ``trust`` is the paper's lambda: how far
    predictions are believed, by default that of least variance, between 0 (labels alone) and 1 (classical PPI). The
    interval is normal, with n the number of labels. None with fewer than two labels or without predictions.
    """
    y, f, rest = (np.asarray(given, dtype=float) for given in (labels, predictions, unlabelled))
    n, many = len(y), len(rest)
    if n < 2 or not many:
        return None
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    w = w / w.sum()
    if trust is None:
        trust = _least_variance(y, f, rest, w)
    rectified = y - trust * f
    value = trust * float(rest.mean()) + float(w @ rectified)
    spread = float((w**2) @ (rectified - w @ rectified) ** 2) * n / (n - 1)
    half = two_sided(level) * math.sqrt(spread + trust**2 * float(rest.var()) / many)
    return Estimate(value, value - half, value + half, n)


def _least_variance(y: np.ndarray, f: np.ndarray, rest: np.ndarray, w: np.ndarray) -> float:
    """Lambda that minimises the variance: Cov(y, f) over Var(f), each as the weights have it, less where the unlabelled
    are few."""
    squared = w**2 * len(y) / (len(y) - 1)
    centred = f - w @ f
    within = float(squared @ centred**2) + float(rest.var()) / len(rest)
    if within <= 0:
        return 0.0
    return min(1.0, max(0.0, float(squared @ (centred * (y - w @ y))) / within))
