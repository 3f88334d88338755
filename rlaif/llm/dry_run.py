"""What a command would ask, without asking: one rendered request, the number of calls, tokens and dollars at most.

Tokens are estimated at four characters each and replies at their allowed length, so the cost is an upper estimate.
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
    """``request``: the first that would be sent, or None. ``cost_usd`` is None where a price is not known.
    ``description``: what is asked
    for by the calls, in words, where they are of several kinds. ``prompts``: how many would be answered."""

    request: dict[str, Any] | None
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    at_most: bool = False
    description: str = ""
    prompts: int = 0

    def combined_with(self, other: DryRun, times: int) -> DryRun:
        """This and so many times the other."""
        usd = None if self.cost_usd is None or other.cost_usd is None else self.cost_usd + times * other.cost_usd
        return DryRun(self.request or other.request, self.calls + times * other.calls,
                    self.prompt_tokens + times * other.prompt_tokens,
                    self.completion_tokens + times * other.completion_tokens,
                    usd, self.at_most or other.at_most, prompts=self.prompts)  # fmt: skip

    def summary(self) -> str:
        if not self.calls:
            return "nothing is owed: everything was answered before"
        cost = "cost unknown (no public price)" if self.cost_usd is None else f"about ${self.cost_usd:,.2f} at most"
        calls = f"at most {self.calls:,} calls" if self.at_most else f"{self.calls:,} calls"
        tokens = f"about {self.prompt_tokens:,} tokens in and up to {self.completion_tokens:,} out"
        prefix = f"{self.description}: " if self.description else ""
        return f"{prefix}{calls}, {tokens}; {cost}. No call was made."


def add_requests(plan: DryRun, requests: Iterable[Request], model: str, urls: list[str], max_tokens: int) -> None:
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
    return {record["key"] for _, record in journal.iter_records(path) if "error" not in record}
