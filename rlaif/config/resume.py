"""The settings that may not change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif.config.catalog import settings
from rlaif.config.fields import ResumeRule
from rlaif.config.models import Config
from rlaif.errors import ConfigMismatchError
from rlaif.records import content_key

STAGES_BY_SECTION = {
    "seed": ("generate", "judge"),
    "prompts": ("generate",),
    "sampler": ("generate",),
    "policies": ("generate",),
    "judge": ("judge",),
    "panel": ("judge",),
}
"""The stages whose records depend on the fixed and growing settings of a section."""


def _resume_rules() -> dict[str, dict[str, ResumeRule]]:
    rules: dict[str, dict[str, ResumeRule]] = {"generate": {}, "judge": {}}
    for setting in settings():
        if setting.resume in ("fixed", "may_grow"):
            for stage in STAGES_BY_SECTION.get(setting.section.name if setting.section else setting.key, ()):
                rules[stage][setting.resume_key] = setting.resume
    return rules


RESUME_RULES = _resume_rules()
"""Settings that may not change, or may only grow, when a run is resumed: by stage, then by name. ``policies`` and
``panel`` are those resolved. Settings not listed may change freely.
"""


def resume_fields(stage: str, config: Config) -> dict[str, Any]:
    """Return the values of the settings that ``RESUME_RULES`` lists for ``stage``, by name, as JSON values.

    Models and judges are identified by name (and weight), never by the URL at which they are served.
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
    """Return the hash of what :func:`resume_fields` returned."""
    return content_key(**dict(values))


def check_resume(stage: str, before: Mapping[str, Any], now: Mapping[str, Any], *, location: str) -> None:
    """Raise :class:`ConfigMismatchError` naming every setting that changed, or that shrank and may only grow."""
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
            f"stage {stage!r} of this run was started with other settings: {'; '.join(changes)}",
            location=location,
            hint="Restore these settings to resume this run, or use a new directory"
            + (
                ", or pass --restart to judge again (earlier verdicts stay in the journal)."
                if stage == "judge"
                else "."
            ),
        )


def _is_larger(before: Any, now: Any) -> bool:
    """Return whether ``now`` is at least ``before``. None means no limit, so it is larger than every number."""
    return now is None or (before is not None and now >= before)
