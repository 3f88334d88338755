"""Several processes: the presets as accelerate reads them, and two processes on this CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Config
from rlaif.errors import MissingPart, RunError, UsageError
from rlaif.run.directory import Run
from rlaif.train import launch, loop
from tests.train.test_dpo import close, weights

pytestmark = pytest.mark.real


def config(model: Path, output: Path, **changed: Any) -> Config:
    wanted = {"model": str(model), "output": str(output), "batch_size": 4, "max_length": 128, "max_steps": 1,
              "learning_rate": 1e-2, "merge": False, "sharding": "ddp", "processes": 2, **changed}  # fmt: skip
    return Config.model_validate({"train": wanted})


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_accelerate_reads_the_presets(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(launch.PRESETS / f"{name}.yaml"))
    assert read.distributed_type == kind
    assert read.mixed_precision == "bf16"
    told = read.fsdp_config if name == "fsdp" else read.deepspeed_config
    assert told


def test_two_processes_train_one_model(run: Run, small: Path) -> None:
    """The effective batch is the same, so the weights are those of one process."""
    lines: list[str] = []
    together = launch.train(run, config(small, run.path / "two"), say=lines.append)
    assert any(line.endswith("2 processes") for line in lines)
    assert sum("training 1 steps" in line for line in lines) == 1  # only the first process speaks
    assert (together.steps, together.pairs) == (1, 16)
    alone = loop.train(run, config(small, run.path / "one"), say=lambda _line: None)
    assert together.adapter is not None
    assert alone.adapter is not None
    assert close(weights(together.adapter), weights(alone.adapter))
    assert not (run.path / "two" / ".job.json").exists()


def test_what_goes_wrong_in_a_process_is_told(run: Run, small: Path, tmp_path: Path) -> None:
    (run.dataset / "train.parquet").unlink()
    with pytest.raises(RunError, match=r"there is no train\.parquet yet"):
        launch.train(run, config(small, tmp_path / "out"), say=lambda _line: None)


def test_what_cannot_be_started_here(small: Path, tmp_path: Path) -> None:
    import torch

    with pytest.raises(UsageError, match="cannot be shared by 3 processes"):
        launch.command(config(small, tmp_path, processes=3), tmp_path / "job")
    if not torch.cuda.is_available():
        with pytest.raises(MissingPart, match="fsdp needs CUDA"):
            launch.command(config(small, tmp_path, sharding="fsdp"), tmp_path / "job")
