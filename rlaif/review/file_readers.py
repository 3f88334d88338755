"""Read review files row by row, as spreadsheets and annotators save them.

Contract: a row carries the physical line at which it starts (the first line is 1). A row that cannot be read is
yielded as an :class:`UnreadableRow` in its place. The format is detected, never guessed: UTF-8 or UTF-16 from the byte
order mark, else UTF-8; comma, semicolon or tab from the header line, which has the known columns under one of them
only; any kind of line break. Errors of the whole file (encoding, columns, no content) are raised at once.

A broken row does not hide other rows. An unclosed quote swallows the lines after it, so after a bad row the reader goes
back to the next line that starts with a known pair id. That requires ``pair_id`` to be the first column, as exported.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import orjson

from rlaif.errors import InputError
from rlaif.review.csv_escape import cell_equals, unescape_cell

if TYPE_CHECKING:
    from _csv import Reader

COLUMNS = ("pair_id", "prompt", "left", "right", "choice", "comment")
REQUIRED = COLUMNS[:-1]
FORMATS = {"csv": ".csv", "jsonl": ".jsonl"}
_DELIMITERS = ",;\t"
JSON_LINES_HINT = "Write one object per line, as exported."


@dataclass(frozen=True, slots=True)
class ReviewRow:
    """One row: the physical line at which it starts, and its cells by column."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True, slots=True)
class UnreadableRow:
    """A row that cannot be read: the physical line at which it starts, and the error that names it."""

    line: int
    error: InputError


class ReviewReader(Protocol):
    """The rows of a review file. ``unit`` is the word for a row's number: line or record."""

    unit: str
    ignored_columns: tuple[str, ...]

    def location(self, line: int) -> str:
        """Return the location for an error: file and line or record number."""

    def cell_equals(self, cell: str, text: str) -> bool:
        """Return True if ``cell`` holds the exported ``text``."""

    def candidate_pair_ids(self) -> set[str]:
        """Return every text in the file that may be a pair id."""

    def rows(self, known_pair_ids: Collection[str]) -> Iterator[ReviewRow | UnreadableRow]:
        """Yield every row that is not blank. A line that starts with one of ``known_pair_ids`` may start a new row."""

    def reject(self, line: int) -> None:
        """Mark the row just read, at ``line``, as bad. If a known row starts inside it, reading resumes there."""


class CsvReviewReader:
    """The rows of a CSV file after its header. Raises :class:`InputError` if the header is invalid."""

    unit = "line"

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._lines = list(io.StringIO(text, newline=""))
        header = next((index for index, line in enumerate(self._lines) if line.strip()), None)
        if header is None:
            raise _empty_file_error(path)
        self._columns = self._read_header(header)
        self._first_row = header + 1
        self._first_cells = [self._first_cell(line) for line in self._lines]
        self._known_starts: list[int] = []
        self._reader_start = self._position = self._first_row
        self._reader = self._reader_from(self._first_row)
        self.ignored_columns = tuple(name for name in self._columns if name and name not in COLUMNS)

    def location(self, line: int) -> str:
        return f"{self.path}:{line}"

    def cell_equals(self, cell: str, text: str) -> bool:
        return cell_equals(cell, text)

    def _read_header(self, line_index: int) -> list[str]:
        columns: list[str] = []
        for delimiter in _DELIMITERS:
            fields = next(csv.reader([self._lines[line_index]], delimiter=delimiter))
            names = [name.strip().casefold() for name in fields]
            if not columns or len(set(names) & set(COLUMNS)) > len(set(columns) & set(COLUMNS)):
                columns, self._delimiter = names, delimiter
        location = f"{self.path}:{line_index + 1}"
        _require_columns(columns, location)
        duplicates = sorted({name for name in columns if name in COLUMNS and columns.count(name) > 1})
        if duplicates:
            raise InputError(f"two columns are named {duplicates[0]!r}", location=location, hint="Remove one of them.")
        return columns

    def candidate_pair_ids(self) -> set[str]:
        return set(self._first_cells) | {row.cells["pair_id"] for row in self.rows(()) if isinstance(row, ReviewRow)}

    def rows(self, known_pair_ids: Collection[str]) -> Iterator[ReviewRow | UnreadableRow]:
        self._known_starts = [index for index, cell in enumerate(self._first_cells) if cell in known_pair_ids]
        self._seek(self._first_row)
        while self._position < len(self._lines):
            start = self._position
            try:
                with _unlimited_field_size():
                    fields: list[str] = next(self._reader, [])
            except csv.Error as error:
                self._position = self._reader_start + self._reader.line_num
                reason = "a quote is never closed" if "unexpected end" in str(error) else str(error)
                yield self._unreadable(start, f"not a valid CSV row: {reason}", "Fix the quotes of the cell.")
                # The rest of the broken row is not a row either.
                self._seek(self._next_known_start(start))
                continue
            self._position = self._reader_start + self._reader.line_num
            if any(field.strip() for field in fields):
                yield self._row(start, fields)

    def reject(self, line: int) -> None:
        if (next_start := self._next_known_start(line - 1)) < self._position:
            self._seek(next_start)

    def _next_known_start(self, line_index: int) -> int:
        """Return the first known row after ``line_index``, or the current position."""
        index = bisect_right(self._known_starts, line_index)
        return self._known_starts[index] if index < len(self._known_starts) else self._position

    def _row(self, start: int, fields: Sequence[str]) -> ReviewRow | UnreadableRow:
        # Spreadsheets add separators after the last column, and omit them if the last cells are empty.
        surplus = [field for field in fields[len(self._columns) :] if field.strip()]
        row_fields = fields[: len(self._columns)]
        cells = {name: field for name, field in zip(self._columns, row_fields, strict=False) if name}
        if surplus or not {"pair_id", "prompt", "left", "right"} <= cells.keys():
            message = f"{len(fields)} fields, but the header has {len(self._columns)}"
            hint = "Put a cell that contains a separator, a quote or a line break in double quotes."
            return self._unreadable(start, message, hint)
        cells = {name: cells.get(name, "") for name in COLUMNS}
        cells["pair_id"] = unescape_cell(cells["pair_id"]).strip()
        return ReviewRow(start + 1, cells)

    def _unreadable(self, start: int, message: str, hint: str) -> UnreadableRow:
        line = start + 1
        self.reject(line)
        return UnreadableRow(line, InputError(message, location=self.location(line), hint=hint))

    def _seek(self, line_index: int) -> None:
        self._reader_start = self._position = line_index
        self._reader = self._reader_from(line_index)

    def _reader_from(self, line_index: int) -> Reader:
        lines = map(self._lines.__getitem__, range(line_index, len(self._lines)))
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _first_cell(self, line: str) -> str:
        head, separator, _ = line.partition(self._delimiter)
        return unescape_cell(head.strip().strip('"')).strip() if separator else ""


