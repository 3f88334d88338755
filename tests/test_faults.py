"""Faults of servers, processes, disk and clock: each run ends with the same dataset as a run without faults."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import TooManyFailuresError
from rlaif.records import Completion, Verdict
from rlaif.report import run_status
from rlaif.run.run import Run
from tests.conftest import command, read_jsonl
from tests.fake_server import Fault, ScriptedServer, echo
from tests.fork_server import ForkServer
from tests.labeling.test_judging import goodness, read_dataset
from tests.orchestrator.test_run_pipeline import model, run_in_process, write_run

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]

FAULTS: dict[str, Any] = {
    "429 with Retry-After": Fault(429, {"Retry-After": "1"}),
    "429 without": Fault(429),
    "500": Fault(500),
    "502": Fault(502, body=b"<html>bad gateway</html>"),
    "a dropped connection": Fault(0),
    "half a body": Fault(
        200, body=b'{"choices": [{"mess', content_length=900, headers={"Content-Type": "application/json"}
    ),
    "binary body": Fault(200, body=b"\x00\xffnot json", headers={"Content-Type": "application/json"}),
    "an empty list of choices": {"choices": []},
    "30 s of silence": Fault(500, delay_s=30.0),
}
# Faults for verdicts only: a sampled answer that is truncated or refuses is a valid answer.
JUDGE_FAULTS: dict[str, Any] = {
    "finish_reason length": {"choices": [{"message": {"content": '{"verdict": "A'}, "finish_reason": "length"}]},
    "a refusal": {"choices": [{"message": {"content": None, "refusal": "I cannot judge."}, "finish_reason": "stop"}]},
}


def json_judge(body: dict[str, Any]) -> Any:
    """Answer as the model of test_run_pipeline, with verdicts as JSON, for an engine without probabilities."""
    if "response_format" not in body:
        return model(body) if "seed" in body else ["A"]
    allowed = body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]["enum"]
    reply = model({**body, "structured_outputs": {"choice": allowed}})
    return [json.dumps({"verdict": reply["choices"][0]["message"]["content"]})]


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


def journals(run: Path) -> dict[str, list[str]]:
    """Return the sorted keys of the answers in each journal, and assert that none is there twice."""
    result = {}
    for name in ("prompts", "completions", "verdicts"):
        rows = read_jsonl(run / "journal" / f"{name}.jsonl")
        keys = sorted(row["key"] for row in rows if "error" not in row)
        assert len(keys) == len(set(keys)), name
        result[name] = keys
    return result


@pytest.mark.parametrize("engine", ["vllm", "other"])
def test_a_run_with_server_faults_gives_the_dataset_of_one_without(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Three of ten requests fail in one of eleven ways, first attempts and retries alike."""
    monkeypatch.setattr("rlaif.llm.retries.retry_delay", lambda _: 0.0)
    taste = model if engine == "vllm" else json_judge
    clean = write_run(tmp_path / "clean", serve(taste, owned_by=engine).url)
    run_in_process(clean)
    chance, fault_counts = random.Random(7), Counter[str]()

    def answer(body: dict[str, Any]) -> Any:
        if chance.random() >= 0.3:
            return taste(body)
        is_judge_request = "seed" not in body
        kind = chance.choice([*FAULTS, *(JUDGE_FAULTS if is_judge_request else ())])
        fault_counts[kind] += 1
        return {**FAULTS, **JUDGE_FAULTS}[kind]

    server = serve(answer, owned_by=engine)
    disturbed = write_run(tmp_path / "disturbed", server.url)
    failed_runs = 0
    while True:
        try:
            run_in_process(disturbed, client__timeout_s=0.5, client__max_attempts=30, client__concurrency=32)
            break
        except TooManyFailuresError:
            failed_runs += 1
            assert failed_runs < 4
    assert set(fault_counts) == {*FAULTS, *JUDGE_FAULTS}
    assert 0.2 < fault_counts.total() / len(server.requests) < 0.4
    assert read_dataset(disturbed) == read_dataset(clean)
    assert len(read_dataset(clean)) > 20
    assert journals(disturbed) == journals(clean)


