"""What a run is: the fields that may not change when it is resumed, as ``config.CHANGES`` lists them; and what a
trained model is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif.config import CHANGES, Config
from rlaif.errors import IdentityError
from rlaif.records import key_of


def identity(stage: str, config: Config) -> dict[str, Any]:
    """The fields of ``config`` that ``CHANGES`` lists for ``stage``, by dotted name, as JSON values.

    Models and judges are identified by name (and weight), never by the URL they are reached at.
    """
    values: dict[str, Any] = {}
    for name in CHANGES[stage]:
        if name == "policies":
            values[name] = [policy.model for policy in config.pool()]
        elif name == "judges":
            values[name] = [[seat.name, seat.model, seat.weight] for seat in config.panel()]
        else:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            values[name] = value
    return values


def identity_hash(values: Mapping[str, Any]) -> str:
    return key_of(**dict(values))


def trained_name(output: Path, training: Mapping[str, Any]) -> str:
    """What the model is called that ``training`` (as in training.json) left in ``output``: another training, another
    name, so that what was measured of one is never taken for the other's."""
    steps = training.get("result", {}).get("steps")
    return f"{output.resolve().name}-{key_of(identity=training.get('identity'), steps=steps)[:8]}"


def check_identity(stage: str, before: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Raise :class:`IdentityError` naming every identity field that differs, or that shrank where it may only grow."""
    differing = []
    for name, rule in CHANGES[stage].items():
        if name not in before or before[name] == now[name]:
            continue
        if rule == "grows" and _grew(before[name], now[name]):
            continue
        verb = "was" if rule == "identity" else "may only grow: it was"
        differing.append(f"{name} {verb} {before[name]!r}, now {now[name]!r}")
    if differing:
        raise IdentityError(
            f"this run's {stage} was started with other settings: {'; '.join(differing)}",
            where=where,
            mend="Put the settings back to go on with this run, or start another one in a new directory"
            + (", or give --restart to judge it anew (old verdicts stay in the journal)." if stage == "judge" else "."),
        )


def _grew(before: Any, now: Any) -> bool:
    """None is no limit: larger than every number."""
    return now is None or (before is not None and now >= before)
