"""A run on a local Ray cluster of two real vLLMs, one of which is killed, compared with the same run on one vLLM.

Each prompt has two imported answers and one that the model samples. The verdicts on the imported answers are comparable
between the runs, whatever is sampled.
"""

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

from tests.conftest import command, needs, read_jsonl, write_jsonl
from tests.processes import processes_carrying, wait_until
from tests.real import (
    MIN_SAME_SEED,
    QUESTIONS,
    SMALL_CACHE,
    DemoServer,
    probability_tolerance,
    same_prefix_fraction,
)

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1800)]

CONCURRENCY = 4
SETTINGS = f"""
[prompts]
sources = ["FOLDER/prompts.jsonl"]
heldout_fraction = 0.0
near_duplicate_threshold = 0

[sampler]
model = ["demo"]
n = 1
max_tokens = 64

[judge]
model = "demo"
panel = ["helpful"]

[pairs]
min_confidence = 0.5
max_per_prompt = 3
test_fraction = 0.0
human_fraction = 0.0

[run]
pilot_prompts = 0

[client]
concurrency = {CONCURRENCY}
"""
ON_RAY = '\n[cluster]\nbackend = "ray"\nreplicas = 2\n'
DEMO_RECORD = '"model":"demo"'
TIME_FIELDS = ("created_at", "cached_tokens")
"""Fields of a journal that depend on the time and on what a server had cached."""
SAMPLE_FIELDS = ("text", "finish_reason", "completion_tokens")
JUDGE_FIELDS = ("prob_a", "verdict_mass", "reply")


def servers_of(marker: str) -> dict[int, str]:
    """Return the command lines of the vLLM servers whose processes carry ``marker``, without their supervisors."""
    return {
        n: line
        for n, line in processes_carrying(marker).items()
        if "api_server" in line and "process_supervisor.py" not in line
    }


