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

from rlaif.config import RunConfig
from rlaif.errors import RunError, UsageError
from rlaif.llm.budget import Meter, is_local, progress

if TYPE_CHECKING:
    from rlaif.pipeline.commands import Watch

EVERY_S = 600.0
"""How often the log is told how far a stage is."""
PATIENCE_S = 30.0


class Diary:
    """A :class:`rlaif.pipeline.Watch` that writes what another one shows into a log too, with day and time.

    The log is appended to: a night in three starts reads as three chapters. A log that cannot be written is no reason
    to lose the night.
    """

    def __init__(self, path: Path, watch: Watch) -> None:
        self.path = path
        self._watch = watch
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise RunError(f"cannot be written: {error.strerror}", where=str(path)) from None

    def say(self, line: str) -> None:
        self.note(line)
        self._watch.say(line)

    def note(self, text: str) -> None:
        """Into the log alone."""
        now = f"{datetime.datetime.now():%a %H:%M:%S}"
        with contextlib.suppress(OSError):
            self._file.write("".join(f"{now}  {line}\n" for line in text.splitlines()))
            self._file.flush()

    @contextlib.contextmanager
    def watch(self, meter: Meter) -> Iterator[None]:
        over = threading.Event()

        def tell() -> None:
            while not over.wait(EVERY_S):
                self.note(progress(meter))

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            with self._watch.watch(meter):
                yield
        finally:
            over.set()
            thread.join()
            if meter.requests or meter.failed:
                self.note(progress(meter))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def check_notification(config: RunConfig) -> None:
    """Raises :class:`UsageError` where nobody could be told. Asks nobody."""
    if config.notify_url and not config.notify_url.startswith(("http://", "https://")):
        raise UsageError("notify_url is no http address", mend="Mend it under [run] in rlaif.toml.")
    if config.notify_command:
        try:
            program = shlex.split(config.notify_command)[:1]
        except ValueError as error:
            raise UsageError(f"notify_command cannot be read: {error}", mend="Mend it under [run].") from None
        if not program or shutil.which(program[0]) is None:
            raise UsageError(f"there is no command {' '.join(program)!r} to notify with", mend="Mend notify_command.")


def notify(config: RunConfig, line: str, facts: dict[str, Any]) -> list[str]:
    """Tell the end in one line, as [run] says. Returns what went wrong with that, and raises nothing."""
    wrong = []
    if config.notify_url:
        body = json.dumps({"text": line, **facts}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(config.notify_url, body, headers)  # noqa: S310  checked to be http
        handlers = [urllib.request.ProxyHandler({})] if is_local(config.notify_url) else []
        try:
            urllib.request.build_opener(*handlers).open(request, timeout=PATIENCE_S).close()
        except (OSError, ValueError) as error:  # the address is left out: it may be a secret
            reason = error.code if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
            wrong.append(f"the webhook could not be told ({reason})")
    if config.notify_command:
        try:
            subprocess.run([*shlex.split(config.notify_command), line], check=True, capture_output=True, text=True,
                           timeout=PATIENCE_S, stdin=subprocess.DEVNULL, env=_without_keys())  # fmt: skip
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout or "").strip().splitlines()
            wrong.append(f"notify_command ended with {error.returncode}" + (f": {said[-1][:200]}" if said else ""))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            wrong.append(f"notify_command did not work ({type(error).__name__})")
    return wrong


def _without_keys() -> dict[str, str]:
    from rlaif.llm.client import KEY_NAMES

    return {name: value for name, value in os.environ.items() if name not in KEY_NAMES}
