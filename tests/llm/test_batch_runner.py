"""The batch API: a job is submitted once, any later command collects it, and only transient failures are sent again."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlaif.config.models import ClientConfig
from rlaif.errors import EndpointError
from rlaif.llm import batch_runner
from rlaif.llm.batch_journal import read_jobs
from rlaif.llm.client import Client
from rlaif.llm.executor import execute_requests
from rlaif.llm.request import Request
from rlaif.llm.stop_reason import StopReason
from rlaif.llm.usage import UsageMeter
from rlaif.run.journal import Journal
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.fake_batch_api import NORMAL_COURSE, BatchServer
from tests.fake_server import Fault, echo
from tests.llm.test_executor import failures, number_of, parse_reply, request, texts

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr(batch_runner, "FIRST_POLL_S", 0.001)
    monkeypatch.setattr(batch_runner, "MAX_POLL_S", 0.002)


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal" / "completions.jsonl"


def run_requests(
    path: Path, url: str, requests: Iterable[Request], usage: UsageMeter | None = None, **config: Any
) -> UsageMeter:
    """Run one command that sends ``requests`` by batch."""
    usage, requests = usage or UsageMeter(), list(requests)

    async def build_requests(_client: Client, _engine: str) -> Iterable[Request]:
        return requests

    with Journal(path) as journal:
        client = ClientConfig(use_batch_api=True, **config)
        execute_requests(lambda: Client("m", [url], client, usage), build_requests, parse_reply, journal, usage)
    return usage


def request_builder(count: int) -> Callable[[Client, str], Any]:
    async def build_requests(_client: Client, _engine: str) -> Iterable[Request]:
        return map(request, range(count))

    return build_requests


def job_states(path: Path) -> list[tuple[str, str | None, str | None, int]]:
    """Return (state, batch, status, answered) of each job."""
    return [(job.state, job.batch, job.status, job.answered) for job in read_jobs(path.with_name("batches.jsonl"))]


def test_answers_by_batch_are_journaled_like_answers_one_by_one(server: BatchServer, path: Path) -> None:
    usage = run_requests(path, server.url, (request(i, copies=2) for i in range(50)))
    assert texts(path) == {f"p{i}": f"answer 1 to: {i}" for i in range(50)}
    assert len(read_jsonl(path)) == 100
    assert server.requests == []
    assert (usage.requests, usage.answers, usage.skipped, usage.failed) == (50, 100, 0, 0)
    assert job_states(path) == [("finished", "batch_0", "completed", 50)]
    first = request(0, copies=2)
    assert server.lines[0]["custom_id"] == first.keys[0]
    assert server.lines[0]["body"] == {**first.body, "model": "m"}
    assert not list((path.parent.parent / "batch").iterdir())
    second_usage = run_requests(path, server.url, (request(i, copies=2) for i in range(50)))
    assert (second_usage.skipped, len(server.batches)) == (100, 1)


def test_jobs_respect_the_limits_of_lines_and_bytes(
    server: BatchServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "MAX_LINES", 7)
    run_requests(path, server.url, map(request, range(20)))
    assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [7, 7, 6]
    assert len(texts(path)) == 20
    monkeypatch.setattr(batch_runner, "MAX_LINES", 1000)
    monkeypatch.setattr(batch_runner, "MAX_BYTES", 1000)
    run_requests(path, server.url, map(request, range(30)))
    sizes = [len(server.files[batch["input_file_id"]]) for batch in list(server.batches.values())[3:]]
    assert all(0 < size <= 1000 for size in sizes)
    assert len(sizes) >= 2
    assert len(texts(path)) == 30


@pytest.mark.parametrize(
    ("course", "fate", "final_statuses"),
    [
        (NORMAL_COURSE, "answer", ["completed"]),
        (["in_progress", "completed"], "answer", ["completed"]),
        (["completed"], "answer", ["completed"]),
        (["validating", "in_progress", "expired"], "expired", ["expired", "completed"]),
        (["in_progress", "finalizing", "expired"], "lost", ["expired", "completed"]),
        (["in_progress", "completed"], 500, ["completed", "completed"]),
        (["in_progress", "completed"], 429, ["completed", "completed"]),
        (["a status of tomorrow", "completed"], "answer", ["completed"]),
    ],
)
def test_only_lines_that_failed_transiently_or_expired_are_sent_again(
    server: BatchServer, path: Path, course: list[str], fate: Any, final_statuses: list[str]
) -> None:
    """A third of the first batch's lines fails, and the second batch contains exactly those."""
    first = True

    def meet(body: dict[str, Any]) -> Any:
        return fate if first and number_of(body) % 3 == 0 else "answer"

    def script(index: int) -> list[str]:
        nonlocal first
        first = index == 0
        return course if first else NORMAL_COURSE

    server.fate, server.script = meet, script
    usage = run_requests(path, server.url, map(request, range(30)))
    assert texts(path) == {f"p{i}": f"answer 0 to: {i}" for i in range(30)}
    assert [status for _, _, status, _ in job_states(path)] == final_statuses
    send_counts = Counter(number_of(line["body"]) for line in server.lines)
    assert send_counts == {i: 1 + (len(final_statuses) == 2 and i % 3 == 0) for i in range(30)}
    assert not failures(path)
    assert usage.failed == 0


