"""What the programmatic checks compute: each function says whether one answer meets one condition.

They look at the answer's text alone and ask no model. A condition that is not met is False; a checker that breaks or
takes too long raises (:func:`with_timeout`), and its answer gets no score.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from typing import Any, Literal, TypeVar

from rlaif.errors import MissingDependencyError

TIMEOUT_S = 5.0
"""A pattern or an expression can take for ever on an answer that was not thought of: then there is no result."""

T = TypeVar("T")
Unit = Literal["characters", "words", "sentences", "lines", "paragraphs"]

# A full stop that ends no sentence: after a title, a common abbreviation or one letter, and inside a number.
ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|approx|No|Fig|Vol|Inc|Ltd|Co|e\.g|i\.e|a\.m|p\.m|U\.S|U\.K|[A-Z])\.(?=\s+\S)"
)
# Only where a run of full stops begins: tried at each of them, a long run would take the square of its length.
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+|(?<=[^\s.!?…。！？])[ \t]*\n+")
MINUS_SIGN = str.maketrans("−", "-")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
# 1 234 567 with the spaces that typography has for it, and 1,234,567.
SPACE_GROUPED_NUMBER = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:[\u00a0\u2009\u202f]\d{3})+(?!\d)")
COMMA_GROUPED_NUMBER = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])")
# 1.2e3, and 1.2 × 10^3 or 10³ as it stands in plain text: what LaTeX has for it, math-verify reads.
SCIENTIFIC_NUMBER = re.compile(
    r"(?<![\w.,^/])(\d++(?:\.\d++)?)"
    r"(?:[eE]([+-]?\d{1,3})(?![\w^]|\.\d)|\s*[×xX·⋅]\s*10(?:\^([+-]?\d{1,3})(?![\d^])|([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})))"
)
COMMON_LANGUAGES = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv sw ta th "
    "tr uk ur vi zh"
)
LANGUAGES = frozenset(COMMON_LANGUAGES.split())
"""Languages that an answer is told apart among; the asked one joins them. Rarer ones only win on very short texts."""


class _CheckTimeout(BaseException):
    """No Exception, which the packages below catch in many places."""


def with_timeout(call: Callable[[], T], seconds: float | None = None) -> T:
    """What ``call`` gives within ``seconds`` (TIMEOUT_S). Raises TimeoutError.

    A signal ends it: Python looks for signals inside long arithmetic and its own patterns too. Only the main thread can
    have one. Checks run there; called from another thread, only :func:`regex_matches` has a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    seconds, late, start = seconds or TIMEOUT_S, False, time.monotonic()

    def on_alarm(*_: object) -> None:
        nonlocal late
        late = True
        raise _CheckTimeout

    previous_handler = signal.signal(signal.SIGALRM, on_alarm)
    # Each second again: mpmath has an "except:" that swallows the first.
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            result = call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _CheckTimeout:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
        if remaining:  # whoever had set the alarm still wants it
            signal.setitimer(signal.ITIMER_REAL, max(0.001, remaining - (time.monotonic() - start)), interval)
    if late:
        raise TimeoutError(f"it takes longer than {seconds:g} s")
    return result


def count_units(text: str, unit: Unit) -> int:
    """How many of ``unit`` are in ``text``, leading and trailing space aside. Words stand between spaces; a line or
    paragraph is one that is not blank; a sentence ends in . ! ? … or with its line."""
    text = text.strip()
    match unit:
        case "characters":
            return len(text)
        case "words":
            return sum(any(letter.isalnum() for letter in word) for word in text.split())
        case "lines":
            return sum(bool(line.strip()) for line in text.splitlines())
        case "paragraphs":
            return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))
        case "sentences":
            plain = ABBREVIATION.sub(lambda match: match[0].replace(".", ""), text)
            return sum(any(letter.isalnum() for letter in part) for part in SENTENCE_END.split(plain))


def regex_matches(text: str, pattern: str) -> bool:
    """Whether ``pattern`` (Python's syntax) is found anywhere. Raises TimeoutError."""
    import regex

    return regex.compile(pattern, regex.V0).search(text, timeout=TIMEOUT_S) is not None


def equals_number(text: str, value: float, tolerance: float) -> bool:
    """Whether the answer's final number is within ``tolerance`` of ``value``. "50%" is 50 and 0.5 alike."""
    text = COMMA_GROUPED_NUMBER.sub(lambda match: match[0].replace(",", ""), _normalize_numbers(text))
    expressions = parse_math(
        SCIENTIFIC_NUMBER.sub(lambda match: f"{Decimal(f'{match[1]}e{_exponent(match)}'):f}", text)
    )
    number: Any = (
        getattr(expressions[0], "rhs", expressions[0]) if expressions else None
    )  # of an equation, what is told
    if not getattr(number, "is_number", False):
        return False
    sympy = require_module("sympy")
    percent = number.has(sympy.UnevaluatedExpr(sympy.Rational(1, 100)))  # so math-verify reads a % behind a number
    if not (number := number.doit()).is_real:
        return False
    candidates = [float(number)] + ([100 * float(number)] if percent else [])
    return any(abs(candidate - value) <= tolerance + 1e-9 * max(1.0, abs(value)) for candidate in candidates)


