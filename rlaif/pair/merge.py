"""The merge: judge labels and people's labels into RUN/dataset, with the provenance of each row.

A person's label goes over the judges', an adjudicator's over everybody's, and among several people the majority
decides. Ties, both-bad and disagreements without a majority are left out, and so is a queued pair that nobody has
reviewed: it never silently keeps the judge's label. The split is by prompt.

Where a person wrote a better answer it is the chosen one, and ``chosen_model`` says ``human:NAME``. The rejected one is
then the answer that the person did not prefer, not the one they started from: an edit is mostly a few changed words,
and DPO on pairs that differ in so little lowers the probability of both (Pal et al. 2024, arXiv:2402.13228). Where the
person preferred neither, it is the one that the judges preferred: what the policy would have been trained towards.
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
    ("decided", TEXT),
    ("labels", pyarrow.int64()),
]
TOOLS = ("tools", TEXT)


@dataclass
class Merged:
    """What went into the dataset and what did not."""

    train: int = 0
    test: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    edited: int = 0


def human_labels(reviews: pl.DataFrame) -> pl.DataFrame:
    """One row a reviewed pair. Columns: pair_id, label (a | b | tie | both_bad | disagreement), annotators (how many
    people's labels there are), decided (adjudicated | single | majority), edited and editor (the better answer that
    one of those whom the label agrees with wrote, and who).

    The newest label of an annotator counts; a skip is no label, and a label of a gold pair is none here.
    """
    reviews = _with_every_column(reviews)
    latest = (
        reviews.filter(pl.col("route").ne_missing("gold"))
        .sort("at", maintain_order=True)
        .unique(["pair_id", "annotator", "role"], keep="last", maintain_order=True)
        .filter(pl.col("choice") != "skip")
        .with_columns(label=pl.coalesce("preferred", "choice"), judge=pl.col("role") == "adjudicator")
        # The newest adjudication outranks all others of its pair.
        .with_columns(judged=pl.col("judge").any().over("pair_id"))
    )
    votes = (
        latest.filter(pl.col("judge") == pl.col("judged"))
        .filter(~pl.col("judge") | (pl.int_range(pl.len()) == pl.int_range(pl.len()).max()).over("pair_id"))
        .with_columns(votes=pl.len().over("pair_id"), alike=pl.len().over("pair_id", "label"))
        .with_columns(wins=pl.col("alike") * 2 > pl.col("votes"))
    )
    wins, edits = pl.col("wins"), pl.col("wins") & pl.col("edited").is_not_null()
    people = latest.group_by("pair_id").agg(annotators=pl.col("annotator").n_unique())
    decided = votes.group_by("pair_id").agg(
        label=pl.col("label").filter(wins).first(),
        decided=pl.when(pl.col("judge").any()).then(pl.lit("adjudicated"))
        .when(pl.len() > 1).then(pl.lit("majority")).otherwise(pl.lit("single")),
        edited=pl.col("edited").filter(edits).last(),
        editor=pl.col("annotator").filter(edits).last(),
    )  # fmt: skip
    return (
        decided.join(people, on="pair_id")
        .with_columns(label=pl.col("label").fill_null("disagreement"))
        .select("pair_id", "label", "annotators", "decided", "edited", "editor")
    )


def _with_every_column(reviews: pl.DataFrame) -> pl.DataFrame:
    """Labels from before a field was there have its default."""
    missing = [name for name in ("edited", "role", "route") if name not in reviews.columns]
    return reviews.with_columns(pl.lit(None, pl.String).alias(name) for name in missing).with_columns(
        pl.col("role").fill_null("annotator")
    )


def merge(
    pairs_path: Path, labels: pl.DataFrame, models: pl.DataFrame, prompts: pl.DataFrame, dataset: Path, *,
    seed: int, test_share: float,
) -> Merged:  # fmt: skip
    """Write dataset/train.parquet and test.parquet from tables/pairs.parquet.

    ``labels``: :func:`human_labels`; each row says who ``decided`` (judges | single | majority | adjudicated) and how
    many people's ``labels`` stand behind it. ``models``: key, model. ``prompts``: prompt_id, tags, tools (JSON text or
    null), calls (whether a turn carries tool calls). Turns have the fields for tool calls only where some prompt has
    them. Read and written in pieces, so that memory does not grow with the run.
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
        written = bool(row.get("edited")) and label != "disagreement"
        if label is None and route == "dropped":
            merged.left_out["dropped by the judges"] += 1
        elif label is None and route in ("audit", "targeted"):
            merged.left_out["waits for review"] += 1
        elif label in ("tie", "both_bad") and not written:
            merged.left_out[f"people say {label.replace('_', ' ')}"] += 1
        elif label == "disagreement":
            merged.left_out["people disagree"] += 1
        else:
            merged.sources["human" if label else "judge"] += 1
            merged.edited += written
            yield row


def _row(row: dict[str, Any]) -> dict[str, Any]:
    label, edited = row["label"], row.get("edited")
    winner = label if label in ("a", "b") else row["preferred"] or "a"
    loser = "b" if winner == "a" else "a"
    if edited and label not in ("a", "b"):
        loser = winner
    p_a, margin = row["p_a"], row["margin"]
    return {
        "prompt": [{**message, "content": message.get("content") or ""} for message in orjson.loads(row["prompt"])],
        "chosen": [{"role": "assistant", "content": edited or row[f"response_{winner}"]}],
        "rejected": [{"role": "assistant", "content": row[f"response_{loser}"]}],
        "pair_id": row["pair_id"],
        "prompt_id": row["prompt_id"],
        "source": "human" if label else "judge",
        "confidence": 1.0 if label else max(p_a, 1.0 - p_a),
        "margin": None if edited or margin is None else margin if winner == "a" else -margin,
        "chosen_model": f"human:{row['editor']}" if edited else row[f"model_{winner}"],
        "rejected_model": row[f"model_{loser}"],
        "tags": row["tags"] or [],
        "decided": row["decided"] if label else "judges",
        "labels": row["annotators"] if label else 0,
        "tools": row["tools"],
    }
