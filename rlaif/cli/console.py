"""Terminal output: progress and log lines on stderr, data on stdout, errors with a hint.

If stderr is not a terminal, progress is written as plain lines with a time.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlaif.errors import RlaifError

if TYPE_CHECKING:
    from rlaif.llm.usage import UsageMeter

LOG_INTERVAL_S = 30.0
"""Seconds between two progress lines if stderr is not a terminal."""
REFRESH_INTERVAL_S = 0.5
"""Seconds between two updates of the progress line on a terminal."""
INTERRUPTED_EXIT_CODE = 130
verbose = False
"""Show the traceback of an error: the flag `--verbose`."""
run_dir: Path | None = None
"""Run directory of this command. :func:`run_and_exit` writes the traceback of an unexpected exception to its log/."""


def remember_run(path: Path | None) -> Path | None:
    """Set :data:`run_dir`. Callback of the argument RUN."""
    global run_dir
    run_dir = path
    return path


def log(line: str) -> None:
    """Write a line to stderr."""
    stamp = "" if sys.stderr.isatty() else time.strftime("%H:%M:%S ")
    sys.stderr.write(f"{stamp}{line}\n")
    sys.stderr.flush()


def echo(line: str = "") -> None:
    """Write a line of data to stdout."""
    sys.stdout.write(f"{line}\n")


def echo_json(value: Any) -> None:
    """Write ``value`` to stdout as indented JSON."""
    import orjson

    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())


class Console:
    """A :class:`~rlaif.llm.reporter.Reporter` that writes to stderr."""

    def log(self, line: str) -> None:
        log(line)

    @contextlib.contextmanager
    def progress(self, usage: UsageMeter) -> Iterator[None]:
        """Show ``usage`` while open: one line that is updated on a terminal, a new line from time to time elsewhere."""
        from rlaif.llm.reporter import progress_line

        done = threading.Event()
        is_terminal = sys.stderr.isatty()

        def has_news() -> bool:
            return bool(usage.requests or usage.failed or usage.waiting_for or usage.server_status)

        def refresh() -> None:
            while not done.wait(REFRESH_INTERVAL_S if is_terminal else LOG_INTERVAL_S):
                if not has_news():
                    continue
                if is_terminal:
                    sys.stderr.write(f"\r\x1b[K{progress_line(usage)[: _terminal_width() - 1]}")
                    sys.stderr.flush()
                else:
                    log(progress_line(usage))

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if is_terminal:
                sys.stderr.write("\r\x1b[K")
            if has_news():
                log(progress_line(usage))


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80


def run_and_exit(main: Callable[[], Any]) -> NoReturn:
    """Call ``main`` and exit with 0 (success) or the code of its error.

    1: failure; 2: invalid use; 3: failed requests; 4: missing dependency; 130: interrupted. The traceback of an
    unexpected exception goes to a file in RUN/log/, and one line on stderr names it.
    """
    # Job schedulers send SIGTERM. Like Ctrl-C, it keeps the requests in flight and stops the servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except RlaifError as error:
        if verbose:
            traceback.print_exc()
        sys.stderr.write(f"rlaif: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED_EXIT_CODE:  # typer has already caught the KeyboardInterrupt
            sys.stderr.write("\nrlaif: interrupted; all answers so far are kept. Rerun the same command to resume.\n")
        raise
    except BrokenPipeError:
        # The reader of stdout (head, less) has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _report_unexpected(error)
        sys.exit(1)
    sys.exit(0)


def _report_unexpected(error: Exception) -> None:
    """Describe a bug in one line. The traceback goes to RUN/log/error-DATE.log, or to stderr without a run."""
    path = _write_error_log()
    if path is None or verbose:
        traceback.print_exc()
    first_line = (str(error).splitlines() or [""])[0]
    sys.stderr.write(f"rlaif: unexpected {type(error).__name__}: {first_line}\n")
    if path is not None:
        sys.stderr.write(f"  hint: this is a bug in rlaif; report it with the traceback in {path}\n")


def _write_error_log() -> Path | None:
    """Write the current exception's traceback and return the file's path; None if that is not possible."""
    if run_dir is None or not run_dir.is_dir():
        return None
    now = datetime.datetime.now()
    path = run_dir / "log" / f"error-{now:%Y-%m-%dT%H%M%S}.log"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now:%Y-%m-%d %H:%M:%S}, process {os.getpid()}\n{traceback.format_exc()}\n")
    except OSError:
        return None
    return path
