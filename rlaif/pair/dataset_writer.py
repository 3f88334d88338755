"""Merge judge labels and human labels into RUN/dataset, with the provenance of each row.

A human label overrides the judges, an adjudicator overrides the annotators, and otherwise the majority of annotators
wins. Ties, both-bad labels and disagreements without a majority are dropped. So are queued pairs that were not
reviewed: they never silently keep the judges' label. The split is by group of near-duplicate prompts.

A human label stays when the run is judged again, also if the judges dropped its pair or do not compare it any more
(route "carried"), and if the prompt has another kept pair: ``pairs.max_per_prompt`` limits the pairs that judges keep,
and labeled pairs come on top. They do not take the place of a judge's pair, because then human labels would change
which pairs can be drawn for review.

If an annotator wrote a better answer, it is the chosen one, and ``chosen_model`` is ``human:NAME``. The rejected one is
then the answer that the annotator did not prefer, not the one that was edited: most edits change a few words, and DPO
on pairs that differ in so little lowers the probability of both (Pal et al. 2024, arXiv:2402.13228). If the annotator
preferred neither, the rejected one is the answer that the judges preferred, towards which the policy would have been
trained. An edit that equals one of the two answers (ignoring whitespace at the ends) does not count: the annotator
started to edit and then chose.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow
import pyarrow.parquet

from rlaif.records import hash_to_unit_interval
from rlaif.run.atomic_write import atomic_path

TEXT = pyarrow.string()
FUNCTION = pyarrow.struct([("name", TEXT), ("arguments", TEXT)])
CALL = pyarrow.struct([("id", TEXT), ("type", TEXT), ("function", FUNCTION)])
TURN = [("role", TEXT), ("content", TEXT)]
TURN_WITH_CALLS = [*TURN, ("tool_calls", pyarrow.list_(CALL)), ("tool_call_id", TEXT), ("name", TEXT)]
PROVENANCE_COLUMNS = [
    ("pair_id", TEXT),
    ("prompt_id", TEXT),
    ("label_source", TEXT),
    ("confidence", pyarrow.float64()),
    ("rating_margin", pyarrow.float64()),
    ("chosen_model", TEXT),
    ("rejected_model", TEXT),
    ("tags", pyarrow.list_(TEXT)),
    ("decided_by", TEXT),
    ("num_annotators", pyarrow.int64()),
]
TOOLS_COLUMN = ("tools", TEXT)


@dataclass
class DatasetCounts:
    """Counts of the dataset. ``dropped``: pairs that are not in it, by :data:`rlaif.records.DatasetDropReason`."""

    train: int = 0
    test: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    human_written: int = 0
    carried: int = 0
    """Rows whose human label is not a label of the current review queue: it was given after an earlier judging, or
    imported. Included in ``sources``."""


def draw_split(group_id: str, seed: int, test_fraction: float) -> Literal["train", "test"]:
    """Return the split of a group of near-duplicate prompts.

    ``group_id``: ID of its first prompt (:class:`rlaif.generate.near_duplicates.SplitGroups`).
    """
    return "test" if hash_to_unit_interval(seed, "test", group_id) < test_fraction else "train"


def write_dataset(
    pairs_path: Path,
    labels: pl.DataFrame,
    metadata_pieces: Iterable[pl.DataFrame],
    dataset: Path,
) -> DatasetCounts:
    """Write dataset/train.parquet and test.parquet from tables/pairs.parquet.

    ``labels``: :func:`rlaif.run.human_labels.human_labels`. ``metadata_pieces``: one frame per non-empty row group of
    the table, in its order, with pair_id, model_a, model_b, tags, tools (JSON text or null) and has_tool_calls (a turn
    has tool calls); it is iterated several times. Turns have fields for tool calls only if some prompt has them. Reads
    and writes in pieces, so memory does not grow with the run.
    """
    counts = DatasetCounts()
    with_tools = any(metadata["tools"].is_not_null().any() for metadata in metadata_pieces)
    turn = TURN_WITH_CALLS if any(metadata["has_tool_calls"].any() for metadata in metadata_pieces) else TURN
    answer = pyarrow.list_(pyarrow.struct(TURN))
    sides = [("prompt", pyarrow.list_(pyarrow.struct(turn))), ("chosen", answer), ("rejected", answer)]
    schema = pyarrow.schema([*sides, *PROVENANCE_COLUMNS, *([TOOLS_COLUMN] if with_tools else [])])
    dataset.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        paths = {name: stack.enter_context(atomic_path(dataset / f"{name}.parquet")) for name in ("train", "test")}
        writers = {
            name: stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema)) for name, path in paths.items()
        }
        for labeled in _iter_labeled(pairs_path, labels, metadata_pieces):
            rows = _dataset_rows(_drop_and_count(labeled, counts), pl.DataFrame(schema.empty_table())["prompt"].dtype)
            is_test = rows["split"] == "test"
            for name, split_rows in (("train", rows.filter(~is_test)), ("test", rows.filter(is_test))):
                if split_rows.height:
                    writers[name].write_table(split_rows.select(schema.names).to_arrow().cast(schema))
            counts.test += int(is_test.sum())
            counts.train += rows.height - int(is_test.sum())
    return counts


def _iter_labeled(
    pairs_path: Path, labels: pl.DataFrame, metadata_pieces: Iterable[pl.DataFrame]
) -> Iterator[pl.DataFrame]:
    with pyarrow.parquet.ParquetFile(pairs_path) as file:
        for index, metadata in enumerate(metadata_pieces):
            piece = pl.DataFrame(pl.from_arrow(file.read_row_group(index)))
            assert metadata["pair_id"].equals(piece["pair_id"])
            metadata = metadata.drop("pair_id").with_columns(pl.col("model_a", "model_b").cast(pl.String))
            yield piece.hstack(metadata).join(labels, on="pair_id", how="left", maintain_order="left")


def _drop_and_count(pairs: pl.DataFrame, counts: DatasetCounts) -> pl.DataFrame:
    """Return the pairs of the dataset, with ``human_written``: an annotator wrote the chosen answer."""
    label, unreviewed = pl.col("label"), pl.col("label").is_null()
    edit_differs = pl.all_horizontal(
        _normalize_text("edited_response") != _normalize_text(name) for name in ("response_a", "response_b")
    )
    pairs = pairs.with_columns(
        human_written=(
            (pl.col("edited_response").str.len_bytes() > 0) & edit_differs & (label != "disagreement")
        ).fill_null(False)
    ).with_columns(
        drop_reason=pl.when(unreviewed & (pl.col("route") == "dropped"))
        .then(pl.lit("dropped"))
        .when(unreviewed & pl.col("route").is_in(["audit", "targeted"]))
        .then(pl.lit("awaiting_review"))
        .when(label.is_in(["tie", "both_bad"]) & ~pl.col("human_written"))
        .then(label)
        .when(label == "disagreement")
        .then(pl.lit("annotators_disagree"))
    )
    kept = pairs.filter(pl.col("drop_reason").is_null())
    for reason, n in pairs.drop_nulls("drop_reason").group_by("drop_reason", maintain_order=True).len().iter_rows():
        counts.dropped[reason] += n
    for label_source, n in kept.group_by(_label_source(), maintain_order=True).len().iter_rows():
        counts.sources[label_source] += n
    is_queued = pl.col("route").is_in(["audit", "targeted"])
    counts.carried += kept.filter(pl.col("label").is_not_null() & ~is_queued).height
    counts.human_written += kept.filter("human_written").height
    return kept


def _normalize_text(column: str) -> pl.Expr:
    """Return a column's text normalized for comparison: HTML text fields convert line endings to LF."""
    return pl.col(column).str.replace_all("\r\n", "\n", literal=True).str.strip_chars()


