"""A small parent for a model server, so that none is ever left behind.

Run as ``python guard.py COMMAND...`` in a session of its own, with a pipe as standard input that the starting process
holds open. When the pipe closes or the starting process is gone, however it died (kill -9 included), the whole
process group is ended: vLLM keeps its engine in grandchildren that outlive their parent. What it inherits besides, the
locks of the server's cores (:mod:`rlaif.serving.cores`), it only keeps open: the server has them as long as it lives.
Standard library only: it also runs under another environment's Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

SHUTDOWN_GRACE_S = 8.0
CRASH_GRACE_S = 1.0
"""What a child that has died by itself leaves behind has nothing to finish, and the next start waits for its end."""
POLL_INTERVAL_S = 0.1
PR_SET_PDEATHSIG = 1


def _die_with_guard() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_group(grace_s: float) -> None:
    """SIGTERM to everybody in this group but us, SIGKILL to those (and us) that are left after the grace."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and group_has_members(os.getpgrp()):
        _reap_children()
        time.sleep(0.05)
    if group_has_members(os.getpgrp()):
        os.killpg(0, signal.SIGKILL)


def group_has_members(group: int) -> bool:
    """Whether anybody but this process lives in the process group."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(process_group) == group and state != "Z":
                    return True
    return False


def _reap_children() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(command: list[str]) -> int:
    parent = os.getppid()
    stop_requested = False

    def request_stop(*_: object) -> None:
        nonlocal stop_requested
        stop_requested = True

    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, request_stop)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard)
    while child.poll() is None and not stop_requested and os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], POLL_INTERVAL_S)
        if readable and not os.read(0, 1):
            break
    code = child.poll()
    if code is not None and code < 0:
        sys.stderr.write(f"guard.py: error: the server was ended by signal {-code} ({signal.strsignal(-code)})\n")
        sys.stderr.flush()
    _kill_group(SHUTDOWN_GRACE_S if code is None else CRASH_GRACE_S)
    return code if code is not None else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
