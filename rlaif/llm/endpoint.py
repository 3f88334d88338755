"""One URL: its connections, how fast and how much it may be asked, and whether it is to be passed over for now.

HTTP by aiohttp alone: on one core and a 50 ms server the openai package sends 900 requests a second over the same
transport, and aiohttp 3,900. What comes back is bytes, or one of three errors: :class:`Refused` (a status),
:class:`Lost` (no connection, a cut one, no answer in time).
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
from rlaif.llm.budget import is_local
from rlaif.llm.patience import Patience, parse_metrics
from rlaif.llm.wire import CLASSIFY, complaint, retry_after

REST_S = 10.0
"""How long an endpoint that failed is passed over while another one is there; twice as long each time after that."""
MOST_REST_S = 300.0
CONNECT_S = 30.0
MOST_FILES = 65_536
OTHER_FILES = 128
"""What else a run has open: journals, logs, a server's pipes, libraries."""
METRICS = "/metrics"
METRICS_TRIES = 3
DOWNLOAD_SILENT_S = 900.0
"""How long a download may bring nothing. An exchange has its own time as a whole."""


class Lost(Exception):
    """The connection was not made, was cut, or gave no answer in time."""


class Silent(Lost):
    """The connection was made, and no answer came in time. ``since``: when the server last did anything (monotonic), if
    that is so long ago that it seems to hang."""

    def __init__(self, message: str, since: float | None = None) -> None:
        super().__init__(message)
        self.since = since


class Refused(Exception):
    """The server answered with a status that is no success. ``after``: the seconds that it asks to wait, if any."""

    def __init__(self, status: int, told: str, after: float | None) -> None:
        super().__init__(told)
        self.status, self.told, self.after = status, told, after


class Pace:
    """Requests and tokens a minute, as a leaky bucket for each: what is taken is spread evenly, so that no minute,
    wherever it begins, holds more than the limit (and the one request that opens it)."""

    def __init__(self, requests: float | None, tokens: float | None) -> None:
        self._each = 60.0 / requests if requests else 0.0
        self._token = 60.0 / tokens if tokens else 0.0
        self._free_at = self._tokens_free_at = 0.0

    def wait_s(self) -> float:
        """How long until the next request may be sent."""
        return max(0.0, max(self._free_at, self._tokens_free_at) - time.monotonic())

    def take(self, tokens: float) -> None:
        """Book a request of about ``tokens``, to be sent after :meth:`wait_s`."""
        now = time.monotonic() + self.wait_s()
        self._free_at = now + self._each
        self._tokens_free_at = max(self._tokens_free_at, now) + tokens * self._token

    def correct(self, tokens: float) -> None:
        """A request took ``tokens`` more (or fewer) than was booked."""
        self._tokens_free_at += tokens * self._token


