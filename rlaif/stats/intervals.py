"""Proportions and ratios with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval and the number of observations."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values, for a manifest."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def normal_quantile(confidence_level: float) -> float:
    """Normal quantile for a two-sided interval."""
    return NormalDist().inv_cdf(0.5 + confidence_level / 2)


def student_t_quantile(confidence_level: float, degrees_of_freedom: float) -> float:
    """Student's t quantile for a two-sided interval, by its expansion around the normal quantile (Cornish and Fisher
    1938). Accurate to 1 % from three degrees of freedom on, too small below; infinite for none."""
    z = normal_quantile(confidence_level)
    if degrees_of_freedom <= 0:
        return math.inf
    return (
        z
        + (z**3 + z) / (4 * degrees_of_freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees_of_freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees_of_freedom**3)
    )


def _wilson(p: float, n: float, confidence_level: float) -> tuple[float, float]:
    z = normal_quantile(confidence_level)
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # For p = 0 and p = 1 a bound is exactly 0 or 1; rounding would miss it by an ulp.
    return (0.0 if p <= 0 else max(0.0, center - half)), (1.0 if p >= 1 else min(1.0, center + half))


def wilson(successes: float, n: int, confidence_level: float = 0.95) -> Estimate | None:
    """Proportion with its Wilson score interval (Wilson 1927). None without observations."""
    if n == 0:
        return None
    return Estimate(successes / n, *_wilson(successes / n, n, confidence_level), n)


def wilson_lower_if_all_succeed(n: float, confidence_level: float = 0.95) -> float:
    """Lower bound of the Wilson interval if all ``n`` observations are successes. ``n`` may be an effective number."""
    return _wilson(1.0, n, confidence_level)[0]


def clopper_pearson(successes: int, n: int, confidence_level: float = 0.95) -> float:
    """Exact one-sided lower bound of a proportion (Clopper and Pearson 1934): the largest p for which the probability
    of at least ``successes`` successes is at most 1 - ``confidence_level``. 0 without successes."""
    if successes == 0:
        return 0.0
    low, high = 0.0, successes / n
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_tail(successes, n, middle) <= 1 - confidence_level:
            low = middle
        else:
            high = middle
    return low


def binomial_tail(successes: int, n: int, p: float) -> float:
    """Probability of at least ``successes`` successes in ``n`` trials."""
    if successes <= 0:
        return 1.0
    if not 0 < p < 1:
        return float(p >= 1)

    def log_probability(k: int) -> float:
        log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return log_choose + k * math.log(p) + (n - k) * math.log1p(-p)

    logs = [log_probability(k) for k in range(successes, n + 1)]
    largest = max(logs)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(value - largest) for value in logs))


def hajek_mean(
    values: ArrayLike, weights: ArrayLike, *, mean: float | None = None, confidence_level: float = 0.95
) -> Estimate | None:
    """Estimate the mean of 0/1 values in a population from a sample with known unequal inclusion probabilities.

    ``values`` and ``weights``: the sampled values and their inverse inclusion probabilities. The mean is the weighted
    mean of Hajek (1971), or ``mean``, if a better estimate is given. None without observations.

    The interval is Wilson's at the effective sample size, with Student's quantile (Korn and Graubard 1998). The
    effective size comes from the variance of the linearized mean, computed with one added label of each kind. If a few
    labels carry nearly all of the weight, this variance is as uncertain as one from that few labels, and they may agree
    by chance. Therefore the degrees of freedom are those of the effective number of Kish (1965), and on either side the
    interval is at least as wide as for that number of labels if all of them agreed.
    """
    y, w = (np.asarray(array, dtype=float) for array in (values, weights))
    total = float(w.sum())
    if not total:
        return None
    mean = min(1.0, max(0.0, float(w @ y) / total if mean is None else mean))
    kish = total**2 / float(w @ w)
    middle = (mean * kish + 1) / (kish + 2)  # keeps the variance above 0 if all labels agree
    variance = float(((w * (y - middle)) ** 2).sum()) / total**2
    effective = min(float(len(y)), max(1.0, middle * (1 - middle) / variance))
    effective *= (normal_quantile(confidence_level) / student_t_quantile(confidence_level, kish - 1)) ** 2
    low, high = _wilson(mean, effective, confidence_level) if effective else (0.0, 1.0)
    lowest = wilson_lower_if_all_succeed(kish, confidence_level)
    low, high = min(low, lowest * mean), max(high, 1 - lowest * (1 - mean))
    return Estimate(mean, low, high, len(y))


def bounded_mean(
    values: ArrayLike, *, lowest: float = 0.0, highest: float = 1.0, confidence_level: float = 0.95
) -> Estimate | None:
    """Estimate the mean of values between ``lowest`` and ``highest``. None without values.

    The interval is Wilson's at the effective sample size, with Student's quantile (Korn and Graubard 1998). One value
    of each extreme is added to the variance, so that values that are all equal do not make the mean certain.
    """
    x = np.asarray(values, dtype=float)
    if not len(x):
        return None
    return bounded_mean_of_moments(
        float(x.mean()), float(x.var()), len(x), lowest=lowest, highest=highest, confidence_level=confidence_level
    )


def bounded_mean_of_moments(
    mean: float,
    variance: float,
    n: int,
    *,
    lowest: float = 0.0,
    highest: float = 1.0,
    confidence_level: float = 0.95,
) -> Estimate:
    """Return :func:`bounded_mean` of ``n`` values with this mean and variance (divided by n)."""
    width = highest - lowest
    share = min(1.0, max(0.0, (mean - lowest) / width))
    middle = (share * n + 1) / (n + 2)
    squares = n * (variance / width**2 + (share - middle) ** 2) + middle**2 + (1 - middle) ** 2
    effective = middle * (1 - middle) * n * (n + 2) / squares
    effective *= (normal_quantile(confidence_level) / student_t_quantile(confidence_level, n - 1)) ** 2
    low, high = _wilson(share, effective, confidence_level) if effective else (0.0, 1.0)
    return Estimate(mean, min(mean, lowest + width * low), max(mean, lowest + width * high), n)


def unbounded_mean(values: ArrayLike, *, confidence_level: float = 0.95) -> Estimate | None:
    """Estimate the mean of values without known bounds, with Student's t interval. None without two values.

    Values that are all equal give an interval without width: they are taken for a constant, such as a cost of 0.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return None
    half = student_t_quantile(confidence_level, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, len(x))


