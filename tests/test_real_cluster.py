"""The demo's night on a local Ray cluster of two real vLLMs, one of which is killed, beside the plain one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tests.conftest import command, needs, read_jsonl
from tests.llm.processes import carrying, until
from tests.test_real_night import SETTINGS

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1200)]

PLAIN = SETTINGS + "\n[run]\npilot = 0\n[client]\nconcurrency = 8\n"
ASKED = '"model":"demo"'
ON_RAY = '[cluster]\non = "ray"\nreplicas = 2\n'


def servers_of(run: Path) -> list[int]:
    """The vLLM servers that work for a run, without what guards them."""
    return [n for n, line in carrying(str(run)).items() if "api_server" in line and "guard.py" not in line]


@dataclass
class Nights:
    """Both runs. ``killed_at``: how many verdicts a model had given when one of two replicas was killed."""

    plain: Path
    ray: Path
    killed_at: int
    told: str
    left: dict[int, str]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    needs("vllm")
    needs("ray")
    folder = tmp_path_factory.mktemp("cluster")
    runs = {"plain": PLAIN, "ray": PLAIN + ON_RAY}
    for name, settings in runs.items():
        (folder / name).mkdir()
        (folder / name / "rlaif.toml").write_text(settings)
    # Small caches: three vLLMs may share the machine with a training.
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command("run", folder / "plain"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    run = folder / "ray"
    log, verdicts = folder / "told", run / "journal" / "verdicts.jsonl"
    with log.open("w") as told:
        night = subprocess.Popen(command("run", run), env={**environment, "RLAIF_TEST_MARK": str(run)}, stdout=told,
                                 stderr=told)  # fmt: skip
    try:
        while night.poll() is None and not (verdicts.exists() and ASKED in verdicts.read_text()):
            time.sleep(0.05)
        servers = servers_of(run)
        assert len(servers) == 2, log.read_text()
        killed_at = verdicts.read_text().count(ASKED)
        os.kill(servers[0], signal.SIGKILL)
        assert night.wait(600) == 0, log.read_text()
    finally:
        night.terminate()
        night.wait(120)
    until(lambda: not carrying(str(run)), 30)
    return Nights(folder / "plain", run, killed_at, log.read_text(), carrying(str(run)))


def journal(run: Path, name: str) -> dict[str, dict[str, Any]]:
    """By key, without the time of day and without what a server had cached."""
    lines = read_jsonl(run / "journal" / f"{name}.jsonl")
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: {k: v for k, v in line.items() if k not in ("at", "cached_tokens")} for line in lines}


def test_two_replicas_answer_as_one_server_does(nights: Nights) -> None:
    """On one build of vLLM a seed decides an answer, whichever replica gives it."""
    for name in ("prompts", "completions"):
        assert journal(nights.ray, name) == journal(nights.plain, name)
    assert len(journal(nights.ray, "completions")) == 36
    assert "serving demo on Ray: 2 x vLLM" in nights.told


def test_one_replica_killed_in_the_middle_costs_nothing_but_time(nights: Nights) -> None:
    plain, ray = (journal(run, "verdicts") for run in (nights.plain, nights.ray))
    assert 0 < nights.killed_at < sum(line["model"] == "demo" for line in plain.values()) - 8
    assert ray.keys() == plain.keys()
    for key, line in plain.items():
        for field, value in line.items():
            assert ray[key][field] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value)


def test_the_dataset_is_the_same(nights: Nights) -> None:
    for name in ("tables/pairs.parquet", "dataset/train.parquet"):
        plain, ray = pl.read_parquet(nights.plain / name), pl.read_parquet(nights.ray / name)
        assert plain.height
        assert_frame_equal(ray, plain, abs_tol=1e-3)


def test_the_cluster_ends_with_the_run(nights: Nights) -> None:
    assert not nights.left
