"""Parsing verdicts: a reply gives a distribution over the words, or it is unparsable. There is nothing in between."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlaif.judge import reply_parser
from rlaif.judge.reply_parser import MIN_MASS, OutputMode, verdict_distribution
from rlaif.llm.chat_protocol import ChatChoice
from rlaif.llm.request import UnparsableReplyError

AB = ["A", "B"]
SCALE = ["1", "2", "3", "4", "5"]
LONG = ["First", "Second", "Tie"]
WORDS = st.sampled_from([AB, ["A", "B", "C"], SCALE, LONG, ["x", "yes"]])


def choice(text: Any = "", logprobs: Any = None, finish: str | None = "stop") -> ChatChoice:
    return ChatChoice(text=text, reasoning=None, finish_reason=finish, logprobs=logprobs, tool_calls=None)


def tokens(*alternatives: tuple[str, float]) -> list[dict[str, Any]]:
    """The first token's alternatives, by probability."""
    top = [{"token": token, "logprob": math.log(p) if p else -9999.0} for token, p in alternatives]
    return [{**top[0], "top_logprobs": top}]


def verdict(value: Any, **more: Any) -> ChatChoice:
    return choice(json.dumps({**more, "verdict": value}))


# Arbitrary replies

ANY = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=5),
        st.sampled_from(["A", " B", "1", "First", "fi", math.nan, math.inf, -math.inf, 10**400, -(10**400)]),
    ),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["token", "logprob", "top_logprobs", "verdict", "bytes"]), inner, max_size=3),
    max_leaves=20,
)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {"token": st.sampled_from(["A", " A", '"B', "b", "1", "5", "sec", "T", "", " ", "Ünder", "\n"]) | ANY,
     "logprob": st.floats(max_value=0) | st.floats() | ANY})  # fmt: skip
TOKEN_TEXTS = st.sampled_from(["A", " A", '"B', "1", "5", "First", "sec", "x", "other"])
GOOD = st.fixed_dictionaries({"token": TOKEN_TEXTS, "logprob": st.floats(-3, 0)})


def first_token(entries: Any) -> Any:
    return entries.map(lambda top: [{"token": "A", "logprob": -0.5, "top_logprobs": top}])


LOGPROBS = st.one_of(
    ANY,
    st.lists(ANY, max_size=3),
    first_token(ANY),
    first_token(st.lists(ENTRY, max_size=6)),
    first_token(st.lists(GOOD, max_size=6)),
    first_token(st.lists(GOOD, max_size=6)),
    first_token(st.lists(GOOD | ENTRY, max_size=4)),
)
TEXT = st.one_of(
    st.text(max_size=30),
    ANY.map(lambda value: json.dumps(value, default=str)),
    ANY.map(lambda value: json.dumps({"verdict": value}, default=str)),
    WORDS.flatmap(st.sampled_from).map(lambda word: json.dumps({"verdict": word})),
    st.sampled_from(["[" * 100_000, '{"verdict":' * 50_000, '{"verdict": ' + "9" * 5000 + "}", "NaN"]),
    st.sampled_from(['{"verdict": NaN}', '{"verdict": 1e999}', "{}", "null", '{"verdict": "A"', '"A"']),
    st.just('{"verdict": "\\ud800"}'),
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(mode=st.sampled_from(["choice", "logprobs", "json"]), text=TEXT, logprobs=LOGPROBS, words=WORDS,
       finish=st.sampled_from(["stop", "length", None, "content_filter"]))  # fmt: skip
@example(mode="json", text='{"verdict": ' + "[" * 500 + "]" * 500 + "}", logprobs=None, words=AB, finish="stop")
@example(
    mode="choice",
    text="A",
    logprobs=[{"top_logprobs": [{"token": "A", "logprob": float("nan")}]}],
    words=AB,
    finish="stop",
)
@example(
    mode="choice",
    text="A",
    logprobs=[{"top_logprobs": [{"token": "A", "logprob": -(10**400)}]}],
    words=AB,
    finish="stop",
)
@example(
    mode="choice", text="A", logprobs=[{"top_logprobs": [{"token": "A", "logprob": 0.0}] * 50}], words=AB, finish="stop"
)
@example(mode="choice", text="A", logprobs=["A"], words=AB, finish="stop")
@example(mode="choice", text="A", logprobs=[{"top_logprobs": ["A"]}], words=AB, finish="stop")
def test_any_reply_is_a_distribution_or_unparsable(
    mode: OutputMode, text: str, logprobs: Any, words: list[str], finish: str | None
) -> None:
    """In all three modes and for any reply. There is never another exception or a number out of range."""
    given_logprobs = logprobs if isinstance(logprobs, list) and logprobs else None  # as the client passes them
    try:
        weights, mass = verdict_distribution(mode, choice(text, given_logprobs, finish), words)
    except UnparsableReplyError as error:
        assert 0 < len(str(error)) < 300
        return
    assert len(weights) == len(words)
    assert sum(weights) == pytest.approx(1)
    assert all(0 <= weight <= 1 for weight in weights)
    assert mass is None if mode == "json" else mass is not None and MIN_MASS <= mass <= 1


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([AB, ["A", "B", "C"], SCALE, LONG]), st.data())
def test_probabilities_are_read_unchanged(words: list[str], data: st.DataObject) -> None:
    """Any distribution over the words, with the rest on another word, listed in any order."""
    raw = data.draw(st.lists(st.floats(0.001, 1), min_size=len(words), max_size=len(words)))
    rest = data.draw(st.floats(0, 0.9))
    shares = [value / sum(raw) for value in raw]
    listed = [(word, share * (1 - rest)) for word, share in zip(words, shares, strict=True)] + [("zebra", rest)]
    reply = choice("", tokens(*data.draw(st.permutations(listed))))
    if rest > 1 - MIN_MASS + 1e-9:
        with pytest.raises(UnparsableReplyError, match="of the probability is on"):
            verdict_distribution("logprobs", reply, words)
    elif rest < 1 - MIN_MASS - 1e-9:
        weights, mass = verdict_distribution("logprobs", reply, words)
        assert weights == pytest.approx(shares, abs=1e-6)
        assert mass == pytest.approx(1 - rest, abs=1e-6)


