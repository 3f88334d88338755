"""Coverage: 90 % intervals cover the truth in 88 to 92 % of the simulations, and certificates are violated in at most
their nominal share. The simulations are seeded, so the tests are deterministic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks import coverage as coverage_benchmark
from rlaif import stats
from rlaif.stats import Estimate

SIMULATIONS = 1000
Draw = Callable[[np.random.Generator], "Estimate | None"]


def coverage(draw: Draw, truth: float, *, simulations: int = SIMULATIONS, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    estimates = [draw(rng) for _ in range(simulations)]
    return float(np.mean([one is not None and one.low <= truth <= one.high for one in estimates]))


def wilson(rng: np.random.Generator) -> Estimate | None:
    n = int(rng.integers(60, 400))  # many sizes, because the coverage varies from one n to the next
    return stats.wilson(int(rng.binomial(n, 0.85)), n, 0.9)


def kappa(rng: np.random.Generator) -> Estimate | None:
    table = rng.multinomial(250, [0.42, 0.08, 0.09, 0.41]).reshape(2, 2)
    return stats.cohen_kappa(table, confidence_level=0.9)


KAPPA = (0.83 - (0.5 * 0.51 + 0.5 * 0.49)) / (1 - (0.5 * 0.51 + 0.5 * 0.49))


def bootstrap(rng: np.random.Generator) -> Estimate | None:
    """Four pairs per prompt, which share the prompt's difficulty."""
    right = rng.random((150, 4)) < rng.beta(6, 2, 150)[:, None]
    return stats.bootstrap_ratio(
        right.ravel(),
        np.ones(600),
        np.repeat(np.arange(150), 4),
        confidence_level=0.9,
        rounds=1000,
        seed=int(rng.integers(1 << 30)),
    )


def alpha(rng: np.random.Generator) -> Estimate | None:
    """Two annotators who each find the true label, one of two, with probability 0.9: alpha is 0.8 squared."""
    truth = rng.random(200) < 0.5
    labels = np.where(rng.random((200, 2)) < 0.9, truth[:, None], ~truth[:, None])
    return stats.krippendorff_alpha([list(map(str, row)) for row in labels], confidence_level=0.9)


def unequal(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors in 3,000 pairs with known probabilities; pairs with larger ones are sampled more often (Poisson
    sampling)."""
    p = rng.beta(1, 6, 3000)
    wrong = (rng.random(3000) < p).astype(float)
    worth = np.sqrt(np.clip(p, 0.02, 0.5))
    return wrong, p, np.minimum(1.0, 180 * worth / worth.sum())


def hajek(rng: np.random.Generator) -> Estimate | None:
    wrong, _, pi = unequal(rng)
    sampled = rng.random(3000) < pi
    return stats.hajek_mean(1 - wrong[sampled], 1 / pi[sampled], confidence_level=0.9)


def ppi(rng: np.random.Generator) -> Estimate | None:
    wrong, p, pi = unequal(rng)
    sampled = rng.random(3000) < pi
    guess = np.clip(p * 1.3, 0, 1)  # predictions need not be calibrated
    return stats.ppi_mean(wrong[sampled], guess[sampled], guess, 1 / pi[sampled], confidence_level=0.9)


def ppi_equal(rng: np.random.Generator) -> Estimate | None:
    p = rng.beta(2, 2, 1200)
    labels = (rng.random(1200) < p).astype(float)
    return stats.ppi_mean(labels[:150], p[:150], p[150:], confidence_level=0.9)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [(wilson, 0.85), (kappa, KAPPA), (bootstrap, 0.75), (alpha, 0.64), (hajek, 6 / 7), (ppi, 1 / 7), (ppi_equal, 0.5)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ninety_per_cent_intervals_cover_88_to_92(draw: Draw, truth: float) -> None:
    assert 0.88 <= coverage(draw, truth) <= 0.92


@pytest.mark.parametrize("n", [10, 30, 100])
@pytest.mark.parametrize("name", list(coverage_benchmark.SAMPLES))
def test_intervals_of_small_samples_cover_the_truth(name: str, n: int) -> None:
    """`python -m benchmarks.coverage` prints the full table. The bound is 0.93 less two standard errors."""
    trials = coverage_benchmark.sample_coverage(name, n, 150)
    assert coverage_benchmark.coverage(trials)[1] >= 0.93 - 2 * (0.93 * 0.07 / 150) ** 0.5
    assert all(one.estimate is None or one.estimate.high > one.estimate.low for one in trials)


def test_a_calibrated_judge_is_not_shown_to_be_miscalibrated() -> None:
    rng = np.random.default_rng(5)
    for n in (10, 46, 300):
        trials = [coverage_benchmark.sample_calibration_error(rng, n, 0.0) for _ in range(100)]
        estimates = [one.estimate for one in trials if one.estimate]
        assert len(estimates) == 100
        assert np.mean([one.low == 0 for one in estimates]) >= 0.95
        assert np.mean([one.value for one in estimates]) < 0.6 * np.mean([one.high for one in estimates])


def test_the_exact_bound_is_never_too_high() -> None:
    rng = np.random.default_rng(1)
    for p in (0.6, 0.85, 0.95):
        bounds = {k: stats.clopper_pearson(k, 80, 0.9) for k in range(81)}
        above = np.mean([bounds[int(k)] > p for k in rng.binomial(80, p, 20_000)])
        assert above <= 0.1 + 0.006


def is_violated(rng: np.random.Generator, accuracy: Callable[[np.ndarray], np.ndarray], labels: int) -> bool:
    """Return True if the certified share of a simulation has an agreement below the target."""
    confidence = 0.5 + rng.random(4000) / 2
    p = accuracy(confidence)
    correct = rng.random(4000) < p
    certificate = stats.certify(confidence[:labels], correct[:labels], confidence[labels:], target=0.85, alpha=0.1)
    if certificate.threshold is None:
        return False
    above = np.linspace(certificate.threshold, 1.0, 2001)
    return bool(accuracy(above).mean() < 0.85)


def test_the_certificate_is_violated_in_at_most_its_nominal_share() -> None:
    worst = {
        "at the target everywhere": lambda confidence: np.full_like(confidence, 0.8499),
        "falls below the target": lambda confidence: 0.7 + 0.55 * (confidence - 0.5),
        "confident and wrong": lambda confidence: 1.0 - 0.4 * confidence,
    }
    for accuracy in worst.values():
        rng = np.random.default_rng(3)
        violations = sum(is_violated(rng, accuracy, 200) for _ in range(SIMULATIONS))
        assert violations <= 0.1 * SIMULATIONS + 2.33 * (0.1 * 0.9 * SIMULATIONS) ** 0.5  # 99 % quantile


def test_nothing_is_certified_if_the_first_test_fails() -> None:
    confidence = np.linspace(1.0, 0.5, 400)
    correct = np.concatenate([np.zeros(20), np.ones(380)])
    assert stats.certify(confidence, correct, confidence).share == 0.0
    assert stats.certify(confidence, np.ones(400), confidence).share == 1.0
    assert stats.certify(confidence[:5], np.ones(5), confidence).share == 0.0  # five labels can certify nothing
    half = stats.certify(confidence, (confidence > 0.75).astype(float), confidence)
    assert 0.5 <= half.share <= 0.65
    assert half.tested >= 200
