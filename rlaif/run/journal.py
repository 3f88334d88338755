"""Append-only JSON Lines journals: one record per line, never rewritten, safe to interrupt at any time.

A record is written in one ``write``. A crash can leave at most a torn last line. It is cut off when the journal is next
opened for writing, and its request is pending again. A damaged line anywhere else is an error that names the line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from rlaif.errors import RunError
from rlaif.records import Record

SYNC_EVERY_S = 1.0
"""A crash of the process loses nothing; a crash of the machine loses at most this much."""

READ_CHUNK_BYTES = 16 << 20

RecordLookup = Callable[[int], dict[str, Any]]
"""Returns the record at a byte offset of a journal, such as :meth:`JournalReader.read_at`."""

REQUIRED_FIELDS: Mapping[str, Mapping[str, type]] = {
    "prompts": {"prompt_id": str, "messages": list, "split": str},
    "completions": {"prompt_id": str, "index": int, "model": str, "text": str},
    "verdicts": {"kind": str, "judge": str, "judge_hash": str, "model": str, "prompt_id": str, "a": str},
    "reviews": {"pair_id": str, "prompt_id": str, "annotator": str, "choice": str, "left_side": str, "route": str},
}
"""Fields that each answer in a journal of this name has besides its key, whichever version wrote it."""


class Journal:
    """One journal, opened for writing.

    ``answered_keys`` holds the keys that have an answer. ``failed_keys`` holds the keys that have none and failed since
    the journal was opened: the next command requests them again, this one does not. A closed journal holds neither.

    Opening reads the file once. Only the holder of the run's lock may open a journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered_keys: set[bytes] = set()
        self.failed_keys: set[bytes] = set()
        self._synced_at = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"cannot be opened for writing: {error.strerror}", location=str(path)) from None
        try:
            _cut_torn_line(self._fd)
            for _, record in iter_records(path):
                self._index(record)
        except BaseException:
            os.close(self._fd)
            raise
        self.failed_keys.clear()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bytes.fromhex(key) in self.answered_keys

    def append(self, records: Iterable[Record]) -> None:
        """Write ``records`` as one block of lines, and return when they are in the file.

        Raises :class:`RunError` if the disk is full or read-only."""
        values = [record.model_dump(mode="json", exclude_none=True) for record in records]
        block = memoryview(b"".join(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE) for value in values))
        try:
            while block:
                block = block[os.write(self._fd, block) :]
        except OSError as error:
            _cut_torn_line(self._fd)  # or the next record would continue the torn line
            raise self._write_error(error) from None
        for value in values:
            self._index(value)
        if time.monotonic() - self._synced_at >= SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._write_error(error) from None
        self._synced_at = time.monotonic()

    def close(self) -> None:
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1
                self.answered_keys, self.failed_keys = set(), set()  # millions of keys: later stages need the memory

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _index(self, value: dict[str, Any]) -> None:
        key = bytes.fromhex(value["key"])
        if "error" not in value:
            self.answered_keys.add(key)
            self.failed_keys.discard(key)
        elif key not in self.answered_keys:
            self.failed_keys.add(key)

    def _write_error(self, error: OSError) -> RunError:
        return RunError(
            f"cannot be written: {error.strerror}",
            location=str(self.path),
            hint="Free disk space or fix the permissions, then rerun the same command: it resumes.",
        )


def iter_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every complete line of the journal at ``path`` as (byte offset, record). A missing journal is empty.

    Safe while another process writes: a last line without its newline is ignored. Raises :class:`RunError` naming a
    damaged line.
    """
    needed = REQUIRED_FIELDS.get(path.stem, {})
    fields, types = (
        itemgetter("key", "key", *needed),
        [str, str, *needed.values()],
    )  # with two names at least, itemgetter returns a tuple
    for offset, line, text in _iter_lines(path):
        yield offset, _parse(path, line, text, fields, types)


def raise_damaged_at(path: Path, offset: int) -> None:
    """Raise :class:`RunError` naming the line at byte ``offset``, or an earlier damaged line."""
    for line_number, (start, _) in enumerate(iter_records(path), start=1):
        if start == offset:
            raise damaged_line_error(path, line_number)


class JournalReader:
    """Reads records of one journal by byte offset, for texts that are too large to hold in memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def read_line(self, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.readline()

    def read_at(self, offset: int) -> dict[str, Any]:
        record: dict[str, Any] = orjson.loads(self.read_line(offset))
        return record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def iter_blocks(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the complete lines of the journal from byte ``start`` on, as (byte offset, block of about 16 MiB)."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"cannot be read: {error.strerror}", location=str(path)) from None
    with file:
        file.seek(start)
        offset, rest = start, b""
        while chunk := file.read(READ_CHUNK_BYTES):
            chunk = rest + chunk
            end = chunk.rfind(b"\n") + 1
            if end:
                yield offset, chunk[:end]
            offset, rest = offset + end, chunk[end:]


def _iter_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    line_number = 0
    for start, block in iter_blocks(path):
        for line in block.split(b"\n")[:-1]:
            line_number += 1
            yield start, line_number, line
            start += len(line) + 1


def _parse(
    path: Path, line_number: int, text: bytes, fields: Callable[[Any], tuple[Any, ...]], types: list[type]
) -> dict[str, Any]:
    """Parse one line. ``fields`` extracts the required fields, which have ``types``; a failure needs only its key."""
    try:
        record: dict[str, Any] = orjson.loads(text)
        bytes.fromhex(record["key"])
        if "error" not in record and list(map(type, fields(record))) != types:
            raise damaged_line_error(path, line_number)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise damaged_line_error(path, line_number) from None
    return record


def damaged_line_error(path: Path, line_number: int) -> RunError:
    """Build the error for line ``line_number`` (from 1), which rlaif did not write in this form."""
    return RunError(
        "this line of the journal is damaged",
        location=f"{path}:{line_number}",
        hint="Restore the file from a backup, or delete this line. rlaif itself never edits journals.",
    )


def _cut_torn_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
