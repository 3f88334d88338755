"""Means over a population of strata of known size, each observed completely, by a sample, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from rlaif.stats.intervals import Estimate, Floats, hajek_mean

MIN_KNOWN_SHARE = 0.5
"""Share of the population below which the strata with observations do not estimate it."""


@dataclass(frozen=True)
class Stratum:
    """A part of the population: its size, and the observed units.

    ``values``: 0/1. ``weights``: inverse inclusion probabilities, of which only the ratios within the stratum matter.
    ``in_domain``: 1 for observed units that the mean is about, 0 for others, whose value does not matter; default: the
    mean is about all units.
    """

    size: int
    values: ArrayLike
    weights: ArrayLike
    in_domain: ArrayLike | None = None

    def domain(self) -> Floats:
        """Return ``in_domain`` as an array."""
        return np.ones(np.shape(self.values)) if self.in_domain is None else np.asarray(self.in_domain, dtype=float)


@dataclass(frozen=True)
class _Part:
    """A share or mean of one stratum. ``value`` is nan if nothing is known."""

    value: float
    low: float
    high: float


def stratified_mean(strata: Sequence[Stratum], *, confidence_level: float = 0.95) -> Estimate | None:
    """Estimate the mean of the domain: the sum of its values over its size, both over all strata.

    Each stratum counts by its known size (post-stratification: Holt and Smith 1979), not by the sum of its weights,
    which is random and 0 if no unit was observed. A stratum that was observed completely is known exactly. The share of
    the domain and its mean in another stratum have the intervals of :func:`rlaif.stats.hajek_mean`. They are combined
    by the squares of the changes that each bound causes (MOVER: Zou and Donner 2008; Newcombe 2011).

    A stratum without an observed value could have any mean. So the bounds assume the worst for it (Manski 2003), and
    the value assumes the mean of the others. If such strata are the larger part of the domain, the mean is unknown:
    returns None. The interval has no width only if every stratum is known exactly.
    """
    strata = [stratum for stratum in strata if stratum.size]
    parts = [_parts(stratum, confidence_level) for stratum in strata]
    n = sum(int(stratum.domain().sum()) for stratum in strata)
    shares, means = [share for share, _ in parts], [mean for _, mean in parts]
    if not n or _known_share(strata, shares, means) < MIN_KNOWN_SHARE:
        return None
    sizes = np.array([stratum.size for stratum in strata], dtype=float)
    value = _mean(sizes, _fill_in(shares, sizes), _fill_in(means, sizes))
    low = _bound(sizes, shares, means, lower=True)
    high = _bound(sizes, shares, means, lower=False)
    return Estimate(value, max(0.0, min(value, low)), min(1.0, max(value, high)), n)


def _parts(stratum: Stratum, confidence_level: float) -> tuple[_Part, _Part]:
    """Return the domain's share of the stratum, and its mean there."""
    in_domain, values, weights = (
        np.asarray(array, dtype=float) for array in (stratum.domain(), stratum.values, stratum.weights)
    )
    inside = in_domain > 0
    if len(in_domain) >= stratum.size:
        share = float(in_domain.mean())
        mean = float(values[inside].mean()) if inside.any() else 0.0
        return _Part(share, share, share), _Part(mean, mean, mean)
    mean_estimate = _as_part(hajek_mean(values[inside], weights[inside], confidence_level=confidence_level))
    if stratum.in_domain is None:
        return _Part(1.0, 1.0, 1.0), mean_estimate
    return _as_part(hajek_mean(in_domain, weights, confidence_level=confidence_level)), mean_estimate


def _as_part(estimate: Estimate | None) -> _Part:
    return _Part(estimate.value, estimate.low, estimate.high) if estimate else _Part(math.nan, 0.0, 1.0)


def _known_share(strata: Sequence[Stratum], shares: Sequence[_Part], means: Sequence[_Part]) -> float:
    sizes = np.array([stratum.size for stratum in strata], dtype=float)
    domain = sizes * [1.0 if math.isnan(share.value) else share.value for share in shares]
    is_known = np.array([not math.isnan(mean.value) for mean in means])
    # A stratum in which no observed unit belongs to the domain may still hold some of it.
    domain = np.where(is_known, domain, np.maximum(domain, sizes * [share.high for share in shares]))
    return float(domain[is_known].sum() / domain.sum()) if domain.sum() else 0.0


def _fill_in(parts: Sequence[_Part], sizes: Floats) -> Floats:
    """Return the values, with the mean of the known ones for those that are unknown."""
    values = np.array([part.value for part in parts])
    known = ~np.isnan(values)
    if known.any():
        values[~known] = float(np.average(values[known], weights=sizes[known]))
    return np.where(np.isnan(values), 0.0, values)


def _mean(sizes: Floats, shares: Floats, means: Floats) -> float:
    domain = sizes * shares
    return float(domain @ means / domain.sum()) if domain.sum() else 0.0


def _bound(sizes: Floats, shares: Sequence[_Part], means: Sequence[_Part], *, lower: bool) -> float:
    """Return a bound of the domain's mean, with the worst assumption on what is unknown."""
    worst = 0.0 if lower else 1.0
    # A stratum without an observed mean holds as much of the domain as it can.
    shares = [replace(share, value=share.high, low=share.high) if math.isnan(mean.value) else share
              for share, mean in zip(shares, means, strict=True)]  # fmt: skip
    means = [_Part(worst, worst, worst) if math.isnan(mean.value) else mean for mean in means]
    center_shares, center_means = (np.array([part.value for part in parts]) for parts in (shares, means))
    center = _mean(sizes, center_shares, center_means)
    squares = 0.0
    for index in range(len(sizes)):
        for is_share, part in ((True, shares[index]), (False, means[index])):
            changes = []
            for end in (part.low, part.high):
                changed_shares, changed_means = center_shares.copy(), center_means.copy()
                (changed_shares if is_share else changed_means)[index] = end
                changed = _mean(sizes, changed_shares, changed_means) if (sizes @ changed_shares) > 0 else center
                changes.append(center - changed if lower else changed - center)
            squares += max(0.0, *changes) ** 2
    return center - math.sqrt(squares) if lower else center + math.sqrt(squares)
