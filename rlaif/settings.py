"""Where settings come from: flag > environment (RLAIF_*) > rlaif.toml > default.

Environment names are ``RLAIF_<SECTION>_<FIELD>`` (``RLAIF_SAMPLER_TEMPERATURE``; lists separated by commas; empty is
not set) and ``RLAIF_SEED``. Keys (secrets) never stand here: the client takes them from the environment by itself.
"""

from __future__ import annotations

import os
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
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"not readable as TOML: {error}", where=str(path), mend="Mend that line.") from None
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from None
    _build(values, str(path))  # a mistake in the file is reported as the file's, not as a flag's
    flags = {name: value for name, value in flags.items() if value is not None and value != []}
    given = {**_from_environment(environ), **flags}
    for tables, names in {"policies": ["sampler.model"], "judges": ["judge.judges", "judge.model"]}.items():
        if any(name in given for name in names):
            values.pop(tables, None)
        elif tables in values and names[-1].replace("model", "base_url") in flags:
            raise UsageError(
                f"--base-url does not go with [[{tables}]], each of which has its own",
                where=str(path),
                mend="Change it there, or give --model too.",
            )
    for name, value in given.items():
        _put(values, name, value)
    return _build(values, f"{path} with flags and environment" if path.exists() else "settings")


def template() -> str:
    """The commented rlaif.toml that ``rlaif init`` writes."""
    return (Path(__file__).resolve().parent / "template.toml").read_text(encoding="utf-8")


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
