"""Estimates with confidence intervals, as pure functions of arrays. Most return an :class:`Estimate`.

- ``intervals``: proportions, ratios and bootstrap.
- ``agreement``: between judges and annotators, and among annotators.
- ``stratified``: means over strata of known size.
- ``ppi``: means over many predictions, corrected by a few labels.
- ``calibration``: calibration of probabilities, and certified agreement.
- ``calibration_error``: expected calibration error.
"""

from rlaif.stats.agreement import cohen_kappa, krippendorff_alpha, noise_rate, single_rater_error
from rlaif.stats.calibration import (
    Certificate,
    certify,
    cross_fit,
    fit_antisymmetric_logistic,
)
from rlaif.stats.calibration_error import expected_calibration_error
from rlaif.stats.intervals import (
    Estimate,
    bootstrap_ratio,
    bounded_mean,
    bounded_mean_of_moments,
    clopper_pearson,
    f1_score,
    hajek_mean,
    unbounded_mean,
    wilson,
    wilson_lower_if_all_succeed,
)
from rlaif.stats.ppi import ppi_mean
from rlaif.stats.stratified import Stratum, stratified_mean

__all__ = [
    "Certificate",
    "Estimate",
    "Stratum",
    "bootstrap_ratio",
    "bounded_mean",
    "bounded_mean_of_moments",
    "certify",
    "clopper_pearson",
    "cohen_kappa",
    "cross_fit",
    "expected_calibration_error",
    "f1_score",
    "fit_antisymmetric_logistic",
    "hajek_mean",
    "krippendorff_alpha",
    "noise_rate",
    "ppi_mean",
    "single_rater_error",
    "stratified_mean",
    "unbounded_mean",
    "wilson",
    "wilson_lower_if_all_succeed",
]
