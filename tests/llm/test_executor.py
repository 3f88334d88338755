"""The executor: answered requests are skipped, answers are journaled at once, and every stop keeps them."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif.config.models import ClientConfig
from rlaif.errors import EndpointError, RunError, UsageError
from rlaif.llm import executor
from rlaif.llm.chat_protocol import ChatResponse
from rlaif.llm.client import Client
from rlaif.llm.executor import execute_requests
from rlaif.llm.request import Request, UnparsableReplyError
from rlaif.llm.stop_reason import StopReason
from rlaif.llm.usage import RECENT_REQUESTS, UsageMeter
from rlaif.records import Completion, content_key
from rlaif.run.journal import Journal
from tests.conftest import ROOT, read_jsonl
from tests.fake_server import Fault, ScriptedServer, echo
from tests.processes import wait_until

Serve = Callable[..., ScriptedServer]


def request(number: int, *, copies: int = 1) -> Request:
    keys = tuple(content_key(number=number, copy=copy) for copy in range(copies))
    body = {"messages": [{"role": "user", "content": str(number)}], "n": copies}
    return Request(keys, body, f"p{number}", number)


def number_of(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"])


def parse_reply(request_sent: Request, reply: ChatResponse) -> Sequence[Completion]:
    if reply.choices[0].text.startswith("unparsable"):
        raise UnparsableReplyError("no verdict")
    return [
        Completion(key=key, prompt_id=request_sent.prompt_id, index=i, model="m", text=choice.text)
        for i, (key, choice) in enumerate(zip(request_sent.keys, reply.choices, strict=True))
    ]


def run_requests(
    path: Path,
    url: str,
    requests: Iterable[Request],
    usage: UsageMeter | None = None,
    *,
    parser: Any = parse_reply,
    **config: Any,
) -> UsageMeter:
    """Run one command: open the journal at ``path``, send ``requests``, close it."""
    usage = usage or UsageMeter()

    async def build_requests(_client: Client, _engine: str) -> Iterable[Request]:
        return requests

    with Journal(path) as journal:
        execute_requests(
            lambda: Client("m", [url], ClientConfig(**config), usage), build_requests, parser, journal, usage
        )
    return usage


def texts(path: Path) -> dict[str, str]:
    """Return the answers by prompt_id. Every line must be complete, and no key may occur twice."""
    rows = [row for row in read_jsonl(path) if "error" not in row]
    assert max(Counter(row["key"] for row in rows).values(), default=1) == 1
    return {row["prompt_id"]: row["text"] for row in rows}


def failures(path: Path) -> dict[str, tuple[str, str]]:
    return {row["prompt_id"]: (row["kind"], row["error"]) for row in read_jsonl(path) if "error" in row}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


# Sending


def test_every_request_is_sent_once_and_journaled(serve: Serve, path: Path) -> None:
    server = serve()
    usage = run_requests(path, server.url, (request(i, copies=2) for i in range(50)))
    assert len(server.requests) == 50
    assert texts(path) == {f"p{i}": f"answer 1 to: {i}" for i in range(50)}
    assert len(read_jsonl(path)) == 100
    assert (usage.requests, usage.answers, usage.skipped, usage.failed) == (50, 100, 0, 0)
    assert usage.prompt_tokens == 0
    assert usage.completion_tokens > 0


def test_journaled_answers_are_not_requested_again(serve: Serve, path: Path) -> None:
    server = serve()
    run_requests(path, server.url, map(request, range(30)))
    usage = run_requests(path, server.url, map(request, range(40)))
    assert Counter(map(number_of, server.requests)) == dict.fromkeys(range(40), 1)
    assert (usage.skipped, usage.answers) == (30, 10)
    assert len(texts(path)) == 40
    before = path.read_bytes()
    run_requests(path, server.url, map(request, range(40)))
    assert path.read_bytes() == before


def test_a_partly_answered_request_is_sent(serve: Serve, path: Path) -> None:
    server = serve()
    with Journal(path) as journal:
        pending = request(7, copies=2)
        journal.append([Completion(key=pending.keys[0], prompt_id="p7", index=0, model="m", text="present")])
    run_requests(path, server.url, [pending], parser=lambda request_sent, reply: parse_reply(request_sent, reply)[1:])
    assert len(server.requests) == 1
    assert [row["text"] for row in read_jsonl(path)] == ["present", "answer 1 to: 7"]


@pytest.mark.parametrize("server_reply", [["fine"], Fault(400)], ids=["answered", "failed"])
def test_a_repeated_key_is_sent_once(serve: Serve, path: Path, server_reply: Any) -> None:
    """The repetition comes while the first is in flight, after its answer, or after its failure."""
    server = serve(lambda body: server_reply)
    usage = run_requests(path, server.url, (request(i % 10) for i in range(100)), concurrency=4)
    assert Counter(map(number_of, server.requests)) == dict.fromkeys(range(10), 1)
    assert usage.skipped == 90
    assert usage.answers + usage.failed == 10
    assert len(read_jsonl(path)) == 10


def test_requests_are_taken_as_slots_become_free(serve: Serve, path: Path) -> None:
    """At most one more of 100,000 requests is taken from the iterator than may be in flight."""
    server, usage = serve(delay_s=0.01), UsageMeter()
    most = 0

    def requests() -> Iterator[Request]:
        nonlocal most
        for i in range(100_000):
            most = max(most, i + 1 - usage.answers)
            if usage.answers >= 300:
                usage.deadline = 0.0
            yield request(i)

    run_requests(path, server.url, requests(), usage, concurrency=16)
    assert 16 <= most <= 18
    assert server.max_in_flight <= 16
    assert 300 <= usage.answers == len(server.requests) == len(texts(path)) <= 320
    assert usage.stop_reason() is StopReason.DEADLINE


def test_many_skipped_requests_in_a_row_do_not_block_those_in_flight(serve: Serve, path: Path) -> None:
    server = serve()
    answered, answered_meanwhile = list[int](), list[int]()
    with Journal(path) as journal:
        journal.append(Completion(key=request(i).keys[0], prompt_id=f"p{i}", index=0, model="m", text="") for i in (1,))

    def requests() -> Iterator[Request]:
        yield request(0)
        end = time.monotonic() + 20
        while not answered and time.monotonic() < end:
            yield request(1)
        answered_meanwhile.extend(answered)

    def parse(request_sent: Request, reply: ChatResponse) -> Sequence[Completion]:
        answered.append(request_sent.context)
        return parse_reply(request_sent, reply)

    run_requests(path, server.url, requests(), parser=parse)
    assert answered_meanwhile == [0]


# Failures


def test_failures_are_journaled_and_pending_for_the_next_start(serve: Serve, path: Path, waits: list[float]) -> None:
    broken = True
    server = serve(lambda body: Fault(400) if broken and number_of(body) % 3 == 0 else echo(body))
    usage = run_requests(path, server.url, map(request, range(30)))
    assert failures(path) == {f"p{i}": ("endpoint", "HTTP 400: scripted fault") for i in range(0, 30, 3)}
    assert len(texts(path)) == 20
    assert (usage.failures, usage.answers) == ({"endpoint": 10}, 20)
    assert "scripted fault" in usage.last_error
    broken = False
    usage = run_requests(path, server.url, map(request, range(30)))
    assert (usage.answers, usage.skipped, usage.failed) == (10, 20, 0)
    assert len(texts(path)) == 30
    with Journal(path) as journal:
        assert all(request(i).keys[0] in journal for i in range(30))


def test_each_record_of_a_failed_request_is_counted(serve: Serve, path: Path) -> None:
    usage = run_requests(path, serve(lambda body: Fault(400)).url, [request(1, copies=3)])
    assert usage.failures == {"endpoint": 3}
    assert {row["key"] for row in read_jsonl(path)} == set(request(1, copies=3).keys)


def test_an_unparsable_reply_is_requested_once_more_and_then_counts_as_failed(serve: Serve, path: Path) -> None:
    attempts: Counter[int] = Counter()

    def answer(body: dict[str, Any]) -> list[str]:
        number = number_of(body)
        attempts[number] += 1
        return ["unparsable"] if number == 0 or (number == 1 and attempts[1] == 1) else ["fine"]

    usage = run_requests(path, serve(answer).url, map(request, range(3)))
    assert attempts == {0: 2, 1: 2, 2: 1}
    assert texts(path) == {"p1": "fine", "p2": "fine"}
    assert failures(path) == {"p0": ("unparsable", "no verdict")}
    assert (usage.requests, usage.retries, usage.answers, usage.failures) == (5, 2, 2, {"unparsable": 1})


def test_the_command_stops_if_nearly_everything_fails_and_keeps_the_answers(
    serve: Serve, path: Path, waits: list[float]
) -> None:
    server = serve(lambda body: echo(body) if number_of(body) < 50 else Fault(500))
    usage = UsageMeter()
    with pytest.raises(EndpointError, match=r"nearly every request fails.*HTTP 500") as caught:
        run_requests(path, server.url, map(request, range(10_000)), usage, concurrency=8, max_attempts=2)
    assert caught.value.location == server.url
    assert len(texts(path)) == 50
    assert RECENT_REQUESTS * 0.9 <= usage.failed <= RECENT_REQUESTS + 8
    assert len(failures(path)) == usage.failed


EVEN = {*map(str, range(0, 300, 2)), "Reply with the letter A."}
"""Prompts that are answered: half of the requests, and the probe of the key."""


def slow_answer(body: dict[str, Any]) -> Fault:
    """Return an answer that takes 0.5 s, unlike rejections, which return at once."""
    reply = {"choices": [{"message": {"content": echo(body)[0]}, "finish_reason": "stop"}]}
    return Fault(200, {"Content-Type": "application/json"}, json.dumps(reply).encode(), delay_s=0.5)


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_rejections_before_the_first_answer_do_not_end_the_command(serve: Serve, path: Path, status: int) -> None:
    """Nor do they end the next start, in which only rejected requests are pending."""
    rejection = Fault(status)
    server = serve(lambda body: slow_answer(body) if body["messages"][-1]["content"] in EVEN else rejection)
    usage = run_requests(path, server.url, map(request, range(300)), concurrency=64)
    assert (usage.answers, usage.failures) == (150, {"endpoint": 150})
    usage = run_requests(path, server.url, map(request, range(300)), concurrency=8)
    assert (usage.answers, usage.skipped, usage.failures) == (0, 150, {"endpoint": 150})
    assert "scripted fault" in usage.last_error
    assert len(texts(path)) == 150


def test_rejections_end_the_command_if_nothing_was_ever_answered(serve: Serve, path: Path) -> None:
    """If something was answered, they count as failures."""
    server = serve(lambda body: Fault(400))
    with pytest.raises(EndpointError, match=r"nearly every request fails.*HTTP 400"):
        run_requests(path, server.url, map(request, range(10_000)), concurrency=32)
    assert 64 <= len(server.requests) <= 96
    server.answer = lambda body: Fault(400) if number_of(body) else echo(body)
    usage = run_requests(path, server.url, map(request, range(1000)), concurrency=32)
    assert (usage.answers, usage.failed) == (1, 999)


def test_some_failures_do_not_stop_a_command(serve: Serve, path: Path) -> None:
    server = serve(lambda body: echo(body) if number_of(body) % 8 == 0 else Fault(400))
    usage = run_requests(path, server.url, map(request, range(200)), concurrency=4)
    assert (usage.answers, usage.failed) == (25, 175)


@pytest.mark.parametrize("status", [401, 404])
def test_a_fatal_status_stops_at_once_and_keeps_requests_in_flight(serve: Serve, path: Path, status: int) -> None:
    server = serve(lambda body: Fault(status) if number_of(body) == 5 else echo(body), delay_s=0.05)
    with pytest.raises(EndpointError):
        run_requests(path, server.url, map(request, range(1000)), concurrency=10)
    assert len(server.requests) <= 20
    assert len(texts(path)) == len(server.requests) - 1


def test_an_exception_of_the_parser_is_raised_unchanged(serve: Serve, path: Path) -> None:
    def parse(request_sent: Request, reply: ChatResponse) -> Sequence[Completion]:
        if request_sent.context == 3:
            raise ZeroDivisionError
        return parse_reply(request_sent, reply)

    with pytest.raises(ZeroDivisionError):
        run_requests(path, serve().url, map(request, range(100)), parser=parse, concurrency=2)
    assert "p0" in texts(path)


def test_an_exception_of_the_request_iterator_keeps_requests_in_flight(serve: Serve, path: Path) -> None:
    def requests() -> Iterator[Request]:
        yield from map(request, range(5))
        raise RunError("this line of the journal is damaged")

    server = serve(delay_s=0.05)
    with pytest.raises(RunError, match="damaged"):
        run_requests(path, server.url, requests())
    assert len(texts(path)) == len(server.requests) == 5


def test_an_unreachable_server_ends_the_command_before_it_takes_a_request(path: Path) -> None:
    taken: list[int] = []
    with pytest.raises(EndpointError, match="unreachable"):
        run_requests(path, "http://127.0.0.1:9/v1", (taken.append(i) or request(i) for i in range(5)))  # type: ignore[func-returns-value]
    assert not taken


def test_a_full_disk_is_reported_and_the_next_start_resumes(serve: Serve, path: Path) -> None:
    """Uses a real limit of the file size, which is reached in the middle of a line."""
    server = serve()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(RunError, match=r"journal\.jsonl: cannot be written: File too large") as caught:
            run_requests(path, server.url, map(request, range(1000)), concurrency=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "hint: " in str(caught.value)
    kept = texts(path)
    assert 5 < len(kept) < 20
    assert len(server.requests) <= len(kept) + 8
    run_requests(path, server.url, map(request, range(30)))
    assert len(texts(path)) == 30
    assert {name: texts(path)[name] for name in kept} == kept


OUTCOMES = ("fine", "bad", "passing", "once", "never")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.sampled_from(OUTCOMES), max_size=30), concurrency=st.integers(1, 12), copies=st.integers(1, 3))
def test_every_key_ends_with_one_answer_or_one_failure(
    serve: Serve,
    tmp_path_factory: pytest.TempPathFactory,
    waits: list[float],
    plan: list[str],
    concurrency: int,
    copies: int,
) -> None:
    """For any mixture of outcomes, counts add up, nothing is lost or duplicated, and the rest stays pending."""
    attempts: Counter[int] = Counter()

    def answer(body: dict[str, Any]) -> Any:
        number = number_of(body)
        attempts[number] += 1
        kind = plan[number]
        if kind == "bad":
            return Fault(400)
        if kind == "passing" and attempts[number] == 1:
            return Fault(503)
        if kind == "never" or (kind == "once" and attempts[number] == 1):
            return ["unparsable"] * copies
        return [f"fine {i}" for i in range(copies)]

    journal = tmp_path_factory.mktemp("ask") / "journal.jsonl"
    server = serve(answer)
    usage = run_requests(
        journal, server.url, (request(i, copies=copies) for i in range(len(plan))), concurrency=concurrency
    )
    kinds = Counter(plan)
    good = kinds["fine"] + kinds["passing"] + kinds["once"]
    rows = read_jsonl(journal)
    assert len(rows) == len({row["key"] for row in rows}) == len(plan) * copies
    assert len(texts(journal)) == good
    assert usage.answers == good * copies
    assert usage.failures == Counter(
        {kind: n * copies for kind, n in (("endpoint", kinds["bad"]), ("unparsable", kinds["never"])) if n}
    )
    assert all(attempts[i] == (1 if kind in ("fine", "bad") else 2) for i, kind in enumerate(plan))
    assert server.max_in_flight <= concurrency
    second = run_requests(journal, server.url, (request(i, copies=copies) for i in range(len(plan))))
    assert second.skipped == good * copies
    assert second.answers == 0


# Budget


@pytest.fixture
def cent_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request costs a cent."""
    monkeypatch.setattr("rlaif.llm.client.request_cost", lambda *_: 0.01)


