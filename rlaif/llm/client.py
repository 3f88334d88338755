"""One wire protocol for every engine: OpenAI chat completions, without streaming.

Retries live here and nowhere else: time-outs, cut connections, 408, 409, 425, 429, 5xx and malformed bodies are tried
again, honoring Retry-After, with jittered back-off; 400, 401, 403, 404 and 422 never. A time-out comes only if an
endpoint makes no progress (:mod:`rlaif.serving.time_limits`), and counts as overload: fewer requests go out at once.

What ends a command (no server, no key, no such model) is an :class:`EndpointError`; what ends only one request is a
:class:`RequestFailedError`. The key goes into the request's header and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import tenacity

from rlaif.config.models import ClientConfig
from rlaif.errors import EndpointError, UsageError, did_you_mean
from rlaif.llm import chat_protocol
from rlaif.llm.chat_protocol import ChatResponse, MalformedResponseError
from rlaif.llm.endpoint import (
    ConnectionLostError,
    Endpoint,
    HTTPStatusError,
    ResponseTimeoutError,
    raise_open_file_limit,
)
from rlaif.llm.endpoint_pool import EndpointPool
from rlaif.llm.pricing import request_cost
from rlaif.llm.server_metrics import ServerMonitor
from rlaif.llm.usage import UsageMeter
from rlaif.records import replace_surrogates

API_KEY_VARIABLES = ("RLAIF_API_KEY", "OPENAI_API_KEY")
MAX_RETRY_DELAY_S = 60.0
REQUEST_LEVEL_STATUSES = (400, 403, 413, 422, 451)
"""Statuses of a request that a server will not take: too long, filtered, not understood."""
PROBE_BODY = {
    "messages": [{"role": "user", "content": "Reply with the letter A."}],
    "max_tokens": 1,
    "temperature": 0,
}
"""A request that nobody's filter dislikes, for finding out what a server does."""
STOP_CHECK_INTERVAL_S = 1.0
"""How long a request that waits for its turn does not notice that nothing more is to be sent."""


class RequestFailedError(Exception):
    """This request has no answer, and asking again will not give one now. Other requests may still succeed.

    ``rejected``: the server was there and would not take this one; else it failed as any other might have.
    """

    def __init__(self, message: str, *, rejected: bool = False) -> None:
        super().__init__(message)
        self.rejected = rejected


class EndpointUnavailableError(EndpointError):
    """Nobody answers at an endpoint, which may be otherwise later."""


class RequestCancelled(Exception):
    """The command stopped before this request was sent: it is simply still owed."""


RestartServer = Callable[[float | None], Awaitable[None]]