KILLS = 100


def test_a_hundred_kills_lose_nothing_and_repeat_only_what_was_in_flight(
    serve: Serve, tmp_path: Path, fork_server: ForkServer
) -> None:
    """kill -9 at random moments of generate, judge, the import of labels, their merge and the export."""
    concurrency = 4
    chance = random.Random(11)

    def commands(run: Path) -> dict[str, list[str | Path]]:
        flags = ["--concurrency", str(concurrency)]
        return {
            "generate": ["generate", run, *flags],
            "judge": ["judge", run, *flags],
            "import": ["review", run, "--import", run / "queue.csv", "--annotator", "ann"],
            "merge": ["review", run, "--merge"],
            "export": ["export", run, "--format", "llama-factory", "-o", run / "exported"],
        }

    def label(run: Path, fork_server: ForkServer) -> None:
        assert fork_server.run("review", run, "--export", run / "queue.csv", "--annotator", "ann")[0] == 0
        with (run / "queue.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["choice"] = "left" if goodness(row["left"]) > goodness(row["right"]) else "right"
        with (run / "queue.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def exported(run: Path) -> dict[str, str]:
        return {path.name: path.read_text().replace(str(run), "RUN") for path in sorted((run / "exported").iterdir())}

    clean_server, disturbed_server = serve(model), serve(model, delay_s=0.01)
    clean = write_run(tmp_path / "clean", clean_server.url, extra="[pairs]\nhuman_fraction = 0.5\n")
    disturbed = write_run(tmp_path / "disturbed", disturbed_server.url, extra="[pairs]\nhuman_fraction = 0.5\n")
    kills = Counter[str]()
    for stage, arguments in commands(clean).items():
        if stage == "import":
            label(clean, fork_server)
        assert fork_server.run(*arguments)[0] == 0, stage
    for stage, arguments in commands(disturbed).items():
        if stage == "import":
            label(disturbed, fork_server)
        max_kill_after, attempts = 0.4, 0
        while kills[stage] < KILLS / 5 and attempts < KILLS:
            attempts += 1
            exit_status, seconds = fork_server.run(*arguments, kill_after=chance.uniform(0.0, max_kill_after))
            if exit_status == -9:
                kills[stage] += 1
            else:  # it finished before the kill: later kills must come earlier
                assert exit_status == 0, stage
                max_kill_after = min(max_kill_after, seconds)
            run_status.run_status(Run(disturbed))  # the status can be read at any time
        assert fork_server.run(*arguments)[0] == 0, stage
    assert kills.total() == KILLS
    assert journals(disturbed) == journals(clean)
    reviews = [read_jsonl(run / "journal" / "reviews.jsonl") for run in (clean, disturbed)]
    assert [[row["pair_id"] for row in sorted(rows, key=lambda row: row["pair_id"])] for rows in reviews] == [
        sorted({row["pair_id"] for row in reviews[0]})] * 2  # fmt: skip
    assert read_dataset(disturbed) == read_dataset(clean)
    assert {row["label_source"] for row in read_dataset(clean)} == {"judge", "human"}
    assert exported(disturbed) == exported(clean)
    assert not [path for path in disturbed.rglob(".*") if path.name not in (".lock", ".lock-reviews")]
    repeated = len(disturbed_server.requests) - len(clean_server.requests)
    assert 0 < repeated <= (kills["generate"] + kills["judge"]) * concurrency


# The disk


def stage_commands(run: Path) -> dict[str, list[str | Path]]:
    return {
        "generate": ["generate", run],
        "judge": ["judge", run],
        "merge": ["review", run, "--merge"],
        "export": ["export", run, "--format", "h4", "-o", run / "exported"],
        "run": ["run", run],
    }


def test_a_full_disk_is_reported_in_every_stage_and_the_next_start_finishes(
    serve: Serve, tmp_path: Path, fork_server: ForkServer
) -> None:
    """A real file size limit, reached in the middle of the first file that is too large."""
    run = write_run(tmp_path / "run", serve(model).url, prompts=200)
    failure_counts = Counter[int]()
    for arguments in stage_commands(run).values():
        before = read_dataset(run) if (run / "dataset" / "test.parquet").exists() else None
        for size in (3000, 20_000):
            exit_status, _ = fork_server.run(*arguments, stderr_file=tmp_path / "stderr", file_size=size)
            output = (tmp_path / "stderr").read_text()
            assert "Traceback" not in output
            failure_counts[size] += exit_status
            if exit_status:
                assert exit_status == 1, output
                assert "cannot be written: File too large" in output
                assert str(run) in output
                assert before is None or read_dataset(run) == before
        assert fork_server.run(*arguments)[0] == 0
    assert failure_counts[3000] == 5
    assert failure_counts[20_000] >= 3
    assert len(read_dataset(run)) > 100
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    journals(run)


def test_a_read_only_run_is_reported_in_every_stage(serve: Serve, tmp_path: Path, fork_server: ForkServer) -> None:
    run = write_run(tmp_path / "run", serve(model).url, prompts=10)
    for arguments in stage_commands(run).values():
        for path in (run, *run.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        exit_status, _ = fork_server.run(*arguments, stderr_file=tmp_path / "stderr", powerless=1)
        output = (tmp_path / "stderr").read_text()
        assert exit_status == 1, output
        assert "Permission denied" in output
        assert str(run) in output
        assert "Traceback" not in output
        for path in (run, *run.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        assert fork_server.run(*arguments)[0] == 0


# Clock, concurrency and models


def test_a_clock_that_runs_backwards_changes_nothing(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)
    clean, disturbed = write_run(tmp_path / "clean", server.url), write_run(tmp_path / "disturbed", server.url)
    run_in_process(clean)
    real_time, steps = time.time, [0]

    def backwards() -> float:
        steps[0] += 1
        return real_time() - 60.0 * steps[0]

    monkeypatch.setattr(time, "time", backwards)
    for kind in (Completion, Verdict):
        monkeypatch.setattr(kind.model_fields["created_at"], "default_factory", backwards)
        kind.model_rebuild(force=True)
    try:
        run_in_process(disturbed, run__max_duration="1h")
    finally:
        monkeypatch.undo()
        for kind in (Completion, Verdict):
            kind.model_rebuild(force=True)
    assert steps[0] > 100
    assert read_dataset(disturbed) == read_dataset(clean)
    times = [row["created_at"] for row in read_jsonl(disturbed / "journal" / "verdicts.jsonl")]
    assert times[-1] < times[0] - 1000


def test_two_commands_at_once_do_the_work_once(serve: Serve, tmp_path: Path) -> None:
    """Two commands start together: one is rejected with the process id of the other, which does all the work."""
    server = serve(model, delay_s=0.05)
    run = write_run(tmp_path / "run", server.url)
    processes = [subprocess.Popen(command("run", run), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = {}

    def wait(process: subprocess.Popen[str]) -> None:
        results[process.pid] = (process.communicate(timeout=120)[1], process.returncode)

    threads = [threading.Thread(target=wait, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(code for _, code in results.values()) == [0, 1]
    error_output = next(error for error, code in results.values() if code == 1)
    winner = next(pid for pid, (_, code) in results.items() if code == 0)
    assert f"locked by process {winner}" in error_output
    bodies = [json.dumps(body, sort_keys=True) for body in server.requests]
    assert len(bodies) == len(set(bodies))
    journals(run)


def test_a_judge_that_echoes_gives_no_labels(serve: Serve, tmp_path: Path) -> None:
    """Every verdict is unparsable: the run ends with that error and without labels."""
    run = write_run(tmp_path / "run", serve(echo).url, prompts=10)
    with pytest.raises(TooManyFailuresError, match="unparsable"):
        run_in_process(run)
    assert read_dataset(run) == []
