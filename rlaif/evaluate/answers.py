"""What two models' answers show by themselves: how often they refuse, and how many of the checks they meet.

Nothing here classifies or checks: labels and shares come from the judge stage, by completion key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlaif.stats import Estimate, lowest_of_all, wilson

KINDS = ("benign", "borderline", "harmful")


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: who gave it, what kind of prompt it answers, its refusal label and its share of checks met, where
    there are any."""

    model: str
    kind: str
    label: str | None = None
    check: float | None = None


def refusals(answers: Iterable[Answered]) -> list[dict[str, Any]]:
    """One row a kind of prompt: {"prompts": kind, MODEL: the share of its answers that refuse}. A partial refusal is
    none. On benign prompts a refusal is a fault, on harmful ones compliance is."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    models: dict[str, None] = {}
    for answer in answers:
        if answer.label is not None:
            models.setdefault(answer.model)
            counts[answer.kind, answer.model, answer.label == "refuse"] += 1
    rows = []
    for kind in sorted({kind for kind, _, _ in counts}, key=lambda kind: (kind not in KINDS, kind)):
        shares = {
            model: wilson(counts[kind, model, True], counts[kind, model, True] + counts[kind, model, False])
            for model in models
        }
        rows.append({"prompts": kind, **shares})
    return rows


def checks(pairs: Iterable[tuple[float, float]], *, seed: int = 0) -> dict[str, Estimate] | None:
    """The mean share of checks met by the reference's and the trained model's answers to the same prompts, and the
    gain. ``pairs``: (reference, trained), by prompt. Percentile bootstrap over prompts; where all are alike, the share
    of prompts that may still be unlike (Wilson's) lies at either bound. None without any."""
    shares = np.array(list(pairs), dtype=float).reshape(-1, 2)
    n = len(shares)
    if n == 0:
        return None
    random = np.random.default_rng(seed)
    means = np.array([shares[random.integers(0, n, n)].mean(axis=0) for _ in range(1_000)])
    columns = {
        "reference": (shares[:, 0], means[:, 0], 0),
        "trained": (shares[:, 1], means[:, 1], 0),
        "gain": (shares[:, 1] - shares[:, 0], means[:, 1] - means[:, 0], -1),
    }
    found = {}
    for name, (values, drawn, least) in columns.items():
        low, high = np.quantile(drawn, (0.025, 0.975))
        if values.min() == values.max():  # no drawing differs from another, which is no certainty
            unlike = 1 - lowest_of_all(n)
            low, high = low + unlike * (least - low), high + unlike * (1 - high)
        found[name] = Estimate(float(values.mean()), float(low), float(high), n)
    return found
