"""Polls the servers of the requests in flight: adjusts time limits, describes the servers for the progress line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import urlsplit

from rlaif.llm.budget import Meter, duration, short
from rlaif.llm.endpoint import Endpoint
from rlaif.llm.fleet import Fleet

EVERY_S = 5.0
SILENT_S = 60.0
"""After so long without any answer the progress line says so."""


class Watch:
    """A task of the running event loop, from the first :meth:`start` to :meth:`close`. ``conditions`` describes what a
    server of our own runs on."""

    def __init__(self, fleet: Fleet, meter: Meter, timeout_s: float, conditions: Callable[[], str] | None) -> None:
        self._fleet, self._meter, self._conditions = fleet, meter, conditions
        self._interval_s = min(EVERY_S, timeout_s / 4)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task, self._meter.server = None, ""

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            busy = self._fleet.busy()
            await asyncio.gather(*(endpoint.read_metrics(self._interval_s) for endpoint in busy))
            for endpoint in busy:
                endpoint.patience.update_limits()
            self._meter.server = await self._describe(busy)

    async def _describe(self, busy: list[Endpoint]) -> str:
        loads = [endpoint.patience.load for endpoint in busy if endpoint.patience.load]
        if loads:
            running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
            rates = [rate for endpoint in busy if (rate := endpoint.patience.tokens_per_s) is not None]
            conditions = await asyncio.to_thread(self._conditions) if self._conditions else ""
            doing = f"server: {running:,} running, {waiting:,} waiting"
            if rates:  # from the second reading on
                doing += f", {short(sum(rates))} tokens/s"
            return f"{doing} ({conditions})" if conditions else doing
        return ", ".join(
            f"no answer from {urlsplit(endpoint.url).netloc} for {duration(endpoint.patience.stalled_s())} "
            f"({endpoint.patience.in_flight:,} requests in flight)"
            for endpoint in busy
            if endpoint.patience.stalled_s() >= SILENT_S
        )
