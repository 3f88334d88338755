"""Estimates with confidence intervals, as pure functions of arrays. Most return an :class:`Estimate`.

- ``intervals``: proportions, ratios and bootstrap.
- ``agreement``: between judges and annotators, and among annotators.
- ``ppi``: means over many predictions, corrected by a few labels.
- ``calibration``: calibration of probabilities, and certified agreement.
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
