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

from rlaif import packaged
from rlaif.errors import InputError, UsageError, did_you_mean
from rlaif.records import LONE_SURROGATE, Message, PromptRow, canonical, clean_json, explain
from rlaif.run import objects

Row = TypeVar("Row", bound=PromptRow)
SHOWN = 10
ENDINGS = (".jsonl", ".parquet", ".csv")
NOT_JSON = (ValueError, RecursionError)
JSON_COLUMNS = ("checks", "checklist", "tools", "tags", "prompt", "messages", "responses", "models")


def check(
    source: str,
    kind: type[Row],
    on_bad_row: Literal["stop", "skip"],
    say: Callable[[str], None],
    note: Callable[[str, Row], None] = lambda *_: None,
) -> int:
    """Read all of ``source`` once before anything is asked or written. Returns the number of good rows; ``note`` gets
    each of them, with where it stands.

    Raises :class:`InputError` naming the bad rows by file and line, or, with ``skip``, says which they are. A source
    without any good row is an error either way.
    """
    good, bad, shown = 0, 0, list[InputError]()
    for where, row in each(source, kind):
        if not isinstance(row, InputError):
            good += 1
            note(where, row)
            continue
        bad += 1
        if len(shown) < SHOWN:
            shown.append(row)
    if bad and on_bad_row == "stop":
        more = [f"also {error.where}: {error.what}" for error in shown[1:]]
        more += [f"and {bad - SHOWN} more bad rows"] if bad > SHOWN else []
        raise InputError(
            "\n  ".join([shown[0].what, *more]),
            where=shown[0].where,
            mend="Nothing was asked or written. Mend the rows, or leave them out with --on-bad-row skip.",
        )
    for error in shown:
        say(f"skipped: {error}")
    if bad:
        say(f"{bad} bad rows skipped, {good} read from {source}")
    if not good:
        raise InputError("there is no prompt in it", where=source)
    return good


def rows(source: str, kind: type[Row]) -> Iterator[tuple[str, Row]]:
    """The good rows of ``source``, each with where it stands. :func:`check` has reported the others."""
    for where, row in each(source, kind):
        if not isinstance(row, InputError):
            yield where, row


def each(source: str, kind: type[Row]) -> Iterator[tuple[str, Row | InputError]]:
    """Every row of ``source`` with where it stands, or what is wrong with it."""
    columns = set(kind.model_fields)
    for where, value in _raw(source):
        if isinstance(value, InputError):
            yield where, value
            continue
        try:
            yield where, _row(value, kind, columns)
        except ValidationError as error:
            yield where, InputError(explain(error, kind), where=where)
        except InputError as error:
            yield where, InputError(error.what, where=where)
        except (TypeError, RecursionError) as error:  # a number or a nesting that JSON written by rlaif cannot hold
            yield where, InputError(f"cannot be kept: {error}", where=where)


def _row(value: Mapping[str, Any], kind: type[Row], columns: set[str]) -> Row:
    given = dict(value)
    if "prompt" not in given and isinstance(given.get("messages"), list):
        turns = list(given["messages"])
        while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            turns.pop()
        given["prompt"] = turns
    missing = [name for name, field in kind.model_fields.items() if field.is_required() and name not in given]
    if missing:
        raise InputError(f"there is no {' and no '.join(map(repr, missing))}; found: {', '.join(sorted(given)) or '-'}")
    used = {name: clean_json(item) for name, item in given.items() if name in columns and item is not None}
    canonical({name: item for name, item in used.items() if isinstance(item, list)})
    if isinstance(used.get("prompt"), list):
        used["prompt"] = [_without_nulls(message) for message in used["prompt"]]
    return kind.model_validate(used)


def _without_nulls(message: Any) -> Any:
    """Columnar files fill every field that some other message has with null."""
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message


def _raw(source: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    if source.startswith("hf:"):
        yield from _hub(source)
        return
    if objects.is_remote(source):
        for url in objects.files(source, ENDINGS):
            with objects.opened(url) as file:
                yield from _rows_of(url, file)
        return
    sets = packaged.prompt_sets()
    path = sets.get(source) or Path(source)
    if not path.is_file():
        if path.suffix in ENDINGS or "/" in source:
            raise InputError("there is no such file", where=source)
        raise UsageError(
            f"{source!r} is no packaged prompt set. {did_you_mean(source, sets)}",
            mend="Give a set's name, a .jsonl, .parquet or .csv file, hf:NAME, or a URL (s3://, gs://, az://).",
        )
    try:
        with path.open("rb") as file:
            yield from _rows_of(str(path), file)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=source) from None


