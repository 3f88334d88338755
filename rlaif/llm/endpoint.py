"""One URL: its connections, how fast and how much it may be asked, and whether it is to be passed over for now.

HTTP by aiohttp alone: on one core and a 50 ms server the openai package sends 900 requests a second over the same
transport, and aiohttp 3,900. What comes back is bytes, or one of three errors: :class:`HTTPStatusError` (a status),
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
from rlaif.llm.pricing import is_local
from rlaif.serving.time_limits import METRICS_PATH, Patience, parse_metrics

BACKOFF_S = 10.0
"""How long an endpoint that failed is passed over while another one is there; twice as long each time after that."""
MAX_BACKOFF_S = 300.0
CONNECT_TIMEOUT_S = 30.0
MAX_OPEN_FILES = 65_536
RESERVED_FILES = 128
"""What else a run has open: journals, logs, a server's pipes, libraries."""
MAX_METRICS_FAILURES = 3
DOWNLOAD_READ_TIMEOUT_S = 900.0
"""How long a download may bring nothing. An exchange has its own time as a whole."""


class ConnectionLostError(Exception):
    """The connection was not made, was cut, or gave no answer in time."""


class ResponseTimeoutError(ConnectionLostError):
    """The connection was made, and no answer came in time. ``silent_since``: when the server last did anything
    (monotonic), if that is so long ago that it seems to hang."""

    def __init__(self, message: str, silent_since: float | None = None) -> None:
        super().__init__(message)
        self.silent_since = silent_since


class HTTPStatusError(Exception):
    """The server answered with a status that is no success. ``retry_after``: the seconds that it asks to wait, if
    any."""

    def __init__(self, status: int, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class RateLimiter:
    """Requests and tokens a minute, as a leaky bucket for each: what is taken is spread evenly, so that no minute,
    wherever it begins, holds more than the limit (and the one request that opens it)."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._s_per_request = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request_at = self._next_token_at = 0.0

    def delay_s(self) -> float:
        """How long until the next request may be sent."""
        return max(0.0, max(self._next_request_at, self._next_token_at) - time.monotonic())

    def reserve(self, tokens: float) -> None:
        """Book a request of about ``tokens``, to be sent after :meth:`delay_s`."""
        now = time.monotonic() + self.delay_s()
        self._next_request_at = now + self._s_per_request
        self._next_token_at = max(self._next_token_at, now) + tokens * self._s_per_token

    def adjust(self, tokens: float) -> None:
        """A request took ``tokens`` more (or fewer) than was booked."""
        self._next_token_at += tokens * self._s_per_token


class Endpoint:
    """One base URL. Used in one event loop, and closed in it.

    ``limit`` is how many requests may be in flight to it now: it halves on a 429 and on a time-out (once for all that
    were in flight together) and grows with every answer, up to ``max_limit``. ``patience`` decides how long requests
    wait.
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
        """Whether its list of models says so. Only then are its metrics asked for."""
        self._metrics_failures = 0
        """Readings of /metrics that failed, up to the first that succeeded."""
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self._backoff_until = 0.0
        self.consecutive_failures = 0
        """How often it has failed since it last answered."""

    @property
    def utilization(self) -> float:
        """What is in flight, as a share of what it bears."""
        return self.in_flight / self.limit

    def is_backing_off(self) -> bool:
        """Whether to pass it over while another one is there. After a failure one request at a time finds out whether
        it is back."""
        return time.monotonic() < self._backoff_until or (self.consecutive_failures > 0 and self.in_flight > 0)

    def record_failure(self, retry_after: float | None = None) -> None:
        """Let it rest: for ``retry_after`` seconds where it asked for that, else longer with each failure in a row."""
        now = time.monotonic()
        if now >= self._backoff_until:  # what was in flight together fails once
            self.consecutive_failures += 1
        backoff = (
            retry_after
            if retry_after is not None
            else min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** (self.consecutive_failures - 1))
        )
        self._backoff_until = max(self._backoff_until, now + backoff)

    def record_success(self) -> None:
        self.consecutive_failures, self._backoff_until = 0, 0.0
        self.limit = min(self.limit + 1.0 / max(self.limit, 1.0), self._max_limit)

    def mark_unverified(self) -> None:
        """It is new, and one request finds out whether it is there."""
        self.consecutive_failures = 1

    def record_overload(self, sent_at: float) -> None:
        """A request that was sent at ``sent_at`` was one too many."""
        if sent_at >= self._limit_halved_at:
            self._limit_halved_at = time.monotonic()
            self.limit = max(1.0, self.limit / 2)

    def has_free_slot(self) -> bool:
        return self.in_flight < max(1, int(self.limit))

    async def send(self, method: str, path: str, timeout_s: float, data: Any = None, *, json: bool = True) -> bytes:
        """One HTTP exchange, tried once. Raises :class:`HTTPStatusError` or :class:`ConnectionLostError`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(method, path, data, json=json)
        except TimeoutError:
            raise ResponseTimeoutError(f"no answer within {timeout_s:g} s") from None

    async def send_model_request(self, path: str, data: bytes, max_tokens: int) -> bytes:
        """Send one request for an answer of up to ``max_tokens`` tokens, and wait for as long as ``patience`` allows.

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
        """Let ``patience`` know how a vLLM gets on. An endpoint without such metrics is soon asked no more."""
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
        except aiohttp.ServerTimeoutError:  # a TimeoutError too, but the server was not even asked
            raise ConnectionLostError(f"connection lost (not made within {CONNECT_TIMEOUT_S:g} s)") from None
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ConnectionLostError(f"connection lost ({_root_cause(error)})") from None
        if response.status >= 300:
            raise HTTPStatusError(
                response.status, error_message(raw), parse_retry_after(response.headers.get("Retry-After", ""))
            )
        return raw

    def _url_for(self, path: str) -> str:
        return (self.url.removesuffix("/v1") if path in (CLASSIFY_PATH, METRICS_PATH) else self.url) + path

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:  # it wants a running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                trust_env=not is_local(self.url),  # a proxy from the environment is for what lies outside this machine
                headers=self._headers,
            )
        return self._session

    async def download(self, path: str, destination: Path) -> None:
        """The body of a GET into a file, piece by piece. Raises :class:`HTTPStatusError`, :class:`ConnectionLostError`
        or OSError."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=DOWNLOAD_READ_TIMEOUT_S)
        try:
            async with self._get_session().get(self.url + path, timeout=timeout) as response:
                if response.status >= 300:
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
    """Let this process hold ``connections`` open at once: raise the soft limit of open files as far as the hard one
    allows. (A limit of a thousand million, which some containers have, is left to them: old programs count through it.)

    Raises :class:`UsageError` where that is too few. Else it would read as a server that cuts connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
    if soft != resource.RLIM_INFINITY and soft < connections + RESERVED_FILES:
        raise UsageError(
            f"{connections:,} requests at once need {connections + RESERVED_FILES:,} open files, and {soft:,} are allowed",
            location="client.concurrency",
            hint=f"Lower it to {max(1, soft - RESERVED_FILES)}, or raise the limit (ulimit -n, LimitNOFILE in systemd).",
        )


def check_url(url: str) -> None:
    """Raises :class:`UsageError`."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, is_valid = urlsplit(""), False
    if parts.username or parts.password:
        raise UsageError("a base URL holds a name or a password, and URLs are written into logs",
                         hint="Take it out, and put the key into the environment as OPENAI_API_KEY.")  # fmt: skip
    if not is_valid:
        raise UsageError(f"{url!r} is not a URL", hint="Give --base-url like http://127.0.0.1:8000/v1")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
