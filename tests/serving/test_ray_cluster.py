"""A real Ray cluster whose replicas own fake vLLMs: models are found, replaced and taken down."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import ClientConfig, ClusterConfig
from rlaif.errors import MissingDependencyError
from rlaif.installation import install_command
from rlaif.llm.backends import ModelBackends
from rlaif.llm.usage import UsageMeter
from rlaif.serving.ports import free_port
from rlaif.serving.ray_replica import ServedModel, build_application
from tests.conftest import command, needs, read_jsonl, write_jsonl
from tests.processes import processes_carrying, wait_until

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.].*"),  # raised by Ray's import
]

HERE = Path(__file__).parent
KEY = "not-a-secret"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return an environment whose RAY_ADDRESS names a cluster of one node. The cluster requires the user's token, and
    runs fake vLLMs."""
    needs("ray")
    folder, port, temporary = tmp_path_factory.mktemp("ray"), free_port(), tempfile.mkdtemp(prefix="ray")
    python = folder / "python"
    python.write_text(
        f"#!/bin/sh\nplan=$(mktemp -p {folder})\n"
        f'case "$*" in *bad/model*) echo "crash {HERE / "logs" / "nomodel.log"}";; *) echo serve;; esac > $plan\n'
        f'shift 2\nexec {sys.executable} {HERE / "fake_vllm.py"} $plan "$@"\n'
    )
    python.chmod(0o755)
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RLAIF_")},
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RLAIF_TEST_MARK": str(folder),
        "HOME": str(folder),
        "RLAIF_CLIENT_SERVER_PYTHON": str(python),
        "RLAIF_CLUSTER_CPUS": "0.1",
    }
    ray = Path(sys.executable).with_name("ray")
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(
            [
                ray,
                "start",
                "--head",
                "--block",
                f"--port={port}",
                "--num-cpus=2",
                "--include-dashboard=false",
                f"--temp-dir={temporary}",
                "--object-store-memory=100000000",
            ],
            env={name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
            stdout=log,
            stderr=log,
        )
    try:
        assert wait_until(lambda: "runtime started" in (folder / "ray.log").read_text() or head.poll(), 120)
        assert head.poll() is None, (folder / "ray.log").read_text()
        yield {**environment, "PORT": str(free_port())}
    finally:
        for number in processes_carrying(str(folder)):  # a graceful end of Ray takes half a minute
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        head.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def listening_pids(model: str) -> set[int]:
    """Return the pids of the fake vLLMs that listen for ``model``, without supervisors and grandchildren."""
    pids = {
        n
        for n, line in processes_carrying(f"served-model-name\0{model}").items()
        if "process_supervisor.py" not in line
    }
    return {n for n in pids if int(Path(f"/proc/{n}/stat").read_text().rpartition(")")[2].split()[1]) not in pids}


def ask(url: str, key: str = KEY) -> str:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return str(json.loads(response.read())["choices"][0]["message"]["content"])


def answering_pid(url: str) -> int:
    """Return the pid of the fake vLLM that answers, or 0 if the request failed with its replica."""
    with contextlib.suppress(urllib.error.HTTPError):
        return int(ask(url).removeprefix("from "))
    return 0


class ServeProcess:
    """An ``rlaif serve`` process."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        line = command("serve", *arguments, "--port", environment["PORT"], "--json")
        self.process = subprocess.Popen(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def urls(self) -> list[str]:
        assert self.process.stdout
        text = ""
        while not text.endswith("]\n") or text.count("[") > text.count("]"):
            piece = self.process.stdout.readline()
            assert piece, self.process.communicate()[1]
            text += piece
        return [url for row in json.loads(text) for url in row["base_url"]]

    def end(self, signal_number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(signal_number)
        stderr = self.process.communicate(timeout=60)[1]
        return self.process.returncode, stderr


def generate_answers(model: str, environment: dict[str, str], folder: Path) -> tuple[list[str], str]:
    """Generate answers of ``model`` on the cluster to forty prompts in a new run. Returns the answers and stderr."""
    run = folder / "run"
    run.mkdir()
    (run / "rlaif.toml").write_text('[cluster]\nbackend = "ray"\n[sampler]\nn = 1\n')
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": f"prompt {i}"} for i in range(40)])
    line = command("generate", run, "--prompts", prompts, "--model", model, "--heldout-fraction", "0")
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [answer["text"] for answer in read_jsonl(run / "journal" / "completions.jsonl")], done.stderr


def test_a_reachable_cluster_requires_a_key(cluster: dict[str, str]) -> None:
    done = subprocess.run(
        command("serve", "--model", "ray/model", "--port", cluster["PORT"]), env=cluster, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "export RLAIF_API_KEY=" in done.stderr
    assert not listening_pids("ray/model")


def test_a_run_finds_served_models_and_a_dead_replica_is_replaced(cluster: dict[str, str], tmp_path: Path) -> None:
    environment = {**cluster, "RLAIF_API_KEY": KEY}
    serving = ServeProcess(environment, "--model", "ray/model", "--replicas", "2")
    (url,) = serving.urls()
    before = listening_pids("ray/model")
    assert len(before) == 2
    assert {ask(url) for _ in range(30)} == {f"from {number}" for number in before}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(url, "another")

    texts, stderr = generate_answers("ray/model", environment, tmp_path)
    assert "ray/model is already served on the cluster" in stderr
    assert set(texts) == {f"from {number}" for number in before}
    assert len(texts) == 40

    os.kill(min(before), signal.SIGKILL)
    assert wait_until(lambda: answering_pid(url) not in before | {0}, 60)

    code, stderr = serving.end(signal.SIGINT)
    assert code == 0, stderr
    assert stderr.rstrip().endswith("models stopped")
    assert wait_until(lambda: not processes_carrying("served-model-name\0ray/model"))


def test_a_replica_that_hangs_is_replaced_and_its_requests_are_answered(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """It is alive and healthy by /health, but answers no requests."""
    environment = {**cluster, "RLAIF_API_KEY": KEY, "RLAIF_CLIENT_TIMEOUT_S": "3", "RLAIF_CLIENT_MAX_ATTEMPTS": "20"}
    serving = ServeProcess(environment, "--model", "hanging/model", "--replicas", "2")
    (url,) = serving.urls()
    hanging, other = listening_pids("hanging/model")
    os.kill(hanging, signal.SIGUSR2)
    texts, _ = generate_answers("hanging/model", environment, tmp_path)
    assert f"from {other}" in texts
    assert f"from {hanging}" not in texts
    assert len(texts) == 40
    assert wait_until(lambda: len(now := listening_pids("hanging/model")) == 2 and hanging not in now, 60)
    assert other in listening_pids("hanging/model")
    assert wait_until(lambda: {answering_pid(url) for _ in range(30)} == listening_pids("hanging/model"), 60)
    code, stderr = serving.end(signal.SIGINT)
    assert code == 0, stderr


def test_deployed_models_end_with_their_process_even_after_kill_9(cluster: dict[str, str], tmp_path: Path) -> None:
    serving = ServeProcess({**cluster, "RLAIF_API_KEY": KEY}, "--model", "held/model", "--replicas", "1")
    serving.urls()
    assert len(listening_pids("held/model")) == 1
    assert serving.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert wait_until(lambda: not processes_carrying("served-model-name\0held/model"), 90)


def test_a_detached_model_stays_until_it_is_taken_down(cluster: dict[str, str]) -> None:
    environment = {**cluster, "RLAIF_API_KEY": KEY}
    serving = ServeProcess(environment, "--model", "left/model", "--replicas", "1", "--detach")
    (url,) = serving.urls()
    serving.process.communicate(timeout=60)
    assert serving.process.returncode == 0
    assert ask(url) == f"from {min(listening_pids('left/model'))}"
    done = subprocess.run(
        command("serve", "--model", "left/model", "--stop"), env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("stopped: left-model-"), done.stderr
    assert wait_until(lambda: not processes_carrying("served-model-name\0left/model"))


def test_a_model_that_does_not_start_is_reported_with_its_reason(cluster: dict[str, str], tmp_path: Path) -> None:
    """The run then leaves no process behind."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "hello"}])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rlaif.toml").write_text('[cluster]\nbackend = "ray"\nreplicas = 1\n')
    done = subprocess.run(
        command("generate", tmp_path / "run", "--prompts", prompts, "--model", "bad/model"),
        env=cluster,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Ray could not serve bad/model: " in done.stderr
    assert "We couldn't connect to 'https://huggingface.co'" in done.stderr
    assert "Traceback" not in done.stderr
    assert wait_until(lambda: not processes_carrying("served-model-name\0bad/model"))


def test_an_unreachable_cluster_is_reported(tmp_path: Path) -> None:
    needs("ray")
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(command("serve", "--model", "m"), env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "127.0.0.1:9: the Ray cluster is unreachable" in done.stderr
    assert "RAY_ADDRESS" in done.stderr


OPTIONS = {"tensor-parallel-size": 4, "pipeline_parallel_size": 2, "max_num_seqs": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"replicas": 3}, {"num_replicas": 3, "autoscaling": None}),
        ({}, {"num_replicas": 5, "autoscaling": None}),
        ({"replicas": 2, "max_replicas": 6}, {"num_replicas": None, "autoscaling": (2, 6, 10)}),
        ({"max_replicas": 2}, {"num_replicas": None, "autoscaling": (1, 2, 32)}),
    ],
)
def test_replicas_scaling_and_gpus_follow_the_configuration(config: dict[str, Any], expected: dict[str, Any]) -> None:
    needs("ray")
    model = ServedModel("some/Model", OPTIONS)
    assert model.gpus == 8
    assert model.application_name.startswith("some-model-")
    assert model.application_name == ServedModel("some/Model", dict(reversed(OPTIONS.items()))).application_name
    assert model.application_name != ServedModel("some/Model", {**OPTIONS, "max_num_seqs": 8}).application_name
    application = build_application(model, ClusterConfig(**config, cpus=2), ClientConfig(), model.gpus, replicas=5)
    deployment = application._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 8}
    scaling = deployment._deployment_config.autoscaling_config
    bounds = scaling and (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests)
    assert bounds == expected["autoscaling"]
    if expected["num_replicas"]:
        assert deployment.num_replicas == expected["num_replicas"]


def test_a_missing_ray_is_a_missing_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.serving.ray_cluster.importlib.util.find_spec", lambda name: None)
    with (
        ModelBackends(tmp_path, ClientConfig(), lambda line: None, ClusterConfig(backend="ray")) as backends,
        pytest.raises(MissingDependencyError, match="Ray is not installed") as caught,
    ):
        backends.client_for("m", [], {}, UsageMeter())
    assert install_command("cluster") in str(caught.value)
