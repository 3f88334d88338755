"""The client: what is tried again and what never, how load follows refusals, and what becomes of odd replies."""

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
from rlaif.llm.client import MAX_RETRY_DELAY_S, Client, RequestCancelled, RequestFailedError
from rlaif.llm.endpoint import ConnectionLostError, RateLimiter
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
    """Gives each of ``replies`` once and the last one ever after."""
    remaining = list(replies)
    return lambda body: remaining.pop(0) if len(remaining) > 1 else remaining[0]


def message(content: Any = "fine", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content, **more}, "finish_reason": "stop"}]}


# What is tried again

RUBBISH = {
    "not JSON": Fault(200, body=b"<html>busy</html>", headers={"Content-Type": "application/json"}),
    "not JSON, and said so": Fault(200, body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
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
    "choices that are no list": {"choices": {"0": 1}},
    "an error in a 200": {"error": {"message": "upstream is busy"}},
    "a choice without message": {"choices": [{"index": 0}]},
    "a choice that is text": {"choices": ["hello"]},
    "content that is no text": message([{"type": "text", "text": "hello"}]),
}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_passing_refusal_is_tried_again(serve: Serve, waits: list[float], status: int) -> None:
    server, usage = serve(replies_in_turn(Fault(status), Fault(status), ["fine"])), UsageMeter()
    assert chat(server.url, usage=usage).choices[0].text == "fine"
    assert len(server.requests) == 3
    assert usage.retries == len(waits) == 2


@pytest.mark.parametrize("server_reply", RUBBISH.values(), ids=RUBBISH)
def test_a_reply_that_is_no_reply_is_tried_again(serve: Serve, waits: list[float], server_reply: Any) -> None:
    server = serve(replies_in_turn(server_reply, ["fine"]))
    assert chat(server.url).choices[0].text == "fine"
    assert len(server.requests) == 2


@pytest.mark.parametrize("server_reply", RUBBISH.values(), ids=RUBBISH)
def test_what_never_becomes_a_reply_fails_that_request_alone(
    serve: Serve, waits: list[float], server_reply: Any
) -> None:
    """However odd the reply, the error is RequestFailedError: the others go on. Attempts are bounded."""
    server = serve(lambda body: server_reply)
    with pytest.raises(RequestFailedError) as caught:
        chat(server.url, max_attempts=3)
    assert len(server.requests) == 3
    assert 5 < len(str(caught.value)) < 400


@pytest.mark.parametrize("status", [400, 402, 405, 413, 422, 451])
def test_a_lasting_refusal_of_a_request_is_never_tried_again(serve: Serve, waits: list[float], status: int) -> None:
    server = serve(lambda body: Fault(status))
    with pytest.raises(RequestFailedError, match=f"HTTP {status}: scripted fault"):
        chat(server.url)
    assert len(server.requests) == 1
    assert not waits


@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, "asks for a key"), (403, "asks for a key"), (404, "no model 'm', or no chat completions")],
)
def test_what_would_refuse_every_request_ends_the_command(
    serve: Serve, waits: list[float], status: int, expected: str
) -> None:
    server = serve(lambda body: Fault(status))
    with pytest.raises(EndpointError, match=expected) as caught:
        chat(server.url)
    assert caught.value.location == server.url
    assert len(server.requests) == (2 if status == 403 else 1)  # a plain one tells whether it was the prompt
    assert not waits


def test_a_403_before_any_answer_is_about_a_prompt_where_a_plain_one_is_answered(serve: Serve) -> None:
    """It comes back at once, so among many in flight it may well be the first; and a later start owes those alone."""
    server, usage = serve(lambda body: Fault(403) if body["messages"] == BODY["messages"] else ["A"]), UsageMeter()

    async def work(client: Client) -> list[Any]:
        return list(await asyncio.gather(*(client.chat(BODY) for _ in range(20)), return_exceptions=True))

    results = talk(server.url, work, usage=usage)
    assert all(isinstance(result, RequestFailedError) and result.rejected for result in results)
    assert len(server.requests) == 21
    assert usage.requests == 1


def test_a_403_among_answers_is_about_one_prompt(serve: Serve) -> None:
    """Hosts answer 403 to a prompt that their filter dislikes: one of them must not end the night."""
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


def test_attempts_are_bounded(serve: Serve, waits: list[float]) -> None:
    server, usage = serve(lambda body: Fault(503)), UsageMeter()
    with pytest.raises(RequestFailedError, match="HTTP 503: scripted fault"):
        chat(server.url, usage=usage, max_attempts=4)
    assert len(server.requests) == 4
    assert usage.retries == 3