# Words and their variants


@pytest.mark.parametrize(
    ("words", "listed", "weights"),
    [
        (AB, [("A", 0.5), (" A", 0.25), ("B", 0.125), ('"B', 0.125)], [0.75, 0.25]),
        (AB, [("\nA", 0.3), ("**A", 0.3), ("(A", 0.1), ("[B", 0.3)], [0.7, 0.3]),
        (AB, [("A", 0.5), ("a", 0.2), ("An", 0.1), ("B", 0.2)], [5 / 7, 2 / 7]),  # "a" and "An" are English words
        (["a", "b"], [("a", 0.5), ("A", 0.2), ("b", 0.3)], [5 / 8, 3 / 8]),
        (SCALE, [("5", 0.5), (" 4", 0.3), ("10", 0.1), ("3", 0.1)], [0, 0, 1 / 9, 3 / 9, 5 / 9]),
        (LONG, [("First", 0.4), ("first", 0.1), (" FIR", 0.1), ("S", 0.2), ("ti", 0.2)], [0.6, 0.2, 0.2]),
        (LONG, [("F", 0.6), ("Firstly", 0.2), ("Sec", 0.2)], [0.75, 0.25, 0]),
        (AB, [("A", 1.0), ("B", 0.0)], [1, 0]),  # a masked token has logprob -9999
    ],
)
def test_the_variants_of_a_word_are_summed(words: list[str], listed: Any, weights: list[float]) -> None:
    assert verdict_distribution("logprobs", choice("", tokens(*listed)), words)[0] == pytest.approx(weights)


def test_only_the_first_token_is_read() -> None:
    reply = choice("", [*tokens(("A", 0.8), ("B", 0.2)), *tokens(("B", 1.0))])
    assert verdict_distribution("choice", reply, AB)[0] == pytest.approx([0.8, 0.2])


def test_a_mass_below_one_half_is_unparsable() -> None:
    assert verdict_distribution("logprobs", choice("", tokens(("A", 0.3), ("B", 0.2001), ("The", 0.4))), AB)[
        1
    ] == pytest.approx(0.5001)
    with pytest.raises(UnparsableReplyError, match=r"only 0\.49 of the probability is on A, B \(reply: 'The first'\)"):
        verdict_distribution("logprobs", choice("The first", tokens(("The", 0.51), ("A", 0.4), ("B", 0.09))), AB)


