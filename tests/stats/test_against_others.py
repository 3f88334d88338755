"""rlaif's estimates compared with scipy, statsmodels, ppi-python and krippendorff on random cases, and closed forms."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif import stats
from rlaif.stats.intervals import binomial_tail
from tests.conftest import needs

RNG = np.random.default_rng(7)


@settings(deadline=None)  # the first call imports the other library
@given(n=st.integers(1, 400), data=st.data(), level=st.floats(0.5, 0.999))
def test_wilson_equals_statsmodels(n: int, data: st.DataObject, level: float) -> None:
    needs("statsmodels")
    from statsmodels.stats.proportion import proportion_confint

    k = data.draw(st.integers(0, n))
    estimate = stats.wilson(k, n, level)
    assert estimate is not None
    assert (estimate.low, estimate.high) == pytest.approx(
        proportion_confint(k, n, 1 - level, method="wilson"), abs=1e-9
    )


@settings(deadline=None)  # the first call imports the other library
@given(n=st.integers(1, 400), data=st.data(), level=st.floats(0.5, 0.999))
def test_the_exact_bound_equals_scipy(n: int, data: st.DataObject, level: float) -> None:
    needs("scipy")
    from scipy.stats import binom, binomtest

    k = data.draw(st.integers(0, n))
    exact = binomtest(k, n, alternative="greater").proportion_ci(level, method="exact").low
    assert stats.clopper_pearson(k, n, level) == pytest.approx(exact, abs=1e-9)
    p = data.draw(st.floats(0.01, 0.99))
    assert binomial_tail(k, n, p) == pytest.approx(binom.sf(k - 1, n, p), rel=1e-8, abs=1e-12)


def test_the_exact_bound_has_a_closed_form_without_errors() -> None:
    assert stats.clopper_pearson(20, 20, 0.95) == pytest.approx(0.05 ** (1 / 20))
    assert stats.clopper_pearson(0, 20) == 0.0


def test_kappa_equals_statsmodels() -> None:
    needs("statsmodels")
    from statsmodels.stats.inter_rater import cohens_kappa

    for size in (2, 3, 4):
        for _ in range(25):
            table = RNG.integers(0, 40, (size, size)) + np.eye(size, dtype=int)
            estimate, theirs = stats.cohen_kappa(table, confidence_level=0.9), cohens_kappa(table)
            assert estimate is not None
            assert estimate.value == pytest.approx(theirs.kappa)
            large, theirs = stats.cohen_kappa(100 * table, confidence_level=0.9), cohens_kappa(100 * table)
            assert large is not None
            half = 1.6448536269514722 * theirs.std_kappa  # the asymptotic interval
            assert large.low == pytest.approx(theirs.kappa - half, abs=0.1 * half)
            assert large.high == pytest.approx(theirs.kappa + half, abs=0.1 * half)
    assert stats.cohen_kappa([[5, 0], [0, 0]]) is None
    assert stats.cohen_kappa([[0, 0], [0, 0]]) is None


def test_alpha_equals_krippendorff() -> None:
    needs("krippendorff")
    import krippendorff

    for _ in range(40):
        annotators, pairs = int(RNG.integers(2, 6)), int(RNG.integers(5, 60))
        labels = RNG.integers(0, 3, (annotators, pairs)).astype(float)
        labels[:, : pairs // 2] = labels[0, : pairs // 2]
        labels[RNG.random(labels.shape) < 0.3] = np.nan
        units = [[str(label) for label in column if not np.isnan(label)] for column in labels.T]
        estimate = stats.krippendorff_alpha(units)
        assert estimate is not None
        theirs = krippendorff.alpha(reliability_data=labels, level_of_measurement="nominal")
        assert estimate.value == pytest.approx(theirs)
        assert estimate.low <= estimate.value <= estimate.high
    assert stats.krippendorff_alpha([["a", "a"], ["a"]]) is None


def test_labels_that_all_agree_are_not_certain() -> None:
    """With half of each label, chance agreement is one half, so kappa is twice as far below 1 as the agreement. The
    interval has to contain every value that gives n equal labels in 2.5 % of the samples."""
    for n in (4, 20, 400):
        kappa = stats.cohen_kappa([[n // 2, 0], [0, n // 2]])
        alpha = stats.krippendorff_alpha([["a", "a"], ["b", "b"]] * (n // 2))
        assert kappa is not None and alpha is not None
        assert (kappa.value, kappa.high, kappa.n) == (alpha.value, alpha.high, alpha.n) == (1.0, 1.0, n)
        exact = 1 - 2 * (1 - 0.025 ** (1 / n))
        assert kappa.low == pytest.approx(exact, abs=0.5 * (1 - exact))
        assert alpha.low == pytest.approx(exact, abs=0.5 * (1 - exact))


def test_ppi_equals_ppi_python() -> None:
    needs("ppi_py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ppi_py import ppi_mean_ci, ppi_mean_pointestimate

    for case in range(40):
        n, n_unlabeled = int(RNG.integers(20, 200)), int(RNG.integers(200, 3000))
        truth = RNG.random(n + n_unlabeled)
        labels = (RNG.random(n + n_unlabeled) < truth).astype(float)
        guess = np.clip(truth + RNG.normal(0, 0.2, n + n_unlabeled), 0, 1)
        weights = RNG.random(n) + 0.2 if case % 2 else None
        data = (labels[:n], guess[:n], guess[n:])
        for lambda_ in (0.0, 1.0, 0.4):
            estimate = stats.ppi_mean(*data, weights, confidence_level=0.9, lambda_=lambda_)
            assert estimate is not None
            point = float(np.ravel(ppi_mean_pointestimate(*data, lam=lambda_, w=weights))[0])
            assert estimate.value == pytest.approx(point)
            if weights is None:
                low, high = (float(np.ravel(x)[0]) for x in ppi_mean_ci(*data, alpha=0.1, lam=lambda_))
                # ppi-python divides by n, rlaif by n - 1.
                assert estimate.high - estimate.low == pytest.approx(high - low, rel=0.03)
        tuned = stats.ppi_mean(*data, weights, confidence_level=0.9)
        fixed = [
            stats.ppi_mean(*data, weights, confidence_level=0.9, lambda_=lambda_) for lambda_ in np.linspace(0, 1, 21)
        ]
        assert tuned is not None
        assert tuned.high - tuned.low <= min(one.high - one.low for one in fixed if one) + 1e-9
    assert stats.ppi_mean([1.0], [0.5], [0.5]) is None


def test_ppi_uses_perfect_predictions_and_ignores_useless_ones() -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    perfect = stats.ppi_mean(labels, labels, RNG.random(10**6) < 0.3)
    assert perfect is not None
    assert perfect.high - perfect.low < 0.01
    useless = stats.ppi_mean(labels, np.full(5, 0.5), np.full(100, 0.5))
    assert useless is not None
    assert useless.value == pytest.approx(labels.mean())


def test_the_weighted_mean_is_hajeks() -> None:
    values, weights = [1, 0, 1, 1], [10.0, 20.0, 10.0, 60.0]
    estimate = stats.hajek_mean(values, weights)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.8)
    assert estimate.n == 4
    equal_weights = stats.hajek_mean([1] * 30 + [0] * 10, [3.0] * 40)
    plain = stats.wilson(30, 40)
    assert equal_weights is not None
    assert plain is not None
    assert (equal_weights.value, equal_weights.n) == (plain.value, plain.n)
    assert (equal_weights.low, equal_weights.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    all_agree = stats.hajek_mean([1] * 12, [5.0] * 12)
    assert all_agree is not None
    assert all_agree.low < 0.85
    # Four labels have nearly all of the weight, so their agreement is as uncertain as that of four labels.
    few = stats.hajek_mean([0] * 4 + [1, 0] * 20, [90.0] * 4 + [0.05] * 40)
    assert few is not None
    assert few.low < few.value < 0.01
    assert few.high > 0.4
    better = stats.hajek_mean([1] * 30 + [0] * 10, [3.0] * 40, mean=0.8)
    assert better is not None
    assert (better.value, better.low < 0.7, better.high > 0.87) == (0.8, True, True)
    assert stats.hajek_mean([], []) is None


def test_a_stratum_counts_by_its_size_and_not_by_its_weights() -> None:
    certain = stats.Stratum(10, [0] * 8 + [1] * 2, [1.0] * 10)
    sampled = stats.Stratum(90, [1, 1, 1, 0], [5.0] * 4)
    estimate = stats.stratified_mean([certain, sampled])
    assert estimate is not None
    assert estimate.value == pytest.approx((2 + 90 * 0.75) / 100)
    assert estimate.n == 14
    part = stats.hajek_mean([1, 1, 1, 0], [5.0] * 4)
    assert part is not None
    # Only the sampled part is uncertain.
    assert estimate.low == pytest.approx((2 + 90 * part.low) / 100)
    assert estimate.high == pytest.approx((2 + 90 * part.high) / 100)


def test_a_mean_is_about_the_units_of_its_domain() -> None:
    certain = stats.Stratum(10, [0] * 8 + [1] * 2, [1.0] * 10, [1] * 5 + [0] * 3 + [1] * 2)
    sampled = stats.Stratum(90, [1, 1, 1, 0, 0, 0], [5.0] * 6, [1, 1, 1, 1, 0, 0])
    estimate = stats.stratified_mean([certain, sampled])
    assert estimate is not None
    assert estimate.value == pytest.approx((2 + 60 * 0.75) / (7 + 60))
    assert estimate.n == 11


def test_a_stratum_without_values_could_have_any_mean() -> None:
    known = stats.Stratum(60, [1] * 45 + [0] * 15, [1.0] * 60)
    estimate = stats.stratified_mean([known, stats.Stratum(40, [], [])])
    assert estimate is not None
    assert estimate.value == pytest.approx(0.75)
    assert (estimate.low, estimate.high) == (pytest.approx(0.45), pytest.approx(0.85))
    assert stats.stratified_mean([known, stats.Stratum(61, [], [])]) is None
    # Units outside the domain say nothing about those inside.
    assert stats.stratified_mean([known, stats.Stratum(90, [0, 0], [1.0, 1.0], [0, 0])]) is None
    exact = stats.stratified_mean([known])
    assert exact == stats.Estimate(0.75, 0.75, 0.75, 60)
    assert stats.stratified_mean([]) is None


def test_means_that_do_not_vary_are_not_certain() -> None:
    for n in (1, 5, 30, 300):
        for value in (-1.0, 0.0, 0.5, 1.0):
            estimate = stats.bounded_mean([value] * n, lowest=-1.0)
            assert estimate is not None
            assert estimate.low <= value <= estimate.high
            assert estimate.high - estimate.low > 1.5 / (n + 2)
    single = stats.bounded_mean([0.5])
    assert single == stats.Estimate(0.5, 0.0, 1.0, 1)
    many, plain = stats.bounded_mean([1] * 150 + [0] * 50), stats.wilson(150, 200)
    assert many is not None and plain is not None
    assert (many.low, many.high) == pytest.approx((plain.low, plain.high), abs=0.002)
    assert stats.bounded_mean([]) is None
    assert stats.unbounded_mean([3.0]) is None
    assert stats.unbounded_mean([0.0, 0.0]) == stats.Estimate(0.0, 0.0, 0.0, 2)


def test_student_intervals_equal_scipy() -> None:
    needs("scipy")
    from scipy.stats import t

    values = RNG.exponential(2, 12)
    estimate = stats.unbounded_mean(values)
    assert estimate is not None
    low, high = t.interval(0.95, 11, values.mean(), values.std(ddof=1) / 12**0.5)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-3)


def test_f1_has_the_interval_of_the_proportion_that_it_is_a_function_of() -> None:
    perfect = stats.f1_score(20, 0)
    share = stats.wilson(20, 20)
    assert perfect is not None and share is not None
    assert (perfect.value, perfect.high, perfect.n) == (1.0, 1.0, 20)
    assert perfect.low == pytest.approx(2 * share.low / (1 + share.low))
    some = stats.f1_score(30, 20)
    assert some is not None
    assert some.value == pytest.approx(2 * 30 / (2 * 30 + 20))
    assert stats.f1_score(0, 0) is None


def test_the_bootstrap_resamples_entire_groups() -> None:
    """Ten copies of a row in one group add no information; in separate groups they do."""
    values = np.tile(RNG.random(50) < 0.7, 10).astype(float)
    ones = np.ones(500)
    together = stats.bootstrap_ratio(values, ones, np.tile(np.arange(50), 10))
    apart = stats.bootstrap_ratio(values, ones, np.arange(500))
    assert together is not None
    assert apart is not None
    assert together.value == apart.value == pytest.approx(values.mean())
    assert together.high - together.low > 2.5 * (apart.high - apart.low)
    assert stats.bootstrap_ratio([], [], []) is None
    assert stats.bootstrap_ratio([1.0], [0.0], [1]) is None


def test_calibration_error_of_known_cases() -> None:
    estimate = stats.expected_calibration_error([0.95] * 60 + [0.55] * 40, [1] * 57 + [0] * 3 + [1] * 10 + [0] * 30)
    assert estimate is not None
    # The difference is 0 in one bin and 0.3 in the other, and chance alone adds to the first.
    excess = 0.6 * (2 * 0.95 * 0.05 / 60 / np.pi) ** 0.5
    assert estimate.value == pytest.approx(0.4 * 0.3 - excess, abs=1e-4)
    assert 0 < estimate.low < 0.12 < estimate.high
    always_right = stats.expected_calibration_error([1.0] * 30, [1] * 30)
    assert always_right is not None
    assert (always_right.value, always_right.low) == (0.0, 0.0)
    assert always_right.high > 0.03
    assert stats.expected_calibration_error([], []) is None


def test_the_error_of_one_annotator_and_the_noise_of_a_dataset() -> None:
    for error in (0.0, 0.05, 0.2, 0.5):
        assert stats.single_rater_error(2 * error * (1 - error)) == pytest.approx(error)
    assert stats.single_rater_error(0.8) == 0.5
    assert stats.noise_rate(0.1, 90, 0.0, 10) == pytest.approx(0.09)
    assert stats.noise_rate(1.0, 10, 1.0, 10) < 0.5
    assert stats.noise_rate(0.0, 0, 0.0, 0) == 0.0


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.1, 50))
def test_swapping_every_pair_complements_every_probability(seed: int, judges: int, l2: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, (80, judges))
    y = (rng.random(80) < 0.5).astype(float)
    y[rng.random(80) < 0.3] = np.nan
    folds, prior = rng.integers(0, 5, 80), rng.random(judges)
    swapped = np.asarray(rng.random(80) < 0.5)
    sign = np.where(swapped, -1.0, 1.0)
    before = stats.cross_fit(x, y, folds, prior, l2=l2)
    after = stats.cross_fit(x * sign[:, None], np.where(swapped, 1 - y, y), folds, prior, l2=l2)
    assert np.allclose(after, np.where(swapped, 1 - before, before), atol=1e-9)


def test_a_label_never_affects_the_probability_of_its_own_pair() -> None:
    x, y, folds = RNG.normal(0, 2, (50, 2)), (RNG.random(50) < 0.5).astype(float), np.arange(50) % 5
    before = stats.cross_fit(x, y, folds)
    for row in range(50):
        changed = y.copy()
        changed[row] = 1 - y[row]
        after = stats.cross_fit(x, changed, folds)
        assert after[row] == before[row]
        assert not np.array_equal(after, before)


def test_few_labels_change_little_and_many_decide() -> None:
    prior = np.array([0.5, 0.5])
    x = np.array([[3.9, -3.9]] * 400)
    few = stats.fit_antisymmetric_logistic(x[:2], np.ones(2), prior, l2=38.0)
    many = stats.fit_antisymmetric_logistic(x, np.ones(400), prior, l2=38.0)
    assert np.abs(few - prior).max() < 0.12
    assert many[0] > prior[0] + 0.2 > prior[1] - 0.2 > many[1]
    assert np.array_equal(stats.fit_antisymmetric_logistic(x[:0], np.ones(0), prior, l2=38.0), prior)


def test_the_regression_without_penalty_equals_statsmodels() -> None:
    needs("statsmodels")
    import statsmodels.api as sm

    x = RNG.normal(0, 1, (300, 3))
    y = (RNG.random(300) < 1 / (1 + np.exp(-x @ [1.0, -0.5, 0.2]))).astype(float)
    assert stats.fit_antisymmetric_logistic(x, y, l2=0.0) == pytest.approx(
        sm.Logit(y, x).fit(disp=False).params, abs=1e-6
    )
