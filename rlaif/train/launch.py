"""One training in several processes: accelerate starts them, each runs ``python -m rlaif.train.launch JOB``.

The parent holds the run's lock and waits; the processes train together and the first of them writes. On CUDA the
presets in ``presets/`` say how the weights are spread (fsdp, deepspeed); ``ddp`` gives each process all of them. On a
CPU there is only ddp, started by torch's own launcher: ``accelerate launch --cpu --num_processes 2`` quietly starts one
process, which is why each of them checks how many there are.

On several machines the same command is given on each, with the run on a file system that they share. Where a machine
stands among them is asked for by flags or found in the environment that torchrun, Slurm's srun, an indexed Job of
Kubernetes or Kubeflow set (:func:`place`). The first machine locks the run and writes the job; the launchers meet at
its address, and only then are the processes started that read it.
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
from rlaif.config import Config, TrainConfig
from rlaif.errors import MissingPart, OtherRows, RlaifError, RunError, UsageError
from rlaif.run.directory import Run
from rlaif.train import checkpoints, writing

PRESETS = Path(__file__).resolve().parent / "presets"
LAST_WORDS = 5


PORT = 29500
# Who names the number of machines, this one's place among them, and where the first one is: ours before torchrun's,
# Kubeflow's, Slurm's (of a step: a batch script that runs on the first of several machines is not one of several) and
# those of an indexed Job.
MACHINES = ("NNODES", "PET_NNODES", "SLURM_STEP_NUM_NODES")
RANK = ("NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
ADDRESS = ("MASTER_ADDR", "PET_MASTER_ADDR")
PORTS = ("MASTER_PORT", "PET_MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """This machine is number ``rank`` of ``machines``; the first one listens at ``address`` and ``port``."""

    machines: int = 1
    rank: int = 0
    address: str = ""
    port: int = PORT

    def flags(self, accelerate: bool) -> list[str]:
        """How the launcher is told: accelerate's, or torch's own."""
        if self.machines == 1:
            return [] if accelerate else ["--standalone"]
        names = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
        if not accelerate:
            names = ("nnodes", "node_rank", "master_addr", "master_port")
        told = zip(names, (self.machines, self.rank, self.address, self.port), strict=True)
        same = ["--same_network"] if accelerate else []  # accelerate passes over this line of its configuration file
        return [*same, *(part for name, value in told for part in (f"--{name}", str(value)))]


def place(wanted: TrainConfig, environ: Mapping[str, str] = os.environ) -> Place:
    """Where this machine stands: as asked for, else as the environment says, else alone.

    Raises :class:`UsageError` where there are several and one cannot be told from another, or the first not be found.
    """
    if wanted.launcher == "none":
        return Place()
    machines = wanted.machines or _number(environ, MACHINES) or 1
    if machines == 1:
        return Place()
    rank = wanted.machine_rank if wanted.machine_rank is not None else _number(environ, RANK)
    if rank is None or rank >= machines:
        raise UsageError(
            f"there are {machines} machines, and which one this is is not known" if rank is None
            else f"there are {machines} machines, and this is number {rank}: they are counted from 0",
            mend=f"Give --machine-rank, or set one of {', '.join(RANK)}.",
        )  # fmt: skip
    given, _, port = (wanted.main_address or "").partition(":")
    if port and not port.isdecimal():
        raise UsageError(f"{wanted.main_address!r} is no HOST[:PORT]", where="train.main_address",
                         mend=f"Give --main-address as node-0 or node-0:{PORT}.")  # fmt: skip
    address = given or next((environ[name] for name in ADDRESS if environ.get(name)), "")
    if not address:
        raise UsageError(
            f"there are {machines} machines, and where the first one is is not known",
            mend=f"Give --main-address HOST[:PORT], or set {ADDRESS[0]} (and {PORTS[0]}).",
        )
    return Place(machines, rank, address, int(port) if port else _number(environ, PORTS) or PORT)


def _number(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if environ.get(name):
            if not environ[name].isdigit():
                raise UsageError(f"{name} is {environ[name]!r}, which is no number")
            return int(environ[name])
    return None


def train(run: Run, config: Config, *, say: Callable[[str], None]) -> writing.TrainResult:
    """As :func:`rlaif.train.loop.train`, in ``train.processes`` processes on each machine.

    Called on every machine; where this one is not the first, the run's lock need not be held."""
    here = place(config.train)
    output = Path(config.train.output) if config.train.output else run.model
    job = output / ".job.json"
    line, environment = command(config, job, here)
    if here.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        job.write_bytes(orjson.dumps({"run": str(run.path), "config": config.model_dump(mode="json")}))
    if here.machines > 1:
        say(f"machine {here.rank} of {here.machines}, counted from 0; they meet at {here.address}:{here.port}")
    said: list[str] = []
    process = subprocess.Popen(line, env=spawn.environment(**environment), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip
    try:
        with process:
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    said.append(text.rstrip())
                    del said[:-200]
                    if text.startswith(SAID):
                        say(text[len(SAID) :].rstrip())
            except BaseException:
                process.terminate()  # the launcher ends those that it started
                raise
        code = process.returncode
    finally:
        if here.rank == 0:
            job.unlink(missing_ok=True)
    if code:
        told = next((text for text in reversed(said) if text.startswith((FAILED, OTHER_ROWS))), None)
        if told and told.startswith(OTHER_ROWS):
            raise OtherRows(told.removeprefix(OTHER_ROWS), where=str(output), mend=checkpoints.MEND)
        last = told.removeprefix(FAILED) if told else " / ".join(said[-LAST_WORDS:]) or "it said nothing"
        raise RunError(f"the training processes ended with {code}: {last}", where=str(output),
                       mend="What was saved is kept: the same command goes on from the newest checkpoint.")  # fmt: skip
    result = writing.stored(output)
    if result is None:
        raise RunError("the training processes ended without a result", where=str(output))
    return result


SAID, FAILED, OTHER_ROWS = "rlaif-said ", "rlaif-failed ", "rlaif-other-rows "


def command(config: Config, job: Path, here: Place) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that start the processes. Raises where they cannot be started here."""
    import torch

    wanted = config.train
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    each = wanted.processes or gpus or 1
    processes = each * here.machines
    if wanted.batch_size % processes:
        raise UsageError(
            f"a batch of {wanted.batch_size} cannot be shared by {processes} processes",
            where="train.batch_size",
            mend=f"Set batch_size to a multiple of {processes}.",
        )
    child = ["-m", "rlaif.train.launch", str(job)]
    environment = {"RLAIF_PROCESSES": str(processes)}
    if gpus:
        if each > gpus:
            raise MissingPart(f"{each} processes need as many GPUs, and there are {gpus}",
                              mend="Lower processes under [train].")  # fmt: skip
        return [sys.executable, *accelerate(wanted.sharding, processes, here), *child], environment
    if wanted.sharding != "ddp":
        raise MissingPart(f"{wanted.sharding} needs CUDA, and there is none here",
                          mend='Set sharding = "ddp" under [train].')  # fmt: skip
    start = ["-m", "torch.distributed.run", *here.flags(accelerate=False), "--nproc_per_node", str(each)]
    return [sys.executable, *start, *child], {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def accelerate(sharding: str, processes: int, here: Place) -> list[str]:
    """``accelerate launch`` with its options. ``processes``: on all machines together, as accelerate counts them."""
    preset = ["--multi_gpu"] if processes > 1 else []
    if sharding != "ddp":
        preset = ["--config_file", str(PRESETS / f"{sharding}.yaml")]
    return [
        "-m",
        "accelerate.commands.launch",
        *preset,
        *here.flags(accelerate=True),
        "--num_processes",
        str(processes),
    ]


def _child(job: Path) -> int:
    from rlaif.train import loop

    first = os.environ.get("RANK", "0") == "0"

    def say(line: str) -> None:
        if first:
            print("\n".join(SAID + part for part in line.split("\n")), flush=True)  # noqa: T201  # the parent reads it

    there, wanted = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ["RLAIF_PROCESSES"])
    try:
        if there != wanted:
            raise RunError(f"{wanted} processes were asked for, and {there} started")
        told = _job(job)
        loop.train(Run(told["run"]), Config.model_validate(told["config"]), say=say)
    except RlaifError as error:
        words = OTHER_ROWS + error.what if isinstance(error, OtherRows) else FAILED + str(error)
        print(" ".join(words.split()), flush=True)  # noqa: T201
        return error.exit_code
    return 0


def _job(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = orjson.loads(path.read_bytes())
    except OSError as error:
        raise RunError(
            f"what the first machine wrote cannot be read: {error.strerror}",
            where=str(path),
            mend="The run has to be on a file system that all machines share, under the same path.",
        ) from None
    return told


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1])))
