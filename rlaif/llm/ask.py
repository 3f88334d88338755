"""The one door: requests with keys go in, each answer is journaled as it comes.

A request whose keys the journal has is skipped, so giving a command again asks only for what is owed. Requests are
taken from an iterator as room becomes free: memory holds those in flight, whatever the number of prompts. A stop
(budget, deadline, Ctrl-C, a server where nearly everything fails) sends nothing new and lets those in flight finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlaif.errors import EndpointError, UsageError
from rlaif.llm.budget import Meter, is_priced
from rlaif.llm.client import Client, NotSent, RequestFailed
from rlaif.llm.wire import CHAT, Reply
from rlaif.records import Failure, Record
from rlaif.run.journal import Journal

GRACE_S = 120.0
"""How long requests in flight may take to finish after an interrupt or an error that ends the command. A second
interrupt does not wait."""


class Unreadable(Exception):
    """The reply holds no verdict. Asked again once, then counted as a failure; never a label."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request without its model. ``keys``: the journal keys of the records that its answer will give. ``about`` is
    the caller's own, handed back with the reply. ``path``: what of the server is asked."""

    keys: tuple[str, ...]
    body: dict[str, Any]
    prompt_id: str
    about: Any = None
    path: str = CHAT


Read = Callable[[Request, Reply], Sequence[Record]]


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
            engine = await client.check()
            if meter.budget_usd is not None:
                _require_prices(client)
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


def _require_prices(client: Client) -> None:
    for url in client.urls:
        if not is_priced(client.model, url):
            raise UsageError(
                f"no price is known for {client.model!r} at {url}, so a budget cannot be kept",
                mend="Take away --budget-usd, or bound the run with --limit.",
            )


@contextlib.contextmanager
def on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call ``call`` while open."""
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: the caller's own business
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            loop.add_signal_handler(number, call)
            before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


class _Asking:
    def __init__(self, client: Client, read: Read, journal: Journal, meter: Meter) -> None:
        self.client = client
        self.read = read
        self.journal = journal
        self.meter = meter
        self.tasks: set[asyncio.Task[None]] = set()
        self.room = asyncio.Event()
        self.fatal: BaseException | None = None
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
            self._failed(request, "endpoint", str(error))
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

    def _failed(self, request: Request, kind: Any, error: str) -> None:
        self.journal.append(
            Failure(key=key, error=error, kind=kind, prompt_id=request.prompt_id) for key in request.keys
        )
        self.meter.failed_with(kind, error, len(request.keys))
        if self.meter.hopeless() and kind == "endpoint":
            self.fatal = EndpointError(
                f"nearly every request fails; the last one: {error}",
                where=self.client.url,
                mend="What came in is kept. Mend the server, then give the same command again.",
            )