class Endpoint:
    """One base URL. Used in one event loop, and closed in it.

    ``limit`` is how many requests may be in flight to it now: it halves on a 429 and on a time-out (once for all that
    were in flight together) and grows with every answer, up to ``most``. ``patience`` decides how long requests wait.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        *,
        limit: float = 1.0,
        most: float = 1.0,
        patience: Patience | None = None,
    ) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.limit, self._most = limit, most
        self._slowed_at = 0.0
        self.pace = Pace(requests_per_minute, tokens_per_minute)
        self.patience = patience or Patience(600.0, None)
        self.is_vllm = False
        """Whether its list of models says so. Only then are its metrics asked for."""
        self._without_metrics = 0
        """Readings of /metrics that failed, up to the first that succeeded."""
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self._rests_until = 0.0
        self.strikes = 0
        """How often it has failed since it last answered."""

    @property
    def load(self) -> float:
        """What is in flight, as a share of what it bears."""
        return self.in_flight / self.limit

    def resting(self) -> bool:
        """Whether to pass it over while another one is there. After a failure one request at a time finds out whether
        it is back."""
        return time.monotonic() < self._rests_until or (self.strikes > 0 and self.in_flight > 0)

    def failed(self, after: float | None = None) -> None:
        """Let it rest: for ``after`` seconds where it asked for that, else longer with each failure in a row."""
        now = time.monotonic()
        if now >= self._rests_until:  # what was in flight together fails once
            self.strikes += 1
        rest = after if after is not None else min(MOST_REST_S, REST_S * 2.0 ** (self.strikes - 1))
        self._rests_until = max(self._rests_until, now + rest)

    def answered(self) -> None:
        self.strikes, self._rests_until = 0, 0.0
        self.limit = min(self.limit + 1.0 / max(self.limit, 1.0), self._most)

    def unknown(self) -> None:
        """It is new, and one request finds out whether it is there."""
        self.strikes = 1

    def too_much(self, sent: float) -> None:
        """A request that was sent at ``sent`` was one too many."""
        if sent >= self._slowed_at:
            self._slowed_at = time.monotonic()
            self.limit = max(1.0, self.limit / 2)

    def has_room(self) -> bool:
        return self.in_flight < max(1, int(self.limit))

    async def send(self, method: str, path: str, timeout_s: float, data: Any = None, *, json: bool = True) -> bytes:
        """One HTTP exchange, tried once. Raises :class:`Refused` or :class:`Lost`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(method, path, data, json=json)
        except TimeoutError:
            raise Silent(f"no answer within {timeout_s:g} s") from None

    async def ask(self, path: str, data: bytes, tokens: int) -> bytes:
        """Send one request for an answer of up to ``tokens`` tokens, and wait for as long as ``patience`` allows.

        Raises :class:`Refused`, :class:`Lost` or :class:`Silent`.
        """
        sent = time.monotonic()
        try:
            async with asyncio.timeout(self.patience.limit_s(tokens)) as timeout:
                with self.patience.waiting(tokens, timeout):
                    return await self._exchange("POST", path, data)
        except TimeoutError:
            waited = time.monotonic() - sent
            since = self.patience.timed_out(sent)
            self.too_much(sent)
            raise Silent(f"no answer within {round(waited, 1):g} s", since) from None

    async def read_metrics(self, timeout_s: float) -> None:
        """Let ``patience`` know how a vLLM gets on. An endpoint without such metrics is soon asked no more."""
        if not self.is_vllm or self._without_metrics >= METRICS_TRIES:
            return
        try:
            load = parse_metrics((await self.send("GET", METRICS, timeout_s)).decode("utf-8", "replace"))
        except (Lost, Refused):
            load = None
        if load:
            self.patience.observe(load)
        elif not self.patience.load:
            self._without_metrics += 1

    async def _exchange(self, method: str, path: str, data: Any = None, *, json: bool = True) -> bytes:
        headers = {"Content-Type": "application/json"} if json and data is not None else {}
        try:
            async with self._opened().request(method, self._at(path), data=data, headers=headers) as response:
                raw = await response.read()
        except aiohttp.ServerTimeoutError:  # a TimeoutError too, but the server was not even asked
            raise Lost(f"connection lost (not made within {CONNECT_S:g} s)") from None
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Lost(f"connection lost ({_cause(error)})") from None
        if response.status >= 300:
            raise Refused(response.status, complaint(raw), retry_after(response.headers.get("Retry-After", "")))
        return raw

    def _at(self, path: str) -> str:
        return (self.url.removesuffix("/v1") if path in (CLASSIFY, METRICS) else self.url) + path

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:  # it wants a running loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                trust_env=not is_local(self.url),  # a proxy from the environment is for what lies outside this machine
                headers=self._headers,
            )
        return self._session

    async def download(self, path: str, to: Path) -> None:
        """The body of a GET into a file, piece by piece. Raises :class:`Refused`, :class:`Lost` or OSError."""
        patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=DOWNLOAD_SILENT_S)
        try:
            async with self._opened().get(self.url + path, timeout=patience) as response:
                if response.status >= 300:
                    raise Refused(response.status, complaint(await response.read()), None)
                with to.open("wb") as file:
                    async for piece in response.content.iter_chunked(1 << 16):
                        file.write(piece)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Lost(f"connection lost ({_cause(error)})") from None

    async def close(self) -> None:
        if self._session:
            await self._session.close()


def make_room(connections: int) -> None:
    """Let this process hold ``connections`` open at once: raise the soft limit of open files as far as the hard one
    allows. (A limit of a thousand million, which some containers have, is left to them: old programs count through it.)

    Raises :class:`UsageError` where that is too few. Else it would read as a server that cuts connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < connections + OTHER_FILES:
        raise UsageError(
            f"{connections:,} requests at once need {connections + OTHER_FILES:,} open files, and {soft:,} are allowed",
            where="client.concurrency",
            mend=f"Lower it to {max(1, soft - OTHER_FILES)}, or raise the limit (ulimit -n, LimitNOFILE in systemd).",
        )


def check_url(url: str) -> None:
    """Raises :class:`UsageError`."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, good = urlsplit(""), False
    if parts.username or parts.password:
        raise UsageError("a base URL holds a name or a password, and URLs are written into logs",
                         mend="Take it out, and put the key into the environment as OPENAI_API_KEY.")  # fmt: skip
    if not good:
        raise UsageError(f"{url!r} is not a URL", mend="Give --base-url like http://127.0.0.1:8000/v1")


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
