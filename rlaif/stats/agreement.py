"""Agreement of two or more annotators beyond chance, and the error rate of a single label that it implies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, Floats, normal_quantile, student_t_quantile, wilson

DRAWS = 2000
"""Draws of a posterior distribution. Their seed is fixed, so that equal labels give equal intervals."""


def cohen_kappa(table: ArrayLike, *, confidence_level: float = 0.95, n: float | None = None) -> Estimate | None:
    """Cohen's kappa (Cohen 1960) of a square table of counts, with a Bayesian interval (Basu, Banerjee and Sen 2000).

    ``n``: effective number of labels, if the table has weights instead of counts. None if kappa is not defined: without
    labels, or if both annotators always give the same label. The interval is the central part of the posterior of the
    cells' probabilities (:func:`_posterior_shares`). The usual asymptotic interval (Fleiss, Cohen and Everitt 1969)
    covers kappa in as few as 0.43 of samples of ten labels, because its variance is 0 in many of them.
    """
    counts = np.asarray(table, dtype=float)
    total = counts.sum()
    if total <= 0:
        return None
    size = float(total if n is None else n)
    kappa = _kappa((counts / total)[None])[0]
    if not np.isfinite(kappa):
        return None
    categories = len(counts)
    shares = _posterior_shares(counts.ravel() * (size / total), np.full(categories**2, categories**-2), size,
                               confidence_level)  # fmt: skip
    return _posterior_estimate(kappa, _kappa(shares.reshape(-1, categories, categories)), size, confidence_level)


def _kappa(shares: Floats) -> Floats:
    """Return kappa of each table of ``shares``, nan if it is not defined."""
    observed = np.einsum("kii->k", shares)
    expected = (shares.sum(axis=2) * shares.sum(axis=1)).sum(axis=1)
    undefined = expected >= 1 - 1e-12
    result: Floats = np.where(undefined, np.nan, (observed - expected) / np.where(undefined, 1.0, 1 - expected))
    return result


def krippendorff_alpha(units: Sequence[Sequence[str]], *, confidence_level: float = 0.95) -> Estimate | None:
    """Krippendorff's alpha for nominal labels (Krippendorff 2011), with a Bayesian bootstrap interval (Rubin 1981).

    Each unit is the sequence of its labels; units with fewer than two labels are ignored. None if alpha is not defined.
    The units have random shares (:func:`_posterior_shares`), and so have units with each possible pair of labels, which
    together count as one label. A bootstrap of the units alone misses every disagreement that a few units do not show.
    """
    paired = [unit for unit in units if len(unit) >= 2]
    names = sorted({label for unit in paired for label in unit})
    if len(names) < 2:
        return None
    column_of = {name: i for i, name in enumerate(names)}
    pairs_of_names = [list(pair) for pair in product(range(len(names)), repeat=2)]
    counts = np.zeros((len(paired) + len(pairs_of_names), len(names)))
    for row, indices in enumerate([[column_of[label] for label in unit] for unit in paired] + pairs_of_names):
        np.add.at(counts[row], indices, 1)
    size = counts.sum(axis=1)
    # Ordered pairs of different labels in each unit, weighted by 1 / (size - 1).
    disagreeing = (size**2 - (counts**2).sum(axis=1)) / (size - 1)
    n = len(paired)
    label_counts, total = counts[:n].sum(axis=0), float(size[:n].sum())
    by_chance = float(total**2 - (label_counts**2).sum())
    alpha = 1 - (total - 1) * float(disagreeing[:n].sum()) / by_chance
    shares = _posterior_shares(
        np.concatenate([np.ones(n), np.zeros(len(pairs_of_names))]),
        np.concatenate([np.zeros(n), np.full(len(pairs_of_names), 1 / len(pairs_of_names))]),
        n,
        confidence_level,
    )
    label_shares = shares @ counts / (shares @ size)[:, None]
    disagreement = shares @ disagreeing / (shares @ size)
    alphas = 1 - disagreement / np.maximum(1 - (label_shares**2).sum(axis=1), 1e-12)
    return _posterior_estimate(alpha, alphas, n, confidence_level)


def _posterior_shares(counts: Floats, prior: Floats, size: float, confidence_level: float) -> Floats:
    """Return draws of the population's shares of the categories with ``counts``, one draw per row.

    The draws are of a Dirichlet distribution. ``prior``: its counts before any label, one in total (Perks 1947), so
    that categories without a label keep a share and the interval is never a point. ``size`` labels tell their own
    variance only roughly, so they count less by the square of the ratio of the normal and the Student quantile.
    """
    ratio = normal_quantile(confidence_level) / student_t_quantile(confidence_level, size - 1)
    draws = np.random.default_rng(0).standard_gamma(counts * ratio**2 + prior, size=(DRAWS, len(counts)))
    result: Floats = draws / np.maximum(draws.sum(axis=1, keepdims=True), 1e-300)
    return result


def _posterior_estimate(value: float, draws: Floats, size: float, confidence_level: float) -> Estimate:
    low, high = np.nanquantile(draws, [0.5 - confidence_level / 2, 0.5 + confidence_level / 2])
    low, high = max(-1.0, min(value, float(low))), min(1.0, max(value, float(high)))
    return Estimate(float(value), low, high, round(size))


def single_rater_error(disagreement: float) -> float:
    """Error rate e of one annotator, from the rate d at which two annotators disagree.

    Solves d = 2e(1 - e), which assumes equal error rates and independent errors (Dawid and Skene 1979). At most 0.5.
    """
    return (1 - math.sqrt(max(0.0, 1 - 2 * disagreement))) / 2


CHANCE_NOISE_RATE = 0.45
"""Share of wrong labels from which on labels are close to chance: training on them is refused."""

MIN_AGREEMENT = 0.65
"""Agreement of annotators and judges below which labels should not be trained on, if its interval excludes more."""

MIN_PAIRS = 20
"""Pairs below which a share decides nothing."""
MIN_DECISIVE_PAIRS = 40
"""Pairs of equal weight as precise as which a share must be to stop a training."""


def has_precision_of(pairs: int, share: Estimate) -> bool:
    """Return True if ``share`` has at least ``pairs`` pairs and is as precise as a share of that many of equal weight.

    A few labels may represent most pairs. 95 % intervals of so few exclude the truth in 5 % of the runs, which is too
    often for a decision against good labels.
    """
    even = wilson(pairs / 2, pairs)
    return share.n >= pairs and even is not None and share.high - share.low <= even.high - even.low


def shows_noise(error: Estimate) -> bool:
    """Return True if an error rate is shown to be too high to train on (above 1 - ``MIN_AGREEMENT``)."""
    return has_precision_of(MIN_DECISIVE_PAIRS, error) and error.low > 1 - MIN_AGREEMENT


def noise_rate(judge_error: float, judged: int, human_error: float, reviewed: int) -> float:
    """Share of wrong labels in a dataset with ``judged`` rows labeled by judges and ``reviewed`` rows labeled by
    people.

    This is the label flip rate of the robust DPO loss (Chowdhury et al. 2024, arXiv:2403.00409). Always below 0.5.
    """
    rows = judged + reviewed
    return min(0.499, (judge_error * judged + human_error * reviewed) / rows) if rows else 0.0
