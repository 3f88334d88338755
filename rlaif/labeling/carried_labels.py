"""Find the answers of every human label again, so that a label outlives the judging that queued its pair.

A label of two answers stays true when the run is judged again, while the candidates, their routes and the review queue
change. So a labeled pair that is no longer a candidate stays in the table of pairs, with the route "carried" and no
inclusion probability: estimates that weight a label by its probability use only the pairs of the current queue.

A label is about texts. If an answer was dropped as a copy of another, its labels belong to the pair of the answer that
was kept. A label is not used if an answer is missing or was dropped for another reason, or if the prompt is held out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import polars as pl

from rlaif.labeling.candidate_table import pair_id
from rlaif.labeling.judging_records import COMPLETION_SCHEMA, PROMPT_SCHEMA
from rlaif.pair import candidates
from rlaif.records import LabelDropReason
from rlaif.run import frames
from rlaif.run.run import Run


@dataclass
class ResolvedLabels:
    """Human labels and the answers that they are about."""

    labels: pl.DataFrame
    """The labels that can be used, one per pair. Columns: :func:`rlaif.run.human_labels.human_labels`."""
    pairs: pl.DataFrame
    """Their pairs. Columns: pair_id, prompt_id, tags, prompt_offset, a, b (keys), offset_a, offset_b, model_a,
    model_b."""
    dropped: Counter[LabelDropReason]
    """Number of the other labels per reason."""


PAIR_SCHEMA = {
    "pair_id": pl.String,
    "prompt_id": pl.String,
    "a": pl.String,
    "b": pl.String,
    "labeled_id": pl.String,
    "flipped": pl.Boolean,
}


def resolve_labels(run: Run, labels: pl.DataFrame, reviews: pl.DataFrame) -> ResolvedLabels:
    """Find the pair of each label in the journals of ``run``.

    ``labels``: :func:`rlaif.run.human_labels.human_labels`. ``reviews``: the reviews journal. Memory holds what is
    needed of the answers to labeled prompts.
    """
    labeled = labels.join(
        reviews.select("pair_id", "prompt_id").unique("pair_id", keep="last", maintain_order=True),
        on="pair_id",
        maintain_order="left",
    ).select("pair_id", "prompt_id")
    is_labeled = pl.col("prompt_id").is_in(labeled["prompt_id"].unique().implode())
    prompts = frames.read_journal_frame(
        run.journal_path("prompts"), PROMPT_SCHEMA, lambda block: block.filter(is_labeled)
    ).rename({"offset": "prompt_offset"})
    answers = frames.read_journal_frame(
        run.journal_path("completions"),
        COMPLETION_SCHEMA,
        lambda block: candidates.summarize_texts(block.filter(is_labeled)),
    )
    pairs, dropped = _find_pairs(labeled, prompts, answers)
    # The pair's own label counts before that of a pair with the same texts.
    pairs = pairs.sort(pl.col("labeled_id") != pl.col("pair_id"), "labeled_id").unique(
        "pair_id", keep="first", maintain_order=True
    )
    dropped["same_answers"] = labels.height - dropped.total() - pairs.height
    return ResolvedLabels(_move_labels(labels, pairs), _add_metadata(pairs, prompts, answers), +dropped)


def _find_pairs(
    labeled: pl.DataFrame, prompts: pl.DataFrame, answers: pl.DataFrame
) -> tuple[pl.DataFrame, Counter[LabelDropReason]]:
    """Return the pair of current answers of each label (``PAIR_SCHEMA``), and the number of labels without one."""
    usable, _ = candidates.drop_unusable(answers)
    kept = usable.select("prompt_id", "text_hash", kept_key="key")
    keys = answers.select("prompt_id", "key", "text_hash").join(kept, on=["prompt_id", "text_hash"], how="left")
    kept_key = dict(keys.select("key", "kept_key").iter_rows())
    keys_by_prompt = dict(keys.group_by("prompt_id").agg("key").iter_rows())
    split_by_prompt = dict(prompts.select("prompt_id", "split").iter_rows())
    rows: list[tuple[str, str, str, str, str, bool]] = []
    dropped = Counter[LabelDropReason]()
    for (prompt_id,), group in labeled.group_by("prompt_id", maintain_order=True):
        if split_by_prompt.get(prompt_id) == "heldout":
            dropped["heldout_prompt"] += group.height
            continue
        keys_by_id = {pair_id(a, b): sorted((a, b)) for a, b in combinations(keys_by_prompt.get(prompt_id, ()), 2)}
        for labeled_id in group["pair_id"]:
            if prompt_id not in split_by_prompt or labeled_id not in keys_by_id:
                dropped["missing_answer"] += 1
                continue
            a, b = (kept_key[key] for key in keys_by_id[labeled_id])
            if a is None or b is None:
                dropped["dropped_answer"] += 1
            elif a == b:
                dropped["same_answers"] += 1
            else:
                first, second = sorted((a, b))
                rows.append((pair_id(a, b), str(prompt_id), first, second, labeled_id, first != a))
    return pl.DataFrame(rows, schema=PAIR_SCHEMA, orient="row"), dropped


def _move_labels(labels: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the ``labels`` of ``pairs``, each with the id and the sides of its pair of current answers."""
    moved = labels.rename({"pair_id": "labeled_id"}).join(
        pairs.select("labeled_id", "pair_id", "flipped"), on="labeled_id", maintain_order="left"
    )
    swapped = pl.col("label").replace({"a": "b", "b": "a"})
    label = pl.when("flipped").then(swapped).otherwise("label")
    return moved.with_columns(label=label).select(labels.columns)


def _add_metadata(pairs: pl.DataFrame, prompts: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    pairs = pairs.drop("labeled_id", "flipped").join(
        prompts.select("prompt_id", "tags", "prompt_offset"), on="prompt_id", maintain_order="left"
    )
    for side in ("a", "b"):
        columns = answers.select(pl.col("key").alias(side), pl.col("offset", "model").name.suffix(f"_{side}"))
        pairs = pairs.join(columns, on=side, maintain_order="left")
    return pairs
