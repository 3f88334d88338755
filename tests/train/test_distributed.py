"""Training in several processes.

accelerate parses the command lines and presets, two processes train on this CPU, and this machine acts as two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif.config.models import Config, TrainConfig
from rlaif.errors import DatasetChangedError, MissingDependencyError, RunError, UsageError
from rlaif.run.run import Run
from rlaif.train import checkpoints, distributed, trainer, trl_config
from tests.conftest import ROOT
from tests.train.pairs import rows
from tests.train.test_trainer import LOSS_WITHIN, WEIGHTS_WITHIN, apart, weights

pytestmark = pytest.mark.real


def config(model: Path, output: Path, **changed: Any) -> Config:
    defaults = {
        "batch_size": 4,
        "max_length": 128,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "merge": False,
        "dtype": "float32",
        "sharding": "ddp",
        "num_processes": 2,
    }
    return Config.model_validate({"train": {"model": str(model), "output": str(output), **defaults, **changed}})


def parse_with_accelerate(sharding: str, processes: int, placement: distributed.NodePlacement) -> Any:
    """Return how accelerate parses our command line and its preset, just before it starts torch's launcher."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    line = distributed.accelerate_args(sharding, processes, placement)
    assert line[:2] == ["-m", "accelerate.commands.launch"]
    arguments = launch_command_parser().parse_args([*line[2:], "-m", "rlaif.train.distributed", "job"])
    checked, _, _ = _validate_launch_command(arguments)
    assert (checked.training_script, checked.training_script_args) == ("rlaif.train.distributed", ["job"])
    return checked


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed", "ddp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_accelerate_reads_the_command_lines_of_two_machines(sharding: str, rank: int) -> None:
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    checked = parse_with_accelerate(sharding, 16, distributed.NodePlacement(2, rank, "node-0", 29777))
    if sharding == "deepspeed":
        checked.deepspeed_fields_from_accelerate_config = ""  # as launch_command sets it
        start, environment = prepare_deepspeed_cmd_env(checked)
        assert start is None  # no pdsh: the command runs on each machine
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    else:
        environment = prepare_multi_gpu_env(checked)
        assert (environment.get("FSDP_VERSION") == "2") is (sharding == "fsdp")
    assert (checked.nnodes, checked.nproc_per_node, checked.node_rank) == ("2", "8", rank)
    assert (checked.master_addr, checked.master_port) == ("node-0", "29777")
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if sharding == "ddp" else "bf16")


def test_accelerate_reads_the_command_line_of_one_machine() -> None:
    from accelerate.utils.launch import prepare_multi_gpu_env

    checked = parse_with_accelerate("fsdp", 8, distributed.NodePlacement())
    prepare_multi_gpu_env(checked)
    assert (checked.num_machines, checked.nproc_per_node) == (1, "8")


