"""Requests by OpenAI's batch API: sent as files, at half the price, answered within a day and in any order.

    requests  ->  jobs (50,000 lines, 200 MB)  ->  uploaded, created, polled  ->  output and error file, by custom_id

journal/batches.jsonl records the states of each job, so that a job is submitted once, and any later command that asks
for the same requests collects it. The intent is written before anything is sent, and its key travels as metadata of the
batch; the batch's id is written as soon as it is known. A crash in between leaves an intent without an id: the next
start looks for a batch with that key, and only if there is none are the requests pending again.

A request's custom_id is its first key. Lines that failed with a transient error or expired are sent again in a new job.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from rlaif.errors import EndpointError, RunError, os_error_message
from rlaif.llm.batch_api import (
    CHAT_ENDPOINT,
    FINAL_STATUSES,
    NOT_FOUND,
    BatchApi,
    error_summary,
    exceeds_token_limit,
    job_key_of,
)
from rlaif.llm.batch_journal import (
    BatchJob,
    BatchLineError,
    iter_lines_with_offsets,
    line_custom_id,
    parse_batch_line,
    read_jobs,
)
from rlaif.llm.chat_protocol import MalformedResponseError
from rlaif.llm.client import Client, RequestBuilder
from rlaif.llm.pricing import request_cost
from rlaif.llm.request import ReplyParser, Request, RequestFailedError, UnparsableReplyError
from rlaif.llm.signals import on_interrupt
from rlaif.llm.stop_reason import StopReason
from rlaif.llm.usage import UsageMeter
from rlaif.records import Failure, content_key
from rlaif.run.journal import Journal, JournalReader

MAX_LINES = 50_000
MAX_BYTES = 200_000_000
BATCH_PRICE_FACTOR = 0.5
MAX_FRUITLESS_ROUNDS = 3
"""Rounds without a single answer after which lines with transient errors count as failed."""
FIRST_POLL_S, MAX_POLL_S = 5.0, 300.0
STOP_CHECK_INTERVAL_S = 1.0


async def run_batches(
    client: Client,
    engine: str,
    build_requests: RequestBuilder,
    parse_reply: ReplyParser,
    journal: Journal,
    usage: UsageMeter,
) -> None:
    """Send requests by batch and journal the answers, until nothing is pending or there is a reason to stop.

    Unfinished batches then stay with the provider. Raises :class:`EndpointError`.
    """
    with Journal(journal.path.with_name("batches.jsonl")) as job_journal:
        await BatchRunner(client, engine, build_requests, parse_reply, journal, usage, job_journal).run()


@dataclass
class _JobDraft:
    """The requests of a job that is not submitted yet."""

    lines: list[bytes] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    num_bytes: int = 0
    max_cost_usd: float = 0.0

    def add(self, key: str, line: bytes, max_cost_usd: float) -> None:
        self.lines.append(line)
        self.keys.append(key)
        self.num_bytes += len(line)
        self.max_cost_usd += max_cost_usd


class JobTable:
    """The jobs that this command has open, and their journal."""

    def __init__(self, job_journal: Journal, stage: str, model: str, url: str) -> None:
        self._journal, self._stage, self._model, self._url = job_journal, stage, model, url
        self.open: dict[str, BatchJob] = {}
        self.max_costs: defaultdict[str, float] = defaultdict(float)
        """Upper bound of each job's cost in US dollars, if there is a budget."""

    def unfinished(self) -> list[BatchJob]:
        """Return the unfinished jobs of this stage, model and endpoint, from the journal."""
        identity = (self._stage, self._model, self._url)
        jobs = read_jobs(self._journal.path)
        return [job for job in jobs if job.state != "finished" and (job.journal, job.model, job.url) == identity]

    def create(self, keys: list[str], max_cost_usd: float) -> BatchJob:
        """Journal the intent to submit a job."""
        job = BatchJob(
            key=content_key(part=secrets.token_hex(16)),
            state="created",
            journal=self._stage,
            model=self._model,
            url=self._url,
            keys=keys,
            lines=len(keys),
        )
        self._journal.append([job])
        self._journal.sync()
        self.open[job.key] = job
        self.max_costs[job.key] = max_cost_usd
        return job

    def record_state(self, job: BatchJob, state: Literal["submitted", "finished"], **changes: Any) -> None:
        """Journal a new state of ``job``, without its keys."""
        updated_job = job.model_copy(update={"state": state, "created_at": time.time(), **changes})
        self._journal.append([updated_job.model_copy(update={"keys": []})])
        self._journal.sync()
        if state == "finished":
            self.open.pop(job.key, None)
            self.max_costs.pop(job.key, None)
        else:
            self.open[job.key] = updated_job


