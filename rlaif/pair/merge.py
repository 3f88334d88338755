"""The merge: judge labels and people's labels into RUN/dataset, with the provenance of each row.

A person's label goes over the judges', an adjudicator's over everybody's, and among several people the majority
decides. Ties, both-bad and disagreements without a majority are left out, and so is a queued pair that nobody has
reviewed: it never silently keeps the judge's label. The split is by prompt.

Where a person wrote a better answer it is the chosen one, and ``chosen_model`` says ``human:NAME``. The rejected one is
then the answer that the person did not prefer, not the one they started from: an edit is mostly a few changed words,
and DPO on pairs that differ in so little lowers the probability of both (Pal et al. 2024, arXiv:2402.13228). Where the
person preferred neither, it is the one that the judges preferred: what the policy would have been trained towards.
An edit that left one of the two answers as it was (ends apart) is none: the person began to write and then chose.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow
import pyarrow.parquet

from rlaif.records import unit_interval

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


def merge(
    pairs_path: Path,
    labels: pl.DataFrame,
    about: Iterable[pl.DataFrame],
    dataset: Path,
    *,
    seed: int,
    test_share: float,
) -> Merged:
    """Write dataset/train.parquet and test.parquet from tables/pairs.parquet.

    ``labels``: :func:`rlaif.run.labels.human_labels`; each row says who ``decided`` (judges | single | majority |
    adjudicated) and how many people's ``labels`` stand behind it. ``about``: pair_id, model_a, model_b, tags, tools
    (JSON text or null), calls (whether a turn carries tool calls), a frame for each row group of the table that
    has rows, in its order; they are gone through more than once. Turns have the fields for tool calls only where some
    prompt has them. Read and written in pieces, so that memory does not grow with the run.
    """
    merged = Merged()
    with_tools = any(own["tools"].is_not_null().any() for own in about)
    turn = TURN_WITH_CALLS if any(own["calls"].any() for own in about) else TURN
    answer = pyarrow.list_(pyarrow.struct(TURN))
    sides = [("prompt", pyarrow.list_(pyarrow.struct(turn))), ("chosen", answer), ("rejected", answer)]
    schema = pyarrow.schema([*sides, *COLUMNS, *([TOOLS] if with_tools else [])])
    dataset.mkdir(parents=True, exist_ok=True)
    temporary = {name: dataset / f".{name}.parquet.{os.getpid()}" for name in ("train", "test")}
    writers = {name: pyarrow.parquet.ParquetWriter(path, schema) for name, path in temporary.items()}
    try:
        for labelled in _labelled(pairs_path, labels, about):
            rows = _rows(_counted(labelled, merged), pl.DataFrame(schema.empty_table())["prompt"].dtype)
            drawn = [unit_interval(seed, "test", prompt) < test_share for prompt in rows["prompt_id"]]
            in_test = pl.Series(drawn, dtype=pl.Boolean)
            for name, part in (("train", rows.filter(~in_test)), ("test", rows.filter(in_test))):
                if part.height:
                    writers[name].write_table(part.select(schema.names).to_arrow().cast(schema))
            merged.test += int(in_test.sum())
            merged.train += rows.height - int(in_test.sum())
        for name, writer in writers.items():
            writer.close()
            temporary[name].replace(dataset / f"{name}.parquet")
    finally:
        for name, writer in writers.items():
            writer.close()
            temporary[name].unlink(missing_ok=True)
    return merged


def _labelled(pairs_path: Path, labels: pl.DataFrame, about: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    with pyarrow.parquet.ParquetFile(pairs_path) as file:
        for number, own in enumerate(about):
            piece = pl.DataFrame(pl.from_arrow(file.read_row_group(number)))
            assert own["pair_id"].equals(piece["pair_id"])
            own = own.drop("pair_id").with_columns(pl.col("model_a", "model_b").cast(pl.String))
            yield piece.hstack(own).join(labels, on="pair_id", how="left", maintain_order="left")


def _counted(pairs: pl.DataFrame, merged: Merged) -> pl.DataFrame:
    """The ``pairs`` that go into the dataset. ``written``: whether a person wrote the chosen answer."""
    label, unseen = pl.col("label"), pl.col("label").is_null()
    anew = pl.all_horizontal(_trimmed("edited") != _trimmed(name) for name in ("response_a", "response_b"))
    pairs = pairs.with_columns(
        written=((pl.col("edited").str.len_bytes() > 0) & anew & (label != "disagreement")).fill_null(False)
    ).with_columns(
        why=pl.when(unseen & (pl.col("route") == "dropped")).then(pl.lit("dropped by the judges"))
        .when(unseen & pl.col("route").is_in(["audit", "targeted"])).then(pl.lit("waits for review"))
        .when(label.is_in(["tie", "both_bad"]) & ~pl.col("written"))
        .then(pl.format("people say {}", label.str.replace("_", " ")))
        .when(label == "disagreement").then(pl.lit("people disagree"))
    )  # fmt: skip
    used = pairs.filter(pl.col("why").is_null())
    for why, n in pairs.drop_nulls("why").group_by("why", maintain_order=True).len().iter_rows():
        merged.left_out[why] += n
    for source, n in used.group_by(_source(), maintain_order=True).len().iter_rows():
        merged.sources[source] += n
    merged.edited += used.filter("written").height
    return used


def _trimmed(column: str) -> pl.Expr:
    """A text as two are compared: a text field gives line ends as LF."""
    return pl.col(column).str.replace_all("\r\n", "\n", literal=True).str.strip_chars()


def _source() -> pl.Expr:
    return pl.when(pl.col("label").is_null()).then(pl.lit("judge")).otherwise(pl.lit("human")).alias("source")


def _rows(pairs: pl.DataFrame, turns: pl.DataType) -> pl.DataFrame:
    """The dataset's rows. ``turns``: the type of a conversation."""
    written, by_people = pl.col("written"), pl.col("label").is_in(["a", "b"]).fill_null(False)
    labelled = pl.col("label").is_not_null()
    won = pl.when(by_people).then("label").otherwise("preferred").fill_null("a") == "a"
    # An answer that a person wrote, preferring neither, goes over the one that the judges preferred.
    lost = pl.when(written & ~by_people).then(~won).otherwise(won)

    def of_winner(name: str) -> pl.Expr:
        return pl.when(won).then(f"{name}_a").otherwise(f"{name}_b")

    def of_loser(name: str) -> pl.Expr:
        return pl.when(lost).then(f"{name}_b").otherwise(f"{name}_a")

    def said(text: pl.Expr) -> pl.Expr:
        return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=text))

    content = pl.element().struct.with_fields(pl.field("content").fill_null(""))
    return pairs.select(
        "pair_id",
        "prompt_id",
        _source(),
        "tools",
        prompt=pl.col("prompt").str.json_decode(turns).list.eval(content),
        chosen=said(pl.when(written).then("edited").otherwise(of_winner("response"))),
        rejected=said(of_loser("response")),
        confidence=pl.when(labelled).then(1.0).otherwise(pl.max_horizontal("p_a", 1.0 - pl.col("p_a"))),
        margin=pl.when(~written).then(pl.col("margin") * pl.when(won).then(1.0).otherwise(-1.0)),
        chosen_model=pl.when(written).then(pl.format("human:{}", "editor")).otherwise(of_winner("model")),
        rejected_model=of_loser("model"),
        tags=pl.col("tags").fill_null([]),
        decided=pl.when(labelled).then("decided").otherwise(pl.lit("judges")),
        labels=pl.when(labelled).then("annotators").otherwise(0),
    )
