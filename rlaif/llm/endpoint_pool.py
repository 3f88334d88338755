"""Load balancing over the endpoints of one model: selection, back-off and removal.

The next request goes to a healthy endpoint whose rate limit allows it soonest and whose utilization is lowest. Each
endpoint has its own limit, which halves on a 429 or a timeout and grows back. If the chosen endpoint is full, the
request waits. Retries wait too, or a burst of them would hit an overloaded server at the old rate.

An endpoint that failed backs off, longer each time. Then its list of models is requested. Only if that succeeds does it
get requests again, one at a time until one is answered. Requests in flight at an endpoint that fails or is removed may
finish.

Endpoints can be added and removed during a run: a ``base_url`` of ``file:PATH`` names a file with one URL per line,
which is read again when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from pathlib import Path

from rlaif.config.models import ClientConfig
from rlaif.errors import UsageError
from rlaif.llm.endpoint import ConnectionLostError, Endpoint, HTTPStatusError
from rlaif.serving.time_limits import Patience

PROBE_TIMEOUT_S = 10.0
REREAD_INTERVAL_S = 2.0
FILE_PREFIX = "file:"


class EndpointPool:
    """The endpoints of one model. ``endpoints`` lists those in use and is never empty."""

    def __init__(self, urls: list[str], key: str | None, config: ClientConfig, *, managed: bool = False) -> None:
        """Create the endpoints. ``managed``: rlaif runs the server and restarts it if it hangs, so its requests have no
        deadline."""
        self._urls, self._key, self._config = urls, key, config
        self._deadline_s = None if managed else config.request_deadline_s
        self._files = {Path(url.removeprefix(FILE_PREFIX)): 0 for url in urls if url.startswith(FILE_PREFIX)}
        """Endpoint files with their modification times in ns."""
        self._read_at = time.monotonic()
        self._draining: list[Endpoint] = []
        self._queue: deque[asyncio.Future[None]] = deque()
        self._max_in_flight = float(config.concurrency)
        current_urls = self._current_urls()
        try:
            self.endpoints = [self._new_endpoint(url, len(current_urls)) for url in current_urls]
        except UsageError as error:
            raise self._endpoint_file_error(error.message) if self._files else error from None

    @property
    def limit(self) -> float:
        """Number of requests that may be in flight now, over all endpoints."""
        if len(self.endpoints) == 1:
            return self.endpoints[0].limit
        return min(self._max_in_flight, sum(endpoint.limit for endpoint in self.endpoints))

    @property
    def endpoints_down(self) -> list[str]:
        """URLs of the endpoints that have failed and not answered since."""
        return [endpoint.url for endpoint in self.endpoints if endpoint.consecutive_failures]

    async def acquire(self) -> tuple[Endpoint, bool]:
        """Return the endpoint for the next request, and True if the request had to wait for a free slot there.

        The request counts as in flight until :meth:`release`.
        """
        waited = False
        while not (endpoint := await self._select()).has_free_slot():
            waited = True
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            await turn
        endpoint.in_flight += 1
        return endpoint, waited

    def release(self, endpoint: Endpoint) -> None:
        """End a request's use of ``endpoint`` and let waiting requests continue."""
        endpoint.in_flight -= 1
        free_slots = max(1, int(self.limit)) - sum(member.in_flight for member in self.endpoints)
        while self._queue and free_slots > 0:
            turn = self._queue.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                free_slots -= 1

    def busy_endpoints(self) -> list[Endpoint]:
        """Return the endpoints with requests in flight, including removed ones."""
        return [endpoint for endpoint in [*self.endpoints, *self._draining] if endpoint.patience.in_flight]

    async def _select(self) -> Endpoint:
        """Return the best endpoint for the next request; if all are backing off, one of those."""
        if self._files and time.monotonic() - self._read_at > REREAD_INTERVAL_S:
            await self._reread_files()
        while True:
            if len(self.endpoints) == 1:
                return self.endpoints[0]
            endpoint = min(
                self.endpoints,
                key=lambda candidate: (
                    candidate.is_backing_off(),
                    not candidate.has_free_slot(),
                    candidate.rate_limiter.delay_s(),
                    candidate.utilization,
                ),
            )
            if not endpoint.consecutive_failures or endpoint.is_backing_off() or await self._probe(endpoint):
                return endpoint

    def has_healthy_alternative(self, endpoint: Endpoint) -> bool:
        """Return True if an endpoint other than ``endpoint`` is healthy."""
        return any(not candidate.consecutive_failures for candidate in self.endpoints if candidate is not endpoint)

    async def close(self) -> None:
        for endpoint in [*self.endpoints, *self._draining]:
            await endpoint.close()

    async def _probe(self, endpoint: Endpoint) -> bool:
        endpoint.in_flight += 1  # so that no other request probes it meanwhile
        try:
            response = await endpoint.send("GET", "/models", min(PROBE_TIMEOUT_S, self._config.timeout_s))
        except HTTPStatusError as error:
            is_healthy = error.status < 500 and error.status not in (401, 403)
        except ConnectionLostError:
            is_healthy = False
        else:
            is_healthy = True
            endpoint.is_vllm = endpoint.is_vllm or b'"vllm"' in response
        finally:
            endpoint.in_flight -= 1
        if not is_healthy:
            endpoint.record_failure()
        return is_healthy

    async def _reread_files(self) -> None:
        self._read_at = time.monotonic()
        modified_at = await asyncio.to_thread(lambda: {path: _modified_ns(path) for path in self._files})
        if modified_at == self._files:
            return
        urls = self._current_urls()
        remaining = [endpoint for endpoint in self.endpoints if endpoint.url in urls]
        added: list[Endpoint] = []
        for url in urls:
            if all(endpoint.url != url for endpoint in remaining):
                with contextlib.suppress(UsageError):  # a half-written line must not end a run
                    endpoint = self._new_endpoint(url, len(urls))
                    endpoint.mark_unverified()
                    added.append(endpoint)
        if remaining or added:
            self._draining += [endpoint for endpoint in self.endpoints if endpoint not in remaining]
            self.endpoints = remaining + added
        idle = [endpoint for endpoint in self._draining if not endpoint.in_flight]
        self._draining = [endpoint for endpoint in self._draining if endpoint.in_flight]
        for endpoint in idle:
            await endpoint.close()

    def _current_urls(self) -> list[str]:
        """Return all URLs, including those in files; the current ones if the files name none, as while one is being
        written."""
        urls: list[str] = []
        for url in self._urls:
            urls += _urls_in_file(Path(url.removeprefix(FILE_PREFIX))) if url.startswith(FILE_PREFIX) else [url]
        self._files = {path: _modified_ns(path) for path in self._files}
        if not urls and hasattr(self, "endpoints"):
            return [endpoint.url for endpoint in self.endpoints]
        if not urls:
            raise self._endpoint_file_error("names no endpoint")
        return list(dict.fromkeys(url.rstrip("/") for url in urls))

    def _endpoint_file_error(self, message: str) -> UsageError:
        return UsageError(message, location=", ".join(map(str, self._files)), hint="Write one URL per line into it.")

    def _new_endpoint(self, url: str, num_endpoints: int) -> Endpoint:
        rate_limits = self._config.requests_per_minute, self._config.tokens_per_minute
        patience = Patience(self._config.timeout_s, self._deadline_s)
        return Endpoint(
            url,
            self._key,
            *rate_limits,
            limit=max(1.0, self._max_in_flight / num_endpoints),
            max_limit=self._max_in_flight,
            patience=patience,
        )


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _urls_in_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
