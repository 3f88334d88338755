"""One training in several processes: accelerate starts them, each runs ``python -m rlaif.train.distributed JOB``.

The parent holds the run's lock and waits; the processes train together and the first of them writes. On CUDA the
presets in ``presets/`` say how the weights are spread (fsdp, deepspeed); ``ddp`` gives each process all of them. On a
CPU there is only ddp, started by torch's own launcher: ``accelerate launch --cpu --num_processes 2`` quietly starts one
process, which is why each of them checks how many there are.

On several machines the same command is given on each, with the run on a file system that they share. Where a machine
stands among them is asked for by flags or found in the environment that torchrun, Slurm's srun, an indexed Job of
Kubernetes or Kubeflow set (:func:`detect_placement`). The first machine locks the run and writes the job; the launchers
meet at its address, and only then are the processes started that read it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rlaif import spawn
from rlaif.config.models import Config, TrainConfig
from rlaif.errors import DatasetChangedError, MissingDependencyError, RlaifError, RunError, UsageError
from rlaif.run.run import Run
from rlaif.run.training_output import training_output
from rlaif.train import artifacts, checkpoints

PRESETS = Path(__file__).resolve().parent / "presets"
LOG_TAIL_LINES = 5


DEFAULT_PORT = 29500
# Who names the number of machines, this one's place among them, and where the first one is: ours before torchrun's,
# Kubeflow's, Slurm's (of a step: a batch script that runs on the first of several machines is not one of several) and
# those of an indexed Job.
MACHINES_VARIABLES = ("NNODES", "PET_NNODES", "SLURM_STEP_NUM_NODES")
RANK_VARIABLES = ("NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
ADDRESS_VARIABLES = ("MASTER_ADDR", "PET_MASTER_ADDR")
PORT_VARIABLES = ("MASTER_PORT", "PET_MASTER_PORT")


@dataclass(frozen=True)
class NodePlacement:
    """This machine is number ``rank`` of ``machines``; the first one listens at ``address`` and ``port``."""

    machines: int = 1
    rank: int = 0
    address: str = ""
    port: int = DEFAULT_PORT

    def launcher_flags(self, accelerate: bool) -> list[str]:
        """How the launcher is told: accelerate's, or torch's own."""
        if self.machines == 1:
            return [] if accelerate else ["--standalone"]
        names = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
        if not accelerate:
            names = ("nnodes", "node_rank", "master_addr", "master_port")
        values = zip(names, (self.machines, self.rank, self.address, self.port), strict=True)
        same = ["--same_network"] if accelerate else []  # accelerate passes over this line of its configuration file
        return [*same, *(part for name, value in values for part in (f"--{name}", str(value)))]


def detect_placement(train_config: TrainConfig, environ: Mapping[str, str] = os.environ) -> NodePlacement:
    """Where this machine stands: as asked for, else as the environment says, else alone.

    Raises :class:`UsageError` where there are several and one cannot be told from another, or the first not be found.
    """
    if train_config.launcher == "none":
        return NodePlacement()
    machines = train_config.num_machines or _env_int(environ, MACHINES_VARIABLES) or 1
    if machines == 1:
        return NodePlacement()
    rank = train_config.machine_rank if train_config.machine_rank is not None else _env_int(environ, RANK_VARIABLES)
    if rank is None or rank >= machines:
        raise UsageError(
            f"there are {machines} machines, and which one this is is not known" if rank is None
            else f"there are {machines} machines, and this is number {rank}: they are counted from 0",
            hint=f"Give --machine-rank, or set one of {', '.join(RANK_VARIABLES)}.",
        )  # fmt: skip
    host, _, port = (train_config.main_process_address or "").partition(":")
    if port and not port.isdecimal():
        raise UsageError(
            f"{train_config.main_process_address!r} is no HOST[:PORT]",
            location="train.main_process_address",
            hint=f"Give --main-process-address as node-0 or node-0:{DEFAULT_PORT}.",
        )
    address = host or next((environ[name] for name in ADDRESS_VARIABLES if environ.get(name)), "")
    if not address:
        raise UsageError(
            f"there are {machines} machines, and where the first one is is not known",
            hint=f"Give --main-process-address HOST[:PORT], or set {ADDRESS_VARIABLES[0]} (and {PORT_VARIABLES[0]}).",
        )
    return NodePlacement(
        machines, rank, address, int(port) if port else _env_int(environ, PORT_VARIABLES) or DEFAULT_PORT
    )


def _env_int(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if environ.get(name):
            if not environ[name].isdigit():
                raise UsageError(f"{name} is {environ[name]!r}, which is no number")
            return int(environ[name])
    return None


def train(run: Run, config: Config, *, log: Callable[[str], None]) -> artifacts.TrainResult:
    """As :func:`rlaif.train.trainer.train`, in ``train.num_processes`` processes on each machine.

    Called on every machine; where this one is not the first, the run's lock need not be held."""
    placement = detect_placement(config.train)
    output = training_output(run, config)
    job = output / ".job.json"
    line, environment = launch_command(config, job, placement)
    if placement.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        job.write_bytes(orjson.dumps({"run": str(run.path), "config": config.model_dump(mode="json")}))
    if placement.machines > 1:
        log(
            f"machine {placement.rank} of {placement.machines}, counted from 0; they meet at {placement.address}:{placement.port}"
        )
    output_lines: list[str] = []
    process = subprocess.Popen(
        line,
        env=spawn.child_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        with process:
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    output_lines.append(text.rstrip())
                    del output_lines[:-200]
                    if text.startswith(LOG_PREFIX):
                        log(text[len(LOG_PREFIX) :].rstrip())
            except BaseException:
                process.terminate()  # the launcher ends those that it started
                raise
        code = process.returncode
    finally:
        if placement.rank == 0:
            job.unlink(missing_ok=True)
    if code:
        failure = next(
            (text for text in reversed(output_lines) if text.startswith((FAILURE_PREFIX, DATASET_CHANGED_PREFIX))), None
        )
        if failure and failure.startswith(DATASET_CHANGED_PREFIX):
            raise DatasetChangedError(
                failure.removeprefix(DATASET_CHANGED_PREFIX), location=str(output), hint=checkpoints.CONFLICT_HINT
            )
        last = (
            failure.removeprefix(FAILURE_PREFIX)
            if failure
            else " / ".join(output_lines[-LOG_TAIL_LINES:]) or "it said nothing"
        )
        raise RunError(f"the training processes ended with {code}: {last}", location=str(output),
                       hint="What was saved is kept: the same command goes on from the newest checkpoint.")  # fmt: skip
    result = artifacts.load_result(output)
    if result is None:
        raise RunError("the training processes ended without a result", location=str(output))
    return result


LOG_PREFIX, FAILURE_PREFIX, DATASET_CHANGED_PREFIX = "rlaif-said ", "rlaif-failed ", "rlaif-other-rows "


def launch_command(config: Config, job: Path, placement: NodePlacement) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that start the processes. Raises where they cannot be started here."""
    import torch

    train_config = config.train
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    per_machine = train_config.num_processes or gpus or 1
    processes = per_machine * placement.machines
    if train_config.batch_size % processes:
        raise UsageError(
            f"a batch of {train_config.batch_size} cannot be shared by {processes} processes",
            location="train.batch_size",
            hint=f"Set batch_size to a multiple of {processes}.",
        )
    child = ["-m", "rlaif.train.distributed", str(job)]
    environment = {"RLAIF_PROCESSES": str(processes)}
    if gpus:
        if per_machine > gpus:
            raise MissingDependencyError(f"{per_machine} processes need as many GPUs, and there are {gpus}",
                              hint="Lower num_processes under [train].")  # fmt: skip
        return [sys.executable, *accelerate_args(train_config.sharding, processes, placement), *child], environment
    if train_config.sharding != "ddp":
        raise MissingDependencyError(f"{train_config.sharding} needs CUDA, and there is none here",
                          hint='Set sharding = "ddp" under [train].')  # fmt: skip
    start = [
        "-m",
        "torch.distributed.run",
        *placement.launcher_flags(accelerate=False),
        "--nproc_per_node",
        str(per_machine),
    ]
    return [sys.executable, *start, *child], {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def accelerate_args(sharding: str, processes: int, placement: NodePlacement) -> list[str]:
    """``accelerate launch`` with its options. ``processes``: on all machines together, as accelerate counts them."""
    preset = ["--multi_gpu"] if processes > 1 else []
    if sharding != "ddp":
        preset = ["--config_file", str(PRESETS / f"{sharding}.yaml")]
    return [
        "-m",
        "accelerate.commands.launch",
        *preset,
        *placement.launcher_flags(accelerate=True),
        "--num_processes",
        str(processes),
    ]


def _run_child(job: Path) -> int:
    from rlaif.train import trainer

    first = os.environ.get("RANK", "0") == "0"

    def log(line: str) -> None:
        if first:
            print("\n".join(LOG_PREFIX + part for part in line.split("\n")), flush=True)  # noqa: T201  # the parent reads it

    world_size, expected = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ["RLAIF_PROCESSES"])
    try:
        if world_size != expected:
            raise RunError(f"{expected} processes were asked for, and {world_size} started")
        spec = _read_job(job)
        trainer.train(Run(spec["run"]), Config.model_validate(spec["config"]), log=log)
    except RlaifError as error:
        output_line = (
            DATASET_CHANGED_PREFIX + error.message
            if isinstance(error, DatasetChangedError)
            else FAILURE_PREFIX + str(error)
        )
        print(" ".join(output_line.split()), flush=True)  # noqa: T201
        return error.exit_code
    return 0


def _read_job(path: Path) -> dict[str, Any]:
    try:
        spec: dict[str, Any] = orjson.loads(path.read_bytes())
    except OSError as error:
        raise RunError(
            f"what the first machine wrote cannot be read: {error.strerror}",
            location=str(path),
            hint="The run has to be on a file system that all machines share, under the same path.",
        ) from None
    return spec


if __name__ == "__main__":
    sys.exit(_run_child(Path(sys.argv[1])))
