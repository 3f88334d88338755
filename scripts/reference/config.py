"""docs/reference/config.md: every setting."""

from __future__ import annotations

from itertools import groupby

from rlaif.config.catalog import Setting, settings
from scripts.reference.markdown import page, table

RESUME = {
    "fixed": "no",
    "may_grow": "only to a larger value",
    "retrain": "yes, with `train.overwrite`",
    "free": "yes",
}
INTRODUCTION = """\
All settings are in `RUN/rlaif.toml`. `rlaif init RUN` writes it with every setting and its default. A flag overrides
the environment variable, which overrides the file, which overrides the default. The variable of `sampler.temperature`
is `RLAIF_SAMPLER_TEMPERATURE`, that of `seed` is `RLAIF_SEED`; commas separate the elements of a list.

API keys are not settings. They are read from `RLAIF_API_KEY` or, if that is not set, `OPENAI_API_KEY`.

For completion and checks in an editor that uses Taplo (such as Even Better TOML), run
`rlaif config schema > rlaif.schema.json` and put `#:schema rlaif.schema.json` at the top of the file.

The last column says if a setting may change when a run is resumed. Settings that decide what the answers and verdicts
are may not, as soon as there are any; a new directory is a new run. After a change of a training setting, `rlaif train`
asks for `--overwrite`."""


def render() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for section, members in groupby(settings(), key=lambda setting: setting.section):
        if section:
            parts += [f"## `{section.header}`", section.introduction]
        parts.append(table(["key", "type", "default", "meaning", "may change on resume"], map(_row, members)))
    return page("Settings", *parts)


def _row(setting: Setting) -> list[str]:
    kind = ", ".join(f'`"{choice}"`' for choice in setting.choices) or setting.type_name
    if setting.limits:
        kind += f", {setting.limits}"
    default = (
        setting.default_shown if setting.default_text else f"`{setting.default_shown}`" if setting.default_shown else ""
    )
    if setting.default is False:
        default = "`false`"
    sentences = [f"{setting.description}.", setting.details]
    return [
        f"`{setting.key}`",
        kind,
        "required" if setting.required else default,
        " ".join(filter(None, sentences)),
        _resume_text(setting),
    ]


def _resume_text(setting: Setting) -> str:
    if setting.resume == "may_grow" and setting.section and setting.section.name == "train":
        return f"{RESUME['may_grow']}, or with `train.overwrite`"
    return RESUME[setting.resume]