def equals_math(text: str, value: str) -> bool:
    """Whether the answer's final expression equals the LaTeX or plain expression ``value`` (Kydlíček 2025)."""
    math_verify = require_module("math_verify")
    gold = parse_math(f"${value}$") or parse_math(value)
    return bool(math_verify.verify(gold, parse_math(text), timeout_seconds=None, raise_on_error=True))


def parse_math(text: str) -> list[Any]:
    """The final expression of ``text`` as math-verify reads it: sympy first, then its text; empty where there is
    none."""
    math_verify = require_module("math_verify")
    # Its own limit would take our alarm away, and what it throws is no Exception. Without one it warns, once.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = SCIENTIFIC_NUMBER.sub(lambda match: f"{match[1]}*10^{_exponent(match)}", _normalize_numbers(text))
    return list(math_verify.parse(text, parsing_timeout=None, raise_on_error=True))


def _normalize_numbers(text: str) -> str:
    """``text`` with the minus sign and the spaces inside numbers as programs write them."""
    return SPACE_GROUPED_NUMBER.sub(lambda match: re.sub(r"\D", "", match[0]), text.translate(MINUS_SIGN))


def _exponent(match: re.Match[str]) -> str:
    """The exponent of what SCIENTIFIC_NUMBER found."""
    return (match[2] or match[3] or match[4]).translate(SUPERSCRIPTS)


def parse_json(text: str) -> Any:
    """The JSON value that is all of ``text``, a code fence around it aside. Raises ValueError, also for the NaN and
    Infinity that Python would read."""

    def reject_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    fenced = re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=reject_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def matches_schema(text: str, schema: dict[str, Any]) -> bool:
    """Whether the whole answer is JSON that fits the JSON schema. Nothing that a schema refers to is fetched."""
    jsonschema = require_module("jsonschema")
    referencing = require_module("referencing")
    try:
        value = parse_json(text)
    except ValueError:
        return False
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(validator(schema, registry=referencing.Registry()).is_valid(value))


def is_language(text: str, code: str) -> bool:
    """Whether ``text`` may be in the language ``code`` (ISO 639-1): at least half as probable as the likeliest, so
    that a text of a word or two, which many languages share, is not failed for what it cannot show."""
    ranked: dict[str, float] = dict(_language_identifier(code).rank(" ".join(text.split())))
    return ranked[code] >= 0.5 * max(ranked.values())


@functools.lru_cache(maxsize=8)
def _language_identifier(code: str) -> Any:
    langid = require_module("py3langid.langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    identifier.set_languages(sorted((LANGUAGES | {code}) & set(identifier.labels)))
    return identifier


def languages() -> set[str]:
    langid = require_module("py3langid.langid")
    return set(langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE).labels)


def instruction_ids() -> set[str]:
    """Ids of IFEval's (Zhou et al. 2023, arXiv:2311.07911) and IFBench's (Pyatkin et al. 2025, arXiv:2507.02833)
    instructions."""
    return {name for source in ("ifeval", "ifbench") for name in _instruction_registry(source)}


def instruction_checker(identifier: str, args: dict[str, Any]) -> Any:
    """The checker of one instruction. Raises ValueError where ``args`` are not those that it needs: the checkers would
    draw what is missing, or null, at random."""
    args = {name: value for name, value in args.items() if value is not None}  # a table has nulls for what a row lacks
    source = "ifeval" if identifier in _instruction_registry("ifeval") else "ifbench"
    checker = _instruction_registry(source)[identifier](identifier)
    try:
        checker.build_description(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error)) from None
    needed = set(checker.get_instruction_args() or {}) - {"prompt"}
    if missing := needed - set(args):
        raise ValueError(f"args lack {', '.join(sorted(missing))}")
    return checker


def follows_instruction(checker: Any, text: str) -> bool:
    return bool(text.strip()) and bool(checker.check_following(text))


def _instruction_registry(source: str) -> dict[str, Any]:
    require_module("if_verifiable")
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it guesses anew at each call otherwise
    registry = require_module(f"if_verifiable.{source}.instructions_registry")
    return dict(registry.INSTRUCTION_DICT)


def require_module(module: str) -> Any:
    """``module``, imported. Raises :class:`MissingDependencyError` where it is not installed."""
    if module in sys.modules:
        return sys.modules[module]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # some try to fetch data, and say so
            return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(
            f"the prompts' checks need {module.split('.')[0]}, which is not installed",
            extra="checks",
        ) from None
