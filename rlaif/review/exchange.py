"""The review queue as a file, blind, and the labels back from it.

A file holds ``pair_id, prompt, left, right, choice, comment`` and nothing else: no model, no verdict, no route, and
which response stands on the left is fixed by seed, pair and annotator. CSV is RFC 4180 in UTF-8, its cells written as
:mod:`rlaif.review.cells` says, so that a spreadsheet neither runs nor changes a model's answer; JSON Lines holds the
texts as they are. An annotator fills in ``choice`` (left, right, tie, both_bad, skip; case and spaces do not matter)
and, at will, ``comment``. An empty choice is a pair not labelled yet.
Argilla's records and Label Studio's tasks: :mod:`rlaif.review.tools`.

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
from rlaif.review.cells import to_cell
from rlaif.review.queue import Item, annotator_name, item, label, newest, queue, read_pairs
from rlaif.review.sheets import COLUMNS, FORMATS, Row, read_file, read_sheet
from rlaif.review.sheets import Sheet as TextSheet
from rlaif.review.tools import COMPANIONS, TOOLS, ToolSheet, read_tool_sheet, written

if TYPE_CHECKING:
    from rlaif.run.directory import Run

HOW_TO_LABEL: Mapping[Format, str] = {
    **dict.fromkeys(("csv", "jsonl"), "Fill in choice (left, right, tie, both_bad, skip)"),
    "argilla": "Log it with the settings beside it (docs/review.md), label, and write it with dataset.records.to_json",
    "label-studio": "Import it into a project with the labelling config beside it, label, and export as JSON",
}
CHOICES: Mapping[str, Choice] = {choice: choice for choice in get_args(Choice)}
Format = Literal["csv", "jsonl", "argilla", "label-studio"]
ENDINGS: Mapping[str, str] = {**FORMATS, **dict.fromkeys(TOOLS, ".json")}
Sheet = TextSheet | ToolSheet
SPREADSHEET_CELL = 32_767
"""Characters that fit into a cell of the most used spreadsheet; it cuts what is longer without a word."""


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What an import did with a file's rows. ``added`` were new pairs for this annotator, ``changed`` replaced an
    older label, ``unchanged`` said what the journal says, ``unlabelled`` had no choice, ``bad`` were left out."""

    added: int
    changed: int
    unchanged: int
    unlabelled: int
    bad: list[InputError]
    ignored_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Label:
    line: int
    item: Item
    choice: Choice | None
    comment: str


@dataclass(frozen=True, slots=True)
class _Fault:
    """A bad row: the kind of fault, by which rows are counted together, and the error that names it."""

    kind: str
    error: InputError

    @property
    def line(self) -> int:
        return int(re.findall(r"\d+$", str(self.error.where))[0])


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
    if format not in ENDINGS:
        raise UsageError(f"no review file format is called {format!r}", mend=did_you_mean(format, ENDINGS))
    if path.suffix.lower() != ENDINGS[format]:
        raise UsageError(
            f"the file's name does not end in {ENDINGS[format]}",
            where=str(path),
            mend=f"The import knows a file by its extension: name it {path.with_suffix(ENDINGS[format]).name}.",
        )
    _refuse_to_lose_labels(path)
    annotator = annotator_name(annotator)
    waiting = queue(read_pairs(run), run.reviews(), annotator=annotator, seed=seed)
    items = (item(row, annotator=annotator, seed=seed) for row in waiting.iter_rows(named=True))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "argilla" or format == "label-studio":
            records, companion = written(format, items)
            temporary.write_bytes(records)
            path.with_suffix(COMPANIONS[format]).write_bytes(companion)
        else:
            encoding = "utf-8-sig" if bom and format == "csv" else "utf-8"
            with temporary.open("w", encoding=encoding, newline="") as file:
                (_write_csv if format == "csv" else _write_jsonl)(file, items)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    return waiting.height


