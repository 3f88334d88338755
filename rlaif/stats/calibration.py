"""Probabilities that mean what they say: how far off they are, how labels mend them, and what can be certified."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, Floats, binomial_tail, resampled_sums

CLIP = 0.02
"""A judge that says 0 or 1 is taken at its word up to here, so that hard verdicts have a logit."""


def logit(p: ArrayLike) -> Floats:
    clipped = np.clip(np.asarray(p, dtype=float), CLIP, 1 - CLIP)
    # The difference of two logarithms turns its sign exactly when p and 1 - p change places; log(p / (1 - p)) does not.
    result: Floats = np.log(clipped) - np.log(np.clip(1 - np.asarray(p, dtype=float), CLIP, 1 - CLIP))
    return result


def expected_calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 10,
    confidence_level: float = 0.95,
    rounds: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """The mean gap between confidence and accuracy over ``bins`` equal bins of [0, 1], weighted by their rows (Naeini
    et al. 2015; Guo et al. 2017, arXiv:1706.04599), with a bootstrap interval.

    It is never negative, so chance alone makes it positive: the interval's low end says what is left without that.
    None without rows.
    """
    confidences, is_correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if not len(confidences):
        return None
    bin_index = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = np.zeros((len(confidences), bins))
    gaps[np.arange(len(confidences)), bin_index] = is_correct - confidences
    value = float(np.abs(gaps.sum(axis=0)).sum()) / len(confidences)
    resampled = np.abs(resampled_sums(gaps, rounds, np.random.default_rng(seed))).sum(axis=1) / len(confidences)
    # A resample's error has the sample's chance in it and its own once more; reflecting takes one of them back.
    low, high = 2 * value - np.quantile(resampled, [0.5 + confidence_level / 2, 0.5 - confidence_level / 2])
    return Estimate(value, min(value, max(0.0, float(low))), max(value, float(high)), len(confidences))


def fit_antisymmetric_logistic(
    logits: ArrayLike, labels: ArrayLike, prior: ArrayLike | None = None, *, l2: float = 1.0
) -> Floats:
    """w of logit P = sum_j w_j logit p_j, a logistic regression (Platt 1999) without intercept, so that exchanging the
    two answers of every pair turns every probability into its complement, and with an L2 penalty on the distance from
    ``prior`` (nothing, where it is not given), so that few labels change little.

    ``logits``: n rows by j features, each turning its sign with the pair. ``labels``: 1 where a is better, 0 where b
    is. Solved by Newton's method; the penalty makes it unique.
    """
    x, y = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    start = np.zeros(x.shape[1]) if prior is None else np.asarray(prior, dtype=float)
    w = start.copy()

    def loss(weights: Floats) -> float:
        z = x @ weights
        return float(np.logaddexp(0.0, z).sum() - y @ z) + l2 / 2 * float((weights - start) @ (weights - start))

    for _ in range(100):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - y) + l2 * (w - start)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + l2 * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        before, size = loss(w), 1.0
        while size > 1e-6 and loss(w - size * step) > before - 0.25 * size * float(gradient @ step):
            size /= 2  # a full Newton step may overshoot where verdicts are without doubt
        w = w - size * step
        if float(np.abs(step).max()) < 1e-10:
            break
    return w


def cross_fit(
    logits: ArrayLike, labels: ArrayLike, folds: ArrayLike, prior: ArrayLike | None = None, *, l2: float = 1.0
) -> Floats:
    """P(a is better) for every row, by :func:`fit_antisymmetric_logistic` weights that no label of the row's own fold
    has touched.

    ``labels``: 1, 0, or nan where there is none. ``folds``: a whole number for each row; rows of one prompt share it.
    """
    x, y, fold = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float), np.asarray(folds)
    labeled = ~np.isnan(y)
    result = np.empty(len(y))
    for test_fold in np.unique(fold):
        train_rows, test_rows = labeled & (fold != test_fold), fold == test_fold
        result[test_rows] = sigmoid(
            x[test_rows] @ fit_antisymmetric_logistic(x[train_rows], y[train_rows], prior, l2=l2)
        )
    return result


def sigmoid(z: ArrayLike) -> Floats:
    """1 / (1 + exp(-z)), so computed that sigmoid(-z) is 1 - sigmoid(z) to the last bit."""
    values = np.asarray(z, dtype=float)
    upper: Floats = 1 / (1 + np.exp(-np.abs(values)))
    return np.where(values >= 0, upper, 1 - upper)


@dataclass(frozen=True)
class Certificate:
    """``share`` of the pairs, those of confidence ``threshold`` or more, for which the judge agrees with people at
    least as often as was asked. ``tested``: labels of the last passed test; ``errors``: disagreements among them."""

    share: float
    threshold: float | None
    tested: int
    errors: int


def certify(
    confidence: ArrayLike, correct: ArrayLike, population: ArrayLike, *, target: float = 0.85, alpha: float = 0.1
) -> Certificate:
    """The largest share that can be certified by fixed-sequence testing: the most confident first, each test an exact
    binomial one at ``alpha``, until one fails (Bauer 1991; Angelopoulos et al. 2021, arXiv:2110.01052; for judges,
    Jung et al. 2024, arXiv:2407.18370). The chance that the agreement in the certified part is below ``target`` is at
    most ``alpha``. Nothing is certified where the first test fails.

    ``confidence`` and ``correct`` (0/1): labels that were drawn with equal probability and that had no part in making
    the confidences. ``population``: all confidences. The sequence is fixed by confidences alone: it starts where
    enough labels stand for a test without an error to pass, and goes on by levels of confidence, forty at most.
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
