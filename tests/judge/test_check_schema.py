"""Checks: the result of each kind, checks that cannot be evaluated, and that a failing checker gives no score."""

from __future__ import annotations

import builtins
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.errors import MissingDependencyError, UsageError
from rlaif.judge import check_functions, check_schema, final_number, optional_modules, text_units
from rlaif.records import Failure, Verdict
from tests.conftest import needs


def run_one(checks: list[dict[str, Any]], text: str) -> Verdict | Failure:
    return check_schema.run_checks({"prompt_id": "p", "checks": checks}, {"key": "a" * 64, "text": text})


def score(checks: list[dict[str, Any]], text: str) -> float:
    verdict = run_one(checks, text)
    assert isinstance(verdict, Verdict), verdict
    assert verdict.score is not None
    return verdict.score


@pytest.mark.parametrize(
    ("kind", "fields", "met", "unmet"),
    [
        ("regex", {"pattern": r"\bsea\b"}, "by the sea.", "seaside"),
        ("regex", {"pattern": ",", "match": False}, "no comma", "a, b"),
        ("exact", {"value": "negative", "ignore_case": True}, " Negative\n", "negative."),
        ("exact", {"value": "Yes"}, "Yes", "yes"),
        ("exact", {"value": "caf\u00e9"}, "\ufeffcafe\u0301", "cafe"),
        ("number", {"value": 12}, "The answer is (12).", "With 12 boxes the total is ≈5"),
        ("number", {"value": 12}, "答案是१२。", "१३"),
        ("number", {"value": 42}, "The answer is 42.", "It is 42 or 43"),
        ("number", {"value": 1234}, "That makes 1,234 in all.", "1,235"),
        ("number", {"value": 41.84, "tolerance": 0.5}, "**41.8 km**", "43 km"),
        ("number", {"value": 50}, "About 50%.", "5%"),
        ("number", {"value": -5}, "so x = -5", "x = 5"),
        ("number", {"value": -5}, "The answer is −5.", "The answer is 5."),
        ("number", {"value": -5}, "It is **−5** °C", "It is 6 − 5 °C"),
        ("number", {"value": 1234.5}, "It is 1.2345e3.", "It is 1.2345e4."),
        ("number", {"value": 1234.5}, "It is 1.2345 × 10^3 m", "It is 1234.5 × 10^3 m"),
        ("number", {"value": 0.0015}, "1.5 · 10⁻³m", "1.5 · 10³m"),
        ("number", {"value": 0.0015}, "$1.5E−3", "$1.5"),
        ("number", {"value": 1500}, r"so $1.5 \times 10^{3}$", r"so $1.5 \times 10^{-3}$"),
        ("number", {"value": 1234.5}, "1\u202f234.5", "1\u202f235.5"),
        ("number", {"value": 1234567}, "1\u00a0234\u00a0567 people", "In 2019\u00a0567 people"),
        ("number", {"value": 4}, "A discount of 20% leaves $4", "A discount of 4% leaves $5"),
        ("number", {"value": 400}, "It grew to 400%", "A discount of 20% leaves $4"),
        ("number", {"value": -0.5}, "a change of −50%", "a change of 50%"),
        ("number", {"value": 50}, r"so $50\%$ of them", r"so $0.5$ of them, not 20%"),
        ("number", {"value": 7}, "First 3, then 4: 7 apples", "no idea"),
        ("math", {"value": r"\frac{4}{5}"}, r"We get $\frac{8}{10}$.", "I cannot say"),
        ("math", {"value": r"\frac{4}{5}"}, "it is 4/5", "it is 5/4"),
        ("math", {"value": "-5"}, "The answer is −5.", "The answer is 5."),
        ("math", {"value": "−5"}, "The answer is -5.", "The answer is 5."),
        ("math", {"value": "1234.5"}, "It is 1.2345 × 10^3.", "It is 1.2345 × 10^4."),
        ("math", {"value": r"6.02 \times 10^{23}"}, "6.02e23", "6.02"),
        ("math", {"value": r"6.02 \times 10^{23}"}, "about 6.02 × 10²³", "about 10²³"),
        ("math", {"value": "1234.5"}, "1\u202f234.5", "234.5"),
        ("math", {"value": "12"}, "The answer is (12).", "With 12 boxes the total is ≈5"),
        ("math", {"value": r"\frac{3}{4}"}, "With 5 boxes: `3/4`", "With 3/4 boxes: `5`"),
        ("math", {"value": "12"}, "الجواب ١٢", "الجواب ١٣"),
        ("math", {"value": r"\sqrt{74}"}, r"$\sqrt{74}$, so about 8.602", r"$\sqrt{75}$, so about 8.660"),
        ("math", {"value": "3"}, "so the answer is **3**", "With $x = 3$, the answer is **12**"),
        ("math", {"value": "42"}, "It is 42.", "It is 42 or 43."),
        ("math", {"value": "x^2-1"}, "It factors as $(x-1)(x+1)$", "$(x-1)^2$"),
        ("json", {"schema": {"type": "object", "required": ["fr"]}}, '```json\n{"fr": "oui"}\n```', '{"de": "ja"}'),
        ("json", {"schema": {"type": "array"}}, "[1]", "Here it is: [1]"),
        ("json", {}, '```JSON\n{"a": 1}\n```', "```JSON\n{'a': 1}\n```"),
        ("json", {}, "~~~json\n[1]\n~~~", "~~~json\n[1]\n```"),
        ("json", {}, '````\r\n{"a": "```"}\r\n````\n', '```\r\n{"a"}\r\n```'),
        ("json", {}, '\ufeff{"a": 1}', '\ufeff{"a"}'),
        ("json", {}, '{"mean": null}', '{"mean": NaN}'),
        ("json", {}, "[-1]", "[-Infinity]"),
        ("length", {"unit": "words", "min": 2, "max": 3}, "two – words", "one"),
        ("length", {"unit": "characters", "max": 3}, " abc\n", "abcd"),
        ("length", {"unit": "sentences", "min": 2, "max": 2}, "Mr. Ito ran 3.5 km. He won!", "One. Two? Three."),
        ("length", {"unit": "sentences", "min": 2, "max": 2}, "1. Sleep.\n2. Drink.", "1. Sleep."),
        ("length", {"unit": "words", "min": 4, "max": 4}, "你好世界", "你好"),
        ("length", {"unit": "words", "min": 2, "max": 2}, "สวัสดีครับ", "ฉันรักภาษาไทย"),
        ("length", {"unit": "words", "min": 3, "max": 3}, "箱が5", "箱が五個"),
        ("length", {"unit": "words", "min": 2, "max": 2}, "word—word", "word-word"),
        ("length", {"unit": "characters", "max": 2}, "e\u0301👨\u200d👩\u200d👧", "abc"),
        ("length", {"unit": "paragraphs", "max": 2}, "a\n\n---\n\nb", "a\n\nb\n\nc"),
        ("length", {"unit": "lines", "min": 2}, "a\n\nb", "a"),
        ("length", {"unit": "paragraphs", "min": 2, "max": 2}, "a\nb\n \nc", "a\nb"),
        ("language", {"value": "fr"}, "Je voudrais un café, s'il vous plaît.", "I would like a coffee, please."),
        ("language", {"value": "de"}, "Das ist gut.", "La nave è arrivata ieri sera."),
        ("language", {"value": "de"}, "Ja.", "Да."),
        ("language", {"value": "en"}, "LOL!!!", "哈哈哈"),
        ("language", {"value": "de"}, "Bis bald.", "See you soon."),
        ("language", {"value": "ja"}, "東京", "Tokyo tower"),
        ("language", {"value": "en"}, "42 👍", "Quarante-deux"),
        ("instruction", {"id": "keywords:existence", "args": {"keywords": ["sea"]}}, "The sea", "The lake"),
        ("instruction", {"id": "keywords:existence", "args": {"keywords": ["sea"], "relation": None}}, "Sea.", "No."),
        ("instruction", {"id": "punctuation:no_comma"}, "no comma", "a, b"),
        ("instruction", {"id": "count:word_count_range", "args": {"min_words": 2, "max_words": 3}}, "a b", "a"),
    ],
)
def test_each_kind_of_check(kind: str, fields: dict[str, Any], met: str, unmet: str) -> None:
    needs("math_verify")
    check = [{"kind": kind, **fields}]
    assert (score(check, met), score(check, unmet)) == (1.0, 0.0)