class BatchRunner:
    """Sends the requests of one stage by batch: resumes open jobs, submits what is pending, polls, collects."""

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
        self.api = BatchApi(client)
        self.jobs = JobTable(job_journal, journal.path.stem, client.model, self.api.url)
        self.download_dir = journal.path.parent.parent / "batch"
        self.stop_event = asyncio.Event()
        self.max_lines = MAX_LINES
        self.first_pass = True

    async def run(self) -> None:
        """Submit and collect until nothing is pending or there is a reason to stop. Raises :class:`EndpointError`."""
        with on_interrupt(self._on_interrupt), self.usage.timing():
            await self._resume_jobs()
            fruitless_rounds = 0
            while True:
                await self._submit_pending()
                if not self.jobs.open or self._should_stop():
                    return
                answered_before = len(self.journal.answered_keys)
                while self.jobs.open and not self._should_stop():
                    await self._collect(
                        await self._wait_for_batches(), is_last_attempt=fruitless_rounds + 1 >= MAX_FRUITLESS_ROUNDS
                    )
                if len(self.journal.answered_keys) == answered_before:
                    fruitless_rounds += 1

    def _on_interrupt(self) -> None:
        self.usage.interrupted = True
        self.stop_event.set()

    def _should_stop(self) -> bool:
        return self.usage.stop_reason() is not None

    # Submitting

    async def _resume_jobs(self) -> None:
        """Take over the unfinished jobs that contain a pending request, and find the batches of those without an id.

        A job that never became a batch is closed, so that its requests are pending again. Other jobs belong to another
        judge or another round: only the command that asks for their requests can parse their replies, and they stay
        with the provider until then.
        """
        jobs = self.jobs.unfinished()
        job_by_key = {bytes.fromhex(key): job for job in jobs for key in job.keys}
        for request in await self.build_requests(self.client, self.engine) if jobs else ():
            job = job_by_key.get(bytes.fromhex(request.keys[0]))
            if job and not self._is_done(request):
                self.jobs.open[job.key] = job
                self.jobs.max_costs[job.key] += self._max_cost(self._request_line(request), request)
        for job in jobs:
            if all(map(self._is_key_done, job.keys)):  # answered one by one, or just before a crash
                self.jobs.record_state(job, "finished", status="answered")
        orphans = {job.key: job for job in self.jobs.open.values() if not job.batch}
        if orphans:
            try:
                async for batch in self.api.list_batches():
                    orphan = orphans.pop(job_key_of(batch), None)
                    if orphan:
                        self.jobs.record_state(orphan, "submitted", batch=str(batch["id"]))
            except RequestFailedError as error:
                raise EndpointError(
                    f"the list of batches could not be read: {error}",
                    location=self.api.url,
                    hint="Rerun the same command. Nothing is lost.",
                ) from None
        for job in orphans.values():
            self.jobs.record_state(job, "finished", status="never sent")

    async def _submit_pending(self) -> None:
        """Submit all pending requests that are in no open job, in jobs of limited size and cost."""
        in_flight = {bytes.fromhex(key) for job in self.jobs.open.values() for key in job.keys}
        draft = _JobDraft()
        committed_usd = self.usage.cost_usd + sum(self.jobs.max_costs[key] for key in self.jobs.open)
        for request in await self.build_requests(self.client, self.engine):
            done = self._is_done(request)
            if self.first_pass and done:
                self.usage.skipped += len(request.keys)
            if done or bytes.fromhex(request.keys[0]) in in_flight:
                continue
            line = self._request_line(request)
            cost = self._max_cost(line, request)
            budget_usd = self.usage.budget_usd
            if budget_usd is not None and committed_usd + draft.max_cost_usd + cost > budget_usd:
                self.usage.stop_override = StopReason.NEXT_BATCH_OVER_BUDGET
                break
            if self._should_stop():
                break
            if len(draft.lines) >= self.max_lines or draft.num_bytes + len(line) > MAX_BYTES:
                await self._submit_job(draft)
                committed_usd += draft.max_cost_usd
                draft = _JobDraft()
            in_flight.add(bytes.fromhex(request.keys[0]))
            draft.add(request.keys[0], line, cost)
        if draft.lines and (not self._should_stop() or self.usage.stop_override):
            await self._submit_job(draft)
        self.first_pass = False
        if self.jobs.open and self.usage.stop_override:
            # The actual cost is known once the open jobs are collected; more may then fit into the budget.
            self.usage.stop_override = None

    def _is_done(self, request: Request) -> bool:
        return all(map(self._is_key_done, request.keys))

    def _is_key_done(self, key: str) -> bool:
        """Return True if ``key`` is answered, or has failed for good in this command."""
        return key in self.journal or bytes.fromhex(key) in self.journal.failed_keys

    def _request_line(self, request: Request) -> bytes:
        body = {**request.body, "model": self.client.model}
        return (
            orjson.dumps({"custom_id": request.keys[0], "method": "POST", "url": CHAT_ENDPOINT, "body": body}) + b"\n"
        )

    def _max_cost(self, line: bytes, request: Request) -> float:
        """Return the highest possible cost of a request in US dollars; 0.0 without a budget."""
        if self.usage.budget_usd is None:
            return 0.0
        tokens = request.body.get("max_tokens", 0) * request.body.get("n", 1)
        cost = request_cost(self.client.model, self.api.url, len(line) // 4, 0, tokens) or 0.0
        return cost * BATCH_PRICE_FACTOR

    async def _submit_job(self, draft: _JobDraft) -> None:
        """Journal the intent, upload the file, create the batch, and journal its id."""
        job = self.jobs.create(draft.keys, draft.max_cost_usd)
        file_id = await self.api.upload_file(f"rlaif-{job.key[:16]}.jsonl", b"".join(draft.lines))
        self.jobs.record_state(job, "submitted", batch=await self.api.create_batch(file_id, job.key))

    # Collecting

    async def _wait_for_batches(self) -> list[tuple[BatchJob, dict[str, Any]]]:
        """Poll at growing intervals until a batch has ended. Returns the ended ones, or [] at a stop."""
        interval_s = FIRST_POLL_S
        while not self._should_stop():
            finished, missing_error = [], None
            for job in list(self.jobs.open.values()):
                try:
                    batch = await self.api.get_batch(job.batch)
                except RequestFailedError as error:
                    if self._should_stop():
                        return []
                    raise EndpointError(
                        f"the status of batch {job.batch} could not be read: {error}",
                        location=self.api.url,
                        hint="Rerun the same command to look it up again. Nothing is lost.",
                    ) from None
                status = batch["status"]
                if status == NOT_FOUND:
                    missing_error = self._missing_batch_error(job, batch.get("message", "HTTP 404"))
                if status != job.status:
                    self.jobs.record_state(job, "submitted", status=status)
                if status in FINAL_STATUSES:
                    finished.append((job, batch))
            statuses = sorted({str(job.status) for job in self.jobs.open.values()})
            self.usage.waiting_for = f"{len(self.jobs.open):,} batches: {', '.join(statuses)}"
            if finished:
                return finished
            if missing_error and statuses == [NOT_FOUND]:  # the other jobs are collected first
                raise missing_error
            await self._sleep(interval_s)
            interval_s = min(MAX_POLL_S, interval_s * 1.5)
        return []

    def _missing_batch_error(self, job: BatchJob, message: str) -> EndpointError:
        """Build the error for a batch that the provider does not find.

        A provider returns the same 404 for a deleted batch and for another account's batch. Only the user can
        distinguish the two, so rlaif does not give up on paid work by itself.
        """
        return EndpointError(
            f"batch {job.batch} was not found at this endpoint ({message})",
            location=self.api.url,
            hint="Set the API key of the account that submitted it. If the batch is gone for good, delete the lines "
            f"with its id from {self.job_journal.path}, and the same command sends its {job.lines:,} requests again.",
        )

    async def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._should_stop() and (remaining := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self.stop_event.wait(), min(remaining, STOP_CHECK_INTERVAL_S))
            except TimeoutError:
                continue

    async def _collect(self, finished: list[tuple[BatchJob, dict[str, Any]]], *, is_last_attempt: bool) -> None:
        """Journal the answers of ended batches. Raises :class:`EndpointError` if a new batch would fail in the same
        way."""
        failure: EndpointError | None = None
        for job, batch in finished:
            answered = 0
            for file_field in ("output_file_id", "error_file_id"):
                if isinstance(batch.get(file_field), str):
                    answered += await self._collect_file(batch[file_field], is_last_attempt)
            self.journal.sync()
            self.jobs.record_state(job, "finished", status=batch["status"], answered=answered)
            if batch["status"] == "failed":
                failure = self._batch_failure(job, batch) or failure
            if batch["status"] == "cancelled":
                failure = EndpointError(
                    f"batch {job.batch} was cancelled at the provider",
                    location=self.api.url,
                    hint="Rerun the same command to send the rest again. Its answers so far are kept.",
                )
        if failure:
            raise failure

    def _batch_failure(self, job: BatchJob, batch: dict[str, Any]) -> EndpointError | None:
        """Return the error of a failed batch, or None if smaller jobs may pass the provider's limit of queued
        tokens."""
        if exceeds_token_limit(batch) and self.max_lines > 1:
            self.max_lines = max(1, min(self.max_lines, job.lines // 2))
            return None
        message = self.client.api_key.excerpt(error_summary(batch))
        return EndpointError(f"batch {job.batch} failed: {message}", location=self.api.url)

    async def _collect_file(self, file_id: str, is_last_attempt: bool) -> int:
        """Download an output or error file and journal each line for its request. Returns the number of answers."""
        path = self.download_dir / f"{file_id.replace('/', '_')}.jsonl"
        try:
            self.download_dir.mkdir(parents=True, exist_ok=True)
            await self.api.download_file(file_id, path)
            offset_by_id = {line_custom_id(line): offset for offset, line in iter_lines_with_offsets(path)}
            with JournalReader(path) as reader:
                answers = 0
                for index, request in enumerate(await self.build_requests(self.client, self.engine)):
                    if index % 256 == 0:
                        await asyncio.sleep(0)
                    offset = offset_by_id.get(request.keys[0])
                    if offset is not None and not self._is_done(request):
                        answers += self._read_line(request, reader.read_line(offset), is_last_attempt)
            path.unlink()
            return answers
        except RequestFailedError as error:
            raise EndpointError(
                f"file {file_id} could not be downloaded: {error}",
                location=self.api.url,
                hint="Rerun the same command to download it. The provider keeps it.",
            ) from None
        except OSError as error:
            raise RunError(f"cannot be written: {os_error_message(error)}", location=str(path)) from None

    def _read_line(self, request: Request, line: bytes, is_last_attempt: bool) -> int:
        """Journal the answer to ``request`` and return 1. Otherwise return 0: the request stays pending, or counts as
        failed if another attempt would not help."""
        kind: Literal["endpoint", "unparsable"] = "endpoint"
        try:
            body = parse_batch_line(line, self.client.api_key.redact)
            reply = self.client.parse_response(body, self.api.url, price_factor=BATCH_PRICE_FACTOR)
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
