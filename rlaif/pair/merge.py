"""The merge: judge labels and people's labels into RUN/dataset, with the provenance of each row.

A person's label goes over the judges'. Ties, both-bad and disagreements between people are left out, and so is a
queued pair that nobody has reviewed: it never silently keeps the judge's label. The split is by prompt.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pyarrow
import pyarrow.parquet

from rlaif.records import unit_interval

CHUNK = 20_000
TEXT = pyarrow.string()
FUNCTION = pyarrow.struct([("name", TEXT), ("arguments", TEXT)])
CALL = pyarrow.struct([("id", TEXT), ("type", TEXT), ("function", FUNCTION)])
TURN = [("role", TEXT), ("content", TEXT)]
TURN_WITH_CALLS = [*TURN, ("tool_calls", pyarrow.list_(CALL)), ("tool_call_id", TEXT), ("name", TEXT)]
COLUMNS = [
    ("pair_id", TEXT),
    ("prompt_id", TEXT),
    ("source", TEXT),
    ("confidence", pyarrow.float64()),
    ("margin", pyarrow.float64()),
    ("chosen_model", TEXT),
    ("rejected_model", TEXT),
    ("tags", pyarrow.list_(TEXT)),
]
TOOLS = ("tools", TEXT)


@dataclass
class Merged:
    """What went into the dataset and what did not."""

    train: int = 0
    test: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def human_labels(reviews: pl.DataFrame) -> pl.DataFrame:
    """One row a reviewed pair. Columns: pair_id, label (a | b | tie | both_bad | disagreement), annotators.

    The newest label of an annotator counts; a skip is no label.
    """
    latest = (
        reviews.sort("at", maintain_order=True)
        .unique(["pair_id", "annotator"], keep="last", maintain_order=True)
        .filter(pl.col("choice") != "skip")
        .with_columns(label=pl.coalesce("preferred", "choice"))
    )
    return latest.group_by("pair_id").agg(
        label=pl.when(pl.col("label").n_unique() == 1).then(pl.col("label").first()).otherwise(pl.lit("disagreement")),
        annotators=pl.len(),
    )


def merge(
    pairs_path: Path, labels: pl.DataFrame, models: pl.DataFrame, prompts: pl.DataFrame, dataset: Path, *,
    seed: int, test_share: float,
) -> Merged:  # fmt: skip
    """Write dataset/train.parquet and test.parquet from tables/pairs.parquet.

    ``labels``: :func:`human_labels`. ``models``: key, model. ``prompts``: prompt_id, tags, tools (JSON text or null),
    calls (whether a turn carries tool calls). Turns have the fields for tool calls only where some prompt has them.
    Read and written in pieces, so that memory does not grow with the run.
    """
    merged = Merged()
    with_tools = prompts["tools"].is_not_null().any()
    turn = TURN_WITH_CALLS if prompts["calls"].any() else TURN
    answer = pyarrow.list_(pyarrow.struct(TURN))
    sides = [("prompt", pyarrow.list_(pyarrow.struct(turn))), ("chosen", answer), ("rejected", answer)]
    schema = pyarrow.schema([*sides, *COLUMNS, *([TOOLS] if with_tools else [])])
    dataset.mkdir(parents=True, exist_ok=True)
    temporary = {name: dataset / f".{name}.parquet.{os.getpid()}" for name in ("train", "test")}
    writers = {name: pyarrow.parquet.ParquetWriter(path, schema) for name, path in temporary.items()}
    try:
        for rows in _labelled(pairs_path, labels, models, prompts, merged):
            split: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
            for row in rows:
                if not with_tools:
                    del row["tools"]
                name = "test" if unit_interval(seed, "test", row["prompt_id"]) < test_share else "train"
                split[name].append(row)
            for name, part in split.items():
                if part:
                    writers[name].write_table(pyarrow.Table.from_pylist(part, schema=schema))
            merged.train += len(split["train"])
            merged.test += len(split["test"])
        for name, writer in writers.items():
            writer.close()
            temporary[name].replace(dataset / f"{name}.parquet")
    finally:
        for name, writer in writers.items():
            writer.close()
            temporary[name].unlink(missing_ok=True)
    return merged


def _labelled(
    pairs_path: Path, labels: pl.DataFrame, models: pl.DataFrame, prompts: pl.DataFrame, merged: Merged
) -> Iterator[list[dict[str, Any]]]:
    with pyarrow.parquet.ParquetFile(pairs_path) as file:
        for batch in file.iter_batches(batch_size=CHUNK):
            frame = pl.DataFrame(pl.from_arrow(batch))
            frame = (
                frame.join(labels, on="pair_id", how="left", maintain_order="left")
                .join(models.rename({"key": "completion_a", "model": "model_a"}), on="completion_a", how="left")
                .join(models.rename({"key": "completion_b", "model": "model_b"}), on="completion_b", how="left")
                .join(prompts, on="prompt_id", how="left")
                .sort("pair_id")
            )
            yield [row for row in map(_row, _counted(frame.iter_rows(named=True), merged)) if row]


def _counted(rows: Iterator[dict[str, Any]], merged: Merged) -> Iterator[dict[str, Any]]:
    for row in rows:
        label, route = row["label"], row["route"]
        if label is None and route == "dropped":
            merged.left_out["dropped by the judges"] += 1
        elif label is None and route in ("audit", "targeted"):
            merged.left_out["waits for review"] += 1
        elif label in ("tie", "both_bad"):
            merged.left_out[f"people say {label.replace('_', ' ')}"] += 1
        elif label == "disagreement":
            merged.left_out["people disagree"] += 1
        else:
            merged.sources["human" if label else "judge"] += 1
            yield row


def _row(row: dict[str, Any]) -> dict[str, Any]:
    winner = row["label"] or row["preferred"]
    loser = "b" if winner == "a" else "a"
    p_a, margin = row["p_a"], row["margin"]
    return {
        "prompt": [{**message, "content": message.get("content") or ""} for message in orjson.loads(row["prompt"])],
        "chosen": [{"role": "assistant", "content": row[f"response_{winner}"]}],
        "rejected": [{"role": "assistant", "content": row[f"response_{loser}"]}],
        "pair_id": row["pair_id"],
        "prompt_id": row["prompt_id"],
        "source": "human" if row["label"] else "judge",
        "confidence": 1.0 if row["label"] else max(p_a, 1.0 - p_a),
        "margin": margin if winner == "a" or margin is None else -margin,
        "chosen_model": row[f"model_{winner}"],
        "rejected_model": row[f"model_{loser}"],
        "tags": row["tags"] or [],
        "tools": row["tools"],
    }
