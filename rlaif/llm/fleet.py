"""The endpoints of one model: which of them the next request goes to, and which take part at all.

The next request goes to one that is well, has its turn soonest, and has the least in flight for what it bears (each
has a limit of its own, which halves on a 429 or a time-out and grows back). If that one is full, the request waits:
retries too, or a burst of them would hit an overloaded server at its old size. One that failed rests, longer each time;
then it is asked for its list of models, and only when that answers gets a request, one at a time until one is answered.
What is in flight at one that fails or is taken away is let finish.

Endpoints come and go during a run by a file: a ``base_url`` of ``file:PATH`` names one with a URL a line, read again
when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from pathlib import Path

from rlaif.config import ClientConfig
from rlaif.errors import UsageError
from rlaif.llm.endpoint import Endpoint, Lost, Refused
from rlaif.llm.patience import Patience

PROBE_S = 10.0
READ_EVERY_S = 2.0
FILE = "file:"


class Fleet:
    """``endpoints`` are those that take part now, never none."""

    def __init__(self, urls: list[str], key: str | None, config: ClientConfig, *, own: bool = False) -> None:
        """``own``: rlaif runs the server and restarts it if it hangs, so that requests to it have no deadline."""
        self._urls, self._key, self._config = urls, key, config
        self._deadline_s = None if own else config.deadline_s
        self._files = {Path(url.removeprefix(FILE)): 0 for url in urls if url.startswith(FILE)}
        """When each was changed last, in ns."""
        self._read_at = time.monotonic()
        self._leaving: list[Endpoint] = []
        self._queue: deque[asyncio.Future[None]] = deque()
        self._most = float(config.concurrency)
        found = self._found()
        try:
            self.endpoints = [self._made(url, len(found)) for url in found]
        except UsageError as error:
            raise self._unusable(error.what) if self._files else error from None

    @property
    def limit(self) -> float:
        """How many requests may be in flight now, over all."""
        if len(self.endpoints) == 1:
            return self.endpoints[0].limit
        return min(self._most, sum(endpoint.limit for endpoint in self.endpoints))

    @property
    def down(self) -> list[str]:
        """The URLs of those that have failed and not answered since."""
        return [endpoint.url for endpoint in self.endpoints if endpoint.strikes]

    async def acquire(self) -> tuple[Endpoint, bool]:
        """The endpoint of the next request, in which that counts as in flight until :meth:`release`; and whether it had
        to wait for room there."""
        waited = False
        while not (endpoint := await self._choose()).has_room():
            waited = True
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            await turn
        endpoint.in_flight += 1
        return endpoint, waited

    def release(self, endpoint: Endpoint) -> None:
        endpoint.in_flight -= 1
        room = max(1, int(self.limit)) - sum(each.in_flight for each in self.endpoints)
        while self._queue and room > 0:
            turn = self._queue.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                room -= 1

    def busy(self) -> list[Endpoint]:
        """Those with requests in flight, the ones that were taken away included."""
        return [endpoint for endpoint in [*self.endpoints, *self._leaving] if endpoint.patience.in_flight]

    async def _choose(self) -> Endpoint:
        """Where the next request goes. If all are resting, to one that rests."""
        if self._files and time.monotonic() - self._read_at > READ_EVERY_S:
            await self._reread()
        while True:
            if len(self.endpoints) == 1:
                return self.endpoints[0]
            chosen = min(
                self.endpoints, key=lambda each: (each.resting(), not each.has_room(), each.pace.wait_s(), each.load)
            )
            if not chosen.strikes or chosen.resting() or await self._is_back(chosen):
                return chosen

    def elsewhere(self, endpoint: Endpoint) -> bool:
        """Whether another than ``endpoint`` is well."""
        return any(not each.strikes for each in self.endpoints if each is not endpoint)

    async def close(self) -> None:
        for endpoint in [*self.endpoints, *self._leaving]:
            await endpoint.close()

    async def _is_back(self, endpoint: Endpoint) -> bool:
        endpoint.in_flight += 1  # so that nobody else tries meanwhile
        try:
            listed = await endpoint.send("GET", "/models", min(PROBE_S, self._config.timeout_s))
        except Refused as error:
            back = error.status < 500 and error.status not in (401, 403)
        except Lost:
            back = False
        else:
            back = True
            endpoint.is_vllm = endpoint.is_vllm or b'"vllm"' in listed
        finally:
            endpoint.in_flight -= 1
        if not back:
            endpoint.failed()
        return back

    async def _reread(self) -> None:
        self._read_at = time.monotonic()
        changed = await asyncio.to_thread(lambda: {path: _changed(path) for path in self._files})
        if changed == self._files:
            return
        urls = self._found()
        staying = [endpoint for endpoint in self.endpoints if endpoint.url in urls]
        coming: list[Endpoint] = []
        for url in urls:
            if all(endpoint.url != url for endpoint in staying):
                with contextlib.suppress(UsageError):  # half a line, or none: a running night does not end over it
                    endpoint = self._made(url, len(urls))
                    endpoint.unknown()
                    coming.append(endpoint)
        if staying or coming:
            self._leaving += [endpoint for endpoint in self.endpoints if endpoint not in staying]
            self.endpoints = staying + coming
        idle = [endpoint for endpoint in self._leaving if not endpoint.in_flight]
        self._leaving = [endpoint for endpoint in self._leaving if endpoint.in_flight]
        for endpoint in idle:
            await endpoint.close()

    def _found(self) -> list[str]:
        """The URLs, those in files among them; as before where a file names none, for somebody is writing it."""
        urls: list[str] = []
        for url in self._urls:
            urls += _listed(Path(url.removeprefix(FILE))) if url.startswith(FILE) else [url]
        self._files = {path: _changed(path) for path in self._files}
        if not urls and hasattr(self, "endpoints"):
            return [endpoint.url for endpoint in self.endpoints]
        if not urls:
            raise self._unusable("names no endpoint")
        return list(dict.fromkeys(url.rstrip("/") for url in urls))

    def _unusable(self, what: str) -> UsageError:
        return UsageError(what, where=", ".join(map(str, self._files)), mend="Write a URL a line into it.")

    def _made(self, url: str, among: int) -> Endpoint:
        pace = self._config.requests_per_minute, self._config.tokens_per_minute
        patience = Patience(self._config.timeout_s, self._deadline_s)
        return Endpoint(url, self._key, *pace, limit=max(1.0, self._most / among), most=self._most, patience=patience)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
