"""Review files read back row by row, as spreadsheets and people leave them.

Contract: a row comes with the physical line at which it starts (the first line is 1), and a row that cannot be read
comes as an :class:`InputError` in its place. Whatever says what a file is, is read, and nothing is guessed: UTF-8 or
UTF-16 by its byte order mark, else UTF-8; comma, semicolon or tab by the header line, which names the known columns
under one of them only; any kind of line end. What is wrong with the whole file (encoding, columns, nothing in it) is
raised at once.

One broken row does not take others with it: a quote that is not closed swallows the lines after it, so after a bad
row the reader goes back and on from the next line that starts with a known pair id (which needs ``pair_id`` to be the
first column, as it is written).
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
from typing import TYPE_CHECKING

import orjson

from rlaif.errors import InputError
from rlaif.review.csv_escape import cell_equals, unescape_cell

if TYPE_CHECKING:
    from _csv import Reader

COLUMNS = ("pair_id", "prompt", "left", "right", "choice", "comment")
REQUIRED = COLUMNS[:-1]
FORMATS = {"csv": ".csv", "jsonl": ".jsonl"}
_DELIMITERS = ",;\t"


@dataclass(frozen=True, slots=True)
class ReviewRow:
    """One row: the physical line it starts at, and its cells by column."""

    line: int
    cells: dict[str, str]


class CsvReviewReader:
    """The rows of a CSV file after its header."""

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
            raise InputError(
                f"two columns are named {duplicates[0]!r}", location=location, hint="Take one of them out."
            )
        return columns

    def candidate_pair_ids(self) -> set[str]:
        """Everything in the file that may be meant as a pair id."""
        return set(self._first_cells) | {row.cells["pair_id"] for row in self.rows(()) if isinstance(row, ReviewRow)}

    def rows(self, known_pair_ids: Collection[str]) -> Iterator[ReviewRow | InputError]:
        """Every row that is not blank. ``known_pair_ids`` are the pair ids at which a new row may be recognised."""
        self._known_starts = [index for index, cell in enumerate(self._first_cells) if cell in known_pair_ids]
        self._seek(self._first_row)
        while self._position < len(self._lines):
            start = self._position
            try:
                with _unlimited_field_size():
                    fields: list[str] = next(self._reader, [])
            except csv.Error as error:
                self._position = self._reader_start + self._reader.line_num
                reason = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
                yield self._row_error(
                    start, f"not a CSV row: {reason}", "Quote the cell again, or export the queue anew."
                )
                # What is left of the broken row is no row either.
                self._seek(self._next_known_start(start))
                continue
            self._position = self._reader_start + self._reader.line_num
            if any(field.strip() for field in fields):
                yield self._row(start, fields)

    def reject(self, line: int) -> None:
        """The row just read, at ``line``, is bad: go on at the first known row inside it, if there is one."""
        if (next_start := self._next_known_start(line - 1)) < self._position:
            self._seek(next_start)

    def _next_known_start(self, line_index: int) -> int:
        """The first known row after ``at``, or where reading stands."""
        index = bisect_right(self._known_starts, line_index)
        return self._known_starts[index] if index < len(self._known_starts) else self._position

    def _row(self, start: int, fields: Sequence[str]) -> ReviewRow | InputError:
        # Spreadsheets put separators after the last column, and leave them out where the last cells are empty.
        surplus = [field for field in fields[len(self._columns) :] if field.strip()]
        row_fields = fields[: len(self._columns)]
        cells = {name: field for name, field in zip(self._columns, row_fields, strict=False) if name}
        if surplus or not {"pair_id", "prompt", "left", "right"} <= cells.keys():
            message = f"{len(fields)} fields, but the header has {len(self._columns)}"
            hint = "A cell with a separator, a quote or a line end in it has to stand in double quotes."
            return self._row_error(start, message, hint)
        cells = {name: cells.get(name, "") for name in COLUMNS}
        cells["pair_id"] = unescape_cell(cells["pair_id"]).strip()
        return ReviewRow(start + 1, cells)

    def _row_error(self, start: int, message: str, hint: str) -> InputError:
        self.reject(start + 1)
        return InputError(message, location=f"{self.path}:{start + 1}", hint=hint)

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
    """The rows of a JSON Lines file: one object a line."""

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

    def rows(self, known_pair_ids: Collection[str]) -> Iterator[ReviewRow | InputError]:  # noqa: ARG002
        for line_number, line in enumerate(self._lines, 1):
            if line.strip():
                try:
                    yield self._row(line_number, line)
                except InputError as error:
                    yield error

    def reject(self, line: int) -> None:
        """One line is one row: a bad one holds no other."""

    def _row(self, line_number: int, line: str) -> ReviewRow:
        location = f"{self.path}:{line_number}"
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise InputError(f"not JSON: {error}", location=location, hint="One object a line, as exported.") from None
        if not isinstance(value, dict):
            raise InputError("not a JSON object", location=location, hint="One object a line, as exported.")
        _require_columns(list(value), location)
        cells = {name: "" if value.get(name) is None else value[name] for name in COLUMNS}
        for name, cell in cells.items():
            if not isinstance(cell, str):
                raise InputError(f"{name} is {cell!r}, not text", location=location, hint=f"Put {name} in quotes.")
        cells["pair_id"] = cells["pair_id"].strip()
        return ReviewRow(line_number, cells)


TextReviewReader = CsvReviewReader | JsonlReviewReader


def open_review_file(path: Path) -> TextReviewReader:
    """The CSV or JSON Lines file at ``path``, by its extension. Raises :class:`InputError` where it is neither."""
    extension = path.suffix.lower()
    if extension not in FORMATS.values():
        raise InputError(
            f"cannot tell what {extension or 'a file without an extension'} is: a review file is .csv or .jsonl, "
            "or .json from Argilla or Label Studio",
            location=str(path),
            hint="In a spreadsheet, save it as CSV (UTF-8).",
        )
    text = _decode(path, read_file(path))
    return CsvReviewReader(path, text) if extension == ".csv" else JsonlReviewReader(path, text)


def read_file(path: Path) -> bytes:
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
            hint='Save it again as "CSV UTF-8"; letters outside ASCII may already be lost in this copy.',
        ) from None


def _empty_file_error(path: Path) -> InputError:
    return InputError("the file is empty", location=str(path), hint="Export the queue again.")


def _require_columns(columns: Sequence[str], location: str) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise InputError(
            f"no column {', '.join(missing)}; found: {', '.join(columns) or 'nothing'}; expected: {', '.join(COLUMNS)}",
            location=location,
            hint="Put the columns back as they were exported; their order does not matter.",
        )


@contextlib.contextmanager
def _unlimited_field_size() -> Iterator[None]:
    """The csv module refuses cells beyond 128 KiB; a prompt may be longer. The limit is the process's: put it back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
