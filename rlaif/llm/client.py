"""One wire protocol for every engine: OpenAI chat completions, without streaming.

Retries live here and nowhere else: time-outs, cut connections, 408, 409, 425, 429, 5xx and malformed bodies are tried
again, honoring Retry-After, with jittered back-off; 400, 401, 403, 404 and 422 never. A time-out comes only if an
endpoint makes no progress (:mod:`rlaif.llm.patience`), and counts as overload: fewer requests go out at once.

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
from typing import Any

import orjson
import tenacity

from rlaif.config import ClientConfig
from rlaif.errors import EndpointError, UsageError, did_you_mean
from rlaif.llm import wire
from rlaif.llm.budget import Meter, price
from rlaif.llm.endpoint import Endpoint, Lost, Refused, Silent, make_room
from rlaif.llm.fleet import Fleet
from rlaif.llm.watch import Watch
from rlaif.llm.wire import Malformed, Reply
from rlaif.records import clean

KEY_NAMES = ("RLAIF_API_KEY", "OPENAI_API_KEY")
MAX_WAIT_S = 60.0
OF_ONE_REQUEST = (400, 403, 413, 422, 451)
"""Statuses of a request that a server will not take: too long, filtered, not understood."""
PLAIN = {
    "messages": [{"role": "user", "content": "Reply with the letter A."}],
    "max_tokens": 1,
    "temperature": 0,
}
"""A request that nobody's filter dislikes, for finding out what a server does."""
LOOK_EVERY_S = 1.0
"""How long a request that waits for its turn does not notice that nothing more is to be sent."""


class RequestFailed(Exception):
    """This request has no answer, and asking again will not give one now. Other requests may still succeed.

    ``refused``: the server was there and would not take this one; else it failed as any other might have.
    """

    def __init__(self, told: str, *, refused: bool = False) -> None:
        super().__init__(told)
        self.refused = refused


class Absent(EndpointError):
    """Nobody answers at an endpoint, which may be otherwise later."""


class NotSent(Exception):
    """The command stopped before this request was sent: it is simply still owed."""


Revive = Callable[[float | None], Awaitable[None]]