def journal(run: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the lines by key. Fails if a key occurs twice."""
    lines = read_jsonl(run / "journal" / f"{name}.jsonl")
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: without(line, TIME_FIELDS) for line in lines}


def without(line: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def imported_keys(run: Path) -> set[str]:
    return {key for key, line in journal(run, "completions").items() if line["source"] == "imported"}


@dataclass
class Runs:
    """Both runs. ``killed_at``: number of verdicts by a model at the time when one of two replicas was killed."""

    plain: Path
    ray: Path
    killed_at: int
    log_text: str
    leftover: dict[int, str]
    stopped: tuple[dict[int, str], dict[int, str]]
    """Processes of the shared server before and after its stop."""
    pending: str
    """Dry run of the judge after the run on Ray."""
    tolerance: float
    """Maximum difference of a probability between the two runs."""


def rlaif(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, demo_server: DemoServer) -> Runs:
    needs("vllm")
    needs("ray")
    folder = tmp_path_factory.mktemp("cluster")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    rows = [
        {"prompt": question, "responses": [f"Gladly: {question} That is easy.", "I would rather not."]}
        for question in QUESTIONS
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    for name, more in (("plain", ""), ("ray", ON_RAY)):
        (folder / name).mkdir()
        (folder / name / "rlaif.toml").write_text(SETTINGS.replace("FOLDER", str(folder)) + more)
        rlaif("generate", folder / name, "--import", folder / "rows.jsonl")
    rlaif("run", folder / "plain", env=demo_server.commands())
    key = demo_server.client().api_key.value or "?"
    before, (shared,) = processes_carrying(key), servers_of(key).values()
    demo_server.close()  # the memory is enough for two vLLMs and a training
    stopped = before, processes_carrying(key)

    run = folder / "ray"
    log, verdicts, completions = (
        folder / "output.txt",
        *(run / "journal" / f"{n}.jsonl" for n in ("verdicts", "completions")),
    )
    environment = os.environ | SMALL_CACHE | {"RAY_ADDRESS": "local", "RLAIF_TEST_MARK": str(run)}
    with log.open("w") as log_file:
        process = subprocess.Popen(command("run", run), env=environment, stdout=log_file, stderr=log_file)
    try:
        while process.poll() is None and DEMO_RECORD not in completions.read_text():
            time.sleep(0.05)
        servers = servers_of(str(run))
        assert len(servers) == 2, log.read_text()
        while process.poll() is None and not (verdicts.exists() and DEMO_RECORD in verdicts.read_text()):
            time.sleep(0.01)
        killed_at = verdicts.read_text().count(DEMO_RECORD)
        os.kill(min(servers), signal.SIGKILL)
        assert process.wait(900) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait(120)
    wait_until(lambda: not processes_carrying(str(run)), 60)
    leftover = processes_carrying(str(run))
    (tolerance,) = {probability_tolerance(line) for line in (shared, *servers.values())}
    pending = rlaif("judge", run, "--dry-run").stderr
    return Runs(folder / "plain", run, killed_at, log.read_text(), leftover, stopped, pending, tolerance)


def test_two_replicas_answer_as_one_server_does(runs: Runs) -> None:
    """A seed decides an answer on any replica, as long as its tokens are equally probable there."""
    assert journal(runs.ray, "prompts") == journal(runs.plain, "prompts")
    plain, ray = (journal(run, "completions") for run in (runs.plain, runs.ray))
    assert ray.keys() == plain.keys()
    assert len(ray) == 3 * len(QUESTIONS)
    assert all(without(ray[key], SAMPLE_FIELDS) == without(line, SAMPLE_FIELDS) for key, line in plain.items())
    sampled = [key for key, line in plain.items() if line["model"] == "demo"]
    texts = ([answers[key]["text"] for key in sampled] for answers in (plain, ray))
    assert same_prefix_fraction(*texts) > MIN_SAME_SEED
    assert "serving demo on Ray: 2 x vLLM" in runs.log_text


def test_a_killed_replica_costs_only_time(runs: Runs) -> None:
    """Every verdict occurs once, and those on imported answers equal the ones of the single server."""
    plain, ray = (journal(run, "verdicts") for run in (runs.plain, runs.ray))
    requested = [line for line in ray.values() if line["model"] == "demo"]
    assert 0 < runs.killed_at < len(requested) - CONCURRENCY
    assert "nothing is pending" in runs.pending

    answers = imported_keys(runs.plain)
    of_imported = {key for key, line in plain.items() if {line["a"], line.get("b", line["a"])} <= answers}
    compared = {key for key in of_imported if plain[key]["kind"] == "compare"}
    assert len(compared) == 2 * len(QUESTIONS)
    assert of_imported == {key for key, line in ray.items() if {line["a"], line.get("b", line["a"])} <= answers}
    for key in of_imported:
        assert without(ray[key], JUDGE_FIELDS) == without(plain[key], JUDGE_FIELDS)
    for key in compared:
        assert 0 <= ray[key]["prob_a"] <= 1
        assert ray[key]["prob_a"] == pytest.approx(plain[key]["prob_a"], abs=runs.tolerance)
        assert ray[key]["verdict_mass"] > 0.99  # constrained to the verdict words
    chosen = [line["prob_a"] for key, line in plain.items() if key in compared]
    assert max(chosen) - min(chosen) > 2 * runs.tolerance  # otherwise verdicts would be interchangeable


def test_the_dataset_is_the_same(runs: Runs) -> None:
    """Compares pairs of imported answers, except for the preference in near ties."""
    answers, tables = imported_keys(runs.plain), []
    for run in (runs.plain, runs.ray):
        pairs = pl.read_parquet(run / "tables" / "pairs.parquet")
        dataset = pl.read_parquet(run / "dataset" / "train.parquet")
        by_id = {row["pair_id"]: row for row in pairs.iter_rows(named=True)}
        assert dataset.height
        for row in dataset.iter_rows(named=True):
            pair = by_id[row["pair_id"]]
            better, worse = ("response_a", "response_b") if pair["preferred"] == "a" else ("response_b", "response_a")
            assert (row["chosen"][-1]["content"], row["rejected"][-1]["content"]) == (pair[better], pair[worse])
        tables.append({n: row for n, row in by_id.items() if {row["completion_a"], row["completion_b"]} <= answers})
    plain, ray = tables
    assert len(plain) == len(QUESTIONS)
    assert ray.keys() == plain.keys()
    for pair_id, row in plain.items():
        counterpart = ray[pair_id]
        assert all(counterpart[name] == row[name] for name in ("prompt_id", "prompt", "response_a", "response_b"))
        assert counterpart["prob_a"] == pytest.approx(row["prob_a"], abs=runs.tolerance)
        if abs(row["prob_a"] - 0.5) > runs.tolerance:
            assert counterpart["preferred"] == row["preferred"]


def test_the_cluster_ends_with_the_run(runs: Runs) -> None:
    assert not runs.leftover


def test_a_stopped_server_leaves_no_process(runs: Runs) -> None:
    before, after = runs.stopped
    assert len(before) >= 3  # the supervisor, the API server, the engine
    assert not after
