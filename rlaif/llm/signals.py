"""Signal handling while an event loop runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_interrupt(callback: Callable[[], None]) -> Iterator[None]:
    """Call ``callback`` on SIGINT and SIGTERM while the context is open; restore the previous handlers afterwards.

    Does nothing outside the main thread, where the caller handles signals.
    """
    loop = asyncio.get_running_loop()
    previous_handlers: dict[signal.Signals, Any] = {}
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread
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
