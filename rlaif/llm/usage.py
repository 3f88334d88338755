"""Usage of a command: tokens, cost, failures, and the reasons to stop."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlaif.llm.stop_reason import StopReason

MIN_FAILURE_FRACTION = 0.95
RECENT_REQUESTS = 40


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request and their cost in US dollars."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


@dataclass
class UsageMeter:
    """Counters of requests and answers. The console shows them, the manifest stores them, and they decide when to
    stop."""

    description: str = ""
    total: int | None = None
    budget_usd: float | None = None
    deadline: float | None = None
    """Stop time on the clock of ``time.monotonic()``."""
    requests: int = 0
    answers: int = 0
    skipped: int = 0
    retries: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    request_wait_s: float = 0.0
    """Time spent waiting for answers, summed over the requests that got one."""
    started_at: float = field(default_factory=time.monotonic)
    interrupted: bool = False
    last_error: str = ""
    waiting_for: str = ""
    """Status of the batches, if requests are sent by batch."""
    server_status: str = ""
    """Load of the servers of the requests in flight."""
    endpoints_down: list[str] = field(default_factory=list)
    """URLs of the endpoints that have failed and not answered since."""
    stop_override: StopReason | None = None
    """Another reason to stop."""
    _request_wall_s: float = 0.0
    _timing_since: float | None = None
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT_REQUESTS))

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Count the time while the context is open towards :meth:`rate`. Server starts stay outside it."""
        self._timing_since = time.monotonic()
        try:
            yield
        finally:
            self._request_wall_s += time.monotonic() - self._timing_since
            self._timing_since = None

    def rate(self) -> float:
        """Return answers per second of the time counted by :meth:`timing`."""
        now = time.monotonic()
        return self.answers / max(1e-9, self._request_wall_s + (now - (self._timing_since or now)))

    @property
    def failed(self) -> int:
        return self.failures.total()

    def add(self, usage: Usage) -> None:
        """Add the tokens and the cost of one request."""
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.cost_usd += usage.cost_usd

    def record_success(self, records: int) -> None:
        """Count an answered request that produced ``records`` records."""
        self.answers += records
        self._recent.append(True)

    def record_failure(self, kind: str, error: str, records: int = 1, *, rejected: bool = False) -> None:
        """Count a failed request. ``rejected``: the server rejected this request alone, so other requests may
        succeed."""
        self.failures[kind] += records
        self.last_error = error
        if not rejected:
            self._recent.append(False)

    def mostly_failing(self) -> bool:
        """Return True if at least 95 % of the last 40 requests failed, not counting rejected ones."""
        return (
            len(self._recent) == RECENT_REQUESTS and self._recent.count(False) >= MIN_FAILURE_FRACTION * RECENT_REQUESTS
        )

    def stop_reason(self) -> StopReason | None:
        """Return why no further request may be sent, or None. Requests in flight may finish."""
        if self.interrupted:
            return StopReason.INTERRUPTED
        if self.stop_override:
            return self.stop_override
        if self.budget_usd is not None and self.cost_usd >= self.budget_usd:
            return StopReason.BUDGET
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return StopReason.DEADLINE
        return None

    def summary(self) -> dict[str, object]:
        """Return the counters as they are written to the manifest. Times are in seconds."""
        return {
            "requests": self.requests,
            "answers": self.answers,
            "failures": dict(self.failures),
            "retries": self.retries,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "cost_usd": round(self.cost_usd, 6),
            "seconds": round(time.monotonic() - self.started_at, 3),
            "request_wall_s": round(self._request_wall_s, 3),
            "request_wait_s": round(self.request_wait_s, 3),
        }
