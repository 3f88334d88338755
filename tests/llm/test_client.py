"""The client: retries, adaptation of load to rejections, and malformed replies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlaif.config.models import ClientConfig
from rlaif.errors import EndpointError, RlaifError, UsageError
from rlaif.llm.chat_protocol import ChatResponse, parse_retry_after, split_reasoning
from rlaif.llm.client import Client
from rlaif.llm.endpoint import ConnectionLostError, RateLimiter
from rlaif.llm.request import RequestCancelled, RequestFailedError
from rlaif.llm.retries import MAX_RETRY_DELAY_S
from rlaif.llm.usage import UsageMeter
from tests.conftest import ROOT
from tests.fake_server import Answer, Fault, ScriptedServer, echo, with_probabilities
from tests.processes import wait_until

Serve = Callable[..., ScriptedServer]
BODY = {"messages": [{"role": "user", "content": "hello"}]}
SECRET = "sk-live-0123456789-abcdef"


def talk(
    urls: str | list[str],
    work: Callable[[Client], Any],
    *,
    usage: UsageMeter | None = None,
    key: str | None = None,
    model: str = "m",
    restart_server: Any = None,
    **config: Any,
) -> Any:
    """Run ``await work(client)`` with a client of ``urls`` and close it."""
    urls = [urls] if isinstance(urls, str) else urls
    client = Client(model, urls, ClientConfig(**config), usage or UsageMeter(), key=key, restart_server=restart_server)

    async def main() -> Any:
        async with client:
            return await work(client)

    return asyncio.run(main())


def chat(urls: str | list[str], **options: Any) -> ChatResponse:
    reply: ChatResponse = talk(urls, lambda client: client.chat(BODY), **options)
    return reply


def replies_in_turn(*replies: Any) -> Answer:
    """Return each of ``replies`` once, then always the last one."""
    remaining = list(replies)
    return lambda body: remaining.pop(0) if len(remaining) > 1 else remaining[0]


def message(content: Any = "fine", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content, **more}, "finish_reason": "stop"}]}


# Retries

MALFORMED_REPLIES = {
    "not JSON": Fault(200, body=b"<html>busy</html>", headers={"Content-Type": "application/json"}),
    "not JSON, and labeled so": Fault(200, body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
    "nothing": Fault(200, body=b"", headers={"Content-Type": "application/json"}),
    "not UTF-8": Fault(200, body=b"\xff\xfe{}", headers={"Content-Type": "application/json"}),
    "a list": Fault(200, body=b"[]", headers={"Content-Type": "application/json"}),
    "a number": Fault(200, body=b"7", headers={"Content-Type": "application/json"}),
    "a million brackets": Fault(200, body=b"[" * 1_000_000, headers={"Content-Type": "application/json"}),
    "half a body": Fault(200, body=b'{"choices": [', content_length=1000, headers={"Content-Type": "application/json"}),
    "not gzip": Fault(200, body=b"plain", headers={"Content-Encoding": "gzip"}),
    "not HTTP": Fault(raw=b"\x00\x01 who are you\r\n\r\n"),
    "a broken chunk": Fault(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{"),
    "a cut connection": Fault(0),
    "no choices": {"choices": []},
    "choices missing": {"usage": {}},
    "choices that are not a list": {"choices": {"0": 1}},
    "an error in a 200": {"error": {"message": "upstream is busy"}},
    "a choice without message": {"choices": [{"index": 0}]},
    "a choice that is text": {"choices": ["hello"]},
    "content that is not text": message([{"type": "text", "text": "hello"}]),
}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_transient_statuses_are_retried(serve: Serve, waits: list[float], status: int) -> None:
    server, usage = serve(replies_in_turn(Fault(status), Fault(status), ["fine"])), UsageMeter()
    assert chat(server.url, usage=usage).choices[0].text == "fine"
    assert len(server.requests) == 3
    assert usage.retries == len(waits) == 2


@pytest.mark.parametrize("server_reply", MALFORMED_REPLIES.values(), ids=MALFORMED_REPLIES)
def test_malformed_replies_are_retried(serve: Serve, waits: list[float], server_reply: Any) -> None:
    server = serve(replies_in_turn(server_reply, ["fine"]))
    assert chat(server.url).choices[0].text == "fine"
    assert len(server.requests) == 2


@pytest.mark.parametrize("server_reply", MALFORMED_REPLIES.values(), ids=MALFORMED_REPLIES)
def test_a_request_that_only_gets_malformed_replies_fails_alone(
    serve: Serve, waits: list[float], server_reply: Any
) -> None:
    """The error is RequestFailedError for any malformed reply, so other requests continue. Attempts are limited."""
    server = serve(lambda body: server_reply)
    with pytest.raises(RequestFailedError) as caught:
        chat(server.url, max_attempts=3)
    assert len(server.requests) == 3
    assert 5 < len(str(caught.value)) < 400


@pytest.mark.parametrize("status", [400, 402, 405, 413, 422, 451])
def test_permanent_statuses_are_never_retried(serve: Serve, waits: list[float], status: int) -> None:
    server = serve(lambda body: Fault(status))
    with pytest.raises(RequestFailedError, match=f"HTTP {status}: scripted fault"):
        chat(server.url)
    assert len(server.requests) == 1
    assert not waits


@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, "requires an API key"), (403, "requires an API key"), (404, "no model 'm' or no chat completions")],
)
def test_statuses_that_would_fail_every_request_end_the_command(
    serve: Serve, waits: list[float], status: int, expected: str
) -> None:
    server = serve(lambda body: Fault(status))
    with pytest.raises(EndpointError, match=expected) as caught:
        chat(server.url)
    assert caught.value.location == server.url
    assert len(server.requests) == (2 if status == 403 else 1)  # a second one checks if the prompt was the reason
    assert not waits


def test_an_early_403_is_about_the_prompt_if_a_harmless_prompt_is_answered(serve: Serve) -> None:
    """It returns at once, so it may be the first of many in flight; in a later start only such prompts are pending."""
    server, usage = serve(lambda body: Fault(403) if body["messages"] == BODY["messages"] else ["A"]), UsageMeter()

    async def work(client: Client) -> list[Any]:
        return list(await asyncio.gather(*(client.chat(BODY) for _ in range(20)), return_exceptions=True))

    results = talk(server.url, work, usage=usage)
    assert all(isinstance(result, RequestFailedError) and result.rejected for result in results)
    assert len(server.requests) == 21
    assert usage.requests == 1


def test_a_403_after_an_answer_is_about_the_prompt(serve: Serve) -> None:
    """Hosts return 403 for a prompt that their filter rejects, and one of them must not end the run."""
    server = serve(replies_in_turn(["fine"], Fault(403), ["fine"]))

    async def work(client: Client) -> list[str]:
        results = []
        for _ in range(3):
            try:
                results.append((await client.chat(BODY)).choices[0].text)
            except RequestFailedError as error:
                results.append(str(error)[:8])
        return results

    assert talk(server.url, work) == ["fine", "HTTP 403", "fine"]


def test_attempts_are_limited(serve: Serve, waits: list[float]) -> None:
    server, usage = serve(lambda body: Fault(503)), UsageMeter()
    with pytest.raises(RequestFailedError, match="HTTP 503: scripted fault"):
        chat(server.url, usage=usage, max_attempts=4)
    assert len(server.requests) == 4
    assert usage.retries == 3


def test_each_timeout_before_the_first_answer_doubles_the_time_limit(serve: Serve, waits: list[float]) -> None:
    """The speed of a server that has never answered is unknown; the same limit again would fail in the same way."""
    server = serve(delay_s=5)

    async def work(client: Client) -> None:
        with pytest.raises(RequestFailedError, match=r"no answer within 0\.4"):
            await client.chat(BODY)
        assert client.limit == 16

    talk(server.url, work, timeout_s=0.2, max_attempts=2)
    assert len(server.requests) == 2


def test_a_server_that_sends_single_bytes_times_out(waits: list[float]) -> None:
    """The time limit is for the whole answer; single bytes do not extend it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    while True:
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(RequestFailedError, match=r"no answer within 0\.4 s"):
            chat(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout_s=0.4, max_attempts=1)
        thread.join()


