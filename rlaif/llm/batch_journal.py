"""Batch jobs in journal/batches.jsonl, and the lines of the result files that providers return."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field, ValidationError

from rlaif.llm import chat_protocol, http_status
from rlaif.llm.chat_protocol import MalformedResponseError
from rlaif.records import Record
from rlaif.run.journal import damaged_line_error, iter_records


class BatchLineError(Exception):
    """A result line holds no answer. ``transient``: another attempt may succeed."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class BatchJob(Record):
    """One state of a batch job: a line of journal/batches.jsonl."""

    key: str
    """The job's own key, drawn at random when it is created."""
    state: Literal["created", "submitted", "finished"]
    journal: str
    model: str
    url: str
    keys: list[str] = Field(default_factory=list)
    """The custom_ids of its requests. Only the line of the state "created" holds them."""
    lines: int = 0
    batch: str | None = None
    """The provider's id of the batch."""
    status: str | None = None
    """The provider's status of the batch."""
    answered: int = 0
    created_at: float = Field(default_factory=time.time)


def read_jobs(path: Path) -> list[BatchJob]:
    """Return the latest state of every job in the journal at ``path``, in order of creation.

    Raises :class:`RunError` if a line is damaged.
    """
    jobs: dict[str, BatchJob] = {}
    for line_number, (_, line) in enumerate(iter_records(path), 1):
        try:
            job = BatchJob.model_validate(line)
        except ValidationError:
            raise damaged_line_error(path, line_number) from None
        previous = jobs.get(job.key)
        jobs[job.key] = job.model_copy(update={"keys": previous.keys}) if previous else job
    return list(jobs.values())


def iter_lines_with_offsets(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line with the byte offset at which it starts."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def line_custom_id(line: bytes) -> str:
    """Return the custom_id of a result line, or "" if the line cannot be read."""
    try:
        value = chat_protocol.parse_json(line)
    except MalformedResponseError:
        return ""
    return str(value.get("custom_id")) if isinstance(value, dict) else ""


def parse_batch_line(line: bytes, redact: Callable[[str], str] = str) -> Any:
    """Return the chat completion of a result line, as JSON.

    Raises :class:`BatchLineError` if it has none. ``redact`` removes secrets from the error's text.
    """
    try:
        value = chat_protocol.parse_json(line, redact)
    except MalformedResponseError as error:
        raise BatchLineError(str(error), transient=True) from None
    if not isinstance(value, dict):
        raise BatchLineError("the line is not a JSON object", transient=True)
    response, line_error = value.get("response"), value.get("error")
    if isinstance(response, dict) and isinstance(response.get("status_code"), int):
        status = response["status_code"]
        if status == HTTPStatus.OK:
            return response.get("body")
        message = f"HTTP {status}: {redact(chat_protocol.error_message(orjson.dumps(response.get('body'))))[:500]}"
        raise BatchLineError(message, transient=http_status.is_retryable(status))
    details = line_error if isinstance(line_error, dict) else {}
    raise BatchLineError(
        f"{details.get('code') or 'no response'}: {redact(str(details.get('message') or ''))[:200]}", transient=True
    )
