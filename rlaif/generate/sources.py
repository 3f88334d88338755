"""Read the rows of a prompt source.

A source is the name of a packaged set, a .jsonl, .parquet or .csv file, ``hf:NAME[@CONFIG][:SPLIT]``, or a URL in
object storage (s3://, gs://, az://). A URL names such a file, or a folder whose files are read in order of their names.

Every row comes with its location (file and line), so that errors can name it. Columns that rlaif does not use are
ignored. If a row has ``messages`` instead of ``prompt``, they are the prompt, without the assistant turns at the end.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, TypeVar

import orjson
from pydantic import ValidationError

from rlaif import resources
from rlaif.errors import InputError, UsageError, did_you_mean
from rlaif.records import (
    LONE_SURROGATE,
    Message,
    PromptRow,
    canonical_json,
    format_validation_error,
    replace_surrogates_deep,
)
from rlaif.run import object_storage

Row = TypeVar("Row", bound=PromptRow)
MAX_ERRORS_SHOWN = 10
SUFFIXES = (".jsonl", ".parquet", ".csv")
JSON_ERRORS = (ValueError, RecursionError)
JSON_COLUMNS = ("checks", "checklist", "tools", "tags", "prompt", "messages", "responses", "models")


def validate_source(
    source: str,
    row_type: type[Row],
    on_bad_row: Literal["stop", "skip"],
    log: Callable[[str], None],
    on_row: Callable[[str, Row], None] = lambda *_: None,
) -> int:
    """Read all of ``source`` once, before any request is sent or anything is written, and return the number of valid
    rows. Calls ``on_row`` with the location of each valid row and the row.

    Raises :class:`InputError` naming the invalid rows by file and line; with ``skip`` it logs them instead. A source
    without a valid row is an error in either case.
    """
    valid, invalid, reported = 0, 0, list[InputError]()
    for location, row in iter_rows(source, row_type):
        if not isinstance(row, InputError):
            valid += 1
            on_row(location, row)
            continue
        invalid += 1
        if len(reported) < MAX_ERRORS_SHOWN:
            reported.append(row)
    if invalid and on_bad_row == "stop":
        lines = [reported[0].message, *(f"{error.location}: {error.message}" for error in reported[1:])]
        if invalid > MAX_ERRORS_SHOWN:
            lines.append(f"and {invalid - MAX_ERRORS_SHOWN} more")
        raise InputError(
            "\n  ".join(lines),
            location=reported[0].location,
            hint="Fix the rows, or skip them with --on-bad-row skip. Nothing was sent or written.",
        )
    for error in reported:
        log(f"skipped: {error}")
    if invalid:
        log(f"{source}: invalid rows: {invalid} (skipped), valid rows: {valid}")
    if not valid:
        raise InputError("has no valid rows" if invalid else "has no rows", location=source)
    return valid


def valid_rows(source: str, row_type: type[Row]) -> Iterator[tuple[str, Row]]:
    """Yield the location and content of each valid row. :func:`validate_source` has reported the invalid ones."""
    for location, row in iter_rows(source, row_type):
        if not isinstance(row, InputError):
            yield location, row


def iter_rows(source: str, row_type: type[Row]) -> Iterator[tuple[str, Row | InputError]]:
    """Yield the location of each row with the row, or with the error that makes it invalid."""
    columns = set(row_type.model_fields)
    for location, value in _iter_source(source):
        if isinstance(value, InputError):
            yield location, value
            continue
        try:
            yield location, _parse_row(value, row_type, columns)
        except ValidationError as error:
            yield location, InputError(format_validation_error(error, row_type), location=location)
        except InputError as error:
            yield location, InputError(error.message, location=location)
        except (TypeError, RecursionError) as error:  # an integer or a nesting that rlaif's own JSON cannot hold
            yield location, InputError(f"cannot be stored: {error}", location=location)


def _parse_row(value: Mapping[str, Any], row_type: type[Row], columns: set[str]) -> Row:
    fields = dict(value)
    if "prompt" not in fields and isinstance(fields.get("messages"), list):
        turns = list(fields["messages"])
        while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            turns.pop()
        fields["prompt"] = turns
    missing = [name for name, field in row_type.model_fields.items() if field.is_required() and name not in fields]
    if missing:
        raise InputError(
            f"missing {', '.join(map(repr, missing))}; the row has {', '.join(sorted(fields)) or 'no columns'}"
        )
    used = {
        name: replace_surrogates_deep(item) for name, item in fields.items() if name in columns and item is not None
    }
    canonical_json({name: item for name, item in used.items() if isinstance(item, list)})
    if isinstance(used.get("prompt"), list):
        used["prompt"] = [_without_nulls(message) for message in used["prompt"]]
    return row_type.model_validate(used)


def _without_nulls(message: Any) -> Any:
    """Remove null fields: columnar files have every field of any message in all messages."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}


