"""The report's headline: what the run needs next, the reasons, and what else to know about its labels and model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlaif.display_names import field_name
from rlaif.report.next_step import Step, decide, format_share
from rlaif.report.run_facts import RunFacts, find_estimate
from rlaif.stats import Estimate
from rlaif.stats.agreement import MIN_PAIRS

MAX_REFUSAL_INCREASE = 0.01
Severity = Literal["good", "wait", "bad"]
HEADLINES: dict[Step, tuple[str, Severity]] = {
    Step.FINISH: ("Not finished", "wait"),
    Step.FIX_LABELS: ("Stop: do not train on these labels", "bad"),
    Step.REVIEW: ("Needs review", "wait"),
    Step.MERGE: ("New labels to merge", "wait"),
    Step.TRAIN: ("Ready to train", "good"),
    Step.EVALUATE: ("Ready to evaluate", "good"),
    Step.ITERATE: ("The trained model is better", "good"),
    Step.EXTEND: ("The trained model is not shown to be better", "wait"),
    Step.DISCARD: ("The trained model is worse", "bad"),
}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The next step with its ``command`` (None if there is none to run), and how the report shows it."""

    step: Step
    headline: str
    severity: Severity
    reasons: list[str]
    command: str | None


def recommend(facts: RunFacts) -> Recommendation:
    """Return the headline for the run with these ``facts``."""
    step = decide(facts)
    headline, severity = HEADLINES[step.step]
    reasons = list(step.reasons)
    if facts.evaluation and step.step in (Step.ITERATE, Step.EXTEND, Step.DISCARD):
        reasons += _caveats(facts.evaluation)
    if step.step not in (Step.FINISH, Step.FIX_LABELS):
        reasons += _notes(facts)
    return Recommendation(step.step, headline, severity, reasons, step.command)


def _notes(facts: RunFacts) -> Iterator[str]:
    """Yield what does not change the next step but should be known."""
    agreement = find_estimate(facts.labels, "agreement")
    if agreement:
        yield f"annotators agree with the judges on {format_share(agreement)} of all kept pairs"
        for name in ("tie_rate", "skip_rate"):
            if rate := find_estimate(facts.labels, name):
                yield f"{field_name(name)}: {format_share(rate)}"
    elif (facts.labels or {}).get("reviewed"):
        yield "agreement between annotators and judges is unknown: too few labels are of pairs drawn at random"
    else:
        yield "agreement between annotators and judges is not measured"
    if facts.missing_answers:
        yield f"{facts.missing_answers:,} requested answers are missing: rlaif generate requests them again"
    for name, counts in (("answers", facts.status.completions), ("verdicts", facts.status.verdicts)):
        for kind, count in counts.failed.items():
            yield f"{count:,} {name} are missing ({kind} failures)"
    if facts.stale_evaluation:
        yield f"the stored evaluation is of an earlier training ({facts.stale_evaluation})"
    longer = facts.pairs and facts.pairs.longer_preferred
    if longer and longer.n >= MIN_PAIRS and longer.low > 0.65:
        yield f"the preferred answer is the longer one in {longer.value:.0%} of {longer.n:,} pairs"


def _caveats(evaluation: dict[str, Any]) -> Iterator[str]:
    """Yield what the win rate hides, if it is bad news."""
    rate = find_estimate(evaluation, "win_rate")
    length_controlled = find_estimate(evaluation, "length_controlled_win_rate")
    if rate and length_controlled and rate.low > 0.5 >= length_controlled.low:
        yield f"at equal length it would win {format_share(length_controlled)}: longer answers may be why it wins"
    for row in evaluation.get("refusals") or []:
        before, after = find_estimate(row, "reference"), find_estimate(row, "trained")
        if row["prompt_class"] == "benign" and before and after and _refuses_more(before, after):
            yield f"it refuses {format_share(after)} of benign prompts, its reference {format_share(before)}"
    gains = (row for row in evaluation.get("checks") or [] if row.get("model") == "gain")
    gain = find_estimate(next(gains, None), "pass_rate")
    if gain and gain.high < 0:
        yield f"it meets fewer of the prompts' checks: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def _refuses_more(before: Estimate, after: Estimate) -> bool:
    return after.value > before.value + MAX_REFUSAL_INCREASE