class Client:
    """Sends chat requests for one model to one or several endpoints, whichever :mod:`rlaif.llm.endpoint_pool` chooses.

    ``limit`` is how many requests may be in flight now: each endpoint's halves on a 429 or a time-out and grows back
    with every success.
    ``restart_server`` is called before a retry after a lost connection, for a server that can be started again; with
    the moment since which that has done nothing at all, if it hangs. ``describe_server`` says in a few words what such
    a server runs on, for the progress line.
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
        self.key = key or _api_key_from_environment()
        self._answered_at: float | None = None
        self._key_check_lock = asyncio.Lock()
        self._supports_logprobs: bool | None = None
        self._restart_server = restart_server
        self._pool = EndpointPool(urls, self.key, config, managed=restart_server is not None)
        self._monitor = ServerMonitor(self._pool, usage, config.timeout_s, describe_server)
        self._retry_policy = tenacity.AsyncRetrying(
            stop=self._should_give_up,
            wait=_retry_delay,
            retry=tenacity.retry_if_exception(_is_transient),
            before_sleep=self._before_retry,
            sleep=self._sleep_before_retry,
            reraise=True,
        )

    @property
    def endpoints(self) -> list[Endpoint]:
        return self._pool.endpoints

    @property
    def limit(self) -> float:
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
        """Ask each endpoint for its models before anything is paid. Returns the engine: "vllm" if all are, or "other".

        Raises :class:`EndpointError`: nobody there, key refused, or the model is not among those listed. Of several
        endpoints some may be absent: they rest, and are looked for again.
        """
        results = await asyncio.gather(*map(self._check_endpoint, self.endpoints), return_exceptions=True)
        available = [result for result in results if not isinstance(result, EndpointUnavailableError)]
        for endpoint, result in zip(self.endpoints, results, strict=True):
            if isinstance(result, BaseException) and (result in available or not available):
                raise result
            if isinstance(result, EndpointUnavailableError):
                endpoint.record_failure()
        self.usage.endpoints_down = self._pool.endpoints_down
        return "vllm" if all(available) else "other"

    async def _check_endpoint(self, endpoint: Endpoint) -> bool:
        """Whether ``endpoint`` says that it is a vLLM. Where models are not listed, the first request will tell; but
        one that fails in passing is not taken for one that lists none."""
        try:
            response = chat_protocol.parse_json(await self._retry_policy(self._get_models, endpoint), self.redact)
        except HTTPStatusError as error:
            if error.status in (401, 403):
                raise self._key_rejected_error(endpoint.url, error) from None
            if _is_transient(error):
                raise EndpointUnavailableError(
                    f"does not work now (HTTP {error.status}: {self._excerpt(error.message)})",
                    location=endpoint.url,
                    hint="Give the same command again when it does.",
                ) from None
            return False
        except MalformedResponseError:
            return False
        models = response.get("data") if isinstance(response, dict) else None
        cards = [card for card in models if isinstance(card, dict)] if isinstance(models, list) else []
        names = [str(card.get("id")) for card in cards]
        if names and self.model not in names:
            suggestion = did_you_mean(self.model, names[:50])
            raise EndpointError(f"has no model {self.model!r}. {suggestion}", location=endpoint.url)
        endpoint.is_vllm = any(card.get("owned_by") == "vllm" for card in cards)
        return endpoint.is_vllm

    async def _get_models(self, endpoint: Endpoint) -> bytes:
        try:
            return await endpoint.send("GET", "/models", min(30.0, self.config.timeout_s))
        except ConnectionLostError as error:  # nobody there: said at once, for it is most often a mistake
            reason = str(error).removeprefix("connection lost (").removesuffix(")")
            raise EndpointUnavailableError(
                f"no server answers there ({self._excerpt(reason)})",
                location=endpoint.url,
                hint="Start it, or mend --base-url. Without --base-url rlaif starts vLLM by itself.",
            ) from None

    async def chat(self, body: dict[str, Any], endpoint_path: str = chat_protocol.CHAT_PATH) -> ChatResponse:
        """Send one request (``model`` is added) and return its reply, retried as the module says. ``endpoint_path`` is
        ``wire.CLASSIFY_PATH`` for a reward model.

        Raises :class:`RequestFailedError`, :class:`RequestCancelled` or :class:`EndpointError`.
        """
        data = orjson.dumps({**body, "model": self.model})
        tokens = body.get("max_tokens", 0) * body.get("n", 1)
        try:
            return await self._retry_policy(self._send_once, data, tokens, endpoint_path)
        except HTTPStatusError as error:
            rejected = error.status in REQUEST_LEVEL_STATUSES
            raise RequestFailedError(
                f"HTTP {error.status}: {self._excerpt(error.message)}", rejected=rejected
            ) from None
        except (ConnectionLostError, MalformedResponseError) as error:
            raise RequestFailedError(self._excerpt(str(error))) from None

    async def with_retries(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """``call`` (any exchange with an endpoint) with the retries of a chat request.

        Raises :class:`RequestFailedError`, or :class:`EndpointError` where the key is refused.
        """

        async def call_once() -> Any:  # tenacity awaits coroutine functions only
            return await call()

        try:
            # What is with a provider is worth a last try: a stop cuts the wait short, and does not end the call.
            return await self._retry_policy.copy(sleep=self._sleep)(call_once)
        except HTTPStatusError as error:
            if error.status in (401, 403):
                raise self._key_rejected_error(self.url, error) from None
            raise RequestFailedError(f"HTTP {error.status}: {self._excerpt(error.message)}") from None
        except (ConnectionLostError, MalformedResponseError) as error:
            raise RequestFailedError(self._excerpt(str(error))) from None

    async def supports_logprobs(self, top: int = 20) -> bool:
        """Whether replies carry the ``top`` tokens' probabilities, found out by one request of one token, once.

        Raises :class:`EndpointError` where it cannot be told now: what is found out holds for the whole run.
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
                f"did not answer when asked for probabilities: {error}",
                location=self.url,
                hint='Give the same command again when it does, or set verdict = "json" under [judge].',
            ) from None
        self.usage.add(reply.usage)
        tokens = reply.choices[0].logprobs
        return bool(tokens and isinstance(tokens[0], dict) and tokens[0].get("top_logprobs"))

    def parse_response(
        self, value: Any, url: str, *, price_factor: float = 1.0, endpoint_path: str = chat_protocol.CHAT_PATH
    ) -> ChatResponse:
        """The JSON that came from ``endpoint_path`` as a reply. Raises :class:`MalformedResponseError`."""

        def cost(prompt: int, cached: int, completion: int) -> float:
            return (request_cost(self.model, url, prompt, cached, completion) or 0.0) * price_factor

        return chat_protocol.parse_chat_response(value, cost, self.redact, endpoint_path)

    async def _send_once(self, data: bytes, answer_tokens: int, endpoint_path: str) -> ChatResponse:
        self._monitor.start()
        endpoint, waited = await self._pool.acquire()
        delay_s, tokens = endpoint.rate_limiter.delay_s(), len(data) // 4 + answer_tokens
        endpoint.rate_limiter.reserve(tokens)
        try:
            if delay_s:
                await self._sleep(delay_s)
            if (delay_s or waited) and self._stopped():
                raise RequestCancelled
            sent_at = time.monotonic()
            raw = await endpoint.send_model_request(endpoint_path, data, answer_tokens)
        except HTTPStatusError as error:
            if error.status == 403 and not self._answered_at and await self._is_key_rejected(endpoint, endpoint_path):
                raise self._key_rejected_error(endpoint.url, error) from None
            self._handle_http_error(endpoint, error, sent_at)
            raise
        except ResponseTimeoutError as error:
            if error.silent_since is not None:  # else it is slow: its limit is halved, and it goes on answering
                self._record_failure(endpoint)
            raise
        except ConnectionLostError:
            self._record_failure(endpoint)
            raise
        finally:
            self._pool.release(endpoint)
        reply = self.parse_response(
            chat_protocol.parse_json(raw, self.redact), endpoint.url, endpoint_path=endpoint_path
        )
        self._answered_at = time.monotonic()
        endpoint.patience.record_answer(sent_at, reply.usage.completion_tokens)
        was_down = endpoint.consecutive_failures
        endpoint.record_success()
        if was_down:
            self.usage.endpoints_down = self._pool.endpoints_down
        endpoint.rate_limiter.adjust(reply.usage.prompt_tokens + reply.usage.completion_tokens - tokens)
        self.usage.request_wait_s += time.monotonic() - sent_at
        return reply

    def _handle_http_error(self, endpoint: Endpoint, error: HTTPStatusError, sent_at: float) -> None:
        """What a refusal means for the requests after it. Raises :class:`EndpointError` where they would end alike."""
        status = error.status
        if status in (401, 404) and self._answered_at and self._pool.has_healthy_alternative(endpoint):
            # One of several has lost its model or its key in the night: the others go on.
            self._record_failure(endpoint)
            raise ConnectionLostError(f"HTTP {status}: {self._excerpt(error.message)}") from None
        if status == 401:
            raise self._key_rejected_error(endpoint.url, error) from None
        if status == 404:
            raise EndpointError(
                f"has no model {self.model!r}, or no chat completions: {self._excerpt(error.message)}",
                location=endpoint.url,
            ) from None
        if status == 429:
            if error.retry_after:
                endpoint.record_failure(min(error.retry_after, 10 * MAX_RETRY_DELAY_S))
            endpoint.record_overload(sent_at)
        if status >= 500:
            self._record_failure(endpoint)

    async def _is_key_rejected(self, endpoint: Endpoint, endpoint_path: str) -> bool:
        """Hosts say 403 of a key, and at once of a prompt that their filter dislikes. Before anything was answered a
        plain request tells which it is, so that a start that owes such prompts alone is not over with the first."""
        if endpoint_path != chat_protocol.CHAT_PATH:
            return True
        async with self._key_check_lock:
            if not self._answered_at:
                try:
                    data = orjson.dumps({**PROBE_BODY, "model": self.model})
                    raw = await endpoint.send("POST", endpoint_path, self.config.timeout_s, data)
                    self.usage.add(self.parse_response(chat_protocol.parse_json(raw, self.redact), endpoint.url).usage)
                    self._answered_at = time.monotonic()
                except HTTPStatusError as error:
                    return error.status == 403
                except (ConnectionLostError, MalformedResponseError):
                    return False
        return False

    def _record_failure(self, endpoint: Endpoint) -> None:
        endpoint.record_failure()
        self.usage.endpoints_down = self._pool.endpoints_down

    async def _before_retry(self, state: tenacity.RetryCallState) -> None:
        self.usage.retries += 1
        error = state.outcome.exception() if state.outcome else None
        if self._restart_server and isinstance(error, ConnectionLostError):
            await self._restart_server(error.silent_since if isinstance(error, ResponseTimeoutError) else None)

    def _should_give_up(self, state: tenacity.RetryCallState) -> bool:
        if state.attempt_number >= self.config.max_attempts or self._stopped():
            return True
        # The first attempt may have waited for hours in a slow server's queue, and is worth a second one.
        return state.attempt_number > 1 and (state.seconds_since_start or 0.0) >= self.config.request_deadline_s

    def _stopped(self) -> bool:
        return self.usage.stop_reason() is not None

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the moment when nothing more is to be sent."""
        deadline = time.monotonic() + seconds
        while not self._stopped():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            await asyncio.sleep(min(remaining, STOP_CHECK_INTERVAL_S))

    async def _sleep_before_retry(self, seconds: float) -> None:
        """Raises :class:`RequestCancelled` at a stop: a server that has asked to be left alone is not asked before
        that."""
        await self._sleep(seconds)
        if self._stopped():
            raise RequestCancelled

    def _key_rejected_error(self, url: str, error: HTTPStatusError) -> EndpointError:
        message = "the key was refused" if self.key else "the server asks for a key and none is set"
        return EndpointError(
            f"{message} (HTTP {error.status})",
            location=url,
            hint=f"Put the key into the environment: export {API_KEY_VARIABLES[1]}=...  (or {API_KEY_VARIABLES[0]}, which goes first)",
        )

    def _excerpt(self, text: str) -> str:
        """Hidden before it is cut: of a key at the cut a part would be left."""
        return self.redact(text)[:500]

    def redact(self, text: str) -> str:
        """Servers like to quote the key that they were given."""
        return replace_surrogates(text.replace(self.key, "***") if self.key else text)


def _api_key_from_environment() -> str | None:
    for name in API_KEY_VARIABLES:
        key = os.environ.get(name, "").strip()
        if key and not re.fullmatch(r"[!-~]+", key):
            raise UsageError(f"the key in {name} holds characters that no key has", hint=f"Set {name} again.")
        if key:
            return key
    return None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HTTPStatusError):
        return error.status in (408, 409, 425, 429) or error.status >= 500
    return isinstance(error, (ConnectionLostError, MalformedResponseError))


def _retry_delay(state: tenacity.RetryCallState) -> float:
    """Retry-After where the server gives one, else exponential with full jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, HTTPStatusError) and error.retry_after is not None:
        return min(error.retry_after, 10 * MAX_RETRY_DELAY_S) + random.random()
    return random.uniform(0.1, min(MAX_RETRY_DELAY_S, 0.5 * 2**state.attempt_number))