def test_the_score_is_the_share_of_checks_that_are_met() -> None:
    both = [{"kind": "regex", "pattern": "sea"}, {"kind": "length", "unit": "words", "max": 3}]
    assert [score(both, text) for text in ("the sea", "the sea is far away", "a hill on the far side")] == [1, 0.5, 0]
    verdict = run_one(both, "the sea is far away")
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.judge, verdict.model, verdict.b, verdict.order) == ("check", "check", "", None, None)
    assert verdict.reply == '[{"kind":"regex","met":true},{"kind":"length","met":false}]'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "regexp", "pattern": "a"}, "Did you mean 'regex'"),
        ({"pattern": "a"}, "unknown kind None"),
        ({"kind": "regex", "pattern": "("}, "invalid pattern"),
        ({"kind": "regex", "patern": "a"}, "patern"),
        ({"kind": "length", "unit": "word", "max": 3}, "unit"),
        ({"kind": "length", "unit": "words"}, "min or max"),
        ({"kind": "length", "unit": "words", "min": 3, "max": 2}, "max is below min"),
        ({"kind": "number", "value": "42"}, "value"),
        ({"kind": "math", "value": "???"}, "invalid expression '???'"),
        ({"kind": "json", "schema": {"type": "strin"}}, "invalid JSON schema"),
        ({"kind": "language", "value": "fre"}, "unknown language"),
        ({"kind": "instruction", "id": "keywords:existance"}, "Did you mean 'keywords:existence'"),
        ({"kind": "instruction", "id": "keywords:existence"}, "args need keywords"),
        ({"kind": "instruction", "id": "keywords:existence", "args": {"keywords": None}}, "args need keywords"),
        (
            {
                "kind": "instruction",
                "id": "length_constraints:number_words",
                "args": {"num_words": None, "relation": None},
            },
            "args need num_words, relation",
        ),
    ],
)
def test_an_error_in_a_check_names_prompt_and_check(bad: dict[str, Any], message: str) -> None:
    needs("math_verify")
    with pytest.raises(UsageError) as caught:
        check_schema.compile_checks([{"kind": "exact", "value": "x"}, bad], "prompt p7")
    assert message in str(caught.value)
    assert "prompt p7: check 2 cannot be evaluated" in str(caught.value)


