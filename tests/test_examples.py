"""The examples of nights that start by themselves: as far as a machine without a cluster can run them."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, command

EXAMPLES = ROOT / "examples" / "night"


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
    until = time.monotonic() + 20
    while not (tmp_path / "up").exists() and time.monotonic() < until:
        time.sleep(0.02)
    job.terminate()
    assert job.wait(20) == 130
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"


def test_every_command_line_in_the_examples_is_one_that_rlaif_knows(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.read(EXAMPLES / "rlaif@.service")
    lines = [unit["Service"]["ExecStart"], (EXAMPLES / "crontab").read_text().splitlines()[-1]]
    for line in lines:
        found = re.search(r"rlaif (run \S+ [^2>]*)", line)
        assert found, line
        arguments = [str(tmp_path / "run") if part in ("%i", "my-run") else part for part in shlex.split(found[1])]
        told = subprocess.run(command(*arguments, "--dry-run"), capture_output=True, text=True)
        assert told.returncode == 2
        assert "no prompts are named" in told.stderr
    assert int(unit["Service"]["TimeoutStopSec"]) > 120  # longer than requests in flight are given
