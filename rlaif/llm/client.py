"""One wire protocol for every engine: OpenAI chat completions, over the openai package's aiohttp transport.

Retries live here and nowhere else (the package's own are off): timeouts, cut connections, 408, 409, 429, 5xx and
malformed bodies are tried again, honouring Retry-After, with jittered back-off; 400, 401, 403, 404 and 422 never.
What ends a command (no server, no key, no such model) is an :class:`EndpointError`; what ends only one request is a
:class:`RequestFailed`. The key goes into the request's header and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import orjson
import tenacity

from rlaif.config import ClientConfig
from rlaif.errors import EndpointError, UsageError, did_you_mean
from rlaif.llm.budget import Meter, Usage, is_local, price
from rlaif.records import clean, clean_json

KEY_NAMES = ("RLAIF_API_KEY", "OPENAI_API_KEY")
MAX_WAIT_S = 60.0
REST_S = 10.0
"""How long an endpoint that failed is passed over while another one is there."""


class RequestFailed(Exception):
    """This request has no answer, and asking again will not give one now. Other requests may still succeed."""


class Malformed(Exception):
    """The server answered 200 with something that is not a chat completion."""


class Lost(Exception):
    """The connection was not made, was cut, or gave no answer in time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. ``logprobs`` is the protocol's list, one entry a token: {token, logprob, top_logprobs}."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    logprobs: list[dict[str, Any]] | None
    tool_calls: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Reply:
    choices: list[Choice]
    usage: Usage


Revive = Callable[[], Awaitable[None]]


class _Endpoint:
    """One URL and its connections."""

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.rests_until = 0.0
        self.sdk = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=key or "none",
            max_retries=0,
            timeout=timeout_s,
            # A proxy from the environment is for what lies outside this machine.
            http_client=openai.DefaultAioHttpClient(trust_env=not is_local(url)),
        )