def _iter_source(source: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    if source.startswith("hf:"):
        yield from _iter_hub(source)
        return
    if object_storage.is_remote(source):
        for url in object_storage.list_files(source, SUFFIXES):
            with object_storage.open_remote(url) as file:
                yield from _iter_file(url, file)
        return
    sets = resources.prompt_sets()
    path = sets.get(source) or Path(source)
    if not path.is_file():
        if path.suffix in SUFFIXES or "/" in source:
            raise InputError("file not found", location=source)
        raise UsageError(
            f"unknown prompt set {source!r}. {did_you_mean(source, sets)}",
            hint="Give a packaged set, a .jsonl, .parquet or .csv file, hf:NAME, or a URL (s3://, gs://, az://).",
        )
    try:
        with path.open("rb") as file:
            yield from _iter_file(str(path), file)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", location=source) from None


def _iter_file(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    try:
        match PurePath(name).suffix:
            case ".jsonl":
                yield from _iter_jsonl(name, file)
            case ".csv":
                yield from _iter_csv(name, file)
            case ".parquet":
                yield from _iter_parquet(name, file)
            case suffix:
                raise UsageError(
                    f"unsupported file extension {suffix!r}", location=name, hint=f"Use one of {', '.join(SUFFIXES)}."
                )
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 text (byte {error.start})", location=name, hint="Save the file as UTF-8."
        ) from None


def _iter_jsonl(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    for line_number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
        if not text.strip():
            continue
        location = f"{name}:{line_number}"
        try:
            value = _parse_json(text)
        except UnicodeDecodeError as error:
            yield location, InputError(f"not UTF-8 text (byte {error.start} of the line)", location=location)
            continue
        except JSON_ERRORS as error:
            yield location, InputError(f"not JSON: {error}", location=location)
            continue
        if isinstance(value, dict):
            yield location, value
        else:
            yield location, InputError(f"expected a JSON object, got {type(value).__name__}", location=location)


def _parse_json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # JSON allows escaped lone surrogates: orjson rejects them, the standard library reads them. But the standard
        # library also reads NaN and Infinity, which are not JSON.
        return json.loads(text.decode("utf-8"), parse_constant=_reject_constant)


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _iter_csv(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    csv.field_size_limit(1 << 30)
    # Bytes that are not UTF-8 become lone surrogates, so that only their row is invalid.
    with TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] = []
        while True:
            location = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield location, InputError(f"not CSV: {error}", location=location)
                return  # after an unclosed quote, row boundaries are unknown
            if cells is None:
                return
            if not header:
                header = cells
            elif cells:  # a blank line has no cells
                yield location, _row_from_csv(header, cells, location)


def _row_from_csv(header: list[str], cells: list[str], location: str) -> dict[str, Any] | InputError:
    """Return the fields of a CSV row. Empty cells are omitted. Lists are JSON; tags may be separated by semicolons."""
    if len(cells) > len(header):
        return InputError(f"{len(cells)} cells, but the header has {len(header)} columns", location=location)
    fields: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    if any(LONE_SURROGATE.search(cell) for cell in fields.values()):
        return InputError("not UTF-8 text", location=location)
    for name in JSON_COLUMNS:
        cell = fields.get(name)
        if cell is None or (name in ("prompt", "tags") and not cell.lstrip().startswith("[")):
            continue
        try:
            value = _parse_json(cell.encode())
        except JSON_ERRORS as error:
            if name == "prompt":  # plain text may begin with a bracket
                continue
            return InputError(f"column {name!r} is not JSON: {error}", location=location)
        if name != "prompt" or all(isinstance(turn, dict) for turn in value):
            fields[name] = value
    if isinstance(fields.get("tags"), str):
        fields["tags"] = [tag.strip() for tag in fields["tags"].split(";") if tag.strip()]
    return fields


def _iter_parquet(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    import pyarrow
    import pyarrow.parquet

    row_number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet_file:
            for batch in parquet_file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    row_number += 1
                    yield f"{name}:{row_number}", _row_from_columns(value, f"{name}:{row_number}")
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"not a parquet file: {error}", location=name) from None


def _iter_hub(source: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    import datasets

    name, _, split = source.removeprefix("hf:").partition(":")
    name, _, subset = name.partition("@")
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split or "train")
    except Exception as error:  # missing, offline, gated, no such split: the client raises many unrelated classes
        reason = str(error).strip().splitlines()
        raise InputError(
            f"cannot be loaded from the Hugging Face Hub: {reason[0] if reason else type(error).__name__}",
            location=source,
            hint="Give hf:NAME[@CONFIG][:SPLIT]. If the dataset is gated, run `hf auth login` first.",
        ) from None
    for row_number, value in enumerate(dataset, 1):
        yield f"{source}:{row_number}", _row_from_columns(value, f"{source}:{row_number}")


def _row_from_columns(value: Mapping[str, Any], location: str) -> dict[str, Any] | InputError:
    """Return the fields of a row of a columnar file. Nested columns may be stored as JSON text."""
    fields = {name: cell for name, cell in value.items() if cell is not None}
    for name in ("checks", "checklist", "tools"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = _parse_json(fields[name].encode())
            except JSON_ERRORS as error:
                return InputError(f"column {name!r} is not JSON: {error}", location=location)
    return fields


def user_text(messages: Iterable[Message]) -> str:
    """Return the text of all user turns, which an evaluation file would have in common with the prompt."""
    return "\n".join(message.content or "" for message in messages if message.role == "user")


def prompt_texts(sources: Iterable[str]) -> Iterator[str]:
    """Yield the user text of each valid prompt in ``sources``."""
    for source in sources:
        for _, row in valid_rows(source, PromptRow):
            yield user_text(row.messages())
