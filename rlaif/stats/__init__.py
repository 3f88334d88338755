"""Estimates with their uncertainty, as pure functions of arrays.

``intervals``: proportions, ratios and bootstrap. ``agreement``: between judges and people, and among people.
``ppi``: what labels on a few say of the many. ``calibration``: probabilities that mean what they say, and what can be
certified. Every value comes as an :class:`Estimate`, with its interval and n.
"""

from rlaif.stats.agreement import cohen_kappa, error_of_one, krippendorff_alpha, noise_rate
from rlaif.stats.calibration import Certificate, antisymmetric, certify, cross_fitted, expected_calibration_error
from rlaif.stats.intervals import Estimate, bootstrap_ratio, clopper_pearson, hajek, lowest_of_all, wilson
from rlaif.stats.ppi import ppi_mean

__all__ = [
    "Certificate",
    "Estimate",
    "antisymmetric",
    "bootstrap_ratio",
    "certify",
    "clopper_pearson",
    "cohen_kappa",
    "cross_fitted",
    "error_of_one",
    "expected_calibration_error",
    "hajek",
    "krippendorff_alpha",
    "lowest_of_all",
    "noise_rate",
    "ppi_mean",
    "wilson",
]
