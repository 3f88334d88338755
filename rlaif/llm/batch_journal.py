"""Parts of a batch job: what is journaled about them, and what stands in the files that come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field, ValidationError

from rlaif.llm import chat_protocol
from rlaif.llm.chat_protocol import MalformedResponseError
from rlaif.records import Record
from rlaif.run.journal import damaged_line_error, iter_records


class BatchLineError(Exception):
    """A line says that its request was not answered. ``transient``: whether another try may succeed."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class BatchJob(Record):
    """A line of journal/batches.jsonl: what has become of one part. ``key``: the part's own, drawn when it is made.
    ``keys``: its custom_ids; said once, with the intent."""

    key: str
    state: Literal["created", "submitted", "finished"]
    journal: str
    model: str
    url: str
    keys: list[str] = Field(default_factory=list)
    lines: int = 0
    batch: str | None = None
    status: str | None = None
    answered: int = 0
    created_at: float = Field(default_factory=time.time)


def read_jobs(path: Path) -> list[BatchJob]:
    """What is known of every part in the journal of batches at ``path``, in the order in which they were made. Raises
    :class:`RunError`."""
    jobs: dict[str, BatchJob] = {}
    for line_number, (_, line) in enumerate(iter_records(path), 1):
        try:
            job = BatchJob.model_validate(line)
        except ValidationError:
            raise damaged_line_error(path, line_number) from None
        previous = jobs.get(job.key)
        jobs[job.key] = job.model_copy(update={"keys": previous.keys}) if previous else job
    return list(jobs.values())


def job_key_of(batch: dict[str, Any]) -> str:
    """The key of the part that a batch (as the provider shows it) was made for, or nothing."""
    metadata = batch.get("metadata")
    return str(metadata.get("rlaif")) if isinstance(metadata, dict) else ""


def iter_lines_with_offsets(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with the byte offset at which it starts."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def line_custom_id(line: bytes) -> str:
    """Whose answer a line of an output or error file is; nothing where it cannot be read."""
    try:
        value = chat_protocol.parse_json(line)
    except MalformedResponseError:
        return ""
    return str(value.get("custom_id")) if isinstance(value, dict) else ""


def parse_batch_line(line: bytes, redact: Callable[[str], str] = str) -> Any:
    """The chat completion in a line. Raises :class:`BatchLineError` where there is none, without what ``redact`` takes
    out."""
    try:
        value = chat_protocol.parse_json(line, redact)
    except MalformedResponseError as error:
        raise BatchLineError(str(error), transient=True) from None
    if not isinstance(value, dict):
        raise BatchLineError("the line is no object", transient=True)
    response, line_error = value.get("response"), value.get("error")
    if isinstance(response, dict) and isinstance(response.get("status_code"), int):
        if response["status_code"] == 200:
            return response.get("body")
        status = response["status_code"]
        message = f"HTTP {status}: {redact(chat_protocol.error_message(orjson.dumps(response.get('body'))))[:500]}"
        raise BatchLineError(message, transient=status in (408, 409, 425, 429) or status >= 500)
    details = line_error if isinstance(line_error, dict) else {}
    raise BatchLineError(
        f"{details.get('code') or 'no response'}: {redact(str(details.get('message') or ''))[:200]}", transient=True
    )
