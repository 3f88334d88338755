"""The settings as data: what the template, the help of the flags, the reference and the resume rules are made of."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlaif.config.fields import METADATA, ResumeRule
from rlaif.config.models import Config, ConfigSection


@dataclass(frozen=True)
class Section:
    """A section of rlaif.toml: its name, its class, and whether it is a list of tables (``[[panel]]``)."""

    name: str
    model: type[ConfigSection]
    is_list: bool

    @property
    def header(self) -> str:
        return f"[[{self.name}]]" if self.is_list else f"[{self.name}]"

    @property
    def introduction(self) -> str:
        """The first paragraph of the class's docstring, on one line."""
        return " ".join((self.model.__doc__ or "").split("\n\n")[0].split())


@dataclass(frozen=True)
class Setting:
    """One setting. ``section`` is None for those at the top of the file. See :func:`rlaif.config.fields.setting`."""

    section: Section | None
    key: str
    annotation: Any
    limits: str
    required: bool
    default: Any
    description: str
    details: str
    default_text: str
    starter: Any
    example: Any
    resume: ResumeRule
    resume_key: str

    @property
    def name(self) -> str:
        return f"{self.section.name}.{self.key}" if self.section else self.key

    @property
    def shown(self) -> Any:
        """The value that the template shows, commented: the default, or the example if that is empty."""
        return self.example if self.required or self.default in (None, [], {}) else self.default

    @property
    def default_shown(self) -> str:
        """The default for readers: the text if there is one, otherwise the value; empty if there is neither."""
        if self.default_text or self.default is None or self.default is False or self.default in ([], {}):
            return self.default_text
        if isinstance(self.default, list):
            return ", ".join(map(str, self.default))
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)

    @property
    def help(self) -> str:
        """The help of the flag that sets it."""
        repeatable = " (repeatable)" if self.is_sequence else ""
        default = f" [default: {self.default_shown}]" if self.default_shown else ""
        return f"{self.description}{repeatable}{default}"

    @property
    def type_name(self) -> str:
        """The type of its value in TOML, for readers."""
        if self.is_sequence:
            return "list of strings"
        names: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string"}
        return "table" if self.is_table else names.get(self.annotation, "string")

    @property
    def is_table(self) -> bool:
        """True if the value is a table with options of another program."""
        return get_origin(self.annotation) is dict

    @property
    def is_sequence(self) -> bool:
        return get_origin(self.annotation) is list

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are allowed, if they are listed."""
        return get_args(self.annotation) if get_origin(self.annotation) is Literal else ()


def sections() -> Iterator[Section]:
    """Yield the sections in the order of the file."""
    for name, field in Config.model_fields.items():
        for annotation in (field.annotation, *get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, ConfigSection):
                yield Section(name, annotation, annotation is not field.annotation)


def settings() -> Iterator[Setting]:
    """Yield the settings in the order of the file."""
    by_name = {section.name: section for section in sections()}
    for name, field in Config.model_fields.items():
        if section := by_name.get(name):
            yield from (_setting(section, key, inner) for key, inner in section.model.model_fields.items())
        else:
            yield _setting(None, name, field)


def _setting(section: Section | None, key: str, field: FieldInfo) -> Setting:
    extra = field.json_schema_extra
    values: Any = extra.get(METADATA) if isinstance(extra, dict) else None
    values = values or {}
    name = f"{section.name}.{key}" if section else key
    return Setting(
        section=section,
        key=key,
        annotation=_without_none(field.annotation),
        limits=_limits(field),
        required=field.is_required(),
        default=None if field.is_required() else field.get_default(call_default_factory=True),
        description=field.description or "",
        details=values.get("details", ""),
        default_text=values.get("default_text", ""),
        starter=values.get("starter"),
        example=field.examples[0] if field.examples else None,
        resume=values.get("resume", "free"),
        resume_key=values.get("resume_key") or (section.name if section and section.is_list else name),
    )


def _limits(field: FieldInfo) -> str:
    """Return the smallest and largest number that is allowed, in words."""
    bounds = {
        name: getattr(part, name) for part in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(part, name)
    }
    low = f"{bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}" if "gt" in bounds else ""
    high = f"{bounds['le']}" if "le" in bounds else f"below {bounds['lt']}" if "lt" in bounds else ""
    return f"{low} to {high}" if low and high else f"{low} or more" if "ge" in bounds else low or high


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
