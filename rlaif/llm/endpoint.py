"""One base URL of a model server: connections, rate limits, concurrency limit and back-off.

HTTP uses aiohttp directly: on one core and with a 50 ms server, the openai package sends 900 requests per second over
the same transport, and aiohttp 3,900. An exchange returns bytes or raises :class:`HTTPStatusError` (an error status) or
:class:`ConnectionLostError` (no connection, a cut one, no answer in time).
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from rlaif.errors import UsageError
from rlaif.llm.chat_protocol import CLASSIFY_PATH, error_message, parse_retry_after
from rlaif.llm.http_status import is_success
from rlaif.llm.pricing import is_local
from rlaif.serving.time_limits import METRICS_PATH, Patience, parse_metrics

BACKOFF_S = 10.0
"""Back-off after an endpoint's first failure, if there is another endpoint. It doubles with each further failure."""
MAX_BACKOFF_S = 300.0
CONNECT_TIMEOUT_S = 30.0
MAX_OPEN_FILES = 65_536
RESERVED_FILES = 128
"""Other open files of a run: journals, logs, a server's pipes, libraries."""
MAX_METRICS_FAILURES = 3
DOWNLOAD_READ_TIMEOUT_S = 900.0
"""How long a download may receive nothing. Other exchanges have one time limit for the whole exchange."""


class ConnectionLostError(Exception):
    """The connection could not be made, was cut, or brought no answer in time."""


class ResponseTimeoutError(ConnectionLostError):
    """No answer came in time over an open connection.

    ``silent_since``: time of the server's last progress (monotonic), if it is so long ago that the server seems to
    hang.
    """

    def __init__(self, message: str, silent_since: float | None = None) -> None:
        super().__init__(message)
        self.silent_since = silent_since


