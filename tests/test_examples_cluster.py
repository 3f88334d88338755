"""The examples for Ray, parsed by Ray itself, as far as possible without such a cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.config import loader
from tests.conftest import ROOT, needs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.].*")  # from Ray, on import
EXAMPLES = ROOT / "examples" / "cluster"


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    needs("ray")
    value: dict[str, Any] = yaml.safe_load((EXAMPLES / "ray-service.yaml").read_text())
    assert (value["apiVersion"], value["kind"]) == ("ray.io/v1", "RayService")
    return value["spec"]


def test_ray_serve_accepts_and_builds_the_applications(service: dict[str, Any]) -> None:
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    gpus = {}
    for application in schema.applications:
        deployed = call_user_app_builder_with_args_if_necessary(import_attr(application.import_path), application.args)
        deployment = deployed._bound_deployment
        scaling = deployment._deployment_config.autoscaling_config
        max_replicas = scaling.max_replicas if scaling else deployment.num_replicas
        gpus[application.name] = deployment.ray_actor_options["num_gpus"] * max_replicas
    assert gpus == {"policy": 4, "judge": 4}
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert sum(gpus.values()) <= int(container["resources"]["limits"]["nvidia.com/gpu"]) * group["maxReplicas"]


def test_the_service_runs_the_ray_version_that_rlaif_pins(service: dict[str, Any]) -> None:
    import ray

    cluster = service["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    assert f'"ray[serve]=={ray.__version__}"' in (ROOT / "pyproject.toml").read_text()
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        assert "RLAIF_API_KEY" in [variable["name"] for variable in container["env"]]


def test_ray_and_rlaif_accept_the_job(tmp_path: Path) -> None:
    """Ray's parser reads `ray job submit`, and the entry point is a valid rlaif command."""
    needs("ray")
    from ray.dashboard.modules.job.cli import submit

    (tmp_path / "ray").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "ray").chmod(0o755)
    line = ["sh", EXAMPLES / "ray-job.sh", "runs/my-run", "--until", "07:00"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    arguments = subprocess.run(line, check=True, text=True, capture_output=True, env=environment).stdout.splitlines()
    assert arguments[:2] == ["job", "submit"]
    context = submit.make_context("submit", arguments[2:])
    assert context.params["no_wait"]
    assert context.params["submission_id"].startswith("rlaif-my-run-")
    assert list(context.params["entrypoint"]) == ["rlaif", "run", "runs/my-run", "--until", "07:00"]


def test_the_settings_are_valid(tmp_path: Path) -> None:
    (tmp_path / "rlaif.toml").write_text((EXAMPLES / "ray.toml").read_text())
    config = loader.load(tmp_path, {}, {})
    assert config.cluster.backend == "ray"
    assert config.judge.vllm == {"tensor_parallel_size": 2}
