"""Rows out of prompt files: a packaged set's name, .jsonl, .parquet, .csv, ``hf:NAME[@CONFIG][:SPLIT]``, or a URL of
object storage (s3://, gs://, az://): a file, or a folder whose files of these kinds are read by name.

Every row comes with where it stands (file and line), so that a bad one can be named. Columns that rlaif does not use
are passed over; ``messages`` is read as the prompt where there is no ``prompt``, without the answer it may end in.
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
    """Read all of ``source`` once before anything is asked or written. Returns the number of good rows; ``on_row`` gets
    each of them, with where it stands.

    Raises :class:`InputError` naming the bad rows by file and line, or, with ``skip``, says which they are. A source
    without any good row is an error either way.
    """
    good, bad, reported = 0, 0, list[InputError]()
    for location, row in iter_rows(source, row_type):
        if not isinstance(row, InputError):
            good += 1
            on_row(location, row)
            continue
        bad += 1
        if len(reported) < MAX_ERRORS_SHOWN:
            reported.append(row)
    if bad and on_bad_row == "stop":
        more = [f"also {error.location}: {error.message}" for error in reported[1:]]
        more += [f"and {bad - MAX_ERRORS_SHOWN} more bad rows"] if bad > MAX_ERRORS_SHOWN else []
        raise InputError(
            "\n  ".join([reported[0].message, *more]),
            location=reported[0].location,
            hint="Nothing was asked or written. Mend the rows, or leave them out with --on-bad-row skip.",
        )
    for error in reported:
        log(f"skipped: {error}")
    if bad:
        log(f"{bad} bad rows skipped, {good} read from {source}")
    if not good:
        raise InputError("there is no prompt in it", location=source)
    return good


def valid_rows(source: str, row_type: type[Row]) -> Iterator[tuple[str, Row]]:
    """The good rows of ``source``, each with where it stands. :func:`validate_source` has reported the others."""
    for location, row in iter_rows(source, row_type):
        if not isinstance(row, InputError):
            yield location, row


def iter_rows(source: str, row_type: type[Row]) -> Iterator[tuple[str, Row | InputError]]:
    """Every row of ``source`` with where it stands, or what is wrong with it."""
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
        except (TypeError, RecursionError) as error:  # a number or a nesting that JSON written by rlaif cannot hold
            yield location, InputError(f"cannot be kept: {error}", location=location)


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
            f"there is no {' and no '.join(map(repr, missing))}; found: {', '.join(sorted(fields)) or '-'}"
        )
    used = {
        name: replace_surrogates_deep(item) for name, item in fields.items() if name in columns and item is not None
    }
    canonical_json({name: item for name, item in used.items() if isinstance(item, list)})
    if isinstance(used.get("prompt"), list):
        used["prompt"] = [_without_nulls(message) for message in used["prompt"]]
    return row_type.model_validate(used)


def _without_nulls(message: Any) -> Any:
    """Columnar files fill every field that some other message has with null."""
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message


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
            raise InputError("there is no such file", location=source)
        raise UsageError(
            f"{source!r} is no packaged prompt set. {did_you_mean(source, sets)}",
            hint="Give a set's name, a .jsonl, .parquet or .csv file, hf:NAME, or a URL (s3://, gs://, az://).",
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
                raise UsageError(f"{suffix or 'no'} ending: cannot tell what is in it", location=name,
                                 hint=f"Prompts are read from {', '.join(SUFFIXES)} files.")  # fmt: skip
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", location=name, hint="Save it as UTF-8.") from None


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
            yield location, InputError(f"expected an object, found {type(value).__name__}", location=location)


def _parse_json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Lone surrogates are legal in JSON's escapes; orjson refuses them, the standard library reads them. Its NaN
        # and Infinity are not JSON.
        return json.loads(text.decode("utf-8"), parse_constant=_reject_constant)


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _iter_csv(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    csv.field_size_limit(1 << 30)
    # Bytes that are not UTF-8 come as lone surrogates, so that their row can be named and the others read.
    with TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] = []
        while True:
            location = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield location, InputError(f"not CSV: {error}", location=location)
                return  # where a quote is not closed, no later row can be told from its text
            if cells is None:
                return
            if not header:
                header = cells
            elif cells:  # a blank line has none
                yield location, _row_from_csv(header, cells, location)


def _row_from_csv(header: list[str], cells: list[str], location: str) -> dict[str, Any] | InputError:
    """A CSV row: empty cells are absent, lists are JSON (tags may also be separated by semicolons)."""
    if len(cells) > len(header):
        return InputError("more cells than the header has columns", location=location)
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
            if name == "prompt":  # a prompt may begin with a bracket and be plain text
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
    except Exception as error:  # the hub's client raises a dozen unrelated kinds: absent, offline, gated, no split
        reason = str(error).strip().splitlines()
        raise InputError(
            f"cannot be loaded from the hub: {reason[0] if reason else type(error).__name__}",
            location=source,
            hint="Write it as hf:NAME[@CONFIG][:SPLIT]; for a gated one, `hf auth login` first.",
        ) from None
    for row_number, value in enumerate(dataset, 1):
        yield f"{source}:{row_number}", _row_from_columns(value, f"{source}:{row_number}")


def _row_from_columns(value: Mapping[str, Any], location: str) -> dict[str, Any] | InputError:
    """A row of a columnar file, where nested columns may have been stored as JSON text."""
    fields = {name: cell for name, cell in value.items() if cell is not None}
    for name in ("checks", "checklist", "tools"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = _parse_json(fields[name].encode())
            except JSON_ERRORS as error:
                return InputError(f"column {name!r} is not JSON: {error}", location=location)
    return fields


def user_text(messages: Iterable[Message]) -> str:
    """All user turns of a prompt: what an evaluation file would ask."""
    return "\n".join(message.content or "" for message in messages if message.role == "user")


def prompt_texts(sources: Iterable[str]) -> Iterator[str]:
    """What each prompt in ``sources`` asks."""
    for source in sources:
        for _, row in valid_rows(source, PromptRow):
            yield user_text(row.messages())
