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
from rlaif.review.cells import from_cell, same_text

if TYPE_CHECKING:
    from _csv import Reader

COLUMNS = ("pair_id", "prompt", "left", "right", "choice", "comment")
REQUIRED = COLUMNS[:-1]
FORMATS = {"csv": ".csv", "jsonl": ".jsonl"}
_DELIMITERS = ",;\t"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the physical line it starts at, and its cells by column."""

    line: int
    cells: dict[str, str]


class CsvSheet:
    """The rows of a CSV file after its header."""

    unit = "line"

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._lines = list(io.StringIO(text, newline=""))
        header = next((at for at, line in enumerate(self._lines) if line.strip()), None)
        if header is None:
            raise _empty(path)
        self._columns = self._read_header(header)
        self._first = header + 1
        self._heads = [self._head(line) for line in self._lines]
        self._starts: list[int] = []
        self._base = self._at = self._first
        self._reader = self._reader_at(self._first)
        self.ignored = tuple(name for name in self._columns if name and name not in COLUMNS)

    def where(self, line: int) -> str:
        return f"{self.path}:{line}"

    def same(self, cell: str, shown: str) -> bool:
        return same_text(cell, shown)

    def _read_header(self, at: int) -> list[str]:
        found: list[str] = []
        for delimiter in _DELIMITERS:
            fields = next(csv.reader([self._lines[at]], delimiter=delimiter))
            names = [name.strip().casefold() for name in fields]
            if not found or len(set(names) & set(COLUMNS)) > len(set(found) & set(COLUMNS)):
                found, self._delimiter = names, delimiter
        where = f"{self.path}:{at + 1}"
        _require(found, where)
        twice = sorted({name for name in found if name in COLUMNS and found.count(name) > 1})
        if twice:
            raise InputError(f"two columns are named {twice[0]!r}", where=where, mend="Take one of them out.")
        return found

    def candidates(self) -> set[str]:
        """Everything in the file that may be meant as a pair id."""
        return set(self._heads) | {row.cells["pair_id"] for row in self.rows(()) if isinstance(row, Row)}

    def rows(self, known: Collection[str]) -> Iterator[Row | InputError]:
        """Every row that is not blank. ``known`` are the pair ids at which a new row may be recognised."""
        self._starts = [at for at, head in enumerate(self._heads) if head in known]
        self._open(self._first)
        while self._at < len(self._lines):
            start = self._at
            try:
                with _any_length():
                    fields: list[str] = next(self._reader, [])
            except csv.Error as error:
                self._at = self._base + self._reader.line_num
                why = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
                yield self._bad(start, f"not a CSV row: {why}", "Quote the cell again, or export the queue anew.")
                # What is left of the broken row is no row either.
                self._open(self._start_after(start))
                continue
            self._at = self._base + self._reader.line_num
            if any(field.strip() for field in fields):
                yield self._row(start, fields)

    def reject(self, line: int) -> None:
        """The row just read, at ``line``, is bad: go on at the first known row inside it, if there is one."""
        if (at := self._start_after(line - 1)) < self._at:
            self._open(at)

    def _start_after(self, at: int) -> int:
        """The first known row after ``at``, or where reading stands."""
        place = bisect_right(self._starts, at)
        return self._starts[place] if place < len(self._starts) else self._at

    def _row(self, start: int, fields: Sequence[str]) -> Row | InputError:
        # Spreadsheets put separators after the last column, and leave them out where the last cells are empty.
        surplus = [field for field in fields[len(self._columns) :] if field.strip()]
        known = fields[: len(self._columns)]
        cells = {name: field for name, field in zip(self._columns, known, strict=False) if name}
        if surplus or not {"pair_id", "prompt", "left", "right"} <= cells.keys():
            what = f"{len(fields)} fields, but the header has {len(self._columns)}"
            mend = "A cell with a separator, a quote or a line end in it has to stand in double quotes."
            return self._bad(start, what, mend)
        cells = {name: cells.get(name, "") for name in COLUMNS}
        cells["pair_id"] = from_cell(cells["pair_id"]).strip()
        return Row(start + 1, cells)

    def _bad(self, start: int, what: str, mend: str) -> InputError:
        self.reject(start + 1)
        return InputError(what, where=f"{self.path}:{start + 1}", mend=mend)

    def _open(self, at: int) -> None:
        self._base = self._at = at
        self._reader = self._reader_at(at)

    def _reader_at(self, at: int) -> Reader:
        lines = map(self._lines.__getitem__, range(at, len(self._lines)))
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _head(self, line: str) -> str:
        head, separator, _ = line.partition(self._delimiter)
        return from_cell(head.strip().strip('"')).strip() if separator else ""


class JsonlSheet:
    """The rows of a JSON Lines file: one object a line."""

    ignored: tuple[str, ...] = ()
    unit = "line"

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        if not text.strip():
            raise _empty(path)
        self._lines = text.split("\n")

    def where(self, line: int) -> str:
        return f"{self.path}:{line}"

    def same(self, cell: str, shown: str) -> bool:
        return cell == shown

    def candidates(self) -> set[str]:
        return {row.cells["pair_id"] for row in self.rows(()) if isinstance(row, Row)}

    def rows(self, known: Collection[str]) -> Iterator[Row | InputError]:  # noqa: ARG002
        for number, line in enumerate(self._lines, 1):
            if line.strip():
                try:
                    yield self._row(number, line)
                except InputError as bad:
                    yield bad

    def reject(self, line: int) -> None:
        """One line is one row: a bad one holds no other."""

    def _row(self, number: int, line: str) -> Row:
        where = f"{self.path}:{number}"
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise InputError(f"not JSON: {error}", where=where, mend="One object a line, as exported.") from None
        if not isinstance(value, dict):
            raise InputError("not a JSON object", where=where, mend="One object a line, as exported.")
        _require(list(value), where)
        cells = {name: "" if value.get(name) is None else value[name] for name in COLUMNS}
        for name, cell in cells.items():
            if not isinstance(cell, str):
                raise InputError(f"{name} is {cell!r}, not text", where=where, mend=f"Put {name} in quotes.")
        cells["pair_id"] = cells["pair_id"].strip()
        return Row(number, cells)


Sheet = CsvSheet | JsonlSheet


def read_sheet(path: Path) -> Sheet:
    """The CSV or JSON Lines file at ``path``, by its extension. Raises :class:`InputError` where it is neither."""
    extension = path.suffix.lower()
    if extension not in FORMATS.values():
        raise InputError(
            f"cannot tell what {extension or 'a file without an extension'} is: a review file is .csv or .jsonl, "
            "or .json from Argilla or Label Studio",
            where=str(path),
            mend="In a spreadsheet, save it as CSV (UTF-8).",
        )
    text = _decode(path, read_file(path))
    return CsvSheet(path, text) if extension == ".csv" else JsonlSheet(path, text)


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _decode(path: Path, data: bytes) -> str:
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        newline = "\n".encode("utf-16-le" if data.startswith(codecs.BOM_UTF16_LE) else "utf-16-be") if wide else b"\n"
        line = data.count(newline, 0, error.start) + 1
        raise InputError(
            f"wrong encoding: byte 0x{data[error.start]:02x} is not {'UTF-16' if wide else 'UTF-8'}",
            where=f"{path}:{line}",
            mend='Save it again as "CSV UTF-8"; letters outside ASCII may already be lost in this copy.',
        ) from None


def _empty(path: Path) -> InputError:
    return InputError("the file is empty", where=str(path), mend="Export the queue again.")


def _require(found: Sequence[str], where: str) -> None:
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise InputError(
            f"no column {', '.join(missing)}; found: {', '.join(found) or 'nothing'}; expected: {', '.join(COLUMNS)}",
            where=where,
            mend="Put the columns back as they were exported; their order does not matter.",
        )


class _any_length:  # noqa: N801
    """The csv module refuses cells beyond 128 KiB; a prompt may be longer. The limit is the process's: put it back."""

    def __enter__(self) -> None:
        self._before = csv.field_size_limit(sys.maxsize)

    def __exit__(self, *_: object) -> None:
        csv.field_size_limit(self._before)
