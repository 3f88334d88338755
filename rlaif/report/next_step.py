"""Decide what a run needs next. Every command's "Next:" line and the report's headline come from here.

The first rule that holds decides, in the order of :func:`decide`. Each reason states the number that the rule used.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlaif.report.run_facts import RunFacts, collect_facts, find_estimate
from rlaif.run.run import Run
from rlaif.stats import Estimate
from rlaif.stats.agreement import (
    CHANCE_NOISE_RATE,
    MIN_AGREEMENT,
    MIN_DECISIVE_PAIRS,
    MIN_PAIRS,
    has_precision_of,
    shows_noise,
)

RESUMABLE_STAGES = ("generate", "judge", "train", "evaluate")
MIN_CONSISTENCY = 0.5
MAX_UNPARSABLE_FRACTION = 0.2


class Step(enum.StrEnum):
    """Kind of work that a run needs next."""

    FINISH = "finish"
    """Run or resume a stage on which the others depend."""
    FIX_LABELS = "fix_labels"
    """Judge again: these labels should not be trained on."""
    REVIEW = "review"
    MERGE = "merge"
    """Merge the human labels that were given since the dataset was built."""
    TRAIN = "train"
    EVALUATE = "evaluate"
    ITERATE = "iterate"
    """The trained model is better: start the next iteration from it."""
    EXTEND = "extend"
    """The evaluation does not show a difference."""
    DISCARD = "discard"
    """The trained model is worse than its reference."""


@dataclass(frozen=True, slots=True)
class NextStep:
    """Next step of a run, with its reasons."""

    step: Step
    """Kind of step"""
    command: str | None
    """Command to run; None if there is none"""
    reasons: list[str] = field(default_factory=list)
    """Reasons, as text"""
    alternative: str | None = None
    """Command that can be run instead"""

    def __str__(self) -> str:
        if self.step is Step.FIX_LABELS:
            return f"{self.command} (do not train on these labels: {'; '.join(self.reasons)})"
        if self.command is None:
            return "; ".join(self.reasons)
        return self.command + (f", or {self.alternative}" if self.alternative else "")


def next_step(run: Run) -> NextStep:
    """Return what ``run`` needs next. Raises :class:`rlaif.errors.RunError` for a damaged manifest or journal."""
    return decide(collect_facts(run))


def decide(facts: RunFacts) -> NextStep:
    """Return the next step of the run with these ``facts``."""
    if step := _finish_step(facts):
        return step
    if problems := list(label_problems(facts)):
        return NextStep(Step.FIX_LABELS, f"rlaif judge {facts.path} --judge NAME@MODEL --restart", problems)
    if facts.evaluation:
        return _step_after_evaluation(facts.path, facts.evaluation)
    if facts.training:
        return _step_after_training(facts.path, facts.training)
    return _step_before_training(facts)


def _finish_step(facts: RunFacts) -> NextStep | None:
    """Return the stage that has to run or resume first, if there is one."""
    status, path = facts.status, facts.path
    # A dataset from elsewhere can be trained on without answers and pairs.
    if not facts.training and not status.completions.answers:
        return NextStep(Step.FINISH, f"rlaif generate {path}", ["the run has no answers yet"])
    unfinished = [stage.name for stage in facts.stages if stage.ended is None and stage.name in RESUMABLE_STAGES]
    if unfinished:
        name = unfinished[-1]  # a later stage can have run although an earlier one was stopped
        if status.busy:
            return NextStep(Step.FINISH, None, [f"{name} is running"])
        return NextStep(Step.FINISH, f"rlaif {name} {path}", [f"{name} started and did not end"])
    if not facts.training and (not status.pairs or facts.pairs is None):
        return NextStep(Step.FINISH, f"rlaif judge {path}", ["nothing has been judged yet"])
    return None


def label_problems(facts: RunFacts) -> Iterator[str]:
    """Yield the reasons for which these labels should not be trained on."""
    if facts.status.pairs and facts.pairs:
        yield from _outcome_problems(facts, facts.status.pairs, facts.pairs.kept)
    for judge in facts.position_stats or []:
        consistency = judge.swap_consistency
        if consistency and consistency.n >= MIN_PAIRS and consistency.high < MIN_CONSISTENCY:
            yield (
                f"{judge.judge} with {judge.model} chooses by position: its two orders agree in "
                f"{consistency.value:.0%} of {consistency.n:,} pairs"
            )
    yield from estimate_problems(facts.labels)
    reversal = find_estimate(facts.training, "reversed")
    if reversal:
        yield (
            f"training moved towards the preferred answer in only {format_share(reversal)} of held-out pairs; "
            "the labels may be reversed"
        )


def estimate_problems(labels: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the reasons in the estimates of label quality. Each needs an interval that excludes usable labels, so a few
    labels alone never stop a training."""
    agreement = find_estimate(labels, "agreement")
    if agreement and agreement.high < 0.5:
        yield f"annotators contradict the judges: they agree on {agreement.value:.0%} of {agreement.n:,} labeled pairs"
    elif agreement and has_precision_of(MIN_DECISIVE_PAIRS, agreement) and agreement.high < MIN_AGREEMENT:
        yield f"annotators agree with the judges on only {agreement.value:.0%} of {agreement.n:,} labeled pairs"
    noise_rate, error = (labels or {}).get("noise_rate"), find_estimate(labels, "remaining_error")
    if noise_rate is not None and noise_rate >= CHANCE_NOISE_RATE and (error is None or shows_noise(error)):
        yield f"an estimated {noise_rate:.1%} of the labels are wrong, which is close to chance"


