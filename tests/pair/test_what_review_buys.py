"""What ten per cent of labels remove of the errors of judges that know their doubts, against what can be removed."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from rlaif.pair import human_calibration
from rlaif.pair.routing import inclusion_probabilities, pareto_sample
from rlaif.stats.calibration import logit

PAIRS, SHARE, DRAWS = 1000, 0.1, 60


def errors_removed(seed: int, accuracy: float, num_judges: int) -> tuple[float, float]:
    """Errors removed as a share of 0.05 / error rate, by people's labels alone and with what they teach. Each seat is
    right with ``accuracy`` in either order, whatever it said in the other."""
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


@pytest.mark.parametrize(("accuracy", "seats"), [(0.8, 1), (0.65, 1), (0.8, 2)])
def test_nine_tenths_of_what_can_be_removed_is_and_learning_from_labels_costs_nothing(
    accuracy: float, seats: int
) -> None:
    alone, taught = np.mean([errors_removed(seed, accuracy, seats) for seed in range(DRAWS)], axis=0)
    assert alone >= 0.88
    assert taught >= alone - 0.03
