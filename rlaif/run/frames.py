"""Journals as polars frames, and derived tables written so that a reader never sees half of one.

A frame of a journal has the columns asked for plus ``offset`` (byte offset of the line), by which long texts are
fetched when they are needed instead of being held. Failures are left out; of several answers to one key the newest
is kept.
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
    """The answers in the journal at ``path``. ``reduce`` sees each block first, so that long columns can be made
    short before the next block is read. Columns: ``schema`` (as reduced) and ``offset`` (Int64).

    Raises :class:`RunError` naming a damaged line."""
    return keep_latest(
        pl.concat([frame for frame, _ in iter_journal_frames(path, schema, reduce)] or [empty_frame(schema, reduce)])
    )


def iter_journal_frames(
    path: Path, schema: Mapping[str, Any], reduce: Callable[[pl.DataFrame], pl.DataFrame], start: int = 0
) -> Iterator[tuple[pl.DataFrame, int]]:
    """The answers in the journal from byte ``start`` on, block by block as :func:`read_journal_frame` reads them, each
    with the offset at which its block ends. Of several answers to one key all are there."""
    columns = {**schema, "error": pl.String}
    required = [name for name in ("key", *REQUIRED_FIELDS.get(path.stem, ())) if name in schema]
    for block_start, block in iter_blocks(path, start):
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + 1
        offsets = np.concatenate(([0], ends[:-1])) + block_start
        try:
            frame = pl.read_ndjson(io.BytesIO(block), schema=columns)
            frame = frame.with_columns(offset=pl.Series(offsets, dtype=pl.Int64))
        except pl.exceptions.PolarsError as error:
            for _ in iter_records(path):  # names the line, where it is one that cannot be read at all
                pass
            raise RunError(f"a record does not have the fields of its kind: {error}", location=str(path)) from None
        answers = frame.filter(pl.col("error").is_null()).drop("error")
        if any(answers[name].null_count() for name in required):
            raise_damaged_at(path, answers.filter(pl.any_horizontal(pl.col(required).is_null()))["offset"][0])
        yield reduce(answers), block_start + len(block)


def empty_frame(schema: Mapping[str, Any], reduce: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    """What :func:`read_journal_frame` gives of a journal without answers."""
    return reduce(pl.DataFrame(schema={**schema, "offset": pl.Int64}))


def keep_latest(answers: pl.DataFrame) -> pl.DataFrame:
    """``answers`` without those whose key has a newer one."""
    if answers["key"].hash().n_unique() == answers.height:  # by far the most journals: nothing is copied for them
        return answers
    return answers.unique("key", keep="last", maintain_order=True)


def categorical(schema: Mapping[str, Any], *categorical_columns: str) -> dict[str, Any]:
    """``schema`` with the columns ``words``, whose values come again and again, held once each: 4 bytes a row."""
    return {name: pl.Categorical if name in categorical_columns else dtype for name, dtype in schema.items()}


def key_as_uint128(*columns: str) -> pl.Expr:
    """Keys as numbers: their first 128 bits, 16 bytes where 64 digits as text take 80. Numbers stand in the order of
    their keys, and of a billion keys two are alike with probability 1e-21."""
    return pl.col(*columns).str.head(32).str.to_integer(base=16, dtype=pl.UInt128)


def write_parquet_atomically(frames: Iterator[pl.DataFrame], path: Path) -> None:
    """Write frames of one schema as the row groups of ``path``, to a temporary name first. There is at least one."""
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
