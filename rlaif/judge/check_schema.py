"""Checks: what can be told of an answer without a model. A prompt's ``checks`` is a list of objects, each of one kind:

    {"kind": "regex", "pattern": "...", "match": true}      found anywhere; "match": false: found nowhere
    {"kind": "exact", "value": "...", "ignore_case": false}  the whole answer, space at its ends aside
    {"kind": "number", "value": 41.8, "tolerance": 0.5}      the answer's final number
    {"kind": "math", "value": "\\frac{4}{5}"}                the answer's final expression, by math-verify
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

from rlaif.config.models import CHECK_JUDGE
from rlaif.errors import MissingDependencyError, UsageError, did_you_mean
from rlaif.judge import check_functions
from rlaif.records import Failure, Verdict, canonical_json, content_key

VERSION = "2"
"""Of the checkers: raised when one of them would say something else of an answer than before."""
SAMPLE_TEXT = "Here are two short sentences. They only show that a check can be evaluated at all.\n\nAnd a third: 42."
FIRST_CALL_TIMEOUT_S = 60.0
"""For a check's own value and its first text, with which it may load data. Imports have no limit: some look for data
in the net, and would be broken off halfway."""

CheckFunction = Callable[[str], bool]


class CheckBase(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Regex(CheckBase):
    kind: Literal["regex"]
    pattern: str = Field(min_length=1)
    match: bool = True

    def build(self) -> CheckFunction:
        import regex

        try:
            regex.compile(self.pattern, regex.V0)
        except regex.error as error:
            raise ValueError(f"pattern cannot be read: {error}") from None
        return lambda text: check_functions.regex_matches(text, self.pattern) is self.match


class Exact(CheckBase):
    kind: Literal["exact"]
    value: str
    ignore_case: bool = False

    def build(self) -> CheckFunction:
        fold: Callable[[str], str] = str.casefold if self.ignore_case else str
        return lambda text: fold(text.strip()) == fold(self.value.strip())


class Number(CheckBase):
    kind: Literal["number"]
    value: float
    tolerance: float = Field(default=0.0, ge=0)

    def build(self) -> CheckFunction:
        check_functions.require_module("math_verify")
        return lambda text: check_functions.equals_number(text, self.value, self.tolerance)


class Math(CheckBase):
    kind: Literal["math"]
    value: str = Field(min_length=1)

    def build(self) -> CheckFunction:
        check_functions.require_module("math_verify")
        parsed_value = check_functions.with_timeout(
            lambda: check_functions.parse_math(f"${self.value}$"), FIRST_CALL_TIMEOUT_S
        )
        if isinstance((parsed_value or [""])[0], str):  # its text, where it cannot be read
            raise ValueError(f"value {self.value!r} is no expression that can be read")
        return lambda text: check_functions.equals_math(text, self.value)


class Json(CheckBase):
    kind: Literal["json"]
    json_schema: dict[str, Any] = Field(default={}, alias="schema")

    def build(self) -> CheckFunction:
        jsonschema = check_functions.require_module("jsonschema")
        try:
            jsonschema.validators.validator_for(self.json_schema, default=jsonschema.Draft202012Validator).check_schema(
                self.json_schema
            )
        except jsonschema.SchemaError as error:
            raise ValueError(f"schema is no JSON schema: {error.message}") from None
        return lambda text: check_functions.matches_schema(text, self.json_schema)


class Length(CheckBase):
    kind: Literal["length"]
    unit: check_functions.Unit
    min: int | None = Field(default=None, ge=0)
    max: int | None = Field(default=None, ge=0)

    def build(self) -> CheckFunction:
        low, high = self.min or 0, self.max
        if self.min is None and high is None:
            raise ValueError("a length needs min or max")
        if high is not None and high < low:
            raise ValueError("max is below min")
        return lambda text: (
            low <= check_functions.count_units(text, self.unit) <= (float("inf") if high is None else high)
        )


class Language(CheckBase):
    kind: Literal["language"]
    value: str

    def build(self) -> CheckFunction:
        languages = check_functions.languages()
        code = self.value.lower()
        if code not in languages:
            raise ValueError(f"unknown language {self.value!r}. {did_you_mean(code, languages)}")
        return lambda text: check_functions.is_language(text, code)


class Instruction(CheckBase):
    kind: Literal["instruction"]
    id: str
    args: dict[str, Any] = {}

    def build(self) -> CheckFunction:
        instruction_ids = check_functions.instruction_ids()
        if self.id not in instruction_ids:
            raise ValueError(f"unknown instruction {self.id!r}. {did_you_mean(self.id, instruction_ids)}")
        checker = check_functions.instruction_checker(self.id, self.args)
        return lambda text: check_functions.follows_instruction(checker, text)


Check = Regex | Exact | Number | Math | Json | Length | Language | Instruction
KINDS = ("regex", "exact", "number", "math", "json", "length", "language", "instruction")
_CHECK_ADAPTER: TypeAdapter[Check] = TypeAdapter(Annotated[Check, Field(discriminator="kind")])


def checks_hash() -> str:
    """The identity of what the checkers say: their version, and those of the packages that they stand on."""
    return _packages_hash(VERSION)


@functools.cache
def _packages_hash(version: str) -> str:
    import importlib.metadata

    packages = {}
    for name in ("regex", "math-verify", "jsonschema", "py3langid", "if-verifiable"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = ""
    return content_key(version=version, packages=packages)[:16]


def compile_checks(checks: list[dict[str, Any]], location: str) -> list[tuple[str, CheckFunction]]:
    """What evaluates each of ``checks``, with its kind. ``location`` names the prompt.

    Raises :class:`UsageError` for a check that cannot be read or evaluated, naming it, and
    :class:`MissingDependencyError`.
    """
    compiled = []
    for number, check in enumerate(checks, 1):
        try:
            compiled.append((str(check.get("kind")), _compile(canonical_json(check))))
        except MissingDependencyError as error:
            raise MissingDependencyError(
                error.message, location=f"{location}, check {number}", hint=error.hint
            ) from None
        except ValueError as error:
            raise UsageError(
                f"check {number} cannot be evaluated: {error}",
                location=location,
                hint="Mend the check in the prompt file and take the prompts into a new run.",
            ) from None
    return compiled


@functools.lru_cache(maxsize=4096)
def _compile(check_json: bytes) -> CheckFunction:
    """Many prompts have the same check. Raises ValueError, :class:`MissingDependencyError`."""
    check = orjson.loads(check_json)
    kind = check.get("kind")
    if kind not in KINDS:
        raise ValueError(f"it has no kind that is known ({kind!r}). {did_you_mean(str(kind), KINDS)}")
    try:
        check_function = _CHECK_ADAPTER.validate_python(check).build()
    except TimeoutError as error:
        raise ValueError(str(error)) from None
    except ValidationError as error:
        problems = ((".".join(map(str, problem["loc"][1:])), problem["msg"]) for problem in error.errors())
        raise ValueError("; ".join(f"{field}: {message}" for field, message in problems)) from None
    try:
        check_functions.with_timeout(lambda: check_function(SAMPLE_TEXT), FIRST_CALL_TIMEOUT_S)
    except LookupError as error:  # the instruction checkers read word lists that do not come with them
        reason = next((line.strip() for line in str(error).splitlines() if "nltk.download" in line), str(error)[:200])
        raise MissingDependencyError(f"it needs data that is not on this machine: {reason}") from None
    except Exception as error:  # whatever a checker raises: asked here, it ends nothing that was paid for
        raise ValueError(f"it fails on a plain text ({type(error).__name__}: {str(error)[:200]})") from None
    return lambda text: check_functions.with_timeout(lambda: check_function(text))


def check_key(prompt: Mapping[str, Any], completion: str) -> str:
    """The key of the check verdict of one answer."""
    return content_key(checkers=checks_hash(), checks=prompt["checks"], a=completion)


def run_checks(prompt: Mapping[str, Any], answer: Mapping[str, Any]) -> Verdict | Failure:
    """The check verdict of ``answer``, or why there is none: a checker that breaks gives no score."""
    location = f"prompt {prompt['prompt_id']}"
    outcomes = []
    for number, (kind, check_function) in enumerate(compile_checks(prompt["checks"], location), 1):
        try:
            outcomes.append((kind, bool(check_function(answer["text"]))))
        except Exception as error:
            return Failure(
                key=check_key(prompt, answer["key"]),
                error=f"check {number} ({kind}) of {location} broke: {type(error).__name__}: {str(error)[:200]}",
                kind="check",
                prompt_id=prompt["prompt_id"],
            )
    return Verdict(
        key=check_key(prompt, answer["key"]),
        kind="check",
        judge=CHECK_JUDGE,
        judge_hash=checks_hash(),
        model="",
        prompt_id=prompt["prompt_id"],
        a=answer["key"],
        score=sum(is_met for _, is_met in outcomes) / len(outcomes),
        reply=orjson.dumps([{"kind": kind, "met": is_met} for kind, is_met in outcomes]).decode(),
    )
