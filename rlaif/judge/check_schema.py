"""Programmatic checks, which need no model. A prompt's ``checks`` is a list of objects, each of one kind:

    {"kind": "regex", "pattern": "...", "match": true}       matches anywhere; "match": false: matches nowhere
    {"kind": "exact", "value": "...", "ignore_case": false}  the entire answer, without surrounding spaces
    {"kind": "number", "value": 41.8, "tolerance": 0.5}      the answer's final number (rlaif.judge.final_number)
    {"kind": "math", "value": "\\frac{4}{5}"}                the answer's final expression, by math-verify
    {"kind": "json", "schema": {...}}                        the entire answer is JSON that follows the JSON schema
    {"kind": "length", "unit": "words", "min": 1, "max": 40} characters, words, sentences, lines or paragraphs
                                                             (rlaif.judge.text_units)
    {"kind": "language", "value": "fr"}                      ISO 639-1; met if the answer is too short to tell
    {"kind": "instruction", "id": "keywords:existence", "args": {...}}   of IFEval or IFBench, by if-verifiable

An answer's score is the share of its prompt's checks that it meets. If two answers have different scores, the scores
decide which one is better.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rlaif.config.models import CHECK_JUDGE
from rlaif.errors import MissingDependencyError, UsageError, did_you_mean
from rlaif.judge import check_functions, text_units
from rlaif.judge.optional_modules import require_module
from rlaif.records import Failure, Verdict, canonical_json, content_key

VERSION = "3"
"""Version of the check functions. It is raised whenever one of them would judge some answer differently."""
SAMPLE_TEXT = "Here are two short sentences. They only show that a check can be evaluated at all.\n\nAnd a third: 42."
FIRST_CALL_TIMEOUT_S = 60.0
"""Time limit for parsing a check's value and for its first text, which may load data. Imports have no limit: some
download data, and interrupting them would leave it incomplete."""

CheckFunction = Callable[[str], bool]


class CheckBase(BaseModel):
    """Base of all checks. ``build`` returns the function that tests an answer, or raises ValueError or
    :class:`MissingDependencyError`."""

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
            raise ValueError(f"invalid pattern: {error}") from None
        return lambda text: check_functions.regex_matches(text, self.pattern) is self.match


class Exact(CheckBase):
    kind: Literal["exact"]
    value: str
    ignore_case: bool = False

    def build(self) -> CheckFunction:
        fold: Callable[[str], str] = str.casefold if self.ignore_case else str

        def plain(text: str) -> str:  # an accented letter is one character or two, and looks the same
            return fold(unicodedata.normalize("NFC", text.strip().strip("\ufeff").strip()))

        return lambda text: plain(text) == plain(self.value)


class Number(CheckBase):
    kind: Literal["number"]
    value: float
    tolerance: float = Field(default=0.0, ge=0)

    def build(self) -> CheckFunction:
        require_module("math_verify")
        return lambda text: check_functions.equals_number(text, self.value, self.tolerance)


class Math(CheckBase):
    kind: Literal["math"]
    value: str = Field(min_length=1)

    def build(self) -> CheckFunction:
        require_module("math_verify")
        expressions = check_functions.with_timeout(
            lambda: check_functions.parse_math(f"${self.value}$"), FIRST_CALL_TIMEOUT_S
        )
        if not expressions or isinstance(expressions[0], str):  # math-verify returns text that it cannot parse
            raise ValueError(f"invalid expression {self.value!r}")
        return lambda text: check_functions.equals_math(text, self.value)


class Json(CheckBase):
    kind: Literal["json"]
    json_schema: dict[str, Any] = Field(default={}, alias="schema")

    def build(self) -> CheckFunction:
        jsonschema = require_module("jsonschema")
        validator = jsonschema.validators.validator_for(self.json_schema, default=jsonschema.Draft202012Validator)
        try:
            validator.check_schema(self.json_schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"invalid JSON schema: {error.message}") from None
        return lambda text: check_functions.matches_schema(text, self.json_schema)


class Length(CheckBase):
    kind: Literal["length"]
    unit: text_units.Unit
    min: int | None = Field(default=None, ge=0)
    max: int | None = Field(default=None, ge=0)

    def build(self) -> CheckFunction:
        if self.min is None and self.max is None:
            raise ValueError("needs min or max")
        if self.unit == "sentences":
            require_module("sentencex")
            require_module("py3langid.langid")
        low = 0 if self.min is None else self.min
        high = math.inf if self.max is None else self.max
        if high < low:
            raise ValueError("max is below min")
        return lambda text: low <= text_units.count_units(text, self.unit) <= high


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
    """Return a hash of the version of the check functions and of the packages they use."""
    return _packages_hash(VERSION)


@functools.cache
def _packages_hash(version: str) -> str:
    import importlib.metadata

    packages = {}
    for name in ("regex", "math-verify", "jsonschema", "py3langid", "sentencex", "if-verifiable"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = ""
    return content_key(version=version, packages=packages)[:16]


def compile_checks(checks: list[dict[str, Any]], location: str) -> list[tuple[str, CheckFunction]]:
    """Return the kind and the function of each check. ``location`` names the prompt in errors.

    Raises :class:`UsageError` for a check that is invalid or cannot run, and :class:`MissingDependencyError`.
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
                hint="Fix the check in the prompt file, and ingest the prompts into a new run.",
            ) from None
    return compiled


@functools.lru_cache(maxsize=4096)
def _compile(check_json: bytes) -> CheckFunction:
    """Return the function of a check. Cached, because many prompts have the same check.

    Raises ValueError or :class:`MissingDependencyError`.
    """
    check = orjson.loads(check_json)
    kind = check.get("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}. {did_you_mean(str(kind), KINDS)}")
    try:
        check_function = _CHECK_ADAPTER.validate_python(check).build()
    except TimeoutError as error:
        raise ValueError(str(error)) from None
    except ValidationError as error:
        problems = ((".".join(map(str, problem["loc"][1:])), problem["msg"]) for problem in error.errors())
        raise ValueError("; ".join(f"{field}: {message}" for field, message in problems)) from None
    try:
        check_functions.with_timeout(lambda: check_function(SAMPLE_TEXT), FIRST_CALL_TIMEOUT_S)
    except LookupError as error:  # some instruction checkers read NLTK word lists, which are installed separately
        reason = next((line.strip() for line in str(error).splitlines() if "nltk.download" in line), str(error)[:200])
        raise MissingDependencyError(f"data that the check needs is not installed: {reason}") from None
    except Exception as error:  # a checker may raise anything; this trial run finds it before any request is paid for
        raise ValueError(f"fails on a plain text ({type(error).__name__}: {str(error)[:200]})") from None
    return lambda text: check_functions.with_timeout(lambda: check_function(text))


def check_key(prompt: Mapping[str, Any], completion: str) -> str:
    """Return the key of the check verdict of an answer. ``completion`` is the answer's key."""
    return content_key(checkers=checks_hash(), checks=prompt["checks"], a=completion)


def run_checks(prompt: Mapping[str, Any], answer: Mapping[str, Any]) -> Verdict | Failure:
    """Run the prompt's checks on ``answer``. Returns a failure instead of a verdict if a check raises or times out."""
    location = f"prompt {prompt['prompt_id']}"
    outcomes = []
    for number, (kind, check_function) in enumerate(compile_checks(prompt["checks"], location), 1):
        try:
            outcomes.append((kind, bool(check_function(answer["text"]))))
        except Exception as error:
            return Failure(
                key=check_key(prompt, answer["key"]),
                error=f"check {number} ({kind}) of {location} failed: {type(error).__name__}: {str(error)[:200]}",
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