class Client:
    """Sends chat requests for one model to one or several endpoints, whichever :mod:`rlaif.llm.fleet` chooses.

    ``limit`` is how many requests may be in flight now: each endpoint's halves on a 429 or a time-out and grows back
    with every success.
    ``revive`` is called before a retry after a lost connection, for a server that can be started again; with the
    moment since which that has done nothing at all, if it hangs. ``conditions`` says in a few words what such a server
    runs on, for the progress line.
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
        conditions: Callable[[], str] | None = None,
    ) -> None:
        make_room(config.concurrency)
        self.model = model
        self.config = config
        self.meter = meter
        self.key = key or _key_from_environment()
        self._answered_at: float | None = None
        self._trying = asyncio.Lock()
        self._gives_logprobs: bool | None = None
        self._revive = revive
        self._fleet = Fleet(urls, self.key, config, own=revive is not None)
        self._watch = Watch(self._fleet, meter, config.timeout_s, conditions)
        self._retrying = tenacity.AsyncRetrying(
            stop=self._given_up,
            wait=_wait,
            retry=tenacity.retry_if_exception(_is_transient),
            before_sleep=self._before_retry,
            sleep=self._wait_to_ask_again,
            reraise=True,
        )

    @property
    def endpoints(self) -> list[Endpoint]:
        return self._fleet.endpoints

    @property
    def limit(self) -> float:
        return self._fleet.limit

    @property
    def url(self) -> str:
        return self.endpoints[0].url

    @property
    def urls(self) -> list[str]:
        return [endpoint.url for endpoint in self.endpoints]

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._watch.close()
        await self._fleet.close()

    async def check(self) -> str:
        """Ask each endpoint for its models before anything is paid. Returns the engine: "vllm" if all are, or "other".

        Raises :class:`EndpointError`: nobody there, key refused, or the model is not among those listed. Of several
        endpoints some may be absent: they rest, and are looked for again.
        """
        found = await asyncio.gather(*map(self._check, self.endpoints), return_exceptions=True)
        there = [told for told in found if not isinstance(told, Absent)]
        for endpoint, told in zip(self.endpoints, found, strict=True):
            if isinstance(told, BaseException) and (told in there or not there):
                raise told
            if isinstance(told, Absent):
                endpoint.failed()
        self.meter.down = self._fleet.down
        return "vllm" if all(there) else "other"

    async def _check(self, endpoint: Endpoint) -> bool:
        """Whether ``endpoint`` says that it is a vLLM. Where models are not listed, the first request will tell; but
        one that fails in passing is not taken for one that lists none."""
        try:
            listed = wire.loads(await self._retrying(self._models, endpoint), self.hide)
        except Refused as error:
            if error.status in (401, 403):
                raise self._key_refused(endpoint.url, error) from None
            if _is_transient(error):
                raise Absent(
                    f"does not work now (HTTP {error.status}: {self._quoted(error.told)})",
                    where=endpoint.url,
                    mend="Give the same command again when it does.",
                ) from None
            return False
        except Malformed:
            return False
        models = listed.get("data") if isinstance(listed, dict) else None
        cards = [card for card in models if isinstance(card, dict)] if isinstance(models, list) else []
        names = [str(card.get("id")) for card in cards]
        if names and self.model not in names:
            shown = did_you_mean(self.model, names[:50])
            raise EndpointError(f"has no model {self.model!r}. {shown}", where=endpoint.url)
        endpoint.is_vllm = any(card.get("owned_by") == "vllm" for card in cards)
        return endpoint.is_vllm

    async def _models(self, endpoint: Endpoint) -> bytes:
        try:
            return await endpoint.send("GET", "/models", min(30.0, self.config.timeout_s))
        except Lost as error:  # nobody there: said at once, for it is most often a mistake
            reason = str(error).removeprefix("connection lost (").removesuffix(")")
            raise Absent(
                f"no server answers there ({self._quoted(reason)})",
                where=endpoint.url,
                mend="Start it, or mend --base-url. Without --base-url rlaif starts vLLM by itself.",
            ) from None

    async def chat(self, body: dict[str, Any], path: str = wire.CHAT) -> Reply:
        """Send one request (``model`` is added) and return its reply, retried as the module says. ``path`` is
        ``wire.CLASSIFY`` for a reward model.

        Raises :class:`RequestFailed`, :class:`NotSent` or :class:`EndpointError`.
        """
        data = orjson.dumps({**body, "model": self.model})
        tokens = body.get("max_tokens", 0) * body.get("n", 1)
        try:
            return await self._retrying(self._once, data, tokens, path)
        except Refused as error:
            refused = error.status in OF_ONE_REQUEST
            raise RequestFailed(f"HTTP {error.status}: {self._quoted(error.told)}", refused=refused) from None
        except (Lost, Malformed) as error:
            raise RequestFailed(self._quoted(str(error))) from None

    async def steadily(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """``call`` (any exchange with an endpoint) with the retries of a chat request.

        Raises :class:`RequestFailed`, or :class:`EndpointError` where the key is refused.
        """

        async def once() -> Any:  # tenacity awaits coroutine functions only
            return await call()

        try:
            # What is with a provider is worth a last try: a stop cuts the wait short, and does not end the call.
            return await self._retrying.copy(sleep=self._pause)(once)
        except Refused as error:
            if error.status in (401, 403):
                raise self._key_refused(self.url, error) from None
            raise RequestFailed(f"HTTP {error.status}: {self._quoted(error.told)}") from None
        except (Lost, Malformed) as error:
            raise RequestFailed(self._quoted(str(error))) from None

    async def gives_logprobs(self, top: int = 20) -> bool:
        """Whether replies carry the ``top`` tokens' probabilities, found out by one request of one token, once.

        Raises :class:`EndpointError` where it cannot be told now: what is found out holds for the whole run.
        """
        if self._gives_logprobs is None:
            self._gives_logprobs = await self._probe(top)
        return self._gives_logprobs

    async def _probe(self, top: int) -> bool:
        try:
            reply = await self.chat({**PLAIN, "logprobs": True, "top_logprobs": top})
        except RequestFailed as error:
            if error.refused:
                return False
            raise EndpointError(
                f"did not answer when asked for probabilities: {error}",
                where=self.url,
                mend='Give the same command again when it does, or set verdict = "json" under [judge].',
            ) from None
        self.meter.count(reply.usage)
        tokens = reply.choices[0].logprobs
        return bool(tokens and isinstance(tokens[0], dict) and tokens[0].get("top_logprobs"))

    def read(self, value: Any, url: str, *, discount: float = 1.0, path: str = wire.CHAT) -> Reply:
        """The JSON that came from ``path`` as a reply. Raises :class:`Malformed`."""

        def dollars(prompt: int, cached: int, completion: int) -> float:
            return (price(self.model, url, prompt, cached, completion) or 0.0) * discount

        return wire.read(value, dollars, self.hide, path)

    async def _once(self, data: bytes, answer_tokens: int, path: str) -> Reply:
        self._watch.start()
        endpoint, waited = await self._fleet.acquire()
        wait, tokens = endpoint.pace.wait_s(), len(data) // 4 + answer_tokens
        endpoint.pace.take(tokens)
        try:
            if wait:
                await self._pause(wait)
            if (wait or waited) and self._no_more():
                raise NotSent
            sent = time.monotonic()
            raw = await endpoint.ask(path, data, answer_tokens)
        except Refused as error:
            if error.status == 403 and not self._answered_at and await self._refuses_key(endpoint, path):
                raise self._key_refused(endpoint.url, error) from None
            self._note(endpoint, error, sent)
            raise
        except Silent as error:
            if error.since is not None:  # else it is slow: its limit is halved, and it goes on answering
                self._failed(endpoint)
            raise
        except Lost:
            self._failed(endpoint)
            raise
        finally:
            self._fleet.release(endpoint)
        reply = self.read(wire.loads(raw, self.hide), endpoint.url, path=path)
        self._answered_at = time.monotonic()
        endpoint.patience.answered(sent, reply.usage.completion_tokens)
        was_down = endpoint.strikes
        endpoint.answered()
        if was_down:
            self.meter.down = self._fleet.down
        endpoint.pace.correct(reply.usage.prompt_tokens + reply.usage.completion_tokens - tokens)
        self.meter.waited_s += time.monotonic() - sent
        return reply

    def _note(self, endpoint: Endpoint, error: Refused, sent: float) -> None:
        """What a refusal means for the requests after it. Raises :class:`EndpointError` where they would end alike."""
        status = error.status
        if status in (401, 404) and self._answered_at and self._fleet.elsewhere(endpoint):
            # One of several has lost its model or its key in the night: the others go on.
            self._failed(endpoint)
            raise Lost(f"HTTP {status}: {self._quoted(error.told)}") from None
        if status == 401:
            raise self._key_refused(endpoint.url, error) from None
        if status == 404:
            raise EndpointError(
                f"has no model {self.model!r}, or no chat completions: {self._quoted(error.told)}",
                where=endpoint.url,
            ) from None
        if status == 429:
            if error.after:
                endpoint.failed(min(error.after, 10 * MAX_WAIT_S))
            endpoint.too_much(sent)
        if status >= 500:
            self._failed(endpoint)

    async def _refuses_key(self, endpoint: Endpoint, path: str) -> bool:
        """Hosts say 403 of a key, and at once of a prompt that their filter dislikes. Before anything was answered a
        plain request tells which it is, so that a start that owes such prompts alone is not over with the first."""
        if path != wire.CHAT:
            return True
        async with self._trying:
            if not self._answered_at:
                try:
                    data = orjson.dumps({**PLAIN, "model": self.model})
                    raw = await endpoint.send("POST", path, self.config.timeout_s, data)
                    self.meter.count(self.read(wire.loads(raw, self.hide), endpoint.url).usage)
                    self._answered_at = time.monotonic()
                except Refused as again:
                    return again.status == 403
                except (Lost, Malformed):
                    return False
        return False

    def _failed(self, endpoint: Endpoint) -> None:
        endpoint.failed()
        self.meter.down = self._fleet.down

    async def _before_retry(self, state: tenacity.RetryCallState) -> None:
        self.meter.retries += 1
        error = state.outcome.exception() if state.outcome else None
        if self._revive and isinstance(error, Lost):
            await self._revive(error.since if isinstance(error, Silent) else None)

    def _given_up(self, state: tenacity.RetryCallState) -> bool:
        if state.attempt_number >= self.config.attempts or self._no_more():
            return True
        # The first attempt may have waited for hours in a slow server's queue, and is worth a second one.
        return state.attempt_number > 1 and (state.seconds_since_start or 0.0) >= self.config.deadline_s

    def _no_more(self) -> bool:
        return self.meter.reason_to_stop() is not None

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not beyond the moment when nothing more is to be sent."""
        until = time.monotonic() + seconds
        while not self._no_more():
            left = until - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, LOOK_EVERY_S))

    async def _wait_to_ask_again(self, seconds: float) -> None:
        """Raises :class:`NotSent` at a stop: a server that has asked to be left alone is not asked before that."""
        await self._pause(seconds)
        if self._no_more():
            raise NotSent

    def _key_refused(self, url: str, error: Refused) -> EndpointError:
        given = "the key was refused" if self.key else "the server asks for a key and none is set"
        return EndpointError(
            f"{given} (HTTP {error.status})",
            where=url,
            mend=f"Put the key into the environment: export {KEY_NAMES[1]}=...  (or {KEY_NAMES[0]}, which goes first)",
        )

    def _quoted(self, text: str) -> str:
        """Hidden before it is cut: of a key at the cut a part would be left."""
        return self.hide(text)[:500]

    def hide(self, text: str) -> str:
        """Servers like to quote the key that they were given."""
        return clean(text.replace(self.key, "***") if self.key else text)


def _key_from_environment() -> str | None:
    for name in KEY_NAMES:
        key = os.environ.get(name, "").strip()
        if key and not re.fullmatch(r"[!-~]+", key):
            raise UsageError(f"the key in {name} holds characters that no key has", mend=f"Set {name} again.")
        if key:
            return key
    return None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, Refused):
        return error.status in (408, 409, 425, 429) or error.status >= 500
    return isinstance(error, (Lost, Malformed))


def _wait(state: tenacity.RetryCallState) -> float:
    """Retry-After where the server gives one, else exponential with full jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, Refused) and error.after is not None:
        return min(error.after, 10 * MAX_WAIT_S) + random.random()
    return random.uniform(0.1, min(MAX_WAIT_S, 0.5 * 2**state.attempt_number))