@pytest.mark.parametrize(
    "logprobs",
    [None, [{"token": "A", "logprob": -0.1}], [{"token": "A", "logprob": -0.1, "top_logprobs": []}], [{}], [None]],
)
def test_a_token_without_alternatives_is_unparsable(logprobs: Any) -> None:
    """It would count as certain."""
    with pytest.raises(UnparsableReplyError, match="has no token probabilities"):
        verdict_distribution("choice", choice("A", logprobs), AB)


# JSON


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ('{"verdict": "A"}', AB, "A"),
        ('{"reasoning": "A is short. \\"B\\" is right.", "verdict": "B"}', AB, "B"),
        ('  {"verdict": " B "}\n', AB, "B"),
        ('{"verdict": "b"}', AB, "B"),
        ('{"verdict": "FIRST"}', LONG, "First"),
        ('{"verdict": "tie"}', LONG, "Tie"),
        ('{"verdict": "3"}', SCALE, "3"),
        ('{"verdict": 3}', SCALE, "3"),
        ('```json\n{"verdict": "A"}\n```', AB, "A"),
        ('```\n{"verdict": "A"}```', AB, "A"),
        ('{"verdict": "A", "verdict": "B"}', AB, "B"),
    ],
)
def test_a_json_verdict_is_parsed(text: str, words: list[str], expected: str) -> None:
    weights, mass = verdict_distribution("json", choice(text), words)
    assert weights == [float(word == expected) for word in words]
    assert mass is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("A", "not JSON"),
        ('{"verdict": "A"', "not JSON"),
        ('Here: {"verdict": "A"}', "not JSON"),
        ("{'verdict': 'A'}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"verdict": ' + "9" * 10_000 + "}", "not JSON"),
        ("[]", "not one of A, B"),
        ('"A"', "not one of A, B"),
        ("null", "not one of A, B"),
        ("{}", "not one of A, B"),
        ('{"Verdict": "A"}', "not one of A, B"),
        ('{"verdict": "C"}', "not one of A, B"),
        ('{"verdict": "AB"}', "not one of A, B"),
        ('{"verdict": "Answer A"}', "not one of A, B"),
        ('{"verdict": null}', "not one of A, B"),
        ('{"verdict": ["A"]}', "not one of A, B"),
        ('{"verdict": true}', "not one of A, B"),
        ('{"verdict": 0.5}', "not one of A, B"),
    ],
)
def test_json_without_a_verdict_word_is_unparsable(text: str, message: str) -> None:
    with pytest.raises(UnparsableReplyError, match=message) as caught:
        verdict_distribution("json", choice(text), AB)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [True, 3.0, "3.0", "6", 6, -1, "three"])
def test_json_without_a_score_of_the_scale_is_unparsable(value: Any) -> None:
    with pytest.raises(UnparsableReplyError):
        verdict_distribution("json", verdict(value), SCALE)


def test_a_truncated_reply_is_unparsable_even_if_it_is_json() -> None:
    with pytest.raises(UnparsableReplyError, match="cut off"):
        verdict_distribution("json", choice('{"verdict": "A"}', finish="length"), AB)


# Requests


@pytest.mark.parametrize("mode", ["choice", "logprobs"])
def test_modes_with_probabilities_request_one_token(mode: OutputMode) -> None:
    body = reply_parser.decoding_params(mode, AB, False, 512, 1.0)
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0, True, 20)
    assert body.get("structured_outputs") == ({"choice": AB} if mode == "choice" else None)
    assert reply_parser.reply_instruction(mode, AB, False) == "Reply with one of these and nothing else: A or B."


@pytest.mark.parametrize("reasoning", [False, True])
def test_the_json_mode_sends_a_schema(reasoning: bool) -> None:
    """The reasoning must precede the verdict, or it would only justify it."""
    body = reply_parser.decoding_params("json", LONG, reasoning, 512, 1.0)
    schema = body["response_format"]["json_schema"]["schema"]
    fields = ["reasoning", "verdict"] if reasoning else ["verdict"]
    assert list(schema["properties"]) == schema["required"] == fields
    assert schema["properties"]["verdict"]["enum"] == LONG
    assert schema["additionalProperties"] is False
    assert (body["max_tokens"], body["temperature"]) == (512, 1.0)
    instruction = reply_parser.reply_instruction("json", LONG, reasoning)
    assert "First, Second or Tie" in instruction
    assert ('"reasoning"' in instruction) is reasoning
