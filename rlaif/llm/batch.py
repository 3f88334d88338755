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
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Literal

import aiohttp
import orjson

from rlaif.errors import EndpointError, RunError, system_says
from rlaif.llm import wire
from rlaif.llm.budget import Meter, price
from rlaif.llm.client import Client, RequestFailed
from rlaif.llm.parts import NoAnswer, Part, completion_in, custom_id, intent, lines_of, parts
from rlaif.llm.request import Read, Request, Unreadable, on_interrupt
from rlaif.llm.wire import Malformed
from rlaif.records import Failure, key_of
from rlaif.run.journal import Journal, Reader

MAX_LINES = 50_000
MAX_BYTES = 200_000_000
DISCOUNT = 0.5
ROUNDS = 3
"""How often in one command lines that fail in passing are sent again though nothing comes of it."""
FIRST_POLL_S, MOST_POLL_S = 5.0, 300.0
LOOK_EVERY_S = 1.0
ENDPOINT = "/v1/chat/completions"
NOT_FOUND = "not found"
ENDED = ("completed", "failed", "expired", "cancelled")
UNDERWAY = ("validating", "in_progress", "finalizing", "cancelling")


Prepare = Callable[[Client, str], Awaitable[Iterable[Request]]]


async def ask(client: Client, engine: str, prepare: Prepare, answer: Read, journal: Journal, meter: Meter) -> None:
    """Like asking one by one: returns when nothing is owed, or when nothing more is to be sent; batches that are under
    way then stay with the provider. Raises :class:`EndpointError`."""
    with Journal(journal.path.with_name("batches.jsonl")) as log:
        await _Batches(client, engine, prepare, answer, journal, meter, log).run()


