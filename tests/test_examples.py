"""The examples, as far as a machine without a cluster can run them: every file is parsed as the program that it is for
would, and every command in it is one that rlaif knows."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import Config, TrainConfig
from rlaif.train import distributed
from tests.conftest import ROOT, command

EXAMPLES = ROOT / "examples" / "night"
TRAIN = ROOT / "examples" / "train"
FILES = sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
# sbatch's options that the examples use, as its manual has them: with a value or without.
SBATCH = {"job-name": True, "nodes": True, "ntasks-per-node": True, "gpus-per-node": True, "cpus-per-task": True,
          "gres": True, "time": True, "requeue": False, "open-mode": True, "output": True, "signal": True}  # fmt: skip
READ_ELSEWHERE = {"crontab", "rlaif@.service", "rlaif@.timer"}  # by the tests below
COMMAND = re.compile(r"(?:^|[\s\"'/`])(?:rlaif|\$RLAIF\"?) +(?P<line>[a-z][^#|`>;&\n]*)")


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with a stand-in for rlaif, which says how it ends, and for Slurm's scontrol."""
    (tmp_path / "rlaif").write_text(
        f"#!/bin/bash\necho \"$@\" >> {tmp_path}/asked\ntrap 'sleep 0.3; exit 130' TERM\n"
        f"[ -n \"${{ENDS:-}}\" ] && exit $ENDS\ntouch {tmp_path}/up\nwhile true; do sleep 0.05; done\n"
    )  # fmt: skip
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
    for name in ("rlaif", "scontrol"):
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RLAIF": str(tmp_path / "rlaif"),
            "SLURM_JOB_ID": "42"}  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_slurm_job_that_came_to_its_end_is_not_queued_again(
    tmp_path: Path, cluster: dict[str, str], code: int
) -> None:
    done = subprocess.run(["bash", EXAMPLES / "slurm.sh", "my run", "--train"], env={**cluster, "ENDS": str(code)})
    assert done.returncode == code
    assert (tmp_path / "asked").read_text() == "run my run --train\n"
    assert not (tmp_path / "requeued").exists()


def test_a_slurm_job_that_runs_out_of_time_waits_for_what_is_in_flight_and_is_queued_again(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    job = subprocess.Popen(["bash", EXAMPLES / "slurm.sh", "run"], env=cluster)
    deadline = time.monotonic() + 20
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.terminate()
    assert job.wait(20) == 130
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"


def test_every_command_line_in_the_examples_is_one_that_rlaif_knows(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.read(EXAMPLES / "rlaif@.service")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rlaif.toml").touch()
    lines = [unit["Service"]["ExecStart"], (EXAMPLES / "crontab").read_text().splitlines()[-1]]
    for line in lines:
        match = re.search(r"rlaif (run \S+ [^2>]*)", line)
        assert match, line
        arguments = [str(tmp_path / "run") if part in ("%i", "my-run") else part for part in shlex.split(match[1])]
        result = subprocess.run(command(*arguments, "--dry-run"), capture_output=True, text=True)
        assert result.returncode == 2
        assert "no prompts are given" in result.stderr
    assert int(unit["Service"]["TimeoutStopSec"]) > 120  # longer than requests in flight are given


# Every file


def parse(arguments: list[str]) -> dict[str, Any]:
    """What rlaif's own command line makes of ``arguments``. Raises typer's error for what it does not know."""
    from typer.main import get_command

    from rlaif.cli.app import app

    name, *rest = arguments
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert name in commands, f"there is no command {name!r}"
    parser = commands[name]
    if hasattr(parser, "commands"):
        name, *rest = rest
        parser = parser.commands[name]
    parsed: dict[str, Any] = parser.make_context(name, rest).params
    return parsed


def commands_in(text: str) -> Iterator[list[str]]:
    """Command lines of rlaif in a script or a page, their variables filled in."""
    for match in COMMAND.finditer(text.replace("\\\n", " ")):
        line = re.sub(r'"?\$@"?', "", match["line"]).replace("$RUN", "run").replace("[options]", "")
        line = re.split(r"\s{3,}", re.sub(r"\[[^]]*\]", "", line))[0]  # what it does stands beside it in a table
        yield shlex.split(line)


def documents(path: Path) -> list[dict[str, Any]]:
    import yaml

    return list(yaml.safe_load_all(path.read_text()))


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container below ``value``, however deep its pod stands."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        for child in value.values():
            yield from containers(child)
    elif isinstance(value, list):
        for child in value:
            yield from containers(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_every_example_is_read_by_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".sh":
            done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            for option in re.findall(r"(?m)^#SBATCH +(.*)$", text):
                name, has_value, _ = option.removeprefix("--").partition("=")
                assert option.startswith("--"), option
                assert SBATCH[name] is bool(has_value), option
        case ".yaml" | ".yml":
            assert documents(path)
        case ".toml":
            Config.model_validate(tomllib.loads(text))
        case ".py":
            ast.parse(text)
        case ".md":
            assert text.startswith("# ")
        case _:
            assert path.name in READ_ELSEWHERE, f"nothing here reads {path.name}: add how"


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in (".sh", ".md")], ids=lambda path: path.name)
def test_every_command_in_scripts_and_pages_is_one_that_rlaif_knows(path: Path) -> None:
    text = re.sub(r"(?m)^#.*$", "", path.read_text(encoding="utf-8"))  # prose
    command_lines = list(commands_in(text))
    for line in command_lines:
        parse(line)
    assert command_lines


def test_a_flag_that_is_gone_would_be_found() -> None:
    from typer._click.exceptions import UsageError

    (line,) = commands_in('srun "$RLAIF" train "$RUN" --launcher accelerate --shard fsdp "$@"\n')
    assert line == ["train", "run", "--launcher", "accelerate", "--shard", "fsdp"]
    with pytest.raises(UsageError, match="--shard"):
        parse(line)


# Training on several machines


@pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml"])
def test_kubernetes_takes_them(name: str) -> None:
    """By its own schemas; of a JobSet, which is no part of it, the Jobs that it makes."""
    import kubernetes_validate as kubernetes

    for document in documents(TRAIN / name):
        if document["kind"] == "JobSet":
            assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
            assert set(document["spec"]) <= {"failurePolicy", "network", "replicatedJobs", "successPolicy", "suspend"}
            for job in document["spec"]["replicatedJobs"]:
                assert set(job) == {"name", "replicas", "template"}
                job_document = {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "metadata": {"name": job["name"]},
                    **job["template"],
                }
                kubernetes.validate(job_document, kubernetes.latest_version(), strict=True)
        else:
            kubernetes.validate(document, kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("name", "first"),
    [("job.yaml", "rlaif-train-0.rlaif-train"), ("jobset.yaml", "rlaif-train-machine-0-0.rlaif-train")],
)
def test_each_pod_finds_its_place(name: str, first: str) -> None:
    """By the command and the environment that stand in the file, and the index that Kubernetes adds."""
    (container,) = [item for document in documents(TRAIN / name) for item in containers(document)]
    program, *arguments = container["command"]
    assert program == "rlaif"
    parsed = parse(arguments)
    config = TrainConfig.model_validate({"launcher": parsed["launcher"], "sharding": parsed["sharding"]})
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    text = (TRAIN / name).read_text()
    pods = int(re.findall(r"completions: (\d+)", text)[0])
    assert re.findall(r"parallelism: (\d+)", text) == [str(pods)]
    for index in range(pods):
        placement = distributed.detect_placement(config, {**environment, "JOB_COMPLETION_INDEX": str(index)})
        assert placement == distributed.NodePlacement(pods, index, first, distributed.DEFAULT_PORT)
