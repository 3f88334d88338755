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

from rlaif.config import Config, Section
from rlaif.errors import UsageError
from rlaif.records import explain

FILE_NAME = "rlaif.toml"


def load(run: Path, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Config:
    """The settings of the run at ``run``: flags (dotted names; None means not given) over environment over rlaif.toml.

    Raises :class:`UsageError` naming the file, the field and, for a typing error, the closest name there is.
    """
    path = run / FILE_NAME
    return over(read(path), flags, environ, str(path) if path.exists() else None)


def read(path: Path) -> dict[str, Any]:
    """What stands in the file at ``path``, by section; nothing where there is none. Raises as :func:`load`."""
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"not readable as TOML: {error}", where=str(path), mend="Mend that line.") from None
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from None
    _build(values, str(path))  # a mistake in the file is reported as the file's, not as a flag's
    return values


def over(
    values: dict[str, Any], flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, where: str | None = None
) -> Config:
    """``flags`` over the environment over ``values`` (by section, as in rlaif.toml), which came from ``where``."""
    flags = {name: value for name, value in flags.items() if value is not None and value != []}
    surrounding = _from_environment(environ)
    given = {**surrounding, **flags}
    for tables, names in {"policies": ["sampler.model"], "judges": ["judge.judges", "judge.model"]}.items():
        if any(name in given for name in names):
            values.pop(tables, None)
        elif values.get(tables):
            _refuse_a_url_beside(tables, names[-1].removesuffix(".model"), flags, surrounding, values, where)
    for name, value in given.items():
        _put(values, name, value)
    return _build(values, f"{where} with flags and environment" if where else "settings")


def _refuse_a_url_beside(
    tables: str,
    section: str,
    flags: Mapping[str, Any],
    surrounding: Mapping[str, Any],
    values: Mapping[str, Any],
    where: str | None,
) -> None:
    """A URL that no table would use, whoever gave it: passed over, it would start a vLLM in that server's place."""
    name, variable = f"{section}.base_url", f"RLAIF_{section}".upper()
    if name in flags:
        what, mend = "--base-url", "Change it there, or give --model too."
    elif name in surrounding:
        what, mend = f"{variable}_BASE_URL", f"Unset it, or set {variable}_MODEL too."
    elif values.get(section, {}).get("base_url"):
        what, mend = f"base_url under [{section}]", f"Move it into the [[{tables}]] that it is for."
    else:
        return
    raise UsageError(f"{what} does not go with [[{tables}]], each of which has its own", where=where, mend=mend)


def template() -> str:
    """The commented rlaif.toml that ``rlaif init`` writes."""
    return (Path(__file__).resolve().parent / "template.toml").read_text(encoding="utf-8")


def filled(values: Mapping[str, Any]) -> str:
    """The template with ``values`` (by section, as :class:`Config` dumps them) where they differ from the default.

    A setting stands where the template shows it; tables that it shows no line for stand at the end.
    """
    lines, tables, section = template().splitlines(), list[str](), ""
    default = Config()
    given = {(name, field) for name, value in values.items() if isinstance(value, Mapping) for field in value}
    wanted: dict[tuple[str, str], Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            known = getattr(default, name)
            wanted |= {(name, field): inner for field, inner in value.items() if inner != getattr(known, field)}
        elif value != getattr(default, name):
            wanted["", name] = value
    for place, line in enumerate(lines):
        if line.startswith(("[", "# [")):
            section = line.removeprefix("# ").strip("[]")
        shown = re.match(r"(?:# )?(\w+) = ", line)
        if shown is None:
            continue
        if (section, shown[1]) in wanted:
            value = wanted.pop((section, shown[1]))
            lines[place] = f"# {shown[1]} =" if value is None else f"{shown[1]} = {_toml(value)}"
            if section == "round":
                lines[place - 1] = "[round]"
        elif (section, shown[1]) in given and not line.startswith("#"):
            lines[place] = f"# {line}"  # what the template sets by itself, and these settings leave alone
    for (section, field), value in wanted.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{section}.{field}]\n" + _rows(value))
        elif value:  # a list of tables
            tables += [f"\n[[{field}]]\n" + _rows(each) for each in value]
    return "\n".join([*lines, *tables]) + "\n"


def _rows(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{_key(key)} = {_toml(value)}" for key, value in table.items())


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _toml(value: Any) -> str:
    """``value`` as TOML: JSON, but for tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for inner, inner_info in section.model_fields.items():
                text = environ.get(f"RLAIF_{field}_{inner}".upper())
                if text:
                    many = "list" in str(inner_info.annotation)
                    found[f"{field}.{inner}"] = [part.strip() for part in text.split(",")] if many else text
        elif field == "seed" and environ.get("RLAIF_SEED"):
            found["seed"] = environ["RLAIF_SEED"]
    return found


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _build(values: Mapping[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, Config), where=where) from None
