"""Supervisor process of a model server, which makes sure that no server is ever left behind.

Run as ``python process_supervisor.py COMMAND...`` in its own session, with a pipe as standard input that the starting
process holds open. When the pipe closes or the starting process is gone, however it died (even by ``kill -9``), the
supervisor ends the whole process group: vLLM keeps its engine in grandchildren that outlive their parent.

The supervisor also inherits the locks of the server's cores (:mod:`rlaif.serving.cores`) and keeps them open as long as
it lives. It uses the standard library only, as it also runs under the Python of another environment.
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
"""Shorter grace for the remaining processes after a crash: they have nothing to finish, and the next start waits."""
POLL_INTERVAL_S = 0.1
PR_SET_PDEATHSIG = 1


def _die_with_supervisor() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_group(grace_s: float) -> None:
    """Send SIGTERM to the other processes of this group, and SIGKILL to the whole group if any remain after
    ``grace_s``."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and group_has_members(os.getpgrp()):
        _reap_children()
        time.sleep(0.05)
    if group_has_members(os.getpgrp()):
        os.killpg(0, signal.SIGKILL)


def group_has_members(group: int) -> bool:
    """Return True if the process group has a living member besides this process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # the process has ended
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
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_supervisor)
    while child.poll() is None and not stop_requested and os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], POLL_INTERVAL_S)
        if readable and not os.read(0, 1):
            break
    code = child.poll()
    if code is not None and code < 0:
        sys.stderr.write(
            f"process_supervisor.py: error: the server was ended by signal {-code} ({signal.strsignal(-code)})\n"
        )
        sys.stderr.flush()
    _kill_group(SHUTDOWN_GRACE_S if code is None else CRASH_GRACE_S)
    return code if code is not None else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
