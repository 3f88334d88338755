"""Search for processes by a marker, so that a test can check that none is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path


def processes_carrying(marker: str) -> dict[int, str]:
    """Return pid and command line of the living processes with ``marker`` in their command line or environment."""
    commands = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                command = (entry / "cmdline").read_bytes()
                ended = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                if not ended and marker.encode() in command + (entry / "environ").read_bytes():
                    commands[int(entry.name)] = command.replace(b"\0", b" ").decode("utf-8", "replace")
    return commands


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Wait until ``condition()`` is true. Returns False after ``seconds``, which only a failure takes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
