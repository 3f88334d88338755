"""The review queue as a file, blind, and the labels back from it.

A file holds ``pair_id, prompt, left, right, choice, comment`` and nothing else: no model, no verdict, no route, and
which response stands on the left is fixed by seed, pair and annotator. CSV is RFC 4180 in UTF-8, its cells written as
:mod:`rlaif.review.csv_escape` says, so that a spreadsheet neither runs nor changes a model's answer; JSON Lines holds
the texts as they are. An annotator fills in ``choice`` (left, right, tie, both_bad, skip; case and spaces do not
matter) and, at will, ``comment``. An empty choice is a pair not labelled yet.
Argilla's records and Label Studio's tasks: :mod:`rlaif.review.labeling_tools`.

Contract of the import: with ``on_bad_row="stop"`` every row is checked before anything is written, and one error
names the first bad row, how many share its fault, and how many more there are. With ``"skip"`` the bad rows come back
in the result and all others count. A row is bad when its pair is unknown or came before, its choice is no choice, or
its prompt or answers are not what this annotator was shown under this seed. Importing a file again adds nothing; a
label that differs from the annotator's newest for that pair is added and becomes the newest.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO, get_args

import orjson

from rlaif.errors import InputError, UsageError, did_you_mean
from rlaif.records import Choice
from rlaif.review.csv_escape import escape_cell
from rlaif.review.file_readers import COLUMNS, FORMATS, ReviewRow, TextReviewReader, open_review_file, read_file
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

if TYPE_CHECKING:
    from rlaif.run.run import Run

HOW_TO_LABEL: Mapping[Format, str] = {
    **dict.fromkeys(("csv", "jsonl"), "Fill in choice (left, right, tie, both_bad, skip)"),
    "argilla": "Log it with the settings beside it (docs/review.md), label, and write it with dataset.records.to_json",
    "label-studio": "Import it into a project with the labelling config beside it, label, and export as JSON",
}
CHOICES: Mapping[str, Choice] = {choice: choice for choice in get_args(Choice)}
Format = Literal["csv", "jsonl", "argilla", "label-studio"]
EXTENSIONS: Mapping[str, str] = {**FORMATS, **dict.fromkeys(TOOLS, ".json")}
ReviewReader = TextReviewReader | ToolExportReader
MAX_SPREADSHEET_CELL_CHARS = 32_767
"""Characters that fit into a cell of the most used spreadsheet; it cuts what is longer without a word."""


@dataclass(frozen=True, slots=True)
class ReviewImport:
    """What an import did with a file's rows. ``added`` were new pairs for this annotator, ``changed`` replaced an
    older label, ``unchanged`` said what the journal says, ``unlabeled`` had no choice, ``bad_rows`` were left out."""

    added: int
    changed: int
    unchanged: int
    unlabeled: int
    bad_rows: list[InputError]
    ignored_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _ParsedLabel:
    line: int
    item: ReviewItem
    choice: Choice | None
    comment: str


@dataclass(frozen=True, slots=True)
class _RowError:
    """A bad row: the kind of fault, by which rows are counted together, and the error that names it."""

    kind: str
    error: InputError

    @property
    def line(self) -> int:
        return int(re.findall(r"\d+$", str(self.error.location))[0])


def export_queue(
    run: Run,
    path: Path,
    *,
    format: Format,  # noqa: A002
    annotator: str,
    seed: int,
    bom: bool = False,
) -> int:
    """Write what waits for ``annotator`` to ``path`` and return how many pairs that is.

    ``bom`` puts a byte order mark before a CSV: by it some spreadsheets know UTF-8 when the file is double-clicked.
    Off by default, as it becomes part of the first column's name for a program that reads plain UTF-8.
    Raises :class:`UsageError` rather than overwrite labels.
    """
    if format not in EXTENSIONS:
        raise UsageError(f"no review file format is called {format!r}", hint=did_you_mean(format, EXTENSIONS))
    if path.suffix.lower() != EXTENSIONS[format]:
        raise UsageError(
            f"the file's name does not end in {EXTENSIONS[format]}",
            location=str(path),
            hint=f"The import knows a file by its extension: name it {path.with_suffix(EXTENSIONS[format]).name}.",
        )
    _protect_existing_labels(path)
    annotator = normalize_annotator_name(annotator)
    pending = pending_pairs(read_pairs(run), run.reviews(), annotator=annotator, seed=seed)
    items = (make_item(row, annotator=annotator, seed=seed) for row in pending.iter_rows(named=True))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "argilla" or format == "label-studio":
            records, companion = export_records(format, items)
            temporary.write_bytes(records)
            path.with_suffix(COMPANIONS[format]).write_bytes(companion)
        else:
            encoding = "utf-8-sig" if bom and format == "csv" else "utf-8"
            with temporary.open("w", encoding=encoding, newline="") as file:
                (_write_csv if format == "csv" else _write_jsonl)(file, items)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", location=str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
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
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    hint = "Import it first and move it away, or export to another file."
    labeled = 0
    try:
        for row in _open_reader(path).rows(()):
            if isinstance(row, InputError):
                raise row
            labeled += bool(row.cells["choice"].strip() or row.cells["comment"].strip())
    except InputError as error:
        message = f"already exists and cannot be read as a review file ({error.message})"
        raise UsageError(message, location=str(path), hint=hint) from None
    if labeled:
        raise UsageError(
            f"already exists and holds choices or comments in {labeled} rows", location=str(path), hint=hint
        )


def _open_reader(path: Path) -> ReviewReader:
    return open_tool_export(path, read_file(path)) if path.suffix.lower() == ".json" else open_review_file(path)


def import_reviews(
    run: Run, path: Path, *, annotator: str, seed: int, on_bad_row: Literal["stop", "skip"] = "stop",
    format: Format | None = None,  # noqa: A002
) -> ReviewImport:  # fmt: skip
    """Add the labels in ``path`` to the run's reviews journal. Raises :class:`InputError` as the contract says.

    What a file is, its extension and its content say; ``format`` only checks it.
    """
    annotator = normalize_annotator_name(annotator)
    reader = _open_reader(path)
    if (format and path.suffix.lower() != EXTENSIONS[format]) or (
        isinstance(reader, ToolExportReader) and format not in (None, reader.tool)
    ):
        raise InputError(f"not a file of the format {format}", location=str(path), hint="Leave --format away.")
    pairs = read_pairs(run, ids=reader.candidate_pair_ids())
    items = {row["pair_id"]: make_item(row, annotator=annotator, seed=seed) for row in pairs.iter_rows(named=True)}
    labels: list[_ParsedLabel] = []
    row_errors: list[_RowError] = []
    for row in reader.rows(items.keys()):
        if isinstance(row, InputError):
            row_errors.append(_RowError("unreadable", row))
            continue
        outcome = _parse_row(reader, row, items.get(row.cells["pair_id"]), annotator)
        if isinstance(outcome, _ParsedLabel):
            labels.append(outcome)
        else:
            row_errors.append(outcome)
            reader.reject(row.line)
    labels, repeats = _deduplicate(reader, labels)
    row_errors = sorted(row_errors + repeats, key=lambda row_error: row_error.line)
    if row_errors and on_bad_row == "stop":
        raise _summarize_errors(row_errors, reader.unit)
    counts = _append_labels(run, labels, annotator)
    return ReviewImport(
        added=counts["added"],
        changed=counts["changed"],
        unchanged=counts["unchanged"],
        unlabeled=sum(label.choice is None for label in labels),
        bad_rows=[row_error.error for row_error in row_errors],
        ignored_columns=reader.ignored_columns,
    )


def _parse_row(
    reader: ReviewReader, row: ReviewRow, item: ReviewItem | None, annotator: str
) -> _ParsedLabel | _RowError:
    """What a row says, or what is wrong with it."""
    location = reader.location(row.line)
    if item is None:
        return _row_error(
            "pair",
            f"unknown pair_id {row.cells['pair_id']!r}",
            location,
            "The file belongs to another run, or the pairs were made anew since: export the queue again.",
        )
    texts = {"prompt": item.prompt, "left": item.left, "right": item.right}
    changed = [name for name, text in texts.items() if not reader.cell_equals(row.cells[name], text)]
    if changed == ["left", "right"] and _sides_swapped(reader, row, item):
        return _row_error(
            "sides",
            f"left and right are the other way round from what annotator {annotator!r} was shown",
            location,
            "The file was exported for another --annotator or under another seed: give that one.",
        )
    if changed:
        hint = "Labels count for the texts as they were exported: put the cell back, or export the queue again."
        if any(len(escape_cell(texts[name])) > MAX_SPREADSHEET_CELL_CHARS for name in changed):
            hint = f"A spreadsheet cell holds {MAX_SPREADSHEET_CELL_CHARS} characters: label this pair on the page, or as .jsonl."
        return _row_error(
            "edited", f"{' and '.join(changed)} of pair {item.pair_id} changed since the export", location, hint
        )
    choice = "_".join(row.cells["choice"].casefold().replace("-", " ").replace("_", " ").split())
    if choice and choice not in CHOICES:
        hint = did_you_mean(choice, CHOICES)
        return _row_error("choice", f"choice {row.cells['choice'].strip()!r} is not one", location, hint)
    return _ParsedLabel(row.line, item, CHOICES[choice] if choice else None, row.cells["comment"])


def _sides_swapped(reader: ReviewReader, row: ReviewRow, item: ReviewItem) -> bool:
    return reader.cell_equals(row.cells["left"], item.right) and reader.cell_equals(row.cells["right"], item.left)


def _row_error(kind: str, message: str, location: str, hint: str) -> _RowError:
    return _RowError(kind, InputError(message, location=location, hint=hint))


def _deduplicate(reader: ReviewReader, labels: Iterable[_ParsedLabel]) -> tuple[list[_ParsedLabel], list[_RowError]]:
    """One row for each pair. Where the rows of a pair contradict each other, none of them stands."""
    rows_of: dict[str, list[_ParsedLabel]] = {}
    for label in labels:
        rows_of.setdefault(label.item.pair_id, []).append(label)
    unique, row_errors = [], []
    for pair_id, rows in rows_of.items():
        labeled = [row for row in rows if row.choice is not None]
        agree = len({row.choice for row in labeled}) <= 1
        selected = (labeled or rows)[0] if agree else None
        if selected is not None:
            unique.append(selected)
        for row in rows:
            if row is not selected:
                other_line = next(other.line for other in rows if other is not row)
                message = f"repeated pair_id {pair_id!r}: it stands in {reader.unit} {other_line} too"
                hint = "Leave one row a pair." if agree else "The two choices differ: leave the row that is meant."
                row_errors.append(_row_error("repeated", message, reader.location(row.line), hint))
    return unique, row_errors


def _summarize_errors(row_errors: list[_RowError], unit: str) -> InputError:
    """One error for all: the first, the lines that share its fault, and the number of the rest."""
    first = row_errors[0]
    same_kind_lines = [row_error.line for row_error in row_errors if row_error.kind == first.kind]
    message = first.error.message
    if len(same_kind_lines) > 1:
        lines = ", ".join(map(str, same_kind_lines[:10])) + (", ..." if len(same_kind_lines) > 10 else "")
        message += f" ({len(same_kind_lines)} rows with this fault: {unit}s {lines})"
    if len(row_errors) > len(same_kind_lines):
        message += f"; {len(row_errors) - len(same_kind_lines)} more bad rows after other faults"
    hint = f"{first.error.hint} Nothing was imported; --on-bad-row skip leaves the bad rows out."
    return InputError(message, location=first.error.location, hint=hint)


def _append_labels(run: Run, labels: Iterable[_ParsedLabel], annotator: str) -> dict[str, int]:
    """Write what is new into the reviews journal."""
    counts = {"added": 0, "changed": 0, "unchanged": 0}
    labeled = [(label, label.choice) for label in labels if label.choice is not None]
    if not labeled:
        return counts
    with run.lock("reviews"):
        # Read under the lock: another import may have just ended.
        own_labels = latest_labels(run.reviews()).filter(annotator=annotator, role="annotator")
        previous_by_pair = {row["pair_id"]: row for row in own_labels.iter_rows(named=True)}
        records = []
        for parsed, choice in labeled:
            previous = previous_by_pair.get(parsed.item.pair_id)
            # What a file cannot say stays as it was said on the page, for as long as the choice does.
            page_only = (
                {name: previous[name] for name in ("edited_response", "confidence")}
                if previous and previous["choice"] == choice
                else {}
            )
            record = make_review(
                parsed.item, annotator=annotator, choice=choice, comment=parsed.comment, previous=previous, **page_only
            )
            if record is None:
                counts["unchanged"] += 1
            else:
                counts["changed" if previous else "added"] += 1
                records.append(record)
        if records:
            with run.journal("reviews") as journal:
                journal.append(records)
    return counts
