"""A scripted OpenAI-compatible server, for replies that a real one does not produce on demand.

``ScriptedServer(answer)`` runs in a thread. ``answer(body)`` receives each chat request and returns the choices' texts
(a list of ``n`` strings), a full reply (dict), or a :class:`Fault`. ``requests`` collects all request bodies, ``keys``
the keys that were sent with them. ``listing`` replaces the reply of the list of models.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Fault:
    """An HTTP reply that is not an answer, sent after ``delay_s``.

    ``status`` 0 cuts the connection. ``content_length`` is a header that exceeds the body's length. ``raw`` is sent as
    it is, HTTP or not.
    """

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": {"message": "scripted fault"}}'
    content_length: int | None = None
    raw: bytes = b""
    delay_s: float = 0.0


Answer = Callable[[dict[str, Any]], "list[str] | dict[str, Any] | Fault"]


def echo(body: dict[str, Any]) -> list[str]:
    """Return ``n`` different answers that depend on the request's last message and seed."""
    prompt = body["messages"][-1]["content"]
    return [f"answer {body.get('seed', 0) + i} to: {prompt}" for i in range(body.get("n", 1))]


def with_probabilities(weights: dict[str, float]) -> dict[str, Any]:
    """Return a reply of one token whose alternatives have these probabilities."""
    top = sorted(weights.items(), key=lambda item: -item[1])
    alternatives = [{"token": token, "logprob": math.log(max(p, 1e-9))} for token, p in top]
    content = [{**alternatives[0], "top_logprobs": alternatives}]
    return {
        "choices": [
            {
                "message": {"role": "assistant", "content": top[0][0]},
                "finish_reason": "length",
                "logprobs": {"content": content},
            }
        ]
    }


def usage_of(body: dict[str, Any], texts: list[str]) -> dict[str, int]:
    prompt = sum(len(str(message.get("content"))) for message in body["messages"]) // 4
    return {"prompt_tokens": prompt, "completion_tokens": sum(len(text) // 4 for text in texts)}


class ScriptedServer:
    """A scripted server, used as a context manager. ``url`` ends in /v1."""

    def __init__(
        self,
        answer: Answer = echo,
        *,
        models: tuple[str, ...] = ("m",),
        owned_by: str = "vllm",
        key: str | None = None,
        delay_s: float = 0.0,
        port: int = 0,
        listing: Fault | None = None,
    ) -> None:
        self.answer, self.models, self.owned_by, self.key = answer, models, owned_by, key
        self.delay_s, self.port, self.listing = delay_s, port, listing
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.in_flight = self.max_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        self.routes(app)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    def routes(self, app: web.Application) -> None:
        """Add routes; for subclasses."""

    async def _stop(self) -> None:
        await self._runner.cleanup()
        pending_tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending_tasks:
            task.cancel()
        await asyncio.gather(*pending_tasks, return_exceptions=True)

    def _reject_wrong_key(self, request: web.Request) -> web.Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        return None

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self.listing:
            return await send_fault(request, self.listing)
        data = [{"id": name, "object": "model", "owned_by": self.owned_by} for name in self.models]
        return self._reject_wrong_key(request) or web.json_response({"object": "list", "data": data})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        rejection = self._reject_wrong_key(request)
        if rejection:
            return rejection
        body = await request.json()
        self.requests.append(body)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            answer = self.answer(body)
        finally:
            self.in_flight -= 1
        if isinstance(answer, Fault):
            await asyncio.sleep(answer.delay_s)
            return await send_fault(request, answer)
        if isinstance(answer, list):
            choices = [
                {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                for i, text in enumerate(answer)
            ]
            answer = {"choices": choices, "usage": usage_of(body, answer)}
        value = {"id": "x", "object": "chat.completion", "model": body["model"], **answer}
        return web.Response(body=json.dumps(value).encode(), content_type="application/json")


async def send_fault(request: web.Request, fault: Fault) -> web.StreamResponse:
    assert request.transport is not None
    if fault.status == 0 or fault.raw:
        request.transport.write(fault.raw)  # type: ignore[attr-defined]
        request.transport.close()
        return web.Response()
    if fault.content_length is None:
        return web.Response(status=fault.status, headers=fault.headers, body=fault.body)
    reply = web.StreamResponse(
        status=fault.status, headers={**fault.headers, "Content-Length": str(fault.content_length)}
    )
    await reply.prepare(request)
    await reply.write(fault.body)
    request.transport.close()
    return reply
