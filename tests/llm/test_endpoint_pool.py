"""Several endpoints: selection, back-off, recovery, and removal after the requests in flight are done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import ClientConfig
from rlaif.errors import EndpointError, UsageError
from rlaif.llm import endpoint_pool
from rlaif.llm.chat_protocol import ChatResponse
from rlaif.llm.client import Client
from rlaif.llm.reporter import progress_line
from rlaif.llm.usage import UsageMeter
from rlaif.serving.ports import free_port
from tests.fake_server import Fault, ScriptedServer, echo
from tests.processes import wait_until

Serve = Callable[..., ScriptedServer]
BODY = {"messages": [{"role": "user", "content": "hello"}]}
UNREACHABLE_URL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr("rlaif.llm.endpoint.BACKOFF_S", 0.05)
    monkeypatch.setattr(endpoint_pool, "REREAD_INTERVAL_S", 0.0)


def talk(urls: list[str], work: Callable[[Client], Any], usage: UsageMeter | None = None, **config: Any) -> Any:
    async def main() -> Any:
        async with Client("m", urls, ClientConfig(**config), usage or UsageMeter()) as client:
            return await work(client)

    return asyncio.run(main())


async def chat_many(client: Client, count: int, at_once: int = 8) -> list[ChatResponse]:
    slots = asyncio.Semaphore(at_once)

    async def chat_in_slot() -> ChatResponse:
        async with slots:
            return await client.chat(BODY)

    return list(await asyncio.gather(*(chat_in_slot() for _ in range(count))))


def test_one_unreachable_endpoint_of_several_does_not_keep_a_run_from_starting(serve: Serve) -> None:
    server, usage = serve(), UsageMeter()

    async def work(client: Client) -> list[ChatResponse]:
        assert await client.check() == "vllm"
        assert client.usage.endpoints_down == [UNREACHABLE_URL]
        assert "down: 127.0.0.1:9" in progress_line(usage)
        return await chat_many(client, 20)

    assert len(talk([UNREACHABLE_URL, server.url], work, usage)) == len(server.requests) == 20
    with pytest.raises(EndpointError, match="unreachable"):
        talk([UNREACHABLE_URL, UNREACHABLE_URL + "/again"], lambda client: client.check())
    with pytest.raises(EndpointError, match="has no model 'm'"):  # waiting does not fix this
        talk([server.url, serve(models=("other",)).url], lambda client: client.check())


def test_an_endpoint_that_becomes_available_later_is_used(serve: Serve) -> None:
    early, usage = serve(delay_s=0.01), UsageMeter()
    late = ScriptedServer(delay_s=0.01, port=free_port())

    async def work(client: Client) -> None:
        await client.check()
        await chat_many(client, 10)
        with late:
            while not late.requests:
                await chat_many(client, 4)
            await chat_many(client, 40)

    talk([late.url, early.url], work, usage)
    assert len(late.requests) >= 10
    assert usage.endpoints_down == []


def test_an_endpoint_is_probed_before_it_gets_requests_after_a_back_off(serve: Serve) -> None:
    """Otherwise a silent endpoint would cost one request its full time limit with each attempt."""
    good, failing = serve(delay_s=0.02), serve(lambda body: Fault(503), listing=Fault(503))

    async def work(client: Client) -> None:
        for _ in range(12):
            await chat_many(client, 4)
            await asyncio.sleep(0.02)

    talk([failing.url, good.url], work)
    assert len(good.requests) == 48
    assert len(failing.requests) <= 4  # the first burst only


def test_the_others_continue_if_one_endpoint_loses_its_model(serve: Serve) -> None:
    answers = [echo] * 3
    losing = serve(
        lambda body: answers.pop()(body) if answers else Fault(404, body=b'{"error": {"message": "no such model"}}')
    )
    good = serve(delay_s=0.01)
    assert len(talk([losing.url, good.url], lambda client: chat_many(client, 30))) == 30
    assert len(good.requests) == 27
    with pytest.raises(EndpointError, match="has no model"):  # if it is the only endpoint, or all of them fail
        talk([losing.url], lambda client: chat_many(client, 2))
    with pytest.raises(EndpointError, match="has no model"):
        talk([losing.url, serve(lambda body: Fault(404)).url], lambda client: chat_many(client, 4))


def test_each_endpoint_has_its_own_limit(serve: Serve) -> None:
    """The overload of one endpoint does not reduce the requests to another."""
    roomy = serve(delay_s=0.01)
    narrow: ScriptedServer = serve(lambda body: Fault(429) if narrow.in_flight > 2 else echo(body), delay_s=0.01)

    async def work(client: Client) -> tuple[float, float]:
        assert client.limit == 32
        await chat_many(client, 300, at_once=32)
        return client.endpoints[0].limit, client.endpoints[1].limit

    small, large = talk([narrow.url, roomy.url], work, concurrency=32, max_attempts=50)
    assert small < 12 < 16 <= large
    assert len(roomy.requests) > 2 * len(narrow.requests)


def test_an_endpoint_removed_from_the_file_finishes_its_requests_and_gets_no_new_ones(
    serve: Serve, tmp_path: Path
) -> None:
    leaving, staying, coming = serve(delay_s=0.3), serve(delay_s=0.01), serve(delay_s=0.01)
    url_file = tmp_path / "endpoints.txt"
    url_file.write_text(f"# two of them\n{leaving.url}\n\n{staying.url}/\n")

    async def work(client: Client) -> list[ChatResponse]:
        assert client.urls == [leaving.url, staying.url]
        first = [asyncio.create_task(client.chat(BODY)) for _ in range(8)]
        assert await asyncio.to_thread(wait_until, lambda: leaving.in_flight)
        url_file.write_text(f"{staying.url}\n{coming.url}\nnot a URL\n")
        await chat_many(client, 40)
        assert client.urls == [staying.url, coming.url]
        url_file.write_text("")  # as while the file is being written
        await chat_many(client, 8)
        assert client.urls == [staying.url, coming.url]
        return list(await asyncio.gather(*first))

    assert len(talk([f"file:{url_file}"], work)) == 8
    assert 1 <= len(leaving.requests) <= 5
    assert wait_until(lambda: leaving.in_flight == 0)
    assert len(coming.requests) >= 5
    assert len(leaving.requests) + len(staying.requests) + len(coming.requests) == 56


def test_a_half_written_line_keeps_the_current_endpoints(serve: Serve, tmp_path: Path) -> None:
    present, coming = serve(), serve()
    url_file = tmp_path / "endpoints.txt"
    url_file.write_text(f"{present.url}\n")

    async def work(client: Client) -> None:
        await chat_many(client, 4)
        url_file.write_text("http")  # as while the file is being written
        await chat_many(client, 8)
        assert client.urls == [present.url]
        url_file.write_text(f"{coming.url}\n")
        await chat_many(client, 8)
        assert client.urls == [coming.url]

    talk([f"file:{url_file}"], work)
    assert (len(present.requests), len(coming.requests)) == (12, 8)


def test_a_file_without_endpoints_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no endpoint"):
        talk([f"file:{tmp_path / 'absent.txt'}"], lambda client: client.check())
