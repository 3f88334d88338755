"""Load judges. A judge is a folder with these files; it does not name a model.

    judge.toml   name, version, kind, description, reasoning = "none" | "first", and by kind:
                 "compare"   [verdicts] a, b, tie?
                 "rate"      [scale] low, high and [[aspects]] name, text
                 "classify"  [labels] refuse, partial, comply
                 "reward"    nothing: the sequence classification model returns a score
    prompt.md    "# System" and "# User" parts with {placeholders}, which are filled in one pass.
                 Optional for a reward model: a system text that precedes the conversation.
    gold.jsonl   answers with known labels, for the exam (optional)

Every change to the content of judge.toml or prompt.md changes the judge's hash, and so the keys of its verdicts.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from rlaif import resources
from rlaif.errors import UsageError, did_you_mean
from rlaif.records import content_key, format_validation_error

Kind = Literal["compare", "rate", "classify", "reward"]
CONTEXT_PLACEHOLDERS = {"conversation", "reference", "checklist"}
# Placeholders for untrusted text. They are fenced, and allowed in the user part only.
UNTRUSTED = {
    "compare": CONTEXT_PLACEHOLDERS | {"response_a", "response_b"},
    "rate": CONTEXT_PLACEHOLDERS | {"response"},
    "classify": CONTEXT_PLACEHOLDERS | {"response"},
}
TRUSTED = {"compare": {"reply"}, "rate": {"aspect", "low", "high", "reply"}, "classify": {"reply"}}
REQUIRED = {
    "compare": {"conversation", "response_a", "response_b", "reply"},
    "rate": {"conversation", "response", "aspect", "reply"},
    "classify": {"conversation", "response", "reply"},
}
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
PLACEHOLDER_LIKE = re.compile(r"\{\s*([A-Za-z0-9_-]+)\s*\}")

Word = Annotated[str, StringConstraints(pattern=r"^[^\W_]([^\n]*\S)?$")]
"""A verdict word. It begins with a letter or digit and has no surrounding spaces, because replies are stripped."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class VerdictWords(_Model):
    """The verdict words of a comparison. Their first letters differ, so that one token distinguishes them."""

    a: Word
    b: Word
    tie: Word | None = None

    @model_validator(mode="after")
    def _words_are_distinct(self) -> VerdictWords:
        _check_distinct_initials(self.words())
        return self

    def words(self) -> list[str]:
        """Return the words for a, b and, if there is one, the tie."""
        return [self.a, self.b, *([self.tie] if self.tie else [])]


class LabelWords(_Model):
    """The verdict words of a classification."""

    refuse: Word
    partial: Word
    comply: Word

    @model_validator(mode="after")
    def _words_are_distinct(self) -> LabelWords:
        _check_distinct_initials(self.words())
        return self

    def words(self) -> list[str]:
        """Return the words in the order of :data:`rlaif.records.Label`."""
        return [self.refuse, self.partial, self.comply]


def _check_distinct_initials(words: list[str]) -> None:
    initials = [word[0].casefold() for word in words]
    if len(set(initials)) < len(initials):
        raise ValueError("verdict words must differ in their first letter")


class Scale(_Model):
    """Whole-number scores from ``low`` to ``high``, of one digit each, so that one token is one score."""

    low: int = Field(default=1, ge=0, le=9)
    high: int = Field(default=5, ge=1, le=9)

    @model_validator(mode="after")
    def _high_above_low(self) -> Scale:
        if self.high <= self.low:
            raise ValueError("high must be above low")
        return self


class Aspect(_Model):
    """One aspect of a rating, which is asked separately. ``text`` fills the placeholder ``{aspect}``."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    text: str = Field(pattern=r"\S")


class JudgeFile(_Model):
    """Content of a judge.toml."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    version: str = Field(pattern=r"^\S+$")
    kind: Kind
    description: str = ""
    reasoning: Literal["none", "first"] = "none"
    verdicts: VerdictWords | None = None
    labels: LabelWords | None = None
    scale: Scale = Scale()
    aspects: list[Aspect] = []

    @model_validator(mode="after")
    def _matches_kind(self) -> JudgeFile:
        required = {"compare": "[verdicts]", "rate": "[[aspects]]", "classify": "[labels]"}.get(self.kind)
        sections = {"[verdicts]": self.verdicts, "[[aspects]]": self.aspects, "[labels]": self.labels}
        if required and not sections[required]:
            raise ValueError(f"a judge of kind {self.kind!r} needs {required}")
        if unexpected := [name for name, value in sections.items() if value and name != required]:
            raise ValueError(f"a judge of kind {self.kind!r} cannot have {unexpected[0]}")
        if self.kind == "reward" and self.reasoning != "none":
            raise ValueError("a judge of kind 'reward' cannot set reasoning")
        if len({aspect.name for aspect in self.aspects}) < len(self.aspects):
            raise ValueError("two aspects have the same name")
        return self


