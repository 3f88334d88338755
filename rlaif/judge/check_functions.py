"""Functions behind the programmatic checks. Each one tests an answer's text for one condition.

They return False if the condition is not met. They raise if they fail or time out (:func:`with_timeout`), and then the
answer gets no score.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import signal
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import Any, TypeVar

from rlaif.judge.answer_text import last_latex, visible_expressions
from rlaif.judge.final_number import final_number
from rlaif.judge.optional_modules import require_module

TIMEOUT_S = 5.0
"""Time limit per check. Some patterns and expressions never finish on an unexpected answer."""

T = TypeVar("T")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
# 1 234 567 with no-break or thin spaces.
SPACE_GROUPED_NUMBER = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:[\u00a0\u2009\u202f]\d{3})+(?!\d)")
# 1.2e3, and 1.2 × 10^3 or 1.2 × 10³ in plain text. math-verify itself reads the LaTeX forms.
SCIENTIFIC_NUMBER = re.compile(
    r"(?<![\w.,^/])(\d++(?:\.\d++)?)"
    r"(?:[eE]([+-]?\d{1,3})(?![\w^]|\.\d)|\s*[×xX·⋅]\s*10(?:\^([+-]?\d{1,3})(?![\d^])|([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})))"
)
JSON_FENCE = re.compile(r"\s*(`{3,}|~{3,})[ \t]*(?:json)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*\1\s*", re.DOTALL | re.IGNORECASE)
COMMON_LANGUAGES = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv sw ta th "
    "tr uk ur vi zh"
)
LANGUAGES = frozenset(COMMON_LANGUAGES.split())
"""Languages to distinguish, in addition to the requested one. Rarer ones would win only on very short texts."""
_NON_LATIN_LANGUAGES = (
    "am ar as be bg bn dz el fa gu he hi hy ja ka kk km kn ko ky lo mk ml mn mr ne or pa ps ru si ta te th ug uk ur zh"
)
NON_LATIN_LANGUAGES = frozenset(_NON_LATIN_LANGUAGES.split())
SHORT_TEXT_LETTERS = 10
"""Texts with fewer letters than this are hard to tell apart within a script: "Ja." is a word in a dozen languages."""


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


def regex_matches(text: str, pattern: str) -> bool:
    """Return True if ``pattern`` (in Python's syntax) matches anywhere in ``text``. Raises TimeoutError."""
    import regex

    return regex.compile(pattern, regex.V0).search(text, timeout=TIMEOUT_S) is not None


def equals_number(text: str, value: float, tolerance: float) -> bool:
    """Return True if the answer's final number is within ``tolerance`` of ``value``. "50%" counts as 50 and as 0.5."""
    readings = final_number(text, evaluate_expression) or ()
    return any(abs(reading - value) <= tolerance + 1e-9 * max(1.0, abs(value)) for reading in readings)


def equals_math(text: str, value: str) -> bool:
    """Return True if the answer's final expression equals ``value``, in LaTeX or plain text (Kydlíček 2025).

    If ``value`` is a number, the answer's final number must equal it to six decimals, as in math-verify. If that number
    is only close, it may be the decimal form of the exact value before it: the last LaTeX expression counts too.
    """
    math_verify = require_module("math_verify")
    gold = parse_math(f"${value}$") or parse_math(value)
    gold_value = evaluate_expression(value)
    readings = None if gold_value is None else final_number(text, evaluate_expression)
    if gold_value is not None and readings is not None:
        if any(math.isclose(reading, gold_value, rel_tol=0.01) for reading in readings):
            exact = evaluate_expression(last_latex(text) or "")
            readings += () if exact is None else (exact,)
        return any(math.isclose(reading, gold_value, rel_tol=1e-9, abs_tol=5e-7) for reading in readings)
    return bool(math_verify.verify(gold, parse_math(text), timeout_seconds=None, raise_on_error=True))


def evaluate_expression(expression: str) -> float | None:
    """Return the value of a LaTeX expression or of an equation's right-hand side; None if it is not a real number."""
    try:
        expressions = parse_math(f"${expression}$")
        number: Any = getattr(expressions[0], "rhs", expressions[0]) if expressions else None
        if not getattr(number, "is_number", False) or not (number := number.doit()).is_real:
            return None
        return float(number)
    except Exception:  # sympy raises many; an expression that it cannot evaluate is not a number
        return None


def parse_math(text: str) -> list[Any]:
    """Return the final expression of ``text`` as math-verify parses it: the sympy expression, then its text. Empty if
    there is none."""
    math_verify = require_module("math_verify")
    # Its own time limit would replace our alarm, and what it raises is not an Exception. Without a limit it logs a
    # warning, once.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = SPACE_GROUPED_NUMBER.sub(lambda match: re.sub(r"\D", "", match[0]), visible_expressions(text))
    text = SCIENTIFIC_NUMBER.sub(lambda match: f"{match[1]}*10^{_exponent(match)}", text)
    return list(math_verify.parse(text, parsing_timeout=None, raise_on_error=True))


def _exponent(match: re.Match[str]) -> str:
    """Return the exponent of a SCIENTIFIC_NUMBER match, in ASCII."""
    return (match[2] or match[3] or match[4]).translate(SUPERSCRIPTS)


def parse_json(text: str) -> Any:
    """Parse ``text``, which may be in a code fence, as one JSON value.

    Raises ValueError, also for NaN and Infinity, which Python would accept.
    """

    def reject_constant(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = text.strip().removeprefix("\ufeff")
    fenced = JSON_FENCE.fullmatch(text)
    try:
        return json.loads(fenced[2] if fenced else text, parse_constant=reject_constant)
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

    This margin keeps very short texts, whose words many languages share, from failing. If a text has fewer than
    SHORT_TEXT_LETTERS letters, a tenth is enough for languages in its script. A text without letters has no language
    and passes.
    """
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return True
    margin = 0.5
    if len(letters) < SHORT_TEXT_LETTERS:
        is_latin = all("LATIN" in unicodedata.name(letter, "") for letter in letters)
        if code in ("ja", "zh") and all("CJK" in unicodedata.name(letter, "") for letter in letters):
            return True  # written alike
        margin = 0.1 if is_latin == (code not in NON_LATIN_LANGUAGES) else 0.5
    ranked: dict[str, float] = dict(_language_identifier(code).rank(" ".join(text.split())))
    return ranked[code] >= margin * max(ranked.values())


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