def test_torch_reads_the_command_line_of_the_second_machine(small: Path, tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    if torch_has_cuda():
        pytest.skip("on CUDA, accelerate starts the processes")
    placement = distributed.NodePlacement(2, 1, "node-0", 29777)
    line, environment = distributed.launch_command(config(small, tmp_path), tmp_path / "job", placement)
    parsed = parse_args(line[3:])
    assert (parsed.nnodes, parsed.node_rank, parsed.master_addr, parsed.master_port) == ("2", 1, "node-0", 29777)
    assert parsed.nproc_per_node == "2"
    assert environment["RLAIF_PROCESSES"] == "4"


def torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


ALONE = {"SLURM_NNODES": "4", "SLURM_NODEID": "0", "JOB_COMPLETION_INDEX": "1"}
"""A batch script on the first of four machines, and a Job that does not know the number of machines."""


@pytest.mark.parametrize(
    ("settings", "environ", "expected"),
    [
        ({}, {}, distributed.NodePlacement()),
        ({}, ALONE, distributed.NodePlacement()),
        ({"num_machines": 1}, {"NNODES": "2"}, distributed.NodePlacement()),
        (
            {"num_machines": 2, "machine_rank": 1, "main_process_address": "a:7"},
            {},
            distributed.NodePlacement(2, 1, "a", 7),
        ),
        (
            {"num_machines": 2, "machine_rank": 0, "main_process_address": "a"},
            {"NNODES": "9"},
            distributed.NodePlacement(2, 0, "a", 29500),
        ),
        (
            {},
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            distributed.NodePlacement(2, 1, "a", 7),
        ),
        (
            {},
            {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "3", "MASTER_ADDR": "a"},
            distributed.NodePlacement(4, 3, "a", 29500),
        ),
        (
            {},
            {"NNODES": "2", "JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "a"},
            distributed.NodePlacement(2, 0, "a", 29500),
        ),
        (
            {},
            {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "7"},
            distributed.NodePlacement(2, 1, "a", 7),
        ),
        ({"launcher": "none", "num_machines": 2}, {"NNODES": "2"}, distributed.NodePlacement()),
    ],
)
def test_detect_placement(
    settings: dict[str, Any], environ: dict[str, str], expected: distributed.NodePlacement
) -> None:
    train_config = TrainConfig.model_validate({"launcher": "accelerate", **settings})
    assert distributed.detect_placement(train_config, environ) == expected


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        ({"num_machines": 2}, {}, "--machine-rank"),
        ({"num_machines": 2, "machine_rank": 2}, {}, "between 0 and 1 for 2 machines, got 2"),
        ({"num_machines": 2, "machine_rank": 1}, {}, "--main-process-address"),
        ({}, {"NNODES": "two"}, "NNODES must be a whole number, got 'two'"),
        (
            {"num_machines": 2, "machine_rank": 0, "main_process_address": "node:abc"},
            {},
            r"expected HOST\[:PORT\], got 'node:abc'",
        ),
    ],
)
def test_the_error_names_what_is_missing_to_connect_the_machines(
    settings: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        distributed.detect_placement(TrainConfig.model_validate({"launcher": "accelerate", **settings}), environ)


FSDP = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

folder, preset = map(Path, sys.argv[1:])
settings = yaml.safe_load(preset.read_text())["fsdp_config"]
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
PartialState(cpu=True)  # for accelerate's log
model = torch.nn.Linear(2, 2)
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
plugin = FullyShardedDataParallelPlugin(settings["fsdp_version"], state_dict_type=settings["fsdp_state_dict_type"])
alone = SimpleNamespace(process_index=0, num_processes=1)
save_fsdp_model(plugin, alone, model, folder)
save_fsdp_optimizer(plugin, alone, optimizer, model, folder)
"""
"""Writes a checkpoint with the functions that the trainer calls, in one process."""


def checkpoint(folder: Path, *archives: str) -> Path:
    """Write a checkpoint like that of two processes after one step, with ``archives`` of torch beside the weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    for name in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "training_args.bin", *archives):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({"state": torch.ones(2)}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    return folder


def test_a_checkpoint_of_fsdp_is_recognized_as_complete(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-1")
    assert not checkpoints.is_complete(folder)  # the optimizer is missing
    subprocess.run([sys.executable, "-c", FSDP, folder, distributed.PRESETS / "fsdp.yaml"], check=True)
    assert {path.name for path in folder.iterdir()} >= {"optimizer.bin", "pytorch_model_fsdp.bin"}
    assert checkpoints.latest_complete(tmp_path) == (folder, [])
    assert checkpoints.latest_complete(tmp_path, 1) == (
        None,
        [],
    )  # as needed if the last step's checkpoint is of no use
    for name in ("optimizer.bin", "pytorch_model_fsdp.bin"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        assert checkpoints.latest_complete(tmp_path) == (None, [folder])
        (folder / name).write_bytes(content)


def test_a_checkpoint_of_deepspeed_is_recognized_as_complete(tmp_path: Path) -> None:
    """ZeRO-3 of two processes writes into a folder of its own, and finally the folder's name to ``latest``."""
    parts = [
        f"global_step1/{kind.format(rank)}"
        for rank in range(2)
        for kind in ("zero_pp_rank_{}_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt")
    ]
    folder = checkpoint(tmp_path / "checkpoint-1", *parts)
    assert not checkpoints.is_complete(folder)
    (folder / "latest").write_text("global_step1")
    assert checkpoints.is_complete(folder)
    for part in parts:
        content = (folder / part).read_bytes()
        (folder / part).write_bytes(content[:-30])
        assert not checkpoints.is_complete(folder)
        (folder / part).write_bytes(content)
    (folder / "latest").write_text("global_step2")
    assert not checkpoints.is_complete(folder)


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in json.loads((output / "training.json").read_text())["history"]]


def test_two_processes_train_like_one_with_twice_the_accumulation(run: Run, small: Path) -> None:
    """The effective batch size is the same, so the loss of each step and the final weights are the same."""
    lines: list[str] = []
    together = distributed.train(run, config(small, run.path / "two", max_steps=3), log=lines.append)
    assert any(line.endswith("2 processes") for line in lines)
    assert sum("training 3 steps" in line for line in lines) == 1  # only the first process logs
    assert (together.steps, together.pairs) == (3, 16)
    alone = trainer.train(run, config(small, run.path / "one", max_steps=3), log=lambda _line: None)
    assert trl_config.batch_sizes(config(small, run.path).train, 1) == (2, 2)
    assert trl_config.batch_sizes(config(small, run.path).train, 2) == (2, 1)
    curve = losses(run.path / "one")
    assert len(curve) == 3
    assert curve[0] - curve[2] > 100 * LOSS_WITHIN  # the model learns, so that there is something to compare
    assert losses(run.path / "two") == pytest.approx(curve, abs=LOSS_WITHIN)
    assert together.adapter is not None
    assert alone.adapter is not None
    assert apart(weights(together.adapter), weights(alone.adapter)) < WEIGHTS_WITHIN
    assert not (run.path / "two" / ".job.json").exists()

    pl.DataFrame(rows(15)).write_parquet(run.dataset / "train.parquet")
    with pytest.raises(
        DatasetChangedError, match="since this training was finished, its rows changed: the dataset has other rows"
    ):
        distributed.train(run, config(small, run.path / "two", max_steps=3), log=lines.append)


SRUN = """#!/bin/bash
# Like srun: runs the command once per node with the number of the node, and returns the worst exit code.
worst=0
for node in 1 0; do
    SLURM_STEP_NUM_NODES=2 SLURM_NODEID=$node "${@:2}" > "$OUTPUT_DIR/node$node" 2>&1 &
done
for job in $(jobs -p); do wait "$job" || worst=1; done
exit $worst
"""


def test_the_slurm_example_trains_one_model_on_two_machines(run: Run, small: Path, tmp_path: Path) -> None:
    """examples/train/slurm.sh runs real commands on two nodes, which are both this machine."""
    for name, text in (
        ("srun", SRUN),
        ("scontrol", "#!/bin/bash\nprintf 'localhost\\nnode-1\\n'\n"),
        ("rlaif", f'#!/bin/bash\nexec {sys.executable} -m rlaif "$@"\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run_config = config(small, run.path / "model", num_processes=1)
    run.update_manifest("judge", config=run_config.model_dump(mode="json"), ended="2026-01-01T00:00:00+00:00")
    train = run_config.train.model_dump(include={"batch_size", "max_length", "merge", "dtype"}, mode="json")
    rows = "\n".join(f"{name} = {json.dumps(value)}" for name, value in train.items())
    (run.path / "rlaif.toml").write_text(f"[train]\n{rows}\n")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RLAIF": str(tmp_path / "rlaif"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "OUTPUT_DIR": str(tmp_path),
    }
    options = ["--sharding", "ddp", "--num-processes", "1", "--max-steps", "1", "--learning-rate", "0.01"]
    done = subprocess.run(
        ["bash", ROOT / "examples" / "train" / "slurm.sh", run.path, "--model", small, *options], env=environment
    )
    first, second = ((tmp_path / f"node{rank}").read_text() for rank in (0, 1))
    assert done.returncode == 0, first + second
    assert "2 processes" in first
    assert f"Next: rlaif evaluate {run.path}" in first
    assert "training 1 steps" not in second
    assert "machine 1 of 2" in second
    alone = trainer.train(run, config(small, run.path / "one"), log=lambda _line: None)
    assert alone.adapter is not None
    assert apart(weights(run.model / "adapter"), weights(alone.adapter)) < WEIGHTS_WITHIN


def test_fewer_processes_than_expected_is_an_error(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would train its own model. The numbers that started and that connected are checked."""
    job = run.path / "job"
    job.write_text(json.dumps({"run": str(run.path), "config": config(small, run.path / "m").model_dump(mode="json")}))
    environment = {**os.environ, "RLAIF_PROCESSES": "2", "ACCELERATE_USE_CPU": "true"}
    line = [sys.executable, "-m", "rlaif.train.distributed", str(job)]
    alone = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert alone.returncode == 1
    assert "expected 2 processes, but 1 started" in alone.stdout
    monkeypatch.setenv("RLAIF_PROCESSES", "2")
    with pytest.raises(RunError, match="expected 2 processes to train together, but there are 1"):
        trainer.train(run, config(small, run.path / "m"), log=lambda _line: None)
    gone = subprocess.run(
        [*line[:3], "gone"], env={**environment, "RLAIF_PROCESSES": "1"}, capture_output=True, text=True
    )
    assert "on a file system that all machines share" in gone.stdout


def test_an_error_in_a_process_is_reported(run: Run, small: Path, tmp_path: Path) -> None:
    (run.dataset / "train.parquet").unlink()
    with pytest.raises(RunError, match=r"train\.parquet does not exist yet"):
        distributed.train(run, config(small, tmp_path / "out"), log=lambda _line: None)


def test_processes_that_cannot_be_started_are_an_error(small: Path, tmp_path: Path) -> None:
    import torch

    with pytest.raises(UsageError, match="cannot be divided among 3 processes"):
        distributed.launch_command(
            config(small, tmp_path, num_processes=3), tmp_path / "job", distributed.NodePlacement()
        )
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependencyError, match="fsdp needs CUDA"):
            distributed.launch_command(
                config(small, tmp_path, sharding="fsdp"), tmp_path / "job", distributed.NodePlacement()
            )
