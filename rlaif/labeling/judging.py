"""Judging rounds: rate all answers, then compare the pairs that the ratings suggest.

Rules come first (checks, the text classifier of refusals), as they cost nothing. Comparisons take several rounds: a
prompt whose best pair gives a near tie or contradicts its ratings tries its next pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.judge import judge_file, refusal_classifier, reply_parser, rule_based, runner
from rlaif.labeling.judging_records import JudgingRecords, PromptPartition
from rlaif.llm.backends import ModelBackends
from rlaif.llm.request import Request
from rlaif.llm.usage import UsageMeter
from rlaif.pair import aggregation, candidates, refusal_guard
from rlaif.run.journal import Journal, JournalReader
from rlaif.run.partitions import PartitionedFrames
from rlaif.run.run import Run


def load_panel(config: Config) -> list[runner.PanelJudge]:
    """Load the judge files of the panel. Raises :class:`UsageError` with a suggestion for an unknown name."""
    return [runner.PanelJudge(judge_file.find_judge(entry.name), entry) for entry in config.panel_members()]


def resolve_strategy(config: Config, panel: list[runner.PanelJudge]) -> candidates.Strategy:
    """Return the configured strategy or, for "auto", the one that the kinds of the panel's judges allow.

    A reward model decides between two answers, as a comparing judge does. Without any such judge the prompts' checks
    have to decide. Raises :class:`UsageError` if the panel lacks a kind that the strategy needs.
    """
    kinds = {judge.definition.file.kind for judge in panel}
    has_rating_judge, has_comparing_judge = "rate" in kinds, bool(kinds & {"compare", "reward"})
    requested = config.judge.strategy
    if requested == "auto":
        if not has_rating_judge:
            return "round-robin"
        return "rate-then-compare" if has_comparing_judge else "rate-only"
    missing_kinds = []
    if requested in ("rate-then-compare", "rate-only") and not has_rating_judge:
        missing_kinds.append("rate")
    if requested in ("rate-then-compare", "round-robin") and not has_comparing_judge and panel:
        missing_kinds.append("compare")
    if missing_kinds:
        raise UsageError(
            f"strategy {requested} needs a judge of kind {' and '.join(sorted(missing_kinds))}",
            hint="Add one with `--judge`; `rlaif judges list` shows the kinds.",
        )
    return requested


def panel_members(panel: list[runner.PanelJudge]) -> list[candidates.PanelMember]:
    """Return what pairing needs to know of each judge on the panel."""
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


def known_answer_labels(verdicts: pl.DataFrame, panel: Sequence[candidates.PanelMember]) -> pl.DataFrame:
    """Return which answers refuse, as the panel or the confident text classifier found. See
    :func:`rlaif.pair.refusal_guard.answer_labels`."""
    return refusal_guard.answer_labels(
        verdicts,
        panel,
        text_classifier_hash=refusal_classifier.CLASSIFIER_HASH,
        min_confidence=refusal_classifier.MIN_CONFIDENCE,
    )


SelectItems = Callable[[PromptPartition], pl.DataFrame]
AskKind = Callable[[str, SelectItems], None]
"""Asks the judges of one kind about the selected items of each partition."""
AskJudges = Callable[[list[runner.PanelJudge], PartitionedFrames], None]
"""Asks judges about inputs: the byte offsets of :meth:`PromptPartition.with_offsets`."""


class JudgingRounds:
    """The rounds of one judge command. Without ``backends`` and ``journal`` no judge is asked, and only existing
    verdicts are read.

    Raises :class:`UsageError` for a prompt whose checks cannot be evaluated.
    """

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
        self.records = JudgingRecords(run, config.judge.limit)
        rule_based.validate_prompt_checks(run.journal_path("prompts"))

    def judge_all(self) -> PartitionedFrames:
        """Ask the questions of every round; return all candidates with their outcome over all verdicts."""
        return self._run_rounds(self._run_judges)

    def has_pending_work(self) -> bool:
        """Return True if a verdict of any round is missing. Sends no request, but journals rule-based verdicts."""
        pending = False

        def check(judges: list[runner.PanelJudge], inputs: PartitionedFrames) -> None:
            nonlocal pending
            pending = pending or self._has_pending(judges, inputs)

        self._run_rounds(check)
        return pending

    def _run_rounds(self, ask_judges: AskJudges) -> PartitionedFrames:
        """Go through the rounds. Each calls ``ask_judges`` and then counts the verdicts that answer its questions."""

        def ask(kind: str, select_items: SelectItems) -> None:
            judges = [judge for judge in self.panel if judge.definition.file.kind == kind]
            inputs = self.records.with_offsets(select_items) if judges else self.records.new_frames()
            if inputs.height:
                ask_judges(judges, inputs)
                self._count_verdicts(judges)

        if self.journal is not None:
            self._run_rule_based(self.journal)
        ask("classify", self._uncertain_refusals)
        ask("reward", PromptPartition.answers_with_siblings)
        if self.strategy != "round-robin":
            ask("rate", PromptPartition.answers_with_siblings)
        ranked = self.records.new_frames()
        for partition in self.records:
            ranked.add(partition.index, self._rank_candidates(partition))
        decided = self._judge_round(ranked, 1, None, ask)
        for rank in range(2, self._max_candidates() + 1):
            decided = self._judge_round(ranked, rank, decided, ask)
        # Last, because a near tie that is kept would end the tries of its prompt.
        return self._keep_most_confident_ties(decided)

    def possible_inputs(self, kind: str) -> PartitionedFrames:
        """Return the byte offsets of every answer or pair that judges of ``kind`` could be asked about.

        Columns as in :meth:`PromptPartition.with_offsets`.
        """

        def candidate_pairs(partition: PromptPartition) -> pl.DataFrame:
            pairs = candidates.pair_answers(partition.answers)
            if self.strategy == "round-robin":
                return pairs
            return pairs.group_by("prompt_id").head(self.config.pairs.max_candidates_per_prompt)

        return self.records.with_offsets(
            candidate_pairs if kind == "compare" else PromptPartition.answers_with_siblings
        )

    def judge_votes(self, index: int, pairs: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return each judge's votes on ``pairs`` (columns a, b) of a partition, and the labels of its answers."""
        verdicts = self.records.verdicts(index)
        votes = aggregation.votes_by_judge(verdicts, self.panel_members, pairs.select("a", "b"))
        return votes, known_answer_labels(verdicts, self.panel_members)

    # Rounds

    def _max_candidates(self) -> int:
        return 1 if self.strategy == "rate-only" else self.config.pairs.max_candidates_per_prompt

    def _rank_candidates(self, partition: PromptPartition) -> pl.DataFrame:
        """Return the candidates of one partition, the best of each prompt first."""
        verdicts = self.records.verdicts(partition.index)
        ratings = None if self.strategy == "round-robin" else candidates.panel_ratings(verdicts, self.panel_members)
        return candidates.rank_candidates(
            partition.answers,
            ratings,
            self.strategy,
            min_rating_margin=self.config.pairs.min_rating_margin,
            max_candidates=self._max_candidates(),
            check_scores=aggregation.check_scores(verdicts),
        )

    def _judge_round(
        self,
        ranked: PartitionedFrames,
        rank: int,
        previous: PartitionedFrames | None,
        ask: AskKind,
    ) -> PartitionedFrames:
        """Compare the candidates of ``rank`` whose prompts need more pairs than ``previous`` has kept.

        Returns the outcomes of all candidates so far.
        """
        round_candidates = self.records.new_frames()
        for index in range(self.records.partition_count):
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
            ask(
                "compare",
                lambda partition: self._undecided_by_checks(partition, round_candidates.read(partition.index)),
            )
        return self._decide(round_candidates, previous)

    def _decide(self, round_candidates: PartitionedFrames, previous: PartitionedFrames | None) -> PartitionedFrames:
        """Return ``round_candidates`` and those of ``previous`` with their outcomes."""
        decided, pair_config = self.records.new_frames(), self.config.pairs
        for index in range(self.records.partition_count):
            rows = round_candidates.read(index)
            if previous is not None:
                rows = pl.concat([previous.read(index).select(rows.columns), rows])
            verdicts = self.records.verdicts(index)
            outcomes = aggregation.decide_outcomes(
                rows,
                aggregation.aggregate_votes(verdicts, self.panel_members, rows.select("a", "b")),
                self.strategy,
                min_confidence=pair_config.min_confidence,
                max_per_prompt=pair_config.max_per_prompt,
                min_chosen_rating=pair_config.min_chosen_rating,
            )
            decided.add(index, outcomes)
        return decided

    def _keep_most_confident_ties(self, decided: PartitionedFrames) -> PartitionedFrames:
        """Keep as many near ties as exceed ``pairs.max_tie_drop_fraction``. The choice depends on all partitions."""
        max_fraction, judged_prompts, lost_prompts = self.config.pairs.max_tie_drop_fraction, 0, []
        if max_fraction >= 1:
            return decided
        for index in range(self.records.partition_count):
            rows = decided.read(index)
            lost_prompts.append(aggregation.prompts_lost_to_ties(rows))
            judged_prompts += aggregation.count_judged_prompts(rows)
        ties_to_keep = aggregation.most_confident_ties(pl.concat(lost_prompts), judged_prompts, max_fraction)
        result = self.records.new_frames()
        for index in range(self.records.partition_count):
            result.add(index, aggregation.keep_ties(decided.read(index), ties_to_keep))
        return result

    # Questions

    def _uncertain_refusals(self, partition: PromptPartition) -> pl.DataFrame:
        """Return the answers that the text classifier of refusals is not confident about."""
        is_certain = (pl.col("judge_hash") == refusal_classifier.CLASSIFIER_HASH) & (
            pl.col("score") >= refusal_classifier.MIN_CONFIDENCE
        )
        return partition.answers_with_siblings().join(
            self.records.verdicts(partition.index).filter(is_certain).select("a"), on="a", how="anti"
        )

    def _undecided_by_checks(self, partition: PromptPartition, items: pl.DataFrame) -> pl.DataFrame:
        """Return the pairs that the prompts' checks do not decide."""
        check_scores = aggregation.check_scores(self.records.verdicts(partition.index))
        scored = candidates.add_check_scores(items, check_scores)
        return scored.filter((pl.col("check_a") == pl.col("check_b")).fill_null(True))

    def _run_rule_based(self, journal: Journal) -> None:
        self.records.mark_verdicts_stale()
        inputs = self.possible_inputs("rate")
        with self.run.open_readers() as (prompts, answers):
            rule_based.run_rule_based(inputs.rows(), prompts.read_at, answers.read_at, journal, self.usage)

    def _has_pending(self, judges: list[runner.PanelJudge], inputs: PartitionedFrames) -> bool:
        """Return True if one of ``judges`` has not judged all of ``inputs``."""
        if self.journal is None:
            return False
        journal = self.journal
        with self.run.open_readers() as (prompts, answers):
            for judge in map(self._with_known_mode, judges):
                if judge.mode is None:
                    return True  # the output mode is unknown until the server is asked
                requests = self._requests(judge, judge.mode, inputs, prompts, answers)
                if any(request.keys[0] not in journal for request in requests):
                    return True
        return False

    def _requests(
        self,
        judge: runner.PanelJudge,
        mode: reply_parser.OutputMode,
        inputs: PartitionedFrames,
        prompts: JournalReader,
        answers: JournalReader,
    ) -> Iterator[Request]:
        judge_inputs = (runner.JudgeInput(*row) for row in inputs.rows())
        return runner.judge_requests(judge, mode, self.config, judge_inputs, prompts.read_at, answers.read_at)

    def _count_verdicts(self, judges: list[runner.PanelJudge]) -> None:
        """Count the verdicts that ``judges`` gave under the present settings.

        A judge whose output mode is unknown was never asked.
        """
        for judge in map(self._with_known_mode, judges):
            if judge.mode is not None:
                self.records.count_verdicts(
                    runner.settings_hash(judge, judge.mode, self.config), runner.num_samples(judge.mode, self.config)
                )

    def _run_judges(self, judges: list[runner.PanelJudge], inputs: PartitionedFrames) -> None:
        """Ask ``judges`` about ``inputs`` until a limit stops the stage."""
        if self.backends is None or self.journal is None:
            return
        self.records.mark_verdicts_stale()
        with self.run.open_readers() as (prompts, answers):
            for judge in judges:
                if self.usage.stop_reason():
                    return
                self._run_judge(judge, inputs, prompts, answers, self.backends, self.journal)

    def _run_judge(
        self,
        judge: runner.PanelJudge,
        inputs: PartitionedFrames,
        prompts: JournalReader,
        answers: JournalReader,
        backends: ModelBackends,
        journal: Journal,
    ) -> None:
        judge = self._with_known_mode(judge)
        self.usage.description = f"judge: {judge.name}"

        def iter_inputs() -> Iterator[runner.JudgeInput]:
            for row in inputs.rows():
                yield runner.JudgeInput(*row)

        def save_output_mode(mode: str) -> None:
            self.run.update_manifest("judge", output_modes={**self._output_modes(), judge.name: mode})

        runner.run_judge(
            judge,
            self.config,
            iter_inputs,
            prompts.read_at,
            answers.read_at,
            lambda: judge.open_client(backends, self.config, self.usage),
            journal,
            self.usage,
            save_output_mode,
        )

    def _with_known_mode(self, judge: runner.PanelJudge) -> runner.PanelJudge:
        """Return ``judge`` with its output mode: as configured or, if that is auto, as an earlier start found it.

        Raises :class:`UsageError` if the configured mode does not fit the judge.
        """
        runner.check_output_mode(judge, self.config)
        if self.config.judge.output_mode != "auto":
            return replace(judge, mode=runner.expected_output_mode(judge, self.config))
        return replace(judge, mode=self._output_modes().get(judge.name))

    def _output_modes(self) -> dict[str, Any]:
        modes: dict[str, Any] = self.run.manifest()["stages"].get("judge", {}).get("output_modes", {})
        return modes
