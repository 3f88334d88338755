"""The examples, as far as possible without a cluster: each file is valid for its program, and so is every rlaif command
in it."""

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

OVERNIGHT = ROOT / "examples" / "overnight"
TRAIN = ROOT / "examples" / "train"
FILES = sorted(path for path in (ROOT / "examples").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
# Options of sbatch that the examples use; True if they take a value, according to its manual.
SBATCH = {"job-name": True, "nodes": True, "ntasks-per-node": True, "gpus-per-node": True, "cpus-per-task": True,
          "gres": True, "time": True, "requeue": False, "open-mode": True, "output": True, "signal": True}  # fmt: skip
READ_ELSEWHERE = {"crontab", "rlaif@.service", "rlaif@.timer"}  # by other tests of this file
COMMAND = re.compile(r"(?:^|[\s\"'/`])(?:rlaif|\$RLAIF\"?) +(?P<line>[a-z][^#|`>;&\n]*)")


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a fake rlaif, whose exit code is $ENDS, and a fake scontrol of Slurm."""
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
def test_a_finished_slurm_job_is_not_requeued(tmp_path: Path, cluster: dict[str, str], code: int) -> None:
    done = subprocess.run(["bash", OVERNIGHT / "slurm.sh", "my run", "--train"], env={**cluster, "ENDS": str(code)})
    assert done.returncode == code
    assert (tmp_path / "asked").read_text() == "run my run --train\n"
    assert not (tmp_path / "requeued").exists()


def test_a_slurm_job_at_its_time_limit_waits_for_rlaif_and_is_requeued(tmp_path: Path, cluster: dict[str, str]) -> None:
    job = subprocess.Popen(["bash", OVERNIGHT / "slurm.sh", "run"], env=cluster)
    deadline = time.monotonic() + 20
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.terminate()
    assert job.wait(20) == 130
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"


def test_the_commands_of_crontab_and_systemd_are_valid(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.read(OVERNIGHT / "rlaif@.service")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rlaif.toml").touch()
    lines = [unit["Service"]["ExecStart"], (OVERNIGHT / "crontab").read_text().splitlines()[-1]]
    for line in lines:
        match = re.search(r"rlaif (run \S+ [^2>]*)", line)
        assert match, line
        arguments = [str(tmp_path / "run") if part in ("%i", "my-run") else part for part in shlex.split(match[1])]
        result = subprocess.run(command(*arguments, "--dry-run"), capture_output=True, text=True)
        assert result.returncode == 2
        assert "no prompts are given" in result.stderr
    assert int(unit["Service"]["TimeoutStopSec"]) > 120  # longer than rlaif waits for requests in flight


# All files


def parse(arguments: list[str]) -> dict[str, Any]:
    """Return the parameters that the command line parses from ``arguments``. Raises typer's error if invalid."""
    from typer.main import get_command

    from rlaif.cli.app import app

    name, *rest = arguments
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert name in commands, f"unknown command {name!r}"
    parser = commands[name]
    if hasattr(parser, "commands"):
        name, *rest = rest
        parser = parser.commands[name]
    parsed: dict[str, Any] = parser.make_context(name, rest).params
    return parsed


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the rlaif command lines of a script or a page, with their variables filled in."""
    for match in COMMAND.finditer(text.replace("\\\n", " ")):
        line = re.sub(r'"?\$@"?', "", match["line"]).replace("$RUN", "run").replace("[options]", "")
        line = re.split(r"\s{3,}", re.sub(r"\[[^]]*\]", "", line))[0]  # the rest of the line is a description
        yield shlex.split(line)


def documents(path: Path) -> list[dict[str, Any]]:
    import yaml

    return list(yaml.safe_load_all(path.read_text()))


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every container below ``value``, at any depth."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        for child in value.values():
            yield from containers(child)
    elif isinstance(value, list):
        for child in value:
            yield from containers(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_every_example_parses_as_its_format(path: Path) -> None:
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
            assert path.name in READ_ELSEWHERE, f"no test parses {path.name}: add one"


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in (".sh", ".md")], ids=lambda path: path.name)
def test_every_command_in_scripts_and_pages_is_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"(?s)```.*?```|`[^`]+`", text))
    command_lines = list(commands_in(re.sub(r"(?m)^#.*$", "", text)))  # without comments
    for line in command_lines:
        parse(line)
    assert command_lines


def test_an_unknown_flag_is_detected() -> None:
    from typer._click.exceptions import UsageError

    (line,) = commands_in('srun "$RLAIF" train "$RUN" --launcher accelerate --shard fsdp "$@"\n')
    assert line == ["train", "run", "--launcher", "accelerate", "--shard", "fsdp"]
    with pytest.raises(UsageError, match="--shard"):
        parse(line)


# Training on several machines


@pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml"])
def test_kubernetes_accepts_the_manifests(name: str) -> None:
    """Validate with the schemas of Kubernetes. They do not cover JobSet, so validate the Jobs that it creates."""
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
def test_each_pod_finds_its_rank(name: str, first: str) -> None:
    """From the command and the environment in the file, and the index that Kubernetes adds."""
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
