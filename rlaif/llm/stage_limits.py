"""The budget, deadline and failure limit of one stage."""

from __future__ import annotations

from dataclasses import dataclass

from rlaif.config.models import Config
from rlaif.errors import TooManyFailuresError
from rlaif.llm.usage import UsageMeter


@dataclass(frozen=True)
class StageLimits:
    """Limits of one stage that differ from those in the settings."""

    budget_usd: float | None = None
    deadline: float | None = None
    """Stop time on the clock of ``time.monotonic()``."""


def new_meter(task: str, config: Config, limits: StageLimits | None) -> UsageMeter:
    """Return a meter for ``task``; without ``limits``, with the budget of the settings."""
    limits = limits or StageLimits(config.client.budget_usd)
    return UsageMeter(description=task, budget_usd=limits.budget_usd, deadline=limits.deadline)


def raise_if_too_many_failures(config: Config, usage: UsageMeter) -> None:
    """Raise :class:`TooManyFailuresError` if more requests failed than ``client.max_failures`` allows."""
    if usage.failed > config.client.max_failures and not usage.stop_reason():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(usage.failures.items()))
        raise TooManyFailuresError(
            f"{usage.failed} answers are missing ({kinds}; `max_failures` is {config.client.max_failures}). "
            f"Last error: {usage.last_error}",
            hint="Rerun the same command to request them again, or accept up to N with `--max-failures N`. "
            "All other answers are kept.",
        )
