"""What the Python processes that rlaif starts inherit. The model server's is tested in
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

UNWANTED = "PYTHONDONTWRITEBYTECODE"


@pytest.fixture(autouse=True)
def unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNWANTED, "1")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")


def test_a_child_inherits_all_but_the_wish_not_to_write_bytecode() -> None:
    environment = spawn.child_environment(MORE="1")
    assert UNWANTED not in environment
    assert environment["SOMETHING_ELSE"] == "kept"
    assert environment["MORE"] == "1"
    assert os.environ[UNWANTED] == "1"


def test_the_training_launcher_inherits_no_such_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'seen')!r}, 'w'))"
    monkeypatch.setattr(
        distributed, "launch_command", lambda *_: ([sys.executable, "-c", code], {"RLAIF_PROCESSES": "1"})
    )
    with pytest.raises(RunError, match="without a result"):
        distributed.train(Run(tmp_path / "run"), Config(), log=lambda _line: None)
    inherited = json.loads((tmp_path / "seen").read_text())
    assert UNWANTED not in inherited
    assert (inherited["SOMETHING_ELSE"], inherited["RLAIF_PROCESSES"]) == ("kept", "1")


def test_a_local_ray_cluster_inherits_no_such_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes its processes' environment from ours when it is started."""
    environments: list[dict[str, str]] = []
    ray = types.ModuleType("ray")
    ray.init = lambda **_: environments.append(dict(os.environ))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    RayCluster(ClusterConfig(backend="ray"), ClientConfig(), lambda _line: None)._init_ray(start=True)
    assert len(environments) == 1
    assert UNWANTED not in environments[0]
    assert environments[0]["SOMETHING_ELSE"] == "kept"
    assert os.environ[UNWANTED] == "1"
