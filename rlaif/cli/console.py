"""What people see: progress and notes on stderr, data on stdout, errors with one way to mend them.

Plain lines where stderr is no terminal, so that a log of the night reads well in the morning.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from rlaif.errors import RlaifError

if TYPE_CHECKING:
    from rlaif.llm.budget import Meter

PLAIN_EVERY_S = 30.0
INTERRUPTED = 130
verbose = False


def say(line: str) -> None:
    """A note for the person who waits."""
    stamp = "" if sys.stderr.isatty() else time.strftime("%H:%M:%S ")
    sys.stderr.write(f"{stamp}{line}\n")
    sys.stderr.flush()


def put(line: str = "") -> None:
    """Data, on stdout."""
    sys.stdout.write(f"{line}\n")


def put_json(value: Any) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())


class Console:
    """A :class:`rlaif.pipeline.Watch` that writes to stderr."""

    def say(self, line: str) -> None:
        say(line)

    @contextlib.contextmanager
    def watch(self, meter: Meter) -> Iterator[None]:
        """Show ``meter`` while open: one line that is rewritten on a terminal, a line now and then elsewhere."""
        over = threading.Event()
        terminal = sys.stderr.isatty()

        def show() -> None:
            while not over.wait(0.5 if terminal else PLAIN_EVERY_S):
                if meter.requests or meter.failed:
                    text = progress(meter)
                    sys.stderr.write(f"\r\x1b[K{text[: _width() - 1]}" if terminal else "")
                    sys.stderr.flush()
                    if not terminal:
                        say(text)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            if terminal:
                sys.stderr.write("\r\x1b[K")
            if meter.requests or meter.failed:
                say(progress(meter))


def progress(meter: Meter) -> str:
    """One line: done of total, rate, time left, tokens, dollars, failures."""
    done, rate = meter.answers + meter.skipped, meter.rate()
    parts = [f"{meter.what}: {done:,}" + (f" of {meter.total:,}" if meter.total else "")]
    parts.append(f"{rate:.1f}/s" if rate < 100 else f"{rate:,.0f}/s")
    if meter.total and rate and meter.total > done:
        parts.append(f"{_duration((meter.total - done) / rate)} left")
    parts.append(f"{_short(meter.prompt_tokens)} + {_short(meter.completion_tokens)} tokens")
    if meter.usd:
        parts.append(f"${meter.usd:,.4f}")
    if meter.retries:
        parts.append(f"{meter.retries} retries")
    if meter.failed:
        parts.append(f"{meter.failed} failed")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _short(tokens: int) -> str:
    if tokens < 10_000:
        return f"{tokens:,}"
    return f"{tokens / 1e3:.0f}k" if tokens < 1_000_000 else f"{tokens / 1e6:.1f}M"


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80


def run(main: Callable[[], Any]) -> NoReturn:
    """Call ``main`` and exit: 0 done, 1 failed, 2 usage, 3 failures, 4 something missing, 130 interrupted."""
    try:
        main()
    except RlaifError as error:
        if verbose:
            traceback.print_exc()
        sys.stderr.write(f"rlaif: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # the command line's library has already caught the KeyboardInterrupt
            sys.stderr.write("\nrlaif: interrupted; what came in is kept. The same command goes on from here.\n")
        raise
    except BrokenPipeError:
        # Whoever read our stdout (head, less) has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)
