"""Functions behind the programmatic checks. Each one tests an answer's text for one condition.

They return False if the condition is not met. They raise if they fail or time out (:func:`with_timeout`), and then the
answer gets no score.
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
"""Time limit per check. Some patterns and expressions never finish on an unexpected answer."""

T = TypeVar("T")
Unit = Literal["characters", "words", "sentences", "lines", "paragraphs"]

# Abbreviations, whose period does not end a sentence: titles, common abbreviations and single letters.
ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|approx|No|Fig|Vol|Inc|Ltd|Co|e\.g|i\.e|a\.m|p\.m|U\.S|U\.K|[A-Z])\.(?=\s+\S)"
)
# Matches only at the start of a run of marks such as "...": trying each mark would take quadratic time on a long run.
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+|(?<=[^\s.!?…。！？])[ \t]*\n+")
MINUS_SIGN = str.maketrans("−", "-")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
# 1 234 567 with no-break or thin spaces, and 1,234,567.
SPACE_GROUPED_NUMBER = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:[\u00a0\u2009\u202f]\d{3})+(?!\d)")
COMMA_GROUPED_NUMBER = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])")
# 1.2e3, and 1.2 × 10^3 or 1.2 × 10³ in plain text. math-verify itself reads the LaTeX forms.
SCIENTIFIC_NUMBER = re.compile(
    r"(?<![\w.,^/])(\d++(?:\.\d++)?)"
    r"(?:[eE]([+-]?\d{1,3})(?![\w^]|\.\d)|\s*[×xX·⋅]\s*10(?:\^([+-]?\d{1,3})(?![\d^])|([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})))"
)
COMMON_LANGUAGES = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv sw ta th "
    "tr uk ur vi zh"
)
LANGUAGES = frozenset(COMMON_LANGUAGES.split())
"""Languages to distinguish, in addition to the requested one. Rarer ones would win only on very short texts."""


class _CheckTimeout(BaseException):
    """Raised by the alarm. Not an Exception, because the packages below catch that in many places."""


def with_timeout(call: Callable[[], T], seconds: float | None = None) -> T:
    """Return the result of ``call``. Raises TimeoutError after ``seconds`` (default TIMEOUT_S).

    A signal interrupts it, because Python checks for signals even during long arithmetic and regular expressions. Only
    the main thread receives signals. Checks run there; in another thread only :func:`regex_matches` has a time limit.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    seconds, late, start = seconds or TIMEOUT_S, False, time.monotonic()

    def on_alarm(*_: object) -> None:
        nonlocal late
        late = True
        raise _CheckTimeout

    previous_handler = signal.signal(signal.SIGALRM, on_alarm)
    # Repeat the alarm every second, because mpmath has an "except:" that swallows the first one.
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
        if remaining:  # restore the alarm that was set before
            signal.setitimer(signal.ITIMER_REAL, max(0.001, remaining - (time.monotonic() - start)), interval)
    if late:
        raise TimeoutError(f"takes longer than {seconds:g} s")
    return result


def count_units(text: str, unit: Unit) -> int:
    """Count the units in ``text`` without its surrounding spaces.

    Words are separated by spaces and have a letter or digit. Blank lines and paragraphs do not count. A sentence ends
    with . ! ? … or at the end of its line.
    """
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
    """Return True if ``pattern`` (in Python's syntax) matches anywhere in ``text``. Raises TimeoutError."""
    import regex

    return regex.compile(pattern, regex.V0).search(text, timeout=TIMEOUT_S) is not None


def equals_number(text: str, value: float, tolerance: float) -> bool:
    """Return True if the answer's final number is within ``tolerance`` of ``value``. "50%" counts as 50 and as 0.5."""
    text = COMMA_GROUPED_NUMBER.sub(lambda match: match[0].replace(",", ""), _normalize_numbers(text))
    text = SCIENTIFIC_NUMBER.sub(lambda match: f"{Decimal(f'{match[1]}e{_exponent(match)}'):f}", text)
    expressions = parse_math(text)
    if not expressions:
        return False
    number: Any = getattr(expressions[0], "rhs", expressions[0])  # the right-hand side of an equation
    if not getattr(number, "is_number", False):
        return False
    sympy = require_module("sympy")
    is_percentage = number.has(sympy.UnevaluatedExpr(sympy.Rational(1, 100)))  # how math-verify represents "%"
    if not (number := number.doit()).is_real:
        return False
    candidates = [float(number), 100 * float(number)] if is_percentage else [float(number)]
    return any(abs(candidate - value) <= tolerance + 1e-9 * max(1.0, abs(value)) for candidate in candidates)


