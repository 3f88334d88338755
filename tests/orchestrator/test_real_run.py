"""A complete run with a real vLLM, a real judge and a real DPOTrainer. Slow, and the point of the project."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.conftest import command, needs, read_jsonl, write_jsonl
from tests.processes import processes_carrying, wait_until
from tests.real import QUESTIONS, SMALL_CACHE, DemoServer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1800)]

PROMPTS, SAMPLES, FRESH = 12, 3, 6

SETTINGS = f"""
[prompts]
sources = ["FOLDER/prompts.jsonl"]
heldout_fraction = 0.0
near_duplicate_threshold = 0

[sampler]
model = ["demo"]
n = {SAMPLES}
max_tokens = 160

[judge]
model = "demo"

[pairs]
min_confidence = 0.5
min_rating_margin = 0.0
min_chosen_rating = 0.0
max_candidates_per_prompt = 3
test_fraction = 0.2
human_fraction = 0.0

[train]
max_steps = 2
batch_size = 2
max_length = 256
merge = false

[evaluate]
sources = ["FOLDER/fresh.jsonl"]
kl_samples = 2
"""


@dataclass
class OvernightRun:
    """Observations during the run. ``leftover_processes``: processes that outlived each command."""

    run: Path
    leftover_processes: dict[str, dict[int, str]] = field(default_factory=dict)
    stdout_by_command: dict[str, str] = field(default_factory=dict)
    killed_with: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)

    def rlaif(self, environment: dict[str, str], *arguments: str | Path) -> None:
        """Run a command that must succeed, and record its leftover processes."""
        completed = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)
        assert completed.returncode == 0, (
            f"{arguments[0]}: exit {completed.returncode}\n{completed.stdout}\n{completed.stderr}"
        )
        self.stdout_by_command[str(arguments[0])] = completed.stdout
        self.leftover_processes[str(arguments[0])] = processes_carrying(str(self.run))


@pytest.fixture(scope="module")
def overnight(tmp_path_factory: pytest.TempPathFactory, demo_server: DemoServer) -> OvernightRun:
    """Kill -9 a generate in the middle of its work, with the vLLM that it started, and resume it. One `rlaif run` does
    the rest: judge, report, train, evaluate.

    After the kill, the base model is served at the shared server's URL. The evaluation starts its own vLLM for the
    trained model and its base.
    """
    needs("vllm")
    folder = tmp_path_factory.mktemp("overnight")
    run = folder / "run"
    run.mkdir()
    (run / "rlaif.toml").write_text(SETTINGS.replace("FOLDER", str(folder)))
    for name, questions in (("prompts", QUESTIONS[:PROMPTS]), ("fresh", QUESTIONS[-FRESH:])):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": question} for question in questions])
    result = OvernightRun(run)
    environment = os.environ | SMALL_CACHE | {"RLAIF_TEST_MARK": str(run)}
    stderr_path = run / "stderr"
    with stderr_path.open("w") as stderr:
        process = subprocess.Popen(command("generate", run, "--concurrency", "1"), stderr=stderr, env=environment)
    journal = run / "journal" / "completions.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.1)
    assert process.poll() is None, stderr_path.read_text()
    assert any("vllm" in line for line in processes_carrying(str(run)).values())
    process.kill()
    process.wait()
    wait_until(lambda: not processes_carrying(str(run)), 60)
    result.leftover_processes["kill -9"] = processes_carrying(str(run))
    result.killed_with = read_jsonl(journal)

    shared_environment = demo_server.commands() | SMALL_CACHE | {"RLAIF_TEST_MARK": str(run)}
    result.rlaif(shared_environment, "generate", run)
    result.completions = read_jsonl(journal)
    result.rlaif(shared_environment, "run", run, "--train", "--evaluate", "--pilot-prompts", "0")
    result.rlaif(shared_environment, "status", run)
    return result


def test_no_process_is_left_running(overnight: OvernightRun) -> None:
    assert list(overnight.leftover_processes) == ["kill -9", "generate", "run", "status"]
    assert not any(overnight.leftover_processes.values()), overnight.leftover_processes


def test_a_killed_generate_resumes(overnight: OvernightRun) -> None:
    before, after = overnight.killed_with, overnight.completions
    assert 0 < len(before) < PROMPTS * SAMPLES
    assert after[: len(before)] == before
    assert len({line["key"] for line in after}) == len(after) == PROMPTS * SAMPLES
    assert all(line["completion_tokens"] > 0 and line["finish_reason"] in ("stop", "length") for line in after)


def test_a_real_judge_is_asked_in_both_orders(overnight: OvernightRun) -> None:
    verdicts = read_jsonl(overnight.run / "journal" / "verdicts.jsonl")
    compared = [line for line in verdicts if line["kind"] == "compare"]
    assert {line["order"] for line in compared} == {"ab", "ba"}
    assert {line["aspect"] for line in verdicts if line["kind"] == "rate"} == {
        "instruction_following", "truthfulness", "honesty", "helpfulness",
    }  # fmt: skip
    assert all(line["verdict_mass"] > 0.99 for line in verdicts if line["model"])  # constrained to the verdict words
    assert pl.read_parquet(overnight.run / "tables" / "pairs.parquet")["prob_a"].is_between(0, 1).all()
    assert sum(line["cached_tokens"] for line in verdicts) > 0


def test_the_run_ends_with_a_model(overnight: OvernightRun) -> None:
    assert "report:" in overnight.stdout_by_command["run"]
    assert (overnight.run / "report.html").exists()
    assert list((overnight.run / "model").rglob("adapter_model.safetensors"))
    assert "dataset" in overnight.stdout_by_command["status"]
    assert (overnight.run / "manifest.json").exists()


def test_the_evaluation_compares_the_trained_model_with_its_base(overnight: OvernightRun) -> None:
    """One vLLM serves both, the adapter alongside its base, and a real model judges."""
    evaluation = json.loads((overnight.run / "evaluation" / "evaluation.json").read_text())
    completions = read_jsonl(overnight.run / "evaluation" / "journal" / "completions.jsonl")
    cut_off = {record["prompt_id"] for record in completions if record["finish_reason"] != "stop"}
    compared = FRESH - len(cut_off)
    assert evaluation["prompts"] == compared
    outcomes = ("wins", "ties", "losses", "unparsable_verdicts")
    assert sum(evaluation[name] for name in outcomes) == compared
    if compared >= 2:
        assert evaluation["kl_per_token"]["n"] == 2
    assert sorted(record["model"] for record in completions) == sorted(["demo", evaluation["trained"]] * FRESH)
    assert (overnight.run / "log" / "run.log").read_text().count("starting vLLM with ") == 1


def test_the_trainer_accepts_the_dataset_unchanged(overnight: OvernightRun, small: Path, tmp_path: Path) -> None:
    """`datasets` reads both splits and TRL's DPOTrainer accepts them without renamed columns."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    files = {name: str(overnight.run / "dataset" / f"{name}.parquet") for name in ("train", "test")
             if pl.read_parquet(overnight.run / "dataset" / f"{name}.parquet").height}  # fmt: skip
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(loaded["train"].column_names)
    assert loaded["train"][0]["chosen"][0]["role"] == "assistant"
    arguments = DPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, max_length=128,
                          use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)  # fmt: skip
    trainer = DPOTrainer(str(small), args=arguments, train_dataset=loaded["train"])
    assert trainer.train().global_step == 1
