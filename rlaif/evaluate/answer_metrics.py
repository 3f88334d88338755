"""Refusal rates and check pass rates of two models' answers.

Nothing is classified or checked here: labels and check scores come from the judge stage, per completion key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlaif.stats import Estimate, wilson, wilson_lower_if_all_succeed

PROMPT_CLASSES = ("benign", "borderline", "harmful")
Role = Literal["reference", "trained"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """One answer: the model that gave it, the class of its prompt, and its refusal label if it has one."""

    model: Role
    prompt_class: str
    label: str | None = None


@dataclass(frozen=True, slots=True)
class RefusalRates:
    """Shares of refusals among both models' answers to prompts of one class. None: no answer has a label."""

    prompt_class: str
    reference: Estimate | None
    trained: Estimate | None


@dataclass(frozen=True, slots=True)
class CheckPassRates:
    """Mean shares of checks passed by both models' answers to the same prompts, and the gain (trained - reference)."""

    reference: Estimate
    trained: Estimate
    gain: Estimate


def refusal_rates(answers: Iterable[ModelAnswer]) -> list[RefusalRates]:
    """Return the refusal rates per class of prompt. A partial refusal does not count as a refusal.

    On benign prompts a refusal is an error; on harmful prompts compliance is.
    """
    counts: Counter[tuple[str, Role, bool]] = Counter()
    for answer in answers:
        if answer.label is not None:
            counts[answer.prompt_class, answer.model, answer.label == "refuse"] += 1

    def rate(prompt_class: str, model: Role) -> Estimate | None:
        refused = counts[prompt_class, model, True]
        return wilson(refused, refused + counts[prompt_class, model, False])

    classes = sorted(
        {prompt_class for prompt_class, _, _ in counts}, key=lambda name: (name not in PROMPT_CLASSES, name)
    )
    return [RefusalRates(name, rate(name, "reference"), rate(name, "trained")) for name in classes]


def check_pass_rates(pairs: Iterable[tuple[float, float]], *, seed: int = 0) -> CheckPassRates | None:
    """Return the mean check scores of both models and the gain, or None without ``pairs``.

    ``pairs``: scores of the reference's and the trained model's answer, per prompt. Intervals are percentile bootstrap
    over prompts. If all prompts have the same score, either bound allows for the share of prompts that could still
    differ (Wilson).
    """
    scores = np.array(list(pairs), dtype=float).reshape(-1, 2)
    n = len(scores)
    if n == 0:
        return None
    random = np.random.default_rng(seed)
    means = np.array([scores[random.integers(0, n, n)].mean(axis=0) for _ in range(1_000)])

    def estimate(values: Floats, resampled: Floats, lowest: float) -> Estimate:
        low, high = np.quantile(resampled, (0.025, 0.975))
        if values.min() == values.max():  # no resample differs from another, which does not make the value certain
            could_differ = 1 - wilson_lower_if_all_succeed(n)
            low, high = low + could_differ * (lowest - low), high + could_differ * (1 - high)
        return Estimate(float(values.mean()), float(low), float(high), n)

    return CheckPassRates(
        reference=estimate(scores[:, 0], means[:, 0], 0),
        trained=estimate(scores[:, 1], means[:, 1], 0),
        gain=estimate(scores[:, 1] - scores[:, 0], means[:, 1] - means[:, 0], -1),
    )
