"""A slow server is not a hung one: it is asked nothing twice and restarted never; one that hangs is, once."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import ClientConfig
from rlaif.llm.backends import ModelBackends
from rlaif.llm.client import Client, RequestFailedError
from rlaif.llm.endpoint import Endpoint
from rlaif.llm.reporter import progress_line
from rlaif.llm.usage import UsageMeter
from rlaif.serving.time_limits import Patience, ServerLoad, parse_metrics
from tests.fake_server import Fault
from tests.llm.test_client import BODY, Serve, talk
from tests.processes import processes_carrying, wait_until
from tests.serving.test_vllm_server import Make, listening_pid, log_lines, make  # noqa: F401  # fixtures

TIMEOUT_S = 3.0
AskStandIn = Callable[..., tuple[list[str], UsageMeter, Any]]


@pytest.fixture
def ask_stand_in(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AskStandIn]:
    """``ask_stand_in(plan, requests, tokens, meanwhile)``: send so many requests at once to a stand-in that runs under
    rlaif's own management. Returns the prompts that it was asked, in order, the meter, and the server."""
    monkeypatch.setattr("rlaif.llm.server_metrics.POLL_INTERVAL_S", 0.2)

    def call(plan: list[str], requests: int, tokens: int, meanwhile: Callable[[Any], None] | None = None) -> Any:
        server = make(*plan, timeout_s=TIMEOUT_S, request_deadline_s=600.0)
        monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_, **__: server)
        usage = UsageMeter(description="generate")
        with ModelBackends(tmp_path, ClientConfig(timeout_s=TIMEOUT_S), lambda line: None) as engines:
            client = engines.client_for("some/model", [], {}, usage)

            async def main() -> None:
                async with client:
                    assert await client.check() == "vllm"
                    background = asyncio.create_task(asyncio.to_thread(meanwhile, server)) if meanwhile else None
                    bodies = [
                        {"messages": [{"role": "user", "content": f"q{i}"}], "max_tokens": tokens}
                        for i in range(requests)
                    ]
                    replies = await asyncio.gather(*map(client.chat, bodies))
                    assert len(replies) == requests
                    if background:
                        await background

            asyncio.run(main())
        return re.findall(r"standin: asked (\S+)", server.log_file.read_text()), usage, server

    yield call
    assert not processes_carrying("fake_vllm.py\0" + str(tmp_path))


def test_a_server_fifty_times_too_slow_answers_everything_once(ask_stand_in: AskStandIn, log_lines: list[str]) -> None:
    """Each answer takes 2.7 times the time limit; tokens come all the while."""
    lines: list[str] = []

    def look(server: Any) -> None:
        time.sleep(TIMEOUT_S)
        lines.append(progress_line(usages[0]))

    usages: list[UsageMeter] = []
    original = UsageMeter.__init__

    def remember(self: UsageMeter, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        usages.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UsageMeter, "__init__", remember)
        prompts, usage, _ = ask_stand_in(["generate 50"], 8, 50, look)
    assert sorted(prompts) == [f"q{i}" for i in range(8)]
    assert usage.retries == 0
    assert not any("hangs" in line or "died" in line for line in log_lines)
    # What slows it: the dtype, the cores (another test's server may hold them), and what other programs take.
    assert re.search(r"server: 8 running, 0 waiting, \d+ tokens/s \((float32|bfloat16) \(.+\), .*core", lines[0]), lines


def test_a_server_that_stalls_and_resumes_answers_everything_once(
    ask_stand_in: AskStandIn, log_lines: list[str]
) -> None:
    """A pause of half the time limit, in answers that take longer than the limit (at the default, five minutes)."""

    def stall(server: Any) -> None:
        time.sleep(1.0)
        os.kill(listening_pid(server), signal.SIGUSR2)
        time.sleep(TIMEOUT_S / 2)
        os.kill(listening_pid(server), signal.SIGUSR2)

    prompts, usage, _ = ask_stand_in(["generate 100"], 8, 50, stall)
    assert sorted(prompts) == [f"q{i}" for i in range(8)]
    assert usage.retries == 0
    assert not any("hangs" in line or "died" in line for line in log_lines)


def test_a_server_that_hangs_is_restarted_once_and_asked_once_more(
    ask_stand_in: AskStandIn, log_lines: list[str]
) -> None:
    def hang(server: Any) -> None:
        assert wait_until(lambda: "asked q7" in server.log.read_text())
        os.kill(listening_pid(server), signal.SIGUSR2)

    prompts, usage, _ = ask_stand_in(["generate 100", "generate 10000"], 8, 50, hang)
    assert sorted(prompts) == sorted([f"q{i}" for i in range(8)] * 2)
    assert usage.retries == 8
    assert sum("vLLM hangs" in line for line in log_lines) == 1
    assert sum(line.startswith("starting vLLM") for line in log_lines) == 2


