"""A server that forks commands of rlaif in milliseconds, for tests that kill a hundred of them.

Run as ``python -m tests.fork_server``. It imports everything once. Each line of standard input is a command as JSON,
which it runs in a forked process in its own session. It prints the pid, and later the exit status ("-9" for a killed
process). Threads do not survive a fork, so it starts none.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


class ForkServer:
    """Client of the fork server, for tests."""

    def __enter__(self) -> ForkServer:
        environment = {**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def run(
        self, *arguments: str | Path, kill_after: float | None = None, stderr_file: Path | None = None, **limits: int
    ) -> tuple[int, float]:
        """Run one command and kill it (-9) after ``kill_after`` seconds. Returns (exit status, seconds).

        ``limits``: ``file_size`` in bytes; ``powerless``: file permissions apply to root too.
        """
        assert self._process.stdin
        request = {
            "arguments": [str(argument) for argument in arguments],
            "stderr": str(stderr_file or os.devnull),
            **limits,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pid, began = int(self._read()), time.monotonic()

        def kill() -> None:
            os.kill(pid, 9)  # it is not reaped before its status is printed, so the pid is still its own

        timer = threading.Timer(kill_after, kill) if kill_after is not None else None
        if timer:
            timer.start()
        status = int(self._read())
        seconds = time.monotonic() - began
        self._process.stdin.write("\n")  # reap it
        self._process.stdin.flush()
        if timer:
            timer.cancel()
            timer.join()
        assert self._read() == "reaped"
        return status, seconds


def _drop_capabilities() -> None:
    """Drop all capabilities, so that file permissions apply to root too."""
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version_3, nothing) == 0


def _command(request: dict[str, Any]) -> None:
    """Run a command in the child process; never returns."""
    os.setsid()
    devnull = os.open(os.devnull, os.O_RDWR)
    stderr = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, to in enumerate((devnull, devnull, stderr)):
        os.dup2(to, number)
    if size := request.get("file_size"):
        sys.dont_write_bytecode = True  # Python 3.11 does not notice that a .pyc file was truncated
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if request.get("powerless"):
        _drop_capabilities()
    sys.argv = ["rlaif", *request["arguments"]]
    code: Any = 1
    try:
        from rlaif.cli.app import main

        main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    import aiohttp  # noqa: F401
    import genai_prices  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import tenacity  # noqa: F401

    import rlaif.api  # noqa: F401

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            _command(json.loads(line))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        os.waitpid(pid, 0)
        sys.stdout.write("reaped\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