def _write_csv(file: TextIO, items: Iterable[Item]) -> None:
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for shown in items:
        writer.writerow([*map(to_cell, (shown.pair_id, shown.prompt, shown.left, shown.right)), "", ""])


def _write_jsonl(file: TextIO, items: Iterable[Item]) -> None:
    for shown in items:
        texts = (shown.pair_id, shown.prompt, shown.left, shown.right, "", "")
        file.write(orjson.dumps(dict(zip(COLUMNS, texts, strict=True))).decode() + "\n")


def _refuse_to_lose_labels(path: Path) -> None:
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    mend = "Import it first and move it away, or export to another file."
    labelled = 0
    try:
        for row in _open(path).rows(()):
            if isinstance(row, InputError):
                raise row
            labelled += bool(row.cells["choice"].strip() or row.cells["comment"].strip())
    except InputError as error:
        what = f"already exists and cannot be read as a review file ({error.what})"
        raise UsageError(what, where=str(path), mend=mend) from None
    if labelled:
        raise UsageError(f"already exists and holds choices or comments in {labelled} rows", where=str(path), mend=mend)


def _open(path: Path) -> Sheet:
    return read_tool_sheet(path, read_file(path)) if path.suffix.lower() == ".json" else read_sheet(path)


def import_reviews(
    run: Run, path: Path, *, annotator: str, seed: int, on_bad_row: Literal["stop", "skip"] = "stop",
    format: Format | None = None,  # noqa: A002
) -> ImportResult:  # fmt: skip
    """Add the labels in ``path`` to the run's reviews journal. Raises :class:`InputError` as the contract says.

    What a file is, its extension and its content say; ``format`` only checks it.
    """
    annotator = annotator_name(annotator)
    sheet = _open(path)
    if (format and path.suffix.lower() != ENDINGS[format]) or (
        isinstance(sheet, ToolSheet) and format not in (None, sheet.tool)
    ):
        raise InputError(f"not a file of the format {format}", where=str(path), mend="Leave --format away.")
    pairs = read_pairs(run, ids=sheet.candidates())
    shown = {row["pair_id"]: item(row, annotator=annotator, seed=seed) for row in pairs.iter_rows(named=True)}
    labels: list[_Label] = []
    faults: list[_Fault] = []
    for row in sheet.rows(shown.keys()):
        if isinstance(row, InputError):
            faults.append(_Fault("unreadable", row))
            continue
        outcome = _read(sheet, row, shown.get(row.cells["pair_id"]), annotator)
        if isinstance(outcome, _Label):
            labels.append(outcome)
        else:
            faults.append(outcome)
            sheet.reject(row.line)
    labels, repeats = _one_a_pair(sheet, labels)
    faults = sorted(faults + repeats, key=lambda fault: fault.line)
    if faults and on_bad_row == "stop":
        raise _summary(faults, sheet.unit)
    counts = _journal(run, labels, annotator)
    return ImportResult(
        added=counts["added"],
        changed=counts["changed"],
        unchanged=counts["unchanged"],
        unlabelled=sum(label.choice is None for label in labels),
        bad=[fault.error for fault in faults],
        ignored_columns=sheet.ignored,
    )


def _read(sheet: Sheet, row: Row, shown: Item | None, annotator: str) -> _Label | _Fault:
    """What a row says, or what is wrong with it."""
    where = sheet.where(row.line)
    if shown is None:
        return _fault(
            "pair",
            f"unknown pair_id {row.cells['pair_id']!r}",
            where,
            "The file belongs to another run, or the pairs were made anew since: export the queue again.",
        )
    texts = {"prompt": shown.prompt, "left": shown.left, "right": shown.right}
    changed = [name for name, text in texts.items() if not sheet.same(row.cells[name], text)]
    if changed == ["left", "right"] and _swapped(sheet, row, shown):
        return _fault(
            "sides",
            f"left and right are the other way round from what annotator {annotator!r} was shown",
            where,
            "The file was exported for another --annotator or under another seed: give that one.",
        )
    if changed:
        mend = "Labels count for the texts as they were exported: put the cell back, or export the queue again."
        if any(len(to_cell(texts[name])) > SPREADSHEET_CELL for name in changed):
            mend = f"A spreadsheet cell holds {SPREADSHEET_CELL} characters: label this pair on the page, or as .jsonl."
        return _fault(
            "edited", f"{' and '.join(changed)} of pair {shown.pair_id} changed since the export", where, mend
        )
    word = "_".join(row.cells["choice"].casefold().replace("-", " ").replace("_", " ").split())
    if word and word not in CHOICES:
        mend = did_you_mean(word, CHOICES)
        return _fault("choice", f"choice {row.cells['choice'].strip()!r} is not one", where, mend)
    return _Label(row.line, shown, CHOICES[word] if word else None, row.cells["comment"])


