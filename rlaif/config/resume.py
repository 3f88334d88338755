"""What a run is: the fields that may not change when it is resumed, as ``config.RESUME_RULES`` lists them; and what a
trained model is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif.config.models import RESUME_RULES, Config
from rlaif.errors import ConfigMismatchError
from rlaif.records import content_key


def resume_fields(stage: str, config: Config) -> dict[str, Any]:
    """The fields of ``config`` that ``RESUME_RULES`` lists for ``stage``, by dotted name, as JSON values.

    Models and judges are identified by name (and weight), never by the URL they are reached at.
    """
    values: dict[str, Any] = {}
    for name in RESUME_RULES[stage]:
        if name == "policies":
            values[name] = [policy.model for policy in config.policies_resolved()]
        elif name == "panel":
            values[name] = [[judge.name, judge.model, judge.weight] for judge in config.panel_members()]
        else:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            values[name] = value
    return values


def resume_fields_hash(values: Mapping[str, Any]) -> str:
    return content_key(**dict(values))


def trained_model_name(output: Path, training: Mapping[str, Any]) -> str:
    """What the model is called that ``training`` (as in training.json) left in ``output``: another training, another
    name, so that what was measured of one is never taken for the other's."""
    steps = training.get("result", {}).get("steps")
    return f"{output.resolve().name}-{content_key(identity=training.get('identity'), steps=steps)[:8]}"


def check_resume(stage: str, before: Mapping[str, Any], now: Mapping[str, Any], *, location: str) -> None:
    """Raise :class:`ConfigMismatchError` naming every identity field that differs, or that shrank where it may only
    grow."""
    changes = []
    for name, rule in RESUME_RULES[stage].items():
        if name not in before or before[name] == now[name]:
            continue
        if rule == "may_grow" and _is_larger(before[name], now[name]):
            continue
        verb = "was" if rule == "fixed" else "may only grow: it was"
        changes.append(f"{name} {verb} {before[name]!r}, now {now[name]!r}")
    if changes:
        raise ConfigMismatchError(
            f"this run's {stage} was started with other settings: {'; '.join(changes)}",
            location=location,
            hint="Put the settings back to go on with this run, or start another one in a new directory"
            + (", or give --restart to judge it anew (old verdicts stay in the journal)." if stage == "judge" else "."),
        )


def _is_larger(before: Any, now: Any) -> bool:
    """None is no limit: larger than every number."""
    return now is None or (before is not None and now >= before)
