"""The one door: requests with keys go in, each answer is journaled as it comes.

A request whose keys the journal has is skipped, so giving a command again asks only for what is owed. Requests are
taken from an iterator as room becomes free: memory holds those in flight, whatever the number of prompts. A stop
(budget, deadline, Ctrl-C, a server where nearly everything fails) sends nothing new and lets those in flight finish.

Requests that a server will not take (too long, filtered) are no reason to stop once the journal has an answer, however
many they are: they come back at once while answers take their time, and a later start owes those alone. They cost
nothing and count against --max-failures, which tells the last reason: also where a setting that was changed in the
middle has all the rest refused. Where nothing was ever answered, twice what may be in flight is enough of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlaif.errors import EndpointError, UsageError
from rlaif.llm.budget import RECENT, Meter, is_priced
from rlaif.llm.client import Client, NotSent, RequestFailed
from rlaif.llm.request import Read, Request, Unreadable, on_interrupt
from rlaif.records import Failure, Record
from rlaif.run.journal import Journal

GRACE_S = 120.0
"""How long requests in flight may take to finish after an interrupt or an error that ends the command. A second
interrupt does not wait."""


def ask_all(
    open_client: Callable[[], Client],
    prepare: Callable[[Client, str], Awaitable[Iterable[Request]]],
    read: Read,
    journal: Journal,
    meter: Meter,
    *,
    may_batch: bool = True,
) -> None:
    """Check the endpoint, then send the requests that ``prepare(client, engine)`` gives and journal what ``read``
    makes of the replies. ``engine`` is "vllm" or "other". ``may_batch`` False: one by one even where the batch API is
    asked for, which takes chat completions only.

    Returns when everything was asked or ``meter.reason_to_stop()`` says so. Raises :class:`EndpointError` for what
    would fail every request, and KeyboardInterrupt after an interrupt, once those in flight are journaled.
    """

    client = open_client()  # may start a server: outside the loop, so that an interrupt is felt at once

    async def main() -> None:
        async with client:
            with contextlib.suppress(NotSent):  # a stop, while the server was being asked what it can do
                engine = await client.check()
                if meter.budget_usd is not None:
                    require_prices(client.model, client.urls)
                if client.config.batch and may_batch:
                    from rlaif.llm import batch

                    await batch.ask(client, engine, prepare, read, journal, meter)
                    return
                requests = await prepare(client, engine)
                await _Asking(client, read, journal, meter).run(iter(requests))

    try:
        if _in_a_loop():  # a notebook's
            with ThreadPoolExecutor(1) as aside:
                done = aside.submit(lambda: asyncio.run(main()))
                try:
                    done.result()
                except KeyboardInterrupt:
                    meter.interrupted = True
        else:
            asyncio.run(main())
    finally:
        journal.sync()
    if meter.interrupted:
        raise KeyboardInterrupt


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def require_prices(model: str, urls: Iterable[str]) -> None:
    """Raises :class:`UsageError` where a budget could not be kept, as nobody knows what an answer costs."""
    for url in urls:
        if not is_priced(model, url):
            raise UsageError(
                f"no price is known for {model!r} at {url}, so a budget cannot be kept",
                mend="Take away --budget-usd, or bound the run with --limit.",
            )


class _Asking:
    def __init__(self, client: Client, read: Read, journal: Journal, meter: Meter) -> None:
        self.client = client
        self.read = read
        self.journal = journal
        self.meter = meter
        self.tasks: set[asyncio.Task[None]] = set()
        self.room = asyncio.Event()
        self.fatal: BaseException | None = None
        self.refused = 0
        self.asked: set[str] = set()
        """Keys in flight, and those that failed: they are owed to the next start."""

    async def run(self, requests: Iterator[Request]) -> None:
        with on_interrupt(self._interrupt), self.meter.asking():
            try:
                try:
                    await self._send(requests)
                except Exception as error:  # what is asked for cannot be read: those in flight are still kept
                    self.fatal = self.fatal or error
                await self._finish()
            finally:
                for task in self.tasks:
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.fatal:
            raise self.fatal

    async def _send(self, requests: Iterator[Request]) -> None:
        for number, request in enumerate(requests):
            if number % 256 == 0:
                await asyncio.sleep(0)  # a long stretch of what is there already must not hold up those in flight
            if all(key in self.journal or key in self.asked for key in request.keys):
                self.meter.skipped += len(request.keys)
                continue
            while len(self.tasks) >= max(1, int(self.client.limit)) and not self._stopped():
                self.room.clear()
                await self.room.wait()
            if self._stopped():
                return
            self.asked.update(request.keys)
            task = asyncio.create_task(self._one(request))
            self.tasks.add(task)
            task.add_done_callback(self._done)
            # Let a burst go out, and let answers in between be journaled.
            await asyncio.sleep(0)

    async def _finish(self) -> None:
        """Let those in flight finish: for as long as they need, or for the grace once something has gone wrong."""
        now = asyncio.get_running_loop().time
        until = math.inf
        while self.tasks and now() < until:
            if self.meter.interrupted or self.fatal:
                until = min(until, now() + GRACE_S)
            await asyncio.wait(self.tasks, timeout=min(1.0, GRACE_S))

    def _stopped(self) -> bool:
        return self.fatal is not None or self.meter.reason_to_stop() is not None

    def _interrupt(self) -> None:
        if self.meter.interrupted:
            self.fatal = KeyboardInterrupt()
            for task in self.tasks:
                task.cancel()
        self.meter.interrupted = True
        self.room.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.fatal = self.fatal or error
        self.room.set()

    async def _one(self, request: Request) -> None:
        try:
            records = await self._answer(request)
        except RequestFailed as error:
            self._failed(request, "endpoint", str(error), refused=error.refused)
        except Unreadable as error:
            self._failed(request, "unreadable", str(error))
        except NotSent:
            self.asked.difference_update(request.keys)
        else:
            self.journal.append(records)
            self.meter.succeeded(len(records))
            self.asked.difference_update(request.keys)

    async def _answer(self, request: Request) -> Sequence[Record]:
        for attempt in (1, 2):
            reply = await self.client.chat(request.body, request.path)
            self.meter.count(reply.usage)
            try:
                return self.read(request, reply)
            except Unreadable:
                if attempt == 2:
                    raise
                self.meter.retries += 1
        raise AssertionError

    def _failed(self, request: Request, kind: Any, error: str, *, refused: bool = False) -> None:
        self.journal.append(
            Failure(key=key, error=error, kind=kind, prompt_id=request.prompt_id) for key in request.keys
        )
        self.meter.failed_with(kind, error, len(request.keys), refused=refused)
        self.refused += refused
        if refused:
            hopeless = not self.journal.done and self.refused >= max(RECENT, 2 * self.client.config.concurrency)
        else:
            hopeless = kind == "endpoint" and self.meter.hopeless()
        if hopeless:
            self.fatal = EndpointError(
                f"nearly every request fails; the last one: {error}",
                where=self.client.url,
                mend="What came in is kept. Mend the server or the setting, then give the same command again.",
            )
