"""Dry runs: one rendered request, and upper bounds of calls, tokens and cost. Nothing is sent.

The estimate assumes four characters per token and replies of the maximum length, so the cost is an upper estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rlaif.llm.pricing import request_cost
from rlaif.llm.request import Request
from rlaif.run import journal

CHARS_PER_TOKEN = 4


@dataclass
class DryRun:
    """Estimate of the requests of a command."""

    request: dict[str, Any] | None
    """The first request that would be sent, or None."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    """None if a price is unknown."""
    at_most: bool = False
    description: str = ""
    """The purpose of the calls, if there are several kinds."""
    prompts: int = 0
    """Number of prompts that would be answered."""

    def combined_with(self, other: DryRun, times: int) -> DryRun:
        """Return the sum of this estimate and ``times`` times the other."""
        cost_usd = None if self.cost_usd is None or other.cost_usd is None else self.cost_usd + times * other.cost_usd
        return DryRun(
            self.request or other.request,
            self.calls + times * other.calls,
            self.prompt_tokens + times * other.prompt_tokens,
            self.completion_tokens + times * other.completion_tokens,
            cost_usd,
            self.at_most or other.at_most,
            prompts=self.prompts,
        )

    def summary(self) -> str:
        """Return the estimate in one sentence."""
        if not self.calls:
            return "nothing is pending: everything is answered"
        cost = "cost unknown (no public price)" if self.cost_usd is None else f"at most about ${self.cost_usd:,.2f}"
        calls = f"at most {self.calls:,} calls" if self.at_most else f"{self.calls:,} calls"
        tokens = f"about {self.prompt_tokens:,} prompt tokens and up to {self.completion_tokens:,} completion tokens"
        prefix = f"{self.description}: " if self.description else ""
        return f"{prefix}{calls}, {tokens}; {cost}. No requests were sent."


def add_requests(plan: DryRun, requests: Iterable[Request], model: str, urls: list[str], max_tokens: int) -> None:
    """Add ``requests`` to ``plan``. Requests to a server that rlaif starts itself (no ``urls``) cost nothing."""
    for request in requests:
        plan.request = plan.request or {"model": model, **request.body}
        prompt_tokens = len(orjson.dumps(request.body["messages"])) // CHARS_PER_TOKEN
        completion_tokens = len(request.keys) * min(max_tokens, request.body.get("max_tokens", 0))
        plan.calls += 1
        plan.prompt_tokens += prompt_tokens
        plan.completion_tokens += completion_tokens
        usd = request_cost(model, urls[0], prompt_tokens, 0, completion_tokens) if urls else 0.0
        plan.cost_usd = None if usd is None or plan.cost_usd is None else plan.cost_usd + usd


def answered_keys(path: Path) -> set[str]:
    """Return the keys of the journal at ``path`` that have an answer."""
    return {record["key"] for _, record in journal.iter_records(path) if "error" not in record}
