"""Arbitrary replies: an unparsable reply never becomes a label, in any output mode and for any kind of judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.config.models import Config, PanelMemberConfig
from rlaif.judge import reply_parser, runner
from rlaif.judge.judge_file import find_judge
from rlaif.judge.runner import JudgeInput, PanelJudge
from rlaif.llm import chat_protocol
from rlaif.llm.chat_protocol import ChatChoice, MalformedResponseError
from rlaif.llm.request import UnparsableReplyError

PROMPT = {"prompt_id": "p", "messages": [{"role": "user", "content": "q"}]}
ANSWERS = [{"key": "a" * 64, "text": "one"}, {"key": "b" * 64, "text": "two"}]
PANEL_JUDGES = {
    name: PanelJudge(find_judge(name), PanelMemberConfig(name=name, model="m"))
    for name in ("helpful", "quality", "refusal")
}
WORDS = {"helpful": ["A", "B"], "quality": list("12345"), "refusal": ["Refuse", "Partial", "Comply"]}

TEXTS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "A",
            "B",
            " a",
            "A is better",
            "Answer: A",
            '{"verdict": "A"}',
            '{"verdict": "C"}',
            '{"verdict": A}',
            '<think>{"verdict": "A"}</think>',
            '<think>{"verdict": "A"}',
            'x</think>{"verdict": "B"}',
            "Refuse",
            "3",
            "3.5",
            '{"verdict": "3"}',
            '{"verdict": 3}',
            '{"verdict": true}',
            '{"verdict": "Refuse"}',
            "[]",
            "null",
            "",
            '{"reasoning": "verdict: A", "verdict": ""}',
            '```json\n{"verdict": "A"}\n```',
            '{"verdict": "A"} {"verdict": "B"}',
        ]
    ),
)
TOKENS = st.one_of(
    st.none(),
    st.just([]),
    st.lists(
        st.fixed_dictionaries(
            {"token": st.one_of(st.none(), st.sampled_from(["A", "B", " A", "3", "Ref", "<think>", "The", "", "10"]))},
            optional={
                "logprob": st.one_of(st.none(), st.floats(-30, 5), st.just(float("nan"))),
                "top_logprobs": st.one_of(
                    st.none(),
                    st.lists(
                        st.fixed_dictionaries(
                            {"token": st.sampled_from(["A", "B", " b", "3", "4", "Ref", "C", "P", "The", ""]),
                             "logprob": st.one_of(st.floats(-30, 0.5), st.just(float("nan")), st.none())}
                        ),
                        max_size=5,
                    ),
                ),
            },
        ),
        max_size=2,
    ),
)  # fmt: skip


def has_verdict_word(mode: str, choice: ChatChoice, words: list[str]) -> bool:
    """Return True if the reply has one of ``words`` as its verdict, by an independent and simple implementation."""
    if mode == "json":
        text = choice.text.strip()
        if text.startswith("```"):
            text = text.removeprefix("```json").strip("`").strip()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        verdict = value.get("verdict") if isinstance(value, dict) else None
        verdict = str(verdict) if type(verdict) is int else verdict
        return isinstance(verdict, str) and verdict.strip().casefold() in {word.casefold() for word in words}
    if choice.reasoning:
        return False
    first = choice.logprobs[0] if choice.logprobs else {}
    return bool(first.get("top_logprobs"))


@settings(max_examples=1500, deadline=None)
@given(
    name=st.sampled_from(sorted(PANEL_JUDGES)),
    mode=st.sampled_from(["choice", "logprobs", "json"]),
    content=st.one_of(TEXTS, st.none()),
    reasoning=st.one_of(st.none(), TEXTS),
    tokens=TOKENS,
    finish=st.sampled_from(["stop", "length", None]),
)
def test_an_unparsable_verdict_never_becomes_a_label(
    name: str, mode: Any, content: str | None, reasoning: str | None, tokens: Any, finish: str | None
) -> None:
    judge = PANEL_JUDGES[name]
    config = Config.model_validate({"judge": {"output_mode": mode}})
    work = [JudgeInput(0, 0, 1 if name == "helpful" else None)]
    request = next(iter(runner.judge_requests(judge, mode, config, work, lambda _: PROMPT, ANSWERS.__getitem__)))
    message = {"content": content, **({"reasoning_content": reasoning} if reasoning is not None else {})}
    body = {"choices": [{"message": message, "finish_reason": finish, "logprobs": {"content": tokens}}]}
    reply = chat_protocol.parse_chat_response(body, lambda *_: 0.0)
    try:
        (verdict,) = runner._parse_verdicts(request, reply)
    except UnparsableReplyError:
        return
    assert has_verdict_word(mode, reply.choices[0], WORDS[name]), (reply, verdict)
    if mode == "json":
        assert finish != "length"
    else:
        assert verdict.verdict_mass is not None and verdict.verdict_mass >= reply_parser.MIN_MASS
    match verdict.kind:
        case "compare":
            assert verdict.prob_a is not None and 0 <= verdict.prob_a <= 1
            assert verdict.score is None and verdict.label is None
        case "rate":
            assert verdict.score is not None and 1 <= verdict.score <= 5
            assert verdict.prob_a is None and verdict.label is None
        case "classify":
            assert verdict.label in ("refuse", "partial", "comply")
            assert verdict.score is not None and 1 / 3 - 1e-9 <= verdict.score <= 1


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["probs", "data", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(JSON, st.builds(lambda data: {"data": [{"probs": data}]}, JSON)))
def test_a_reward_is_one_finite_number_or_an_error(body: Any) -> None:
    from rlaif.errors import EndpointError

    try:
        reply = chat_protocol.parse_chat_response(body, lambda *_: 0.0, endpoint_path=chat_protocol.CLASSIFY_PATH)
    except (MalformedResponseError, EndpointError):
        return
    (score,) = body["data"][0]["probs"]
    assert type(score) in (int, float)
    assert reply.score == score
    assert abs(score) < float("inf")


@pytest.mark.parametrize("name", sorted(PANEL_JUDGES))
def test_a_verdict_inside_reasoning_is_never_used(name: str) -> None:
    word = WORDS[name][0]
    inside = f'{{"verdict": "{word}"}}'
    work = [JudgeInput(0, 0, 1 if name == "helpful" else None)]
    config = Config.model_validate({"judge": {"output_mode": "json"}})
    request = next(
        iter(runner.judge_requests(PANEL_JUDGES[name], "json", config, work, lambda _: PROMPT, ANSWERS.__getitem__))
    )
    for message in ({"content": f"<think>{inside}"}, {"content": f"<think>{inside}</think>"},
                    {"content": "", "reasoning_content": inside}, {"content": None, "reasoning": inside},
                    {"content": f"{inside}</think>I cannot decide."}):  # fmt: skip
        reply = chat_protocol.parse_chat_response(
            {"choices": [{"message": message, "finish_reason": "stop"}]}, lambda *_: 0.0
        )
        with pytest.raises(UnparsableReplyError):
            runner._parse_verdicts(request, reply)
