"""How often the trained model's answer beats its reference's, from comparisons in both orders, prompt by prompt.

A win needs both orders on one side; where they contradict each other, or the two answers are the same, it is a tie and
counts half. Everything is by prompt, and intervals are 95 %.
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
"""Keeps the fit finite where one side wins everything, and moves nothing that can be seen."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt: the probability that the trained model's answer is better when it stands first and when second, and
    both answers' lengths in characters. Equal answers are not judged: both probabilities are 0.5."""

    prob_first: float
    prob_second: float
    trained_chars: int
    reference_chars: int

    @property
    def score(self) -> float:
        """1 a win, 0 a loss, 0.5 a tie."""
        if (self.prob_first - 0.5) * (self.prob_second - 0.5) <= 0:
            return 0.5
        return 1.0 if self.prob_first > 0.5 else 0.0


@dataclass(frozen=True, slots=True)
class WinRate:
    wins: int
    ties: int
    losses: int
    win_rate: Estimate | None
    length_controlled: Estimate | None
    length_ratio: Estimate | None
    """The trained model's mean length over the reference's."""


def win_rate(comparisons: Sequence[Comparison], *, seed: int = 0) -> WinRate:
    """The win rate with ties as halves. Its interval is Wilson's, which is wide enough for halves too: a tie varies
    less than wins and losses do."""
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
    """The win rate that would be left if both answers had the same length (Dubois et al. 2024, arXiv:2404.04475).

    A logistic regression of the score on tanh of the standardised difference in length; the value is its prediction at
    a difference of zero. One pair of models is compared, so the paper's term for the prompt's difficulty, which only
    more models could tell apart, is left out. ``length_difference``: characters of the trained model's answer less the
    reference's. The interval is a percentile bootstrap over prompts, the win rate's own where all scores are the same.
    None without prompts.
    """
    n = len(scores)
    if n == 0:
        return None
    scale = float(length_difference.std()) or 1.0
    length = np.tanh(length_difference / scale)
    value = _win_rate_at_equal_length(scores, length)
    plain = wilson(float(scores.sum()), n)
    if plain and scores.min() == scores.max():  # no drawing differs from another, which is no certainty
        return Estimate(value, min(value, plain.low), max(value, plain.high), n)
    random = np.random.default_rng(seed)
    draws = (random.integers(0, n, n) for _ in range(BOOTSTRAP_DRAWS))
    rates = [_win_rate_at_equal_length(scores[draw], length[draw]) for draw in draws]
    low, high = np.quantile(rates, (0.025, 0.975))
    return Estimate(value, min(value, float(low)), max(value, float(high)), n)


def _win_rate_at_equal_length(scores: Floats, length: Floats) -> float:
    """sigmoid of the intercept of the ridge logistic regression of ``scores`` on ``length``, by Newton's method."""
    features = np.column_stack((np.ones_like(length), length))
    weights = np.zeros(2)
    ridge = RIDGE * np.eye(2)
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-features @ weights))
        gradient = features.T @ (p - scores) + ridge @ weights
        step = np.linalg.solve((features.T * (p * (1.0 - p))) @ features + ridge, gradient)
        # Far out the curve is flat and a whole step would overshoot.
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