def test_a_checker_that_is_not_installed_is_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    original_import = builtins.__import__

    def without(module: str, *_: Any) -> Any:
        if module.startswith(("math_verify", "sentencex")):
            raise ImportError(module)
        return original_import(module)

    check_schema._compile.cache_clear()
    monkeypatch.setattr(optional_modules.importlib, "import_module", without)
    for module in ("math_verify", "sentencex"):
        monkeypatch.delitem(optional_modules.sys.modules, module, raising=False)
    sentences = {"kind": "length", "unit": "sentences", "max": 1}
    for check, module in (
        ({"kind": "math", "value": "19"}, "math_verify"),
        ({"kind": "number", "value": 19}, "math_verify"),
        (sentences, "sentencex"),
    ):
        with pytest.raises(MissingDependencyError, match=rf"prompt p, check 1: .*{module}[\s\S]*\[checks\]"):
            check_schema.compile_checks([check], "prompt p")


def test_a_checker_that_fails_or_hangs_gives_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(text: str, pattern: str) -> bool:
        if "slow" in text:
            raise TimeoutError("regex timed out")
        return True

    monkeypatch.setattr(check_functions, "regex_matches", late)
    assert score([{"kind": "regex", "pattern": "a"}], "quick") == 1.0
    failure = run_one([{"kind": "length", "unit": "words", "max": 9}, {"kind": "regex", "pattern": "a"}], "slow")
    assert isinstance(failure, Failure)
    assert failure.kind == "check"
    assert "check 2 (regex) of prompt p failed: TimeoutError" in failure.error


SLOW_SCHEMA = {"properties": {"slug": {"pattern": "^([a-z]+-?)+$"}}}