# Other people's servers


def test_retries_after_a_time_out_come_at_half_the_rate(serve: Serve, waits: list[float]) -> None:
    """Eight requests at once time out; so many at once would time out again."""
    overloaded, sizes = [True], list[int]()

    def answer(body: dict[str, Any]) -> Any:
        if len(server.requests) <= 8:
            return Fault(500, delay_s=30.0)
        if overloaded[0]:
            server.max_in_flight, server.delay_s, overloaded[0] = 0, 0.05, False
        sizes.append(server.in_flight)
        return ["fine"]

    server = serve(answer, owned_by="somebody")

    async def work(client: Client) -> None:
        replies = await asyncio.gather(*(client.chat(BODY) for _ in range(8)))
        assert len(replies) == 8

    talk(server.url, work, concurrency=8, timeout_s=0.5)
    assert len(server.requests) == 16
    assert 1 <= server.max_in_flight <= 5  # four, and five once answers let it grow


def test_retries_after_a_429_stay_within_the_halved_limit(serve: Serve, waits: list[float]) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if len(server.requests) <= 16:
            server.max_in_flight = 0
            return Fault(429)
        return ["fine"]

    server = serve(answer, delay_s=0.1)

    async def work(client: Client) -> None:
        await asyncio.gather(*(client.chat(BODY) for _ in range(16)))

    talk(server.url, work, concurrency=16, max_attempts=20)
    assert 1 <= server.max_in_flight <= 10


def test_a_long_answer_may_take_as_long_as_the_answers_so_far_let_expect(serve: Serve) -> None:
    """The server makes ten tokens in 0.3 s, so a hundred may take some 3 s, ten times the limit of a request."""
    server = serve(owned_by="somebody")

    def answer(body: dict[str, Any]) -> Any:
        generated = body["max_tokens"]
        server.delay_s = 2.0
        return {
            "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": generated},
        }

    server.answer, server.delay_s = answer, 0.3

    async def work(client: Client) -> None:
        await client.chat({**BODY, "max_tokens": 20})
        await client.chat({**BODY, "max_tokens": 200})

    usage = UsageMeter()
    talk(server.url, work, timeout_s=0.5, usage=usage)
    assert len(server.requests) == 2
    assert usage.retries == 0


def test_silence_is_reported_while_it_lasts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.llm.server_metrics.MIN_REPORTED_SILENCE_S", 0.2)
    monkeypatch.setattr("rlaif.llm.server_metrics.POLL_INTERVAL_S", 0.1)
    server, usage = serve(delay_s=1.5, owned_by="somebody"), UsageMeter(description="judge")

    async def work(client: Client) -> str:
        request = asyncio.create_task(client.chat(BODY))
        while not usage.server_status:
            await asyncio.sleep(0.02)
            assert not request.done()
        line = progress_line(usage)
        await request
        return line

    assert re.search(
        r"no answer from 127\.0\.0\.1:\d+ for 0 s \(1 requests? in flight\)", talk(server.url, work, usage=usage)
    )
    assert usage.server_status == ""


