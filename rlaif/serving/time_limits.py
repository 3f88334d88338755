"""Time limits of requests, which distinguish slow servers from hung ones.

vLLM reports at ``/metrics`` how many tokens it has read and generated. While these counters grow, no request to it has
a time limit. It hangs if requests are waiting and no counter has moved for ``timeout_s``. For other servers the limit
follows the observed rate: twice the time that the slowest recent answer would have taken at the request's full length,
and at least ``timeout_s``. Until a server has answered once, each timeout doubles the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

METRICS_PATH = "/metrics"
RECENT_ANSWERS = 64
HEADROOM_FACTOR = 2.0
"""Factor by which an answer may take longer than the slowest recent one."""
MIN_RATE_TOKENS = 16
"""Shorter answers are mostly latency, so their rate is computed as if they had this many tokens."""
METRIC_LINE = re.compile(r"^vllm:(\w+?)(?:_total)?(?:\{[^}]*\})? ([0-9.eE+-]+)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """One reading of a vLLM's metrics, summed over its engines: requests now, and tokens since its start."""

    running: int
    waiting: int
    prompt_tokens: float
    generated_tokens: float


def parse_metrics(text: str) -> ServerLoad | None:
    """Parse vLLM's metrics in Prometheus' text format.

    Returns None if the metrics are not vLLM's, or its statistics are turned off.
    """
    sums: dict[str, float] = {}
    for name, value in METRIC_LINE.findall(text):
        with contextlib.suppress(ValueError):
            sums[name] = sums.get(name, 0.0) + float(value)
    if "generation_tokens" not in sums or "num_requests_running" not in sums:
        return None
    return ServerLoad(
        running=int(sums["num_requests_running"]),
        waiting=int(sums.get("num_requests_waiting", 0.0)),
        prompt_tokens=sums.get("prompt_tokens", 0.0),
        generated_tokens=sums["generation_tokens"],
    )


@dataclass(slots=True, eq=False)
class _InFlightRequest:
    """A request: its send time (monotonic), the maximum length of its answer, and its timer, if it has one."""

    sent_at: float
    max_tokens: int
    timeout: asyncio.Timeout | None


class Patience:
    """Time limits of the requests to one endpoint, for use in one event loop.

    ``timeout_s``: how long the endpoint may make no progress. ``deadline_s``: how long a request may wait in total;
    None for a managed server, which is restarted if it hangs and otherwise loses no request.
    """

    def __init__(self, timeout_s: float, deadline_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._deadline_s = None if deadline_s is None else max(timeout_s, deadline_s)
        self.load: ServerLoad | None = None
        """The latest reading of the metrics."""
        self.tokens_per_s: float | None = None
        """Tokens generated per second between the last two readings."""
        self._progress_at = self._read_at = self._timed_out_at = 0.0
        self._answers: deque[tuple[float, int]] = deque(maxlen=RECENT_ANSWERS)
        self._timeouts = 0
        self._in_flight: set[_InFlightRequest] = set()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def stalled_s(self) -> float:
        """Return for how many seconds requests have waited without progress; 0.0 without requests in flight."""
        oldest = min((request.sent_at for request in self._in_flight), default=time.monotonic())
        return time.monotonic() - max(oldest, self._progress_at)

    def limit_s(self, max_tokens: int) -> float:
        """Return how many seconds a request for up to ``max_tokens`` tokens may wait, from the answers so far."""
        slowest = max(
            (seconds * max(1.0, max_tokens / max(generated, MIN_RATE_TOKENS)) for seconds, generated in self._answers),
            default=0.0,
        )
        limit = max(self.timeout_s * 2.0**self._timeouts, HEADROOM_FACTOR * slowest)
        return limit if self._deadline_s is None else min(limit, self._deadline_s)

    @contextlib.contextmanager
    def track_request(self, max_tokens: int = 0, timeout: asyncio.Timeout | None = None) -> Iterator[None]:
        """Count a request as in flight, and let :meth:`update_limits` move its ``timeout``."""
        request = _InFlightRequest(time.monotonic(), max_tokens, timeout)
        self._in_flight.add(request)
        try:
            yield
        finally:
            self._in_flight.discard(request)

    def record_answer(self, sent_at: float, tokens: int) -> None:
        """Record that a request sent at ``sent_at`` was answered with ``tokens`` tokens."""
        self._progress_at = time.monotonic()
        self._timeouts = 0
        self._answers.append((self._progress_at - sent_at, tokens))

    def record_timeout(self, sent_at: float) -> float | None:
        """Record that a request sent at ``sent_at`` got no answer in time.

        Returns the time of the server's last progress, or None if it answers others or generates tokens.
        """
        if sent_at >= self._timed_out_at:  # requests that were in flight together count once
            self._timed_out_at = time.monotonic()
            self._timeouts += 1
        silent_since = max(sent_at, self._progress_at)
        return silent_since if time.monotonic() - silent_since >= 0.9 * self.timeout_s else None

    def record_load(self, load: ServerLoad) -> None:
        """Record a reading of the metrics."""
        now, previous = time.monotonic(), self.load
        if previous is None or (previous.prompt_tokens, previous.generated_tokens) != (
            load.prompt_tokens,
            load.generated_tokens,
        ):
            self._progress_at = now
        if previous is not None and load.generated_tokens >= previous.generated_tokens:
            self.tokens_per_s = (load.generated_tokens - previous.generated_tokens) / max(1e-9, now - self._read_at)
        self.load, self._read_at = load, now

    def update_limits(self) -> None:
        """Update the limits of the requests in flight from the latest answers and metrics."""
        for request in self._in_flight:
            if request.timeout and not request.timeout.expired():
                request.timeout.reschedule(self._deadline_of(request))  # the loop's clock is the monotonic one

    def _deadline_of(self, request: _InFlightRequest) -> float:
        by_rate = request.sent_at + self.limit_s(request.max_tokens)
        if self.load is None:
            return by_rate
        by_progress = max(request.sent_at, self._progress_at) + self.timeout_s
        if self._deadline_s is None:
            return by_progress
        # A server that rlaif does not manage may have lost this request while it serves others.
        return min(by_progress, max(by_rate, request.sent_at + self._deadline_s))
