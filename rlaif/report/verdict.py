"""The one line at the top of the morning page: what the run needs from a person now, and why.

``word`` is one of: ``not finished``, ``stop``, ``needs n reviews``, ``ready to train``, ``ready to evaluate``,
``better``, ``worse``, ``not shown to be better``. The first that holds, in the order of :func:`of`. Each rule states
the number that it went by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMMANDS = ("generate", "judge", "train", "evaluate")
INCONSISTENT = 0.5
UNREADABLE = 0.2
MORE_REFUSALS = 0.01
ENOUGH = 20
"""Pairs below which a share decides nothing."""


def of(told: Mapping[str, Any]) -> dict[str, Any]:
    """``{"word", "tone" (good | wait | bad), "why": [...], "next": command or null}`` for the facts of a report."""
    path, status = told["path"], told["status"]
    if not status["completions"]["answers"]:
        return _verdict("not finished", "wait", ["there are no answers yet"], f"rlaif generate {path}")
    unfinished = [stage["name"] for stage in told["stages"] if stage["ended"] is None and stage["name"] in COMMANDS]
    if unfinished:
        # The last one: an earlier stage that was stopped did not keep a later one from running.
        name = unfinished[-1]
        why = f"{name} is under way" if status["busy"] else f"{name} was started and did not end"
        return _verdict("not finished", "wait", [why], f"rlaif {name} {path}")
    if not status["pairs"] or told["pairs"] is None:
        return _verdict("not finished", "wait", ["nothing was judged yet"], f"rlaif judge {path}")
    reasons = list(_stop(told))
    if reasons:
        return _verdict("stop", "bad", reasons, None)
    notes = list(_notes(told))
    if told["evaluation"]:
        return _evaluated(told, notes)
    if told["training"]:
        following = f"rlaif evaluate {path}"
        if told["training"].get("identity", {}).get("method") == "reward":  # which does not answer
            model = told["training"]["output"]
            following = f"rlaif train {path} --method rloo --reward-model {model}/merged --output {path}/rloo"
            return _verdict("ready to train", "good", [f"a reward model was {_trained(told)}", *notes], following)
        return _verdict("ready to evaluate", "good", [_trained(told), *notes], following)
    waiting = sum(told["pairs"]["waiting"].values())
    if waiting:
        routes = ", ".join(f"{count:,} {route}" for route, count in told["pairs"]["waiting"].items())
        why = f"{waiting:,} pairs wait for a person ({routes}); until then they are left out of the dataset"
        return _verdict(f"needs {waiting:,} reviews", "wait", [why, *notes], f"rlaif review {path}")
    train = status["pairs"]["dataset"]["train"]
    return _verdict("ready to train", "good", [f"{train:,} pairs to train on", *notes], f"rlaif train {path}")


def _stop(told: Mapping[str, Any]) -> Any:
    """Why these labels should not be trained on."""
    outcomes = told["status"]["pairs"]["outcomes"]
    candidates = sum(outcomes.values())
    if not told["pairs"]["kept"]:
        yield f"no pair was kept of {candidates:,} candidates"
        return
    unread = outcomes.get("unparsed", 0)
    if unread > UNREADABLE * candidates:
        yield f"{unread:,} of {candidates:,} pairs have no readable verdict ({unread / candidates:.0%})"
    for judge in told["orders"] or []:
        same = judge["consistent"]
        if same and same["n"] >= ENOUGH and same["high"] < INCONSISTENT:
            yield (
                f"{judge['judge']} by {judge['model']} chooses by position: the two orders agree in "
                f"{same['value']:.0%} of {same['n']:,} pairs"
            )
    agreement = estimate(told["labels"], "agreement")
    if agreement and agreement["high"] < 0.5:
        yield (
            f"people contradict the judges: they agree on {agreement['value']:.0%} of {agreement['n']:,} labelled pairs"
        )
    elif agreement and agreement["n"] >= ENOUGH and agreement["high"] < 0.65:
        yield f"people agree with the judges on only {agreement['value']:.0%} of {agreement['n']:,} labelled pairs"
    turned = estimate(told["training"], "reversed")
    if turned:
        yield f"training went where the labels point in only {share(turned)} of held-out pairs: labels reversed?"


def _notes(told: Mapping[str, Any]) -> Any:
    """What does not stop anything and should be known."""
    agreement = estimate(told["labels"], "agreement")
    if agreement:
        yield f"people agree with the judges on {share(agreement)}, over all kept pairs"
    else:
        yield "how far people agree with the judges is not measured"
    owed = told["owed"]
    if owed:
        yield f"{owed:,} answers were asked for and are not there: the same command asks for them again"
    failed = told["status"]["completions"]["failed"].items(), told["status"]["verdicts"]["failed"].items()
    for name, kinds in zip(("answers", "verdicts"), failed, strict=True):
        for kind, count in kinds:
            yield f"{count:,} {name} are missing ({kind})"
    if told["outdated"]:
        yield f"what was measured is of an earlier training ({told['outdated']}), not of this one"
    longer = told["pairs"]["longer"]
    if longer and longer["n"] >= ENOUGH and longer["low"] > 0.65:
        yield f"the preferred answer is the longer one in {longer['value']:.0%} of {longer['n']:,} pairs"


def _evaluated(told: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    path, found = told["path"], told["evaluation"]
    rate = found.get("win_rate")
    if not rate:
        return _verdict("ready to evaluate", "wait", ["the evaluation gave no win rate", *notes],
                        f"rlaif evaluate {path}")  # fmt: skip
    why = [f"the trained model wins {share(rate)} against its reference", *_but(found, rate), *notes]
    following = f"rlaif init NEXT --from {path}"
    if rate["low"] > 0.5:
        return _verdict("better", "good", why, following)
    if rate["high"] < 0.5:
        return _verdict("worse", "bad", why, None)
    return _verdict("not shown to be better", "wait", why, None)


def _but(found: Mapping[str, Any], rate: Mapping[str, Any]) -> Any:
    """What a win rate does not say, where it is no good news."""
    level = estimate(found, "length_controlled_win_rate")
    if level and rate["low"] > 0.5 >= level["low"]:
        yield f"at equal length it would win {share(level)}: longer answers may be what won"
    for row in found.get("refusals") or []:
        before, after = estimate(row, "reference"), estimate(row, "trained")
        if row["prompts"] == "benign" and before and after and after["value"] > before["value"] + MORE_REFUSALS:
            yield f"it refuses {share(after)} of benign prompts, its reference {share(before)}"
    gain = next((estimate(row, "") for row in found.get("checks") or [] if "gain" in row.values()), None)
    if gain and gain["high"] < 0:
        yield f"it meets fewer of the prompts' checks: {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _trained(told: Mapping[str, Any]) -> str:
    result = told["training"]["result"]
    return f"trained on {result['pairs']:,} pairs in {result['steps']:,} steps"


def estimate(group: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    """The estimate ``name`` of ``group``, if it is one with an interval and observations."""
    found = (group or {}).get(name)
    return found if isinstance(found, dict) and found.get("n") and "low" in found else None


def share(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}] (n = {found['n']:,})"


def _verdict(word: str, tone: str, why: list[str], following: str | None) -> dict[str, Any]:
    return {"word": word, "tone": tone, "why": why, "next": following}
