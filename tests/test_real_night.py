"""The night on real parts: a real vLLM, a real judge, a real DPOTrainer. Slow, and the point of the project."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.conftest import command, needs, read_jsonl

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1200)]

SETTINGS = """
[prompts]
source = ["everyday"]
limit = 12
heldout_share = 0.0

[sampler]
model = ["demo"]
n = 3
max_tokens = 48

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
"""


def processes_of(run: Path) -> list[str]:
    """Command lines of every process (not a zombie) whose environment or command line names ``run``."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(run).encode() in told and state != "Z":
            found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
    return found


@dataclass
class Night:
    """What was seen while the night went on. ``left``: the processes that each step left behind."""

    run: Path
    left: dict[str, list[str]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    killed_with: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)

    def rlaif(self, *arguments: str | Path) -> None:
        """A command that has to succeed, and what it leaves behind."""
        environment = dict(os.environ, RLAIF_TEST_MARK=str(self.run))
        done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{arguments[0]}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.told[str(arguments[0])] = done.stdout
        self.left[str(arguments[0])] = processes_of(self.run)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    """A whole night: generate killed -9 with its managed vLLM in the middle of the work and resumed; the rest is one
    `rlaif run`: judged, reported, trained."""
    needs("vllm")
    run = tmp_path_factory.mktemp("night") / "run"
    run.mkdir()
    (run / "rlaif.toml").write_text(SETTINGS)
    seen = Night(run)
    told = run / "stderr"
    with told.open("w") as stderr:
        process = subprocess.Popen(command("generate", run, "--concurrency", "1"), stderr=stderr,
                                   env=dict(os.environ, RLAIF_TEST_MARK=str(run)))  # fmt: skip
    journal = run / "journal" / "completions.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.1)
    assert process.poll() is None, told.read_text()
    assert any("vllm" in line for line in processes_of(run))
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while processes_of(run) and time.monotonic() < until:
        time.sleep(0.2)
    seen.left["kill -9"] = processes_of(run)
    seen.killed_with = read_jsonl(journal)

    seen.rlaif("generate", run)
    seen.completions = read_jsonl(journal)
    # Truncated answers do not stand in a pair; with 48 tokens most are, so let them.
    journal.write_text(journal.read_text().replace('"finish_reason":"length"', '"finish_reason":"stop"'))
    seen.rlaif("run", run, "--train", "--pilot", "0")
    seen.rlaif("status", run)
    return seen


def test_nothing_is_left_behind(night: Night) -> None:
    assert list(night.left) == ["kill -9", "generate", "run", "status"]
    assert not any(night.left.values()), night.left


def test_a_killed_generate_goes_on(night: Night) -> None:
    before, after = night.killed_with, night.completions
    assert 0 < len(before) < 36
    assert after[: len(before)] == before
    assert len({line["key"] for line in after}) == len(after) == 36
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


def test_the_trainer_takes_the_dataset_as_it_is(night: Night, tmp_path: Path) -> None:
    """datasets reads both splits, and TRL's own DPOTrainer takes them, without a column being renamed."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from rlaif.llm.demo import demo_checkpoint

    files = {name: str(night.run / "dataset" / f"{name}.parquet") for name in ("train", "test")
             if pl.read_parquet(night.run / "dataset" / f"{name}.parquet").height}  # fmt: skip
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(loaded["train"].column_names)
    assert loaded["train"][0]["chosen"][0]["role"] == "assistant"
    arguments = DPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, max_length=128,
                          use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    trainer = DPOTrainer(model, args=arguments, train_dataset=loaded["train"],
                         processing_class=AutoTokenizer.from_pretrained(demo_checkpoint()))  # fmt: skip
    assert trainer.train().global_step == 1
