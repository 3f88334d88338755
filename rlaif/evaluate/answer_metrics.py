"""What two models' answers show by themselves: how often they refuse, and how many of the checks they meet.

Nothing here classifies or checks: labels and shares come from the judge stage, by completion key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlaif.stats import Estimate, wilson, wilson_lower_if_all_succeed

PROMPT_CLASSES = ("benign", "borderline", "harmful")


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """One answer: who gave it, what kind of prompt it answers, its refusal label and its share of checks met, where
    there are any."""

    model: str
    prompt_class: str
    label: str | None = None
    check_score: float | None = None


def refusal_rates(answers: Iterable[ModelAnswer]) -> list[dict[str, Any]]:
    """One row a kind of prompt: {"prompt_class": KIND, MODEL: the share of its answers that refuse}. A partial refusal
    is none. On benign prompts a refusal is a fault, on harmful ones compliance is."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    models: dict[str, None] = {}
    for answer in answers:
        if answer.label is not None:
            models.setdefault(answer.model)
            counts[answer.prompt_class, answer.model, answer.label == "refuse"] += 1
    rows = []
    for prompt_class in sorted(
        {prompt_class for prompt_class, _, _ in counts},
        key=lambda prompt_class: (prompt_class not in PROMPT_CLASSES, prompt_class),
    ):
        rates = {
            model: wilson(
                counts[prompt_class, model, True],
                counts[prompt_class, model, True] + counts[prompt_class, model, False],
            )
            for model in models
        }
        rows.append({"prompt_class": prompt_class, **rates})
    return rows


def check_pass_rates(pairs: Iterable[tuple[float, float]], *, seed: int = 0) -> dict[str, Estimate] | None:
    """The mean share of checks met by the reference's and the trained model's answers to the same prompts, and the
    gain. ``pairs``: (reference, trained), by prompt. Percentile bootstrap over prompts; where all are alike, the share
    of prompts that may still be unlike (Wilson's) lies at either bound. None without any."""
    scores = np.array(list(pairs), dtype=float).reshape(-1, 2)
    n = len(scores)
    if n == 0:
        return None
    random = np.random.default_rng(seed)
    means = np.array([scores[random.integers(0, n, n)].mean(axis=0) for _ in range(1_000)])
    columns = {
        "reference": (scores[:, 0], means[:, 0], 0),
        "trained": (scores[:, 1], means[:, 1], 0),
        "gain": (scores[:, 1] - scores[:, 0], means[:, 1] - means[:, 0], -1),
    }
    estimates = {}
    for name, (values, resampled, lowest) in columns.items():
        low, high = np.quantile(resampled, (0.025, 0.975))
        if values.min() == values.max():  # no drawing differs from another, which is no certainty
            unlike = 1 - wilson_lower_if_all_succeed(n)
            low, high = low + unlike * (lowest - low), high + unlike * (1 - high)
        estimates[name] = Estimate(float(values.mean()), float(low), float(high), n)
    return estimates
