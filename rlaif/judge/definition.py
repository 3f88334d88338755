"""A judge is a folder: ``judge.toml`` (what it decides) and ``prompt.md`` (how it is asked). No model stands in it.

    judge.toml   name, version, kind, description, reasoning = "none" | "first", and by kind
                 "compare"   [verdicts] a, b, tie?
                 "rate"      [scale] low, high and [[aspects]] name, text
                 "classify"  [labels] refuse, partial, comply: the words that say what an answer does
                 "reward"    nothing: a sequence-classification model gives the scalar
    prompt.md    "# System" and "# User" parts with plain {placeholders}, filled in one pass. For a reward model
                 optional: a system text that stands before the conversation
    gold.jsonl   answers with known labels, for the exam (optional)

Every change of what the two files say changes the judge's hash, and so the keys of its verdicts.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from rlaif import packaged
from rlaif.errors import UsageError, did_you_mean
from rlaif.records import explain, key_of

Kind = Literal["compare", "rate", "classify", "reward"]
# What is judged: fenced, and in the user part only.
ABOUT = {"conversation", "reference", "checklist"}
UNTRUSTED = {"compare": ABOUT | {"response_a", "response_b"}, "rate": ABOUT | {"response"},
             "classify": ABOUT | {"response"}}  # fmt: skip
TRUSTED = {"compare": {"reply"}, "rate": {"aspect", "low", "high", "reply"}, "classify": {"reply"}}
REQUIRED = {"compare": {"conversation", "response_a", "response_b", "reply"},
            "rate": {"conversation", "response", "aspect", "reply"},
            "classify": {"conversation", "response", "reply"}}  # fmt: skip
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
MEANT_AS_ONE = re.compile(r"\{\s*([A-Za-z0-9_-]+)\s*\}")

Word = Annotated[str, StringConstraints(pattern=r"^[^\W_]([^\n]*\S)?$")]
"""A verdict word: begins with a letter or a digit and has no space at its ends, as a reply is read without them."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Verdicts(Part):
    """The words by which a comparison is answered. Their first letters differ, so that a token tells them apart."""

    a: Word
    b: Word
    tie: Word | None = None

    @model_validator(mode="after")
    def _told_apart(self) -> Verdicts:
        _tell_apart(self.words())
        return self

    def words(self) -> list[str]:
        return [self.a, self.b, *([self.tie] if self.tie else [])]


class Labels(Part):
    """The words by which an answer is classified."""

    refuse: Word
    partial: Word
    comply: Word

    @model_validator(mode="after")
    def _told_apart(self) -> Labels:
        _tell_apart(self.words())
        return self

    def words(self) -> list[str]:
        """In the order of :data:`rlaif.records.Label`."""
        return [self.refuse, self.partial, self.comply]


def _tell_apart(words: list[str]) -> None:
    first = [word[0].casefold() for word in words]
    if len(set(first)) < len(first):
        raise ValueError("verdict words must differ in their first letter")


class Scale(Part):
    """Whole scores from ``low`` to ``high``, one digit each, so that one token is one score."""

    low: int = Field(default=1, ge=0, le=9)
    high: int = Field(default=5, ge=1, le=9)

    @model_validator(mode="after")
    def _has_room(self) -> Scale:
        if self.high <= self.low:
            raise ValueError("high must be above low")
        return self


class Aspect(Part):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    text: str = Field(pattern=r"\S")


class JudgeFile(Part):
    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    version: str = Field(pattern=r"^\S+$")
    kind: Kind
    description: str = ""
    reasoning: Literal["none", "first"] = "none"
    verdicts: Verdicts | None = None
    labels: Labels | None = None
    scale: Scale = Scale()
    aspects: list[Aspect] = []

    @model_validator(mode="after")
    def _fits_its_kind(self) -> JudgeFile:
        needs = {"compare": "[verdicts]", "rate": "[[aspects]]", "classify": "[labels]"}.get(self.kind)
        given = {"[verdicts]": self.verdicts, "[[aspects]]": self.aspects, "[labels]": self.labels}
        if needs and not given[needs]:
            raise ValueError(f"a judge of kind {self.kind} needs {needs}")
        if other := [name for name, value in given.items() if value and name != needs]:
            raise ValueError(f"a judge of kind {self.kind} has no {other[0]}")
        if self.kind == "reward" and self.reasoning != "none":
            raise ValueError("a reward model does not reason")
        if len({aspect.name for aspect in self.aspects}) < len(self.aspects):
            raise ValueError("two aspects have one name")
        return self


