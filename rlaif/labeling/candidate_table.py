"""The candidate pairs of a run, gathered one partition at a time before routing decides over all of them.

Memory holds only the columns needed for routing, and only for pairs that are kept or labeled. All other pairs are
dropped within their partition and counted. Columns that are only written are on disk, partitioned by pair id, because
tables/pairs.parquet is sorted by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from rlaif.labeling.judging import JudgingRounds
from rlaif.labeling.judging_records import PromptPartition
from rlaif.pair import aggregation, human_calibration, refusal_guard, routing
from rlaif.records import content_key
from rlaif.run.partitions import PartitionedFrames

DECISION_COLUMNS = (
    "pair_id",
    "prompt_id",
    "a",
    "b",
    "prob_a",
    "preferred",
    "outcome",
    "decided_by",
    "flags",
    "kept",
    "drop_reason",
    "prompt_class",
    "answer_label_a",
    "answer_label_b",
    "chars_a",
    "chars_b",
    "score_a",
    "score_b",
    "suspicion",
)
"""Columns needed for routing."""
OUTPUT_COLUMNS = (
    "pair_id",
    "prompt_id",
    "prob_a",
    "preferred",
    "preferred_by_judges",
    "outcome",
    "route",
    "route_reason",
    "drop_reason",
    "inclusion_probability",
    "reviewed",
)
"""Decisions, as tables/pairs.parquet has them."""
METADATA_COLUMNS = ("pair_id", "prompt_offset", "offset_a", "offset_b", "model_a", "model_b", "tags", "rating_margin")
"""Further columns of tables/pairs.parquet, which do not depend on decisions."""


class CandidateTable:
    """The candidates to route, and counts over all candidates."""

    pairs: pl.DataFrame
    """Candidates that are kept or labeled. Columns: ``DECISION_COLUMNS``."""
    votes: pl.DataFrame
    """Votes of each judge on ``pairs``."""
    tags: pl.DataFrame
    """Tags of the prompts of ``pairs`` that have any. Columns: prompt_id, tags."""
    policies: list[str]
    """Models that wrote the answers."""
    outcomes: Counter[str]
    dropped_outcomes: Counter[str]
    """Outcomes of the candidates that are not in ``pairs``."""
    judged_count: int
    contradicted_count: int
    """Candidates whose two orders gave opposite verdicts."""
    prompts_without_pair: int
    """Prompts that have answers and no candidate."""
    judged_prompt_count: int
    prompts_lost_to_ties: int
    """Prompts that have no pair because of near ties alone."""
    has_prompt_class: bool
    """True if any prompt has a class (benign, borderline, harmful)."""
    answer_count: int
    unknown_answer_count: int
    """Answers of the candidates, and those of which it is unknown whether they refuse."""

    def __init__(self, folder: Path, partition_count: int) -> None:
        self.partition_count = partition_count
        self.outcomes, self.dropped_outcomes = Counter(), Counter()
        self.judged_count = self.contradicted_count = self.prompts_without_pair = 0
        self.answer_count = self.unknown_answer_count = 0
        self.judged_prompt_count = self.prompts_lost_to_ties = 0
        self.has_prompt_class = False
        self._decisions, self._metadata = PartitionedFrames(folder), PartitionedFrames(folder)

    def add_metadata(self, pairs: pl.DataFrame) -> None:
        """Store the columns of ``pairs`` that do not depend on decisions (``METADATA_COLUMNS``)."""
        self._add_by_id(self._metadata, pairs.select(METADATA_COLUMNS))

    def add_decisions(self, pairs: pl.DataFrame) -> None:
        """Store the decisions on ``pairs`` (``OUTPUT_COLUMNS``)."""
        if "preferred_by_judges" not in pairs.columns:  # pairs that calibration does not see
            pairs = pairs.with_columns(preferred_by_judges="preferred")
        self._add_by_id(self._decisions, routing.describe_drops(pairs).select(OUTPUT_COLUMNS))

    def add_carried(self, pairs: pl.DataFrame) -> None:
        """Store labeled ``pairs`` that are not candidates, with the route "carried".

        ``pairs``: :attr:`rlaif.labeling.carried_labels.ResolvedLabels.pairs`.
        """
        reason = "no candidate now; annotators labeled it after an earlier judging"
        pairs = pairs.with_columns(route=pl.lit("carried"), route_reason=pl.lit(reason), reviewed=pl.lit(value=True))
        for store in (self._metadata, self._decisions):
            columns = (
                pl.col(name).cast(dtype) if name in pairs.columns else pl.lit(None, dtype).alias(name)
                for name, dtype in store.read(0).schema.items()
            )
            self._add_by_id(store, pairs.select(columns))

    def _add_by_id(self, store: PartitionedFrames, pairs: pl.DataFrame) -> None:
        partition = pl.col("pair_id").str.head(4).str.to_integer(base=16) * self.partition_count // 16**4
        store.add_partitioned(partition, pairs)

    def iter_sorted(self, chunk_rows: int) -> Iterator[pl.DataFrame]:
        """Yield all pairs sorted by id, ``chunk_rows`` at a time; at least one frame.

        Columns: ``OUTPUT_COLUMNS``, ``METADATA_COLUMNS``.
        """
        pending: pl.DataFrame | None = None
        for partition in range(self.partition_count):
            partition_rows = (
                self._decisions.read(partition).join(self._metadata.read(partition), on="pair_id").sort("pair_id")
            )
            pending = partition_rows if pending is None else pl.concat([pending, partition_rows])
            full = pending.height // chunk_rows * chunk_rows
            for start in range(0, full, chunk_rows):
                yield pending.slice(start, chunk_rows)
            pending = pending.slice(full)
        if pending is not None and (pending.height or not self.outcomes):
            yield pending


def build_candidate_table(rounds: JudgingRounds, candidates: PartitionedFrames, labels: pl.DataFrame) -> CandidateTable:
    """Gather ``candidates``, as the rounds decided them. ``labels``: one human label per pair_id."""
    table = CandidateTable(rounds.run.path, rounds.records.partition_count)
    pairs, all_votes, tags, policies = [], [], [], []
    kept_or_labeled = pl.col("kept") | pl.col("pair_id").is_in(labels["pair_id"].implode())
    for partition in rounds.records:
        rows = _add_pair_ids(candidates.read(partition.index), partition)
        votes, answer_labels = rounds.judge_votes(partition.index, rows)
        rows = refusal_guard.add_prompt_class(rows, partition.prompts.select("prompt_id", "tags"), answer_labels)
        rows = routing.add_suspicion(rows, votes, partition.answers)
        table.add_metadata(rows)
        dropped = rows.filter(~kept_or_labeled)
        table.add_decisions(routing.mark_dropped(dropped).with_columns(reviewed=False))
        judged = rows.filter(pl.col("prob_a").is_not_null())
        table.judged_count += judged.height
        table.contradicted_count += judged.filter((pl.col("p_ab") - 0.5) * (pl.col("p_ba") - 0.5) < 0).height
        table.prompts_without_pair += partition.answers["prompt_id"].n_unique() - rows["prompt_id"].n_unique()
        table.judged_prompt_count += aggregation.count_judged_prompts(rows)
        table.prompts_lost_to_ties += aggregation.prompts_lost_to_ties(rows).height
        table.outcomes.update(rows["outcome"].to_list())
        table.dropped_outcomes.update(dropped["outcome"].to_list())
        answers, unknown = refusal_guard.count_unknown_answers(rows)
        table.answer_count, table.unknown_answer_count = (
            table.answer_count + answers,
            table.unknown_answer_count + unknown,
        )
        table.has_prompt_class |= not rows["prompt_class"].is_null().all()
        rows = rows.filter(kept_or_labeled).select(DECISION_COLUMNS)
        pairs.append(rows)
        all_votes.append(_votes_for(votes, rows) if labels.height >= human_calibration.MIN_LABELS else votes.clear())
        tags.append(partition.prompts.filter(pl.col("tags").list.len() > 0).join(rows, on="prompt_id", how="semi"))
        policies.append(partition.answers["model"].unique())
    table.pairs = pl.concat(pairs)
    table.votes = pl.concat(all_votes)
    table.tags = pl.concat(tags).select("prompt_id", "tags")
    table.policies = pl.concat(policies).unique().sort().to_list()
    return table


def _votes_for(votes: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the ``votes`` on ``pairs``, plus one row of every other judge: a judge without a vote on any of them still
    belongs to the panel."""
    matched = votes.with_columns(is_first=pl.int_range(pl.len()).over("panel_judge") == 0).join(
        pairs.select("a", "b", is_match=True), on=["a", "b"], how="left", maintain_order="left"
    )
    return matched.filter(pl.col("is_first") | pl.col("is_match").is_not_null()).select(votes.columns)


def pair_id(a: str, b: str) -> str:
    """Return the id of the pair of completions ``a`` and ``b`` (in any order): 16 hex digits."""
    return content_key(pair=sorted((a, b)))[:16]


def _add_pair_ids(candidates: pl.DataFrame, partition: PromptPartition) -> pl.DataFrame:
    """Add pair_id and the rest of ``METADATA_COLUMNS``. The id needs the full keys, which are stored as two numbers."""
    for side in ("a", "b"):
        answers = partition.answers.select(
            pl.col("key").alias(side), pl.col("key_low", "offset", "model").name.suffix(f"_{side}")
        )
        candidates = candidates.join(answers, on=side, how="left", maintain_order="left")
    keys = candidates.select("a", "key_low_a", "b", "key_low_b").iter_rows()
    ids = [pair_id(f"{a:032x}{key_low_a:032x}", f"{b:032x}{key_low_b:032x}") for a, key_low_a, b, key_low_b in keys]
    return candidates.join(partition.prompts, on="prompt_id", how="left", maintain_order="left").with_columns(
        pl.Series("pair_id", ids, dtype=pl.String), rating_margin=pl.col("score_a") - pl.col("score_b")
    )