def _label_source() -> pl.Expr:
    return pl.when(pl.col("label").is_null()).then(pl.lit("judge")).otherwise(pl.lit("human")).alias("label_source")


def _dataset_rows(pairs: pl.DataFrame, turns: pl.DataType) -> pl.DataFrame:
    """Return the dataset's rows. ``turns``: data type of a conversation."""
    human_written, human_decided = pl.col("human_written"), pl.col("label").is_in(["a", "b"]).fill_null(False)
    has_human_label = pl.col("label").is_not_null()
    a_is_chosen = pl.when(human_decided).then("label").otherwise("preferred").fill_null("a") == "a"
    # An answer by an annotator who preferred neither is compared with the one that the judges preferred.
    b_is_rejected = pl.when(human_written & ~human_decided).then(~a_is_chosen).otherwise(a_is_chosen)

    def chosen_value(name: str) -> pl.Expr:
        return pl.when(a_is_chosen).then(f"{name}_a").otherwise(f"{name}_b")

    def rejected_value(name: str) -> pl.Expr:
        return pl.when(b_is_rejected).then(f"{name}_b").otherwise(f"{name}_a")

    def assistant_turn(text: pl.Expr) -> pl.Expr:
        return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=text))

    content = pl.element().struct.with_fields(pl.field("content").fill_null(""))
    return pairs.select(
        "pair_id",
        "prompt_id",
        "split",
        _label_source(),
        "tools",
        prompt=pl.col("prompt").str.json_decode(turns).list.eval(content),
        chosen=assistant_turn(pl.when(human_written).then("edited_response").otherwise(chosen_value("response"))),
        rejected=assistant_turn(rejected_value("response")),
        confidence=pl.when(has_human_label).then(1.0).otherwise(pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a"))),
        rating_margin=pl.when(~human_written).then(
            pl.col("rating_margin") * pl.when(a_is_chosen).then(1.0).otherwise(-1.0)
        ),
        chosen_model=pl.when(human_written).then(pl.format("human:{}", "editor")).otherwise(chosen_value("model")),
        rejected_model=rejected_value("model"),
        tags=pl.col("tags").fill_null([]),
        decided_by=pl.when(has_human_label).then("decided_by").otherwise(pl.lit("judges")),
        num_annotators=pl.when(has_human_label).then("num_annotators").otherwise(0),
    )