@dataclass(frozen=True)
class Judge:
    """A judge file and its prompt. ``hash`` is the identity of both, 16 hex digits."""

    file: JudgeFile
    system: str
    user: str
    hash: str
    folder: Path

    @property
    def name(self) -> str:
        return self.file.name


def folders() -> dict[str, Path]:
    """Judge folders by name: the packaged ones, and over them those in ./judges."""
    here = {path.parent.name: path.parent for path in sorted(Path("judges").glob("*/judge.toml"))}
    return {**packaged.judges(), **here}


def find(name: str) -> Judge:
    """The judge called ``name``: a folder's path, ``judges/NAME`` where the command is given, or a packaged one.

    Raises :class:`UsageError`, with the closest name there is.
    """
    known = folders()
    if (Path(name) / "judge.toml").is_file() and (name not in known or "/" in name):
        return load(Path(name))
    if name not in known:
        raise UsageError(
            f"there is no judge {name!r}. {did_you_mean(name, known)}",
            mend="A judge is a folder with judge.toml and prompt.md, in ./judges or given by its path.",
        )
    return load(known[name])


def load(folder: Path) -> Judge:
    """The judge in ``folder``. Raises :class:`UsageError` naming the file and what is wrong in it."""
    settings, prompt = folder / "judge.toml", folder / "prompt.md"
    try:
        file = JudgeFile.model_validate(tomllib.loads(_read(settings)))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not readable as TOML: {error}", where=str(settings)) from None
    except ValidationError as error:
        raise UsageError(explain(error, JudgeFile), where=str(settings)) from None
    if file.name != folder.resolve().name:
        raise UsageError(f"the judge is called {file.name!r} but its folder {folder.resolve().name!r}",
                         where=str(settings), mend="Give both one name: a judge is found by its folder.")  # fmt: skip
    if file.kind == "reward":
        system, user = (_read(prompt).strip() if prompt.exists() else ""), ""
    else:
        system, user = _parts(_read(prompt), file.kind, str(prompt))
    # Without what is not set, so that a setting that comes later leaves the judges of today as they are.
    digest = key_of(file=file.model_dump(exclude_defaults=True), system=system, user=user)
    return Judge(file, system, user, digest[:16], folder)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text, at byte {error.start}", where=str(path)) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _parts(text: str, kind: str, where: str) -> tuple[str, str]:
    heads = re.findall(r"^# (System|User)[ \t]*$", text, re.MULTILINE)
    found = re.fullmatch(r"\s*# System[ \t]*\n(.*?)^# User[ \t]*\n(.*)", text, re.DOTALL | re.MULTILINE)
    if not found or heads != ["System", "User"]:
        raise UsageError(
            "a prompt has two parts, headed by lines that say '# System' and '# User', in this order", where=where
        )
    system, user = found[1].strip(), found[2].strip()
    known = UNTRUSTED[kind] | TRUSTED[kind]
    for meant in MEANT_AS_ONE.finditer(text):
        if meant[0] not in {f"{{{name}}}" for name in known}:
            raise UsageError(f"unknown placeholder {meant[0]}. {did_you_mean(meant[1].lower(), known)}", where=where)
    in_system = set(PLACEHOLDER.findall(system)) & UNTRUSTED[kind]
    if in_system:
        raise UsageError(f"{_listed(in_system)} cannot stand in the system part: what is judged is no instruction",
                         where=where, mend="Move it below '# User'.")  # fmt: skip
    used = PLACEHOLDER.findall(user)
    if missing := REQUIRED[kind] - set(used):
        raise UsageError(f"the user part lacks {_listed(missing)}", where=where)
    if twice := {name for name in UNTRUSTED[kind] if used.count(name) > 1}:
        raise UsageError(f"the user part has {_listed(twice)} more than once", where=where)
    return system, user


def _listed(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
