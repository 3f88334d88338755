"""What people see: progress and notes on stderr, data on stdout, errors with one way to mend them.

Plain lines where stderr is no terminal, so that a log of the night reads well in the morning.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from rlaif.errors import RlaifError

if TYPE_CHECKING:
    from rlaif.llm.usage import UsageMeter

LOG_INTERVAL_S = 30.0
INTERRUPTED_EXIT_CODE = 130
verbose = False


def log(line: str) -> None:
    """A note for the person who waits."""
    stamp = "" if sys.stderr.isatty() else time.strftime("%H:%M:%S ")
    sys.stderr.write(f"{stamp}{line}\n")
    sys.stderr.flush()


def echo(line: str = "") -> None:
    """Data, on stdout."""
    sys.stdout.write(f"{line}\n")


def echo_json(value: Any) -> None:
    import orjson

    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())


class Console:
    """A :class:`rlaif.api.Watch` that writes to stderr."""

    def log(self, line: str) -> None:
        log(line)

    @contextlib.contextmanager
    def progress(self, usage: UsageMeter) -> Iterator[None]:
        """Show ``usage`` while open: one line that is rewritten on a terminal, a line now and then elsewhere."""
        from rlaif.llm.reporter import progress_line

        done = threading.Event()
        terminal = sys.stderr.isatty()

        def refresh() -> None:
            while not done.wait(0.5 if terminal else LOG_INTERVAL_S):
                if usage.requests or usage.failed or usage.waiting_for or usage.server_status:
                    text = progress_line(usage)
                    sys.stderr.write(f"\r\x1b[K{text[: _terminal_width() - 1]}" if terminal else "")
                    sys.stderr.flush()
                    if not terminal:
                        log(text)

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if terminal:
                sys.stderr.write("\r\x1b[K")
            if usage.requests or usage.failed or usage.waiting_for or usage.server_status:
                log(progress_line(usage))


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80


def run_and_exit(main: Callable[[], Any]) -> NoReturn:
    """Call ``main`` and exit: 0 done, 1 failed, 2 usage, 3 failures, 4 something missing, 130 interrupted."""
    # As Ctrl-C: what is in flight is kept, servers are ended. A job scheduler says it this way.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except RlaifError as error:
        if verbose:
            traceback.print_exc()
        sys.stderr.write(f"rlaif: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED_EXIT_CODE:  # the command line's library has already caught the KeyboardInterrupt
            sys.stderr.write("\nrlaif: interrupted; what came in is kept. The same command goes on from here.\n")
        raise
    except BrokenPipeError:
        # Whoever read our stdout (head, less) has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)
