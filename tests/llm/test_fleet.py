"""Several endpoints: who is asked, who rests, who comes back, and who leaves with what it has finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import ClientConfig
from rlaif.errors import EndpointError, UsageError
from rlaif.llm import fleet
from rlaif.llm.budget import Meter, progress
from rlaif.llm.client import Client
from rlaif.llm.port import free_port
from rlaif.llm.wire import Reply
from tests.llm.processes import until
from tests.scripted import Fault, ScriptedServer, echo

Serve = Callable[..., ScriptedServer]
BODY = {"messages": [{"role": "user", "content": "hello"}]}
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr("rlaif.llm.endpoint.REST_S", 0.05)
    monkeypatch.setattr(fleet, "READ_EVERY_S", 0.0)


def talk(urls: list[str], work: Callable[[Client], Any], meter: Meter | None = None, **config: Any) -> Any:
    async def main() -> Any:
        async with Client("m", urls, ClientConfig(**config), meter or Meter()) as client:
            return await work(client)

    return asyncio.run(main())


async def many(client: Client, count: int, at_once: int = 8) -> list[Reply]:
    room = asyncio.Semaphore(at_once)

    async def one() -> Reply:
        async with room:
            return await client.chat(BODY)

    return list(await asyncio.gather(*(one() for _ in range(count))))


def test_one_of_several_that_is_absent_does_not_keep_the_night_from_starting(serve: Serve) -> None:
    there, meter = serve(), Meter()

    async def work(client: Client) -> list[Reply]:
        assert await client.check() == "vllm"
        assert client.meter.down == [NOBODY]
        assert "down: 127.0.0.1:9" in progress(meter)
        return await many(client, 20)

    assert len(talk([NOBODY, there.url], work, meter)) == len(there.requests) == 20
    with pytest.raises(EndpointError, match="no server answers there"):
        talk([NOBODY, NOBODY + "/again"], lambda client: client.check())
    with pytest.raises(EndpointError, match="has no model 'm'"):  # a mistake that waiting will not mend
        talk([there.url, serve(models=("other",)).url], lambda client: client.check())


def test_one_that_comes_later_is_found(serve: Serve) -> None:
    there, meter = serve(delay_s=0.01), Meter()
    late = ScriptedServer(delay_s=0.01, port=free_port())

    async def work(client: Client) -> None:
        await client.check()
        await many(client, 10)
        with late:
            while not late.requests:
                await many(client, 4)
            await many(client, 40)

    talk([late.url, there.url], work, meter)
    assert len(late.requests) >= 10
    assert meter.down == []


def test_a_resting_endpoint_is_asked_for_its_models_before_it_gets_a_request_again(serve: Serve) -> None:
    """One that is silent would otherwise cost a request its whole time each time that it is tried."""
    good, sick = serve(delay_s=0.02), serve(lambda body: Fault(503), listing=Fault(503))

    async def work(client: Client) -> None:
        for _ in range(12):
            await many(client, 4)
            await asyncio.sleep(0.02)

    talk([sick.url, good.url], work)
    assert len(good.requests) == 48
    assert len(sick.requests) <= 4  # the first burst, and never again


def test_one_that_lost_its_model_in_the_night_is_left_to_the_others(serve: Serve) -> None:
    left = [echo] * 3
    losing = serve(
        lambda body: left.pop()(body) if left else Fault(404, body=b'{"error": {"message": "no such model"}}')
    )
    good = serve(delay_s=0.01)
    assert len(talk([losing.url, good.url], lambda client: many(client, 30))) == 30
    assert len(good.requests) == 27
    with pytest.raises(EndpointError, match="has no model"):  # the only one, or all of them
        talk([losing.url], lambda client: many(client, 2))
    with pytest.raises(EndpointError, match="has no model"):
        talk([losing.url, serve(lambda body: Fault(404)).url], lambda client: many(client, 4))


def test_each_endpoint_has_a_limit_of_its_own(serve: Serve) -> None:
    """What one cannot bear is no reason to send less to another."""
    roomy = serve(delay_s=0.01)
    narrow: ScriptedServer = serve(lambda body: Fault(429) if narrow.in_flight > 2 else echo(body), delay_s=0.01)

    async def work(client: Client) -> tuple[float, float]:
        assert client.limit == 32
        await many(client, 300, at_once=32)
        return client.endpoints[0].limit, client.endpoints[1].limit

    small, large = talk([narrow.url, roomy.url], work, concurrency=32, attempts=50)
    assert small < 12 < 16 <= large
    assert len(roomy.requests) > 2 * len(narrow.requests)


def test_an_endpoint_taken_out_of_the_file_finishes_and_gets_nothing_new(serve: Serve, tmp_path: Path) -> None:
    leaving, staying, coming = serve(delay_s=0.3), serve(delay_s=0.01), serve(delay_s=0.01)
    listed = tmp_path / "endpoints.txt"
    listed.write_text(f"# two of them\n{leaving.url}\n\n{staying.url}/\n")

    async def work(client: Client) -> list[Reply]:
        assert client.urls == [leaving.url, staying.url]
        first = [asyncio.create_task(client.chat(BODY)) for _ in range(8)]
        assert await asyncio.to_thread(until, lambda: leaving.in_flight)
        listed.write_text(f"{staying.url}\n{coming.url}\nnot a URL\n")
        await many(client, 40)
        assert client.urls == [staying.url, coming.url]
        listed.write_text("")  # somebody is writing it
        await many(client, 8)
        assert client.urls == [staying.url, coming.url]
        return list(await asyncio.gather(*first))

    assert len(talk([f"file:{listed}"], work)) == 8
    assert 1 <= len(leaving.requests) <= 5
    assert until(lambda: leaving.in_flight == 0)
    assert len(coming.requests) >= 5
    assert len(leaving.requests) + len(staying.requests) + len(coming.requests) == 56


def test_half_a_line_leaves_the_endpoints_as_they_were(serve: Serve, tmp_path: Path) -> None:
    there, coming = serve(), serve()
    listed = tmp_path / "endpoints.txt"
    listed.write_text(f"{there.url}\n")

    async def work(client: Client) -> None:
        await many(client, 4)
        listed.write_text("http")  # somebody is writing it
        await many(client, 8)
        assert client.urls == [there.url]
        listed.write_text(f"{coming.url}\n")
        await many(client, 8)
        assert client.urls == [coming.url]

    talk([f"file:{listed}"], work)
    assert (len(there.requests), len(coming.requests)) == (12, 8)


def test_a_file_without_endpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no endpoint"):
        talk([f"file:{tmp_path / 'absent.txt'}"], lambda client: client.check())