def test_answers_may_take_up_to_the_configured_time(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    """The read timeout of downloads does not apply to requests."""
    monkeypatch.setattr("rlaif.llm.endpoint.DOWNLOAD_READ_TIMEOUT_S", 0.1)
    assert chat(serve(delay_s=0.5).url, max_attempts=1, timeout_s=30).choices
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(ConnectionLostError):
            talk(url, lambda client: client.endpoints[0].download("/files/1/content", tmp_path / "file"))


def test_a_connect_timeout_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a response timeout: the server never received the request."""
    monkeypatch.setattr("rlaif.llm.endpoint.CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as waiting:
        for _ in range(4):  # the kernel accepts no further connections
            connection = waiting.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        with pytest.raises(RequestFailedError, match=r"connection lost \(not made within 0\.2 s\)"):
            chat(url, max_attempts=1, timeout_s=30)


def test_an_unreachable_server_is_a_lost_connection_and_not_a_timeout(waits: list[float]) -> None:
    with pytest.raises(RequestFailedError, match=r"connection lost \(.*Connect call failed"):
        chat("http://127.0.0.1:9/v1", max_attempts=2)


# Delays


@pytest.mark.parametrize(
    ("header", "shortest", "longest"),
    [
        ("7", 7, 8),
        ("1.5", 1.5, 2.5),
        ("0", 0, 1),
        ("99999999", 600, 601),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 1),
        ("Wed Oct 21 07:28:00 2015", 0, 1),
        *[
            (malformed, 0.1, 1)
            for malformed in ("soon", "-3", "nan", "inf", "1e3", "²", "", "Wed, 99 Oct 2015 07:28:00 GMT")
        ],
    ],
)
def test_retry_after_is_respected_unless_it_is_malformed(
    serve: Serve, waits: list[float], header: str, shortest: float, longest: float
) -> None:
    server = serve(replies_in_turn(Fault(429, headers={"Retry-After": header}), ["fine"]))
    chat(server.url)
    assert len(waits) == 1
    assert shortest <= waits[0] <= longest


def test_retry_after_may_be_a_date(serve: Serve, waits: list[float]) -> None:
    server = serve(lambda body: Fault(503, headers={"Retry-After": formatdate(time.time() + 90, usegmt=True)}))
    with pytest.raises(RequestFailedError):
        chat(server.url, max_attempts=2)
    assert 85 < waits[0] < 92


def test_a_date_without_a_zone_is_utc() -> None:
    after = parse_retry_after(time.strftime("%a %b %d %H:%M:%S %Y", time.gmtime(time.time() + 90)))
    assert after is not None
    assert 85 < after < 92


def test_back_off_grows_with_jitter_up_to_a_maximum(serve: Serve, waits: list[float]) -> None:
    random.seed(0)
    with pytest.raises(RequestFailedError):
        chat(serve(lambda body: Fault(500)).url, max_attempts=50)
    assert all(0.1 <= wait <= min(MAX_RETRY_DELAY_S, 0.5 * 2 ** (i + 1)) for i, wait in enumerate(waits))
    assert max(waits) > 30
    assert len(set(waits)) == len(waits)


# Load


def test_the_limit_halves_once_per_burst_and_grows_back(serve: Serve, waits: list[float]) -> None:
    """64 rejections of requests that were sent together halve the limit once, not 64 times."""
    refusing = [True]
    server = serve(lambda body: Fault(429) if refusing[0] else ["fine"], delay_s=0.05)

    async def work(client: Client) -> None:
        assert client.limit == 64
        await asyncio.gather(*(client.chat(BODY) for _ in range(64)), return_exceptions=True)
        assert client.limit == 32
        with pytest.raises(RequestFailedError):
            await client.chat(BODY)
        assert client.limit == 16
        refusing[0], server.delay_s = False, 0.0
        limits = [client.limit]
        for _ in range(40):
            await asyncio.gather(*(client.chat(BODY) for _ in range(50)))
            limits.append(client.limit)
        assert limits == sorted(limits)
        assert client.limit == 64

    talk(server.url, work, max_attempts=1)


def test_the_limit_never_falls_below_one(serve: Serve, waits: list[float]) -> None:
    async def work(client: Client) -> float:
        with pytest.raises(RequestFailedError):
            await client.chat(BODY)
        return client.limit

    assert talk(serve(lambda body: Fault(429)).url, work, concurrency=4, max_attempts=10) == 1.0


def test_the_least_loaded_endpoint_is_preferred(serve: Serve) -> None:
    slow, quick = serve(delay_s=0.6), serve(delay_s=0.02)

    async def work(client: Client) -> None:
        slots = asyncio.Semaphore(8)

        async def chat_in_slot() -> None:
            async with slots:
                await client.chat(BODY)

        await asyncio.gather(*(chat_in_slot() for _ in range(80)))

    talk([slow.url, quick.url], work)
    assert len(slow.requests) + len(quick.requests) == 80
    assert 1 <= len(slow.requests) <= 16
    assert slow.max_in_flight <= 8


@pytest.mark.parametrize("fault", [Fault(0), Fault(503)], ids=["dead", "failing"])
def test_a_failing_endpoint_does_not_attract_all_requests(serve: Serve, waits: list[float], fault: Fault) -> None:
    """It is always the least loaded one: without back-off, all attempts of all requests would go there."""
    dead, good = serve(lambda body: fault), serve(delay_s=0.01)

    async def work(client: Client) -> list[ChatResponse]:
        return list(await asyncio.gather(*(client.chat(BODY) for _ in range(60))))

    assert len(talk([dead.url, good.url], work, max_attempts=3)) == 60
    assert len(good.requests) == 60
    assert len(dead.requests) <= 30  # those of the first burst


def test_a_lost_connection_restarts_the_server_and_an_http_error_does_not(serve: Serve, waits: list[float]) -> None:
    restarts: list[int] = []

    async def restart_server(silent_since: float | None) -> None:
        assert silent_since is None
        restarts.append(len(server.requests))

    server = serve(replies_in_turn(Fault(0), Fault(500), ["not JSON"], ["fine"]))
    assert chat(server.url, restart_server=restart_server).choices[0].text
    assert restarts == [1]


def test_a_failed_restart_ends_the_command(serve: Serve, waits: list[float]) -> None:
    async def restart_server(silent_since: float | None) -> None:
        raise EndpointError("gone for good")

    with pytest.raises(EndpointError, match="gone for good"):
        chat(serve(lambda body: Fault(0)).url, restart_server=restart_server)


@pytest.mark.parametrize("others", [0, 1], ids=["no other answers", "other answers"])
def test_a_server_is_silent_only_if_it_answers_no_request(serve: Serve, waits: list[float], others: int) -> None:
    """A server that takes too long for one request, but answers others, does not hang."""
    restarts: list[float | None] = []

    async def restart_server(silent_since: float | None) -> None:
        restarts.append(silent_since)

    def answer(body: dict[str, Any]) -> Any:
        return Fault(500, delay_s=30.0) if body.get("seed") == 0 and len(restarts) < 2 else ["fine"]

    async def work(client: Client) -> None:
        began = time.monotonic()
        first = asyncio.create_task(client.chat({**BODY, "seed": 0}))
        for _ in range(3 * others):
            await asyncio.sleep(0.15)
            await client.chat(BODY)
        await first
        assert all(since is None if others else since and since >= began - 0.01 for since in restarts[:1])
        assert len(restarts) == 2

    talk(serve(answer).url, work, restart_server=restart_server, timeout_s=0.3)


# check()


def check(url: str | list[str], **options: Any) -> str:
    engine: str = talk(url, lambda client: client.check(), **options)
    return engine


def test_check_detects_vllm(serve: Serve) -> None:
    vllm, other = serve(), serve(owned_by="someone")
    assert check(vllm.url) == "vllm"
    assert check(other.url) == "other"
    assert check([vllm.url, vllm.url]) == "vllm"
    assert check([vllm.url, other.url]) == "other"  # parameters of vLLM must not be sent to both
    assert not vllm.requests


@pytest.mark.parametrize(
    "listing",
    [
        *[Fault(status) for status in (400, 404, 405)],
        Fault(200, body=b"<html>"),
        Fault(200, body=b"<html>", headers={"Content-Type": "application/json"}),
        Fault(200, body=b"[" * 200_000, headers={"Content-Type": "application/json"}),
        *[
            Fault(200, body=json.dumps(value).encode(), headers={"Content-Type": "application/json"})
            for value in ([], None, {"data": None}, {"data": "m"}, {"data": [1, None, "m"]}, {"data": []})
        ],
    ],
)
def test_an_endpoint_that_lists_no_models_is_accepted(serve: Serve, listing: Fault) -> None:
    server = serve(listing=listing)
    assert check(server.url) == "other"
    assert chat(server.url).choices[0].text


TRANSIENT_STATUSES = [429, 500, 502, 503]


@pytest.mark.parametrize("status", TRANSIENT_STATUSES)
def test_the_list_of_models_is_retried(serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """A vLLM behind a busy proxy is still detected, as the result holds for the whole run."""
    server = serve(listing=Fault(status))

    def wait(_state: Any) -> float:
        server.listing = None
        return 0.0

    monkeypatch.setattr("rlaif.llm.retries.retry_delay", wait)
    assert check(server.url) == "vllm"


@pytest.mark.parametrize("status", TRANSIENT_STATUSES)
def test_an_endpoint_that_keeps_failing_is_unavailable(serve: Serve, waits: list[float], status: int) -> None:
    failing, healthy = serve(listing=Fault(status)), serve()
    with pytest.raises(EndpointError, match=rf"unavailable \(HTTP {status}: scripted fault\)") as caught:
        check(failing.url, max_attempts=3)
    assert caught.value.location == failing.url
    assert len(waits) == 3
    assert check([failing.url, healthy.url]) == "vllm"


def test_an_unreachable_server_is_reported(waits: list[float]) -> None:
    with pytest.raises(EndpointError, match="unreachable") as caught:
        check("http://127.0.0.1:9/v1")
    assert caught.value.location == "http://127.0.0.1:9/v1"
    assert "--base-url" in str(caught.value.hint)


@pytest.mark.parametrize("listing", [Fault(0), Fault(raw=b"SSH-2.0-OpenSSH_9.2\r\n")], ids=["cut", "not HTTP"])
def test_a_server_that_does_not_speak_http_is_unreachable(serve: Serve, listing: Fault) -> None:
    with pytest.raises(EndpointError, match="unreachable"):
        check(serve(listing=listing).url)


def test_a_server_that_does_not_list_its_models_in_time_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="unreachable"):
            check(url, timeout_s=0.2)


def test_rejected_and_missing_keys(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(key=SECRET)
    with pytest.raises(EndpointError, match="requires an API key, and none is set") as caught:
        check(server.url)
    assert "export OPENAI_API_KEY=" in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(EndpointError, match="API key was rejected"):
        check(server.url)
    monkeypatch.setenv("RLAIF_API_KEY", f" {SECRET}\n")  # takes precedence; whitespace from `$(cat file)` is stripped
    assert check(server.url) == "vllm"
    assert chat(server.url).choices
    assert server.keys[-1] == f"Bearer {SECRET}"


def test_an_unknown_model_is_reported_with_a_suggestion(serve: Serve) -> None:
    server = serve(models=("llama-3-8b-instruct", "qwen-7b"))
    with pytest.raises(EndpointError, match="has no model 'llama-3-8b-instuct'") as caught:
        check(server.url, model="llama-3-8b-instuct")
    assert "Did you mean 'llama-3-8b-instruct'?" in caught.value.message
    assert caught.value.location == server.url
    with pytest.raises(EndpointError, match="llama-3-8b-instruct, qwen-7b"):
        check(server.url, model="zzz")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://x/v1", "http://", "http://h:port/v1", "http://[::1/v1"]
)
def test_a_malformed_url_is_rejected_before_anything_is_sent(url: str) -> None:
    with pytest.raises(UsageError, match="is not a URL"):
        Client("m", [url], ClientConfig(), UsageMeter())


def test_loopback_bypasses_proxies(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies from the environment are not used for this machine."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = serve()
    assert check(server.url) == "vllm"
    assert chat(server.url, max_attempts=1).choices


# Contents of a reply


def first_reply(serve: Serve, reply: dict[str, Any], **options: Any) -> ChatResponse:
    return chat(serve(lambda body: reply).url, max_attempts=1, **options)


def test_only_the_model_is_added_to_a_request(serve: Serve) -> None:
    server = serve()
    talk(server.url, lambda client: client.chat({**BODY, "seed": 3, "structured_outputs": {"choice": ["A"]}}))
    assert server.requests == [{**BODY, "model": "m", "seed": 3, "structured_outputs": {"choice": ["A"]}}]


def test_choices_keep_their_order(serve: Serve) -> None:
    reply = talk(serve().url, lambda client: client.chat({**BODY, "n": 5}))
    assert [choice.text for choice in reply.choices] == echo({**BODY, "n": 5})
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}


def test_json_with_another_content_type_is_parsed(serve: Serve) -> None:
    server = serve(lambda body: Fault(200, body=json.dumps(message()).encode(), headers={"Content-Type": "text/plain"}))
    assert chat(server.url, max_attempts=1).choices[0].text == "fine"


def test_messages_without_content_and_refusals_are_parsed(serve: Serve) -> None:
    assert first_reply(serve, message(None)).choices[0].text == ""
    assert first_reply(serve, {"choices": [{"message": {}}]}).choices[0].text == ""
    assert (
        first_reply(serve, message(None, refusal="I cannot help with that.")).choices[0].text
        == "I cannot help with that."
    )


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("plain", None, "plain"),
        ("<think>why\n\nnot</think>\n\nanswer", "why\n\nnot", "answer"),
        ("\n<think>\nwhy</think>answer", "why", "answer"),
        ("why</think>\nanswer", "why", "answer"),  # opened by the chat template
        ("<think></think>answer", None, "answer"),
        ("<think>cut off before", "cut off before", ""),
        ("<think>", None, ""),
        ("tags like <think> in the middle", None, "tags like <think> in the middle"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("  leading space stays", None, "  leading space stays"),
        ("", None, ""),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, reasoning: str | None, answer: str) -> None:
    assert split_reasoning(text) == (reasoning, answer)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_split_by_the_server_leaves_the_answer_unchanged(serve: Serve, field: str) -> None:
    """An answer that mentions the tags themselves stays complete."""
    choice = first_reply(serve, message("Close it with </think> here.", **{field: "hm"})).choices[0]
    assert (choice.reasoning, choice.text) == ("hm", "Close it with </think> here.")
    choice = first_reply(serve, message("<think>a</think>b", **{field: ""})).choices[0]
    assert (choice.reasoning, choice.text) == ("a", "b")


def test_logprobs_and_tool_calls_are_passed_on(serve: Serve) -> None:
    tokens = [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "A", "logprob": -0.1}]}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f\ud800", "arguments": "{}"}}]
    reply = message("A", tool_calls=[*calls, "malformed"])
    reply["choices"][0]["logprobs"] = {"content": tokens}
    choice = first_reply(serve, reply).choices[0]
    assert choice.logprobs == tokens
    assert choice.tool_calls is not None
    assert choice.tool_calls[0]["function"]["name"] == "f\ufffd"
    assert len(choice.tool_calls) == 1
    plain = first_reply(serve, message()).choices[0]
    assert plain.logprobs is plain.tool_calls is plain.reasoning is None


def test_lone_surrogates_are_replaced(serve: Serve) -> None:
    choice = first_reply(serve, message("a\ud800b", reasoning_content="c\udfff")).choices[0]
    assert (choice.text, choice.reasoning) == ("a\ufffdb", "c\ufffd")


def test_cached_tokens_are_counted(serve: Serve) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 64}}
    counted = first_reply(serve, {**message(), "usage": usage}).usage
    assert (counted.prompt_tokens, counted.cached_tokens, counted.completion_tokens) == (100, 64, 7)
    assert counted.cost_usd == 0.0


ANY_SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=100, deadline=None)
@given(prompt=ANY_SCALAR, completion=ANY_SCALAR, cached=ANY_SCALAR, well_formed=st.booleans())
def test_malformed_usage_never_breaks_a_reply_or_leads_to_a_negative_cost(
    prompt: Any, completion: Any, cached: Any, well_formed: bool
) -> None:
    """More cached tokens than prompt tokens, strings, NaN: counted as valid numbers, at the prices of a paid host."""
    client = Client("gpt-4o-mini", ["https://api.openai.com/v1"], ClientConfig(), UsageMeter())
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    reply = client.parse_response({**message(), "usage": usage if well_formed else prompt}, client.url)
    counted = reply.usage
    assert 0 <= counted.cached_tokens <= counted.prompt_tokens < 2**53
    assert 0 <= counted.completion_tokens < 2**53
    assert counted.cost_usd >= 0


JSON = st.recursive(
    ANY_SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "message",
                    "content",
                    "choices",
                    "logprobs",
                    "tool_calls",
                    "refusal",
                    "finish_reason",
                    "usage",
                    "reasoning",
                    "error",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(JSON, JSON)
@example({}, {"content": "hello"})
@example({}, {"content": None, "refusal": 1})
def test_any_json_is_parsed_or_fails_its_request(value: Any, choice: Any) -> None:
    from rlaif.llm.chat_protocol import MalformedResponseError

    client = Client("m", ["http://127.0.0.1:9/v1"], ClientConfig(), UsageMeter())
    for body in (
        value,
        {"choices": [choice]},
        {"choices": [{"message": choice}]},
        {"choices": [{"message": value, **(choice if isinstance(choice, dict) else {})}]},
    ):
        try:
            reply = client.parse_response(body, client.url)
        except MalformedResponseError:
            continue
        for parsed in reply.choices:
            parsed.text.encode()
            assert parsed.reasoning is None or isinstance(parsed.reasoning, str)


@pytest.mark.parametrize(
    ("server_reply", "expected"),
    [
        ({"content": [{"token": "A", "logprob": 0.0, "top_logprobs": [{"token": "A", "logprob": 0.0}]}]}, True),
        (
            {"content": [{"token": "A", "logprob": 0.0, "top_logprobs": []}]},
            False,
        ),  # the probabilities of other tokens are missing
        ({"content": []}, False),
        ({"content": ["A"]}, False),
        (None, False),
    ],
)
def test_the_probe_detects_logprobs(serve: Serve, server_reply: Any, expected: bool) -> None:
    reply = message("A")
    reply["choices"][0]["logprobs"] = server_reply
    server, usage = serve(lambda body: reply), UsageMeter()
    assert talk(server.url, lambda client: client.supports_logprobs(20), usage=usage) is expected
    assert server.requests[0]["top_logprobs"] == 20
    assert usage.requests == 1


def test_an_engine_that_rejects_the_probe_has_no_logprobs(serve: Serve) -> None:
    server = serve(lambda body: Fault(400))
    assert talk(server.url, lambda client: client.supports_logprobs()) is False
    assert len(server.requests) == 1


@pytest.mark.parametrize("server_reply", [Fault(503), Fault(429), Fault(402), Fault(0), Fault(200, body=b"busy")])
def test_a_failed_probe_is_not_taken_for_missing_logprobs(serve: Serve, waits: list[float], server_reply: Any) -> None:
    server = serve(lambda body: server_reply)

    async def work(client: Client) -> bool:
        with pytest.raises(EndpointError, match="probe for token probabilities failed") as caught:
            await client.supports_logprobs()
        assert caught.value.location == server.url
        server.answer = lambda body: with_probabilities({"A": 1.0})
        return await client.supports_logprobs()

    assert talk(server.url, work, max_attempts=2) is True


# Keys


def test_the_key_appears_in_no_error_log_or_repr(
    serve: Serve, caplog: pytest.LogCaptureFixture, waits: list[float]
) -> None:
    """Servers quote the key that they reject."""
    caplog.set_level(logging.DEBUG)
    quoting = json.dumps({"error": {"message": f"Incorrect API key provided: {SECRET}. Bearer {SECRET}"}}).encode()
    messages = []
    for server_reply in (
        Fault(400, body=quoting),
        Fault(401, body=quoting),
        Fault(404, body=quoting),
        Fault(500, body=quoting),
        {"error": {"message": f"key {SECRET}"}},
        Fault(200, body=quoting),
        Fault(0),
    ):
        with pytest.raises((RequestFailedError, RlaifError)) as caught:
            chat(serve(lambda body, server_reply=server_reply: server_reply).url, key=SECRET, max_attempts=2)
        messages.append(f"{caught.value} {caught.value!r} {caught.getrepr(style='short')}")
    client = Client("m", ["http://127.0.0.1:9/v1"], ClientConfig(), UsageMeter(), key=SECRET)
    messages += [repr(client), str(client), repr(client.endpoints), repr(client.endpoints[0])]
    assert "***" in messages[0]
    assert caplog.text
    assert SECRET not in "\n".join(messages) + caplog.text


def text_with_key_across(cut: int) -> str:
    """Return a text that ends in a key which begins before ``cut``."""
    return "x " * (cut // 2 - 5) + SECRET


@pytest.mark.parametrize(
    "server_reply",
    [
        Fault(400, body=text_with_key_across(500).encode()),
        Fault(404, body=text_with_key_across(500).encode()),
        Fault(503, body=text_with_key_across(500).encode()),
        Fault(200, body=f"wrong key: {SECRET}".encode()),
        Fault(200, body=text_with_key_across(80).encode()),
        {"error": {"message": text_with_key_across(200)}},
        Fault(raw=text_with_key_across(40).encode() + b"\r\n\r\n"),
    ],
)
def test_no_part_of_a_key_remains_where_a_text_is_cut(serve: Serve, waits: list[float], server_reply: Any) -> None:
    with pytest.raises((RequestFailedError, RlaifError)) as caught:
        chat(serve(lambda body: server_reply).url, key=SECRET, max_attempts=1)
    assert SECRET[:4] not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_no_key_remains_in_errors_of_the_list_of_models(serve: Serve) -> None:
    raw = Fault(raw=text_with_key_across(40).encode() + b"\r\n\r\n")
    with pytest.raises(EndpointError, match="unreachable") as caught:
        check(serve(listing=raw).url, key=SECRET)
    assert SECRET[:4] not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-’quoted’", "sk a", "\x00"])
def test_an_invalid_key_is_reported_by_its_variable(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    if "\x00" in key:
        monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="key in OPENAI_API_KEY") as caught:
        Client("m", ["http://127.0.0.1:9/v1"], ClientConfig(), UsageMeter())
    assert key not in str(caught.value)


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@127.0.0.1:9/v1", f"http://{SECRET}@127.0.0.1:9/v1"])
def test_a_url_with_a_password_is_rejected_without_quoting_it(url: str) -> None:
    with pytest.raises(UsageError, match="user name or a password") as caught:
        Client("m", [url], ClientConfig(), UsageMeter())
    assert SECRET not in str(caught.value)


# The end


def test_nothing_is_printed_at_exit(serve: Serve) -> None:
    """Connections are closed, even after failures and with requests cancelled in flight."""
    good, cut, slow = serve(), serve(lambda body: Fault(0)), serve(delay_s=2)
    code = f"""
import asyncio
from rlaif.config.models import ClientConfig
from rlaif.llm.usage import UsageMeter
from rlaif.llm.client import Client

BODY = {BODY!r}

async def main():
    async with Client("m", [{good.url!r}, {cut.url!r}], ClientConfig(max_attempts=2), UsageMeter()) as client:
        await client.check()
        await asyncio.gather(*(client.chat(BODY) for _ in range(20)), return_exceptions=True)
    async with Client("m", [{slow.url!r}], ClientConfig(), UsageMeter()) as client:
        task = asyncio.create_task(client.chat(BODY))
        await asyncio.sleep(0.2)
        task.cancel()

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert good.requests
    assert cut.requests
    assert slow.requests


# Open files, rate limits and back-off


def run_with_file_limit(soft: int, hard: int, url: str, concurrency: int) -> subprocess.CompletedProcess[str]:
    """Send ``concurrency`` requests at once from a process with these limits of open files."""
    code = f"""
import asyncio, resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from rlaif.config.models import ClientConfig
from rlaif.llm.usage import UsageMeter
from rlaif.llm.client import Client

async def main():
    config = ClientConfig(concurrency={concurrency}, max_attempts=1)
    async with Client("m", [{url!r}], config, UsageMeter()) as client:
        await asyncio.gather(*(client.chat({BODY!r}) for _ in range({concurrency})))

asyncio.run(main())
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_limit_of_open_files_is_raised_or_reported(serve: Serve) -> None:
    """Otherwise it would look as if the server cut connections."""
    server = serve(delay_s=1.0)
    done = run_with_file_limit(200, 1024, server.url, 300)
    assert (done.returncode, done.stderr) == (0, "")
    assert server.max_in_flight > 200
    server.requests.clear()
    stderr = run_with_file_limit(200, 400, server.url, 300).stderr
    assert "300 concurrent requests need 428 open files, but the limit is 400" in stderr
    assert "Lower it to 272" in stderr
    assert not server.requests


def test_rate_limits_spread_requests_and_tokens_over_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stopped clock: the delays of a burst follow from the limits, and a correction changes them."""
    monkeypatch.setattr("rlaif.llm.endpoint.time.monotonic", lambda: 1000.0)
    limiter, waits = RateLimiter(requests_per_minute=60, tokens_per_minute=None), list[float]()
    for _ in range(4):
        waits.append(limiter.delay_s())
        limiter.reserve(1e9)
    assert waits == [0.0, 1.0, 2.0, 3.0]
    limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=6000)
    limiter.reserve(500)
    assert limiter.delay_s() == pytest.approx(5.0)
    limiter.adjust(-300)
    assert limiter.delay_s() == pytest.approx(2.0)
    limiter = RateLimiter(requests_per_minute=None, tokens_per_minute=None)
    limiter.reserve(1e9)
    assert limiter.delay_s() == 0.0


