"""Processes by what they carry, so that a test can say that none is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path


def processes_carrying(marker: str) -> dict[int, str]:
    """Living processes with ``marker`` in their command line or environment: their numbers and command lines."""
    commands = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
                command = (entry / "cmdline").read_bytes()
                ended = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                if not ended and marker.encode() in command + (entry / "environ").read_bytes():
                    commands[int(entry.name)] = command.replace(b"\0", b" ").decode("utf-8", "replace")
    return commands


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Wait until ``condition()`` is; whether it became so in ``seconds``, a time that only a failure needs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
