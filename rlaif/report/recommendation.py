"""The one line at the top of the morning page: what the run needs from a person now, and why.

``status`` is one of: ``not finished``, ``stop``, ``needs n reviews``, ``ready to train``, ``ready to evaluate``,
``better``, ``worse``, ``not shown to be better``. The first that holds, in the order of :func:`recommend`. Each rule
states the number that it went by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMMANDS = ("generate", "judge", "train", "evaluate")
MIN_CONSISTENCY = 0.5
MAX_UNPARSABLE_FRACTION = 0.2
MAX_REFUSAL_INCREASE = 0.01
MIN_PAIRS = 20
"""Pairs below which a share decides nothing."""


def recommend(report: Mapping[str, Any]) -> dict[str, Any]:
    """``{"status", "severity" (good | wait | bad), "reasons": [...], "next": command or null}`` for the facts of a
    report."""
    path, status = report["path"], report["status"]
    if not status["completions"]["answers"]:
        return _recommendation("not finished", "wait", ["there are no answers yet"], f"rlaif generate {path}")
    unfinished = [stage["name"] for stage in report["stages"] if stage["ended"] is None and stage["name"] in COMMANDS]
    if unfinished:
        # The last one: an earlier stage that was stopped did not keep a later one from running.
        name = unfinished[-1]
        reason = f"{name} is under way" if status["busy"] else f"{name} was started and did not end"
        return _recommendation("not finished", "wait", [reason], f"rlaif {name} {path}")
    if not status["pairs"] or report["pairs"] is None:
        return _recommendation("not finished", "wait", ["nothing was judged yet"], f"rlaif judge {path}")
    reasons = list(_stop_reasons(report))
    if reasons:
        return _recommendation("stop", "bad", reasons, None)
    notes = list(_notes(report))
    if report["evaluation"]:
        return _recommend_after_evaluation(report, notes)
    if report["training"]:
        next_command = f"rlaif evaluate {path}"
        if report["training"].get("identity", {}).get("method") == "reward":  # which does not answer
            model = report["training"]["output"]
            next_command = f"rlaif train {path} --method rloo --reward-model {model}/merged --output {path}/rloo"
            return _recommendation(
                "ready to train", "good", [f"a reward model was {_training_summary(report)}", *notes], next_command
            )
        return _recommendation("ready to evaluate", "good", [_training_summary(report), *notes], next_command)
    awaiting_review = sum(report["pairs"]["awaiting_review"].values())
    if awaiting_review:
        routes = ", ".join(f"{count:,} {route}" for route, count in report["pairs"]["awaiting_review"].items())
        reason = f"{awaiting_review:,} pairs wait for a person ({routes}); until then they are left out of the dataset"
        return _recommendation(f"needs {awaiting_review:,} reviews", "wait", [reason, *notes], f"rlaif review {path}")
    train = status["pairs"]["dataset"]["train"]
    return _recommendation("ready to train", "good", [f"{train:,} pairs to train on", *notes], f"rlaif train {path}")


def _stop_reasons(report: Mapping[str, Any]) -> Any:
    """Why these labels should not be trained on."""
    outcomes = report["status"]["pairs"]["outcomes"]
    candidates = sum(outcomes.values())
    if not report["pairs"]["kept"]:
        yield f"no pair was kept of {candidates:,} candidates"
        return
    unparsable = outcomes.get("unparsable", 0)
    if unparsable > MAX_UNPARSABLE_FRACTION * candidates:
        yield f"{unparsable:,} of {candidates:,} pairs have no readable verdict ({unparsable / candidates:.0%})"
    for judge in report["position_stats"] or []:
        consistency = judge["swap_consistency"]
        if consistency and consistency["n"] >= MIN_PAIRS and consistency["high"] < MIN_CONSISTENCY:
            yield (
                f"{judge['judge']} by {judge['model']} chooses by position: the two orders agree in "
                f"{consistency['value']:.0%} of {consistency['n']:,} pairs"
            )
    agreement = find_estimate(report["labels"], "agreement")
    if agreement and agreement["high"] < 0.5:
        yield (
            f"people contradict the judges: they agree on {agreement['value']:.0%} of {agreement['n']:,} labelled pairs"
        )
    elif agreement and agreement["n"] >= MIN_PAIRS and agreement["high"] < 0.65:
        yield f"people agree with the judges on only {agreement['value']:.0%} of {agreement['n']:,} labelled pairs"
    reversal = find_estimate(report["training"], "reversed")
    if reversal:
        yield f"training went where the labels point in only {format_share(reversal)} of held-out pairs: labels reversed?"


def _notes(report: Mapping[str, Any]) -> Any:
    """What does not stop anything and should be known."""
    agreement = find_estimate(report["labels"], "agreement")
    if agreement:
        yield f"people agree with the judges on {format_share(agreement)}, over all kept pairs"
    else:
        yield "how far people agree with the judges is not measured"
    missing = report["missing_answers"]
    if missing:
        yield f"{missing:,} answers were asked for and are not there: the same command asks for them again"
    failed = report["status"]["completions"]["failed"].items(), report["status"]["verdicts"]["failed"].items()
    for name, kinds in zip(("answers", "verdicts"), failed, strict=True):
        for kind, count in kinds:
            yield f"{count:,} {name} are missing ({kind})"
    if report["stale_evaluation"]:
        yield f"what was measured is of an earlier training ({report['stale_evaluation']}), not of this one"
    longer = report["pairs"]["longer_preferred"]
    if longer and longer["n"] >= MIN_PAIRS and longer["low"] > 0.65:
        yield f"the preferred answer is the longer one in {longer['value']:.0%} of {longer['n']:,} pairs"


def _recommend_after_evaluation(report: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    path, evaluation = report["path"], report["evaluation"]
    rate = evaluation.get("win_rate")
    if not rate:
        return _recommendation("ready to evaluate", "wait", ["the evaluation gave no win rate", *notes],
                        f"rlaif evaluate {path}")  # fmt: skip
    reasons = [
        f"the trained model wins {format_share(rate)} against its reference",
        *_caveats(evaluation, rate),
        *notes,
    ]
    next_command = f"rlaif init NEXT --from {path}"
    if rate["low"] > 0.5:
        return _recommendation("better", "good", reasons, next_command)
    if rate["high"] < 0.5:
        return _recommendation("worse", "bad", reasons, None)
    return _recommendation("not shown to be better", "wait", reasons, None)


def _caveats(evaluation: Mapping[str, Any], rate: Mapping[str, Any]) -> Any:
    """What a win rate does not say, where it is no good news."""
    length_controlled = find_estimate(evaluation, "length_controlled_win_rate")
    if length_controlled and rate["low"] > 0.5 >= length_controlled["low"]:
        yield f"at equal length it would win {format_share(length_controlled)}: longer answers may be what won"
    for row in evaluation.get("refusals") or []:
        before, after = find_estimate(row, "reference"), find_estimate(row, "trained")
        if (
            row["prompt_class"] == "benign"
            and before
            and after
            and after["value"] > before["value"] + MAX_REFUSAL_INCREASE
        ):
            yield f"it refuses {format_share(after)} of benign prompts, its reference {format_share(before)}"
    gain = next(
        (find_estimate(row, "pass_rate") for row in evaluation.get("checks") or [] if "gain" in row.values()), None
    )
    if gain and gain["high"] < 0:
        yield f"it meets fewer of the prompts' checks: {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _training_summary(report: Mapping[str, Any]) -> str:
    result = report["training"]["result"]
    return f"trained on {result['pairs']:,} pairs in {result['steps']:,} steps"


def find_estimate(group: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    """The estimate ``name`` of ``group``, if it is one with an interval and observations."""
    value = (group or {}).get(name)
    return value if isinstance(value, dict) and value.get("n") and "low" in value else None


def format_share(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['value']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}] (n = {estimate['n']:,})"


def _recommendation(status: str, severity: str, reasons: list[str], next_command: str | None) -> dict[str, Any]:
    return {"status": status, "severity": severity, "reasons": reasons, "next": next_command}