def test_a_request_without_an_answer_times_out_and_the_next_attempt_may_take_twice_as_long(
    serve: Serve, waits: list[float]
) -> None:
    """Nothing is known of a server that has never answered; the same limit again would fail in the same way."""
    server = serve(delay_s=5)

    async def work(client: Client) -> None:
        with pytest.raises(RequestFailedError, match=r"no answer within 0\.4"):
            await client.chat(BODY)
        assert client.limit == 16

    talk(server.url, work, timeout_s=0.2, max_attempts=2)
    assert len(server.requests) == 2


def test_a_server_that_drips_is_left_in_time(waits: list[float]) -> None:
    """The time is for the whole answer: a byte now and then does not make it longer."""
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


def test_an_answer_may_take_as_long_as_was_set(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    """What bounds the silence of a download does not bound a request."""
    monkeypatch.setattr("rlaif.llm.endpoint.DOWNLOAD_READ_TIMEOUT_S", 0.1)
    assert chat(serve(delay_s=0.5).url, max_attempts=1, timeout_s=30).choices
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(ConnectionLostError):
            talk(url, lambda client: client.endpoints[0].download("/files/1/content", tmp_path / "file"))


def test_a_connection_that_is_not_made_in_time_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by the time for an answer, nor is the server one that was asked and kept silent."""
    monkeypatch.setattr("rlaif.llm.endpoint.CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as waiting:
        for _ in range(4):  # the kernel takes no further ones
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        with pytest.raises(RequestFailedError, match=r"connection lost \(not made within 0\.2 s\)"):
            chat(url, max_attempts=1, timeout_s=30)


def test_nobody_there_reads_as_a_lost_connection_and_not_as_a_timeout(waits: list[float]) -> None:
    with pytest.raises(RequestFailedError, match=r"connection lost \(.*Connect call failed"):
        chat("http://127.0.0.1:9/v1", max_attempts=2)


# How long is waited


@pytest.mark.parametrize(
    ("header", "shortest", "longest"),
    [
        ("7", 7, 8),
        ("1.5", 1.5, 2.5),
        ("0", 0, 1),
        ("99999999", 600, 601),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 1),
        ("Wed Oct 21 07:28:00 2015", 0, 1),
        *[(odd, 0.1, 1) for odd in ("soon", "-3", "nan", "inf", "1e3", "²", "", "Wed, 99 Oct 2015 07:28:00 GMT")],
    ],
)
def test_retry_after_is_honoured_and_an_unreadable_one_is_not(
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


def test_a_date_without_zone_is_universal_time() -> None:
    after = parse_retry_after(time.strftime("%a %b %d %H:%M:%S %Y", time.gmtime(time.time() + 90)))
    assert after is not None
    assert 85 < after < 92


def test_back_off_grows_with_jitter_and_has_a_roof(serve: Serve, waits: list[float]) -> None:
    random.seed(0)
    with pytest.raises(RequestFailedError):
        chat(serve(lambda body: Fault(500)).url, max_attempts=50)
    assert all(0.1 <= wait <= min(MAX_RETRY_DELAY_S, 0.5 * 2 ** (i + 1)) for i, wait in enumerate(waits))
    assert max(waits) > 30
    assert len(set(waits)) == len(waits)


# Load


def test_the_limit_halves_once_a_storm_and_grows_back(serve: Serve, waits: list[float]) -> None:
    """64 refusals of requests that were sent together are one reason to slow down, not 64."""
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


def test_the_least_loaded_endpoint_comes_first(serve: Serve) -> None:
    slow, quick = serve(delay_s=0.6), serve(delay_s=0.02)

    async def work(client: Client) -> None:
        slots = asyncio.Semaphore(8)

        async def one() -> None:
            async with slots:
                await client.chat(BODY)

        await asyncio.gather(*(one() for _ in range(80)))

    talk([slow.url, quick.url], work)
    assert len(slow.requests) + len(quick.requests) == 80
    assert 1 <= len(slow.requests) <= 16
    assert slow.max_in_flight <= 8


@pytest.mark.parametrize("fault", [Fault(0), Fault(503)], ids=["dead", "sick"])
def test_an_endpoint_that_fails_does_not_draw_every_request(serve: Serve, waits: list[float], fault: Fault) -> None:
    """It is always the least loaded one: without a rest all attempts of all requests would go there."""
    dead, good = serve(lambda body: fault), serve(delay_s=0.01)

    async def work(client: Client) -> list[ChatResponse]:
        return list(await asyncio.gather(*(client.chat(BODY) for _ in range(60))))

    assert len(talk([dead.url, good.url], work, max_attempts=3)) == 60
    assert len(good.requests) == 60
    assert len(dead.requests) <= 30  # those of the first burst


def test_a_lost_connection_revives_and_a_refusal_does_not(serve: Serve, waits: list[float]) -> None:
    restarts: list[int] = []

    async def restart_server(silent_since: float | None) -> None:
        assert silent_since is None
        restarts.append(len(server.requests))

    server = serve(replies_in_turn(Fault(0), Fault(500), ["not JSON"], ["fine"]))
    assert chat(server.url, restart_server=restart_server).choices[0].text
    assert restarts == [1]


def test_a_failed_revival_ends_the_command(serve: Serve, waits: list[float]) -> None:
    async def restart_server(silent_since: float | None) -> None:
        raise EndpointError("gone for good")

    with pytest.raises(EndpointError, match="gone for good"):
        chat(serve(lambda body: Fault(0)).url, restart_server=restart_server)


@pytest.mark.parametrize("others", [0, 1], ids=["to nobody", "to this one"])
def test_a_server_is_silent_where_it_answers_nobody(serve: Serve, waits: list[float], others: int) -> None:
    """One whose answer to one request takes too long is not taken for one that hangs."""
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


def test_check_tells_vllm_from_others(serve: Serve) -> None:
    vllm, other = serve(), serve(owned_by="someone")
    assert check(vllm.url) == "vllm"
    assert check(other.url) == "other"
    assert check([vllm.url, vllm.url]) == "vllm"
    assert check([vllm.url, other.url]) == "other"  # what only vLLM understands must not be sent to both
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
def test_an_endpoint_that_lists_no_models_is_taken_at_its_word(serve: Serve, listing: Fault) -> None:
    server = serve(listing=listing)
    assert check(server.url) == "other"
    assert chat(server.url).choices[0].text


PASSING = [429, 500, 502, 503]


@pytest.mark.parametrize("status", PASSING)
def test_what_fails_in_passing_is_asked_again_for_its_models(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A vLLM behind a proxy that is busy for a moment is a vLLM: it is asked in its own way for the whole run."""
    server = serve(listing=Fault(status))

    def wait(_state: Any) -> float:
        server.listing = None
        return 0.0

    monkeypatch.setattr("rlaif.llm.client._retry_delay", wait)
    assert check(server.url) == "vllm"


@pytest.mark.parametrize("status", PASSING)
def test_what_fails_for_long_is_not_there(serve: Serve, waits: list[float], status: int) -> None:
    sick, well = serve(listing=Fault(status)), serve()
    with pytest.raises(EndpointError, match=rf"does not work now \(HTTP {status}: scripted fault\)") as caught:
        check(sick.url, max_attempts=3)
    assert caught.value.location == sick.url
    assert len(waits) == 3
    assert check([sick.url, well.url]) == "vllm"


def test_nobody_there(waits: list[float]) -> None:
    with pytest.raises(EndpointError, match="no server answers there") as caught:
        check("http://127.0.0.1:9/v1")
    assert caught.value.location == "http://127.0.0.1:9/v1"
    assert "rlaif starts vLLM by itself" in str(caught.value)


@pytest.mark.parametrize("listing", [Fault(0), Fault(raw=b"SSH-2.0-OpenSSH_9.2\r\n")], ids=["cut", "not HTTP"])
def test_what_is_no_web_server_is_nobody(serve: Serve, listing: Fault) -> None:
    with pytest.raises(EndpointError, match="no server answers there"):
        check(serve(listing=listing).url)


def test_a_server_that_does_not_list_in_time_is_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="no server answers there"):
            check(url, timeout_s=0.2)


