"""Slow servers and hung servers: a slow one gets every request once and is not restarted; a hung one is restarted."""

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
from rlaif.llm.client import Client
from rlaif.llm.endpoint import Endpoint
from rlaif.llm.reporter import progress_line
from rlaif.llm.request import RequestCancelled, RequestFailedError
from rlaif.llm.usage import UsageMeter
from rlaif.serving.time_limits import Patience, ServerLoad, parse_metrics
from tests.fake_server import Fault
from tests.llm.test_client import BODY, Serve, talk
from tests.processes import processes_carrying, wait_until
from tests.serving.test_vllm_server import Make, listening_pid, log_lines, make  # noqa: F401  # fixtures

TIMEOUT_S = 3.0
AskFake = Callable[..., tuple[list[str], UsageMeter, Any]]


@pytest.fixture
def ask_fake(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AskFake]:
    """Return ``ask_fake(plan, requests, tokens, meanwhile)``, which sends ``requests`` requests at once to a fake vLLM
    that rlaif manages. It returns the prompts that arrived, in order, the meter, and the server."""
    monkeypatch.setattr("rlaif.llm.server_metrics.POLL_INTERVAL_S", 0.2)

    def call(plan: list[str], requests: int, tokens: int, meanwhile: Callable[[Any], None] | None = None) -> Any:
        server = make(*plan, timeout_s=TIMEOUT_S, request_deadline_s=600.0)
        monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_, **__: server)
        usage = UsageMeter(description="generate")
        with ModelBackends(tmp_path, ClientConfig(timeout_s=TIMEOUT_S), lambda line: None) as backends:
            client = backends.client_for("some/model", [], {}, usage)

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
        return re.findall(r"fake_vllm: asked (\S+)", server.log_file.read_text()), usage, server

    yield call
    assert not processes_carrying("fake_vllm.py\0" + str(tmp_path))


def test_a_server_fifty_times_too_slow_answers_everything_once(ask_fake: AskFake, log_lines: list[str]) -> None:
    """Each answer takes 2.7 times the time limit, while tokens keep coming."""
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
        prompts, usage, _ = ask_fake(["generate 50"], 8, 50, look)
    assert sorted(prompts) == [f"q{i}" for i in range(8)]
    assert usage.retries == 0
    assert not any("hangs" in line or "died" in line for line in log_lines)
    # The line shows what limits its speed: the dtype, the cores (another test's server may hold them), other programs.
    assert re.search(r"server: 8 running, 0 waiting, \d+ tokens/s \((float32|bfloat16) \(.+\), .*core", lines[0]), lines


def test_a_server_that_stalls_and_resumes_answers_everything_once(ask_fake: AskFake, log_lines: list[str]) -> None:
    """It pauses for half the time limit, during answers that take longer than the limit."""

    def stall(server: Any) -> None:
        time.sleep(1.0)
        os.kill(listening_pid(server), signal.SIGUSR2)
        time.sleep(TIMEOUT_S / 2)
        os.kill(listening_pid(server), signal.SIGUSR2)

    prompts, usage, _ = ask_fake(["generate 100"], 8, 50, stall)
    assert sorted(prompts) == [f"q{i}" for i in range(8)]
    assert usage.retries == 0
    assert not any("hangs" in line or "died" in line for line in log_lines)


def test_a_server_that_hangs_is_restarted_once_and_gets_every_request_once_more(
    ask_fake: AskFake, log_lines: list[str]
) -> None:
    def hang(server: Any) -> None:
        assert wait_until(lambda: "asked q7" in server.log_file.read_text())
        os.kill(listening_pid(server), signal.SIGUSR2)

    prompts, usage, _ = ask_fake(["generate 100", "generate 10000"], 8, 50, hang)
    assert sorted(prompts) == sorted([f"q{i}" for i in range(8)] * 2)
    assert usage.retries == 8
    assert sum("vLLM hangs" in line for line in log_lines) == 1
    assert sum(line.startswith("starting vLLM") for line in log_lines) == 2


# Servers that rlaif does not start