@dataclass(frozen=True)
class Judge:
    """A judge: its judge.toml and the two parts of its prompt. ``hash`` covers all of them, as 16 hex digits."""

    file: JudgeFile
    system: str
    user: str
    hash: str
    folder: Path

    @property
    def name(self) -> str:
        return self.file.name


def judge_folders() -> dict[str, Path]:
    """Return judge folders by name. Folders in ./judges override packaged ones of the same name."""
    local_folders = {path.parent.name: path.parent for path in sorted(Path("judges").glob("*/judge.toml"))}
    return {**resources.judges(), **local_folders}


def find_judge(name: str) -> Judge:
    """Load a judge by name or folder. Names are looked up in ./judges first and then among the packaged judges.

    Raises :class:`UsageError` with the closest existing name.
    """
    folders = judge_folders()
    if (Path(name) / "judge.toml").is_file() and (name not in folders or "/" in name):
        return load_judge(Path(name))
    if name not in folders:
        raise UsageError(
            f"unknown judge {name!r}. {did_you_mean(name, folders)}",
            hint="Give a name from `rlaif judges list`, or the path of a folder with judge.toml and prompt.md.",
        )
    return load_judge(folders[name])


def load_judge(folder: Path) -> Judge:
    """Load the judge in ``folder``. Raises :class:`UsageError` with the file and its error."""
    toml_path, prompt_path = folder / "judge.toml", folder / "prompt.md"
    try:
        file = JudgeFile.model_validate(tomllib.loads(_read_text(toml_path)))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not valid TOML: {error}", location=str(toml_path)) from None
    except ValidationError as error:
        raise UsageError(format_validation_error(error, JudgeFile), location=str(toml_path)) from None
    if file.name != folder.resolve().name:
        raise UsageError(
            f"name is {file.name!r}, but the folder is {folder.resolve().name!r}",
            location=str(toml_path),
            hint="Give both the same name. rlaif finds a judge by its folder.",
        )
    if file.kind == "reward":
        system, user = (_read_text(prompt_path).strip() if prompt_path.exists() else ""), ""
    else:
        system, user = _split_prompt(_read_text(prompt_path), file.kind, str(prompt_path))
    # Exclude defaults so that adding a new setting does not change existing judges' hashes.
    digest = content_key(file=file.model_dump(exclude_defaults=True), system=system, user=user)
    return Judge(file, system, user, digest[:16], folder)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text, at byte {error.start}", location=str(path)) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", location=str(path)) from None


def _split_prompt(text: str, kind: str, location: str) -> tuple[str, str]:
    headers = re.findall(r"^# (System|User)[ \t]*$", text, re.MULTILINE)
    match = re.fullmatch(r"\s*# System[ \t]*\n(.*?)^# User[ \t]*\n(.*)", text, re.DOTALL | re.MULTILINE)
    if not match or headers != ["System", "User"]:
        raise UsageError(
            "needs two parts, with the headings '# System' and '# User' on lines of their own, in this order",
            location=location,
        )
    system, user = match[1].strip(), match[2].strip()
    placeholders = UNTRUSTED[kind] | TRUSTED[kind]
    for candidate in PLACEHOLDER_LIKE.finditer(text):
        if candidate[0] not in {f"{{{name}}}" for name in placeholders}:
            raise UsageError(
                f"unknown placeholder {candidate[0]}. {did_you_mean(candidate[1].lower(), placeholders)}",
                location=location,
            )
    in_system = set(PLACEHOLDER.findall(system)) & UNTRUSTED[kind]
    if in_system:
        raise UsageError(
            f"{_format_names(in_system)} must not be in the system part, because it is untrusted text",
            location=location,
            hint="Move it below '# User'.",
        )
    used = PLACEHOLDER.findall(user)
    if missing := REQUIRED[kind] - set(used):
        raise UsageError(f"the user part needs {_format_names(missing)}", location=location)
    if repeated := {name for name in UNTRUSTED[kind] if used.count(name) > 1}:
        raise UsageError(f"the user part has {_format_names(repeated)} more than once", location=location)
    return system, user


def _format_names(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
