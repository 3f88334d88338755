"""What is asked, one by one or by batch: a request with its keys, how its reply is read, and how a command is ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.llm.wire import CHAT, Reply
from rlaif.records import Record


class Unreadable(Exception):
    """The reply holds no verdict. Asked again once, then counted as a failure; never a label."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request without its model. ``keys``: the journal keys of the records that its answer will give. ``about`` is
    the caller's own, handed back with the reply. ``path``: what of the server is asked."""

    keys: tuple[str, ...]
    body: dict[str, Any]
    prompt_id: str
    about: Any = None
    path: str = CHAT


Read = Callable[[Request, Reply], Sequence[Record]]


@contextlib.contextmanager
def on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call ``call`` while open."""
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: the caller's own business
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            loop.add_signal_handler(number, call)
            before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
