"""What is asked, one by one or by batch: a request with its keys, how its reply is read, and how a command is ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.llm.chat_protocol import CHAT_PATH, ChatResponse
from rlaif.records import Record


class UnparsableReplyError(Exception):
    """The reply holds no verdict. Asked again once, then counted as a failure; never a label."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request without its model. ``keys``: the journal keys of the records that its answer will give. ``context`` is
    the caller's own, handed back with the reply. ``endpoint_path``: what of the server is asked."""

    keys: tuple[str, ...]
    body: dict[str, Any]
    prompt_id: str
    context: Any = None
    endpoint_path: str = CHAT_PATH


ReplyParser = Callable[[Request, ChatResponse], Sequence[Record]]


@contextlib.contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call ``callback`` while open."""
    loop = asyncio.get_running_loop()
    previous_handlers: dict[signal.Signals, Any] = {}
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: the caller's own business
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            loop.add_signal_handler(signum, callback)
            previous_handlers[signum] = handler
    try:
        yield
    finally:
        for signum, handler in previous_handlers.items():
            loop.remove_signal_handler(signum)
            signal.signal(signum, handler)
