"""What ten per cent of labels remove of the errors of judges that know their doubts, against what can be removed."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from rlaif.pair import calibrate
from rlaif.pair.route import inclusion, pareto
from rlaif.stats.calibration import logit

PAIRS, SHARE, DRAWS = 1000, 0.1, 60


def removed(seed: int, accuracy: float, seats: int) -> tuple[float, float]:
    """Errors removed as a share of 0.05 / error rate, by people's labels alone and with what they teach. Each seat is
    right with ``accuracy`` in either order, whatever it said in the other."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, PAIRS)
    said = [np.where(rng.random((2, PAIRS)) < accuracy, truth, 1 - truth).mean(axis=0) for _ in range(seats)]
    p = np.mean(said, axis=0)
    never, topics = np.zeros(PAIRS, dtype=bool), [None] * PAIRS
    wrong = 1 - np.maximum(p, 1 - p)
    _, chance = inclusion(wrong, np.ones(PAIRS), never, never, topics, round(SHARE * PAIRS))
    seen = pareto(chance, rng.random(PAIRS))
    lengths = rng.integers(20, 400, (2, PAIRS)).astype(float) ** 2
    x = np.column_stack([*map(logit, said), (lengths[0] - lengths[1]) / lengths.sum(axis=0) * calibrate.SURE])
    prior = np.array([1 / seats] * seats + [0.0])
    prompts = pl.Series([f"{seed}-{i}" for i in range(PAIRS)])
    taught, _ = calibrate.calibrated(x, prior, np.where(seen, truth, np.nan), prompts)

    def right(p: np.ndarray) -> np.ndarray:
        return np.where(p == 0.5, 0.5, (p > 0.5) == (truth == 1))

    return tuple(float((np.where(seen, 1.0, right(q)) - right(p)).mean() / 0.05) for q in (p, taught))  # type: ignore[return-value]


@pytest.mark.parametrize(("accuracy", "seats"), [(0.8, 1), (0.65, 1), (0.8, 2)])
def test_nine_tenths_of_what_can_be_removed_is_and_learning_from_labels_costs_nothing(
    accuracy: float, seats: int
) -> None:
    alone, taught = np.mean([removed(seed, accuracy, seats) for seed in range(DRAWS)], axis=0)
    assert alone >= 0.88
    assert taught >= alone - 0.03
