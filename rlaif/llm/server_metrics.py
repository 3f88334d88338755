"""Polling of the servers that have requests in flight: adjusts time limits and describes load for the progress line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import urlsplit

from rlaif.format import format_count, format_duration
from rlaif.llm.endpoint import Endpoint
from rlaif.llm.endpoint_pool import EndpointPool
from rlaif.llm.usage import UsageMeter

POLL_INTERVAL_S = 5.0
MIN_REPORTED_SILENCE_S = 60.0
"""Time without any answer after which the progress line reports it."""


class ServerMonitor:
    """A task of the running event loop, from the first :meth:`start` to :meth:`close`.

    ``describe_server`` returns the hardware that a managed server runs on.
    """

    def __init__(
        self, pool: EndpointPool, usage: UsageMeter, timeout_s: float, describe_server: Callable[[], str] | None
    ) -> None:
        self._pool, self._usage, self._describe_server = pool, usage, describe_server
        self._interval_s = min(POLL_INTERVAL_S, timeout_s / 4)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task, self._usage.server_status = None, ""

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            busy = self._pool.busy_endpoints()
            await asyncio.gather(*(endpoint.read_metrics(self._interval_s) for endpoint in busy))
            for endpoint in busy:
                endpoint.patience.update_limits()
            self._usage.server_status = await self._describe(busy)

    async def _describe(self, busy: list[Endpoint]) -> str:
        loads = [endpoint.patience.load for endpoint in busy if endpoint.patience.load]
        if loads:
            running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
            rates = [rate for endpoint in busy if (rate := endpoint.patience.tokens_per_s) is not None]
            conditions = await asyncio.to_thread(self._describe_server) if self._describe_server else ""
            status = f"server: {running:,} running, {waiting:,} waiting"
            if rates:  # known from the second reading on
                status += f", {format_count(sum(rates))} tokens/s"
            return f"{status} ({conditions})" if conditions else status
        return ", ".join(
            f"no answer from {urlsplit(endpoint.url).netloc} for {format_duration(endpoint.patience.stalled_s())} "
            f"({endpoint.patience.in_flight:,} requests in flight)"
            for endpoint in busy
            if endpoint.patience.stalled_s() >= MIN_REPORTED_SILENCE_S
        )
