"""Client of one model: OpenAI chat completions without streaming, the one protocol for every engine.

Retries are in :mod:`rlaif.llm.retries`. A timeout occurs only if an endpoint makes no progress
(:mod:`rlaif.serving.time_limits`). It counts as overload, so fewer requests are sent at once.

A problem that would fail every request (no server, no key, no such model) is an :class:`EndpointError` and ends the
command. A problem with one request is a :class:`RequestFailedError`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any

import orjson

from rlaif.config.models import ClientConfig
from rlaif.errors import EndpointError
from rlaif.llm import chat_protocol, http_status
from rlaif.llm.api_key import ApiKey
from rlaif.llm.chat_protocol import ChatResponse, MalformedResponseError
from rlaif.llm.endpoint import (
    ConnectionLostError,
    Endpoint,
    HTTPStatusError,
    ResponseTimeoutError,
    raise_open_file_limit,
)
from rlaif.llm.endpoint_check import EndpointUnavailableError, check_endpoint
from rlaif.llm.endpoint_pool import EndpointPool
from rlaif.llm.pricing import request_cost
from rlaif.llm.request import Request, RequestCancelled, RequestFailedError
from rlaif.llm.retries import MAX_RETRY_AFTER_S, RestartServer, Retries
from rlaif.llm.server_metrics import ServerMonitor
from rlaif.llm.usage import UsageMeter

PROBE_BODY = {
    "messages": [{"role": "user", "content": "Reply with the letter A."}],
    "max_tokens": 1,
    "temperature": 0,
}
"""A request that no content filter rejects, used to find out what a server can do."""


class Client:
    """Sends chat requests for one model to one or several endpoints; :mod:`rlaif.llm.endpoint_pool` chooses which.

    ``restart_server`` restarts a managed server before a retry. ``describe_server`` returns in a few words what such a
    server runs on, for the progress line.
    """

    def __init__(
        self,
        model: str,
        urls: list[str],
        config: ClientConfig,
        usage: UsageMeter,
        *,
        key: str | None = None,
        restart_server: RestartServer | None = None,
        describe_server: Callable[[], str] | None = None,
    ) -> None:
        raise_open_file_limit(config.concurrency)
        self.model = model
        self.config = config
        self.usage = usage
        self.api_key = ApiKey(key) if key else ApiKey.from_environment()
        self._answered_at: float | None = None
        self._key_check_lock = asyncio.Lock()
        self._supports_logprobs: bool | None = None
        self._pool = EndpointPool(urls, self.api_key.value, config, managed=restart_server is not None)
        self._monitor = ServerMonitor(self._pool, usage, config.timeout_s, describe_server)
        self._retries = Retries(config, usage, restart_server)

    @property
    def endpoints(self) -> list[Endpoint]:
        return self._pool.endpoints

    @property
    def limit(self) -> float:
        """Number of requests that may be in flight now, over all endpoints."""
        return self._pool.limit

    @property
    def url(self) -> str:
        return self.endpoints[0].url

    @property
    def urls(self) -> list[str]:
        return [endpoint.url for endpoint in self.endpoints]

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._monitor.close()
        await self._pool.close()

    async def check(self) -> str:
        """Check every endpoint before anything is paid for. Returns the engine: "vllm" if all are vLLM, else "other".

        Raises :class:`EndpointError` if no endpoint is available, a key is rejected, or the model is not listed.
        If some of several endpoints are unavailable, they back off and are probed again later.
        """
        checks = (
            check_endpoint(endpoint, self.model, self.api_key, self._retries, self.config.timeout_s)
            for endpoint in self.endpoints
        )
        results = await asyncio.gather(*checks, return_exceptions=True)
        available = [result for result in results if not isinstance(result, EndpointUnavailableError)]
        for endpoint, result in zip(self.endpoints, results, strict=True):
            if isinstance(result, BaseException) and (result in available or not available):
                raise result
            if isinstance(result, EndpointUnavailableError):
                endpoint.record_failure()
        self.usage.endpoints_down = self._pool.endpoints_down
        return "vllm" if all(available) else "other"

    async def chat(self, body: dict[str, Any], endpoint_path: str = chat_protocol.CHAT_PATH) -> ChatResponse:
        """Send one request with retries and return its reply. The body gets ``model`` added.

        ``endpoint_path`` is ``chat_protocol.CLASSIFY_PATH`` for a reward model. Raises :class:`RequestFailedError`,
        :class:`RequestCancelled` or :class:`EndpointError`.
        """
        data = orjson.dumps({**body, "model": self.model})
        tokens = body.get("max_tokens", 0) * body.get("n", 1)
        try:
            return await self._retries.call(self._send_once, data, tokens, endpoint_path)
        except HTTPStatusError as error:
            raise self._status_failure(error, rejected=error.status in http_status.REQUEST_REJECTED) from None
        except (ConnectionLostError, MalformedResponseError) as error:
            raise RequestFailedError(self.api_key.excerpt(str(error))) from None

    async def with_retries(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Await ``call()``, any exchange with an endpoint, with the retries of a chat request.

        Raises :class:`RequestFailedError`, or :class:`EndpointError` if the key is rejected.
        """

        async def call_once() -> Any:  # tenacity awaits coroutine functions only
            return await call()

        try:
            return await self._retries.call_once_more_at_stop(call_once)
        except HTTPStatusError as error:
            if error.status in http_status.KEY_REJECTED:
                raise self.api_key.rejected_error(self.url, error.status) from None
            raise self._status_failure(error) from None
        except (ConnectionLostError, MalformedResponseError) as error:
            raise RequestFailedError(self.api_key.excerpt(str(error))) from None

    async def supports_logprobs(self, top: int = 20) -> bool:
        """Return True if replies carry the probabilities of the ``top`` tokens. The first call probes with one token.

        Raises :class:`EndpointError` if the probe fails: its result would hold for the whole run.
        """
        if self._supports_logprobs is None:
            self._supports_logprobs = await self._probe_logprobs(top)
        return self._supports_logprobs

    async def _probe_logprobs(self, top: int) -> bool:
        try:
            reply = await self.chat({**PROBE_BODY, "logprobs": True, "top_logprobs": top})
        except RequestFailedError as error:
            if error.rejected:
                return False
            raise EndpointError(
                f"the probe for token probabilities failed: {error}",
                location=self.url,
                hint='Rerun the same command later, or set `verdict = "json"` in `[judge]`.',
            ) from None
        self.usage.add(reply.usage)
        tokens = reply.choices[0].logprobs
        return bool(tokens and isinstance(tokens[0], dict) and tokens[0].get("top_logprobs"))

    def parse_response(
        self, value: Any, url: str, *, price_factor: float = 1.0, endpoint_path: str = chat_protocol.CHAT_PATH
    ) -> ChatResponse:
        """Parse the JSON that ``endpoint_path`` returned. Raises :class:`MalformedResponseError`."""

        def cost(prompt: int, cached: int, completion: int) -> float:
            return (request_cost(self.model, url, prompt, cached, completion) or 0.0) * price_factor

        return chat_protocol.parse_chat_response(value, cost, self.api_key.redact, endpoint_path)

    async def _send_once(self, data: bytes, answer_tokens: int, endpoint_path: str) -> ChatResponse:
        self._monitor.start()
        endpoint, waited = await self._pool.acquire()
        delay_s, tokens = endpoint.rate_limiter.delay_s(), len(data) // 4 + answer_tokens
        endpoint.rate_limiter.reserve(tokens)
        try:
            if delay_s:
                await self._retries.sleep(delay_s)
            if (delay_s or waited) and self._retries.stopped():
                raise RequestCancelled
            sent_at = time.monotonic()
            raw = await endpoint.send_model_request(endpoint_path, data, answer_tokens)
        except HTTPStatusError as error:
            is_ambiguous = error.status == HTTPStatus.FORBIDDEN and not self._answered_at
            if is_ambiguous and await self._is_key_rejected(endpoint, endpoint_path):
                raise self.api_key.rejected_error(endpoint.url, error.status) from None
            self._handle_http_error(endpoint, error, sent_at)
            raise
        except ResponseTimeoutError as error:
            if error.silent_since is not None:  # otherwise it is slow: its limit is halved and it keeps answering
                self._record_failure(endpoint)
            raise
        except ConnectionLostError:
            self._record_failure(endpoint)
            raise
        finally:
            self._pool.release(endpoint)
        reply = self.parse_response(
            chat_protocol.parse_json(raw, self.api_key.redact), endpoint.url, endpoint_path=endpoint_path
        )
        self._record_answer(endpoint, reply, sent_at)
        endpoint.rate_limiter.adjust(reply.usage.prompt_tokens + reply.usage.completion_tokens - tokens)
        return reply

    def _record_answer(self, endpoint: Endpoint, reply: ChatResponse, sent_at: float) -> None:
        self._answered_at = time.monotonic()
        endpoint.patience.record_answer(sent_at, reply.usage.completion_tokens)
        was_down = endpoint.consecutive_failures
        endpoint.record_success()
        if was_down:
            self.usage.endpoints_down = self._pool.endpoints_down
        self.usage.request_wait_s += self._answered_at - sent_at

    def _handle_http_error(self, endpoint: Endpoint, error: HTTPStatusError, sent_at: float) -> None:
        """Adjust limits and back-off to an HTTP error.

        Raises :class:`EndpointError` if later requests would fail in the same way.
        """
        status = error.status
        is_fatal = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND)
        if is_fatal and self._answered_at and self._pool.has_healthy_alternative(endpoint):
            # One of several endpoints lost its model or its key during the run: the others continue.
            self._record_failure(endpoint)
            raise ConnectionLostError(f"HTTP {status}: {self.api_key.excerpt(error.message)}") from None
        if status == HTTPStatus.UNAUTHORIZED:
            raise self.api_key.rejected_error(endpoint.url, status) from None
        if status == HTTPStatus.NOT_FOUND:
            raise EndpointError(
                f"the server has no model {self.model!r} or no chat completions: {self.api_key.excerpt(error.message)}",
                location=endpoint.url,
            ) from None
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            if error.retry_after:
                endpoint.record_failure(min(error.retry_after, MAX_RETRY_AFTER_S))
            endpoint.record_overload(sent_at)
        if http_status.is_server_error(status):
            self._record_failure(endpoint)

    async def _is_key_rejected(self, endpoint: Endpoint, endpoint_path: str) -> bool:
        """Find out whether a 403 before any answer is about the key.

        Hosts return 403 for a rejected key and, just as fast, for a prompt that their filter rejects. A harmless
        request distinguishes the two, so that a run in which only filtered prompts are pending does not end with the
        first of them.
        """
        if endpoint_path != chat_protocol.CHAT_PATH:
            return True
        async with self._key_check_lock:
            if not self._answered_at:
                try:
                    data = orjson.dumps({**PROBE_BODY, "model": self.model})
                    raw = await endpoint.send("POST", endpoint_path, self.config.timeout_s, data)
                    value = chat_protocol.parse_json(raw, self.api_key.redact)
                    self.usage.add(self.parse_response(value, endpoint.url).usage)
                    self._answered_at = time.monotonic()
                except HTTPStatusError as error:
                    return error.status == HTTPStatus.FORBIDDEN
                except (ConnectionLostError, MalformedResponseError):
                    return False
        return False

    def _record_failure(self, endpoint: Endpoint) -> None:
        endpoint.record_failure()
        self.usage.endpoints_down = self._pool.endpoints_down

    def _status_failure(self, error: HTTPStatusError, *, rejected: bool = False) -> RequestFailedError:
        message = f"HTTP {error.status}: {self.api_key.excerpt(error.message)}"
        return RequestFailedError(message, rejected=rejected, status=error.status)


RequestBuilder = Callable[[Client, str], Awaitable[Iterable[Request]]]
"""Builds the requests of a stage for a client and its engine, "vllm" or "other"."""
