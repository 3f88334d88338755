"""OpenAI's batch API: the same requests by file, at half the price, answered within a day, in any order.

    requests  ->  parts (50,000 lines, 200 MB)  ->  uploaded, created, polled  ->  output and error file, by custom_id

journal/batches.jsonl holds what was done about each part, so that a part is submitted once and collected by whichever
command asks for the same next, on another day too. The intent is written before anything is sent, and travels as
metadata; the batch's id is written as soon as there is one. A crash in between leaves an intent without an id: the next
start looks for a batch that carries it, and only where there is none is the part owed again.

A request's custom_id is its first key. Lines that failed in passing or expired are owed, and sent in a further part.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Literal

import aiohttp
import orjson

from rlaif.errors import EndpointError, RunError, os_error_message
from rlaif.llm import chat_protocol
from rlaif.llm.batch_journal import (
    BatchJob,
    BatchLineError,
    iter_lines_with_offsets,
    job_key_of,
    line_custom_id,
    parse_batch_line,
    read_jobs,
)
from rlaif.llm.chat_protocol import MalformedResponseError
from rlaif.llm.client import Client, RequestFailedError
from rlaif.llm.pricing import request_cost
from rlaif.llm.request import ReplyParser, Request, UnparsableReplyError
from rlaif.llm.signals import on_interrupt
from rlaif.llm.stop_reason import StopReason
from rlaif.llm.usage import UsageMeter
from rlaif.records import Failure, content_key
from rlaif.run.journal import Journal, JournalReader

MAX_LINES = 50_000
MAX_BYTES = 200_000_000
BATCH_PRICE_FACTOR = 0.5
MAX_FRUITLESS_ROUNDS = 3
"""How often in one command lines that fail in passing are sent again though nothing comes of it."""
FIRST_POLL_S, MAX_POLL_S = 5.0, 300.0
STOP_CHECK_INTERVAL_S = 1.0
ENDPOINT = "/v1/chat/completions"
NOT_FOUND = "not found"
FINAL_STATUSES = ("completed", "failed", "expired", "cancelled")
ACTIVE_STATUSES = ("validating", "in_progress", "finalizing", "cancelling")


RequestBuilder = Callable[[Client, str], Awaitable[Iterable[Request]]]


async def run_batches(
    client: Client,
    engine: str,
    build_requests: RequestBuilder,
    parse_reply: ReplyParser,
    journal: Journal,
    usage: UsageMeter,
) -> None:
    """Like asking one by one: returns when nothing is owed, or when nothing more is to be sent; batches that are under
    way then stay with the provider. Raises :class:`EndpointError`."""
    with Journal(journal.path.with_name("batches.jsonl")) as job_journal:
        await BatchRunner(client, engine, build_requests, parse_reply, journal, usage, job_journal).run()


class BatchRunner:
    def __init__(
        self,
        client: Client,
        engine: str,
        build_requests: RequestBuilder,
        parse_reply: ReplyParser,
        journal: Journal,
        usage: UsageMeter,
        job_journal: Journal,
    ) -> None:
        self.client, self.engine, self.build_requests, self.parse_reply = client, engine, build_requests, parse_reply
        self.journal, self.usage, self.job_journal = journal, usage, job_journal
        self.endpoint = client.endpoints[0]
        self.download_dir = journal.path.parent.parent / "batch"
        self.stop_event = asyncio.Event()
        self.max_lines = MAX_LINES
        self.first_pass = True
        self.open_jobs: dict[str, BatchJob] = {}
        self.max_job_costs: defaultdict[str, float] = defaultdict(float)
        """What each part may cost at most, where there is a budget."""

    def _is_ours(self, job: BatchJob) -> bool:
        return (job.journal, job.model, job.url) == (self.journal.path.stem, self.client.model, self.endpoint.url)

    async def run(self) -> None:
        with on_interrupt(self._on_interrupt), self.usage.timing():
            await self._resume_jobs()
            fruitless_rounds = 0
            while True:
                await self._submit_pending()
                if not self.open_jobs or self._should_stop():
                    return
                answered_before = len(self.journal.answered_keys)
                while self.open_jobs and not self._should_stop():
                    await self._collect(
                        await self._wait_for_batches(), is_last_attempt=fruitless_rounds + 1 >= MAX_FRUITLESS_ROUNDS
                    )
                if len(self.journal.answered_keys) == answered_before:
                    fruitless_rounds += 1  # where something came, going on is worth it

    def _on_interrupt(self) -> None:
        self.usage.interrupted = True
        self.stop_event.set()

    def _should_stop(self) -> bool:
        return self.usage.stop_reason() is not None

    # Out

    async def _resume_jobs(self) -> None:
        """Take over the parts under way that hold something of what is owed now, with the batches of those that have no
        id; an intent that never became a batch is owed again. Other parts are another judge's or another round's: only
        whoever asked can read their answers, and they stay with the provider until then."""
        jobs = [job for job in read_jobs(self.job_journal.path) if job.state != "finished" and self._is_ours(job)]
        job_by_key = {bytes.fromhex(key): job for job in jobs for key in job.keys}
        for request in await self.build_requests(self.client, self.engine) if jobs else ():
            job = job_by_key.get(bytes.fromhex(request.keys[0]))
            if job and not all(self._is_done(key) for key in request.keys):
                self.open_jobs[job.key] = job
                self.max_job_costs[job.key] += self._max_cost(self._request_line(request), request)
        for job in jobs:
            if all(self._is_done(key) for key in job.keys):  # in another way, or just before a crash
                self._record_state(job, "finished", status="answered")
        orphans = {job.key: job for job in self.open_jobs.values() if not job.batch}
        if orphans:
            try:
                async for batch in self._list_batches():
                    orphan = orphans.pop(job_key_of(batch), None)
                    if orphan:
                        self._record_state(orphan, "submitted", batch=str(batch["id"]))
            except RequestFailedError as error:
                raise EndpointError(f"does not list its batches: {error}", location=self.endpoint.url,
                                    hint="Nothing was lost. Give the command again.") from None  # fmt: skip
        for job in orphans.values():
            self._record_state(job, "finished", status="never sent")

    async def _submit_pending(self) -> None:
        """Everything that is owed and in no batch, in parts."""
        in_flight = {bytes.fromhex(key) for job in self.open_jobs.values() for key in job.keys}
        lines: list[bytes] = []
        keys: list[str] = []
        size, job_cost = 0, 0.0
        committed_usd = self.usage.cost_usd + sum(self.max_job_costs[key] for key in self.open_jobs)
        for request in await self.build_requests(self.client, self.engine):
            done = [self._is_done(key) for key in request.keys]
            if self.first_pass:
                self.usage.skipped += sum(done) if all(done) else 0
            if all(done) or bytes.fromhex(request.keys[0]) in in_flight:
                continue
            line = self._request_line(request)
            cost = self._max_cost(line, request)
            if self.usage.budget_usd is not None and committed_usd + job_cost + cost > self.usage.budget_usd:
                self.usage.stop_override = StopReason.NEXT_BATCH_OVER_BUDGET
                break
            if self._should_stop():
                break
            if len(lines) >= self.max_lines or size + len(line) > MAX_BYTES:
                await self._submit_job(lines, keys, job_cost)
                committed_usd, job_cost = committed_usd + job_cost, 0.0
                lines, keys, size = [], [], 0
            in_flight.add(bytes.fromhex(request.keys[0]))
            lines.append(line)
            keys.append(request.keys[0])
            size += len(line)
            job_cost += cost
        if lines and (not self._should_stop() or self.usage.stop_override):
            await self._submit_job(lines, keys, job_cost)
        self.first_pass = False
        if (
            self.open_jobs and self.usage.stop_override
        ):  # what it costs is known when it is back: then perhaps more can be sent
            self.usage.stop_override = None

    def _is_done(self, key: str) -> bool:
        """Answered, or failed for good in this command."""
        return key in self.journal or bytes.fromhex(key) in self.journal.failed_keys

    def _request_line(self, request: Request) -> bytes:
        body = {**request.body, "model": self.client.model}
        return orjson.dumps({"custom_id": request.keys[0], "method": "POST", "url": ENDPOINT, "body": body}) + b"\n"

    def _max_cost(self, line: bytes, request: Request) -> float:
        if self.usage.budget_usd is None:
            return 0.0
        tokens = request.body.get("max_tokens", 0) * request.body.get("n", 1)
        return (
            request_cost(self.client.model, self.endpoint.url, len(line) // 4, 0, tokens) or 0.0
        ) * BATCH_PRICE_FACTOR

    async def _submit_job(self, lines: list[bytes], keys: list[str], max_cost: float) -> None:
        """Submit one part, of at most ``max_cost`` dollars: intent, file, batch, id."""
        job = BatchJob(key=content_key(part=secrets.token_hex(16)), state="created", journal=self.journal.path.stem,
                    model=self.client.model, url=self.endpoint.url, keys=keys, lines=len(keys))  # fmt: skip
        data = b"".join(lines)
        self.job_journal.append([job])
        self.job_journal.sync()
        self.open_jobs[job.key] = job
        self.max_job_costs[job.key] = max_cost

        async def upload() -> Any:
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field("file", data, filename=f"rlaif-{job.key[:16]}.jsonl", content_type="application/jsonl")
            response = await self.endpoint.send("POST", "/files", self.client.config.timeout_s, form, json=False)
            return chat_protocol.parse_json(response, self.client.redact)

        tried = False

        async def create() -> Any:
            nonlocal tried
            if tried:  # the first try may have arrived though its answer did not
                async for batch in self._list_batches():
                    if job_key_of(batch) == job.key:
                        return batch
            tried = True
            body = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h",
                     "metadata": {"rlaif": job.key}}  # fmt: skip
            return await self._request_json("POST", "/batches", orjson.dumps(body))

        file = await self._call_with_retries(upload, "a file")
        batch = await self._call_with_retries(create, "a batch")
        self._record_state(job, "submitted", batch=str(batch["id"]))

    async def _call_with_retries(self, call: Callable[[], Awaitable[Any]], resource: str) -> Any:
        """``call`` with the client's retries, and an answer that has an id. Raises :class:`EndpointError`."""
        try:
            value = await self.client.with_retries(call)
        except RequestFailedError as error:
            raise EndpointError(
                f"did not take {resource} for its batch API: {error}",
                location=self.endpoint.url,
                hint="Nothing was lost. Give the command again, or leave --batch away.",
            ) from None
        if not isinstance(value, dict) or not isinstance(value.get("id"), str):
            raise EndpointError(f"did not say the id of {resource}: {self.client.redact(str(value))[:200]}",
                                location=self.endpoint.url)  # fmt: skip
        return value

    async def _request_json(self, method: str, path: str, data: bytes | None = None) -> Any:
        response = await self.endpoint.send(method, path, self.client.config.timeout_s, data)
        return chat_protocol.parse_json(response, self.client.redact)

    async def _list_batches(self) -> AsyncIterator[dict[str, Any]]:
        """The provider's batches, the newest first."""
        after = ""
        while True:
            page = await self.client.with_retries(
                functools.partial(self._request_json, "GET", f"/batches?limit=100{after}")
            )
            batches = [entry for entry in page.get("data") or [] if isinstance(entry, dict) and entry.get("id")]
            for batch in batches:
                yield batch
            if not page.get("has_more") or not batches:
                return
            after = f"&after={batches[-1]['id']}"

    # Back

    async def _wait_for_batches(self) -> list[tuple[BatchJob, dict[str, Any]]]:
        """Poll, ever less often, until some batch has ended. Gives those that have; none where the command stops."""
        interval_s = FIRST_POLL_S
        while not self._should_stop():
            finished, missing_error = [], None
            for job in list(self.open_jobs.values()):
                try:
                    batch = await self.client.with_retries(
                        functools.partial(self._request_json, "GET", f"/batches/{job.batch}")
                    )
                except RequestFailedError as error:
                    if self._should_stop():
                        return []
                    is_missing = str(error).startswith("HTTP 404")
                    missing_error = self._missing_batch_error(job, str(error), is_missing)
                    if not is_missing:
                        raise missing_error from None
                    batch = {"status": NOT_FOUND}
                status = str(batch.get("status")) if isinstance(batch, dict) else "unknown"
                if status != job.status:
                    self._record_state(job, "submitted", status=status)
                if status in FINAL_STATUSES:
                    finished.append((job, batch))
            self.usage.waiting_for = f"{len(self.open_jobs):,} batches: " + ", ".join(
                sorted({str(job.status) for job in self.open_jobs.values()})
            )
            if finished:
                return finished
            if missing_error and all(
                job.status == NOT_FOUND for job in self.open_jobs.values()
            ):  # the others come in first
                raise missing_error
            await self._sleep(interval_s)
            interval_s = min(MAX_POLL_S, interval_s * 1.5)
        return []

    def _missing_batch_error(self, job: BatchJob, message: str, is_missing: bool) -> EndpointError:
        """Of a batch that it has no more a provider says what it says of another account's. Only a person can tell the
        two apart, and what is paid is not given up on a guess."""
        hint = "It is kept: the same command looks for it again."
        if is_missing:
            hint = (
                "It is kept, as the key may be of another account than the one it was sent with: set that one. If it "
                f"is gone for good, take the lines that name it out of {self.job_journal.path}, and the same command sends its "
                f"{job.lines:,} requests again."
            )
        return EndpointError(f"does not tell of batch {job.batch}: {message}", location=self.endpoint.url, hint=hint)

    async def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._should_stop() and (remaining := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self.stop_event.wait(), min(remaining, STOP_CHECK_INTERVAL_S))
            except TimeoutError:
                continue

    async def _collect(self, finished: list[tuple[BatchJob, dict[str, Any]]], *, is_last_attempt: bool) -> None:
        """Journal what the ended batches say. Raises :class:`EndpointError` where going on would end alike."""
        failure: EndpointError | None = None
        for job, batch in finished:
            answered = 0
            for file_field in ("output_file_id", "error_file_id"):
                if isinstance(batch.get(file_field), str):
                    answered += await self._collect_file(batch[file_field], is_last_attempt)
            self.journal.sync()
            status = str(batch["status"])
            self._record_state(job, "finished", status=status, answered=answered)
            if status == "failed":
                failure = self._batch_failure(job, batch) or failure
            if status == "cancelled":
                failure = EndpointError(
                    f"batch {job.batch} was cancelled by somebody; what it had answered is kept",
                    location=self.endpoint.url,
                    hint="The same command sends the rest again.",
                )
        if failure:
            raise failure

    def _batch_failure(self, job: BatchJob, batch: dict[str, Any]) -> EndpointError | None:
        """None where smaller or later parts will pass: providers bound what may be queued."""
        errors = batch.get("errors")
        entries = [
            entry for entry in (errors.get("data") or [] if isinstance(errors, dict) else []) if isinstance(entry, dict)
        ]
        if any(entry.get("code") == "token_limit_exceeded" for entry in entries) and self.max_lines > 1:
            self.max_lines = max(1, min(self.max_lines, job.lines // 2))
            return None
        message = "; ".join(f"{entry.get('message')} (line {entry.get('line')})" if entry.get("line") else
                         str(entry.get("message")) for entry in entries[:3]) or "no reason given"  # fmt: skip
        return EndpointError(
            f"failed batch {job.batch}: {self.client.redact(message)[:500]}", location=self.endpoint.url
        )

    async def _collect_file(self, file_id: str, is_last_attempt: bool) -> int:
        """The lines of an output or error file, in whatever order, each to its request. Returns the answers."""
        path = self.download_dir / f"{file_id.replace('/', '_')}.jsonl"
        try:
            self.download_dir.mkdir(parents=True, exist_ok=True)
            await self.client.with_retries(lambda: self.endpoint.download(f"/files/{file_id}/content", path))
            offset_by_id = {line_custom_id(line): offset for offset, line in iter_lines_with_offsets(path)}
            reader = JournalReader(path)
            try:
                answers = 0
                for index, request in enumerate(await self.build_requests(self.client, self.engine)):
                    if index % 256 == 0:
                        await asyncio.sleep(0)
                    offset = offset_by_id.get(request.keys[0])
                    if offset is not None and not all(self._is_done(key) for key in request.keys):
                        answers += self._read_line(request, reader.read_line(offset), is_last_attempt)
            finally:
                reader.close()
            path.unlink()
            return answers
        except RequestFailedError as error:
            raise EndpointError(f"does not give file {file_id}: {error}", location=self.endpoint.url,
                                hint="It is kept there: the same command collects it.") from None  # fmt: skip
        except OSError as error:
            raise RunError(f"cannot be written: {os_error_message(error)}", location=str(path)) from None

    def _read_line(self, request: Request, line: bytes, is_last_attempt: bool) -> int:
        """1 where ``line`` answers ``request``; else it is owed again, or failed where that would not help."""
        kind: Literal["endpoint", "unparsable"] = "endpoint"
        try:
            body = parse_batch_line(line, self.client.redact)
            reply = self.client.parse_response(body, self.endpoint.url, price_factor=BATCH_PRICE_FACTOR)
            self.usage.add(reply.usage)
            records = self.parse_reply(request, reply)
        except BatchLineError as error:
            message, is_last_attempt = str(error), is_last_attempt or not error.transient
        except MalformedResponseError as error:
            message = str(error)
        except UnparsableReplyError as error:
            kind, message = "unparsable", str(error)
        else:
            self.journal.append(records)
            self.usage.record_success(len(records))
            return 1
        if is_last_attempt:
            self.journal.append(
                Failure(key=key, error=message, kind=kind, prompt_id=request.prompt_id) for key in request.keys
            )
            self.usage.record_failure(kind, message, len(request.keys))
        else:
            self.usage.retries += 1
        return 0

    def _record_state(self, job: BatchJob, state: Literal["submitted", "finished"], **changes: Any) -> None:
        """Journal what became of ``job``; its keys are said once, with the intent."""
        updated_job = job.model_copy(update={"state": state, "created_at": time.time(), **changes})
        self.job_journal.append([updated_job.model_copy(update={"keys": []})])
        self.job_journal.sync()
        if state == "finished":
            self.open_jobs.pop(job.key, None)
            self.max_job_costs.pop(job.key, None)
        else:
            self.open_jobs[job.key] = updated_job