class _Batches:
    def __init__(
        self, client: Client, engine: str, prepare: Prepare, answer: Read, journal: Journal, meter: Meter, log: Journal
    ) -> None:
        self.client, self.engine, self.prepare, self.answer = client, engine, prepare, answer
        self.journal, self.meter, self.log = journal, meter, log
        self.endpoint = client.endpoints[0]
        self.folder = journal.path.parent.parent / "batch"
        self.stop = asyncio.Event()
        self.max_lines = MAX_LINES
        self.first_pass = True
        self.open: dict[str, Part] = {}
        self.dollars: defaultdict[str, float] = defaultdict(float)
        """What each part may cost at most, where there is a budget."""

    def _is_ours(self, part: Part) -> bool:
        return (part.journal, part.model, part.url) == (self.journal.path.stem, self.client.model, self.endpoint.url)

    async def run(self) -> None:
        with on_interrupt(self._interrupt), self.meter.asking():
            await self._adopt()
            rounds = 0
            while True:
                await self._submit()
                if not self.open or self._stopped():
                    return
                before = len(self.journal.done)
                while self.open and not self._stopped():
                    await self._collect(await self._wait(), last=rounds + 1 >= ROUNDS)
                if len(self.journal.done) == before:
                    rounds += 1  # where something came, going on is worth it

    def _interrupt(self) -> None:
        self.meter.interrupted = True
        self.stop.set()

    def _stopped(self) -> bool:
        return self.meter.reason_to_stop() is not None

    # Out

    async def _adopt(self) -> None:
        """Take over the parts under way that hold something of what is owed now, with the batches of those that have no
        id; an intent that never became a batch is owed again. Other parts are another judge's or another round's: only
        whoever asked can read their answers, and they stay with the provider until then."""
        known = [part for part in parts(self.log.path) if part.event != "ended" and self._is_ours(part)]
        holders = {bytes.fromhex(key): part for part in known for key in part.keys}
        for request in await self.prepare(self.client, self.engine) if known else ():
            part = holders.get(bytes.fromhex(request.keys[0]))
            if part and not all(self._is_done(key) for key in request.keys):
                self.open[part.key] = part
                self.dollars[part.key] += self._at_most(self._line(request), request)
        for part in known:
            if all(self._is_done(key) for key in part.keys):  # in another way, or just before a crash
                self._note(part, "ended", status="answered")
        orphans = {part.key: part for part in self.open.values() if not part.batch}
        if orphans:
            try:
                async for batch in self._listed():
                    found = orphans.pop(intent(batch), None)
                    if found:
                        self._note(found, "submitted", batch=str(batch["id"]))
            except RequestFailed as error:
                raise EndpointError(f"does not list its batches: {error}", where=self.endpoint.url,
                                    mend="Nothing was lost. Give the command again.") from None  # fmt: skip
        for part in orphans.values():
            self._note(part, "ended", status="never sent")

    async def _submit(self) -> None:
        """Everything that is owed and in no batch, in parts."""
        flying = {bytes.fromhex(key) for part in self.open.values() for key in part.keys}
        lines: list[bytes] = []
        keys: list[str] = []
        size, dollars = 0, 0.0
        before = self.meter.usd + sum(self.dollars[key] for key in self.open)
        for request in await self.prepare(self.client, self.engine):
            done = [self._is_done(key) for key in request.keys]
            if self.first_pass:
                self.meter.skipped += sum(done) if all(done) else 0
            if all(done) or bytes.fromhex(request.keys[0]) in flying:
                continue
            line = self._line(request)
            cost = self._at_most(line, request)
            if self.meter.budget_usd is not None and before + dollars + cost > self.meter.budget_usd:
                self.meter.halted = f"the budget of ${self.meter.budget_usd:g} could not bear the next requests"
                break
            if self._stopped():
                break
            if len(lines) >= self.max_lines or size + len(line) > MAX_BYTES:
                await self._send(lines, keys, dollars)
                before, dollars = before + dollars, 0.0
                lines, keys, size = [], [], 0
            flying.add(bytes.fromhex(request.keys[0]))
            lines.append(line)
            keys.append(request.keys[0])
            size += len(line)
            dollars += cost
        if lines and (not self._stopped() or self.meter.halted):
            await self._send(lines, keys, dollars)
        self.first_pass = False
        if self.open and self.meter.halted:  # what it costs is known when it is back: then perhaps more can be sent
            self.meter.halted = None

    def _is_done(self, key: str) -> bool:
        """Answered, or failed for good in this command."""
        return key in self.journal or bytes.fromhex(key) in self.journal.failed

    def _line(self, request: Request) -> bytes:
        body = {**request.body, "model": self.client.model}
        return orjson.dumps({"custom_id": request.keys[0], "method": "POST", "url": ENDPOINT, "body": body}) + b"\n"

    def _at_most(self, line: bytes, request: Request) -> float:
        if self.meter.budget_usd is None:
            return 0.0
        tokens = request.body.get("max_tokens", 0) * request.body.get("n", 1)
        return (price(self.client.model, self.endpoint.url, len(line) // 4, 0, tokens) or 0.0) * DISCOUNT

    async def _send(self, lines: list[bytes], keys: list[str], dollars: float) -> None:
        """Submit one part, of at most so many ``dollars``: intent, file, batch, id."""
        part = Part(key=key_of(part=secrets.token_hex(16)), event="intended", journal=self.journal.path.stem,
                    model=self.client.model, url=self.endpoint.url, keys=keys, lines=len(keys))  # fmt: skip
        data = b"".join(lines)
        self.log.append([part])
        self.log.sync()
        self.open[part.key] = part
        self.dollars[part.key] = dollars

        async def upload() -> Any:
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field("file", data, filename=f"rlaif-{part.key[:16]}.jsonl", content_type="application/jsonl")
            told = await self.endpoint.send("POST", "/files", self.client.config.timeout_s, form, json=False)
            return wire.loads(told, self.client.hide)

        tried = False

        async def create() -> Any:
            nonlocal tried
            if tried:  # the first try may have arrived though its answer did not
                async for batch in self._listed():
                    if intent(batch) == part.key:
                        return batch
            tried = True
            asked = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h",
                     "metadata": {"rlaif": part.key}}  # fmt: skip
            return await self._json("POST", "/batches", orjson.dumps(asked))

        file = await self._steadily(upload, "a file")
        batch = await self._steadily(create, "a batch")
        self._note(part, "submitted", batch=str(batch["id"]))

    async def _steadily(self, call: Callable[[], Awaitable[Any]], what: str) -> Any:
        """``call`` with the client's retries, and an answer that has an id. Raises :class:`EndpointError`."""
        try:
            value = await self.client.steadily(call)
        except RequestFailed as error:
            raise EndpointError(
                f"did not take {what} for its batch API: {error}",
                where=self.endpoint.url,
                mend="Nothing was lost. Give the command again, or leave --batch away.",
            ) from None
        if not isinstance(value, dict) or not isinstance(value.get("id"), str):
            raise EndpointError(f"did not say the id of {what}: {self.client.hide(str(value))[:200]}",
                                where=self.endpoint.url)  # fmt: skip
        return value

    async def _json(self, method: str, path: str, data: bytes | None = None) -> Any:
        told = await self.endpoint.send(method, path, self.client.config.timeout_s, data)
        return wire.loads(told, self.client.hide)

    async def _listed(self) -> AsyncIterator[dict[str, Any]]:
        """The provider's batches, the newest first."""
        after = ""
        while True:
            page = await self.client.steadily(lambda after=after: self._json("GET", f"/batches?limit=100{after}"))  # type: ignore[misc]
            found = [each for each in page.get("data") or [] if isinstance(each, dict) and each.get("id")]
            for batch in found:
                yield batch
            if not page.get("has_more") or not found:
                return
            after = f"&after={found[-1]['id']}"

    # Back

    async def _wait(self) -> list[tuple[Part, dict[str, Any]]]:
        """Poll, ever less often, until some batch has ended. Gives those that have; none where the command stops."""
        pause = FIRST_POLL_S
        while not self._stopped():
            ended, missing = [], None
            for part in list(self.open.values()):
                try:
                    batch = await self.client.steadily(lambda part=part: self._json("GET", f"/batches/{part.batch}"))  # type: ignore[misc]
                except RequestFailed as error:
                    if self._stopped():
                        return []
                    gone = str(error).startswith("HTTP 404")
                    missing = self._untold(part, str(error), gone)
                    if not gone:
                        raise missing from None
                    batch = {"status": NOT_FOUND}
                status = str(batch.get("status")) if isinstance(batch, dict) else "unknown"
                if status != part.status:
                    self._note(part, "submitted", status=status)
                if status in ENDED:
                    ended.append((part, batch))
            self.meter.waiting = f"{len(self.open):,} batches: " + ", ".join(
                sorted({str(part.status) for part in self.open.values()})
            )
            if ended:
                return ended
            if missing and all(part.status == NOT_FOUND for part in self.open.values()):  # the others come in first
                raise missing
            await self._pause(pause)
            pause = min(MOST_POLL_S, pause * 1.5)
        return []

    def _untold(self, part: Part, told: str, gone: bool) -> EndpointError:
        """Of a batch that it has no more a provider says what it says of another account's. Only a person can tell the
        two apart, and what is paid is not given up on a guess."""
        mend = "It is kept: the same command looks for it again."
        if gone:
            mend = (
                "It is kept, as the key may be of another account than the one it was sent with: set that one. If it "
                f"is gone for good, take the lines that name it out of {self.log.path}, and the same command sends its "
                f"{part.lines:,} requests again."
            )
        return EndpointError(f"does not tell of batch {part.batch}: {told}", where=self.endpoint.url, mend=mend)

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopped() and (left := until - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self.stop.wait(), min(left, LOOK_EVERY_S))
            except TimeoutError:
                continue

    async def _collect(self, ended: list[tuple[Part, dict[str, Any]]], *, last: bool) -> None:
        """Journal what the ended batches say. Raises :class:`EndpointError` where going on would end alike."""
        trouble: EndpointError | None = None
        for part, batch in ended:
            answered = 0
            for name in ("output_file_id", "error_file_id"):
                if isinstance(batch.get(name), str):
                    answered += await self._read_file(batch[name], last)
            self.journal.sync()
            status = str(batch["status"])
            self._note(part, "ended", status=status, answered=answered)
            if status == "failed":
                trouble = self._why_failed(part, batch) or trouble
            if status == "cancelled":
                trouble = EndpointError(
                    f"batch {part.batch} was cancelled by somebody; what it had answered is kept",
                    where=self.endpoint.url,
                    mend="The same command sends the rest again.",
                )
        if trouble:
            raise trouble

    def _why_failed(self, part: Part, batch: dict[str, Any]) -> EndpointError | None:
        """None where smaller or later parts will pass: providers bound what may be queued."""
        errors = batch.get("errors")
        told = [
            each for each in (errors.get("data") or [] if isinstance(errors, dict) else []) if isinstance(each, dict)
        ]
        if any(each.get("code") == "token_limit_exceeded" for each in told) and self.max_lines > 1:
            self.max_lines = max(1, min(self.max_lines, part.lines // 2))
            return None
        said = "; ".join(f"{each.get('message')} (line {each.get('line')})" if each.get("line") else
                         str(each.get("message")) for each in told[:3]) or "no reason given"  # fmt: skip
        return EndpointError(f"failed batch {part.batch}: {self.client.hide(said)[:500]}", where=self.endpoint.url)

    async def _read_file(self, file: str, last: bool) -> int:
        """The lines of an output or error file, in whatever order, each to its request. Returns the answers."""
        path = self.folder / f"{file.replace('/', '_')}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            await self.client.steadily(lambda: self.endpoint.download(f"/files/{file}/content", path))
            places = {custom_id(line): offset for offset, line in lines_of(path)}
            reader = Reader(path)
            try:
                count = 0
                for number, request in enumerate(await self.prepare(self.client, self.engine)):
                    if number % 256 == 0:
                        await asyncio.sleep(0)
                    offset = places.get(request.keys[0])
                    if offset is not None and not all(self._is_done(key) for key in request.keys):
                        count += self._take(request, reader.line(offset), last)
            finally:
                reader.close()
            path.unlink()
            return count
        except RequestFailed as error:
            raise EndpointError(f"does not give file {file}: {error}", where=self.endpoint.url,
                                mend="It is kept there: the same command collects it.") from None  # fmt: skip
        except OSError as error:
            raise RunError(f"cannot be written: {system_says(error)}", where=str(path)) from None

    def _take(self, request: Request, line: bytes, last: bool) -> int:
        """1 where ``line`` answers ``request``; else it is owed again, or failed where that would not help."""
        kind: Literal["endpoint", "unreadable"] = "endpoint"
        try:
            body = completion_in(line, self.client.hide)
            reply = self.client.read(body, self.endpoint.url, discount=DISCOUNT)
            self.meter.count(reply.usage)
            records = self.answer(request, reply)
        except NoAnswer as error:
            told, last = str(error), last or not error.passing
        except Malformed as error:
            told = str(error)
        except Unreadable as error:
            kind, told = "unreadable", str(error)
        else:
            self.journal.append(records)
            self.meter.succeeded(len(records))
            return 1
        if last:
            self.journal.append(
                Failure(key=key, error=told, kind=kind, prompt_id=request.prompt_id) for key in request.keys
            )
            self.meter.failed_with(kind, told, len(request.keys))
        else:
            self.meter.retries += 1
        return 0

    def _note(self, part: Part, event: Literal["submitted", "ended"], **facts: Any) -> None:
        """Journal what became of ``part``; its keys are said once, with the intent."""
        now = part.model_copy(update={"event": event, "at": time.time(), **facts})
        self.log.append([now.model_copy(update={"keys": []})])
        self.log.sync()
        if event == "ended":
            self.open.pop(part.key, None)
            self.dollars.pop(part.key, None)
        else:
            self.open[part.key] = now
