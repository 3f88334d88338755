"""What a night leaves to be read: RUN/log/run.log, and one line to whoever wants to be told of the end."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.config.models import RunConfig
from rlaif.errors import RunError, UsageError
from rlaif.llm.pricing import is_local
from rlaif.llm.reporter import progress_line
from rlaif.llm.usage import UsageMeter

if TYPE_CHECKING:
    from rlaif.llm.reporter import Reporter

LOG_INTERVAL_S = 600.0
"""How often the log is told how far a stage is."""
NOTIFY_TIMEOUT_S = 30.0


class RunLog:
    """A :class:`rlaif.api.Watch` that writes what another one shows into a log too, with day and time.

    The log is appended to: a night in three starts reads as three chapters. A log that cannot be written is no reason
    to lose the night.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self.path = path
        self._reporter = reporter
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise RunError(f"cannot be written: {error.strerror}", location=str(path)) from None

    def log(self, line: str) -> None:
        self.write(line)
        self._reporter.log(line)

    def write(self, text: str) -> None:
        """Into the log alone."""
        now = f"{datetime.datetime.now():%a %H:%M:%S}"
        with contextlib.suppress(OSError):
            self._file.write("".join(f"{now}  {line}\n" for line in text.splitlines()))
            self._file.flush()

    @contextlib.contextmanager
    def progress(self, usage: UsageMeter) -> Iterator[None]:
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


def check_notification(config: RunConfig) -> None:
    """Raises :class:`UsageError` where nobody could be told. Asks nobody."""
    if config.notify_url and not config.notify_url.startswith(("http://", "https://")):
        raise UsageError("notify_url is no http address", hint="Mend it under [run] in rlaif.toml.")
    if config.notify_command:
        try:
            program = shlex.split(config.notify_command)[:1]
        except ValueError as error:
            raise UsageError(f"notify_command cannot be read: {error}", hint="Mend it under [run].") from None
        if not program or shutil.which(program[0]) is None:
            raise UsageError(f"there is no command {' '.join(program)!r} to notify with", hint="Mend notify_command.")


def notify(config: RunConfig, line: str, details: dict[str, Any]) -> list[str]:
    """Tell the end in one line, as [run] says. Returns what went wrong with that, and raises nothing."""
    problems = []
    if config.notify_url:
        body = json.dumps({"text": line, **details}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(config.notify_url, body, headers)  # noqa: S310  checked to be http
        handlers = [urllib.request.ProxyHandler({})] if is_local(config.notify_url) else []
        try:
            urllib.request.build_opener(*handlers).open(request, timeout=NOTIFY_TIMEOUT_S).close()
        except (OSError, ValueError) as error:  # the address is left out: it may be a secret
            reason = error.code if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
            problems.append(f"the webhook could not be told ({reason})")
    if config.notify_command:
        try:
            subprocess.run(
                [*shlex.split(config.notify_command), line],
                check=True,
                capture_output=True,
                text=True,
                timeout=NOTIFY_TIMEOUT_S,
                stdin=subprocess.DEVNULL,
                env=_environment_without_keys(),
            )
        except subprocess.CalledProcessError as error:
            output = (error.stderr or error.stdout or "").strip().splitlines()
            problems.append(
                f"notify_command ended with {error.returncode}" + (f": {output[-1][:200]}" if output else "")
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            problems.append(f"notify_command did not work ({type(error).__name__})")
    return problems


def _environment_without_keys() -> dict[str, str]:
    from rlaif.llm.client import API_KEY_VARIABLES

    return {name: value for name, value in os.environ.items() if name not in API_KEY_VARIABLES}