class JsonlReviewReader:
    """The rows of a JSON Lines file: one object per line."""

    ignored_columns: tuple[str, ...] = ()
    unit = "line"

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        if not text.strip():
            raise _empty_file_error(path)
        self._lines = text.split("\n")

    def location(self, line: int) -> str:
        return f"{self.path}:{line}"

    def cell_equals(self, cell: str, text: str) -> bool:
        return cell == text

    def candidate_pair_ids(self) -> set[str]:
        return {row.cells["pair_id"] for row in self.rows(()) if isinstance(row, ReviewRow)}

    def rows(self, known_pair_ids: Collection[str]) -> Iterator[ReviewRow | UnreadableRow]:  # noqa: ARG002
        for line_number, line in enumerate(self._lines, 1):
            if line.strip():
                try:
                    yield self._row(line_number, line)
                except InputError as error:
                    yield UnreadableRow(line_number, error)

    def reject(self, line: int) -> None:
        """Do nothing: one line is one row, so a bad row contains no other."""

    def _row(self, line_number: int, line: str) -> ReviewRow:
        location = f"{self.path}:{line_number}"
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise InputError(f"not JSON: {error}", location=location, hint=JSON_LINES_HINT) from None
        if not isinstance(value, dict):
            raise InputError("not a JSON object", location=location, hint=JSON_LINES_HINT)
        _require_columns(list(value), location)
        cells = {name: "" if value.get(name) is None else value[name] for name in COLUMNS}
        for name, cell in cells.items():
            if not isinstance(cell, str):
                raise InputError(f"{name} must be text, got {cell!r}", location=location, hint=f"Put {name} in quotes.")
        cells["pair_id"] = cells["pair_id"].strip()
        return ReviewRow(line_number, cells)


def open_review_file(path: Path) -> CsvReviewReader | JsonlReviewReader:
    """Open the CSV or JSON Lines file at ``path``, by its extension. Raises :class:`InputError` if it is neither."""
    extension = path.suffix.lower()
    if extension not in FORMATS.values():
        raise InputError(
            f"unsupported file type {extension!r}: a review file is .csv or .jsonl, "
            "or .json from Argilla or Label Studio",
            location=str(path),
            hint="Save the spreadsheet as CSV (UTF-8).",
        )
    text = _decode(path, read_file(path))
    return CsvReviewReader(path, text) if extension == ".csv" else JsonlReviewReader(path, text)


def read_file(path: Path) -> bytes:
    """Return the content of ``path``. Raises :class:`InputError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", location=str(path)) from None


def _decode(path: Path, data: bytes) -> str:
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        newline = "\n".encode("utf-16-le" if data.startswith(codecs.BOM_UTF16_LE) else "utf-16-be") if wide else b"\n"
        line = data.count(newline, 0, error.start) + 1
        raise InputError(
            f"wrong encoding: byte 0x{data[error.start]:02x} is not {'UTF-16' if wide else 'UTF-8'}",
            location=f"{path}:{line}",
            hint='Save the original again as "CSV UTF-8": letters outside ASCII may be lost in this copy.',
        ) from None


def _empty_file_error(path: Path) -> InputError:
    return InputError("the file is empty", location=str(path), hint="Export the queue again.")


def _require_columns(columns: Sequence[str], location: str) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise InputError(
            f"missing column {', '.join(missing)}; "
            f"found: {', '.join(columns) or 'none'}; expected: {', '.join(COLUMNS)}",
            location=location,
            hint="Restore the exported columns, in any order.",
        )


@contextlib.contextmanager
def _unlimited_field_size() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB per cell, which a prompt may exceed.

    The limit is global to the process, so it is restored at the end."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
