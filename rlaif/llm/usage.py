"""Tokens, dollars, failures and the reasons to stop: one meter for everything that a command asks of models."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

MIN_FAILURE_FRACTION = 0.95
RECENT_REQUESTS = 40


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, and what they cost in US dollars."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


@dataclass
class UsageMeter:
    """What was asked and what came back. Shown by the console, written to the manifest, and asked whether to stop."""

    description: str = ""
    total: int | None = None
    budget_usd: float | None = None
    deadline: float | None = None  # time.monotonic()
    requests: int = 0
    answers: int = 0
    skipped: int = 0
    retries: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    request_wait_s: float = 0.0  # for answers, added up over the requests that got one
    started_at: float = field(default_factory=time.monotonic)
    interrupted: bool = False
    last_error: str = ""
    waiting_for: str = ""  # what for, where requests are not under way one by one
    server_status: str = ""  # what the servers of the requests in flight are doing
    endpoints_down: list[str] = field(default_factory=list)  # endpoints that failed and have not answered since
    stop_message: str | None = None  # another reason to stop
    _request_wall_s: float = 0.0
    _timing_since: float | None = None
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT_REQUESTS))

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Open while requests are under way: the rate is over this time, not over servers' starts."""
        self._timing_since = time.monotonic()
        try:
            yield
        finally:
            self._request_wall_s += time.monotonic() - self._timing_since
            self._timing_since = None

    def rate(self) -> float:
        """Answers a second while asking."""
        now = time.monotonic()
        return self.answers / max(1e-9, self._request_wall_s + (now - (self._timing_since or now)))

    @property
    def failed(self) -> int:
        return self.failures.total()

    def add(self, usage: Usage) -> None:
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.cost_usd += usage.cost_usd

    def record_success(self, records: int) -> None:
        self.answers += records
        self._recent.append(True)

    def record_failure(self, kind: str, error: str, records: int = 1, *, rejected: bool = False) -> None:
        """``rejected``: by a server that would not take this one request, which says nothing of others."""
        self.failures[kind] += records
        self.last_error = error
        if not rejected:
            self._recent.append(False)

    def mostly_failing(self) -> bool:
        """Nearly everything that was not refused fails: going on would only cost time or money."""
        return (
            len(self._recent) == RECENT_REQUESTS and self._recent.count(False) >= MIN_FAILURE_FRACTION * RECENT_REQUESTS
        )

    def stop_reason(self) -> str | None:
        """Why no further request may be sent, or None. Those in flight are let finish."""
        if self.interrupted:
            return "interrupted"
        if self.stop_message:
            return self.stop_message
        if self.budget_usd is not None and self.cost_usd >= self.budget_usd:
            return f"the budget of ${self.budget_usd:g} is spent"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "the deadline is reached"
        return None

    def summary(self) -> dict[str, object]:
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


def progress_line(usage: UsageMeter) -> str:
    """One line: done of total, rate, time left, tokens, dollars, failures."""
    done, rate = usage.answers + usage.skipped, usage.rate()
    parts = [f"{usage.description}: {done:,}" + (f" of {usage.total:,}" if usage.total else "")]
    parts.append(f"{rate:.1f}/s" if rate < 100 else f"{rate:,.0f}/s")
    if usage.total and rate and usage.total > done:
        parts.append(f"{format_duration((usage.total - done) / rate)} left")
    parts.append(f"{format_count(usage.prompt_tokens)} + {format_count(usage.completion_tokens)} tokens")
    if usage.cost_usd:
        parts.append(f"${usage.cost_usd:,.4f}")
    if usage.waiting_for:
        parts.append(usage.waiting_for)
    if usage.server_status:
        parts.append(usage.server_status)
    if usage.endpoints_down:
        parts.append(f"down: {', '.join(urlsplit(url).netloc for url in usage.endpoints_down)}")
    if usage.retries:
        parts.append(f"{usage.retries} retries")
    if usage.failed:
        parts.append(f"{usage.failed} failed")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def format_count(count: float) -> str:
    """A large count in a few characters."""
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1e3:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def is_local(url: str) -> bool:
    return (urlsplit(url).hostname or "") in {"127.0.0.1", "localhost", "::1"}


@functools.cache
def has_known_price(model: str, url: str) -> bool:
    """Whether dollars can be told for ``model`` at ``url`` (a server on this machine costs nothing: True)."""
    return is_local(url) or request_cost(model, url, 1000, 0, 1000) is not None


def request_cost(model: str, url: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float | None:
    """US dollars of one request by the public price list, 0 on this machine, None where no price is known."""
    if is_local(url):
        return 0.0
    import genai_prices

    usage = genai_prices.Usage(
        input_tokens=prompt_tokens, cache_read_tokens=cached_tokens or None, output_tokens=completion_tokens
    )
    try:
        return float(genai_prices.calc_price(usage, model, provider_api_url=url).total_price)
    except LookupError:
        return None
