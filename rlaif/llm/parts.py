"""Parts of a batch job: what is journaled about them, and what stands in the files that come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field, ValidationError

from rlaif.llm import wire
from rlaif.llm.wire import Malformed
from rlaif.records import Record
from rlaif.run.journal import damaged, read


class NoAnswer(Exception):
    """A line says that its request was not answered. ``passing``: whether another try may be."""

    def __init__(self, told: str, *, passing: bool) -> None:
        super().__init__(told)
        self.passing = passing


class Part(Record):
    """A line of journal/batches.jsonl: what has become of one part. ``key``: the part's own, drawn when it is made.
    ``keys``: its custom_ids; said once, with the intent."""

    key: str
    event: Literal["intended", "submitted", "ended"]
    journal: str
    model: str
    url: str
    keys: list[str] = Field(default_factory=list)
    lines: int = 0
    batch: str | None = None
    status: str | None = None
    answered: int = 0
    at: float = Field(default_factory=time.time)


def parts(path: Path) -> list[Part]:
    """What is known of every part in the journal of batches at ``path``, in the order in which they were made. Raises
    :class:`RunError`."""
    known: dict[str, Part] = {}
    for number, (_, line) in enumerate(read(path), 1):
        try:
            part = Part.model_validate(line)
        except ValidationError:
            raise damaged(path, number) from None
        before = known.get(part.key)
        known[part.key] = part.model_copy(update={"keys": before.keys}) if before else part
    return list(known.values())


def intent(batch: dict[str, Any]) -> str:
    """The key of the part that a batch (as the provider shows it) was made for, or nothing."""
    metadata = batch.get("metadata")
    return str(metadata.get("rlaif")) if isinstance(metadata, dict) else ""


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with the byte offset at which it starts."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def custom_id(line: bytes) -> str:
    """Whose answer a line of an output or error file is; nothing where it cannot be read."""
    try:
        value = wire.loads(line)
    except Malformed:
        return ""
    return str(value.get("custom_id")) if isinstance(value, dict) else ""


def completion_in(line: bytes, hide: Callable[[str], str] = str) -> Any:
    """The chat completion in a line. Raises :class:`NoAnswer` where there is none, without what ``hide`` takes out."""
    try:
        value = wire.loads(line, hide)
    except Malformed as error:
        raise NoAnswer(str(error), passing=True) from None
    if not isinstance(value, dict):
        raise NoAnswer("the line is no object", passing=True)
    response, wrong = value.get("response"), value.get("error")
    if isinstance(response, dict) and isinstance(response.get("status_code"), int):
        if response["status_code"] == 200:
            return response.get("body")
        status = response["status_code"]
        told = f"HTTP {status}: {hide(wire.complaint(orjson.dumps(response.get('body'))))[:500]}"
        raise NoAnswer(told, passing=status in (408, 409, 425, 429) or status >= 500)
    said = wrong if isinstance(wrong, dict) else {}
    raise NoAnswer(f"{said.get('code') or 'no response'}: {hide(str(said.get('message') or ''))[:200]}", passing=True)
