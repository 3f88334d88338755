"""Retries of requests to model servers. No other module retries.

Timeouts, lost connections, HTTP 408, 409, 425, 429 and 5xx, and malformed bodies are retried with jittered
exponential back-off, or after Retry-After. HTTP 400, 401, 403, 404 and 422 are never retried.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import tenacity

from rlaif.config.models import ClientConfig
from rlaif.llm import http_status
from rlaif.llm.chat_protocol import MalformedResponseError
from rlaif.llm.endpoint import ConnectionLostError, HTTPStatusError, ResponseTimeoutError
from rlaif.llm.request import RequestCancelled
from rlaif.llm.usage import UsageMeter

MAX_RETRY_DELAY_S = 60.0
MAX_RETRY_AFTER_S = 10 * MAX_RETRY_DELAY_S
"""Upper bound of a server's Retry-After."""
STOP_CHECK_INTERVAL_S = 1.0
"""How late a waiting request may notice a stop."""

T = TypeVar("T")
RestartServer = Callable[[float | None], Awaitable[None]]
"""Restarts a managed server. The argument is the time since which it has been silent (monotonic), or None."""


class Retries:
    """Calls functions with retries, until ``usage`` has a reason to stop.

    ``restart_server`` is called before a retry after a lost connection, if the server can be restarted.
    """

    def __init__(self, config: ClientConfig, usage: UsageMeter, restart_server: RestartServer | None = None) -> None:
        self._config, self._usage, self._restart_server = config, usage, restart_server
        self._policy = tenacity.AsyncRetrying(
            stop=self._should_give_up,
            wait=lambda state: retry_delay(state),
            retry=tenacity.retry_if_exception(is_retryable),
            before_sleep=self._before_retry,
            sleep=self._sleep_or_cancel,
            reraise=True,
        )

    async def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Await ``function(*args)`` with retries. Raises :class:`RequestCancelled` if a stop comes before a retry."""
        result: T = await self._policy(function, *args)
        return result

    async def call_once_more_at_stop(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Like :meth:`call`, but a stop cuts the delay short and allows one last attempt.

        Used for batches: a last attempt is worth making for a job that the provider already has.
        """
        result: T = await self._policy.copy(sleep=self.sleep)(function, *args)
        return result

    def stopped(self) -> bool:
        return self._usage.stop_reason() is not None

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds``, or until there is a reason to stop."""
        deadline = time.monotonic() + seconds
        while not self.stopped():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            await asyncio.sleep(min(remaining, STOP_CHECK_INTERVAL_S))

    async def _sleep_or_cancel(self, seconds: float) -> None:
        """Sleep before a retry. A stop does not shorten the delay that a server has asked for: it cancels the
        retry."""
        await self.sleep(seconds)
        if self.stopped():
            raise RequestCancelled

    async def _before_retry(self, state: tenacity.RetryCallState) -> None:
        self._usage.retries += 1
        error = state.outcome.exception() if state.outcome else None
        if self._restart_server and isinstance(error, ConnectionLostError):
            await self._restart_server(error.silent_since if isinstance(error, ResponseTimeoutError) else None)

    def _should_give_up(self, state: tenacity.RetryCallState) -> bool:
        if state.attempt_number >= self._config.max_attempts or self.stopped():
            return True
        # The first attempt may have waited for hours in a slow server's queue and deserves a second one.
        return state.attempt_number > 1 and (state.seconds_since_start or 0.0) >= self._config.request_deadline_s


def is_retryable(error: BaseException) -> bool:
    """Return True if the same request may succeed later."""
    if isinstance(error, HTTPStatusError):
        return http_status.is_retryable(error.status)
    return isinstance(error, (ConnectionLostError, MalformedResponseError))


def retry_delay(state: tenacity.RetryCallState) -> float:
    """Return the delay before the next attempt in seconds: Retry-After if the server sent it, otherwise exponential
    with full jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, HTTPStatusError) and error.retry_after is not None:
        return min(error.retry_after, MAX_RETRY_AFTER_S) + random.random()
    return random.uniform(0.1, min(MAX_RETRY_DELAY_S, 0.5 * 2**state.attempt_number))