def test_lines_that_always_fail_count_as_failed_and_rejected_lines_are_sent_once(
    server: BatchServer, path: Path
) -> None:
    server.fate = lambda body: {0: 400, 1: 500, 2: "expired"}.get(number_of(body), "answer")
    usage = run_requests(path, server.url, map(request, range(10)))
    failed = failures(path)
    assert failed["p0"] == ("endpoint", "HTTP 400: scripted 400")
    assert failed["p1"] == ("endpoint", "HTTP 500: scripted 500")
    assert failed["p2"][1].startswith("batch_expired: This request could not")
    send_counts = Counter(number_of(line["body"]) for line in server.lines)
    assert (send_counts[0], send_counts[1], send_counts[2], send_counts[3]) == (1, 4, 4, 1)
    assert (usage.answers, usage.failures) == (7, {"endpoint": 3})
    server.fate = lambda body: "answer"  # the next command requests them again
    run_requests(path, server.url, map(request, range(10)))
    assert len(texts(path)) == 10


def test_unparsable_answers_are_requested_again_and_then_count_as_failed(server: BatchServer, path: Path) -> None:
    server.answer = lambda body: ["unparsable"] if number_of(body) == 0 else echo(body)
    usage = run_requests(path, server.url, map(request, range(5)))
    assert failures(path) == {"p0": ("unparsable", "no verdict")}
    assert usage.failures == {"unparsable": 1}


def test_a_failed_batch_ends_the_command_with_the_providers_message(server: BatchServer, path: Path) -> None:
    server.script = lambda index: ["validating", "failed"]
    with pytest.raises(EndpointError, match=r"batch_0 failed: Line 3 is not JSON\. \(line 3\)"):
        run_requests(path, server.url, map(request, range(5)))
    assert job_states(path) == [("finished", "batch_0", "failed", 0)]
    server.script = lambda index: NORMAL_COURSE
    run_requests(path, server.url, map(request, range(5)))
    assert len(texts(path)) == 5


def test_a_token_limit_of_the_provider_makes_jobs_smaller(server: BatchServer, path: Path) -> None:
    server.failure = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "line": None}]
    server.script = lambda index: (
        ["failed"]
        if len(server.lines) - sum(batch["request_counts"]["total"] for batch in list(server.batches.values())[:index])
        > 5
        else NORMAL_COURSE
    )
    run_requests(path, server.url, map(request, range(16)))
    assert len(texts(path)) == 16
    assert [batch["status"] for batch in server.batches.values()] == ["failed"] * 3 + ["completed"] * 4


def test_a_cancelled_batch_keeps_its_answers_and_the_rest_is_sent_by_the_next_command(
    server: BatchServer, path: Path
) -> None:
    server.script = lambda index: ["in_progress", "cancelling", "cancelled"] if index == 0 else NORMAL_COURSE
    server.fate = lambda body: "answer" if len(server.batches) > 1 or number_of(body) < 4 else "lost"
    with pytest.raises(EndpointError, match="batch_0 was cancelled"):
        run_requests(path, server.url, map(request, range(10)))
    assert len(texts(path)) == 4
    assert len(server.batches) == 1
    run_requests(path, server.url, map(request, range(10)))
    assert len(texts(path)) == 10
    assert Counter(number_of(line["body"]) for line in server.lines) == {i: 1 if i < 4 else 2 for i in range(10)}


# Interrupted and resumed


class Crash(BaseException):
    """Simulates the end of the process: no code runs after it."""


