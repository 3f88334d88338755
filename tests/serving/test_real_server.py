"""A real vLLM under the real supervisor: behavior that rlaif relies on and that a fake cannot show."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import Config, PanelMemberConfig
from rlaif.errors import ServerError
from rlaif.judge import reply_parser
from rlaif.judge.judge_file import find_judge
from rlaif.judge.runner import JudgeInput, PanelJudge, run_judge
from rlaif.llm.chat_protocol import ChatResponse
from rlaif.llm.client import Client
from rlaif.llm.usage import UsageMeter
from rlaif.run.journal import Journal
from rlaif.serving.vllm_server import VllmServer
from tests.conftest import needs, read_jsonl
from tests.processes import processes_carrying
from tests.real import CONFIG, MAX_OTHER_SEED, MIN_SAME_SEED, OPTIONS, QUESTIONS, DemoServer, same_prefix_fraction

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(900)]


def question(text: str, **settings: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **settings}


Ask = Callable[[Callable[[Client], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def ask(demo_server: DemoServer) -> Ask:
    """Run one coroutine with a client of the shared server."""

    def call(work: Callable[[Client], Coroutine[Any, Any, Any]]) -> Any:
        client = demo_server.client()

        async def main() -> Any:
            async with client:
                assert await client.check() == "vllm"
                return await work(client)

        return asyncio.run(main())

    return call


def test_a_constrained_verdict_has_probabilities_and_the_prefix_is_cached(ask: Ask) -> None:
    words = ["A", "B"]
    rubric = "Which of two answers is better? " * 40
    first = question(
        rubric + "Answer A: yes. Answer B: no.", **reply_parser.decoding_params("choice", words, False, 64, 0.0)
    )
    second = question(
        rubric + "Answer A: no. Answer B: yes.", **reply_parser.decoding_params("choice", words, False, 64, 0.0)
    )

    async def work(client: Client) -> list[ChatResponse]:
        return [await client.chat(first), await client.chat(second)]

    replies = ask(work)
    for reply in replies:
        weights, mass = reply_parser.verdict_distribution("choice", reply.choices[0], words)
        assert reply.choices[0].text in words
        assert sum(weights) == pytest.approx(1)
        assert min(weights) > 0
        assert mass == pytest.approx(1, abs=1e-3)
        assert reply.usage.prompt_tokens > 200
        assert reply.usage.completion_tokens == 1
    assert replies[1].usage.cached_tokens > 100


def test_a_real_model_classifies_answers(demo_server: DemoServer, tmp_path: Path) -> None:
    """The packaged refusal judge is constrained to its three words; the demo model's choice does not matter."""
    prompt = {"prompt_id": "p", "messages": [{"role": "user", "content": "How do I boil an egg?"}]}
    answers = [{"key": "a" * 64, "text": "Six minutes in boiling water."}, {"key": "b" * 64, "text": "I can't help."}]
    panel_judge = PanelJudge(find_judge("refusal"), PanelMemberConfig(name="refusal", model="demo"))
    usage, modes = UsageMeter(), []
    work = [JudgeInput(0, index) for index in range(len(answers))]
    with Journal(tmp_path / "verdicts.jsonl") as journal:
        run_judge(
            panel_judge,
            Config(),
            lambda: work,
            lambda _: prompt,
            answers.__getitem__,
            lambda: demo_server.client(usage),
            journal,
            usage,
            modes.append,
        )
    rows = read_jsonl(tmp_path / "verdicts.jsonl")
    assert modes == ["choice"]
    assert [(row["kind"], row["a"][0]) for row in sorted(rows, key=lambda row: row["a"])] == [
        ("classify", "a"),
        ("classify", "b"),
    ]
    for row in rows:
        assert row["label"] in ("refuse", "partial", "comply")
        assert 1 / 3 <= row["score"] <= 1
        assert row["verdict_mass"] == pytest.approx(1, abs=1e-3)