def test_keys_refused_and_missing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(key=SECRET)
    with pytest.raises(EndpointError, match="asks for a key and none is set") as caught:
        check(server.url)
    assert "export OPENAI_API_KEY=" in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(EndpointError, match="the key was refused"):
        check(server.url)
    monkeypatch.setenv("RLAIF_API_KEY", f" {SECRET}\n")  # goes first; what a shell's $(cat file) brings along is cut
    assert check(server.url) == "vllm"
    assert chat(server.url).choices
    assert server.keys[-1] == f"Bearer {SECRET}"


def test_a_model_that_is_not_there(serve: Serve) -> None:
    server = serve(models=("llama-3-8b-instruct", "qwen-7b"))
    with pytest.raises(EndpointError, match="has no model 'llama-3-8b-instuct'") as caught:
        check(server.url, model="llama-3-8b-instuct")
    assert "Did you mean 'llama-3-8b-instruct'?" in caught.value.message
    assert caught.value.location == server.url
    with pytest.raises(EndpointError, match=r"Available: llama-3-8b-instruct, qwen-7b\."):
        check(server.url, model="zzz")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://x/v1", "http://", "http://h:port/v1", "http://[::1/v1"]
)
def test_what_is_no_url_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(UsageError, match="is not a URL"):
        Client("m", [url], ClientConfig(), UsageMeter())