def test_only_a_vllm_is_asked_for_metrics(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider would get requests for nothing, with the key in them."""
    monkeypatch.setattr("rlaif.llm.server_metrics.POLL_INTERVAL_S", 0.05)
    readings: dict[str, int] = {}
    real = Endpoint.send

    async def send(self: Endpoint, method: str, path: str, *args: Any, **kwargs: Any) -> bytes:
        if path == "/metrics":
            readings[self.url] = readings.get(self.url, 0) + 1
        return await real(self, method, path, *args, **kwargs)

    monkeypatch.setattr(Endpoint, "send", send)
    vllm, provider = serve(delay_s=0.6), serve(delay_s=0.6, owned_by="somebody")

    async def work(client: Client) -> None:
        await client.check()
        await client.chat(BODY)

    for server in (vllm, provider):
        talk(server.url, work)
    assert readings == {vllm.url: 3}  # it has none, and after three tries it is asked no more


def test_a_request_that_waits_for_room_is_not_sent_after_a_stop(serve: Serve) -> None:
    from rlaif.llm.client import RequestCancelled

    server, usage = serve(delay_s=0.5), UsageMeter()

    async def work(client: Client) -> list[Any]:
        pending = asyncio.gather(*(client.chat(BODY) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0.1)
        usage.interrupted = True
        return await pending

    replies = talk(server.url, work, usage=usage, concurrency=1)
    assert [isinstance(reply, RequestCancelled) for reply in replies] == [False, True, True]
    assert len(server.requests) == 1


def test_a_timed_out_request_fails_with_how_long_it_waited(serve: Serve, waits: list[float]) -> None:
    with pytest.raises(RequestFailedError, match=r"no answer within 0\.3 s"):
        talk(serve(delay_s=5).url, lambda client: client.chat(BODY), timeout_s=0.3, max_attempts=1)


# The arithmetic

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/m"} 3.0
vllm:num_requests_running{engine="1",model_name="org/m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="org/m"} 40.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="org/m",reason="capacity"} 40.0
vllm:prompt_tokens_total{engine="0",model_name="org/m"} 1.2e+06
vllm:generation_tokens_total{engine="0",model_name="org/m"} 1000.0
vllm:generation_tokens_total{engine="1",model_name="org/m"} 234.0
vllm:generation_tokens_created{engine="0",model_name="org/m"} 1.79e+09
"""


def test_metrics_are_summed_over_engines() -> None:
    assert parse_metrics(METRICS) == ServerLoad(running=5, waiting=40, prompt_tokens=1.2e6, generated_tokens=1234.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>",
        "python_gc_objects_collected_total 7\n",
        "vllm:num_requests_running 1e\n",
        "vllm:generation_tokens_total 5\n",
    ],
)
def test_what_are_not_vllms_metrics_is_none(text: str) -> None:
    assert parse_metrics(text) is None


def with_fake_clock(monkeypatch: pytest.MonkeyPatch, deadline_s: float | None = 3600.0) -> tuple[Patience, list[float]]:
    now = [1000.0]
    monkeypatch.setattr("rlaif.serving.time_limits.time.monotonic", lambda: now[0])
    return Patience(600.0, deadline_s), now


def test_the_limit_doubles_until_there_is_an_answer_and_once_for_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, now = with_fake_clock(monkeypatch)
    assert patience.limit_s(1024) == 600
    now[0] = 1600.0
    assert [patience.record_timeout(1000.0) for _ in range(64)] == [1000.0] * 64
    assert patience.limit_s(1024) == 1200
    now[0] = 2800.0
    patience.record_timeout(1600.0)
    assert patience.limit_s(1024) == 2400
    now[0] = 5200.0
    patience.record_timeout(2800.0)
    assert patience.limit_s(1024) == 3600  # the deadline
    patience.record_answer(5100.0, 1024)
    assert patience.limit_s(1024) == 600


def test_the_limit_follows_the_slowest_recent_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, now = with_fake_clock(monkeypatch)
    now[0] = 1500.0
    patience.record_answer(1000.0, 512)  # 500 s for half of 1,024 tokens
    assert patience.limit_s(1024) == 2000
    assert patience.limit_s(512) == 1000
    assert patience.limit_s(100) == 1000
    for _ in range(64):
        patience.record_answer(1490.0, 512)
    assert patience.limit_s(1024) == 600
    patience.record_answer(1499.0, 1)  # a verdict: its second is latency, not a rate of one token/s
    assert patience.limit_s(1024) == 600


def test_a_request_times_out_only_if_the_server_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that others keep busy is slow; `timed_out` says since when nothing has come, if it seems to hang."""
    patience, now = with_fake_clock(monkeypatch, deadline_s=None)
    with patience.track_request(1024):
        for second in range(0, 7200, 5):  # two hours of tokens and no answer
            now[0] = 1000.0 + second
            patience.record_load(ServerLoad(8, 0, 0.0, float(second)))
            assert patience.stalled_s() == 0.0
        assert patience.tokens_per_s == 1.0
        assert patience.record_timeout(1000.0) is None
        for _ in range(120):
            now[0] += 5
            patience.record_load(ServerLoad(8, 0, 0.0, 7195.0))
        assert patience.stalled_s() == 600.0
        assert patience.record_timeout(1000.0) == 8195.0
    assert patience.stalled_s() == 0.0


def test_a_restarted_server_is_not_taken_for_one_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, now = with_fake_clock(monkeypatch)
    patience.record_load(ServerLoad(1, 0, 50.0, 900.0))
    now[0] += 10
    patience.record_load(ServerLoad(1, 0, 5.0, 20.0))
    with patience.track_request(1):
        assert patience.stalled_s() == 0.0
    assert patience.tokens_per_s is None
