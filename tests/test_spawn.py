"""Environment variables of the Python processes that rlaif starts. Those of the model server are tested in
tests/serving/test_vllm_server.py."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from rlaif import spawn
from rlaif.config.models import ClientConfig, ClusterConfig, Config
from rlaif.errors import RunError
from rlaif.run.run import Run
from rlaif.serving.ray_cluster import RayCluster
from rlaif.train import distributed

EXCLUDED_VARIABLE = "PYTHONDONTWRITEBYTECODE"


@pytest.fixture(autouse=True)
def excluded_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXCLUDED_VARIABLE, "1")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")


def test_a_child_inherits_all_but_pythondontwritebytecode() -> None:
    environment = spawn.child_environment(MORE="1")
    assert EXCLUDED_VARIABLE not in environment
    assert environment["SOMETHING_ELSE"] == "kept"
    assert environment["MORE"] == "1"
    assert os.environ[EXCLUDED_VARIABLE] == "1"


def test_the_training_launcher_does_not_inherit_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'environment')!r}, 'w'))"
    monkeypatch.setattr(
        distributed, "launch_command", lambda *_: ([sys.executable, "-c", code], {"RLAIF_PROCESSES": "1"})
    )
    with pytest.raises(RunError, match="without a result"):
        distributed.train(Run(tmp_path / "run"), Config(), log=lambda _line: None)
    inherited = json.loads((tmp_path / "environment").read_text())
    assert EXCLUDED_VARIABLE not in inherited
    assert (inherited["SOMETHING_ELSE"], inherited["RLAIF_PROCESSES"]) == ("kept", "1")


def test_a_local_ray_cluster_does_not_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray copies the environment of this process when it starts."""
    environments: list[dict[str, str]] = []
    ray = types.ModuleType("ray")
    ray.init = lambda **_: environments.append(dict(os.environ))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    RayCluster(ClusterConfig(backend="ray"), ClientConfig(), lambda _line: None)._init_ray(start=True)
    assert len(environments) == 1
    assert EXCLUDED_VARIABLE not in environments[0]
    assert environments[0]["SOMETHING_ELSE"] == "kept"
    assert os.environ[EXCLUDED_VARIABLE] == "1"
