"""Estimates with their uncertainty, as pure functions of arrays.

``intervals``: proportions, ratios and bootstrap. ``agreement``: between judges and people, and among people.
``ppi``: what labels on a few say of the many. ``calibration``: probabilities that mean what they say, and what can be
certified. Every value comes as an :class:`Estimate`, with its interval and n.
"""

from rlaif.stats.agreement import cohen_kappa, krippendorff_alpha, noise_rate, single_rater_error
from rlaif.stats.calibration import (
    Certificate,
    certify,
    cross_fit,
    expected_calibration_error,
    fit_antisymmetric_logistic,
)
from rlaif.stats.intervals import (
    Estimate,
    bootstrap_ratio,
    clopper_pearson,
    hajek_mean,
    wilson,
    wilson_lower_if_all_succeed,
)
from rlaif.stats.ppi import ppi_mean

__all__ = [
    "Certificate",
    "Estimate",
    "bootstrap_ratio",
    "certify",
    "clopper_pearson",
    "cohen_kappa",
    "cross_fit",
    "expected_calibration_error",
    "fit_antisymmetric_logistic",
    "hajek_mean",
    "krippendorff_alpha",
    "noise_rate",
    "ppi_mean",
    "single_rater_error",
    "wilson",
    "wilson_lower_if_all_succeed",
]
