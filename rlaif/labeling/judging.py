"""Whom the judges are asked about, round by round: ratings first, then the pairs that they point to.

Prompts are taken part by part (:mod:`rlaif.run.partitions`): what is asked and what is settled is the same for any
number of parts, and only the rows of one part are in memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.judge import judge_file, refusal_classifier, rule_based, runner
from rlaif.llm.backends import ModelBackends
from rlaif.llm.usage import UsageMeter
from rlaif.pair import aggregation, candidates, refusal_guard
from rlaif.records import Failure
from rlaif.run import frames, partitions
from rlaif.run.journal import Journal, JournalReader
from rlaif.run.partitions import PartitionedFrames, PartitionedJournal
from rlaif.run.run import JournalName, Run

RECORD_BATCH = 1000
"""Records that are written at once, where they come without waiting for anybody."""

# What the frames hold of each journal. There are millions of rows, so keys are numbers and words are held once.
PROMPT_SCHEMA = {name: frames.PROMPTS[name] for name in ("key", "prompt_id", "tags", "split")}
COMPLETION_SCHEMA = frames.categorical(
    {name: frames.COMPLETIONS[name] for name in ("key", "prompt_id", "model", "finish_reason", "text")},
    "model", "finish_reason",
)  # fmt: skip
CATEGORICAL_COLUMNS = ("kind", "judge", "judge_hash", "model", "order", "aspect", "label")
VERDICT_SCHEMA = frames.categorical(
    {
        name: frames.VERDICTS[name]
        for name in ("key", "prompt_id", *CATEGORICAL_COLUMNS, "a", "b", "prob_a", "score", "variance", "flags")
    },
    *CATEGORICAL_COLUMNS,
)


def _reduce_prompts(block: pl.DataFrame) -> pl.DataFrame:
    """Without those that are held out: they measure a model, and one that was trained on them cannot be measured."""
    block = block.filter(pl.col("split").ne_missing("heldout")).drop("split")
    return block.with_columns(frames.key_as_uint128("key")).rename({"offset": "prompt_offset"})


def _reduce_completions(block: pl.DataFrame) -> pl.DataFrame:
    key_low = pl.col("key").str.tail(32).str.to_integer(base=16, dtype=pl.UInt128)  # for the ids of pairs
    return candidates.summarize_texts(block).with_columns(frames.key_as_uint128("key"), key_low=key_low)


def _reduce_verdicts(block: pl.DataFrame) -> pl.DataFrame:
    return block.with_columns(frames.key_as_uint128("key", "a", "b")).drop("offset")


def load_panel(config: Config) -> list[runner.PanelJudge]:
    """The panel's seats with their judge files. Raises :class:`UsageError` with a did-you-mean."""
    return [runner.PanelJudge(judge_file.find_judge(entry.name), entry) for entry in config.panel_members()]


def resolve_strategy(config: Config, panel: list[runner.PanelJudge]) -> candidates.Strategy:
    """The strategy asked for, or the one that the panel's kinds allow. A reward model says which of two answers is
    better as a comparing judge does; without any of these the prompts' checks have to say it."""
    kinds = {judge.definition.file.kind for judge in panel}
    has_rating_judge, has_comparing_judge = "rate" in kinds, bool(kinds & {"compare", "reward"})
    requested = config.judge.strategy
    if requested == "auto":
        return (
            "rate-then-compare"
            if has_rating_judge and has_comparing_judge
            else "rate-only"
            if has_rating_judge
            else "round-robin"
        )
    missing_kinds = []
    if requested in ("rate-then-compare", "rate-only") and not has_rating_judge:
        missing_kinds.append("rate")
    if requested in ("rate-then-compare", "round-robin") and not has_comparing_judge and panel:
        missing_kinds.append("compare")
    if missing_kinds:
        raise UsageError(
            f"strategy {requested} needs a judge of kind {' and '.join(sorted(missing_kinds))}",
            hint="`rlaif judges list` shows the kinds; add one with --judge.",
        )
    return requested


def panel_members(panel: list[runner.PanelJudge]) -> list[candidates.PanelMember]:
    return [
        candidates.PanelMember(
            judge=judge.definition.name,
            judge_hash=judge.definition.hash,
            model=judge.member_config.model,
            weight=judge.member_config.weight,
            num_aspects=len(judge.definition.file.aspects),
            low=judge.definition.file.scale.low,
            high=judge.definition.file.scale.high,
        )
        for judge in panel
    ]