# The alarm may go off inside a callback of the garbage collector, which reports the exception and drops it. The time
# limit still applies: test_a_timeout_that_a_checker_swallows_still_gives_no_score.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("check", "text"),
    [
        ({"kind": "number", "value": 4}, r"The answer is $9^{9^{9^9}}$"),
        ({"kind": "number", "value": 4}, r"$\boxed{99999999!}$"),
        ({"kind": "number", "value": 4}, r"$\sin(10^{10^{10}})$"),
        ({"kind": "math", "value": "4"}, r"The answer is $9^{9^{9^9}}$"),
        ({"kind": "math", "value": "4"}, r"$\binom{99999999}{49999999}$"),
        ({"kind": "json", "schema": SLOW_SCHEMA}, json.dumps({"slug": "a" * 60 + "!"})),
    ],
)
def test_a_check_that_never_finishes_gives_no_score(
    check: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("math_verify")
    check_schema.compile_checks([check], "prompt p")
    monkeypatch.setattr(check_functions, "TIMEOUT_S", 0.3)
    failure = run_one([check], text)
    assert isinstance(failure, Failure)
    assert "TimeoutError: takes longer than 0.3 s" in failure.error


def test_a_check_whose_value_never_finishes_cannot_be_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("math_verify")
    check_schema.compile_checks([{"kind": "math", "value": "4"}], "prompt p")
    monkeypatch.setattr(check_schema, "FIRST_CALL_TIMEOUT_S", 0.3)
    for value in (r"\binom{99999998}{49999999}", "9^{9^{9^9}}"):
        with pytest.raises(UsageError, match=r"longer than 0\.3 s"):
            check_schema.compile_checks([{"kind": "math", "value": value}], "prompt p")


def test_a_timeout_that_a_checker_swallows_still_gives_no_score() -> None:
    def swallows() -> bool:
        try:
            time.sleep(60)
        except BaseException:
            return False
        return True

    with pytest.raises(TimeoutError):
        check_functions.with_timeout(swallows, 0.1)


def test_a_time_limit_restores_an_earlier_alarm() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    old = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        assert check_functions.with_timeout(lambda: 7) == 7
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        signal.raise_signal(signal.SIGALRM)
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, *old)
        signal.signal(signal.SIGALRM, before)


def test_long_answers_are_counted_in_linear_time() -> None:
    """Each run of periods is scanned once."""
    assert text_units.count_units("." * 1_000_000 + "x", "sentences") == 1
    assert text_units.count_units("One." + "." * 1_000_000 + ' Two!?" Three', "sentences") == 3


def examples(name: str) -> list[dict[str, Any]]:
    path = Path(__file__).with_name(name)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


AMBIGUOUS_BUT_READ = [
    "42 is what you get when you multiply 6 by 7.",
    "Sum: 7\nProduct: 12",
    "The mean is 4.2 and the median is 4.",
]
"""Answers whose final number people would dispute. The last number is read, as a prompt that asks for it expects."""


def test_the_final_number_is_the_one_that_a_person_reads() -> None:
    """846 hand-written answers in nine languages. Those of the splits "held out", "second", "third" and "fourth" were
    each read once before a rule was changed for them: 254 of 260, 120 of 131, 111 of 120 and 71 of 76 were right."""
    needs("math_verify")
    rows = examples("number_examples.jsonl")
    assert len(rows) == 846
    wrong = []
    for row in rows:
        readings = final_number.final_number(row["text"], check_functions.evaluate_expression) or ()
        expected = row["number"]
        is_right = not readings if expected is None else any(math.isclose(r, expected, rel_tol=1e-9) for r in readings)
        if not is_right:
            wrong.append(row["text"])
    assert wrong == AMBIGUOUS_BUT_READ


@pytest.mark.parametrize("text", ["1" * 50_000, "(1) " * 2_000, "1? " * 2_000, "for 1 " * 2_000, "2^" * 2_000 + "2"])
def test_long_answers_have_their_final_number_read(text: str) -> None:
    needs("math_verify")
    assert score([{"kind": "number", "value": 12}], text + " so it is 12") == 1.0


def test_sentences_are_counted_as_a_person_counts_them() -> None:
    """142 hand-counted texts in ten languages. Of the split "held out", 69 of 75 were right at first sight."""
    needs("sentencex")
    rows = examples("sentence_examples.jsonl")
    assert len(rows) == 142
    wrong = [row["text"] for row in rows if text_units.count_units(row["text"], "sentences") != row["sentences"]]
    assert wrong == ["We met at 5 p.m. Then we ate."]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_answer_gets_a_score_or_a_failure(text: str) -> None:
    checks = [{"kind": "regex", "pattern": "a+b"}, {"kind": "json", "schema": {}}, {"kind": "number", "value": 3},
              {"kind": "length", "unit": "sentences", "max": 2}, {"kind": "language", "value": "en"}]  # fmt: skip
    result = run_one(checks, text)
    assert isinstance(result, Failure) or result.score in (0, 0.2, 0.4, 0.6, 0.8, 1)
