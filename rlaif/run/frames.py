"""Read journals as polars frames, and write derived tables atomically.

The frame of a journal has the columns of a schema, and ``offset``: the byte offset of the line, by which long texts are
read when they are needed instead of being held in memory. Failures are dropped. Of several answers with the same key,
the newest is kept.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rlaif.errors import RunError, write_error
from rlaif.run.atomic_write import atomic_path
from rlaif.run.journal import REQUIRED_FIELDS, iter_blocks, iter_records, raise_damaged_at

PROMPTS: Mapping[str, Any] = {
    "key": pl.String,
    "prompt_id": pl.String,
    "reference": pl.String,
    "tags": pl.List(pl.String),
    "split": pl.String,
    "source": pl.String,
}
COMPLETIONS: Mapping[str, Any] = {
    "key": pl.String,
    "prompt_id": pl.String,
    "index": pl.Int64,
    "model": pl.String,
    "text": pl.String,
    "reasoning": pl.String,
    "finish_reason": pl.String,
    "prompt_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
    "cost_usd": pl.Float64,
    "source": pl.String,
    "created_at": pl.Float64,
}
VERDICTS: Mapping[str, Any] = {
    "key": pl.String,
    "kind": pl.String,
    "judge": pl.String,
    "judge_hash": pl.String,
    "model": pl.String,
    "settings_hash": pl.String,
    "prompt_id": pl.String,
    "a": pl.String,
    "b": pl.String,
    "order": pl.String,
    "aspect": pl.String,
    "sample": pl.Int64,
    "prob_a": pl.Float64,
    "score": pl.Float64,
    "variance": pl.Float64,
    "label": pl.String,
    "verdict_mass": pl.Float64,
    "flags": pl.List(pl.String),
    "prompt_tokens": pl.Int64,
    "cached_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
    "cost_usd": pl.Float64,
    "created_at": pl.Float64,
}
REVIEWS: Mapping[str, Any] = {
    "key": pl.String,
    "pair_id": pl.String,
    "prompt_id": pl.String,
    "annotator": pl.String,
    "role": pl.String,
    "choice": pl.String,
    "left_side": pl.String,
    "preferred": pl.String,
    "comment": pl.String,
    "edited_response": pl.String,
    "confidence": pl.Int64,
    "seconds": pl.Float64,
    "route": pl.String,
    "inclusion_probability": pl.Float64,
    "created_at": pl.Float64,
}


def read_journal_frame(
    path: Path,
    schema: Mapping[str, Any],
    reduce: Callable[[pl.DataFrame], pl.DataFrame] = lambda frame: frame,
) -> pl.DataFrame:
    """Return the answers in the journal at ``path``, with the columns of ``schema`` and ``offset`` (Int64).

    ``reduce`` is applied to each block before the next one is read, so that long columns need not be held in memory.
    Raises :class:`RunError` naming a damaged line.
    """
    return keep_latest(
        pl.concat([frame for frame, _ in iter_journal_frames(path, schema, reduce)] or [empty_frame(schema, reduce)])
    )


def iter_journal_frames(
    path: Path, schema: Mapping[str, Any], reduce: Callable[[pl.DataFrame], pl.DataFrame], start: int = 0
) -> Iterator[tuple[pl.DataFrame, int]]:
    """Yield the answers in the journal from byte ``start`` on, block by block, each with its block's end offset.

    Each frame has the columns of :func:`read_journal_frame`. Of several answers with the same key, all are included.
    """
    columns = {**schema, "error": pl.String}
    required = [name for name in ("key", *REQUIRED_FIELDS.get(path.stem, ())) if name in schema]
    for block_start, block in iter_blocks(path, start):
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + 1
        offsets = np.concatenate(([0], ends[:-1])) + block_start
        try:
            frame = pl.read_ndjson(io.BytesIO(block), schema=columns)
            frame = frame.with_columns(offset=pl.Series(offsets, dtype=pl.Int64))
        except pl.exceptions.PolarsError as error:
            for _ in iter_records(path):  # raises the error that names the line, if the line cannot be read at all
                pass
            raise RunError(f"a record does not have the fields of its kind: {error}", location=str(path)) from None
        answers = frame.filter(pl.col("error").is_null()).drop("error")
        if any(answers[name].null_count() for name in required):
            raise_damaged_at(path, answers.filter(pl.any_horizontal(pl.col(required).is_null()))["offset"][0])
        yield reduce(answers), block_start + len(block)


def empty_frame(schema: Mapping[str, Any], reduce: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    """Return what :func:`read_journal_frame` returns for a journal without answers."""
    return reduce(pl.DataFrame(schema={**schema, "offset": pl.Int64}))


def keep_latest(answers: pl.DataFrame) -> pl.DataFrame:
    """Return the newest of the ``answers`` with each key."""
    if answers["key"].hash().n_unique() == answers.height:  # nearly always: then nothing is copied
        return answers
    return answers.unique("key", keep="last", maintain_order=True)


def categorical(schema: Mapping[str, Any], *categorical_columns: str) -> dict[str, Any]:
    """Return ``schema`` with ``categorical_columns``, whose values repeat, as categoricals of 4 bytes per row."""
    return {name: pl.Categorical if name in categorical_columns else dtype for name, dtype in schema.items()}


def key_as_uint128(*columns: str) -> pl.Expr:
    """Convert hexadecimal keys to numbers: their first 128 bits, which take 16 bytes instead of 80 as text.

    Numbers sort like their keys. Among a billion keys, two are equal with probability 1e-21.
    """
    return pl.col(*columns).str.head(32).str.to_integer(base=16, dtype=pl.UInt128)


def write_parquet_atomically(frames: Iterator[pl.DataFrame], path: Path) -> None:
    """Write ``frames``, at least one and all of one schema, as the row groups of ``path``, and replace it at the end.

    Raises :class:`RunError` if it cannot be written.
    """
    import pyarrow.parquet

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        first = next(frames).to_arrow()
        with atomic_path(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, first.schema) as writer:
            writer.write_table(first)
            for frame in frames:
                writer.write_table(frame.to_arrow())
    except OSError as error:
        raise write_error(path, error) from None
