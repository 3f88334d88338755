"""The log of ``rlaif run``: RUN/log/run.log."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif.errors import RunError
from rlaif.llm.reporter import progress_line
from rlaif.llm.usage import UsageMeter

if TYPE_CHECKING:
    from rlaif.llm.reporter import Reporter

LOG_INTERVAL_S = 600.0
"""Seconds between two progress lines in the log."""


class RunLog:
    """A :class:`~rlaif.llm.reporter.Reporter` that writes to a log file, with day and time, and passes everything to
    another reporter.

    Each start appends to the log. If a later write fails, the run continues without it.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self.path = path
        self._reporter = reporter
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise RunError(f"cannot write the log: {error.strerror}", location=str(path)) from None

    def log(self, line: str) -> None:
        """Write ``line`` to the log and to the other reporter."""
        self.write(line)
        self._reporter.log(line)

    def write(self, text: str) -> None:
        """Write ``text`` to the log only."""
        now = f"{datetime.datetime.now():%a %H:%M:%S}"
        with contextlib.suppress(OSError):
            self._file.write("".join(f"{now}  {line}\n" for line in text.splitlines()))
            self._file.flush()

    @contextlib.contextmanager
    def progress(self, usage: UsageMeter) -> Iterator[None]:
        """Show ``usage`` while open, with a progress line in the log every ``LOG_INTERVAL_S`` seconds."""
        stopped = threading.Event()

        def write_progress() -> None:
            while not stopped.wait(LOG_INTERVAL_S):
                self.write(progress_line(usage))

        thread = threading.Thread(target=write_progress, daemon=True)
        thread.start()
        try:
            with self._reporter.progress(usage):
                yield
        finally:
            stopped.set()
            thread.join()
            if usage.requests or usage.failed:
                self.write(progress_line(usage))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