@dataclass(frozen=True)
class PromptPartition:
    """One part of the prompts (columns prompt_id, tags, prompt_offset) and their usable answers."""

    index: int
    prompts: pl.DataFrame
    answers: pl.DataFrame

    def answers_with_siblings(self) -> pl.DataFrame:
        """The answers that have another to stand beside. Columns: prompt_id, a, b (null)."""
        rows = self.answers.filter(pl.len().over("prompt_id") >= 2)
        return rows.select("prompt_id", a="key", b=pl.lit(None, pl.UInt128))

    def with_offsets(self, items: pl.DataFrame) -> pl.DataFrame:
        """The byte offsets of what is wanted, prompt by prompt. Columns: prompt_offset, a_offset, b_offset."""
        offsets = self.answers.select("key", "offset")
        return (
            items.join(self.prompts, on="prompt_id")
            .join(offsets.rename({"key": "a", "offset": "a_offset"}), on="a")
            .join(offsets.rename({"key": "b", "offset": "b_offset"}), on="b", how="left")
            .sort("prompt_id", "a", "b")
            .select("prompt_offset", "a_offset", "b_offset")
        )


class JudgingRounds:
    """The rounds of one judge command. Without ``backends`` and ``journal`` it only
    reads what was judged before."""

    def __init__(
        self,
        run: Run,
        config: Config,
        backends: ModelBackends | None,
        panel: list[runner.PanelJudge],
        strategy: candidates.Strategy,
        journal: Journal | None,
        usage: UsageMeter,
    ) -> None:
        self.run, self.config, self.backends = run, config, backends
        self.panel, self.strategy, self.journal, self.usage = panel, strategy, journal, usage
        self.panel_members = panel_members(panel)
        self.partition_count = partitions.partition_count(run.journal_path("completions"))
        self._verdicts: PartitionedJournal | None = None
        self._stale = False
        self._prompts = self._partition_journal("prompts", PROMPT_SCHEMA, _reduce_prompts)
        self._answers = self._new_frames()
        self.left_out: Counter[str] = Counter()
        last_offset = self._last_offset(config.judge.limit) if config.judge.limit else None
        completions = self._partition_journal("completions", COMPLETION_SCHEMA, _reduce_completions)
        for index in range(self.partition_count):
            prompts = self._prompts.read(index)
            if last_offset is not None:
                prompts = prompts.filter(pl.col("prompt_offset") <= last_offset)
            rows = completions.read(index).join(prompts, on="prompt_id", how="semi", maintain_order="left")
            answers, left_out = candidates.drop_unusable(rows)
            self.left_out.update(left_out)
            self._answers.add(index, answers)
        rule_based.validate_prompt_checks(run.journal_path("prompts"))

    def _partition_journal(
        self, name: JournalName, schema: dict[str, Any], reduce: Callable[..., pl.DataFrame]
    ) -> PartitionedJournal:
        return PartitionedJournal(self.run.journal_path(name), schema, reduce, self.run.path, self.partition_count)

    def _new_frames(self) -> PartitionedFrames:
        return PartitionedFrames(self.run.path)

    def _last_offset(self, limit: int) -> int:
        """The offset of the prompt up to which there are ``limit``."""
        offsets = [self._prompts.read(index)["prompt_offset"] for index in range(self.partition_count)]
        return int(pl.concat(offsets).sort().head(limit).max() or 0)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[PromptPartition]:
        for index in range(self.partition_count):
            yield PromptPartition(index, self._prompts.read(index).drop("key"), self._answers.read(index))

    def judge_all(self) -> PartitionedFrames:
        """Ask what each round needs; returns every candidate, settled over all rounds' verdicts."""
        if self.journal is not None:
            self.run_rule_based(self.journal, self.possible_inputs("rate"))
            self._run_judges("classify", self._uncertain_refusals)
            self._run_judges("reward", PromptPartition.answers_with_siblings)
            if self.strategy != "round-robin":
                self._run_judges("rate", PromptPartition.answers_with_siblings)
        ranked = self._new_frames()
        for partition in self:
            ranked.add(partition.index, self._rank_candidates(partition))
        decided = self._judge_round(ranked, 1, None)
        for rank in range(2, self._max_candidates() + 1):
            decided = self._judge_round(ranked, rank, decided)
        return self._keep_surest_ties(decided)  # not before: a near-tie that is kept would end its prompt's tries

    def _max_candidates(self) -> int:
        return 1 if self.strategy == "rate-only" else self.config.pairs.max_candidates_per_prompt

    def _rank_candidates(self, partition: PromptPartition) -> pl.DataFrame:
        """The candidates of one part, the best of each prompt first."""
        verdicts = self.verdicts(partition.index)
        ratings = None if self.strategy == "round-robin" else candidates.rating_scores(verdicts, self.panel_members)
        return candidates.rank_candidates(
            partition.answers,
            ratings,
            self.strategy,
            min_rating_margin=self.config.pairs.min_rating_margin,
            max_candidates=self._max_candidates(),
            check_scores=aggregation.check_scores(verdicts),
        )

    def _judge_round(
        self, ranked: PartitionedFrames, rank: int, previous: PartitionedFrames | None
    ) -> PartitionedFrames:
        """Ask about the candidates of ``rank`` where those of ``previous`` gave too few pairs; settles all so far."""
        round_candidates = self._new_frames()
        for index in range(self.partition_count):
            rows = ranked.read(index).filter(pl.col("rank") == rank)
            if previous is not None:
                pairs_won = previous.read(index).filter("kept").group_by("prompt_id").len()
                rows = rows.join(
                    pairs_won.filter(pl.col("len") >= self.config.pairs.max_per_prompt), on="prompt_id", how="anti"
                )
            round_candidates.add(index, rows)
        if previous is not None and not round_candidates.height:
            return previous
        if self.strategy != "rate-only":
            self._run_judges(
                "compare",
                lambda partition: self._undecided_by_checks(partition, round_candidates.read(partition.index)),
            )
        return self._decide(round_candidates, previous)

    def _decide(self, round_candidates: PartitionedFrames, previous: PartitionedFrames | None) -> PartitionedFrames:
        """``round_candidates`` and those of ``previous``, settled."""
        decided, pair_config = self._new_frames(), self.config.pairs
        for index in range(self.partition_count):
            rows = round_candidates.read(index)
            if previous is not None:
                rows = pl.concat([previous.read(index).select(rows.columns), rows])
            outcomes = aggregation.decide_outcomes(
                rows,
                aggregation.aggregate_votes(self.verdicts(index), self.panel_members, rows.select("a", "b")),
                self.strategy,
                min_confidence=pair_config.min_confidence,
                max_per_prompt=pair_config.max_per_prompt,
                min_chosen_rating=pair_config.min_chosen_rating,
            )
            decided.add(index, outcomes)
        return decided

    def _keep_surest_ties(self, decided: PartitionedFrames) -> PartitionedFrames:
        """``decided`` with as many near-ties kept as there are too many; which of them depends on all parts."""
        max_fraction, judged_prompts, lost_prompts = self.config.pairs.max_tie_drop_fraction, 0, []
        if max_fraction >= 1:
            return decided
        for index in range(self.partition_count):
            rows = decided.read(index)
            lost_prompts.append(aggregation.prompts_lost_to_ties(rows))
            judged_prompts += aggregation.count_judged_prompts(rows)
        ties_to_keep, result = (
            aggregation.most_confident_ties(pl.concat(lost_prompts), judged_prompts, max_fraction),
            self._new_frames(),
        )
        for index in range(self.partition_count):
            result.add(index, aggregation.keep_ties(decided.read(index), ties_to_keep))
        return result

    def possible_inputs(self, kind: str) -> PartitionedFrames:
        """Where that lies what judges of ``kind`` may be asked about before anything is known.

        See :meth:`PromptPartition.with_offsets`.
        """

        def candidate_pairs(partition: PromptPartition) -> pl.DataFrame:
            pairs = candidates.pair_answers(partition.answers)
            return (
                pairs
                if self.strategy == "round-robin"
                else pairs.group_by("prompt_id").head(self.config.pairs.max_candidates_per_prompt)
            )

        return self._with_offsets(candidate_pairs if kind == "compare" else PromptPartition.answers_with_siblings)

    def _with_offsets(self, select_items: Callable[[PromptPartition], pl.DataFrame]) -> PartitionedFrames:
        inputs = self._new_frames()
        for partition in self:
            inputs.add(partition.index, partition.with_offsets(select_items(partition).select("prompt_id", "a", "b")))
        return inputs

    def run_rule_based(self, journal: Journal, inputs: PartitionedFrames) -> None:
        """Journal what the prompts' checks and the text classifier of refusals say of each answer."""
        self._stale = True
        prompts, answers = (
            JournalReader(self.run.journal_path("prompts")),
            JournalReader(self.run.journal_path("completions")),
        )
        try:
            records = rule_based.rule_based_verdicts(inputs.rows(), prompts.read_at, answers.read_at, journal)
            for batch in iter(lambda: list(itertools.islice(records, RECORD_BATCH)), []):
                journal.append(batch)
                for record in batch:
                    if isinstance(record, Failure):  # counted, but no sign that a server fails
                        self.usage.failures[record.kind] += 1
                        self.usage.last_error = record.error
        finally:
            prompts.close()
            answers.close()

    def _uncertain_refusals(self, partition: PromptPartition) -> pl.DataFrame:
        """Answers about which the text classifier of refusals is not sure."""
        is_certain = (pl.col("judge_hash") == refusal_classifier.CLASSIFIER_HASH) & (
            pl.col("score") >= refusal_classifier.MIN_CONFIDENCE
        )
        return partition.answers_with_siblings().join(
            self.verdicts(partition.index).filter(is_certain).select("a"), on="a", how="anti"
        )

    def _undecided_by_checks(self, partition: PromptPartition, items: pl.DataFrame) -> pl.DataFrame:
        """Pairs that the prompts' checks do not decide."""
        scored = candidates.add_check_scores(items, aggregation.check_scores(self.verdicts(partition.index)))
        return scored.filter((pl.col("check_a") == pl.col("check_b")).fill_null(True))

    def judge_votes(self, index: int, pairs: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """What each seat said of ``pairs`` (columns a, b) of a part, and what its answers were classified as."""
        verdicts = self.verdicts(index)
        return aggregation.votes_by_judge(
            verdicts, self.panel_members, pairs.select("a", "b")
        ), refusal_guard.answer_labels(verdicts)

    def verdicts(self, index: int) -> pl.DataFrame:
        """What the journal holds of a part. It is read on from where it ended after something was asked."""
        if self._verdicts is None:
            self._verdicts = self._partition_journal("verdicts", VERDICT_SCHEMA, _reduce_verdicts)
        elif self._stale:
            self._verdicts.catch_up()
        self._stale = False
        return self._verdicts.read(index).drop("key")

    def _run_judges(self, kind: str, select_items: Callable[[PromptPartition], pl.DataFrame]) -> None:
        judges = [judge for judge in self.panel if judge.definition.file.kind == kind]
        if self.backends is None or not judges:
            return
        inputs = self._with_offsets(select_items)
        if not inputs.height:
            return
        self._stale = True
        prompts, answers = (
            JournalReader(self.run.journal_path("prompts")),
            JournalReader(self.run.journal_path("completions")),
        )
        try:
            for judge in judges:
                if self.usage.stop_reason():
                    return
                self._run_judge(judge, inputs, prompts, answers)
        finally:
            prompts.close()
            answers.close()

    def _run_judge(
        self, judge: runner.PanelJudge, inputs: PartitionedFrames, prompts: JournalReader, answers: JournalReader
    ) -> None:
        backends, journal = self.backends, self.journal
        assert backends is not None
        assert journal is not None
        output_modes: dict[str, Any] = self.run.manifest()["stages"]["judge"].get("output_modes", {})
        judge = replace(judge, mode=output_modes.get(judge.name)) if self.config.judge.output_mode == "auto" else judge

        def iter_inputs() -> Iterator[runner.JudgeInput]:
            for row in inputs.rows():
                yield runner.JudgeInput(*row)

        has_pending = True
        if judge.mode:  # known from an earlier start: find out without a server whether anything is owed
            requests = runner.judge_requests(
                judge, judge.mode, self.config, iter_inputs(), prompts.read_at, answers.read_at
            )
            has_pending = any(request.keys[0] not in journal for request in requests)
        requests_per_input = {"rate": len(judge.definition.file.aspects), "compare": 2}.get(
            judge.definition.file.kind, 1
        )
        self.usage.total = (self.usage.total or 0) + inputs.height * requests_per_input
        if not has_pending:
            self.usage.skipped += inputs.height * requests_per_input
            return
        self.usage.description = f"judge: {judge.name}"

        def save_output_mode(mode: str) -> None:
            self.run.update_manifest("judge", output_modes={**output_modes, judge.name: mode})

        runner.run_judge(
            judge,
            self.config,
            iter_inputs,
            prompts.read_at,
            answers.read_at,
            lambda: backends.client_for(
                judge.member_config.model, judge.member_config.base_url, judge.vllm_settings(self.config), self.usage
            ),
            journal,
            self.usage,
            save_output_mode,
        )