def test_loopback_needs_no_proxy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that the environment names for the outside is not asked about this machine."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = serve()
    assert check(server.url) == "vllm"
    assert chat(server.url, max_attempts=1).choices


# What a reply says


def first_reply(serve: Serve, reply: dict[str, Any], **options: Any) -> ChatResponse:
    return chat(serve(lambda body: reply).url, max_attempts=1, **options)


def test_requests_carry_the_model_and_nothing_else_is_added(serve: Serve) -> None:
    server = serve()
    talk(server.url, lambda client: client.chat({**BODY, "seed": 3, "structured_outputs": {"choice": ["A"]}}))
    assert server.requests == [{**BODY, "model": "m", "seed": 3, "structured_outputs": {"choice": ["A"]}}]


def test_every_choice_in_its_order(serve: Serve) -> None:
    reply = talk(serve().url, lambda client: client.chat({**BODY, "n": 5}))
    assert [choice.text for choice in reply.choices] == echo({**BODY, "n": 5})
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}


def test_json_without_its_content_type_is_read(serve: Serve) -> None:
    server = serve(lambda body: Fault(200, body=json.dumps(message()).encode(), headers={"Content-Type": "text/plain"}))
    assert chat(server.url, max_attempts=1).choices[0].text == "fine"


def test_a_message_without_content_and_a_refusal(serve: Serve) -> None:
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
        ("why</think>\nanswer", "why", "answer"),  # the template had opened it
        ("<think></think>answer", None, "answer"),
        ("<think>cut off before", "cut off before", ""),
        ("<think>", None, ""),
        ("tags like <think> in the middle", None, "tags like <think> in the middle"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("  leading space stays", None, "  leading space stays"),
        ("", None, ""),
    ],
)
def test_thinking_is_split_from_the_answer(text: str, reasoning: str | None, answer: str) -> None:
    assert split_reasoning(text) == (reasoning, answer)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_that_the_server_has_split_leaves_the_answer_alone(serve: Serve, field: str) -> None:
    """An answer about the tags themselves stays whole."""
    choice = first_reply(serve, message("Close it with </think> here.", **{field: "hm"})).choices[0]
    assert (choice.reasoning, choice.text) == ("hm", "Close it with </think> here.")
    choice = first_reply(serve, message("<think>a</think>b", **{field: ""})).choices[0]
    assert (choice.reasoning, choice.text) == ("a", "b")


def test_logprobs_and_tool_calls_are_passed_on(serve: Serve) -> None:
    tokens = [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "A", "logprob": -0.1}]}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f\ud800", "arguments": "{}"}}]
    reply = message("A", tool_calls=[*calls, "odd"])
    reply["choices"][0]["logprobs"] = {"content": tokens}
    choice = first_reply(serve, reply).choices[0]
    assert choice.logprobs == tokens
    assert choice.tool_calls is not None
    assert choice.tool_calls[0]["function"]["name"] == "f\ufffd"
    assert len(choice.tool_calls) == 1
    plain = first_reply(serve, message()).choices[0]
    assert plain.logprobs is plain.tool_calls is plain.reasoning is None


def test_lone_surrogates_never_get_further(serve: Serve) -> None:
    choice = first_reply(serve, message("a\ud800b", reasoning_content="c\udfff")).choices[0]
    assert (choice.text, choice.reasoning) == ("a\ufffdb", "c\ufffd")


def test_usage_is_counted_with_cached_tokens(serve: Serve) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 64}}
    counted = first_reply(serve, {**message(), "usage": usage}).usage
    assert (counted.prompt_tokens, counted.cached_tokens, counted.completion_tokens, counted.cost_usd) == (
        100,
        64,
        7,
        0.0,
    )


