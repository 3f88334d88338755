"""``rlaif run`` against scripted models: preflight, estimate, deadline, budget, interrupts, training, notification."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from rlaif import api
from rlaif.config.fields import parse_duration_s
from rlaif.config.loader import load
from rlaif.config.models import Config, RunConfig
from rlaif.errors import (
    ConfigMismatchError,
    EndpointError,
    MissingDependencyError,
    RunError,
    TooManyFailuresError,
    UsageError,
)
from rlaif.llm.backends import ModelBackends
from rlaif.llm.client import Client
from rlaif.llm.stop_reason import StopReason
from rlaif.orchestrator import run_limits, run_pipeline, run_preflight, stage_runner, stages
from rlaif.orchestrator.notify import check_notification, notify
from rlaif.orchestrator.run_result import RunResult
from rlaif.planning import run_estimate
from rlaif.run.run import Run
from rlaif.train import checkpoints
from rlaif.train.artifacts import TrainResult, result_as_json
from tests.conftest import command, read_jsonl, write_jsonl
from tests.fake_judge import judge_by, verdict_words
from tests.fake_server import Fault, ScriptedServer
from tests.labeling.test_judging import QuietReporter, goodness, read_dataset

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]


def model(body: dict[str, Any]) -> Any:
    """Answer prompts and judge pairs: both stages at one URL."""
    if "structured_outputs" in body:
        return judge_by(goodness)(body)
    question = body["messages"][-1]["content"]
    return [f"{question} {body['seed'] + i} [{(body['seed'] + i) % 11 / 10}]" for i in range(body.get("n", 1))]


def write_run(path: Path, url: str, *, prompts: int = 60, extra: str = "") -> Path:
    """Create a run directory with its rlaif.toml."""
    path.mkdir(parents=True)
    rows = [{"prompt": f"prompt number {i * 7919}"} for i in range(prompts)]
    source = write_jsonl(path / "prompts.jsonl", rows)
    (path / "rlaif.toml").write_text(f"""
