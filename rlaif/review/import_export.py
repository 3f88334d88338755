"""Export the review queue to a file, blind, and import the labels from it.

A file contains ``pair_id, prompt, left, right, choice, comment`` and nothing else: no model, no verdict, no route. The
seed, the pair and the annotator determine which response is on the left. CSV is RFC 4180 in UTF-8, with cells escaped
by :mod:`rlaif.review.csv_escape`, so that a spreadsheet neither runs nor changes a model's answer. JSON Lines contains
the texts unchanged. An annotator fills in ``choice`` (left, right, tie, both_bad, skip; case and spaces are ignored)
and, optionally, ``comment``. An empty choice is a pair not labeled yet.
Argilla's records and Label Studio's tasks: :mod:`rlaif.review.labeling_tools`.

Contract of the import: with ``on_bad_row="stop"`` every row is checked before anything is written, and one error names
the first bad row, the number of rows with the same kind of error, and the number of other bad rows. With ``"skip"`` the
result lists the bad rows, and all others count. A row is bad if its pair is unknown or repeated, its choice is invalid,
or its prompt or answers are not what this annotator was shown under this seed. Importing a file again adds nothing. A
label that differs from the annotator's newest for that pair is added and becomes the newest.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO, get_args

import orjson

from rlaif.errors import InputError, UsageError, did_you_mean
from rlaif.records import Choice
from rlaif.review.csv_escape import escape_cell
from rlaif.review.file_readers import (
    COLUMNS,
    FORMATS,
    ReviewReader,
    ReviewRow,
    UnreadableRow,
    open_review_file,
    read_file,
)
from rlaif.review.labeling_tools import COMPANIONS, TOOLS, ToolExportReader, export_records, open_tool_export
from rlaif.review.queue import (
    ReviewItem,
    latest_labels,
    make_item,
    make_review,
    normalize_annotator_name,
    pending_pairs,
    read_pairs,
)
from rlaif.run.atomic_write import atomic_path

if TYPE_CHECKING:
    from rlaif.run.run import Run

HOW_TO_LABEL: Mapping[Format, str] = {
    **dict.fromkeys(("csv", "jsonl"), "Fill in choice (left, right, tie, both_bad, skip)"),
    "argilla": "Log it with the settings next to it (docs/review.md), label, and export with dataset.records.to_json",
    "label-studio": "Import it into a project with the labeling config next to it, label, and export as JSON",
}
CHOICES: Mapping[str, Choice] = {choice: choice for choice in get_args(Choice)}
Format = Literal["csv", "jsonl", "argilla", "label-studio"]
EXTENSIONS: Mapping[str, str] = {**FORMATS, **dict.fromkeys(TOOLS, ".json")}
ErrorKind = Literal["unreadable", "pair", "sides", "edited", "choice", "repeated"]
MAX_SPREADSHEET_CELL_CHARS = 32_767
"""Maximum characters per cell in the most used spreadsheet, which truncates longer texts without a warning."""


@dataclass(frozen=True, slots=True)
class ReviewImport:
    """The result of an import: numbers of rows, and the errors of the bad rows.

    ``added``: labels of pairs new to this annotator. ``changed``: labels that replace an older one. ``unchanged``:
    labels already in the journal. ``unlabeled``: rows without a choice. ``bad_rows``: rows that were not imported.
    """

    added: int
    changed: int
    unchanged: int
    unlabeled: int
    bad_rows: list[InputError]
    ignored_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _ParsedLabel:
    """A valid row. ``choice`` is None if the pair is not labeled yet."""

    line: int
    item: ReviewItem
    choice: Choice | None
    comment: str


@dataclass(frozen=True, slots=True)
class _RowError:
    """A bad row: its line or record number, the kind of error, by which rows are counted, and the error."""

    line: int
    kind: ErrorKind
    error: InputError


class _Appended(NamedTuple):
    """Numbers of labels by their effect on the journal."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0