def equals_math(text: str, value: str) -> bool:
    """Return True if the answer's final expression equals ``value``, in LaTeX or plain text (Kydlíček 2025)."""
    math_verify = require_module("math_verify")
    gold = parse_math(f"${value}$") or parse_math(value)
    return bool(math_verify.verify(gold, parse_math(text), timeout_seconds=None, raise_on_error=True))


def parse_math(text: str) -> list[Any]:
    """Return the final expression of ``text`` as math-verify parses it: the sympy expression, then its text. Empty if
    there is none."""
    math_verify = require_module("math_verify")
    # Its own time limit would replace our alarm, and what it raises is not an Exception. Without a limit it logs a
    # warning, once.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = SCIENTIFIC_NUMBER.sub(lambda match: f"{match[1]}*10^{_exponent(match)}", _normalize_numbers(text))
    return list(math_verify.parse(text, parsing_timeout=None, raise_on_error=True))


def _normalize_numbers(text: str) -> str:
    """Replace typographic minus signs by hyphens, and remove typographic spaces inside numbers."""
    return SPACE_GROUPED_NUMBER.sub(lambda match: re.sub(r"\D", "", match[0]), text.translate(MINUS_SIGN))


def _exponent(match: re.Match[str]) -> str:
    """Return the exponent of a SCIENTIFIC_NUMBER match, in ASCII."""
    return (match[2] or match[3] or match[4]).translate(SUPERSCRIPTS)


def parse_json(text: str) -> Any:
    """Parse ``text``, which may be in a code fence, as one JSON value.

    Raises ValueError, also for NaN and Infinity, which Python would accept.
    """

    def reject_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    fenced = re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=reject_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def matches_schema(text: str, schema: dict[str, Any]) -> bool:
    """Return True if the entire answer is JSON that follows the JSON schema. External references are not fetched."""
    jsonschema = require_module("jsonschema")
    referencing = require_module("referencing")
    try:
        value = parse_json(text)
    except ValueError:
        return False
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(validator(schema, registry=referencing.Registry()).is_valid(value))


def is_language(text: str, code: str) -> bool:
    """Return True if the language ``code`` (ISO 639-1) is at least half as probable as the most probable one.

    This margin keeps very short texts, whose words many languages share, from failing.
    """
    ranked: dict[str, float] = dict(_language_identifier(code).rank(" ".join(text.split())))
    return ranked[code] >= 0.5 * max(ranked.values())


@functools.lru_cache(maxsize=8)
def _language_identifier(code: str) -> Any:
    langid = require_module("py3langid.langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    identifier.set_languages(sorted((LANGUAGES | {code}) & set(identifier.labels)))
    return identifier


def languages() -> set[str]:
    """Return the ISO 639-1 codes of the languages that can be recognized."""
    langid = require_module("py3langid.langid")
    return set(langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE).labels)


def instruction_ids() -> set[str]:
    """Return the instruction ids of IFEval (Zhou et al. 2023, arXiv:2311.07911) and IFBench (Pyatkin et al. 2025,
    arXiv:2507.02833)."""
    return {name for source in ("ifeval", "ifbench") for name in _instruction_registry(source)}


def instruction_checker(identifier: str, args: dict[str, Any]) -> Any:
    """Return the checker of one instruction.

    Raises ValueError if ``args`` are not the arguments that it needs. The checkers themselves would choose a missing or
    null argument at random.
    """
    args = {name: value for name, value in args.items() if value is not None}  # columnar files fill gaps with nulls
    source = "ifeval" if identifier in _instruction_registry("ifeval") else "ifbench"
    checker = _instruction_registry(source)[identifier](identifier)
    try:
        checker.build_description(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error)) from None
    needed = set(checker.get_instruction_args() or {}) - {"prompt"}
    if missing := needed - set(args):
        raise ValueError(f"args need {', '.join(sorted(missing))}")
    return checker


def follows_instruction(checker: Any, text: str) -> bool:
    """Return True if ``text`` is not blank and follows the instruction of ``checker``."""
    return bool(text.strip()) and bool(checker.check_following(text))


def _instruction_registry(source: str) -> dict[str, Any]:
    require_module("if_verifiable")
    import langdetect

    langdetect.DetectorFactory.seed = 0  # its guesses are random without a seed
    registry = require_module(f"if_verifiable.{source}.instructions_registry")
    return dict(registry.INSTRUCTION_DICT)


def require_module(module: str) -> Any:
    """Import ``module``. Raises :class:`MissingDependencyError` if it is not installed."""
    if module in sys.modules:
        return sys.modules[module]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # some print that they download data
            return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(
            f"{module.split('.')[0]}, which this check needs, is not installed",
            extra="checks",
        ) from None