[prompts]
sources = ["{source}"]
[sampler]
model = ["m"]
base_url = ["{url}"]
n = 3
[judge]
panel = ["helpful"]
model = "m"
base_url = ["{url}"]
[client]
concurrency = 8
[run]
pilot_prompts = 8
{extra}""")
    return path


def with_ticking_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Any]:
    """Return ``model`` with a clock that advances by one second per request."""
    real_monotonic, elapsed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real_monotonic() + elapsed[0])

    def answer(body: dict[str, Any]) -> Any:
        elapsed[0] += 1.0
        return model(body)

    return answer


def prompts_answered_and_judged(path: Path) -> tuple[set[str], set[str]]:
    """Return the ids of the answered and of the judged prompts."""
    answers, verdicts = (read_jsonl(path / "journal" / f"{name}.jsonl") for name in ("completions", "verdicts"))
    return {line["prompt_id"] for line in answers}, {line["prompt_id"] for line in verdicts if line["model"]}


def run_in_process(path: Path, **flags: Any) -> tuple[RunResult, list[str]]:
    """Run the pipeline in this process. Returns its result and its log lines."""
    lines: list[str] = []

    class RecordingReporter(QuietReporter):
        def log(self, line: str) -> None:
            lines.append(line)

    result = api.run_pipeline(
        Run(path), load(path, {name.replace("__", "."): value for name, value in flags.items()}), RecordingReporter()
    )
    return result, lines


@pytest.fixture
def undisturbed(serve: Serve, tmp_path: Path) -> list[dict[str, Any]]:
    """Return the dataset of an undisturbed run."""
    path = write_run(tmp_path / "undisturbed", serve(model).url)
    run_in_process(path, run__pilot_prompts=0)
    return read_dataset(path)


class Webhook:
    """A webhook that answers with ``status`` and records what it receives."""

    def __init__(self, status: int = 200) -> None:
        received = self.received = list[dict[str, Any]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-token"

    def __enter__(self) -> Webhook:
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_a_run_generates_and_judges_with_estimate_log_and_notification(
    serve: Serve, tmp_path: Path, rlaif: Cli, undisturbed: list[dict[str, Any]]
) -> None:
    server = serve(model)
    with Webhook() as hook:
        script = tmp_path / "notify.sh"
        script.write_text(f'#!/bin/sh\nprintf "%s|%s" "$1" "$OPENAI_API_KEY" > {tmp_path}/notification\n')
        script.chmod(0o755)
        path = write_run(
            tmp_path / "run", server.url, extra=f'notify_url = "{hook.url}"\nnotify_command = "{script}"\n'
        )
        result = rlaif("run", path, "--for", "1h", env={**os.environ, "OPENAI_API_KEY": "sk-secret"})
    assert read_dataset(path) == undisturbed
    assert len(undisturbed) > 20
    notification = (tmp_path / "notification").read_text()
    assert notification.endswith("report.html|")  # the command does not get the API key
    assert "awaiting review" in notification
    assert f"rlaif run {path}: done in" in notification
    assert [entry["text"] for entry in hook.received] == [notification[:-1]]
    log = (path / "log" / "run.log").read_text()
    positions = [
        log.index(part)
        for part in (
            "===== rlaif run",
            "run started: for 1h",
            "GB of disk space free",
            "serves m",
            "pilot: the first 8 prompts",
            "estimate for",
            "it fits",
            ": done in",
        )
    ]
    assert positions == sorted(positions)
    assert log.count("generate: ") == log.count("judge: helpful") == 2
    assert "train" in result.stdout
    for text in (log, (path / "manifest.json").read_text(), result.stderr):
        assert "secret" not in text
    # A rerun has nothing to ask and changes nothing.
    request_count = len(server.requests)
    rlaif("run", path)
    assert len(server.requests) == request_count
    assert read_dataset(path) == undisturbed


def test_the_estimate_comes_before_the_rest_and_is_kept(serve: Serve, tmp_path: Path) -> None:
    server, at_estimate = serve(model), list[int]()
    path = write_run(tmp_path / "run", server.url)

    class EstimateReporter(QuietReporter):
        def log(self, line: str) -> None:
            if line.startswith("estimate"):
                at_estimate.append(len(server.requests))

    api.run_pipeline(Run(path), load(path, {}), EstimateReporter())
    assert len(at_estimate) == 1
    assert 8 + 8 < at_estimate[0] <= 8 + 3 * 2 * 8 * 3
    assert at_estimate[0] < len(server.requests)
    assert Run(path).manifest()["stages"]["run"]["pilot"]["prompts"] == 8


def test_the_estimate_is_the_scaled_pilot_minus_existing_records() -> None:
    stage = {"requests": 10, "request_wait_s": 20.0, "seconds": 15.0, "request_wall_s": 5.0, "prompt_tokens": 1000,
             "completion_tokens": 500, "cost_usd": 0.5}  # fmt: skip
    pilot = {"prompts": 10, "bytes": 1000, "generate": {**stage, "answers": 40}, "judge": {**stage, "answers": 20}}
    estimate = run_estimate.estimate_remaining(pilot, 100, {"generate": 40, "judge": 20}, concurrency=4)
    # Each stage has 90 pending requests: 2 s each, 4 in flight, and 10 s for the server's start.
    assert estimate.generate.seconds == pytest.approx(90 * 2.0 / 4 + 10)
    assert estimate.judge == estimate.generate
    assert (estimate.total.prompt_tokens, estimate.total.completion_tokens, estimate.total.cost_usd) == (
        18_000,
        9000,
        9.0,
    )
    assert estimate.disk_bytes == pytest.approx(10_000 * 0.9 * run_estimate.DISK_FACTOR)
    assert estimate.fraction_that_fits(55.0, None, 0.0) == pytest.approx(0.5)
    assert estimate.fraction_that_fits(220.0, 3.0, 0.5) == pytest.approx(1 / 3)
    assert estimate.fraction_that_fits(None, None, 0.0) > 1
    assert "it does not fit" in estimate.describe(55.0, 3.0, 0.0)[1]
    assert "33%" in estimate.describe(55.0, 3.0, 0.0)[1]
    assert "it fits" in estimate.describe(500.0, 30.0, 0.25)[1]
    no_work = run_estimate.estimate_remaining(pilot, 100, {"generate": 400, "judge": 300}, concurrency=4)
    assert no_work.total.seconds == no_work.total.cost_usd == no_work.disk_bytes == 0.0
    assert no_work.fraction_that_fits(10.0, 0.0, 0.0) > 1


def test_a_deadline_stops_a_run_and_the_next_start_finishes_it(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[dict[str, Any]]
) -> None:
    """Answers that came before the deadline are judged too, and the second start sends only pending requests."""
    server = serve(with_ticking_clock(monkeypatch))
    path = write_run(tmp_path / "run", server.url)
    result, lines = run_in_process(path, run__max_duration="200s")
    assert any("it does not fit" in line for line in lines)
    assert result.stop_reason is StopReason.DOES_NOT_FIT
    assert 100 < len(server.requests) < 250
    partial = read_dataset(path)
    assert 8 < len(partial) < len(undisturbed)
    second, _ = run_in_process(path)
    assert second.stop_reason is None
    assert read_dataset(path) == undisturbed
    bodies = [json.dumps(body, sort_keys=True) for body in server.requests]
    assert len(bodies) == len(set(bodies))


def test_the_budget_covers_all_starts_of_a_run(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.llm.client.request_cost", lambda *_: 0.01)
    server = serve(model)
    path = write_run(tmp_path / "run", server.url)
    result, lines = run_in_process(path, client__budget_usd=0.6, client__concurrency=1)
    assert result.stop_reason
    assert any("it does not fit: $" in line and "left of the budget" in line for line in lines)
    assert result.cost_usd == pytest.approx(len(server.requests) / 100)
    assert 0.3 < result.cost_usd <= 0.61
    judge_requests = sum("structured_outputs" in body for body in server.requests)
    assert judge_requests > len(server.requests) / 2  # each prompt costs one request to answer and two to judge
    assert len(read_dataset(path)) > 0
    second, _ = run_in_process(path, client__budget_usd=0.6, client__concurrency=1)
    assert second.cost_usd <= 0.62
    assert second.stop_reason is StopReason.BUDGET


@pytest.mark.parametrize(("budget", "seconds"), [(0.8, None), (1.5, None), (100.0, 230)])
def test_free_answers_are_limited_to_what_can_be_judged(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float, seconds: int | None
) -> None:
    """The policy is free, the judge costs one cent per request, and each prompt needs six."""
    monkeypatch.setattr("rlaif.llm.client.request_cost", lambda model, *_: 0.01 if model == "j" else 0.0)
    server = serve(with_ticking_clock(monkeypatch), models=("m", "j"))
    path = write_run(tmp_path / "run", server.url)
    flags = {"run__max_duration": f"{seconds}s"} if seconds else {}
    result, lines = run_in_process(path, client__budget_usd=budget, client__concurrency=1, judge__model="j", **flags)
    assert any("it does not fit" in line for line in lines)
    assert result.stop_reason
    answers, judged = prompts_answered_and_judged(path)
    max_prompts = budget / 0.06 if seconds is None else seconds / 7
    assert 0.5 * max_prompts < len(answers) <= max_prompts + 1
    assert len(judged) > 0.7 * len(answers)
    assert result.cost_usd <= budget + 0.01
    if seconds is None:
        assert result.cost_usd > 0.7 * budget


def test_a_second_start_with_more_prompts_makes_a_new_estimate(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(with_ticking_clock(monkeypatch))
    path = write_run(tmp_path / "run", server.url, prompts=200)
    run_in_process(path, prompts__limit=20, client__concurrency=1)
    request_count = len(server.requests)
    result, lines = run_in_process(path, run__max_duration="150s", client__concurrency=1)
    assert result.stop_reason
    assert any("estimate for 19" in line for line in lines)
    assert any("it does not fit" in line for line in lines)
    answers, judged = prompts_answered_and_judged(path)
    assert len(judged) > 0.7 * len(answers)
    assert 50 < len(server.requests) - request_count < 170
    # A pilot of all prompts also predicts later ones, unless they get another number of answers each.
    few_path = write_run(tmp_path / "few", server.url, prompts=200)
    run_in_process(few_path, prompts__limit=6)
    _, lines = run_in_process(few_path, prompts__limit=100)
    assert any("estimate for 9" in line for line in lines)
    _, lines = run_in_process(few_path, prompts__limit=150, sampler__n=4)
    assert not any("estimate" in line for line in lines)


@pytest.mark.parametrize("pilot", [0, 8])
def test_generate_gets_half_of_time_and_budget_if_the_cost_of_judging_is_unknown(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pilot: int, undisturbed: list[dict[str, Any]]
) -> None:
    """Without a pilot, and if more prompts than a pilot's were already judged."""
    monkeypatch.setattr("rlaif.llm.client.request_cost", lambda *_: 0.01)
    server = serve(with_ticking_clock(monkeypatch))
    for bound in ({"run__max_duration": "80s"}, {"client__budget_usd": 0.8}):
        path = write_run(tmp_path / next(iter(bound)), server.url)
        if pilot:
            run_in_process(path, prompts__limit=3, run__pilot_prompts=0)
        result, lines = run_in_process(path, run__pilot_prompts=pilot, client__concurrency=1, **bound)
        assert not any("estimate" in line for line in lines)
        assert result.stop_reason
        answers, judged = prompts_answered_and_judged(path)
        assert 4 < len(judged) <= len(answers) < 50
    # With enough time and money, one start does everything.
    path = write_run(tmp_path / "ample", server.url)
    result, _ = run_in_process(path, run__pilot_prompts=0, run__max_duration="460s", client__budget_usd=4.6)
    assert result.stop_reason is None
    assert read_dataset(path) == undisturbed