def test_retries_after_a_timeout_use_half_the_limit(serve: Serve, waits: list[float]) -> None:
    """Eight requests at once time out, and the same number at once would time out again."""
    overloaded, sizes = [True], list[int]()

    def answer(body: dict[str, Any]) -> Any:
        if len(server.requests) <= 8:
            return Fault(500, delay_s=30.0)
        if overloaded[0]:
            server.max_in_flight, server.delay_s, overloaded[0] = 0, 0.05, False
        sizes.append(server.in_flight)
        return ["fine"]

    server = serve(answer, owned_by="other")

    async def work(client: Client) -> None:
        replies = await asyncio.gather(*(client.chat(BODY) for _ in range(8)))
        assert len(replies) == 8

    talk(server.url, work, concurrency=8, timeout_s=0.5)
    assert len(server.requests) == 16
    assert 1 <= server.max_in_flight <= 5  # four, then five as the limit grows with answers


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


def test_the_time_limit_of_a_long_answer_follows_the_rate_of_earlier_answers(serve: Serve) -> None:
    """The server generates 20 tokens in 0.3 s, so 200 may take about 3 s, six times the limit of a request."""
    server = serve(owned_by="other")

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
    server, usage = serve(delay_s=1.5, owned_by="other"), UsageMeter(description="judge")

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


def test_metrics_are_requested_only_from_vllm(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider would get useless requests that contain the key."""
    monkeypatch.setattr("rlaif.llm.server_metrics.POLL_INTERVAL_S", 0.05)
    readings: dict[str, int] = {}
    real = Endpoint.send

    async def send(self: Endpoint, method: str, path: str, *args: Any, **kwargs: Any) -> bytes:
        if path == "/metrics":
            readings[self.url] = readings.get(self.url, 0) + 1
        return await real(self, method, path, *args, **kwargs)

    monkeypatch.setattr(Endpoint, "send", send)
    vllm, provider = serve(delay_s=0.6), serve(delay_s=0.6, owned_by="other")

    async def work(client: Client) -> None:
        await client.check()
        await client.chat(BODY)

    for server in (vllm, provider):
        talk(server.url, work)
    assert readings == {vllm.url: 3}  # it has no metrics, so rlaif stops after three attempts


def test_a_request_that_waits_for_a_slot_is_not_sent_after_a_stop(serve: Serve) -> None:
    server, usage = serve(delay_s=0.5), UsageMeter()

    async def work(client: Client) -> list[Any]:
        pending = asyncio.gather(*(client.chat(BODY) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0.1)
        usage.interrupted = True
        return await pending

    replies = talk(server.url, work, usage=usage, concurrency=1)
    assert [isinstance(reply, RequestCancelled) for reply in replies] == [False, True, True]
    assert len(server.requests) == 1


def test_a_timeout_reports_the_waiting_time(serve: Serve, waits: list[float]) -> None:
    with pytest.raises(RequestFailedError, match=r"no answer within 0\.3 s"):
        talk(serve(delay_s=5).url, lambda client: client.chat(BODY), timeout_s=0.3, max_attempts=1)


# Arithmetic

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
def test_other_metrics_parse_to_none(text: str) -> None:
    assert parse_metrics(text) is None


def with_fake_clock(monkeypatch: pytest.MonkeyPatch, deadline_s: float | None = 3600.0) -> tuple[Patience, list[float]]:
    now = [1000.0]
    monkeypatch.setattr("rlaif.serving.time_limits.time.monotonic", lambda: now[0])
    return Patience(600.0, deadline_s), now


def test_the_limit_doubles_until_the_first_answer_and_once_per_burst(monkeypatch: pytest.MonkeyPatch) -> None:
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
    patience.record_answer(1499.0, 1)  # a verdict: its second is latency, not a rate of one token per second
    assert patience.limit_s(1024) == 600


def test_a_request_times_out_only_if_the_server_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that makes progress is slow. :meth:`record_timeout` returns the time of the last progress if it seems to
    hang."""
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


def test_reset_counters_of_a_restarted_server_count_as_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, now = with_fake_clock(monkeypatch)
    patience.record_load(ServerLoad(1, 0, 50.0, 900.0))
    now[0] += 10
    patience.record_load(ServerLoad(1, 0, 5.0, 20.0))
    with patience.track_request(1):
        assert patience.stalled_s() == 0.0
    assert patience.tokens_per_s is None