def export_queue(
    run: Run,
    path: Path,
    *,
    format: Format,  # noqa: A002
    annotator: str,
    seed: int,
    bom: bool = False,
) -> int:
    """Write the pairs that ``annotator`` has not labeled to ``path`` and return their number.

    ``bom`` puts a byte order mark before a CSV: some spreadsheets need it to detect UTF-8 when the file is
    double-clicked. It is off by default, because a program that reads plain UTF-8 takes it as part of the first
    column's name.
    Raises :class:`UsageError` rather than overwrite labels.
    """
    if format not in EXTENSIONS:
        raise UsageError(f"unknown review file format {format!r}", hint=did_you_mean(format, EXTENSIONS))
    if path.suffix.lower() != EXTENSIONS[format]:
        raise UsageError(
            f"the file name must end in {EXTENSIONS[format]}",
            location=str(path),
            hint=f"Name it {path.with_suffix(EXTENSIONS[format]).name}: the import detects a file by its extension.",
        )
    _protect_existing_labels(path)
    annotator = normalize_annotator_name(annotator)
    pending = pending_pairs(read_pairs(run), run.reviews(), annotator=annotator, seed=seed)
    items = (make_item(row, annotator=annotator, seed=seed) for row in pending.iter_rows(named=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            if format == "argilla" or format == "label-studio":
                records, companion = export_records(format, items)
                temporary.write_bytes(records)
                path.with_suffix(COMPANIONS[format]).write_bytes(companion)
            else:
                encoding = "utf-8-sig" if bom and format == "csv" else "utf-8"
                with temporary.open("w", encoding=encoding, newline="") as file:
                    (_write_csv if format == "csv" else _write_jsonl)(file, items)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", location=str(path)) from None
    return pending.height


def _write_csv(file: TextIO, items: Iterable[ReviewItem]) -> None:
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for item in items:
        writer.writerow([*map(escape_cell, (item.pair_id, item.prompt, item.left, item.right)), "", ""])


def _write_jsonl(file: TextIO, items: Iterable[ReviewItem]) -> None:
    for item in items:
        texts = (item.pair_id, item.prompt, item.left, item.right, "", "")
        file.write(orjson.dumps(dict(zip(COLUMNS, texts, strict=True))).decode() + "\n")


def _protect_existing_labels(path: Path) -> None:
    """Raise :class:`UsageError` if ``path`` holds labels, or is not an exported queue."""
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    hint = "Export to another file, or import this one and move it away."
    labeled = 0
    try:
        for row in _open_reader(path).rows(()):
            if isinstance(row, UnreadableRow):
                raise row.error
            labeled += bool(row.cells["choice"].strip() or row.cells["comment"].strip())
    except InputError as error:
        message = f"already exists and cannot be read as a review file ({error.message})"
        raise UsageError(message, location=str(path), hint=hint) from None
    if labeled:
        message = f"already exists, with choices or comments in {labeled} rows"
        raise UsageError(message, location=str(path), hint=hint)


def _open_reader(path: Path) -> ReviewReader:
    return open_tool_export(path, read_file(path)) if path.suffix.lower() == ".json" else open_review_file(path)


def import_reviews(
    run: Run, path: Path, *, annotator: str, seed: int, on_bad_row: Literal["stop", "skip"] = "stop",
    format: Format | None = None,  # noqa: A002
) -> ReviewImport:  # fmt: skip
    """Add the labels in ``path`` to the run's reviews journal. Raises :class:`InputError` as in the module's contract.

    The extension and the content determine the file's format; ``format`` only checks it.
    """
    annotator = normalize_annotator_name(annotator)
    reader = _open_reader(path)
    _require_format(reader, path, format)
    pairs = read_pairs(run, ids=reader.candidate_pair_ids())
    items = {row["pair_id"]: make_item(row, annotator=annotator, seed=seed) for row in pairs.iter_rows(named=True)}
    labels, row_errors = _parse_rows(reader, items, annotator)
    labels, repeats = _deduplicate(reader, labels)
    row_errors = sorted(row_errors + repeats, key=lambda row_error: row_error.line)
    if row_errors and on_bad_row == "stop":
        raise _summarize_errors(row_errors, reader.unit)
    appended = _append_labels(run, labels, annotator)
    return ReviewImport(
        added=appended.added,
        changed=appended.changed,
        unchanged=appended.unchanged,
        unlabeled=sum(label.choice is None for label in labels),
        bad_rows=[row_error.error for row_error in row_errors],
        ignored_columns=reader.ignored_columns,
    )


def _require_format(reader: ReviewReader, path: Path, format: Format | None) -> None:  # noqa: A002
    if format is None:
        return
    matches = reader.tool == format if isinstance(reader, ToolExportReader) else True
    if path.suffix.lower() != EXTENSIONS[format] or not matches:
        raise InputError(f"not a file in the format {format}", location=str(path), hint="Drop --format to detect it.")


def _parse_rows(
    reader: ReviewReader, items: Mapping[str, ReviewItem], annotator: str
) -> tuple[list[_ParsedLabel], list[_RowError]]:
    labels: list[_ParsedLabel] = []
    row_errors: list[_RowError] = []
    for row in reader.rows(items.keys()):
        if isinstance(row, UnreadableRow):
            row_errors.append(_RowError(row.line, "unreadable", row.error))
            continue
        parsed = _parse_row(reader, row, items.get(row.cells["pair_id"]), annotator)
        if isinstance(parsed, _ParsedLabel):
            labels.append(parsed)
        else:
            row_errors.append(parsed)
            reader.reject(row.line)
    return labels, row_errors


def _parse_row(
    reader: ReviewReader, row: ReviewRow, item: ReviewItem | None, annotator: str
) -> _ParsedLabel | _RowError:
    """Return the label in a row, or the error of the row."""

    def row_error(kind: ErrorKind, message: str, hint: str) -> _RowError:
        return _row_error(reader, row.line, kind, message, hint)

    if item is None:
        hint = "Export the queue again: the file belongs to another run, or the pairs were rebuilt since."
        return row_error("pair", f"unknown pair_id {row.cells['pair_id']!r}", hint)
    changed = _changed_texts(reader, row, item)
    if changed == ["left", "right"] and _sides_swapped(reader, row, item):
        hint = (
            "Give the --annotator for whom the file was exported. If it is the same, the run's seed has changed since."
        )
        return row_error("sides", f"left and right are swapped for annotator {annotator!r}", hint)
    if changed:
        hint = "Restore the cell, or export the queue again: a label counts for the exported texts only."
        if any(len(escape_cell(getattr(item, name))) > MAX_SPREADSHEET_CELL_CHARS for name in changed):
            hint = (
                f"Label this pair on the page, or export .jsonl: a spreadsheet cell holds {MAX_SPREADSHEET_CELL_CHARS} "
                "characters."
            )
        return row_error("edited", f"{' and '.join(changed)} of pair {item.pair_id} changed since the export", hint)
    choice = "_".join(row.cells["choice"].casefold().replace("-", " ").replace("_", " ").split())
    if choice and choice not in CHOICES:
        return row_error("choice", f"unknown choice {row.cells['choice'].strip()!r}", did_you_mean(choice, CHOICES))
    return _ParsedLabel(row.line, item, CHOICES[choice] if choice else None, row.cells["comment"])


def _changed_texts(reader: ReviewReader, row: ReviewRow, item: ReviewItem) -> list[Literal["prompt", "left", "right"]]:
    names: tuple[Literal["prompt", "left", "right"], ...] = ("prompt", "left", "right")
    return [name for name in names if not reader.cell_equals(row.cells[name], getattr(item, name))]


def _sides_swapped(reader: ReviewReader, row: ReviewRow, item: ReviewItem) -> bool:
    return reader.cell_equals(row.cells["left"], item.right) and reader.cell_equals(row.cells["right"], item.left)


def _row_error(reader: ReviewReader, line: int, kind: ErrorKind, message: str, hint: str) -> _RowError:
    return _RowError(line, kind, InputError(message, location=reader.location(line), hint=hint))


def _deduplicate(reader: ReviewReader, labels: Iterable[_ParsedLabel]) -> tuple[list[_ParsedLabel], list[_RowError]]:
    """Keep one row per pair. If the rows of a pair contradict each other, keep none of them."""
    rows_of: dict[str, list[_ParsedLabel]] = {}
    for label in labels:
        rows_of.setdefault(label.item.pair_id, []).append(label)
    unique: list[_ParsedLabel] = []
    row_errors: list[_RowError] = []
    for pair_id, rows in rows_of.items():
        labeled = [row for row in rows if row.choice is not None]
        agree = len({row.choice for row in labeled}) <= 1
        selected = (labeled or rows)[0] if agree else None
        if selected is not None:
            unique.append(selected)
        for row in rows:
            if row is not selected:
                other_line = next(other.line for other in rows if other is not row)
                message = f"repeated pair_id {pair_id!r}: also in {reader.unit} {other_line}"
                hint = "Keep one row per pair." if agree else "Keep the row that you mean: the choices differ."
                row_errors.append(_row_error(reader, row.line, "repeated", message, hint))
    return unique, row_errors


def _summarize_errors(row_errors: list[_RowError], unit: str) -> InputError:
    """Return one error for all: the first, the lines with the same kind of error, and the number of other bad rows."""
    first = row_errors[0]
    same_kind_lines = [row_error.line for row_error in row_errors if row_error.kind == first.kind]
    message = first.error.message
    if len(same_kind_lines) > 1:
        lines = ", ".join(map(str, same_kind_lines[:10])) + (", ..." if len(same_kind_lines) > 10 else "")
        message += f" ({len(same_kind_lines)} rows with this error: {unit}s {lines})"
    if (others := len(row_errors) - len(same_kind_lines)) > 0:
        message += f"; {others} bad {'row' if others == 1 else 'rows'} with other errors"
    hints = (first.error.hint, "Nothing was imported; --on-bad-row skip imports the other rows.")
    return InputError(message, location=first.error.location, hint=" ".join(filter(None, hints)))


def _append_labels(run: Run, labels: Iterable[_ParsedLabel], annotator: str) -> _Appended:
    """Append new and changed labels to the reviews journal."""
    labeled = [(label, label.choice) for label in labels if label.choice is not None]
    if not labeled:
        return _Appended()
    added = changed = unchanged = 0
    with run.lock("reviews"):
        # Read under the lock: another import may have just finished.
        own_labels = latest_labels(run.reviews()).filter(annotator=annotator, role="annotator")
        previous_by_pair = {row["pair_id"]: row for row in own_labels.iter_rows(named=True)}
        records = []
        for label, choice in labeled:
            previous = previous_by_pair.get(label.item.pair_id)
            # A file has no better answer and no confidence: keep those given on the page while the choice is the same.
            same_choice = previous if previous and previous["choice"] == choice else {}
            record = make_review(
                label.item,
                annotator=annotator,
                choice=choice,
                comment=label.comment,
                edited_response=same_choice.get("edited_response"),
                confidence=same_choice.get("confidence"),
                previous=previous,
            )
            if record is None:
                unchanged += 1
                continue
            records.append(record)
            if previous:
                changed += 1
            else:
                added += 1
        if records:
            with run.journal("reviews") as journal:
                journal.append(records)
    return _Appended(added, changed, unchanged)