def f1_score(both: int, one: int, *, confidence_level: float = 0.95) -> Estimate | None:
    """Estimate F1 from the number of rows that are positive by gold and prediction, and by only one of them.

    F1 is 2j / (1 + j) with j = both / (both + one), a proportion of the rows that are positive by either. So its
    interval is the transformed Wilson interval of j. None without such rows.
    """
    share = wilson(both, both + one, confidence_level)
    if share is None:
        return None
    value, low, high = (2 * j / (1 + j) for j in (share.value, share.low, share.high))
    return Estimate(value, low, high, share.n)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: ArrayLike,
    *,
    confidence_level: float = 0.95,
    rounds: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """Estimate sum(numerator) / sum(denominator), with a percentile interval from resampling entire ``groups`` (Efron
    1979; Davison and Hinkley 1997, ch. 3.8).

    Rows of one group, such as the pairs of a prompt, are resampled together. For the paired difference of two rules,
    give the difference of their values per row. None if the denominator is 0.
    """
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if not len(top) or bottom.sum() == 0:
        return None
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    n = int(index.max()) + 1
    sums = np.zeros((n, 2))
    np.add.at(sums, index, np.column_stack([top, bottom]))
    resampled = resampled_sums(sums, rounds, np.random.default_rng(seed))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = resampled[:, 0] / resampled[:, 1]
    low, high = np.nanquantile(ratios, [0.5 - confidence_level / 2, 0.5 + confidence_level / 2])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), len(top))


def resampled_sums(sums: Floats, rounds: int, rng: np.random.Generator, chunk: int = 1 << 22) -> Floats:
    """Return the column sums of ``rounds`` samples of the rows of ``sums`` with replacement. Memory is bounded."""
    n = len(sums)
    step = max(1, chunk // max(1, n))
    parts = [
        sums[rng.integers(0, n, size=(min(step, rounds - start), n))].sum(axis=1) for start in range(0, rounds, step)
    ]
    return np.concatenate(parts)
