"""The prompts, usable answers and verdicts of a run, read one partition of the prompts at a time.

A partition (:mod:`rlaif.run.partitions`) holds all records of its prompts, so results do not depend on the number of
partitions, and only one partition's rows are in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from rlaif.judge import check_schema, refusal_classifier
from rlaif.pair import candidates
from rlaif.run import frames, partitions
from rlaif.run.partitions import PartitionedFrames, PartitionedJournal
from rlaif.run.run import JournalName, Run

# Columns kept of each journal. There are millions of rows, so keys are numbers and repeated words are categories.
PROMPT_SCHEMA = {name: frames.PROMPTS[name] for name in ("key", "prompt_id", "tags", "split")}
COMPLETION_SCHEMA = frames.categorical(
    {name: frames.COMPLETIONS[name] for name in ("key", "prompt_id", "model", "finish_reason", "source", "text")},
    "model", "finish_reason", "source",
)  # fmt: skip
CATEGORICAL_COLUMNS = ("kind", "judge", "judge_hash", "model", "settings_hash", "order", "aspect", "label")
VERDICT_COLUMNS = (
    "key", "prompt_id", *CATEGORICAL_COLUMNS, "a", "b", "sample", "prob_a", "score", "variance", "flags",
)  # fmt: skip
VERDICT_SCHEMA = frames.categorical({name: frames.VERDICTS[name] for name in VERDICT_COLUMNS}, *CATEGORICAL_COLUMNS)


def _reduce_prompts(block: pl.DataFrame) -> pl.DataFrame:
    """Drop held-out prompts: a model trained on them could no longer be measured by them."""
    block = block.filter(pl.col("split").ne_missing("heldout")).drop("split")
    return block.with_columns(frames.key_as_uint128("key")).rename({"offset": "prompt_offset"})


def _reduce_completions(block: pl.DataFrame) -> pl.DataFrame:
    """Replace texts by their summary and keys by two numbers. ``key_low`` is needed for the ids of pairs."""
    key_low = pl.col("key").str.tail(32).str.to_integer(base=16, dtype=pl.UInt128)
    return candidates.summarize_texts(block).with_columns(frames.key_as_uint128("key"), key_low=key_low)


def _reduce_verdicts(block: pl.DataFrame) -> pl.DataFrame:
    sample = pl.col("sample").fill_null(0).cast(pl.UInt16)
    return block.with_columns(frames.key_as_uint128("key", "a", "b"), sample).drop("offset")


@dataclass(frozen=True)
class PromptPartition:
    """One partition of the prompts (columns prompt_id, tags, prompt_offset) and their usable answers."""

    index: int
    prompts: pl.DataFrame
    answers: pl.DataFrame

    def answers_with_siblings(self) -> pl.DataFrame:
        """Return the answers whose prompt has at least two. Columns: prompt_id, a, b (null)."""
        rows = self.answers.filter(pl.len().over("prompt_id") >= 2)
        return rows.select("prompt_id", a="key", b=pl.lit(None, pl.UInt128))

    def with_offsets(self, items: pl.DataFrame) -> pl.DataFrame:
        """Return the byte offsets of ``items``, prompt by prompt. Columns: prompt_offset, a_offset, b_offset."""
        offsets = self.answers.select("key", "offset")
        return (
            items.join(self.prompts, on="prompt_id")
            .join(offsets.rename({"key": "a", "offset": "a_offset"}), on="a")
            .join(offsets.rename({"key": "b", "offset": "b_offset"}), on="b", how="left")
            .sort("prompt_id", "a", "b")
            .select("prompt_offset", "a_offset", "b_offset")
        )


class JudgingRecords:
    """The records of ``run``; iteration yields each :class:`PromptPartition`.

    ``limit``: only the first prompts. ``dropped_completions``: number of unusable answers per reason.

    The journal also holds verdicts of other panels and of settings from before ``--restart``. A verdict counts only if
    its ``settings_hash`` is that of a judge as the present settings ask it (:meth:`count_verdicts`).
    """

    def __init__(self, run: Run, limit: int | None) -> None:
        self.run = run
        self.partition_count = partitions.partition_count(run.journal_path("completions"))
        self.dropped_completions: Counter[str] = Counter()
        self._verdicts: PartitionedJournal | None = None
        self._verdicts_stale = False
        self._num_samples: dict[str, int] = {}  # by settings hash
        self._prompts = self._partition_journal("prompts", PROMPT_SCHEMA, _reduce_prompts)
        self._answers = self.new_frames()
        last_offset = self._last_offset(limit) if limit else None
        completions = self._partition_journal("completions", COMPLETION_SCHEMA, _reduce_completions)
        for index in range(self.partition_count):
            prompts = self._prompts.read(index)
            if last_offset is not None:
                prompts = prompts.filter(pl.col("prompt_offset") <= last_offset)
            rows = completions.read(index).join(prompts, on="prompt_id", how="semi", maintain_order="left")
            answers, dropped = candidates.drop_unusable(rows)
            self.dropped_completions.update(dropped)
            self._answers.add(index, answers)

    def __iter__(self) -> Iterator[PromptPartition]:
        for index in range(self.partition_count):
            yield PromptPartition(index, self._prompts.read(index).drop("key"), self._answers.read(index))

    def new_frames(self) -> PartitionedFrames:
        return PartitionedFrames(self.run.path)

    def with_offsets(self, select_items: Callable[[PromptPartition], pl.DataFrame]) -> PartitionedFrames:
        """Return the byte offsets of the items that ``select_items`` returns for each partition.

        Columns as in :meth:`PromptPartition.with_offsets`.
        """
        inputs = self.new_frames()
        for partition in self:
            inputs.add(partition.index, partition.with_offsets(select_items(partition).select("prompt_id", "a", "b")))
        return inputs

    def verdicts(self, index: int) -> pl.DataFrame:
        """Return the verdicts of a partition that count, including those appended since :meth:`mark_verdicts_stale`.

        They are sorted by key, so that no result depends on the order of the journal. A rule-based verdict counts if
        the present version of the checks or of the text classifier made it.
        """
        if self._verdicts is None:
            self._verdicts = self._partition_journal("verdicts", VERDICT_SCHEMA, _reduce_verdicts)
        elif self._verdicts_stale:
            self._verdicts.catch_up()
        self._verdicts_stale = False
        verdicts = self._verdicts.read(index)
        is_rule_based = pl.col("judge_hash").is_in([check_schema.checks_hash(), refusal_classifier.CLASSIFIER_HASH])
        is_current = pl.any_horizontal(
            pl.lit(value=False),
            *(
                (pl.col("settings_hash") == asked_as) & (pl.col("sample") < num_samples)
                for asked_as, num_samples in self._num_samples.items()
            ),
        )
        return verdicts.filter(is_rule_based | is_current).sort("key").drop("key")

    def count_verdicts(self, settings_hash: str, num_samples: int) -> None:
        """Count the first ``num_samples`` verdicts per question with this ``settings_hash`` from now on."""
        self._num_samples[settings_hash] = num_samples

    def mark_verdicts_stale(self) -> None:
        """Record that verdicts are being appended to the journal."""
        self._verdicts_stale = True

    def _partition_journal(
        self, name: JournalName, schema: dict[str, Any], reduce: Callable[..., pl.DataFrame]
    ) -> PartitionedJournal:
        return PartitionedJournal(self.run.journal_path(name), schema, reduce, self.run.path, self.partition_count)

    def _last_offset(self, limit: int) -> int:
        """Return the byte offset of the last of the first ``limit`` prompts."""
        offsets = [self._prompts.read(index)["prompt_offset"] for index in range(self.partition_count)]
        return int(pl.concat(offsets).sort().head(limit).max() or 0)  # type: ignore[arg-type]
