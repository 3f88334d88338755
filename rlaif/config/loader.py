"""Where settings come from: flag > environment (RLAIF_*) > rlaif.toml > default.

Environment names are ``RLAIF_<SECTION>_<FIELD>`` (``RLAIF_SAMPLER_TEMPERATURE``; lists separated by commas; empty is
not set) and ``RLAIF_SEED``. Keys (secrets) never stand here: the client takes them from the environment by itself.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlaif.config.models import Config, ConfigSection
from rlaif.errors import UsageError
from rlaif.records import format_validation_error

CONFIG_FILE = "rlaif.toml"


def load(run: Path, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Config:
    """The settings of the run at ``run``: flags (dotted names; None means not given) over environment over rlaif.toml.

    Raises :class:`UsageError` naming the file, the field and, for a typing error, the closest name there is.
    """
    path = run / CONFIG_FILE
    return merge(read_file(path), flags, environ, str(path) if path.exists() else None)


def read_file(path: Path) -> dict[str, Any]:
    """What stands in the file at ``path``, by section; nothing where there is none. Raises as :func:`load`."""
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"not readable as TOML: {error}", location=str(path), hint="Mend that line.") from None
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", location=str(path)) from None
    _validate(values, str(path))  # a mistake in the file is reported as the file's, not as a flag's
    return values


def merge(
    values: dict[str, Any],
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    location: str | None = None,
) -> Config:
    """``flags`` over the environment over ``values`` (by section, as in rlaif.toml), which came from ``where``."""
    flags = {name: value for name, value in flags.items() if value is not None and value != []}
    from_environment = _from_environment(environ)
    overrides = {**from_environment, **flags}
    for table, names in {"policies": ["sampler.model"], "panel": ["judge.panel", "judge.model"]}.items():
        if any(name in overrides for name in names):
            values.pop(table, None)
        elif values.get(table):
            _reject_unused_base_url(table, names[-1].removesuffix(".model"), flags, from_environment, values, location)
    for name, value in overrides.items():
        _set_dotted(values, name, value)
    return _validate(values, f"{location} with flags and environment" if location else "settings")


def _reject_unused_base_url(
    table: str,
    section: str,
    flags: Mapping[str, Any],
    from_environment: Mapping[str, Any],
    values: Mapping[str, Any],
    location: str | None,
) -> None:
    """A URL that no table would use, whoever gave it: passed over, it would start a vLLM in that server's place."""
    name, variable = f"{section}.base_url", f"RLAIF_{section}".upper()
    if name in flags:
        message, hint = "--base-url", "Change it there, or give --model too."
    elif name in from_environment:
        message, hint = f"{variable}_BASE_URL", f"Unset it, or set {variable}_MODEL too."
    elif values.get(section, {}).get("base_url"):
        message, hint = f"base_url under [{section}]", f"Move it into the [[{table}]] that it is for."
    else:
        return
    raise UsageError(f"{message} does not go with [[{table}]], each of which has its own", location=location, hint=hint)


def template_text() -> str:
    """The commented rlaif.toml that ``rlaif init`` writes."""
    return (Path(__file__).resolve().parent / "template.toml").read_text(encoding="utf-8")


def render_template(values: Mapping[str, Any]) -> str:
    """The template with ``values`` (by section, as :class:`Config` dumps them) where they differ from the default.

    A setting stands where the template shows it; tables that it shows no line for stand at the end.
    """
    lines, tables, section = template_text().splitlines(), list[str](), ""
    default = Config()
    provided = {(name, field) for name, value in values.items() if isinstance(value, Mapping) for field in value}
    overrides: dict[tuple[str, str], Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            default_section = getattr(default, name)
            overrides |= {
                (name, field): setting for field, setting in value.items() if setting != getattr(default_section, field)
            }
        elif value != getattr(default, name):
            overrides["", name] = value
    for index, line in enumerate(lines):
        if line.startswith(("[", "# [")):
            section = line.removeprefix("# ").strip("[]")
        match = re.match(r"(?:# )?(\w+) = ", line)
        if match is None:
            continue
        if (section, match[1]) in overrides:
            value = overrides.pop((section, match[1]))
            lines[index] = f"# {match[1]} =" if value is None else f"{match[1]} = {_toml_value(value)}"
            if section == "iteration":
                lines[index - 1] = "[iteration]"
        elif (section, match[1]) in provided and not line.startswith("#"):
            lines[index] = f"# {line}"  # what the template sets by itself, and these settings leave alone
    for (section, field), value in overrides.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{section}.{field}]\n" + _toml_rows(value))
        elif value:  # a list of tables
            tables += [f"\n[[{field}]]\n" + _toml_rows(entry) for entry in value]
    return "\n".join([*lines, *tables]) + "\n"


def _toml_rows(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items())


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _toml_value(value: Any) -> str:
    """``value`` as TOML: JSON, but for tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, ConfigSection):
            for name, field_info in section.model_fields.items():
                text = environ.get(f"RLAIF_{field}_{name}".upper())
                if text:
                    is_list = "list" in str(field_info.annotation)
                    values[f"{field}.{name}"] = [part.strip() for part in text.split(",")] if is_list else text
        elif field == "seed" and environ.get("RLAIF_SEED"):
            values["seed"] = environ["RLAIF_SEED"]
    return values


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _validate(values: Mapping[str, Any], location: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(format_validation_error(error, Config), location=location) from None