ODD = st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=3),
                st.lists(st.integers(), max_size=2))  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(prompt=ODD, completion=ODD, cached=ODD, well_formed=st.booleans())
def test_no_usage_report_breaks_a_reply_or_gives_a_negative_price(
    prompt: Any, completion: Any, cached: Any, well_formed: bool
) -> None:
    """More cached tokens than there were, strings, NaN: counted as something that can be, at a paid host's prices."""
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


JSON = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["message", "content", "choices", "logprobs", "tool_calls", "refusal", "finish_reason", "usage",
                     "reasoning", "error"]), inner, max_size=4), max_leaves=12)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(JSON, JSON)
@example({}, {"content": "hello"})
@example({}, {"content": None, "refusal": 1})
def test_any_json_is_a_reply_or_fails_its_request(value: Any, choice: Any) -> None:
    from rlaif.llm.chat_protocol import MalformedResponseError

    client = Client("m", ["http://127.0.0.1:9/v1"], ClientConfig(), UsageMeter())
    for body in (value, {"choices": [choice]}, {"choices": [{"message": choice}]}, {"choices": [{"message": value, **(
            choice if isinstance(choice, dict) else {})}]}):  # fmt: skip
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
        ({"content": [{"token": "A", "logprob": 0.0, "top_logprobs": []}]}, False),  # one token says nothing of others
        ({"content": []}, False),
        ({"content": ["A"]}, False),
        (None, False),
    ],
)
def test_whether_an_engine_gives_logprobs(serve: Serve, server_reply: Any, expected: bool) -> None:
    reply = message("A")
    reply["choices"][0]["logprobs"] = server_reply
    server, usage = serve(lambda body: reply), UsageMeter()
    assert talk(server.url, lambda client: client.supports_logprobs(20), usage=usage) is expected
    assert server.requests[0]["top_logprobs"] == 20
    assert usage.requests == 1


def test_an_engine_that_refuses_logprobs_gives_none(serve: Serve) -> None:
    server = serve(lambda body: Fault(400))
    assert talk(server.url, lambda client: client.supports_logprobs()) is False
    assert len(server.requests) == 1


@pytest.mark.parametrize("server_reply", [Fault(503), Fault(429), Fault(402), Fault(0), Fault(200, body=b"busy")])
def test_an_engine_that_is_away_is_not_taken_for_one_without_logprobs(
    serve: Serve, waits: list[float], server_reply: Any
) -> None:
    server = serve(lambda body: server_reply)

    async def work(client: Client) -> bool:
        with pytest.raises(EndpointError, match="did not answer when asked for probabilities") as caught:
            await client.supports_logprobs()
        assert caught.value.location == server.url
        server.answer = lambda body: with_probabilities({"A": 1.0})
        return await client.supports_logprobs()

    assert talk(server.url, work, max_attempts=2) is True


# Keys


def test_a_key_shows_up_nowhere(serve: Serve, caplog: pytest.LogCaptureFixture, waits: list[float]) -> None:
    """Servers quote the key that they refuse: not in an error, a log or a repr of ours."""
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
    """Ends in a key that begins before ``cut``."""
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
def test_no_part_of_a_key_is_left_where_a_text_is_cut(serve: Serve, waits: list[float], server_reply: Any) -> None:
    with pytest.raises((RequestFailedError, RlaifError)) as caught:
        chat(serve(lambda body: server_reply).url, key=SECRET, max_attempts=1)
    assert SECRET[:4] not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_no_key_is_left_in_what_a_list_of_models_says(serve: Serve) -> None:
    raw = Fault(raw=text_with_key_across(40).encode() + b"\r\n\r\n")
    with pytest.raises(EndpointError, match="no server answers there") as caught:
        check(serve(listing=raw).url, key=SECRET)
    assert SECRET[:4] not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-’quoted’", "sk a", "\x00"])
def test_a_key_that_no_header_can_carry_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    if "\x00" in key:
        monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="the key in OPENAI_API_KEY") as caught:
        Client("m", ["http://127.0.0.1:9/v1"], ClientConfig(), UsageMeter())
    assert key not in str(caught.value)


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@127.0.0.1:9/v1", f"http://{SECRET}@127.0.0.1:9/v1"])
def test_a_url_with_a_password_is_refused_without_saying_it(url: str) -> None:
    with pytest.raises(UsageError, match="holds a name or a password") as caught:
        Client("m", [url], ClientConfig(), UsageMeter())
    assert SECRET not in str(caught.value)