def _outcome_problems(facts: RunFacts, counts: Mapping[str, Any], kept: int) -> Iterator[str]:
    candidates, unparsable = sum(counts["outcomes"].values()), counts["outcomes"].get("unparsable", 0)
    if not kept:
        yield f"none of {candidates:,} candidate pairs was kept"
    elif not facts.training and not counts["dataset"]["train"] and not _reviewable_count(facts, counts):
        yield f"none of {kept:,} kept pairs can be trained on: annotators found no better answer in them"
    if candidates and unparsable > MAX_UNPARSABLE_FRACTION * candidates:
        yield f"{unparsable:,} of {candidates:,} pairs have no readable verdict ({unparsable / candidates:.0%})"


def _reviewable_count(facts: RunFacts, counts: Mapping[str, Any]) -> int:
    """Count the pairs that can still enter the dataset: awaiting review now, or when it was built."""
    awaiting_review = sum(facts.pairs.awaiting_review.values()) if facts.pairs else 0
    return awaiting_review or int(counts.get("dropped_from_dataset", {}).get("awaiting_review", 0))


def _step_before_training(facts: RunFacts) -> NextStep:
    counts, pairs, path = facts.status.pairs, facts.pairs, facts.path
    assert counts is not None and pairs is not None  # or the run would have to be judged first
    train_pairs = counts["dataset"]["train"]
    awaiting_review = sum(pairs.awaiting_review.values())
    if awaiting_review:
        routes = ", ".join(f"{count:,} {route}" for route, count in pairs.awaiting_review.items())
        reason = f"{awaiting_review:,} pairs await review ({routes}); until then they are not in the dataset"
        alternative = f"rlaif train {path}" if train_pairs else None
        return NextStep(Step.REVIEW, f"rlaif review {path}", [reason, *_refusals(facts)], alternative)
    train_command = f"rlaif train {path}"
    if reviewed_since := _reviewable_count(facts, counts):
        reason = f"{reviewed_since:,} pairs were reviewed since the dataset was built"
        return NextStep(Step.MERGE, f"rlaif review {path} --merge", [reason, *_refusals(facts)], train_command)
    return NextStep(Step.TRAIN, train_command, [f"{train_pairs:,} pairs to train on", *_refusals(facts)])


def _refusals(facts: RunFacts) -> Iterator[str]:
    """Yield the reason for which the last training was refused, unless the pairs were judged again since."""
    stages = {stage.name: stage for stage in facts.stages}
    train, judge = stages.get("train"), stages.get("judge")
    if train and train.refusal and not (judge and judge.ended and train.ended and judge.ended > train.ended):
        yield f"the last `rlaif train` was refused: {train.refusal}"


def _step_after_training(path: str, training: Mapping[str, Any]) -> NextStep:
    result = training["result"]
    summary = f"trained on {result['pairs']:,} pairs in {result['steps']:,} steps"
    if training.get("identity", {}).get("method") != "reward":
        return NextStep(Step.EVALUATE, f"rlaif evaluate {path}", [summary])
    # A reward model gives no answers: it is what a policy is trained against.
    model = result.get("merged") or f"{training['output']}/merged"
    command = f"rlaif train {path} --method rloo --reward-model {model} --output {path}/rloo"
    return NextStep(Step.TRAIN, command, [f"a reward model was {summary}"])


def _step_after_evaluation(path: str, evaluation: Mapping[str, Any]) -> NextStep:
    rate = find_estimate(evaluation, "win_rate")
    if not rate:
        return NextStep(Step.EVALUATE, f"rlaif evaluate {path}", ["the evaluation gave no win rate"])
    reasons = [f"the trained model wins {format_share(rate)} of comparisons with its reference"]
    if rate.low > 0.5:
        return NextStep(Step.ITERATE, f"rlaif init NEXT --from {path}", reasons)
    return NextStep(Step.DISCARD if rate.high < 0.5 else Step.EXTEND, None, reasons)


def format_share(estimate: Estimate) -> str:
    """Return a share as a percentage with its interval and n."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}] (n = {estimate.n:,})"
