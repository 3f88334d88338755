"""What a command would ask, without asking: one rendered request, the number of calls, tokens and dollars at most.

Tokens are estimated at four characters each and replies at their allowed length, so the cost is an upper estimate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rlaif.config import Config
from rlaif.generate import prompts as taking
from rlaif.generate import sample as sampling
from rlaif.judge import ask as asking
from rlaif.llm.budget import Meter, price
from rlaif.llm.request import Request
from rlaif.pipeline.rounds import Rounds, panel, strategy
from rlaif.run import journal
from rlaif.run.directory import Run, require_completions

CHARS_PER_TOKEN = 4


@dataclass
class Plan:
    """``request``: the first that would be sent, or None. ``usd`` is None where a price is not known. ``what`` is asked
    for by the calls, in words, where they are of several kinds. ``prompts``: how many would be answered."""

    request: dict[str, Any] | None
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    at_most: bool = False
    what: str = ""
    prompts: int = 0

    def plus(self, other: Plan, times: int) -> Plan:
        """This and so many times the other."""
        usd = None if self.usd is None or other.usd is None else self.usd + times * other.usd
        return Plan(self.request or other.request, self.calls + times * other.calls,
                    self.prompt_tokens + times * other.prompt_tokens,
                    self.completion_tokens + times * other.completion_tokens,
                    usd, self.at_most or other.at_most, prompts=self.prompts)  # fmt: skip

    def summary(self) -> str:
        if not self.calls:
            return "nothing is owed: everything was answered before"
        cost = "cost unknown (no public price)" if self.usd is None else f"about ${self.usd:,.2f} at most"
        calls = f"at most {self.calls:,} calls" if self.at_most else f"{self.calls:,} calls"
        tokens = f"about {self.prompt_tokens:,} tokens in and up to {self.completion_tokens:,} out"
        what = f"{self.what}: " if self.what else ""
        return f"{what}{calls}, {tokens}; {cost}. No call was made."


def plan_generate(run: Run, config: Config) -> Plan:
    """The plan of ``generate``. Prompts are taken into a directory that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Run(Path(folder))
        taking.take(trial, config, say=lambda _: None)
        done = answered(run.journal_path("completions"))
        plan, prompts = Plan(None, 0, 0, 0, 0.0), set[str]()
        for position, policy in enumerate(config.pool()):
            requests = _noting(prompts, sampling.requests(trial, config, position, done))
            add(plan, requests, policy.model, policy.base_url, config.sampler.max_tokens)
        plan.prompts = len(prompts)
        return plan


def _noting(prompts: set[str], requests: Iterable[Request]) -> Iterator[Request]:
    for request in requests:
        prompts.add(request.prompt_id)
        yield request


def plan_judge(run: Run, config: Config) -> Plan:
    """The plan of ``judge``: all ratings, and every comparison that may become necessary."""
    require_completions(run)
    seats = panel(config)
    how = strategy(config, seats)
    rounds = Rounds(run, config, None, seats, how, None, Meter())
    done = answered(run.journal_path("verdicts"))
    modes = run.manifest()["stages"].get("judge", {}).get("modes", {})  # as it was found out when they were asked
    plan = Plan(None, 0, 0, 0, 0.0, at_most=True)
    prompts, answers = (journal.Reader(run.journal_path(name)) for name in ("prompts", "completions"))
    try:
        for seat in seats:
            kind = seat.judge.file.kind
            if (kind, how) in (("rate", "round-robin"), ("compare", "rate-only")):
                continue
            mode = (modes.get(seat.name) if config.judge.verdict == "auto" else None) or likely_mode(seat, config)
            work = [asking.Material(*row) for row in rounds.possible(kind).rows()]
            requests = (
                request
                for request in asking.requests(seat, mode, config, work, prompts.at, answers.at)
                if request.keys[0] not in done
            )
            add(plan, requests, seat.entry.model, seat.entry.base_url, config.judge.max_tokens)
    finally:
        prompts.close()
        answers.close()
    return plan


def likely_mode(seat: asking.Seat, config: Config) -> Any:
    """How the seat's model will be asked, as far as can be told without asking it."""
    if seat.judge.file.kind == "reward":
        return "score"
    if config.judge.verdict != "auto":
        return config.judge.verdict
    return "json" if seat.judge.file.reasoning == "first" else "logprobs" if seat.entry.base_url else "choice"


def add(plan: Plan, requests: Iterable[Request], model: str, urls: list[str], max_tokens: int) -> None:
    for request in requests:
        plan.request = plan.request or {"model": model, **request.body}
        prompt_tokens = len(orjson.dumps(request.body["messages"])) // CHARS_PER_TOKEN
        completion_tokens = len(request.keys) * min(max_tokens, request.body.get("max_tokens", 0))
        plan.calls += 1
        plan.prompt_tokens += prompt_tokens
        plan.completion_tokens += completion_tokens
        usd = price(model, urls[0], prompt_tokens, 0, completion_tokens) if urls else 0.0
        plan.usd = None if usd is None or plan.usd is None else plan.usd + usd


def answered(path: Path) -> set[str]:
    return {record["key"] for _, record in journal.read(path) if "error" not in record}