def test_an_interrupted_pilot_is_repeated(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[dict[str, Any]]
) -> None:
    server = serve(with_ticking_clock(monkeypatch))
    path = write_run(tmp_path / "run", server.url)
    real_build = stages.build_dataset

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "build_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(path, client__concurrency=1)
    monkeypatch.setattr(stages, "build_dataset", real_build)
    request_count = len(server.requests)
    _, lines = run_in_process(path, run__max_duration="120s", client__concurrency=1)
    assert any("it does not fit" in line for line in lines)
    answers, judged = prompts_answered_and_judged(path)
    assert len(judged) > 0.7 * len(answers)
    assert 40 < len(server.requests) - request_count < 140
    run_in_process(path)
    assert read_dataset(path) == undisturbed


def test_the_pilot_judges_all_that_it_answers(serve: Serve, tmp_path: Path) -> None:
    """Held-out prompts are among the first ones and do not belong to the pilot."""
    path = with_heldout_prompts(write_run(tmp_path / "run", serve(model).url))
    run_in_process(path, run__pilot_prompts=20)
    pilot = Run(path).manifest()["stages"]["run"]["pilot"]
    assert pilot["generate"]["answers"] == 20 * 3
    assert pilot["judge"]["answers"] == 20 * 6
    # The policy's server start excludes the time of judging.
    assert pilot["generate"]["seconds"] <= Run(path).manifest()["stages"]["generate"]["history"][0]["seconds"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_requests_in_flight_and_notifies_and_the_next_start_resumes(
    serve: Serve, tmp_path: Path, rlaif: Cli, undisturbed: list[dict[str, Any]], signal_number: signal.Signals
) -> None:
    server = serve(model, delay_s=0.1)
    with Webhook() as hook:
        path = write_run(tmp_path / "run", server.url, extra=f'notify_url = "{hook.url}"\n')
        process = subprocess.Popen(command("run", path, "--pilot-prompts", "0"), stderr=subprocess.PIPE, text=True)
        while len(server.requests) < 30:
            time.sleep(0.01)
        process.send_signal(signal_number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted; rerun the same command to resume" in hook.received[0]["text"]
    answers = {line["prompt_id"] for line in read_jsonl(path / "journal" / "completions.jsonl")}
    assert len(answers) == len(server.requests) < 50
    rlaif("run", path)
    assert read_dataset(path) == undisturbed
    bodies = [json.dumps(body, sort_keys=True) for body in server.requests]
    assert len(bodies) == len(set(bodies))


def test_sigterm_while_no_request_is_in_flight_is_an_interrupt(serve: Serve, tmp_path: Path) -> None:
    """While rlaif waits for an endpoint."""
    server = serve(lambda body: Fault(404))
    path = write_run(tmp_path / "run", server.url)
    process = subprocess.Popen(command("run", path), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "retrying in" in line:
            process.send_signal(signal.SIGTERM)
            break
    lines += process.stderr.readlines()
    assert process.wait(30) == 130
    process.stderr.close()
    assert "interrupted" in "".join(lines)


def test_a_stage_waits_for_an_endpoint_that_fails_and_resumes(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(stage_runner, "RETRY_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr("rlaif.llm.retries.retry_delay", lambda _: 0.0)
    request_count = [0]

    def answer(body: dict[str, Any]) -> Any:
        request_count[0] += 1
        return Fault(401) if request_count[0] in (30, 200) else model(body)

    path = write_run(tmp_path / "run", serve(answer).url)
    _, lines = run_in_process(path)
    assert sum("retrying in 0 s" in line for line in lines) == 2
    assert read_dataset(path) == undisturbed


def test_an_endpoint_that_stays_down_ends_the_run_with_its_error(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_runner, "RETRY_WAITS_S", (0.01, 0.01))
    with Webhook() as hook:
        path = write_run(tmp_path / "run", serve(lambda body: Fault(404)).url, extra=f'notify_url = "{hook.url}"\n')
        with pytest.raises(EndpointError, match="no model"):
            run_in_process(path)
    assert "failed: http://127.0.0.1" in hook.received[0]["text"]
    assert Run(path).manifest()["stages"]["run"]["ended"]


def test_an_unexpected_error_is_named_in_log_notification_and_manifest(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(stages, "build_dataset", fail)
    with Webhook() as hook:
        path = write_run(tmp_path / "run", serve(model).url, prompts=10, extra=f'notify_url = "{hook.url}"\n')
        with pytest.raises(ZeroDivisionError):
            run_in_process(path)
    (notification,) = hook.received
    assert "failed: unexpected ZeroDivisionError: a bug" in notification["text"]
    assert notification["text"] in (path / "log" / "run.log").read_text()
    assert Run(path).manifest()["stages"]["run"]["history"][-1]["status"] == notification["status"]


def test_requests_that_keep_failing_cost_their_rows_but_not_the_run(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    server = serve(lambda body: Fault(400) if "47514" in body["messages"][-1]["content"] else model(body))
    path = write_run(tmp_path / "run", server.url)
    stderr = rlaif("run", path, code=3).stderr
    assert "Retrying them once" in stderr
    assert "The run continues without them" in stderr
    assert "3 answers are missing (3 endpoint" in stderr
    assert len(read_dataset(path)) > 20
    rlaif("run", path, "--max-failures", "3")


# Notification


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"notify_url": "http://127.0.0.1:9/secret"}, "the webhook of `notify_url` failed"),
        ({"notify_command": "false"}, "`notify_command` failed with exit code 1"),
        ({"notify_command": "sh -c 'echo no such room >&2; exit 7'"}, "exit code 7: no such room"),
        ({"notify_command": "sh -c 'sleep 60'"}, "`notify_command` failed (TimeoutExpired)"),
        ({"notify_command": "/no/such/thing"}, "`notify_command` failed (FileNotFoundError)"),
    ],
)
def test_a_failed_notification_is_reported_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    monkeypatch.setattr("rlaif.orchestrator.notify.NOTIFY_TIMEOUT_S", 0.3)
    (problem,) = notify(RunConfig(**settings), "done", {})
    assert message in problem
    assert "secret" not in problem


def test_a_webhook_error_includes_its_http_status() -> None:
    with Webhook(status=500) as hook:
        assert notify(RunConfig(notify_url=hook.url), "done", {}) == ["the webhook of `notify_url` failed (500)"]


def test_a_run_whose_notification_fails_is_still_done(serve: Serve, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", serve(model).url, prompts=10, extra='notify_command = "false"\n')
    result, lines = run_in_process(path)
    assert result.build
    assert "warning: `notify_command` failed with exit code 1" in lines


@pytest.mark.parametrize(
    "settings", [{"notify_command": "no-such-program-42"}, {"notify_command": "'unclosed"}, {"notify_url": "file:///x"}]
)
def test_invalid_notification_settings_are_rejected_before_the_run(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError) as raised:
        check_notification(RunConfig(**settings))
    assert raised.value.location == f"run.{next(iter(settings))}"


# Preflight


def test_preflight_rejects_a_run_that_cannot_succeed_before_any_request(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)
    path = write_run(tmp_path / "run", server.url)
    for flags, kind, message in [
        ({"run__min_free_disk_gb": 1e9}, RunError, "min_free_disk_gb"),
        ({"judge__panel": ["helpfull"]}, UsageError, "Did you mean 'helpful'"),
        ({"judge__model": "other"}, EndpointError, "has no model 'other'"),
        ({"judge__base_url": ["http://127.0.0.1:9/v1"]}, EndpointError, "unreachable"),
        ({"sampler__base_url": ["http://127.0.0.1:9/v1", "http://127.0.0.1:9/v2"]}, EndpointError, "unreachable"),
        ({"run__notify_command": "no-such-program-42"}, UsageError, "was not found"),
        ({"judge__vllm": {"max_model_len": 2048}}, UsageError, "vLLM settings"),
        ({"sampler__vllm": {"max_model_len": 2048}}, UsageError, "vLLM settings"),
        ({"client__budget_usd": 1.0}, UsageError, "the price of 'm'"),
    ]:
        monkeypatch.setattr("rlaif.llm.executor.has_known_price", lambda *_: False)
        with pytest.raises(kind, match=message):
            run_in_process(path, **flags)
    monkeypatch.setattr("rlaif.orchestrator.run_preflight.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="--train"):
        run_in_process(path, run__train=True)
    failed_exam = SimpleNamespace(result=SimpleNamespace(status="bad", problems=["it chooses by position"], metrics={}))
    monkeypatch.setattr("rlaif.labeling.judge_exam.latest_exam", lambda *_: failed_exam)
    with pytest.raises(UsageError, match="failed its exam: it chooses by position"):
        run_in_process(path, run__pilot_prompts=0)
    checks_path = write_run(tmp_path / "checks", server.url)
    write_jsonl(checks_path / "prompts.jsonl", [{"prompt": "p", "checks": [{"kind": "regexx"}]}])
    with pytest.raises(UsageError, match="Did you mean 'regex'"):
        run_in_process(checks_path, judge__allow_failed_exam=True)
    assert server.requests == []


def test_servers_without_pending_work_may_be_down(serve: Serve, tmp_path: Path) -> None:
    """The policy's server once all is answered, and the judge's once all is judged."""
    policy, judge = serve(model), serve(model)
    path = write_run(tmp_path / "run", policy.url, prompts=12)
    run_in_process(path, judge__limit=5, judge__base_url=[judge.url])
    unreachable = {"sampler__base_url": ["http://127.0.0.1:9/v1"]}
    run_in_process(path, judge__base_url=[judge.url], **unreachable)
    first_dataset = read_dataset(path)
    assert len(first_dataset) > 5
    request_count = len(policy.requests) + len(judge.requests)
    result, lines = run_in_process(path, judge__base_url=["http://127.0.0.1:9/v1"], **unreachable)
    assert result.stop_reason is None
    assert sum("no work is pending for m" in line for line in lines) == 2
    assert len(policy.requests) + len(judge.requests) == request_count
    assert read_dataset(path) == first_dataset
    with (path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "one more prompt"}\n')
    with pytest.raises(EndpointError, match="unreachable"):
        run_in_process(path, judge__base_url=["http://127.0.0.1:9/v1"])


def test_a_run_starts_if_one_of_several_servers_is_down(serve: Serve, tmp_path: Path) -> None:
    server = serve(model)
    run = write_run(tmp_path / "run", server.url)
    config = load(run, {"sampler.base_url": [server.url, "http://127.0.0.1:9/v1"]}, {})
    lines, _ = run_preflight.preflight(Run(run), config, generates=True)
    assert f"{server.url}: serves m with vLLM" in lines
    assert "http://127.0.0.1:9/v1: unreachable now; rlaif will try it again" in lines


def test_imported_answers_need_no_sampler(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    server = serve(model)
    rows = [{"prompt": f"q{i}", "responses": ["a [0.1]", "b [0.9]"]} for i in range(10)]
    rlaif("generate", tmp_path / "run", "--import", write_jsonl(tmp_path / "rows.jsonl", rows))
    (tmp_path / "run" / "rlaif.toml").write_text(
        f'[judge]\npanel = ["helpful"]\nmodel = "m"\nbase_url = ["{server.url}"]\n'
    )
    rlaif("run", tmp_path / "run")
    assert len(read_dataset(tmp_path / "run")) == 9
    assert all(verdict_words(body) for body in server.requests)


def test_a_dry_run_includes_judging(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    """Prompts without answers count with the largest possible number of requests, others with the pending ones."""
    server = serve(model)
    path = write_run(tmp_path / "run", server.url, prompts=40)
    config = Run(path), load(path, {"sampler.max_tokens": 20, "prompts.limit": 20})
    plan = api.plan_run(*config)
    stderr = rlaif("run", path, "--dry-run", "--limit", "20", "--evaluate").stderr
    assert server.requests == []
    assert "at most 140 calls" in stderr  # each prompt costs one request to answer and six to judge
    assert "omits the evaluation" in stderr
    assert (plan.calls, plan.prompts, plan.at_most) == (140, 20, True)
    run_in_process(path, prompts__limit=20, sampler__max_tokens=20)
    assert len(server.requests) == 140
    expected_tokens = sum(len(json.dumps(body["messages"])) for body in server.requests) // 4
    assert expected_tokens < plan.prompt_tokens < 2 * expected_tokens
    assert api.plan_run(*config).summary().startswith("nothing is pending")
    more = api.plan_run(Run(path), load(path, {"sampler.max_tokens": 20, "prompts.limit": 30}))
    assert more.calls == 7 * more.prompts > 50


def test_a_dry_run_of_imported_answers_includes_judging(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    rows = [{"prompt": f"q{i}", "responses": ["a [0.1]", "b [0.9]"]} for i in range(10)]
    rlaif("generate", tmp_path / "run", "--import", write_jsonl(tmp_path / "rows.jsonl", rows))
    (tmp_path / "run" / "rlaif.toml").write_text('[judge]\npanel = ["helpful"]\nmodel = "m"\n')
    assert "at most 20 calls" in rlaif("run", tmp_path / "run", "--dry-run").stderr


def test_the_lock_is_held_between_the_stages(serve: Serve, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", serve(model).url, prompts=10)
    errors = []

    class LockReporter(QuietReporter):
        def log(self, line: str) -> None:
            try:
                with Run(path).lock():
                    raise AssertionError(f"not locked at: {line}")
            except RunError as error:
                errors.append(str(error))

    api.run_pipeline(Run(path), load(path, {}), LockReporter())
    assert len(errors) >= 4
    assert all("locked by process" in message for message in errors)
    with Run(path).lock():
        pass


@pytest.mark.parametrize(
    ("until", "duration", "hours"),
    [
        ("07:00", None, 9.5),
        ("22:00", None, 0.5),
        ("21:30", None, 24.0),
        ("7:15", "8h", 8.0),
        ("22:00", "8h", 0.5),
        (None, "1h30m", 1.5),
        (None, "90m", 1.5),
        (None, "5400s", 1.5),
        (None, "1.5h", 1.5),
        (None, None, None),
    ],
)
def test_the_earlier_of_two_deadlines_counts(until: str | None, duration: str | None, hours: float | None) -> None:
    now = datetime.datetime(2026, 11, 24, 21, 30)
    seconds = run_estimate.seconds_to_deadline(RunConfig(until=until, max_duration=duration), now)
    assert seconds == (None if hours is None else pytest.approx(hours * 3600))


def test_a_deadline_across_a_clock_change_follows_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        seconds = run_estimate.seconds_to_deadline(RunConfig(until="07:00"), datetime.datetime(2026, 10, 24, 22, 0))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert seconds == 10 * 3600


@pytest.mark.parametrize("text", ["", "8", "h", "8 hours", "-1h", "0h", "8h8h", "1e3s", "tomorrow"])
def test_invalid_durations_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|more than 0"):
        parse_duration_s(text)


# Training


def test_training_stops_at_the_deadline(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the training code catches every Exception."""

    def train(*_: Any, **__: Any) -> None:
        for _ in range(2000):
            with contextlib.suppress(Exception):
                time.sleep(0.01)
        raise AssertionError("the deadline did not stop the training")

    real_train = run_pipeline._Pipeline._train

    def train_with_near_deadline(self: run_pipeline._Pipeline) -> None:
        self.limits.deadline = time.monotonic() + 0.3
        real_train(self)

    monkeypatch.setattr(run_pipeline._Pipeline, "_train", train_with_near_deadline)
    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(run_preflight.importlib.util, "find_spec", lambda name: True)
    path = write_run(tmp_path / "run", serve(model).url, prompts=10, extra="train = true\n")
    result, lines = run_in_process(path, run__max_duration="1h")
    assert result.stop_reason is StopReason.DEADLINE
    assert any("the deadline stopped the training" in line for line in lines)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_training_on_more_rows_starts_over(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer claims its folder as TRL's does, and leaves a checkpoint even if it is interrupted."""
    resumed = list[bool]()

    def train(run: Run, config: Config, *, log: Any) -> TrainResult:
        digest = hashlib.sha256((run.dataset / "train.parquet").read_bytes()).hexdigest()
        identity = {"dataset": digest, "model": "m", "epochs": config.train.epochs}
        folder = run.model / "checkpoints"
        checkpoints.claim_dir(folder, identity, ("epochs",), overwrite=config.train.overwrite)
        resumed.append((folder / "checkpoint-1").exists())
        (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        if is_interrupted:
            raise run_limits.DeadlineReached
        result = TrainResult(run.model, None, None, pairs=1, steps=1, seconds=1.0, loss=None)
        checkpoints.write_json(run.model / "training.json", {"identity": identity, "result": result_as_json(result)})
        return result

    monkeypatch.setattr("rlaif.train.trainer.train", train)
    monkeypatch.setattr(run_preflight.importlib.util, "find_spec", lambda name: True)
    path = write_run(tmp_path / "run", serve(model).url, extra="train = true\n")
    cases = [  # number of prompts, is the training interrupted, does it resume, expected log line
        (20, True, False, None),
        (20, False, True, None),
        (30, True, False, "finished.*: training starts over"),
        (30, True, True, None),
        (40, True, False, "interrupted.*: training starts over"),
        (40, False, True, None),
        (40, False, True, None),
    ]
    for prompts, is_interrupted, resumes, line in cases:
        result, lines = run_in_process(path, prompts__limit=prompts)
        assert bool(result.stop_reason) == is_interrupted
        assert resumed[-1] == resumes
        assert any(re.search(line or "starts over", text) for text in lines) == bool(line), line
    # The same rows with other settings are an error.
    with pytest.raises(ConfigMismatchError, match="epochs may only grow"):
        run_in_process(path, prompts__limit=40, train__epochs=0.5)


def test_missing_verdicts_raise_an_error_after_the_last_stage(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda body: ["?"] if "structured_outputs" in body else model(body))
    path = write_run(tmp_path / "run", server.url, prompts=10)
    with pytest.raises(TooManyFailuresError, match="answers are missing"):
        run_in_process(path, run__pilot_prompts=0)
    assert pl.read_parquet(path / "tables" / "pairs.parquet")["outcome"].unique().to_list() == ["unparsable"]


# Evaluation


def fake_training(monkeypatch: pytest.MonkeyPatch, server: ScriptedServer) -> None:
    """Replace training by one that writes an adapter at once, and serve every model at ``server``."""

    def train(run: Run, *_: Any, **__: Any) -> Any:
        adapter = run.model / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_config.json").write_text('{"r": 16}')
        result = TrainResult(run.model, adapter, None, pairs=1, steps=3, seconds=0.1, loss=None)
        (run.model / "training.json").write_text(
            json.dumps({"identity": {"model": "m"}, "result": result_as_json(result)})
        )
        return result

    def client(self: ModelBackends, model: str, urls: Any, options: Any, usage: Any) -> Client:
        server.models = (*server.models, model)
        return Client(model, [server.url], self._config, usage)

    monkeypatch.setattr(ModelBackends, "client_for", client)
    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(run_preflight.importlib.util, "find_spec", lambda name: True)


HELD_OUT = "heldout_fraction = 0.2"
TRAIN_AND_EVALUATE = "train = true\nevaluate = true\n[evaluate]\nkl_samples = 0\n"


def with_heldout_prompts(path: Path) -> Path:
    file = path / "rlaif.toml"
    file.write_text(file.read_text().replace("[sampler]", f"{HELD_OUT}\n[sampler]"))
    return path


def test_a_run_trains_and_evaluates_the_model(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(model)
    path = with_heldout_prompts(write_run(tmp_path / "run", server.url, extra=TRAIN_AND_EVALUATE))
    fake_training(monkeypatch, server)
    result, lines = run_in_process(path, run__max_duration="5h")
    assert result.evaluation is not None
    rate = result.evaluation.win_rate
    assert rate is not None
    assert rate.n > 5
    assert result.evaluation.reference == "m"
    assert result.stop_reason is None
    (estimate,) = (line for line in lines if line.startswith("estimate"))
    assert ", evaluate " in estimate
    assert f"; win rate {rate.value:.2f} [" in lines[-1]
    html = (path / "report.html").read_text()
    assert "evaluate" in html
    assert result.evaluation.trained in html
    # A rerun sends nothing and reports the result again.
    request_count = len(server.requests)
    second, lines = run_in_process(path)
    assert second.evaluation == result.evaluation
    assert len(server.requests) == request_count
    assert any("is already evaluated" in line for line in lines)
    # Other settings under [evaluate] need a new evaluation.
    run_in_process(path, evaluate__limit=5)
    assert json.loads((path / "evaluation" / "evaluation.json").read_text())["stopped"] is None


def test_an_interrupted_evaluation_resumes(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline stops it midway: the clock advances by one second per request."""
    server = serve(model)
    path = with_heldout_prompts(write_run(tmp_path / "run", server.url, extra=TRAIN_AND_EVALUATE))
    fake_training(monkeypatch, server)
    run_in_process(path, run__evaluate=False)
    request_count = len(server.requests)
    server.answer = with_ticking_clock(monkeypatch)
    result, _ = run_in_process(path, run__max_duration="20s", client__concurrency=1)
    assert result.stop_reason is StopReason.DEADLINE
    assert result.evaluation
    assert result.evaluation.stopped == "deadline"
    assert request_count + 10 < len(server.requests) < request_count + 25
    second, _ = run_in_process(path)
    assert second.stop_reason is None
    assert second.evaluation
    assert second.evaluation.stopped is None
    assert second.evaluation.win_rate is not None
    assert result.evaluation.win_rate is not None
    assert second.evaluation.win_rate.n > result.evaluation.win_rate.n > 0
    bodies = [json.dumps(body, sort_keys=True) for body in server.requests]
    assert len(bodies) == len(set(bodies))


def test_an_evaluation_is_paid_from_the_runs_budget(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its expected cost is reserved while the other stages run, and its actual cost counts in the next start."""
    monkeypatch.setattr("rlaif.llm.client.request_cost", lambda *_: 0.01)
    server = serve(model)
    path = with_heldout_prompts(write_run(tmp_path / "run", server.url, extra=TRAIN_AND_EVALUATE))
    fake_training(monkeypatch, server)
    result, lines = run_in_process(path, client__budget_usd=1.0, client__concurrency=1)
    assert any("it does not fit" in line for line in lines)
    assert result.evaluation
    assert result.evaluation.win_rate is not None
    assert result.evaluation.win_rate.n > 5
    assert result.evaluation.stopped is None
    assert result.cost_usd == pytest.approx(len(server.requests) / 100)
    assert result.cost_usd <= 1.01
    eval_cost_usd = sum(record["cost_usd"] for name in ("completions", "verdicts")
                for record in read_jsonl(path / "evaluation" / "journal" / f"{name}.jsonl"))  # fmt: skip
    assert eval_cost_usd > 0.2
    second, lines = run_in_process(
        path, client__budget_usd=round(result.cost_usd, 2), client__concurrency=1, evaluate__limit=500
    )
    assert second.evaluation is None
    assert any("the evaluation is postponed to the next start: the budget of $" in line for line in lines)


def test_an_evaluation_needs_a_finished_training(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(model)
    path = with_heldout_prompts(write_run(tmp_path / "run", server.url, extra=TRAIN_AND_EVALUATE))
    fake_training(monkeypatch, server)

    def reach_deadline(*_: Any, **__: Any) -> None:
        raise run_limits.DeadlineReached

    monkeypatch.setattr(stages, "train", reach_deadline)
    result, lines = run_in_process(path, run__max_duration="5h")
    assert result.evaluation is None
    assert "the evaluation is postponed to the next start: it needs the trained model" in lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"run__train": False}, "no trained model"),
        ({"train__method": "reward"}, "train.method: a reward model"),
        ({"prompts__heldout_fraction": 0.0}, "no prompt was held out"),
        ({"evaluate__judges": ["quality"]}, "none of the judges compares"),
        ({"evaluate__judges": ["helpfull"]}, "Did you mean 'helpful'"),
        ({"train__method": "ppo"}, "train.method: .* verl"),
        ({"train__method": "rloo"}, "a reward model is required"),
    ],
)
def test_an_impossible_evaluation_is_rejected_before_the_run(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], message: str
) -> None:
    server = serve(model)
    path = with_heldout_prompts(write_run(tmp_path / "run", server.url, extra=TRAIN_AND_EVALUATE))
    monkeypatch.setattr(run_preflight.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match=message):
        run_in_process(path, **flags)
    assert server.requests == []
