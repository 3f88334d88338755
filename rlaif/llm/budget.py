"""Tokens, dollars, failures and the reasons to stop: one meter for everything that a command asks of models."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

NEARLY_ALL = 0.95
RECENT = 40


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, and what they cost in US dollars."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


@dataclass
class Meter:
    """What was asked and what came back. Shown by the console, written to the manifest, and asked whether to stop."""

    what: str = ""
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
    usd: float = 0.0
    waited_s: float = 0.0  # for answers, added up over the requests that got one
    started: float = field(default_factory=time.monotonic)
    interrupted: bool = False
    last_error: str = ""
    waiting: str = ""  # what for, where requests are not under way one by one
    server: str = ""  # what the servers of the requests in flight are doing
    down: list[str] = field(default_factory=list)  # endpoints that failed and have not answered since
    halted: str | None = None  # another reason to stop
    _asked_s: float = 0.0
    _asking_since: float | None = None
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Open while requests are under way: the rate is over this time, not over servers' starts."""
        self._asking_since = time.monotonic()
        try:
            yield
        finally:
            self._asked_s += time.monotonic() - self._asking_since
            self._asking_since = None

    def rate(self) -> float:
        """Answers a second while asking."""
        now = time.monotonic()
        return self.answers / max(1e-9, self._asked_s + (now - (self._asking_since or now)))

    @property
    def failed(self) -> int:
        return self.failures.total()

    def count(self, usage: Usage) -> None:
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.usd += usage.usd

    def succeeded(self, records: int) -> None:
        self.answers += records
        self._recent.append(True)

    def failed_with(self, kind: str, error: str, records: int = 1, *, refused: bool = False) -> None:
        """``refused``: by a server that would not take this one request, which says nothing of others."""
        self.failures[kind] += records
        self.last_error = error
        if not refused:
            self._recent.append(False)

    def hopeless(self) -> bool:
        """Nearly everything that was not refused fails: going on would only cost time or money."""
        return len(self._recent) == RECENT and self._recent.count(False) >= NEARLY_ALL * RECENT

    def reason_to_stop(self) -> str | None:
        """Why no further request may be sent, or None. Those in flight are let finish."""
        if self.interrupted:
            return "interrupted"
        if self.halted:
            return self.halted
        if self.budget_usd is not None and self.usd >= self.budget_usd:
            return f"the budget of ${self.budget_usd:g} is spent"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "the deadline is reached"
        return None

    def facts(self) -> dict[str, object]:
        return {
            "requests": self.requests,
            "answers": self.answers,
            "failures": dict(self.failures),
            "retries": self.retries,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "usd": round(self.usd, 6),
            "seconds": round(time.monotonic() - self.started, 3),
            "asking_s": round(self._asked_s, 3),
            "waited_s": round(self.waited_s, 3),
        }


def progress(meter: Meter) -> str:
    """One line: done of total, rate, time left, tokens, dollars, failures."""
    done, rate = meter.answers + meter.skipped, meter.rate()
    parts = [f"{meter.what}: {done:,}" + (f" of {meter.total:,}" if meter.total else "")]
    parts.append(f"{rate:.1f}/s" if rate < 100 else f"{rate:,.0f}/s")
    if meter.total and rate and meter.total > done:
        parts.append(f"{duration((meter.total - done) / rate)} left")
    parts.append(f"{short(meter.prompt_tokens)} + {short(meter.completion_tokens)} tokens")
    if meter.usd:
        parts.append(f"${meter.usd:,.4f}")
    if meter.waiting:
        parts.append(meter.waiting)
    if meter.server:
        parts.append(meter.server)
    if meter.down:
        parts.append(f"down: {', '.join(urlsplit(url).netloc for url in meter.down)}")
    if meter.retries:
        parts.append(f"{meter.retries} retries")
    if meter.failed:
        parts.append(f"{meter.failed} failed")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def short(tokens: float) -> str:
    """A large count in a few characters."""
    if tokens < 10_000:
        return f"{tokens:,.0f}"
    return f"{tokens / 1e3:.0f}k" if tokens < 1_000_000 else f"{tokens / 1e6:.1f}M"


def is_local(url: str) -> bool:
    return (urlsplit(url).hostname or "") in {"127.0.0.1", "localhost", "::1"}


@functools.cache
def is_priced(model: str, url: str) -> bool:
    """Whether dollars can be told for ``model`` at ``url`` (a server on this machine costs nothing: True)."""
    return is_local(url) or price(model, url, 1000, 0, 1000) is not None


def price(model: str, url: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float | None:
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
