"""Run a training in its own process, which is killed with SIGKILL at a given step.

The processes are forked from a server that has loaded the libraries once (``multiprocessing``'s forkserver), because
starting Python with TRL for each would take longer than the trainings.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from rlaif.config.models import Config
from rlaif.run.run import Run
from rlaif.train import methods, metrics, trainer

PRELOADED = [trainer._trl_class(method.trainer_class) for method in methods.BY_NAME.values()]


def train_and_kill_at(step: int, path: Path, settings: dict[str, Any]) -> None:
    """Train, and kill this process after ``step``, before its checkpoint is written."""
    metrics.LOG_INTERVAL_S = 0.0

    def log(line: str) -> None:
        if line.startswith(f"step {step}/"):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.train(Run(path), Config.model_validate({"train": settings}), log=log)


def kill_training(step: int, path: Path, settings: dict[str, Any]) -> None:
    """Start a training that is killed at ``step``. Fails if it ended by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=train_and_kill_at, args=(step, path, settings))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL, f"it ended with exit code {process.exitcode}"