class Client:
    """Sends chat requests for one model to one or several endpoints, the least loaded first.

    ``limit`` is how many requests may be in flight now: it halves on 429 (once for all that were in flight together)
    and grows back with every success.
    ``revive`` is called before a retry after a lost connection, for a server that can be started again.
    """

    def __init__(
        self,
        model: str,
        urls: list[str],
        config: ClientConfig,
        meter: Meter,
        *,
        key: str | None = None,
        revive: Revive | None = None,
    ) -> None:
        for url in urls:
            _check_url(url)
        self.model = model
        self.config = config
        self.meter = meter
        self.key = key or _key_from_environment()
        self.limit = float(config.concurrency)
        self._slowed_at = 0.0
        self._answered = False
        self._revive = revive
        self._endpoints = [_Endpoint(url, self.key, config.timeout_s) for url in urls]

    @property
    def url(self) -> str:
        return self._endpoints[0].url

    @property
    def urls(self) -> list[str]:
        return [endpoint.url for endpoint in self._endpoints]

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        # An aiohttp transport that is not closed prints every open connection at exit.
        for endpoint in self._endpoints:
            await endpoint.sdk.close()

    async def check(self) -> str:
        """Ask each endpoint for its models before anything is paid. Returns the engine: "vllm" if all are, or "other".

        Raises :class:`EndpointError`: nobody there, key refused, or the model is not among those listed.
        """
        return "vllm" if all([await self._check(endpoint) for endpoint in self._endpoints]) else "other"

    async def _check(self, endpoint: _Endpoint) -> bool:
        """Whether ``endpoint`` says that it is a vLLM. Where models are not listed, the first request will tell."""
        quick = endpoint.sdk.with_options(timeout=min(30.0, self.config.timeout_s))
        try:
            listed = await quick.get("/models", cast_to=object)
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._refused(endpoint.url, error) from None
            return False
        except (openai.APIConnectionError, aiohttp.ClientError) as error:
            raise EndpointError(
                f"no server answers there ({_cause(error)})",
                where=endpoint.url,
                mend="Start it, or mend --base-url. Without --base-url rlaif starts vLLM by itself.",
            ) from None
        except (ValueError, RecursionError):
            return False
        models = listed.get("data") if isinstance(listed, dict) else None
        cards = [card for card in models if isinstance(card, dict)] if isinstance(models, list) else []
        names = [str(card.get("id")) for card in cards]
        if names and self.model not in names:
            shown = did_you_mean(self.model, names[:50])
            raise EndpointError(f"has no model {self.model!r}. {shown}", where=endpoint.url)
        return any(card.get("owned_by") == "vllm" for card in cards)

    async def chat(self, body: dict[str, Any]) -> Reply:
        """Send one request (``model`` is added) and return its reply, retried as the module says.

        Raises :class:`RequestFailed` or :class:`EndpointError`.
        """
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.config.attempts),
            wait=_wait,
            retry=tenacity.retry_if_exception(_is_transient),
            before_sleep=self._before_retry,
            reraise=True,
        )
        try:
            return await retrying(self._once, body)
        except openai.APIStatusError as error:
            raise RequestFailed(f"HTTP {error.status_code}: {self._said(error)}") from None
        except (Lost, Malformed) as error:
            raise RequestFailed(str(error)) from None

    async def gives_logprobs(self, top: int = 20) -> bool:
        """Whether replies carry the ``top`` tokens' probabilities, found out by one request of one token."""
        body = {
            "messages": [{"role": "user", "content": "Reply with the letter A."}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": top,
        }
        try:
            reply = await self.chat(body)
        except RequestFailed:
            return False
        self.meter.count(reply.usage)
        tokens = reply.choices[0].logprobs
        return bool(tokens and isinstance(tokens[0], dict) and tokens[0].get("top_logprobs"))

    async def _once(self, body: dict[str, Any]) -> Reply:
        sent = time.monotonic()
        endpoint = min(self._endpoints, key=lambda each: (each.rests_until > sent, each.in_flight))
        endpoint.in_flight += 1
        try:
            async with asyncio.timeout(self.config.timeout_s):
                value = await endpoint.sdk.post("/chat/completions", body={**body, "model": self.model}, cast_to=object)
        except openai.APIStatusError as error:
            self._note(endpoint, error, sent)
            raise
        except (openai.APIConnectionError, aiohttp.ClientError, OSError) as error:
            endpoint.rests_until = time.monotonic() + REST_S
            late = isinstance(error, TimeoutError) or isinstance(_root(error), TimeoutError)
            raise Lost(
                f"no answer within {self.config.timeout_s:g} s" if late else f"connection lost ({_cause(error)})"
            ) from None
        except (ValueError, RecursionError, openai.APIResponseValidationError) as error:
            raise Malformed(f"the body is not JSON: {str(error)[:200]}") from None
        finally:
            endpoint.in_flight -= 1
        reply = self._read(value, endpoint.url)
        self._answered = True
        self.limit = min(self.limit + 1.0 / max(self.limit, 1.0), float(self.config.concurrency))
        return reply

    def _note(self, endpoint: _Endpoint, error: openai.APIStatusError, sent: float) -> None:
        """What a refusal means for the requests after it. Raises :class:`EndpointError` where they would end alike."""
        status = error.status_code
        # Where answers came before, 403 is about this one request: hosts say it of prompts that they will not take.
        if status == 401 or (status == 403 and not self._answered):
            raise self._refused(endpoint.url, error) from None
        if status == 404:
            raise EndpointError(
                f"has no model {self.model!r}, or no chat completions: {self._said(error)}", where=endpoint.url
            ) from None
        if status == 429 and sent >= self._slowed_at:
            self._slowed_at = time.monotonic()
            self.limit = max(1.0, self.limit / 2)
        if status >= 500:
            endpoint.rests_until = time.monotonic() + REST_S

    def _read(self, value: Any, url: str) -> Reply:
        if isinstance(value, str):  # a JSON body sent without its content type
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError:
                raise Malformed(f"the body is not JSON: {value[:80]!r}") from None
        if not isinstance(value, dict):
            raise Malformed(f"the body is a {type(value).__name__}, not an object")
        choices = value.get("choices")
        if not isinstance(choices, list) or not choices:
            told = value.get("error")
            told = told.get("message") if isinstance(told, dict) else told
            raise Malformed(
                "the reply has no choices" + (f": {self._hide(told[:200])}" if isinstance(told, str) else "")
            )
        usage = value.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        prompt_tokens, completion_tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        details = usage.get("prompt_tokens_details")
        cached = min(prompt_tokens, _count(details, "cached_tokens")) if isinstance(details, dict) else 0
        usd = price(self.model, url, prompt_tokens, cached, completion_tokens) or 0.0
        return Reply([_choice(choice) for choice in choices], Usage(prompt_tokens, cached, completion_tokens, usd))

    async def _before_retry(self, state: tenacity.RetryCallState) -> None:
        self.meter.retries += 1
        if self._revive and state.outcome and isinstance(state.outcome.exception(), Lost):
            await self._revive()

    def _refused(self, url: str, error: openai.APIStatusError) -> EndpointError:
        given = "the key was refused" if self.key else "the server asks for a key and none is set"
        return EndpointError(
            f"{given} (HTTP {error.status_code})",
            where=url,
            mend=f"Put the key into the environment: export {KEY_NAMES[1]}=...  (or {KEY_NAMES[0]}, which goes first)",
        )

    def _said(self, error: openai.APIStatusError) -> str:
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        return self._hide(str(message or error.message)[:500])

    def _hide(self, text: str) -> str:
        """Servers like to quote the key that they were given."""
        return clean(text.replace(self.key, "***") if self.key else text)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, good = urlsplit(""), False
    if parts.username or parts.password:
        raise UsageError("a base URL holds a name or a password, and URLs are written into logs",
                         mend=f"Take it out, and put the key into the environment as {KEY_NAMES[1]}.")  # fmt: skip
    if not good:
        raise UsageError(f"{url!r} is not a URL", mend="Give --base-url like http://127.0.0.1:8000/v1")


def _key_from_environment() -> str | None:
    for name in KEY_NAMES:
        key = os.environ.get(name, "").strip()
        if key and not re.fullmatch(r"[!-~]+", key):
            raise UsageError(f"the key in {name} holds characters that no key has", mend=f"Set {name} again.")
        if key:
            return key
    return None


def _choice(value: Any) -> Choice:
    message = value.get("message") if isinstance(value, dict) else None
    if not isinstance(message, dict):
        raise Malformed("a choice has no message")
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    if not isinstance(content, str):
        raise Malformed("a message's content is not text")
    thinking: Any = message.get("reasoning_content") or message.get("reasoning")
    text = clean(content)
    if isinstance(thinking, str) and thinking:  # the server has split it off already
        thinking = clean(thinking)
    else:
        thinking, text = split_thinking(text)
    logprobs = value.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    calls = message.get("tool_calls")
    calls = [clean_json(call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else None
    finish = value.get("finish_reason")
    return Choice(
        text=text,
        reasoning=thinking,
        finish_reason=clean(finish) if isinstance(finish, str) else None,
        logprobs=tokens if isinstance(tokens, list) and tokens else None,
        tool_calls=calls or None,
    )


def split_thinking(text: str) -> tuple[str | None, str]:
    """``text`` as (thinking, answer). Thinking stands before ``</think>``, whether ``<think>`` was written by the
    model or already by its template; thinking that was cut off leaves an empty answer."""
    opened = text.lstrip().startswith("<think>")
    thinking, closed, answer = text.partition("</think>")
    if closed:
        return thinking.strip().removeprefix("<think>").strip() or None, answer.lstrip()
    if opened:
        return text.strip().removeprefix("<think>").strip() or None, ""
    return None, text


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else 0


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, (Lost, Malformed))


def _wait(state: tenacity.RetryCallState) -> float:
    """Retry-After where the server gives one, else exponential with full jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, openai.APIStatusError):
        after = _retry_after(error.response.headers.get("retry-after", ""))
        if after is not None:
            return min(after, 10 * MAX_WAIT_S) + random.random()
    return random.uniform(0.1, min(MAX_WAIT_S, 0.5 * 2**state.attempt_number))


def _retry_after(value: str) -> float | None:
    """Seconds from now: the header holds seconds or an HTTP date."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value.strip()):
        return float(value)
    try:
        at: datetime = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - time.time())


def _root(error: BaseException) -> BaseException:
    """The innermost reason: the package only says "Connection error."."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _cause(error: BaseException) -> str:
    root = _root(error)
    return " ".join(str(root).split())[:200] or type(root).__name__
