"""One training in several processes: accelerate starts them, and each runs ``python -m rlaif.train.distributed JOB``.

The parent holds the run's lock and waits. The processes train together, and the first one writes. On CUDA, the presets
in ``presets/`` set how the weights are sharded (fsdp, deepspeed); ``ddp`` gives each process all of them. On a CPU
there is only ddp, started by torch's own launcher, because ``accelerate launch --cpu --num_processes 2`` silently
starts only one process. For the same reason each process checks how many there are.

On several machines, the same command runs on each, with the run on a shared file system. The rank of a machine comes
from flags, or from the environment that torchrun, Slurm's srun, Kubeflow or an indexed Job of Kubernetes set
(:func:`detect_placement`). The first machine locks the run and writes the job. The launchers connect to its address,
and only then start the processes that read the job.
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
KEPT_LINES = 200
"""Last lines of the processes' output that are kept, to find the reason of a failure."""

# Prefixes of the lines that the processes print for the parent.
LOG_PREFIX = "rlaif-log "
FAILURE_PREFIX = "rlaif-failure "
DATASET_CHANGED_PREFIX = "rlaif-dataset-changed "

DEFAULT_PORT = 29500
# Variables that give the number of machines, the rank of this one, and the address of the first: ours before those of
# torchrun, Kubeflow, Slurm and indexed Jobs. Slurm's are those of a step, because a batch script that runs on the first
# of several machines is not a training on several machines.
MACHINES_VARIABLES = ("NNODES", "PET_NNODES", "SLURM_STEP_NUM_NODES")
RANK_VARIABLES = ("NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
ADDRESS_VARIABLES = ("MASTER_ADDR", "PET_MASTER_ADDR")
PORT_VARIABLES = ("MASTER_PORT", "PET_MASTER_PORT")


@dataclass(frozen=True)
class NodePlacement:
    """Machine number ``rank`` of ``machines``. The first one listens at ``address`` and ``port``."""

    machines: int = 1
    rank: int = 0
    address: str = ""
    port: int = DEFAULT_PORT

    def launcher_flags(self, accelerate: bool) -> list[str]:
        """Return the flags for the launcher: accelerate's, or torch's own."""
        if self.machines == 1:
            return [] if accelerate else ["--standalone"]
        names = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
        if not accelerate:
            names = ("nnodes", "node_rank", "master_addr", "master_port")
        values = zip(names, (self.machines, self.rank, self.address, self.port), strict=True)
        flags = [part for name, value in values for part in (f"--{name}", str(value))]
        # accelerate ignores this setting in its configuration file.
        return ["--same_network", *flags] if accelerate else flags


def detect_placement(train_config: TrainConfig, environ: Mapping[str, str] = os.environ) -> NodePlacement:
    """Return the placement of this machine, from ``train_config``, else from ``environ``, else as the only machine.

    Raises :class:`UsageError` if there are several machines and the rank or the address of the first is missing.
    """
    if train_config.launcher == "none":
        return NodePlacement()
    machines = train_config.num_machines or _env_int(environ, MACHINES_VARIABLES) or 1
    if machines == 1:
        return NodePlacement()
    rank = train_config.machine_rank if train_config.machine_rank is not None else _env_int(environ, RANK_VARIABLES)
    if rank is None or rank >= machines:
        raise UsageError(
            f"`--machine-rank` is required for a training on {machines} machines"
            if rank is None
            else f"the machine rank must be between 0 and {machines - 1} for {machines} machines, got {rank}",
            location="train.machine_rank",
            hint=f"Pass `--machine-rank`, or set one of {', '.join(RANK_VARIABLES)}.",
        )
    host, _, port = (train_config.main_process_address or "").partition(":")
    if port and not port.isdecimal():
        raise UsageError(
            f"expected HOST[:PORT], got {train_config.main_process_address!r}",
            location="train.main_process_address",
            hint=f"Write `--main-process-address node-0` or `--main-process-address node-0:{DEFAULT_PORT}`.",
        )
    address = host or next((environ[name] for name in ADDRESS_VARIABLES if environ.get(name)), "")
    if not address:
        raise UsageError(
            f"`--main-process-address` is required for a training on {machines} machines",
            location="train.main_process_address",
            hint=f"Pass `--main-process-address HOST[:PORT]`, or set {ADDRESS_VARIABLES[0]} (and {PORT_VARIABLES[0]}).",
        )
    return NodePlacement(
        machines, rank, address, int(port) if port else _env_int(environ, PORT_VARIABLES) or DEFAULT_PORT
    )


def _env_int(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if environ.get(name):
            if not environ[name].isdigit():
                raise UsageError(f"the environment variable {name} must be a whole number, got {environ[name]!r}")
            return int(environ[name])
    return None


def train(run: Run, config: Config, *, log: Callable[[str], None]) -> artifacts.TrainResult:
    """Train like :func:`rlaif.train.trainer.train`, in ``train.num_processes`` processes on each machine.

    Must be called on every machine. Only the first one needs the run's lock.
    """
    placement = detect_placement(config.train)
    output = training_output(run, config)
    job = output / ".job.json"
    command, environment = launch_command(config, job, placement)
    if placement.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        job.write_bytes(orjson.dumps({"run": str(run.path), "config": config.model_dump(mode="json")}))
    if placement.machines > 1:
        address = f"{placement.address}:{placement.port}"
        log(f"machine {placement.rank} of {placement.machines} (numbered from 0), connecting to {address}")
    try:
        code, output_lines = _run_processes(command, environment, log)
    finally:
        if placement.rank == 0:
            job.unlink(missing_ok=True)
    if code:
        raise _processes_error(code, output_lines, output)
    result = artifacts.load_result(output)
    if result is None:
        raise RunError("the training processes ended without a result", location=str(output))
    return result


def _run_processes(
    command: list[str], environment: Mapping[str, str], log: Callable[[str], None]
) -> tuple[int, list[str]]:
    """Run the launcher, pass on the processes' log lines, and return its exit code and the last lines of output."""
    output_lines: list[str] = []
    process = subprocess.Popen(
        command,
        env=spawn.child_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                output_lines.append(line.rstrip())
                del output_lines[:-KEPT_LINES]
                if line.startswith(LOG_PREFIX):
                    log(line.removeprefix(LOG_PREFIX).rstrip())
        except BaseException:
            process.terminate()  # the launcher ends the processes that it started
            raise
    return process.returncode, output_lines


def _processes_error(code: int, output_lines: list[str], output: Path) -> RlaifError:
    """Build the error for processes that ended with ``code``, from the last lines that they printed."""
    for line in reversed(output_lines):
        if line.startswith(DATASET_CHANGED_PREFIX):
            message = line.removeprefix(DATASET_CHANGED_PREFIX)
            return DatasetChangedError(message, location=str(output), hint=checkpoints.CONFLICT_HINT)
        if line.startswith(FAILURE_PREFIX):
            reason = line.removeprefix(FAILURE_PREFIX)
            break
    else:
        reason = " / ".join(output_lines[-LOG_TAIL_LINES:]) or "they printed nothing"
    return RunError(
        f"the training processes ended with exit code {code}: {reason}",
        location=str(output),
        hint="Rerun the same command: it resumes from the newest checkpoint.",
    )


def launch_command(config: Config, job: Path, placement: NodePlacement) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment that start the processes.

    Raises :class:`UsageError` or :class:`MissingDependencyError` if they cannot be started on this machine.
    """
    import torch

    train_config = config.train
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    per_machine = train_config.num_processes or gpus or 1
    processes = per_machine * placement.machines
    if train_config.batch_size % processes:
        raise UsageError(
            f"a batch of {train_config.batch_size} cannot be divided among {processes} processes",
            location="train.batch_size",
            hint=f"Set batch_size to a multiple of {processes}.",
        )
    child = ["-m", "rlaif.train.distributed", str(job)]
    environment = {"RLAIF_PROCESSES": str(processes)}
    if gpus:
        if per_machine > gpus:
            raise MissingDependencyError(
                f"{per_machine} processes need {per_machine} GPUs, and this machine has {gpus}",
                hint="Lower num_processes under [train].",
            )
        return [sys.executable, *accelerate_args(train_config.sharding, processes, placement), *child], environment
    if train_config.sharding != "ddp":
        raise MissingDependencyError(
            f"{train_config.sharding} needs CUDA, which this machine does not have",
            hint='Set sharding = "ddp" under [train].',
        )
    flags = placement.launcher_flags(accelerate=False)
    launcher = ["-m", "torch.distributed.run", *flags, "--nproc_per_node", str(per_machine)]
    return [sys.executable, *launcher, *child], {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def accelerate_args(sharding: str, processes: int, placement: NodePlacement) -> list[str]:
    """Return the arguments of ``accelerate launch``. ``processes``: the total over all machines."""
    preset = ["--multi_gpu"] if processes > 1 else []
    if sharding != "ddp":
        preset = ["--config_file", str(PRESETS / f"{sharding}.yaml")]
    flags = placement.launcher_flags(accelerate=True)
    return ["-m", "accelerate.commands.launch", *preset, *flags, "--num_processes", str(processes)]


def _run_child(job: Path) -> int:
    from rlaif.train import trainer

    is_first = os.environ.get("RANK", "0") == "0"

    def log(line: str) -> None:
        if is_first:
            _print_for_parent("\n".join(LOG_PREFIX + part for part in line.split("\n")))

    world_size, expected = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ["RLAIF_PROCESSES"])
    try:
        if world_size != expected:
            raise RunError(f"expected {expected} processes, but {world_size} started")
        spec = _read_job(job)
        trainer.train(Run(spec["run"]), Config.model_validate(spec["config"]), log=log)
    except DatasetChangedError as error:
        _print_for_parent(DATASET_CHANGED_PREFIX + " ".join(error.message.split()))
        return error.exit_code
    except RlaifError as error:
        _print_for_parent(FAILURE_PREFIX + " ".join(str(error).split()))
        return error.exit_code
    return 0


def _print_for_parent(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _read_job(path: Path) -> dict[str, Any]:
    try:
        spec: dict[str, Any] = orjson.loads(path.read_bytes())
    except OSError as error:
        raise RunError(
            f"the job that the first machine wrote cannot be read: {error.strerror}",
            location=str(path),
            hint="Put the run on a file system that all machines share, under the same path.",
        ) from None
    return spec


if __name__ == "__main__":
    sys.exit(_run_child(Path(sys.argv[1])))
