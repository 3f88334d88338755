"""Share of the removable label errors that reviewing ten percent of the pairs removes, for calibrated judges."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from rlaif.pair import human_calibration
from rlaif.pair.routing import inclusion_probabilities, pareto_sample
from rlaif.stats.calibration import logit

PAIRS, SHARE, DRAWS = 1000, 0.1, 60


def errors_removed(seed: int, accuracy: float, num_judges: int) -> tuple[float, float]:
    """Return the removed errors as a share of 0.05, by human labels alone and with calibration.

    Each judge is right with probability ``accuracy`` in each order, independently.
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, PAIRS)
    votes = [np.where(rng.random((2, PAIRS)) < accuracy, truth, 1 - truth).mean(axis=0) for _ in range(num_judges)]
    p = np.mean(votes, axis=0)
    none, topics = np.zeros(PAIRS, dtype=bool), [None] * PAIRS
    wrong = 1 - np.maximum(p, 1 - p)
    _, chance = inclusion_probabilities(wrong, np.ones(PAIRS), none, none, topics, round(SHARE * PAIRS))
    reviewed = pareto_sample(chance, rng.random(PAIRS))
    lengths = rng.integers(20, 400, (2, PAIRS)).astype(float) ** 2
    x = np.column_stack(
        [*map(logit, votes), (lengths[0] - lengths[1]) / lengths.sum(axis=0) * human_calibration.MAX_LOGIT]
    )
    prior = np.array([1 / num_judges] * num_judges + [0.0])
    prompts = pl.Series([f"{seed}-{i}" for i in range(PAIRS)])
    calibrated, _ = human_calibration.fit_and_predict(x, prior, np.where(reviewed, truth, np.nan), prompts)

    def is_right(p: np.ndarray) -> np.ndarray:
        return np.where(p == 0.5, 0.5, (p > 0.5) == (truth == 1))

    return tuple(float((np.where(reviewed, 1.0, is_right(q)) - is_right(p)).mean() / 0.05) for q in (p, calibrated))  # type: ignore[return-value]


@pytest.mark.parametrize(("accuracy", "num_judges"), [(0.8, 1), (0.65, 1), (0.8, 2)])
def test_review_removes_nine_tenths_of_removable_errors_and_calibration_costs_nothing(
    accuracy: float, num_judges: int
) -> None:
    labels_alone, calibrated = np.mean([errors_removed(seed, accuracy, num_judges) for seed in range(DRAWS)], axis=0)
    assert labels_alone >= 0.88
    assert calibrated >= labels_alone - 0.03
