"""Declaration of a setting: its metadata, and the types that several settings share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

ResumeRule = Literal["fixed", "may_grow", "retrain", "free"]
"""Permission to change a setting when a run is resumed. ``fixed``: no. ``may_grow``: only to a larger value.
``retrain``: yes, but a finished or interrupted training with the old value must be overwritten. ``free``: yes."""

METADATA = "rlaif"
"""The key under which a field's ``json_schema_extra`` holds what pydantic has no place for."""


def setting(
    default: Any,
    description: str,
    *,
    details: str = "",
    default_text: str = "",
    starter: Any = None,
    example: Any = None,
    resume: ResumeRule = "free",
    resume_key: str | None = None,
    **options: Any,
) -> Any:
    """Declare a setting.

    ``description``: a noun phrase without a full stop, with the unit; it is also the flag's help. ``details``: further
    sentences for the template and the reference. ``default_text``: what applies if the default is empty. ``starter``:
    the value that ``rlaif init`` writes. ``example``: the value that the template shows, commented, if the default is
    empty. ``resume_key``: the name under which the value is compared when a run is resumed, if it is not the setting's
    own. ``options`` go to pydantic's ``Field``.
    """
    values = {
        "details": details,
        "default_text": default_text,
        "starter": starter,
        "resume": resume,
        "resume_key": resume_key,
    }
    if example is not None:
        options["examples"] = [example]
    extra: dict[str, Any] = {METADATA: {name: value for name, value in values.items() if value}}
    return Field(default=default, description=description, json_schema_extra=extra, **options)


T = TypeVar("T")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _split_names(value: Any) -> Any:
    names = value.split(",") if isinstance(value, str) else value
    return [name.strip() if isinstance(name, str) else name for name in names] if isinstance(names, list) else names


def _reject_credentials(url: str) -> str:
    """Reject a URL with a name or password: settings are written into the manifest, so they must not hold secrets."""
    try:
        login = urlsplit(url).username or urlsplit(url).password
    except ValueError:
        login = None  # not a URL: the client reports it
    if login:
        raise ValueError("a URL must not contain a name or password: set OPENAI_API_KEY in the environment")
    return url


def _reject_api_key(options: dict[str, Any]) -> dict[str, Any]:
    if any(name.replace("-", "_") in ("api_key", "hf_token") for name in options):
        raise ValueError("a key must not be in a file; rlaif creates the server's own key at each start")
    return options


OneOrMore = Annotated[list[T], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
"""A list of strings that may be written as its only element."""
Url = Annotated[str, AfterValidator(_reject_credentials)]
VllmOptions = Annotated[dict[str, Any], AfterValidator(_reject_api_key)]
NamesOfPeople = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_split_names, json_schema_input_type=str | list[str])
]


def parse_duration_s(text: str) -> float:
    """Parse ``8h``, ``90m``, ``1h30m`` or ``45s`` into seconds. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?", text.strip())
    if not text.strip() or not match:
        raise ValueError(f"{text!r} is not a duration like 8h, 90m or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if total <= 0:
        raise ValueError(f"{text!r} must be more than 0")
    return total


def _validate_duration(text: str) -> str:
    parse_duration_s(text)
    return text


def _validate_time_of_day(text: str) -> str:
    if not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", text):
        raise ValueError(f"{text!r} is not a time of day like 07:00")
    return text


TimeOfDay = Annotated[str, AfterValidator(_validate_time_of_day)]
Duration = Annotated[str, AfterValidator(_validate_duration)]