def _swapped(sheet: Sheet, row: Row, shown: Item) -> bool:
    return sheet.same(row.cells["left"], shown.right) and sheet.same(row.cells["right"], shown.left)


def _fault(kind: str, what: str, where: str, mend: str) -> _Fault:
    return _Fault(kind, InputError(what, where=where, mend=mend))


def _one_a_pair(sheet: Sheet, labels: Iterable[_Label]) -> tuple[list[_Label], list[_Fault]]:
    """One row for each pair. Where the rows of a pair contradict each other, none of them stands."""
    rows_of: dict[str, list[_Label]] = {}
    for found in labels:
        rows_of.setdefault(found.item.pair_id, []).append(found)
    good, faults = [], []
    for pair_id, rows in rows_of.items():
        labelled = [row for row in rows if row.choice is not None]
        agree = len({row.choice for row in labelled}) <= 1
        stands = (labelled or rows)[0] if agree else None
        if stands is not None:
            good.append(stands)
        for row in rows:
            if row is not stands:
                other = next(other.line for other in rows if other is not row)
                what = f"repeated pair_id {pair_id!r}: it stands in {sheet.unit} {other} too"
                mend = "Leave one row a pair." if agree else "The two choices differ: leave the row that is meant."
                faults.append(_fault("repeated", what, sheet.where(row.line), mend))
    return good, faults


def _summary(faults: list[_Fault], unit: str) -> InputError:
    """One error for all: the first, the lines that share its fault, and the number of the rest."""
    first = faults[0]
    alike = [fault.line for fault in faults if fault.kind == first.kind]
    what = first.error.what
    if len(alike) > 1:
        lines = ", ".join(map(str, alike[:10])) + (", ..." if len(alike) > 10 else "")
        what += f" ({len(alike)} rows with this fault: {unit}s {lines})"
    if len(faults) > len(alike):
        what += f"; {len(faults) - len(alike)} more bad rows after other faults"
    mend = f"{first.error.mend} Nothing was imported; --on-bad-row skip leaves the bad rows out."
    return InputError(what, where=first.error.where, mend=mend)


def _journal(run: Run, labels: Iterable[_Label], annotator: str) -> dict[str, int]:
    """Write what is new into the reviews journal."""
    counts = {"added": 0, "changed": 0, "unchanged": 0}
    chosen = [(found, found.choice) for found in labels if found.choice is not None]
    if not chosen:
        return counts
    with run.writing("reviews"):
        # Read under the lock: another import may have just ended.
        mine = newest(run.reviews()).filter(annotator=annotator, role="annotator")
        before = {row["pair_id"]: row for row in mine.iter_rows(named=True)}
        records = []
        for found, choice in chosen:
            old = before.get(found.item.pair_id)
            # What a file cannot say stays as it was said on the page, for as long as the choice does.
            kept = {name: old[name] for name in ("edited", "sure")} if old and old["choice"] == choice else {}
            record = label(found.item, annotator=annotator, choice=choice, comment=found.comment, before=old, **kept)
            if record is None:
                counts["unchanged"] += 1
            else:
                counts["changed" if old else "added"] += 1
                records.append(record)
        if records:
            with run.journal("reviews") as journal:
                journal.append(records)
    return counts
