"""Reasons why a stage or a run stops before all of its requests are answered."""

from __future__ import annotations

import enum


class StopReason(enum.StrEnum):
    """Reason why no further request is sent. JSON files hold the value; :func:`describe_stop` words it for users."""

    INTERRUPTED = "interrupted"
    BUDGET = "budget"
    """The budget is spent."""
    NEXT_BATCH_OVER_BUDGET = "next_batch_over_budget"
    """The next requests of a batch could cost more than is left of the budget."""
    DEADLINE = "deadline"
    DOES_NOT_FIT = "does_not_fit"
    """The estimate of ``rlaif run`` exceeds the time or the budget, so part of the prompts stays pending."""


def describe_stop(reason: StopReason, budget_usd: float | None = None) -> str:
    """Return ``reason`` as a clause for log lines and errors. ``budget_usd``: the budget in US dollars."""
    budget = "the budget" if budget_usd is None else f"the budget of ${budget_usd:g}"
    return {
        StopReason.INTERRUPTED: "interrupted",
        StopReason.BUDGET: f"{budget} is spent",
        StopReason.NEXT_BATCH_OVER_BUDGET: f"the next requests could exceed {budget}",
        StopReason.DEADLINE: "the deadline has passed",
        StopReason.DOES_NOT_FIT: "the pending requests do not all fit into the time and budget",
    }[reason]