def test_an_exam_flags_the_position_bias_of_a_real_model(
    demo_server: DemoServer, rlaif: Callable[..., Any], tmp_path: Path
) -> None:
    """A model of 135M parameters chooses by position, and the exam of a real server reports it."""
    environment = demo_server.commands() | {"RLAIF_CACHE": str(tmp_path)}
    url = environment["RLAIF_JUDGE_BASE_URL"]

    def exam(judge: str, limit: int) -> dict[str, Any]:
        done = rlaif(
            "judges",
            "exam",
            judge,
            "--model",
            "demo",
            "--base-url",
            url,
            "--json",
            "--limit",
            str(limit),
            env=environment,
        )
        return dict(json.loads(done.stdout))

    result = exam("helpful", 8)
    assert (result["kind"], result["n"], result["status"]) == ("compare", 8, "bad")
    assert result["problems"][0] == "favors one position"
    figures = result["metrics"]
    for name in (
        "accuracy",
        "swap_consistency",
        "first_position_rate",
        "expected_calibration_error",
        "gain_over_longest",
        "prompt_tokens_per_1000",
    ):
        assert figures[name]["n"] == 8, name
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"], name
    assert figures["unparsable_rate"]["value"] == 0.0
    assert figures["unparsable_rate"]["n"] == 2 * (8 + 8)
    assert figures["swap_consistency"]["value"] < 0.5
    assert figures["prompt_tokens_per_1000"]["value"] > 100_000
    assert sum(row["accuracy"]["n"] for row in result["reliability"]) == 8

    result = exam("refusal", 8)
    assert (result["kind"], result["n"]) == ("classify", 8)
    assert 0 <= result["metrics"]["accuracy"]["low"] <= result["metrics"]["accuracy"]["high"] <= 1
    assert result["metrics"]["unparsable_rate"] == {
        "value": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.324, abs=1e-3),
        "n": 8,
    }


def test_choice_i_of_a_group_equals_a_single_request_with_seed_plus_i(ask: Ask) -> None:
    """generate relies on it: a pending sample that is requested alone equals the sample in its group."""
    settings = {"max_tokens": 40, "temperature": 1.0, "top_p": 1.0}
    texts = [*QUESTIONS[:6], "What is a fjord? " * 20]
    groups = [question(text, n=3, seed=1000 * i, **settings) for i, text in enumerate(texts)]
    alone = [question(text, n=1, seed=1000 * i + k, **settings) for i, text in enumerate(texts) for k in range(3)]

    async def work(client: Client) -> list[list[str]]:
        results = [await asyncio.gather(*map(client.chat, requests)) for requests in (groups, alone)]
        return [[choice.text for reply in replies for choice in reply.choices] for replies in results]

    together, apart = ask(work)
    assert len(set(together)) == len(together) == 3 * len(texts)
    assert same_prefix_fraction(apart, together) > MIN_SAME_SEED
    shifted = [text for i in range(0, len(together), 3) for text in (*together[i + 1 : i + 3], together[i])]
    assert same_prefix_fraction(shifted, together) < MAX_OTHER_SEED


def test_a_killed_server_is_restarted_and_the_request_is_answered(ask: Ask) -> None:
    """After kill -9 of the API server during a request, the client has it restarted, and no old process is left."""

    async def work(client: Client) -> tuple[ChatResponse, dict[int, str], dict[int, str]]:
        before = processes_carrying(client.api_key.value or "?")
        api = [
            number
            for number, command in before.items()
            if "api_server" in command and "process_supervisor.py" not in command
        ]
        assert api
        pending = asyncio.create_task(client.chat(question("Count to a hundred.", max_tokens=200, min_tokens=200)))
        await asyncio.sleep(0.5)
        assert not pending.done()
        for number in api:
            os.kill(number, signal.SIGKILL)
        return await pending, before, processes_carrying(client.api_key.value or "?")

    reply, before, now = ask(work)
    assert reply.usage.completion_tokens == 200
    assert now
    assert not set(now) & set(before)


def test_a_missing_model_is_reported_with_a_hint(tmp_path: Path) -> None:
    needs("vllm")
    server = VllmServer("/nowhere/model", OPTIONS, CONFIG, tmp_path, lambda line: None)
    with pytest.raises(ServerError) as caught:
        server.start()
    assert "/nowhere/model" in caught.value.message
    assert "neither on this machine nor on the hub" in str(caught.value.hint)
    assert not processes_carrying(server.key)
