"""The rlaif.toml that ``rlaif init`` writes: every setting with a comment, those in use set, the others commented."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import tomlkit
from tomlkit.items import Array, InlineTable, Item, Table

from rlaif.config.catalog import Section, Setting, sections, settings

HEADER = (
    "Settings of this run. Flags override the environment (RLAIF_SECTION_KEY), which overrides this file.",
    "A commented setting shows its default, or an example if the default is empty. Uncomment it to change it.",
    "API keys do not belong here: they are read from RLAIF_API_KEY or, if that is not set, OPENAI_API_KEY.",
    "For completion in your editor, run `rlaif config schema > rlaif.schema.json` and add this line, without spaces",
    "before the colon: `# :schema rlaif.schema.json`.",
)
GROUPS = {
    "sampler.n", "judge.strategy", "judge.limit", "pairs.max_per_prompt", "pairs.human_fraction",
    "review.labels_per_pair", "review.gold", "train.lora", "train.beta", "train.learning_rate", "train.dtype",
    "train.overwrite", "train.launcher", "client.requests_per_minute", "client.timeout_s", "client.max_failures",
    "client.server_python", "run.train", "run.pilot_prompts", "run.notify_url",
}  # fmt: skip
"""The settings that have an empty line before them."""
WIDTH = 116


def render_template(values: Mapping[str, Any]) -> str:
    """Return the text of rlaif.toml with ``values`` (by section, as :class:`Config` dumps them).

    A value that differs from the default is set. A setting that ``values`` has no entry for gets its starter value, if
    it has one.
    """
    document = tomlkit.document()
    _add_comments(document, HEADER)
    by_section: dict[Section | None, list[Setting]] = {None: [], **{section: [] for section in sections()}}
    for setting in settings():
        by_section[setting.section].append(setting)
    for section, members in by_section.items():
        document.add(tomlkit.nl())
        if section is None:
            _add_settings(document, members, values)
            continue
        _add_comments(document, textwrap.wrap(section.introduction, WIDTH))
        given = values.get(section.name) or {}
        if section.is_list and given:
            tables = tomlkit.aot()
            for entry in given:
                tables.append(_table(entry))
            document.add(section.name, tables)
        elif section.is_list:
            _add_comments(document, [section.header])
            for setting in members:
                _add_comments(document, [*_explanation(setting), _line(setting.key, setting.shown)])
        else:
            table = tomlkit.table()
            _add_settings(table, members, given)
            document.add(section.name, table)
            table.trivia.indent = ""  # the header follows its introduction at once
    return tomlkit.dumps(document)


def _add_settings(container: tomlkit.TOMLDocument | Table, members: list[Setting], given: Mapping[str, Any]) -> None:
    for setting in members:
        value = given.get(setting.key, setting.starter)
        is_set = value is not None and (value != setting.default or setting.key not in given)
        if setting.name in GROUPS or setting.is_table:
            container.add(tomlkit.nl())
        _add_comments(container, _explanation(setting))
        shown = setting.shown if setting.starter is None else setting.starter
        if is_set:
            container.add(setting.key, _table(value) if setting.is_table else _item(value))
        elif setting.is_table:
            _add_comments(container, [f"[{setting.name}]", *(_line(key, item) for key, item in shown.items())])
        else:
            _add_comments(container, [_line(setting.key, shown)])


def _explanation(setting: Setting) -> list[str]:
    sentences = [f"{setting.description}."]
    if setting.details:
        sentences.append(setting.details)
    if any(f'"{choice}"' not in setting.details for choice in setting.choices):
        sentences.append(f"Values: {', '.join(map(_line_value, setting.choices))}.")
    if setting.default_text:
        sentences.append(f"Default: {setting.default_text}.")
    return textwrap.wrap(" ".join(sentences), WIDTH)


def _add_comments(container: tomlkit.TOMLDocument | Table, lines: Any) -> None:
    for line in lines:
        container.add(tomlkit.comment(line))


def _line(key: str, value: Any) -> str:
    return f"{tomlkit.key(key).as_string()} = {_line_value(value)}"


def _line_value(value: Any) -> str:
    return _item(value).as_string()


def _table(values: Mapping[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in values.items():
        if value is not None:
            table.add(key, _item(value))
    return table


def _item(value: Any) -> Item:
    """Convert a JSON value. Tables are written on one line; TOML has no null, so keys without a value are omitted."""
    if isinstance(value, Mapping):
        table: InlineTable = tomlkit.inline_table()
        for key, item in value.items():
            if item is not None:
                table.append(key, _item(item))
        return table
    if isinstance(value, list | tuple):
        array: Array = tomlkit.array()
        array.extend(_item(item) for item in value)
        return array
    scalar: Item = tomlkit.item(value)
    return scalar
