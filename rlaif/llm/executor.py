"""Entry point for all requests to models: sends requests and journals each answer as it arrives.

Requests whose keys are in the journal are skipped, so that rerunning a command sends only pending requests. Requests
are taken from an iterator as slots become free, so memory holds only those in flight, however many prompts there are.
At a stop (budget, deadline, Ctrl-C, a server where nearly everything fails) no new request is sent, and those in flight
may finish.

Rejected requests (too long, filtered) do not stop a command once the journal has an answer, however many there are.
They return at once while answers take time, and in a later start only rejected ones may be pending. They cost nothing
and count towards `--max-failures`, whose error reports the last reason. That also covers a setting that changed during
a run and makes the server reject all the rest. If nothing was ever answered, rejections of twice the concurrency stop
the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from rlaif.errors import EndpointError, UsageError
from rlaif.llm.client import Client, RequestBuilder
from rlaif.llm.pricing import has_known_price
from rlaif.llm.request import ReplyParser, Request, RequestCancelled, RequestFailedError, UnparsableReplyError
from rlaif.llm.signals import on_interrupt
from rlaif.llm.usage import RECENT_REQUESTS, UsageMeter
from rlaif.records import Failure, Record
from rlaif.run.journal import Journal

SHUTDOWN_GRACE_S = 120.0
"""How long requests in flight may take to finish after an interrupt or a fatal error. A second interrupt does not
wait."""


def execute_requests(
    open_client: Callable[[], Client],
    build_requests: RequestBuilder,
    parse_reply: ReplyParser,
    journal: Journal,
    usage: UsageMeter,
    *,
    allow_batch: bool = True,
) -> None:
    """Check the endpoints, send the requests of ``build_requests(client, engine)``, and journal the parsed replies.

    ``allow_batch``: False sends requests one by one even if the batch API is enabled, as it takes chat completions
    only.

    Returns when all requests are done or ``usage`` has a reason to stop. Raises :class:`EndpointError` for a problem
    that would fail every request, and KeyboardInterrupt after an interrupt, once those in flight are journaled.
    """
    client = open_client()  # may start a server: outside the loop, so that an interrupt takes effect at once

    async def main() -> None:
        async with client:
            with contextlib.suppress(RequestCancelled):  # a stop during the checks of the server
                engine = await client.check()
                if usage.budget_usd is not None:
                    require_known_prices(client.model, client.urls)
                if client.config.use_batch_api and allow_batch:
                    from rlaif.llm import batch_runner

                    await batch_runner.run_batches(client, engine, build_requests, parse_reply, journal, usage)
                    return
                requests = await build_requests(client, engine)
                await _RequestExecutor(client, parse_reply, journal, usage).run(iter(requests))

    try:
        if _is_event_loop_running():  # in a notebook
            with ThreadPoolExecutor(1) as executor:
                future = executor.submit(lambda: asyncio.run(main()))
                try:
                    future.result()
                except KeyboardInterrupt:
                    usage.interrupted = True
        else:
            asyncio.run(main())
    finally:
        journal.sync()
    if usage.interrupted:
        raise KeyboardInterrupt


def _is_event_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def require_known_prices(model: str, urls: Iterable[str]) -> None:
    """Raise :class:`UsageError` if the price of an answer is unknown, so that a budget cannot be enforced."""
    for url in urls:
        if not has_known_price(model, url):
            raise UsageError(
                f"the price of {model!r} at {url} is unknown, so a budget cannot be enforced",
                hint="Remove `--budget-usd`, or bound the run with `--limit`.",
            )


class _RequestExecutor:
    """Keeps up to ``client.limit`` requests in flight."""

    def __init__(self, client: Client, parse_reply: ReplyParser, journal: Journal, usage: UsageMeter) -> None:
        self.client = client
        self.parse_reply = parse_reply
        self.journal = journal
        self.usage = usage
        self.tasks: set[asyncio.Task[None]] = set()
        self.slot_free = asyncio.Event()
        self.fatal_error: BaseException | None = None
        self.num_rejected = 0
        self.in_flight_keys: set[str] = set()
        """Keys in flight, and keys that failed in this command, which stay pending for the next start."""

    async def run(self, requests: Iterator[Request]) -> None:
        with on_interrupt(self._on_interrupt), self.usage.timing():
            try:
                try:
                    await self._dispatch(requests)
                except Exception as error:  # the requests cannot be built: answers in flight are still journaled
                    self.fatal_error = self.fatal_error or error
                await self._drain()
            finally:
                for task in self.tasks:
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.fatal_error:
            raise self.fatal_error

    async def _dispatch(self, requests: Iterator[Request]) -> None:
        for index, request in enumerate(requests):
            if index % 256 == 0:
                await asyncio.sleep(0)  # many skipped requests in a row must not block those in flight
            if all(key in self.journal or key in self.in_flight_keys for key in request.keys):
                self.usage.skipped += len(request.keys)
                continue
            while len(self.tasks) >= max(1, int(self.client.limit)) and not self._should_stop():
                self.slot_free.clear()
                await self.slot_free.wait()
            if self._should_stop():
                return
            self.in_flight_keys.update(request.keys)
            task = asyncio.create_task(self._run_one(request))
            self.tasks.add(task)
            task.add_done_callback(self._on_task_done)
            # Let the request go out, and let answers be journaled in between.
            await asyncio.sleep(0)

    async def _drain(self) -> None:
        """Wait for the requests in flight; after an interrupt or a fatal error, only for the grace period."""
        now = asyncio.get_running_loop().time
        deadline = math.inf
        while self.tasks and now() < deadline:
            if self.usage.interrupted or self.fatal_error:
                deadline = min(deadline, now() + SHUTDOWN_GRACE_S)
            await asyncio.wait(self.tasks, timeout=min(1.0, SHUTDOWN_GRACE_S))

    def _should_stop(self) -> bool:
        return self.fatal_error is not None or self.usage.stop_reason() is not None

    def _on_interrupt(self) -> None:
        if self.usage.interrupted:
            self.fatal_error = KeyboardInterrupt()
            for task in self.tasks:
                task.cancel()
        self.usage.interrupted = True
        self.slot_free.set()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.fatal_error = self.fatal_error or error
        self.slot_free.set()

    async def _run_one(self, request: Request) -> None:
        try:
            records = await self._send_and_parse(request)
        except RequestFailedError as error:
            self._record_failure(request, "endpoint", str(error), rejected=error.rejected)
        except UnparsableReplyError as error:
            self._record_failure(request, "unparsable", str(error))
        except RequestCancelled:
            self.in_flight_keys.difference_update(request.keys)
        else:
            self.journal.append(records)
            self.usage.record_success(len(records))
            self.in_flight_keys.difference_update(request.keys)

    async def _send_and_parse(self, request: Request) -> Sequence[Record]:
        for attempt in (1, 2):
            reply = await self.client.chat(request.body, request.endpoint_path)
            self.usage.add(reply.usage)
            try:
                return self.parse_reply(request, reply)
            except UnparsableReplyError:
                if attempt == 2:
                    raise
                self.usage.retries += 1
        raise AssertionError

    def _record_failure(
        self, request: Request, kind: Literal["endpoint", "unparsable"], error: str, *, rejected: bool = False
    ) -> None:
        self.journal.append(
            Failure(key=key, error=error, kind=kind, prompt_id=request.prompt_id) for key in request.keys
        )
        self.usage.record_failure(kind, error, len(request.keys), rejected=rejected)
        self.num_rejected += rejected
        if rejected:
            should_abort = not self.journal.answered_keys and self.num_rejected >= max(
                RECENT_REQUESTS, 2 * self.client.config.concurrency
            )
        else:
            should_abort = kind == "endpoint" and self.usage.mostly_failing()
        if should_abort:
            self.fatal_error = EndpointError(
                f"nearly every request fails; last error: {error}",
                location=self.client.url,
                hint="Fix the server or the setting, then rerun the same command. Answers received so far are kept.",
            )
