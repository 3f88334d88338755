"""Calibration of probabilities: their correction by labels, and the agreement that can be certified."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Floats, binomial_tail

CLIP = 0.02
"""Probabilities are clipped to [CLIP, 1 - CLIP], so that verdicts of 0 and 1 have a finite logit."""


def logit(p: ArrayLike) -> Floats:
    """Return log(p / (1 - p)) of the clipped probabilities. logit(1 - p) is exactly -logit(p)."""
    clipped = np.clip(np.asarray(p, dtype=float), CLIP, 1 - CLIP)
    # The difference of two logarithms is exactly antisymmetric; log(p / (1 - p)) is not.
    result: Floats = np.log(clipped) - np.log(np.clip(1 - np.asarray(p, dtype=float), CLIP, 1 - CLIP))
    return result


def fit_antisymmetric_logistic(
    logits: ArrayLike,
    labels: ArrayLike,
    prior: ArrayLike | None = None,
    *,
    l2: float = 1.0,
    row_weights: ArrayLike | None = None,
) -> Floats:
    """Fit the weights w of logit P = sum_j w_j logit p_j, a logistic regression (Platt 1999).

    It has no intercept, so that swapping the two answers of every pair turns every probability into its complement. It
    has an L2 penalty on the distance from ``prior`` (default 0), so that few labels change little.

    ``logits``: n rows by j features; each feature changes its sign if the pair is swapped. ``labels``: 1 if a is
    better, 0 if b is. ``row_weights``: number of labels that each row counts as (default 1). Solved by Newton's method;
    the penalty makes the solution unique.
    """
    x, y = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    row_weight = np.ones(len(y)) if row_weights is None else np.asarray(row_weights, dtype=float)
    start = np.zeros(x.shape[1]) if prior is None else np.asarray(prior, dtype=float)
    w = start.copy()

    def loss(weights: Floats) -> float:
        z = x @ weights
        distance = weights - start
        return float(row_weight @ (np.logaddexp(0.0, z) - y * z)) + l2 / 2 * float(distance @ distance)

    for _ in range(100):
        p = sigmoid(x @ w)
        gradient = x.T @ (row_weight * (p - y)) + l2 * (w - start)
        hessian = (x * (row_weight * p * (1 - p))[:, None]).T @ x + l2 * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        before, size = loss(w), 1.0
        while size > 1e-6 and loss(w - size * step) > before - 0.25 * size * float(gradient @ step):
            size /= 2  # a full Newton step may overshoot if verdicts are near 0 or 1
        w = w - size * step
        if float(np.abs(step).max()) < 1e-10:
            break
    return w


def cross_fit(
    logits: ArrayLike,
    labels: ArrayLike,
    folds: ArrayLike,
    prior: ArrayLike | None = None,
    *,
    l2: float = 1.0,
    row_weights: ArrayLike | None = None,
) -> Floats:
    """Return P(a is better) for every row, with weights of :func:`fit_antisymmetric_logistic` from the other folds
    only.

    ``labels``: 1, 0, or nan for rows without a label. ``folds``: an integer per row; rows of one prompt share it.
    ``row_weights``: as for :func:`fit_antisymmetric_logistic`.
    """
    x, y, fold = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float), np.asarray(folds)
    row_weight = np.ones(len(y)) if row_weights is None else np.asarray(row_weights, dtype=float)
    labeled = ~np.isnan(y)
    result = np.empty(len(y))
    for test_fold in np.unique(fold):
        train_rows, test_rows = labeled & (fold != test_fold), fold == test_fold
        weights = fit_antisymmetric_logistic(
            x[train_rows], y[train_rows], prior, l2=l2, row_weights=row_weight[train_rows]
        )
        result[test_rows] = sigmoid(x[test_rows] @ weights)
    return result


def sigmoid(z: ArrayLike) -> Floats:
    """Return 1 / (1 + exp(-z)). sigmoid(-z) is exactly 1 - sigmoid(z)."""
    values = np.asarray(z, dtype=float)
    upper: Floats = 1 / (1 + np.exp(-np.abs(values)))
    return np.where(values >= 0, upper, 1 - upper)


@dataclass(frozen=True)
class Certificate:
    """A share of the pairs, those with a confidence of at least ``threshold``, for which the judge agrees with people
    at the target rate. ``tested``: labels in the last test that passed; ``errors``: disagreements among them."""

    share: float
    threshold: float | None
    tested: int
    errors: int


def certify(
    confidence: ArrayLike, correct: ArrayLike, population: ArrayLike, *, target: float = 0.85, alpha: float = 0.1
) -> Certificate:
    """Certify the largest share of pairs for which agreement is at least ``target``, by fixed-sequence testing.

    Tests start at the most confident pairs and add less confident ones. Each test is an exact binomial test at
    ``alpha``; the first failure ends the sequence (Bauer 1991; Angelopoulos et al. 2021, arXiv:2110.01052; for judges
    Jung et al. 2024, arXiv:2407.18370). The probability that the agreement in the certified share is below ``target``
    is at most ``alpha``. If the first test fails, nothing is certified.

    ``confidence`` and ``correct`` (0/1): of labels sampled with equal probability and not used to compute the
    confidences. ``population``: all confidences. The sequence depends on confidences alone: it starts at the level with
    enough labels for a test without errors to pass, and has at most 40 levels of confidence.
    """
    confidences, is_correct, all_confidences = (
        np.asarray(values, dtype=float) for values in (confidence, correct, population)
    )
    min_labels = math.ceil(math.log(alpha) / math.log(target))
    best = Certificate(0.0, None, 0, 0)
    levels = np.unique(confidences)[::-1]
    counts = np.array([int((confidences >= level).sum()) for level in levels])
    levels, counts = levels[counts >= min_labels], counts[counts >= min_labels]
    if len(levels) > 40:
        levels = levels[np.unique(np.linspace(0, len(levels) - 1, 40).round().astype(int))]
    for level in levels:
        inside = confidences >= level
        n, hits = int(inside.sum()), int(is_correct[inside].sum())
        if binomial_tail(hits, n, target) > alpha:
            break
        best = Certificate(float((all_confidences >= level).mean()), float(level), n, n - hits)
    return best