# The end


def test_nothing_is_printed_at_exit(serve: Serve) -> None:
    """Connections are closed, also after failures and with requests cancelled in flight."""
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


# How fast, and where to


def run_with_file_limit(soft: int, hard: int, url: str, concurrency: int) -> subprocess.CompletedProcess[str]:
    """As many requests as ``concurrency`` at once, from a process that may have so many files open."""
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


def test_more_requests_at_once_than_files_may_be_open(serve: Serve) -> None:
    """A server would be said to cut connections. Where the limit may be raised, it is."""
    server = serve(delay_s=1.0)
    done = run_with_file_limit(200, 1024, server.url, 300)
    assert (done.returncode, done.stderr) == (0, "")
    assert server.max_in_flight > 200
    server.requests.clear()
    stderr = run_with_file_limit(200, 400, server.url, 300).stderr
    assert "300 requests at once need 428 open files, and 400 are allowed" in stderr
    assert "Lower it to 272, or raise the limit (ulimit -n" in stderr
    assert not server.requests


def test_a_pace_spreads_requests_and_tokens_over_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still: the waits of a burst are what the limits say, and a correction moves them."""
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


def test_limits_a_minute_hold_for_each_endpoint(serve: Serve) -> None:
    """At 1,200 a minute the seventh request of each endpoint leaves 0.3 s after its first, however many may fly."""
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


def test_what_waits_for_its_turn_is_not_sent_after_a_stop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.llm.client.STOP_CHECK_INTERVAL_S", 0.01)
    server, usage = serve(), UsageMeter()

    async def work(client: Client) -> list[Any]:
        pending = asyncio.gather(*(client.chat(BODY) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0.1)
        usage.interrupted = True
        return await pending

    results = talk(server.url, work, usage=usage, requests_per_minute=1)
    assert [type(result) for result in results] == [ChatResponse, RequestCancelled, RequestCancelled]
    assert len(server.requests) == 1


def test_what_waits_to_be_asked_again_is_not_sent_after_a_stop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has asked to be left alone for a minute: the stop does not make that shorter."""
    monkeypatch.setattr("rlaif.llm.client.STOP_CHECK_INTERVAL_S", 0.01)
    server, usage = serve(lambda body: Fault(429, {"Retry-After": "60"})), UsageMeter()

    async def work(client: Client) -> list[Any]:
        pending = asyncio.gather(*(client.chat(BODY) for _ in range(3)), return_exceptions=True)
        assert await asyncio.to_thread(wait_until, lambda: usage.retries == 3)
        usage.interrupted = True
        return await pending

    assert [type(result) for result in talk(server.url, work, usage=usage)] == [RequestCancelled] * 3
    assert len(server.requests) == 3


def test_a_dead_endpoint_gets_one_request_at_a_time_and_less_and_less_often(
    serve: Serve, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And everything is answered by the one that lives."""
    monkeypatch.setattr("rlaif.llm.endpoint.BACKOFF_S", 0.05)
    dead, alive = serve(lambda body: Fault(503)), serve(delay_s=0.01)

    async def work(client: Client) -> float:
        for _ in range(15):
            await asyncio.gather(*(client.chat(BODY) for _ in range(4)))
        return client.endpoints[0]._backoff_until - time.monotonic()

    rest = talk([dead.url, alive.url], work)
    assert len(alive.requests) == 60
    assert 1 <= len(dead.requests) <= 8
    assert rest < 10


def test_a_429_with_a_time_turns_the_others_to_another_endpoint(serve: Serve, waits: list[float]) -> None:
    busy, idle = serve(lambda body: Fault(429, {"Retry-After": "60"})), serve()

    async def work(client: Client) -> None:
        for _ in range(6):
            await client.chat(BODY)

    talk([busy.url, idle.url], work)
    assert (len(busy.requests), len(idle.requests)) == (1, 6)


def test_a_request_has_a_deadline_over_all_its_attempts(serve: Serve, waits: list[float]) -> None:
    """Each attempt takes 0.3 s: the second one ends after the deadline, whatever attempts are left."""
    server = serve(lambda body: Fault(503), delay_s=0.3)
    with pytest.raises(RequestFailedError, match="HTTP 503"):
        chat(server.url, request_deadline_s=0.5, max_attempts=50)
    assert len(server.requests) <= 2
