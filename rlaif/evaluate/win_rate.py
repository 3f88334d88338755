"""Win rate of the trained model against its reference, from one comparison per prompt in both orders.

A win needs both orders to agree. If they contradict each other, or if both answers are the same, it is a tie and counts
half. Intervals are 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlaif.stats import Estimate, wilson

BOOTSTRAP_DRAWS = 1_000
RIDGE = 1e-3
"""Keeps the fit finite if one side wins everything, without a visible effect on the result."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt: the probability that the trained model's answer is better if it is shown first and if it is shown
    second, and both answers' lengths in characters.

    Identical answers are not judged: both probabilities are 0.5.
    """

    prob_first: float
    prob_second: float
    trained_chars: int
    reference_chars: int

    @property
    def score(self) -> float:
        """Score of the trained model: 1 for a win, 0 for a loss, 0.5 for a tie."""
        if (self.prob_first - 0.5) * (self.prob_second - 0.5) <= 0:
            return 0.5
        return 1.0 if self.prob_first > 0.5 else 0.0


@dataclass(frozen=True, slots=True)
class WinRate:
    """Counts of prompts and estimates over them; an estimate is None without prompts."""

    wins: int
    ties: int
    losses: int
    win_rate: Estimate | None
    length_controlled: Estimate | None
    length_ratio: Estimate | None
    """Mean length of the trained model's answers, divided by that of the reference's."""


def win_rate(comparisons: Sequence[Comparison], *, seed: int = 0) -> WinRate:
    """Compute the win rate, with ties as halves, and its length-controlled form.

    Intervals are Wilson's, which are wide enough with halves: a tie varies less than wins and losses do.
    """
    scores = np.array([item.score for item in comparisons])
    wins, losses = int((scores == 1.0).sum()), int((scores == 0.0).sum())
    lengths = np.array([(item.trained_chars, item.reference_chars) for item in comparisons], dtype=float).reshape(-1, 2)
    return WinRate(
        wins=wins,
        ties=len(scores) - wins - losses,
        losses=losses,
        win_rate=wilson(float(scores.sum()), len(scores)),
        length_controlled=length_controlled(scores, lengths[:, 0] - lengths[:, 1], seed=seed),
        length_ratio=_ratio(lengths, seed=seed),
    )


def length_controlled(scores: Floats, length_difference: Floats, *, seed: int = 0) -> Estimate | None:
    """Estimate the win rate if both answers had the same length (Dubois et al. 2024, arXiv:2404.04475).

    A logistic regression of the score on tanh of the standardized difference in length, evaluated at a difference of
    zero. The paper's term for the difficulty of the prompt is omitted, because it cannot be estimated from one pair of
    models. ``length_difference``: characters of the trained model's answer minus the reference's. The interval is a
    percentile bootstrap over prompts, or the win rate's own if all scores are the same. Returns None without prompts.
    """
    n = len(scores)
    if n == 0:
        return None
    scale = float(length_difference.std()) or 1.0
    length = np.tanh(length_difference / scale)
    value = _win_rate_at_equal_length(scores, length)
    plain = wilson(float(scores.sum()), n)
    if (
        plain and scores.min() == scores.max()
    ):  # no resample differs from another, which does not make the value certain
        return Estimate(value, min(value, plain.low), max(value, plain.high), n)
    random = np.random.default_rng(seed)
    draws = (random.integers(0, n, n) for _ in range(BOOTSTRAP_DRAWS))
    rates = [_win_rate_at_equal_length(scores[draw], length[draw]) for draw in draws]
    low, high = np.quantile(rates, (0.025, 0.975))
    return Estimate(value, min(value, float(low)), max(value, float(high)), n)


def _win_rate_at_equal_length(scores: Floats, length: Floats) -> float:
    """Return the sigmoid of the intercept of a ridge logistic regression of ``scores`` on ``length``."""
    features = np.column_stack((np.ones_like(length), length))
    weights = np.zeros(2)  # fitted by Newton's method
    ridge = RIDGE * np.eye(2)
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-features @ weights))
        gradient = features.T @ (p - scores) + ridge @ weights
        step = np.linalg.solve((features.T * (p * (1.0 - p))) @ features + ridge, gradient)
        # Far from zero the curve is flat, and a full step would overshoot.
        weights -= step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if float(np.abs(step).max()) < 1e-8:
            break
    return 1.0 / (1.0 + math.exp(-float(weights[0])))


def _ratio(lengths: Floats, *, seed: int) -> Estimate | None:
    if not len(lengths) or not lengths[:, 1].sum():
        return None
    random = np.random.default_rng(seed)
    sums = (lengths[random.integers(0, len(lengths), len(lengths))].sum(axis=0) for _ in range(BOOTSTRAP_DRAWS))
    ratios = [float(trained / max(reference, 1.0)) for trained, reference in sums]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Estimate(float(lengths[:, 0].sum() / lengths[:, 1].sum()), float(low), float(high), len(lengths))
