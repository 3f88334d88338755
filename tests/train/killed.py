"""A training that is killed -9 at a step, in a process of its own.

Processes are forked from a server that has loaded the libraries once (``multiprocessing``'s forkserver): starting
Python with TRL anew for each would take longer than the trainings.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from rlaif.config import Config
from rlaif.run.directory import Run
from rlaif.train import loop, measure, methods

LOADED = [loop._class(method.TRAINER) for method in methods.BY_NAME.values()]


def at_step(step: int, path: Path, settings: dict[str, Any]) -> None:
    """Train, and kill this process when ``step`` has been taken and before its checkpoint is written."""
    measure.SAY_EVERY_S = 0.0

    def say(line: str) -> None:
        if line.startswith(f"step {step}/"):
            os.kill(os.getpid(), signal.SIGKILL)

    loop.train(Run(path), Config.model_validate({"train": settings}), say=say)


def kill(step: int, path: Path, settings: dict[str, Any]) -> None:
    """Have a training killed at ``step``. Fails where it ended by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=at_step, args=(step, path, settings))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL, f"it ended with {process.exitcode}"
