"""One training in several processes: accelerate starts them, each runs ``python -m rlaif.train.launch JOB``.

The parent holds the run's lock and waits; the processes train together and the first of them writes. On CUDA the
presets in ``presets/`` say how the weights are spread (fsdp, deepspeed); ``ddp`` gives each process all of them. On a
CPU there is only ddp, started by torch's own launcher: ``accelerate launch --cpu --num_processes 2`` quietly starts one
process, which is why each of them checks how many there are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson

from rlaif.config import Config
from rlaif.errors import MissingPart, RlaifError, RunError, UsageError
from rlaif.run.directory import Run
from rlaif.train import writing

PRESETS = Path(__file__).resolve().parent / "presets"
LAST_WORDS = 5


def train(run: Run, config: Config, *, say: Callable[[str], None]) -> writing.TrainResult:
    """As :func:`rlaif.train.loop.train`, in ``train.processes`` processes."""
    output = Path(config.train.output) if config.train.output else run.model
    output.mkdir(parents=True, exist_ok=True)
    job = output / ".job.json"
    job.write_bytes(orjson.dumps({"run": str(run.path), "config": config.model_dump(mode="json")}))
    line, environment = command(config, job)
    said: list[str] = []
    process = subprocess.Popen(line, env={**os.environ, **environment}, stdout=subprocess.PIPE,
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
        job.unlink(missing_ok=True)
    if code:
        told = next((text for text in reversed(said) if text.startswith(FAILED)), None)
        last = told.removeprefix(FAILED) if told else " / ".join(said[-LAST_WORDS:]) or "it said nothing"
        raise RunError(f"the training processes ended with {code}: {last}", where=str(output),
                       mend="What was saved is kept: the same command goes on from the newest checkpoint.")  # fmt: skip
    result = writing.stored(output)
    if result is None:
        raise RunError("the training processes ended without a result", where=str(output))
    return result


SAID, FAILED = "rlaif-said ", "rlaif-failed "


def command(config: Config, job: Path) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that start the processes. Raises where they cannot be started here."""
    import torch

    wanted = config.train
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes = wanted.processes or gpus or 1
    if wanted.batch_size % processes:
        raise UsageError(
            f"a batch of {wanted.batch_size} cannot be shared by {processes} processes",
            where="train.batch_size",
            mend=f"Set batch_size to a multiple of {processes}.",
        )
    child = ["-m", "rlaif.train.launch", str(job)]
    environment = {"RLAIF_PROCESSES": str(processes)}
    if gpus:
        if processes > gpus:
            raise MissingPart(f"{processes} processes need as many GPUs, and there are {gpus}",
                              mend="Lower processes under [train].")  # fmt: skip
        preset = [] if wanted.sharding == "ddp" else ["--config_file", str(PRESETS / f"{wanted.sharding}.yaml")]
        many = ["--multi_gpu"] if wanted.sharding == "ddp" and processes > 1 else []
        start = ["-m", "accelerate.commands.launch", *preset, *many, "--num_processes", str(processes)]
        return [sys.executable, *start, *child], environment
    if wanted.sharding != "ddp":
        raise MissingPart(f"{wanted.sharding} needs CUDA, and there is none here",
                          mend='Set sharding = "ddp" under [train].')  # fmt: skip
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *start, *child], {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def _child(job: Path) -> int:
    from rlaif.train import loop

    told = orjson.loads(job.read_bytes())
    first = os.environ.get("RANK", "0") == "0"

    def say(line: str) -> None:
        if first:
            print("\n".join(SAID + part for part in line.split("\n")), flush=True)  # noqa: T201  # the parent reads it

    there, wanted = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ["RLAIF_PROCESSES"])
    try:
        if there != wanted:
            raise RunError(f"{wanted} processes were asked for, and {there} started")
        loop.train(Run(told["run"]), Config.model_validate(told["config"]), say=say)
    except RlaifError as error:
        print(FAILED + " ".join(str(error).split()), flush=True)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1])))
