"""Settings of ``rlaif plan`` that have no flag of their own: ``--set KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlaif.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class PlanSetting:
    """``text``: what it is, with unit and default. ``low`` and ``high``: the range of numbers; None is open."""

    text: str
    kind: type[int] | type[float] | type[str] = float
    low: float | None = None
    high: float | None = None

    def parse(self, text: str) -> Any:
        """Convert ``text``. Raises ValueError, with the expected form, if it is not a valid value."""
        if self.kind is str:
            return text
        try:
            value = int(text) if self.kind is int else float(text)
        except ValueError:
            raise ValueError("an integer" if self.kind is int else "a number") from None
        if (self.low is not None and not value >= self.low) or (self.high is not None and not value <= self.high):
            bounds = f"between {self.low:g} and {self.high:g}" if self.high is not None else f"of {self.low:g} or more"
            raise ValueError(f"a number {bounds}")
        return value


PLAN_SETTINGS: dict[str, PlanSetting] = {
    "prompt_tokens": PlanSetting("Mean prompt length in tokens [pilot, or 100]", low=1),
    "answer_tokens": PlanSetting("Mean answer length in tokens [pilot, or 300]", low=1),
    "pairs_per_prompt": PlanSetting("Pairs kept per prompt [pilot, or 0.8]", low=0),
    "strategy": PlanSetting("Judging strategy, as for `rlaif judge` [auto]", kind=str),
    "judge_base_url": PlanSetting("Endpoint URL of the judge [none]", kind=str),
    "requests_per_minute": PlanSetting("Rate limit of the endpoints [none]", low=0.001),
    "requests_per_second": PlanSetting("Requests per second that one run can send [1800]", low=0.1),
    "judge_gpus": PlanSetting("GPUs for judging [--gpus]", kind=int, low=1),
    "train_gpus": PlanSetting("GPUs for training [--gpus]", kind=int, low=1),
    "pilot_gpus": PlanSetting("GPUs that the pilot used [1]", kind=int, low=1),
    "train_pairs_per_second": PlanSetting("Training pairs per second per GPU [pilot]", low=1e-6),
    "human_fraction": PlanSetting("Fraction of pairs for human review [0.1]", low=0, high=1),
    "review_seconds": PlanSetting("Seconds per human review [pilot, or 30]", low=0.1),
    "hours_per_day": PlanSetting("Hours per day and annotator [2]", low=0.01, high=24),
    "usd_per_annotator_hour": PlanSetting("Annotator pay per hour in US dollars [0]", low=0),
    "runs": PlanSetting("Parallel runs, each with a part of the prompts [1]", kind=int, low=1),
    "memory_gb": PlanSetting("Memory of the machine that runs rlaif, in GB [64]", low=0.1),
}


def parse_settings(assignments: Iterable[str], flags: Iterable[str] = ()) -> dict[str, Any]:
    """Return the values of ``KEY=VALUE`` texts by key. ``flags``: names that have a flag of their own.

    Raises :class:`UsageError` for a text without ``=``, an unknown key or an invalid value.
    """
    values = dict[str, Any]()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"`--set` expects KEY=VALUE, got {assignment!r}", hint="Write it like `--set runs=4`.")
        if key in flags:
            flag = f"-{key}" if len(key) == 1 else f"--{key.replace('_', '-')}"
            raise UsageError(f"`--set` does not take {key!r}", hint=f"Use `{flag} {text}`.")
        if key not in PLAN_SETTINGS:
            raise UsageError(f"`--set` has no setting {key!r}", hint=did_you_mean(key, PLAN_SETTINGS))
        try:
            values[key] = PLAN_SETTINGS[key].parse(text.strip())
        except ValueError as error:
            raise UsageError(f"`--set {key}` expects {error}, got {text!r}") from None
    return values