def test_a_later_command_collects_the_batches_of_a_stopped_one(server: BatchServer, path: Path) -> None:
    server.script = lambda index: ["in_progress"]
    usage = UsageMeter()
    server.fault_at = lambda step: setattr(usage, "deadline", 0.0) if server.step_counts["look"] > 3 else None  # type: ignore[func-returns-value]
    run_requests(path, server.url, map(request, range(10)), usage)
    assert usage.stop_reason() is StopReason.DEADLINE
    assert job_states(path) == [("submitted", "batch_0", "in_progress", 0)]
    assert texts(path) == {}
    server.fault_at = lambda step: None
    server.courses["batch_0"], server.script = ["completed"], lambda index: NORMAL_COURSE
    run_requests(path, server.url, map(request, range(12)))  # two more are pending by now
    assert len(texts(path)) == 12
    assert Counter(number_of(line["body"]) for line in server.lines) == dict.fromkeys(range(12), 1)


@pytest.mark.parametrize("moment", ["upload", "create", "created", "look", "download"])
def test_a_crash_at_any_moment_sends_nothing_twice(
    server: BatchServer, path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The process dies after the provider received a request and before it reads the reply."""
    real = Client.with_retries

    async def dying(self: Client, call: Any) -> Any:
        before = server.step_counts.copy()
        done = await real(self, call)
        if server.step_counts[moment] > before[moment]:
            raise Crash
        return done

    monkeypatch.setattr(Client, "with_retries", dying)
    with pytest.raises(Crash):
        run_requests(path, server.url, map(request, range(10)))
    monkeypatch.setattr(Client, "with_retries", real)
    run_requests(path, server.url, map(request, range(10)))
    assert len(texts(path)) == 10
    assert len(server.batches) == 1
    assert Counter(number_of(line["body"]) for line in server.lines) == dict.fromkeys(range(10), 1)


def test_a_crash_between_two_answers_journals_each_once(
    server: BatchServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, remaining = Journal.append, [4]

    def dying(self: Journal, records: Any) -> None:
        if self.path == path:
            remaining[0] -= 1
            if not remaining[0]:
                raise Crash
        real(self, records)

    monkeypatch.setattr(Journal, "append", dying)
    with pytest.raises(Crash):
        run_requests(path, server.url, map(request, range(10)))
    monkeypatch.setattr(Journal, "append", real)
    assert len(texts(path)) == 3
    run_requests(path, server.url, map(request, range(10)))
    assert len(texts(path)) == 10
    assert len(server.batches) == 1


def test_a_lost_reply_to_create_does_not_create_a_second_batch(server: BatchServer, path: Path) -> None:
    """The connection is cut after the batch is created. rlaif searches the list of batches before it retries."""
    server.fault_at = lambda step: Fault(0) if step == "created" and server.step_counts["created"] == 1 else None
    for i in range(3):  # other batches, so that the list has several pages
        server.batches[f"other_{i}"] = {"id": f"other_{i}", "status": "completed", "metadata": None}
    run_requests(path, server.url, map(request, range(10)))
    assert len([name for name in server.batches if name.startswith("batch")]) == 1
    assert server.step_counts["list"] >= 1
    assert len(texts(path)) == 10


def test_batches_of_other_requests_are_left_with_the_provider(server: BatchServer, path: Path) -> None:
    """Judges of one model, and the rounds of a judge, share a journal and a URL. Only they can parse their replies."""
    server.script = lambda index: ["in_progress"]
    for start in (0, 10):
        usage = UsageMeter()
        server.fault_at = lambda step, usage=usage: setattr(usage, "deadline", 0.0) if step == "look" else None  # type: ignore[misc]
        run_requests(path, server.url, map(request, range(start, start + 10)), usage)
    server.fault_at = lambda step: None
    server.courses["batch_1"] = ["completed"]
    run_requests(path, server.url, map(request, range(10, 20)), UsageMeter(deadline=time.monotonic() + 60))
    assert job_states(path) == [("submitted", "batch_0", "in_progress", 0), ("finished", "batch_1", "completed", 10)]
    server.courses["batch_0"] = ["completed"]
    run_requests(path, server.url, map(request, range(10)))
    assert len(texts(path)) == 20
    assert Counter(number_of(line["body"]) for line in server.lines) == dict.fromkeys(range(20), 1)


def test_an_intent_without_a_batch_is_resolved_by_the_command_that_needs_it(server: BatchServer, path: Path) -> None:
    server.fault_at = lambda step: Fault(400) if step in ("created", "list") else None
    with pytest.raises(EndpointError, match="did not accept a batch"):
        run_requests(path, server.url, map(request, range(5)))
    run_requests(path, server.url, [])
    with pytest.raises(EndpointError, match="list of batches could not be read: HTTP 400"):
        run_requests(path, server.url, map(request, range(5)))
    server.fault_at = lambda step: None
    run_requests(path, server.url, map(request, range(5)))
    assert (len(texts(path)), len(server.batches)) == (5, 1)


def test_a_batch_is_not_collected_if_its_requests_are_answered_already(server: BatchServer, path: Path) -> None:
    server.script, usage = lambda index: ["in_progress"], UsageMeter()
    server.fault_at = lambda step: setattr(usage, "deadline", 0.0) if step == "look" else None  # type: ignore[func-returns-value]
    run_requests(path, server.url, map(request, range(5)), usage)
    with Journal(path) as journal:
        execute_requests(
            lambda: Client("m", [server.url], ClientConfig(), UsageMeter()),
            request_builder(5),
            parse_reply,
            journal,
            UsageMeter(),
        )
    server.fault_at = lambda step: None
    looks = server.step_counts["look"]
    run_requests(path, server.url, map(request, range(5)))
    assert job_states(path) == [("finished", "batch_0", "answered", 0)]
    assert (server.step_counts["look"], len(texts(path))) == (looks, 5)


def test_a_missing_batch_is_kept_until_the_user_deletes_it(server: BatchServer, path: Path) -> None:
    """The key of another account gets the same 404. Other open batches are collected before the error is raised."""
    server.script, usage = lambda index: ["in_progress"], UsageMeter()
    server.fault_at = lambda step: setattr(usage, "deadline", 0.0) if step == "look" else None  # type: ignore[func-returns-value]
    run_requests(path, server.url, map(request, range(5)), usage)
    server.script = lambda index: NORMAL_COURSE
    unknown = Fault(404, body=b'{"error": {"message": "No batch found with id batch_0"}}')
    server.missing = {"batch_0": unknown}
    server.fault_at = lambda step: None
    for _ in range(2):
        with pytest.raises(EndpointError, match=r"batch_0 was not found .*\(HTTP 404: No batch found") as caught:
            run_requests(path, server.url, map(request, range(9)))
    log = path.with_name("batches.jsonl")
    assert str(log) in str(caught.value.hint)
    assert job_states(path) == [("submitted", "batch_0", "not found", 0), ("finished", "batch_1", "completed", 4)]
    assert (len(texts(path)), len(server.batches)) == (4, 2)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"batch_0"' not in line))
    server.batches.pop("batch_0")
    run_requests(path, server.url, map(request, range(9)))
    assert len(texts(path)) == 9
    assert Counter(number_of(line["body"]) for line in server.lines) == {i: 2 if i < 5 else 1 for i in range(9)}


def test_a_key_quoted_by_the_provider_is_redacted(
    server: BatchServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + "secret" * 20)
    reply_with_key = json.dumps({"note": "x" * 80 + " sk-" + "secret" * 20}).encode()
    server.fault_at = lambda step: Fault(200, body=reply_with_key) if step == "upload" else None
    with pytest.raises(EndpointError, match="returned a file without an id") as caught:
        run_requests(path, server.url, map(request, range(5)))
    assert "secret" not in str(caught.value)


FAULTS = [Fault(503), Fault(429, {"Retry-After": "1"}), Fault(0), Fault(200, body=b"<html>")]
STEPS = ["upload", "create", "look", "list", "download"]


# The last fault of "download" is left out: a file may hold anything, as its lines are parsed one by one.
@pytest.mark.parametrize(("failing_step", "fault"), [(step, fault) for step in STEPS for fault in FAULTS][:-1])
def test_transient_faults_of_every_step_are_retried(
    server: BatchServer, path: Path, failing_step: str, fault: Fault
) -> None:
    def fault_at(step: str) -> Fault | None:
        if failing_step == "list" and step == "created" and server.step_counts[step] == 1:
            return Fault(0)  # a lost reply, so that the batches are listed
        return fault if step == failing_step and server.step_counts[step] <= 2 else None

    server.fault_at = fault_at
    run_requests(path, server.url, map(request, range(5)))
    assert len(texts(path)) == 5
    assert len(server.batches) == 1


def test_unreadable_lines_of_a_file_stay_pending(server: BatchServer, path: Path) -> None:
    unreadable = [b"", b"not json\n", b"[]\n", b'{"custom_id": "unknown", "response": null}\n', b'{"custom_id": 7}\n']
    real = server._finish

    def spoil(batch: dict[str, Any]) -> None:
        real(batch)
        if len(server.batches) == 1:
            lines = server.files[batch["output_file_id"]].splitlines(keepends=True)
            server.files[batch["output_file_id"]] = b"".join(
                [*unreadable, *lines[:3], lines[4], lines[4], lines[3][:40]]
            )

    server._finish = spoil  # type: ignore[method-assign]
    run_requests(path, server.url, map(request, range(5)))
    assert len(texts(path)) == 5
    assert sum(Counter(number_of(line["body"]) for line in server.lines).values()) == 6


def test_an_endpoint_without_a_batch_api_is_reported(path: Path) -> None:
    from tests.fake_server import ScriptedServer

    with (
        ScriptedServer() as plain,
        pytest.raises(EndpointError, match="batch API did not accept a file") as caught,
    ):
        run_requests(path, plain.url, map(request, range(5)))
    assert "drop `--batch`" in str(caught.value.hint)


def test_a_budget_is_enforced_before_anything_is_submitted(
    server: BatchServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request costs at most one cent, half of that by batch, and its actual cost is unknown beforehand."""
    monkeypatch.setattr(batch_runner, "request_cost", lambda *_: 0.01)
    monkeypatch.setattr("rlaif.llm.client.request_cost", lambda *_: 0.004)
    usage = run_requests(path, server.url, map(request, range(100)), UsageMeter(budget_usd=0.05))
    assert server.batches["batch_0"]["request_counts"]["total"] == 10
    assert usage.cost_usd == pytest.approx(len(texts(path)) * 0.002)
    assert 10 < len(texts(path)) < 26
    assert usage.cost_usd <= 0.05
    assert usage.stop_reason() is StopReason.NEXT_BATCH_OVER_BUDGET


def test_a_budget_includes_open_batches(server: BatchServer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command ends while its batch is open. The next one has its own full budget, and that batch to collect."""
    monkeypatch.setattr(batch_runner, "request_cost", lambda *_: 0.01)
    monkeypatch.setattr("rlaif.llm.client.request_cost", lambda *_: 0.01)
    server.script, usage = lambda index: ["in_progress"], UsageMeter(budget_usd=0.05)
    server.fault_at = lambda step: setattr(usage, "deadline", 0.0) if step == "look" else None  # type: ignore[func-returns-value]
    run_requests(path, server.url, map(request, range(100)), usage)
    assert len(server.lines) == 10
    server.fault_at, server.script = lambda step: None, lambda index: NORMAL_COURSE
    server.courses["batch_0"] = ["completed"]
    usage = run_requests(path, server.url, map(request, range(100)), UsageMeter(budget_usd=0.08))
    assert usage.cost_usd == pytest.approx(0.08)
    assert len(server.lines) == len(texts(path)) == 16


def test_an_interrupt_ends_the_polling_and_the_next_start_collects(server: BatchServer, path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tests.llm.test_batch_runner import request, run_requests
run_requests(Path(sys.argv[1]), sys.argv[2], map(request, range(10)))
"""
    server.script = lambda index: ["in_progress"]
    process = subprocess.Popen([sys.executable, "-c", code, path, server.url], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not server.step_counts["look"] and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in stderr
    server.courses["batch_0"] = ["completed"]
    run_requests(path, server.url, map(request, range(10)))
    assert len(texts(path)) == 10
    assert len(server.batches) == 1


# As commands


def test_batches_produce_the_same_dataset_as_single_requests(tmp_path: Path, rlaif: Cli, server: BatchServer) -> None:
    from tests.labeling.test_judging import read_dataset
    from tests.test_faults import json_judge

    server.answer, server.script = json_judge, lambda index: ["completed"]
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(40)])
    runs = {"one": [], "batch": ["--batch"]}
    for name, flags in runs.items():
        common = ["--model", "m", "--base-url", server.url, *flags]
        rlaif("generate", tmp_path / name, "--prompts", source, "-n", "3", *common)
        rlaif("judge", tmp_path / name, "--judge", "helpful", *common)
    assert read_dataset(tmp_path / "one") == read_dataset(tmp_path / "batch")
    assert len(read_dataset(tmp_path / "one")) > 20
    assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [
        len({line["prompt_id"] for line in read_jsonl(tmp_path / "one" / "journal" / "completions.jsonl")}),
        sum(bool(line["model"]) for line in read_jsonl(tmp_path / "one" / "journal" / "verdicts.jsonl")),
    ]


def test_interrupted_batch_runs_produce_the_same_dataset_as_an_uninterrupted_run(
    tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run reaches its deadline while the provider has all prompts, the second while it has all pairs, and the
    third collects. The clock advances by a minute with each poll."""
    from tests.labeling.test_judging import read_dataset
    from tests.orchestrator.test_run_pipeline import run_in_process, write_run
    from tests.test_faults import json_judge

    server.answer = json_judge
    calm = write_run(tmp_path / "calm", server.url, prompts=20)
    run_in_process(calm)
    server.requests.clear()
    real, offset = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + offset[0])

    def advance_clock(step: str) -> None:
        offset[0] += 60.0 * (step == "look")

    rough = write_run(tmp_path / "rough", server.url, prompts=20)
    server.fault_at, server.script = advance_clock, lambda index: ["in_progress"]
    for pending_batch in ("batch_0", "batch_1"):
        result, log_lines = run_in_process(rough, client__use_batch_api=True, run__max_duration="10m")
        assert result.stop_reason
        assert not [line for line in log_lines if line.startswith("pilot")]
        assert list(server.batches)[-1] == pending_batch
        assert read_dataset(rough) == []
        server.courses[pending_batch] = ["completed"]
    result, _ = run_in_process(rough, client__use_batch_api=True)
    assert result.stop_reason is None
    assert list(server.batches) == ["batch_0", "batch_1"]
    assert {body["max_tokens"] for body in server.requests} == {1}  # the probe for token probabilities
    assert read_dataset(rough) == read_dataset(calm)
    assert len(read_dataset(calm)) > 10


class RewardServer(BatchServer):
    """Scores an answer at /classify by its length."""

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        app.router.add_post("/classify", self._classify)

    async def _classify(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return web.json_response({"data": [{"probs": [len(body["messages"][-1]["content"]) / 10]}]})


def test_reward_models_are_called_directly_as_batches_take_chats_only(tmp_path: Path, rlaif: Cli) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "responses": ["short", "a longer one"]}])
    rlaif("generate", tmp_path / "run", "--import", source)
    with RewardServer() as server:
        rlaif(
            "judge",
            tmp_path / "run",
            "--judge",
            "reward",
            "--model",
            "m",
            "--base-url",
            server.url,
            "--batch",
            "--min-confidence",
            "0.5",
            "--min-rating-margin",
            "0",
        )
        assert not server.batches
    verdicts = read_jsonl(tmp_path / "run" / "journal" / "verdicts.jsonl")
    assert sorted(line["score"] for line in verdicts if line["kind"] == "reward") == [0.5, 1.2]


def test_status_shows_open_batches(tmp_path: Path, rlaif: Cli, server: BatchServer) -> None:
    server.script = lambda index: ["in_progress"]
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(5)])
    run = tmp_path / "run"
    arguments = (
        "generate",
        run,
        "--prompts",
        source,
        "--model",
        "m",
        "--base-url",
        server.url,
        "--heldout-fraction",
        "0",
    )
    process = subprocess.Popen([sys.executable, "-m", "rlaif", *map(str, arguments), "--batch"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not server.step_counts["look"] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    (line,) = [line for line in rlaif("status", run).stdout.splitlines() if line.split()[:1] == ["batch"]]
    assert "5 requests" in line
    assert line.endswith("m: batch_0, in_progress")
    batches_json = json.loads(rlaif("status", run, "--json").stdout)["batches"]
    assert batches_json == [
        {"journal": "completions", "model": "m", "batch": "batch_0", "status": "in_progress", "lines": 5}
    ]
    server.courses["batch_0"] = ["completed"]
    rlaif(*arguments, "--batch")
    assert len(read_jsonl(run / "journal" / "completions.jsonl")) == 20
    assert json.loads(rlaif("status", run, "--json").stdout)["batches"] == []


def test_polling_intervals_grow(monkeypatch: pytest.MonkeyPatch, server: BatchServer, path: Path) -> None:
    pauses: list[float] = []

    async def pause(self: Any, seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(batch_runner, "FIRST_POLL_S", 5.0)
    monkeypatch.setattr(batch_runner, "MAX_POLL_S", 300.0)
    monkeypatch.setattr(batch_runner.BatchRunner, "_sleep", pause)
    server.script = lambda index: ["in_progress"] * 15 + ["completed"]
    run_requests(path, server.url, map(request, range(2)))
    assert pauses[0] == 5.0
    assert pauses == sorted(pauses)
    assert pauses[-1] == 300.0