def _rows_of(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    try:
        match PurePath(name).suffix:
            case ".jsonl":
                yield from _jsonl(name, file)
            case ".csv":
                yield from _csv(name, file)
            case ".parquet":
                yield from _parquet(name, file)
            case other:
                raise UsageError(f"{other or 'no'} ending: cannot tell what is in it", where=name,
                                 mend=f"Prompts are read from {', '.join(ENDINGS)} files.")  # fmt: skip
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", where=name, mend="Save it as UTF-8.") from None


def _jsonl(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    for number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = _json(text)
        except UnicodeDecodeError as error:
            yield where, InputError(f"not UTF-8 text (byte {error.start} of the line)", where=where)
            continue
        except NOT_JSON as error:
            yield where, InputError(f"not JSON: {error}", where=where)
            continue
        if isinstance(value, dict):
            yield where, value
        else:
            yield where, InputError(f"expected an object, found {type(value).__name__}", where=where)


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Lone surrogates are legal in JSON's escapes; orjson refuses them, the standard library reads them. Its NaN
        # and Infinity are not JSON.
        return json.loads(text.decode("utf-8"), parse_constant=_not_json)


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _csv(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    csv.field_size_limit(1 << 30)
    # Bytes that are not UTF-8 come as lone surrogates, so that their row can be named and the others read.
    with TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.reader(text, strict=True)
        header: list[str] = []
        while True:
            where = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield where, InputError(f"not CSV: {error}", where=where)
                return  # where a quote is not closed, no later row can be told from its text
            if cells is None:
                return
            if not header:
                header = cells
            elif cells:  # a blank line has none
                yield where, _from_text(header, cells, where)


def _from_text(header: list[str], cells: list[str], where: str) -> dict[str, Any] | InputError:
    """A CSV row: empty cells are absent, lists are JSON (tags may also be separated by semicolons)."""
    if len(cells) > len(header):
        return InputError("more cells than the header has columns", where=where)
    found: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    if any(LONE_SURROGATE.search(cell) for cell in found.values()):
        return InputError("not UTF-8 text", where=where)
    for name in JSON_COLUMNS:
        cell = found.get(name)
        if cell is None or (name in ("prompt", "tags") and not cell.lstrip().startswith("[")):
            continue
        try:
            value = _json(cell.encode())
        except NOT_JSON as error:
            if name == "prompt":  # a prompt may begin with a bracket and be plain text
                continue
            return InputError(f"column {name!r} is not JSON: {error}", where=where)
        if name != "prompt" or all(isinstance(turn, dict) for turn in value):
            found[name] = value
    if isinstance(found.get("tags"), str):
        found["tags"] = [tag.strip() for tag in found["tags"].split(";") if tag.strip()]
    return found


def _parquet(name: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as rows_:
            for batch in rows_.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", _from_columns(value, f"{name}:{number}")
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"not a parquet file: {error}", where=name) from None


def _hub(source: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    import datasets

    name, _, split = source.removeprefix("hf:").partition(":")
    name, _, subset = name.partition("@")
    try:
        loaded = datasets.load_dataset(name, subset or None, split=split or "train")
    except Exception as error:  # the hub's client raises a dozen unrelated kinds: absent, offline, gated, no split
        reason = str(error).strip().splitlines()
        raise InputError(
            f"cannot be loaded from the hub: {reason[0] if reason else type(error).__name__}",
            where=source,
            mend="Write it as hf:NAME[@CONFIG][:SPLIT]; for a gated one, `hf auth login` first.",
        ) from None
    for number, value in enumerate(loaded, 1):
        yield f"{source}:{number}", _from_columns(value, f"{source}:{number}")


def _from_columns(value: Mapping[str, Any], where: str) -> dict[str, Any] | InputError:
    """A row of a columnar file, where nested columns may have been stored as JSON text."""
    found = {name: cell for name, cell in value.items() if cell is not None}
    for name in ("checks", "checklist", "tools"):
        if isinstance(found.get(name), str):
            try:
                found[name] = _json(found[name].encode())
            except NOT_JSON as error:
                return InputError(f"column {name!r} is not JSON: {error}", where=where)
    return found


def asked(messages: Iterable[Message]) -> str:
    """All user turns of a prompt: what an evaluation file would ask."""
    return "\n".join(message.content or "" for message in messages if message.role == "user")


def texts(sources: Iterable[str]) -> Iterator[str]:
    """What each prompt in ``sources`` asks."""
    for source in sources:
        for _, row in rows(source, PromptRow):
            yield asked(row.messages())