def test_rate_limits_apply_per_endpoint(serve: Serve) -> None:
    """At 1,200 per minute, the seventh request to an endpoint is sent 0.3 s after its first."""
    servers = [serve(), serve()]
    arrived: dict[str, list[float]] = {server.url: [] for server in servers}
    for server in servers:
        server.answer = lambda body, url=server.url: (arrived[url].append(time.monotonic()), echo(body))[1]

    async def work(client: Client) -> None:
        await asyncio.gather(*(client.chat(BODY) for _ in range(14)))

    talk([server.url for server in servers], work, requests_per_minute=1200)
    for times in arrived.values():
        assert len(times) == 7
        assert times[-1] - times[0] >= 0.25


def test_requests_that_wait_for_the_rate_limit_are_not_sent_after_a_stop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlaif.llm.retries.STOP_CHECK_INTERVAL_S", 0.01)
    server, usage = serve(), UsageMeter()

    async def work(client: Client) -> list[Any]:
        pending = asyncio.gather(*(client.chat(BODY) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0.1)
        usage.interrupted = True
        return await pending

    results = talk(server.url, work, usage=usage, requests_per_minute=1)
    assert [type(result) for result in results] == [ChatResponse, RequestCancelled, RequestCancelled]
    assert len(server.requests) == 1


def test_requests_that_wait_for_a_retry_are_not_sent_after_a_stop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asked for a delay of one minute, and the stop does not shorten it."""
    monkeypatch.setattr("rlaif.llm.retries.STOP_CHECK_INTERVAL_S", 0.01)
    server, usage = serve(lambda body: Fault(429, {"Retry-After": "60"})), UsageMeter()

    async def work(client: Client) -> list[Any]:
        pending = asyncio.gather(*(client.chat(BODY) for _ in range(3)), return_exceptions=True)
        assert await asyncio.to_thread(wait_until, lambda: usage.retries == 3)
        usage.interrupted = True
        return await pending

    assert [type(result) for result in talk(server.url, work, usage=usage)] == [RequestCancelled] * 3
    assert len(server.requests) == 3


def test_a_dead_endpoint_gets_one_request_at_a_time_and_ever_fewer(
    serve: Serve, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The healthy endpoint answers everything."""
    monkeypatch.setattr("rlaif.llm.endpoint.BACKOFF_S", 0.05)
    dead, alive = serve(lambda body: Fault(503)), serve(delay_s=0.01)

    async def work(client: Client) -> float:
        for _ in range(15):
            await asyncio.gather(*(client.chat(BODY) for _ in range(4)))
        return client.endpoints[0]._backoff_until - time.monotonic()

    remaining_backoff_s = talk([dead.url, alive.url], work)
    assert len(alive.requests) == 60
    assert 1 <= len(dead.requests) <= 8
    assert remaining_backoff_s < 10


def test_after_a_429_with_retry_after_requests_go_to_another_endpoint(serve: Serve, waits: list[float]) -> None:
    busy, idle = serve(lambda body: Fault(429, {"Retry-After": "60"})), serve()

    async def work(client: Client) -> None:
        for _ in range(6):
            await client.chat(BODY)

    talk([busy.url, idle.url], work)
    assert (len(busy.requests), len(idle.requests)) == (1, 6)


def test_a_deadline_covers_all_attempts_of_a_request(serve: Serve, waits: list[float]) -> None:
    """Each attempt takes 0.3 s. The second one ends after the deadline, so 50 allowed attempts do
    not lead to a third."""
    server = serve(lambda body: Fault(503), delay_s=0.3)
    with pytest.raises(RequestFailedError, match="HTTP 503"):
        chat(server.url, request_deadline_s=0.5, max_attempts=50)
    assert len(server.requests) <= 2