class HTTPStatusError(Exception):
    """The server answered with an error status. ``retry_after``: the delay in seconds that it asks for, if any."""

    def __init__(self, status: int, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class RateLimiter:
    """Limits of requests and tokens per minute, as one leaky bucket each.

    Requests are spread evenly, so that no window of one minute exceeds the limit by more than its first request.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._s_per_request = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request_at = self._next_token_at = 0.0

    def delay_s(self) -> float:
        """Return the time in seconds until the next request may be sent."""
        return max(0.0, max(self._next_request_at, self._next_token_at) - time.monotonic())

    def reserve(self, tokens: float) -> None:
        """Reserve a request of about ``tokens`` tokens, to be sent after :meth:`delay_s`."""
        now = time.monotonic() + self.delay_s()
        self._next_request_at = now + self._s_per_request
        self._next_token_at = max(self._next_token_at, now) + tokens * self._s_per_token

    def adjust(self, tokens: float) -> None:
        """Correct a reservation: the request took ``tokens`` more (or fewer, if negative) than reserved."""
        self._next_token_at += tokens * self._s_per_token


class Endpoint:
    """One base URL. Must be used and closed in one event loop.

    ``limit`` is the number of requests that may be in flight to it now. It halves on a 429 and on a timeout (once for
    all requests that were in flight together) and grows with every answer, up to ``max_limit``. ``patience`` decides
    how long requests wait.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        *,
        limit: float = 1.0,
        max_limit: float = 1.0,
        patience: Patience | None = None,
    ) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.limit, self._max_limit = limit, max_limit
        self._limit_halved_at = 0.0
        self.rate_limiter = RateLimiter(requests_per_minute, tokens_per_minute)
        self.patience = patience or Patience(600.0, None)
        self.is_vllm = False
        """True if its list of models names vLLM. Metrics are requested only then."""
        self._metrics_failures = 0
        """Failed readings of /metrics before the first successful one."""
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self._backoff_until = 0.0
        self.consecutive_failures = 0
        """Failures since the last answer."""

    @property
    def utilization(self) -> float:
        """Requests in flight divided by the limit."""
        return self.in_flight / self.limit

    def is_backing_off(self) -> bool:
        """Return True if another endpoint should be preferred. After a failure, one request at a time probes it."""
        return time.monotonic() < self._backoff_until or (self.consecutive_failures > 0 and self.in_flight > 0)

    def record_failure(self, retry_after: float | None = None) -> None:
        """Start a back-off of ``retry_after`` seconds, or of a time that doubles with each failure in a row."""
        now = time.monotonic()
        if now >= self._backoff_until:  # requests that were in flight together count as one failure
            self.consecutive_failures += 1
        backoff_s = retry_after
        if backoff_s is None:
            backoff_s = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** (self.consecutive_failures - 1))
        self._backoff_until = max(self._backoff_until, now + backoff_s)

    def record_success(self) -> None:
        """End the back-off and raise the limit a little."""
        self.consecutive_failures, self._backoff_until = 0, 0.0
        self.limit = min(self.limit + 1.0 / max(self.limit, 1.0), self._max_limit)

    def mark_unverified(self) -> None:
        """Have a new endpoint probed by one request before it gets more."""
        self.consecutive_failures = 1

    def record_overload(self, sent_at: float) -> None:
        """Halve the limit, unless it was already halved after the request was sent at ``sent_at``."""
        if sent_at >= self._limit_halved_at:
            self._limit_halved_at = time.monotonic()
            self.limit = max(1.0, self.limit / 2)

    def has_free_slot(self) -> bool:
        return self.in_flight < max(1, int(self.limit))

    async def send(self, method: str, path: str, timeout_s: float, data: Any = None, *, json: bool = True) -> bytes:
        """Make one HTTP exchange without retries. Raises :class:`HTTPStatusError` or :class:`ConnectionLostError`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(method, path, data, json=json)
        except TimeoutError:
            raise ResponseTimeoutError(f"no answer within {timeout_s:g} s") from None

    async def send_model_request(self, path: str, data: bytes, max_tokens: int) -> bytes:
        """Send one request for an answer of up to ``max_tokens`` tokens, and wait as long as ``patience`` allows.

        Raises :class:`HTTPStatusError`, :class:`ConnectionLostError` or :class:`ResponseTimeoutError`.
        """
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(self.patience.limit_s(max_tokens)) as timeout:
                with self.patience.track_request(max_tokens, timeout):
                    return await self._exchange("POST", path, data)
        except TimeoutError:
            waited = time.monotonic() - sent_at
            silent_since = self.patience.record_timeout(sent_at)
            self.record_overload(sent_at)
            raise ResponseTimeoutError(f"no answer within {round(waited, 1):g} s", silent_since) from None

    async def read_metrics(self, timeout_s: float) -> None:
        """Report a vLLM's load to ``patience``. An endpoint without metrics is not asked again after three failures."""
        if not self.is_vllm or self._metrics_failures >= MAX_METRICS_FAILURES:
            return
        try:
            load = parse_metrics((await self.send("GET", METRICS_PATH, timeout_s)).decode("utf-8", "replace"))
        except (ConnectionLostError, HTTPStatusError):
            load = None
        if load:
            self.patience.record_load(load)
        elif not self.patience.load:
            self._metrics_failures += 1

    async def _exchange(self, method: str, path: str, data: Any = None, *, json: bool = True) -> bytes:
        headers = {"Content-Type": "application/json"} if json and data is not None else {}
        try:
            async with self._get_session().request(method, self._url_for(path), data=data, headers=headers) as response:
                raw = await response.read()
        except aiohttp.ServerTimeoutError:  # also a TimeoutError, but the request was not sent
            raise ConnectionLostError(f"connection lost (not made within {CONNECT_TIMEOUT_S:g} s)") from None
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ConnectionLostError(f"connection lost ({_root_cause(error)})") from None
        if not is_success(response.status):
            raise HTTPStatusError(
                response.status, error_message(raw), parse_retry_after(response.headers.get("Retry-After", ""))
            )
        return raw

    def _url_for(self, path: str) -> str:
        return (self.url.removesuffix("/v1") if path in (CLASSIFY_PATH, METRICS_PATH) else self.url) + path

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:  # needs a running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                trust_env=not is_local(self.url),  # proxies from the environment are for other machines
                headers=self._headers,
            )
        return self._session

    async def download(self, path: str, destination: Path) -> None:
        """Write the body of a GET to a file in chunks.

        Raises :class:`HTTPStatusError`, :class:`ConnectionLostError` or OSError.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=DOWNLOAD_READ_TIMEOUT_S)
        try:
            async with self._get_session().get(self.url + path, timeout=timeout) as response:
                if not is_success(response.status):
                    raise HTTPStatusError(response.status, error_message(await response.read()), None)
                with destination.open("wb") as file:
                    async for chunk in response.content.iter_chunked(1 << 16):
                        file.write(chunk)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionLostError(f"connection lost ({_root_cause(error)})") from None

    async def close(self) -> None:
        if self._session:
            await self._session.close()


def raise_open_file_limit(connections: int) -> None:
    """Raise the soft limit of open files, within the hard limit, so that ``connections`` can be open at once.

    At most :data:`MAX_OPEN_FILES`: some containers allow a billion, and old programs loop over all of them.

    Raises :class:`UsageError` if the limit is too low. Otherwise it would look as if the server cut connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
    if soft != resource.RLIM_INFINITY and soft < connections + RESERVED_FILES:
        raise UsageError(
            f"{connections:,} concurrent requests need {connections + RESERVED_FILES:,} open files, "
            f"but the limit is {soft:,}",
            location="client.concurrency",
            hint=f"Lower it to {max(1, soft - RESERVED_FILES)}, or raise the limit of open files "
            "(`ulimit -n`, or `LimitNOFILE` in systemd).",
        )


def check_url(url: str) -> None:
    """Raise :class:`UsageError` if ``url`` is not an HTTP URL, or contains a user name or a password."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, is_valid = urlsplit(""), False
    if parts.username or parts.password:
        raise UsageError(
            "a base URL contains a user name or a password, and URLs are written to logs",
            hint="Remove it from the URL, and set the key in the environment: `export OPENAI_API_KEY=...`",
        )
    if not is_valid:
        raise UsageError(f"{url!r} is not a URL", hint="Set `--base-url` to a URL like http://127.0.0.1:8000/v1.")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