def test_a_spent_budget_stops_new_requests_and_lets_those_in_flight_finish(
    serve: Serve, path: Path, cent_each: None
) -> None:
    server = serve(delay_s=0.01)
    usage = run_requests(path, server.url, map(request, range(1000)), UsageMeter(budget_usd=0.5), concurrency=8)
    assert usage.stop_reason() is StopReason.BUDGET
    assert 50 <= len(server.requests) <= 58
    assert len(texts(path)) == len(server.requests)
    assert usage.cost_usd == pytest.approx(len(server.requests) / 100)
    second_usage = UsageMeter(budget_usd=0.095)
    run_requests(path, server.url, map(request, range(1000)), second_usage, concurrency=1)
    assert len(texts(path)) == len(server.requests)
    assert second_usage.answers == 10


def test_a_budget_without_a_known_price_is_rejected_before_anything_is_paid(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "has_known_price", lambda model, url: "127.0.0.1" not in url)
    server = serve()
    with pytest.raises(UsageError, match=r"price of 'm' at http://127\.0\.0\.1:.* is unknown"):
        run_requests(path, server.url, map(request, range(5)), UsageMeter(budget_usd=1.0))
    assert not server.requests
    assert run_requests(path, server.url, map(request, range(5))).answers == 5


def test_every_url_needs_a_known_price(serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paid, unknown, usage = serve(), serve(), UsageMeter(budget_usd=1.0)
    monkeypatch.setattr(executor, "has_known_price", lambda model, url: url == paid.url)

    async def build_requests(_client: Client, _engine: str) -> Iterable[Request]:
        return [request(1)]

    with Journal(path) as journal, pytest.raises(UsageError, match=unknown.url):
        execute_requests(
            lambda: Client("m", [paid.url, unknown.url], ClientConfig(), usage),
            build_requests,
            parse_reply,
            journal,
            usage,
        )


@pytest.mark.parametrize("probe", ["models", "probabilities"])
def test_a_stop_during_the_checks_of_the_server(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch, probe: str
) -> None:
    monkeypatch.setattr("rlaif.llm.retries.STOP_CHECK_INTERVAL_S", 0.01)
    busy = Fault(503, {"Retry-After": "60"})
    server = serve(lambda body: busy, listing=busy if probe == "models" else None)
    usage = UsageMeter(deadline=time.monotonic() + 0.5)

    async def build_requests(client: Client, _engine: str) -> Iterable[Request]:
        await client.supports_logprobs()
        return [request(1)]

    with Journal(path) as journal:
        execute_requests(
            lambda: Client("m", [server.url], ClientConfig(), usage), build_requests, parse_reply, journal, usage
        )
    assert usage.stop_reason() is StopReason.DEADLINE
    assert len(server.requests) == (probe == "probabilities")
    assert path.read_bytes() == b""


# Interrupts


def test_one_interrupt_lets_requests_in_flight_finish(serve: Serve, path: Path) -> None:
    def answer(body: dict[str, Any]) -> list[str]:
        if number_of(body) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return echo(body)

    previous_handler = signal.signal(signal.SIGTERM, lambda *_: None)  # the caller has its own handler
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    server, usage = serve(answer, delay_s=0.05), UsageMeter()
    with pytest.raises(KeyboardInterrupt):
        run_requests(path, server.url, map(request, range(1000)), usage, concurrency=8)
    assert 20 <= len(server.requests) <= 40
    assert len(texts(path)) == len(server.requests)
    assert not failures(path)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    signal.signal(signal.SIGTERM, previous_handler)


def test_requests_that_wait_for_a_retry_at_a_stop_stay_pending(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlaif.llm.retries.STOP_CHECK_INTERVAL_S", 0.01)
    server = serve(lambda body: Fault(429, {"Retry-After": "60"}) if number_of(body) else echo(body))
    usage = run_requests(path, server.url, map(request, range(8)), UsageMeter(deadline=time.monotonic() + 1.0))
    assert len(server.requests) == 8
    assert (usage.answers, usage.failed) == (1, 0)
    assert len(read_jsonl(path)) == 1


def test_requests_in_flight_get_a_grace_period_after_an_interrupt(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes when everything is sent and only answers are awaited."""
    monkeypatch.setattr(executor, "SHUTDOWN_GRACE_S", 0.2)
    server = serve(delay_s=60)
    threading.Thread(
        target=lambda: wait_until(lambda: len(server.requests) == 3) and os.kill(os.getpid(), signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt):
        run_requests(path, server.url, map(request, range(3)))
    assert path.read_bytes() == b""


def test_an_interrupt_takes_effect_during_the_start_of_a_server(path: Path) -> None:
    """A start blocks for minutes, so it must run where an interrupt raises KeyboardInterrupt at once."""
    continued: list[bool] = []

    def open_client() -> Client:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        continued.append(True)
        return Client("m", ["http://127.0.0.1:9/v1"], ClientConfig(), UsageMeter())

    async def build_requests(_client: Client, _engine: str) -> Iterable[Request]:
        return []

    with Journal(path) as journal, pytest.raises(KeyboardInterrupt):
        execute_requests(open_client, build_requests, parse_reply, journal, UsageMeter())
    assert not continued


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_stops_at_once(serve: Serve, path: Path, signum: signal.Signals) -> None:
    """Requests in flight would take minutes. The first signal waits for them, the second does not."""
    server = serve(lambda body: echo(body))
    server.answer = _then_slow(server)
    code = f"""
import sys
from pathlib import Path
from tests.llm.test_executor import run_requests, request
try:
    run_requests(Path({str(path)!r}), {server.url!r}, map(request, range(100)), concurrency=4)
except KeyboardInterrupt:
    sys.exit("interrupted")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: server.in_flight == 4)
    process.send_signal(signum)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (1, "interrupted\n")
    assert len(texts(path)) == 10
    assert not failures(path)


def _then_slow(server: ScriptedServer) -> Callable[[dict[str, Any]], list[str]]:
    def answer(body: dict[str, Any]) -> list[str]:
        if len(server.requests) == 10:
            server.delay_s = 300
        return echo(body)

    return answer


# Callers


def test_it_works_inside_a_running_event_loop(serve: Serve, path: Path) -> None:
    """As in a notebook, whose cells run inside an event loop."""

    async def cell() -> UsageMeter:
        return run_requests(path, serve().url, map(request, range(20)))

    assert asyncio.run(cell()).answers == 20
    assert len(texts(path)) == 20


def test_an_interrupt_works_in_a_notebook(serve: Serve, path: Path) -> None:
    server = serve(delay_s=0.05)

    async def cell() -> None:
        run_requests(path, server.url, map(request, range(1000)), concurrency=4)

    def interrupt() -> None:
        wait_until(lambda: len(server.requests) >= 8)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = asyncio.new_event_loop()
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())  # unlike asyncio.run it leaves the signal to Python, as a notebook does
    finally:
        loop.close()
        signal.signal(signal.SIGINT, handler)
    assert 8 <= len(server.requests) < 40
    assert len(texts(path)) == len(server.requests)


def test_it_works_in_a_thread(serve: Serve, path: Path) -> None:
    thread = threading.Thread(target=run_requests, args=(path, serve().url, [request(i) for i in range(20)]))
    thread.start()
    thread.join()
    assert len(texts(path)) == 20
