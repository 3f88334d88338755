"""The budget, deadline and failure limit of one stage."""

from __future__ import annotations

from dataclasses import dataclass

from rlaif.config.models import Config
from rlaif.errors import TooManyFailuresError
from rlaif.llm.usage import UsageMeter


@dataclass(frozen=True)
class StageLimits:
    """What a stage may use where that is not the settings' whole: dollars, and until when (``time.monotonic()``)."""

    budget_usd: float | None = None
    deadline: float | None = None


def new_meter(task: str, config: Config, limits: StageLimits | None) -> UsageMeter:
    limits = limits or StageLimits(config.client.budget_usd)
    return UsageMeter(description=task, budget_usd=limits.budget_usd, deadline=limits.deadline)


def raise_if_too_many_failures(config: Config, usage: UsageMeter) -> None:
    if usage.failed > config.client.max_failures and not usage.stop_reason():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(usage.failures.items()))
        raise TooManyFailuresError(
            f"{usage.failed} answers are missing ({kinds}; allowed: {config.client.max_failures}). "
            f"The last error: {usage.last_error}",
            hint="The rest is kept. The same command asks for those again; --max-failures N accepts up to N.",
        )
