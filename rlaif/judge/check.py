"""Checks: what can be told of an answer without a model. A prompt's ``checks`` is a list of objects, each of one kind:

    {"kind": "regex", "pattern": "...", "match": true}      found anywhere; "match": false: found nowhere
    {"kind": "exact", "value": "...", "ignore_case": false}  the whole answer, space at its ends aside
    {"kind": "number", "value": 41.8, "tolerance": 0.5}      the answer's final number
    {"kind": "maths", "value": "\\frac{4}{5}"}               the answer's final expression, by math-verify
    {"kind": "json", "schema": {...}}                        the whole answer is JSON that fits the JSON schema
    {"kind": "length", "unit": "words", "min": 1, "max": 40} characters, words, sentences, lines or paragraphs
    {"kind": "language", "value": "fr"}                      ISO 639-1
    {"kind": "instruction", "id": "keywords:existence", "args": {...}}   IFEval's and IFBench's, by if-verifiable

An answer's score is the share of its prompt's checks that it meets. Where two answers differ in it, that decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rlaif.config import CHECK
from rlaif.errors import MissingPart, UsageError, did_you_mean
from rlaif.judge import checkers
from rlaif.records import Failure, Verdict, canonical, key_of

VERSION = "2"
"""Of the checkers: raised when one of them would say something else of an answer than before."""
SAMPLE = "Here are two short sentences. They only show that a check can be evaluated at all.\n\nAnd a third: 42."
FIRST_S = 60.0
"""For a check's own value and its first text, with which it may load data. Imports have no limit: some look for data
in the net, and would be broken off halfway."""

Meets = Callable[[str], bool]


class _Check(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Regex(_Check):
    kind: Literal["regex"]
    pattern: str = Field(min_length=1)
    match: bool = True

    def meets(self) -> Meets:
        import regex

        try:
            regex.compile(self.pattern, regex.V0)
        except regex.error as error:
            raise ValueError(f"pattern cannot be read: {error}") from None
        return lambda text: checkers.matches(text, self.pattern) is self.match


class Exact(_Check):
    kind: Literal["exact"]
    value: str
    ignore_case: bool = False

    def meets(self) -> Meets:
        fold: Callable[[str], str] = str.casefold if self.ignore_case else str
        return lambda text: fold(text.strip()) == fold(self.value.strip())


class Number(_Check):
    kind: Literal["number"]
    value: float
    tolerance: float = Field(default=0.0, ge=0)

    def meets(self) -> Meets:
        checkers.need("math_verify")
        return lambda text: checkers.is_number(text, self.value, self.tolerance)


class Maths(_Check):
    kind: Literal["maths"]
    value: str = Field(min_length=1)

    def meets(self) -> Meets:
        checkers.need("math_verify")
        read = checkers.limited(lambda: checkers.parsed(f"${self.value}$"), FIRST_S)
        if isinstance((read or [""])[0], str):  # its text, where it cannot be read
            raise ValueError(f"value {self.value!r} is no expression that can be read")
        return lambda text: checkers.is_maths(text, self.value)


class Json(_Check):
    kind: Literal["json"]
    wanted: dict[str, Any] = Field(default={}, alias="schema")

    def meets(self) -> Meets:
        jsonschema = checkers.need("jsonschema")
        try:
            jsonschema.validators.validator_for(self.wanted, default=jsonschema.Draft202012Validator).check_schema(
                self.wanted
            )
        except jsonschema.SchemaError as error:
            raise ValueError(f"schema is no JSON schema: {error.message}") from None
        return lambda text: checkers.fits_schema(text, self.wanted)


class Length(_Check):
    kind: Literal["length"]
    unit: checkers.Unit
    min: int | None = Field(default=None, ge=0)
    max: int | None = Field(default=None, ge=0)

    def meets(self) -> Meets:
        low, high = self.min or 0, self.max
        if self.min is None and high is None:
            raise ValueError("a length needs min or max")
        if high is not None and high < low:
            raise ValueError("max is below min")
        return lambda text: low <= checkers.count(text, self.unit) <= (float("inf") if high is None else high)


class Language(_Check):
    kind: Literal["language"]
    value: str

    def meets(self) -> Meets:
        known = checkers.languages()
        code = self.value.lower()
        if code not in known:
            raise ValueError(f"unknown language {self.value!r}. {did_you_mean(code, known)}")
        return lambda text: checkers.is_language(text, code)


class Instruction(_Check):
    kind: Literal["instruction"]
    id: str
    args: dict[str, Any] = {}

    def meets(self) -> Meets:
        known = checkers.instruction_ids()
        if self.id not in known:
            raise ValueError(f"unknown instruction {self.id!r}. {did_you_mean(self.id, known)}")
        checker = checkers.instruction(self.id, self.args)
        return lambda text: checkers.follows(checker, text)


Check = Regex | Exact | Number | Maths | Json | Length | Language | Instruction
KINDS = ("regex", "exact", "number", "maths", "json", "length", "language", "instruction")
_CHECK: TypeAdapter[Check] = TypeAdapter(Annotated[Check, Field(discriminator="kind")])


def hash_of_checkers() -> str:
    """The identity of what the checkers say: their version, and those of the packages that they stand on."""
    return _hash(VERSION)


@functools.cache
def _hash(version: str) -> str:
    import importlib.metadata

    packages = {}
    for name in ("regex", "math-verify", "jsonschema", "py3langid", "if-verifiable"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = ""
    return key_of(version=version, packages=packages)[:16]


def prepare(checks: list[dict[str, Any]], where: str) -> list[tuple[str, Meets]]:
    """What evaluates each of ``checks``, with its kind. ``where`` names the prompt.

    Raises :class:`UsageError` for a check that cannot be read or evaluated, naming it, and :class:`MissingPart`.
    """
    prepared = []
    for number, check in enumerate(checks, 1):
        try:
            prepared.append((str(check.get("kind")), _prepared(canonical(check))))
        except MissingPart as error:
            raise MissingPart(error.what, where=f"{where}, check {number}", mend=error.mend) from None
        except ValueError as error:
            raise UsageError(
                f"check {number} cannot be evaluated: {error}",
                where=where,
                mend="Mend the check in the prompt file and take the prompts into a new run.",
            ) from None
    return prepared


@functools.lru_cache(maxsize=4096)
def _prepared(told: bytes) -> Meets:
    """Many prompts have the same check. Raises ValueError, :class:`MissingPart`."""
    check = orjson.loads(told)
    kind = check.get("kind")
    if kind not in KINDS:
        raise ValueError(f"it has no kind that is known ({kind!r}). {did_you_mean(str(kind), KINDS)}")
    try:
        meets = _CHECK.validate_python(check).meets()
    except TimeoutError as error:
        raise ValueError(str(error)) from None
    except ValidationError as error:
        problems = ((".".join(map(str, problem["loc"][1:])), problem["msg"]) for problem in error.errors())
        raise ValueError("; ".join(f"{place}: {message}" for place, message in problems)) from None
    try:
        checkers.limited(lambda: meets(SAMPLE), FIRST_S)
    except LookupError as error:  # the instruction checkers read word lists that do not come with them
        told_by = next((line.strip() for line in str(error).splitlines() if "nltk.download" in line), str(error)[:200])
        raise MissingPart(f"it needs data that is not on this machine: {told_by}") from None
    except Exception as error:  # whatever a checker raises: asked here, it ends nothing that was paid for
        raise ValueError(f"it fails on a plain text ({type(error).__name__}: {str(error)[:200]})") from None
    return lambda text: checkers.limited(lambda: meets(text))


def key_for(prompt: Mapping[str, Any], completion: str) -> str:
    """The key of the check verdict of one answer."""
    return key_of(checkers=hash_of_checkers(), checks=prompt["checks"], a=completion)


def run(prompt: Mapping[str, Any], answer: Mapping[str, Any]) -> Verdict | Failure:
    """The check verdict of ``answer``, or why there is none: a checker that breaks gives no score."""
    where = f"prompt {prompt['prompt_id']}"
    met = []
    for number, (kind, meets) in enumerate(prepare(prompt["checks"], where), 1):
        try:
            met.append((kind, bool(meets(answer["text"]))))
        except Exception as error:
            return Failure(
                key=key_for(prompt, answer["key"]),
                error=f"check {number} ({kind}) of {where} broke: {type(error).__name__}: {str(error)[:200]}",
                kind="check",
                prompt_id=prompt["prompt_id"],
            )
    return Verdict(
        key=key_for(prompt, answer["key"]),
        kind="check",
        judge=CHECK,
        judge_hash=hash_of_checkers(),
        model="",
        prompt_id=prompt["prompt_id"],
        a=answer["key"],
        score=sum(good for _, good in met) / len(met),
        reply=orjson.dumps([{"kind": kind, "met": good} for kind, good in met]).decode(),
    )
