"""Load the settings of a run. Flags override the environment, which overrides rlaif.toml, which overrides defaults.

Environment variables are called ``RLAIF_<SECTION>_<KEY>`` (``RLAIF_SAMPLER_TEMPERATURE``), and ``RLAIF_SEED``. Commas
separate the elements of a list. An empty variable counts as not set. API keys are not settings: the client reads them
from the environment itself.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlaif.config.catalog import settings
from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.records import format_validation_error

CONFIG_FILE = "rlaif.toml"


def load(run: Path, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Config:
    """Return the settings of the run at ``run``. ``flags`` have dotted names; None means that the flag was not given.

    Raises :class:`UsageError` naming the file and the setting and, for an unknown name, the closest known one.
    """
    path = run / CONFIG_FILE
    return merge(read_file(path), flags, environ, str(path) if path.exists() else None)


def read_file(path: Path) -> dict[str, Any]:
    """Return the values in the file at ``path``, by section; empty without a file. Raises as :func:`load` does."""
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"not valid TOML: {error}", location=str(path), hint="Fix that line.") from None
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", location=str(path)) from None
    _validate(values, str(path))  # so that an error in the file is not attributed to a flag
    return values


def merge(
    values: dict[str, Any],
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    location: str | None = None,
) -> Config:
    """Return the settings that result from ``flags`` over the environment over ``values``.

    ``values`` are by section, as in rlaif.toml. ``location`` is the file that they came from. A policy or judge model
    given by flag or environment replaces ``[[policies]]`` or ``[[panel]]``. Raises as :func:`load` does.
    """
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
    """Raise :class:`UsageError` for a base_url that no table would use.

    If rlaif ignored it, it would start vLLM instead of using that server.
    """
    name, variable = f"{section}.base_url", f"RLAIF_{section}".upper()
    if name in flags:
        message, hint = "--base-url", "Change it in that table, or pass --model too."
    elif name in from_environment:
        message, hint = f"{variable}_BASE_URL", f"Unset it, or set {variable}_MODEL too."
    elif values.get(section, {}).get("base_url"):
        message, hint = f"base_url under [{section}]", f"Move it into the [[{table}]] table that it is for."
    else:
        return
    raise UsageError(
        f"{message} cannot be combined with [[{table}]], where each table has its own", location=location, hint=hint
    )


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings():
        if setting.section and setting.section.is_list:
            continue
        text = environ.get(f"RLAIF_{setting.name.replace('.', '_')}".upper())
        if text:
            values[setting.name] = [part.strip() for part in text.split(",")] if setting.is_sequence else text
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
