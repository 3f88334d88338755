"""The night on real parts: a real vLLM, a real judge, a real DPOTrainer. Slow, and the point of the project."""

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
from tests.llm.processes import carrying, until
from tests.real import QUESTIONS, SMALL_CACHE, DemoServer

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1800)]

PROMPTS, SAMPLES, FRESH = 12, 3, 3

SETTINGS = f"""
[prompts]
source = ["FOLDER/prompts.jsonl"]
heldout_share = 0.0
near_duplicates = 0

[sampler]
model = ["demo"]
n = {SAMPLES}
max_tokens = 64

[judge]
model = "demo"

[pairs]
min_probability = 0.5
min_margin = 0.0
min_score = 0.0
tries = 3
test_share = 0.2
human_share = 0.0

[train]
max_steps = 2
batch_size = 2
max_length = 256
merge = false

[evaluate]
source = ["FOLDER/fresh.jsonl"]
drift_samples = 2
"""


@dataclass
class Night:
    """What was seen while the night went on. ``left``: the processes that each step left behind."""

    run: Path
    left: dict[str, dict[int, str]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    killed_with: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)

    def rlaif(self, environment: dict[str, str], *arguments: str | Path) -> None:
        """Run a command that has to succeed, and note what it leaves behind."""
        done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{arguments[0]}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.told[str(arguments[0])] = done.stdout
        self.left[str(arguments[0])] = carrying(str(self.run))


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, demo_server: DemoServer) -> Night:
    """A whole night: generate killed -9 with the vLLM that it started, in the middle of the work, and resumed; the rest
    is one `rlaif run`: judged, reported, trained, evaluated.

    After the kill the base model is asked at the shared server's URL. The evaluation starts a vLLM of its own for the
    trained model and its base.
    """
    needs("vllm")
    folder = tmp_path_factory.mktemp("night")
    run = folder / "run"
    run.mkdir()
    (run / "rlaif.toml").write_text(SETTINGS.replace("FOLDER", str(folder)))
    for name, questions in (("prompts", QUESTIONS[:PROMPTS]), ("fresh", QUESTIONS[-FRESH:])):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": question} for question in questions])
    seen = Night(run)
    own = os.environ | SMALL_CACHE | {"RLAIF_TEST_MARK": str(run)}
    told = run / "stderr"
    with told.open("w") as stderr:
        process = subprocess.Popen(command("generate", run, "--concurrency", "1"), stderr=stderr, env=own)
    journal = run / "journal" / "completions.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.1)
    assert process.poll() is None, told.read_text()
    assert any("vllm" in line for line in carrying(str(run)).values())
    process.kill()
    process.wait()
    until(lambda: not carrying(str(run)), 60)
    seen.left["kill -9"] = carrying(str(run))
    seen.killed_with = read_jsonl(journal)

    shared = demo_server.commands() | SMALL_CACHE | {"RLAIF_TEST_MARK": str(run)}
    seen.rlaif(shared, "generate", run)
    seen.completions = read_jsonl(journal)
    seen.rlaif(shared, "run", run, "--train", "--evaluate", "--pilot", "0")
    seen.rlaif(shared, "status", run)
    return seen


def test_nothing_is_left_behind(night: Night) -> None:
    assert list(night.left) == ["kill -9", "generate", "run", "status"]
    assert not any(night.left.values()), night.left


def test_a_killed_generate_goes_on(night: Night) -> None:
    before, after = night.killed_with, night.completions
    assert 0 < len(before) < PROMPTS * SAMPLES
    assert after[: len(before)] == before
    assert len({line["key"] for line in after}) == len(after) == PROMPTS * SAMPLES
    assert all(line["completion_tokens"] > 0 and line["finish_reason"] in ("stop", "length") for line in after)


def test_a_real_judge_is_asked_in_both_orders(night: Night) -> None:
    verdicts = read_jsonl(night.run / "journal" / "verdicts.jsonl")
    compared = [line for line in verdicts if line["kind"] == "compare"]
    assert {line["order"] for line in compared} == {"ab", "ba"}
    assert {line["aspect"] for line in verdicts if line["kind"] == "rate"} == {
        "instruction_following", "truthfulness", "honesty", "helpfulness",
    }  # fmt: skip
    assert all(line["mass"] > 0.99 for line in verdicts if line["model"])  # held to the verdict words
    assert pl.read_parquet(night.run / "tables" / "pairs.parquet")["p_a"].is_between(0, 1).all()
    assert sum(line["cached_tokens"] for line in verdicts) > 0


def test_the_night_ends_in_a_model(night: Night) -> None:
    assert "report:" in night.told["run"]
    assert (night.run / "report.html").exists()
    assert list((night.run / "model").rglob("adapter_model.safetensors"))
    assert "dataset" in night.told["status"]
    assert (night.run / "manifest.json").exists()


def test_the_trained_model_is_compared_with_its_base(night: Night) -> None:
    """Both are served by one vLLM, the adapter beside its base, and judged by a real model."""
    told = json.loads((night.run / "evaluation" / "evaluation.json").read_text())
    assert told["prompts"] == FRESH
    assert told["wins"] + told["ties"] + told["losses"] + told["without a readable verdict"] == FRESH
    assert told["kl_per_token"]["n"] == 2
    completions = read_jsonl(night.run / "evaluation" / "journal" / "completions.jsonl")
    assert sorted(record["model"] for record in completions) == sorted(["demo", told["trained"]] * FRESH)
    assert (night.run / "log" / "run.log").read_text().count("starting vLLM with ") == 1


def test_the_trainer_takes_the_dataset_as_it_is(night: Night, small: Path, tmp_path: Path) -> None:
    """datasets reads both splits, and TRL's own DPOTrainer takes them, without a column being renamed."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    files = {name: str(night.run / "dataset" / f"{name}.parquet") for name in ("train", "test")
             if pl.read_parquet(night.run / "dataset" / f"{name}.parquet").height}  # fmt: skip
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(loaded["train"].column_names)
    assert loaded["train"][0]["chosen"][0]["role"] == "assistant"
    arguments = DPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, max_length=128,
                          use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)  # fmt: skip
    trainer = DPOTrainer(str(small), args=arguments, train_dataset=loaded["train"])
    assert trainer.train().global_step == 1
