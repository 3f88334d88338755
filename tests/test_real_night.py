"""The night on real parts: a real vLLM, a real judge, a real DPOTrainer. Slow, and the point of the project."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import command, needs, read_jsonl

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1200)]

Cli = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = """
[prompts]
source = ["everyday"]
limit = 8
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
test_share = 0.2
human_share = 0.2

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


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose generate was killed -9 with its managed vLLM in the middle of the work."""
    needs("vllm")
    run = tmp_path_factory.mktemp("night") / "run"
    run.mkdir()
    (run / "rlaif.toml").write_text(SETTINGS)
    environment = dict(os.environ, RLAIF_TEST_MARK=str(run))
    arguments = command("generate", run, "--concurrency", "1")
    told = run / "stderr"
    with told.open("w") as stderr:
        process = subprocess.Popen(arguments, env=environment, stderr=stderr)
    journal = run / "journal" / "completions.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.1)
    assert process.poll() is None, told.read_text()
    assert any("vllm" in line for line in processes_of(run))
    process.kill()
    process.wait()
    yield run


def test_the_whole_night(night: Path, rlaif: Cli, tmp_path: Path) -> None:
    """Killed, resumed, judged by a real model in both orders, trained; every part of the contract is there."""
    environment = dict(os.environ, RLAIF_TEST_MARK=str(night))
    until = time.monotonic() + 60
    while processes_of(night) and time.monotonic() < until:
        time.sleep(0.2)
    assert processes_of(night) == [], "kill -9 of the parent left processes behind"

    before = read_jsonl(night / "journal" / "completions.jsonl")
    assert 0 < len(before) < 24
    rlaif("generate", night, env=environment)
    after = read_jsonl(night / "journal" / "completions.jsonl")
    assert after[: len(before)] == before
    assert len({line["key"] for line in after}) == len(after) == 24
    assert all(line["completion_tokens"] > 0 and line["finish_reason"] in ("stop", "length") for line in after)
    assert processes_of(night) == [], "success left processes behind"

    # Truncated answers do not stand in a pair; with 48 tokens most are, so let them.
    journal = night / "journal" / "completions.jsonl"
    journal.write_text(journal.read_text().replace('"finish_reason":"length"', '"finish_reason":"stop"'))
    rlaif("judge", night, env=environment)
    assert processes_of(night) == []
    verdicts = read_jsonl(night / "journal" / "verdicts.jsonl")
    pairs = pl.read_parquet(night / "tables" / "pairs.parquet")
    compared = [line for line in verdicts if line["kind"] == "compare"]
    assert {line["order"] for line in compared} == {"ab", "ba"}
    assert {line["aspect"] for line in verdicts if line["kind"] == "rate"} == {
        "instruction_following", "truthfulness", "honesty", "helpfulness",
    }  # fmt: skip
    assert all(line["mass"] > 0.99 for line in verdicts if line["model"])  # held to the verdict words
    assert pairs["p_a"].is_between(0, 1).all()
    assert sum(line["cached_tokens"] for line in verdicts) > 0

    import datasets

    files = {name: str(night / "dataset" / f"{name}.parquet") for name in ("train", "test")}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert {"prompt", "chosen", "rejected"} <= set(loaded["train"].column_names)
    assert loaded["train"][0]["chosen"][0]["role"] == "assistant"

    told = rlaif("train", night, env=environment)
    assert "trained on" in told.stdout
    assert list((night / "model").rglob("adapter_model.safetensors"))
    assert "dataset" in rlaif("status", night).stdout
    assert (night / "manifest.json").exists()


def test_the_trainer_takes_the_dataset_as_it_is(night: Path, tmp_path: Path) -> None:
    """TRL's own DPOTrainer, without a column being renamed."""
    if not (night / "dataset" / "train.parquet").exists():
        pytest.fail("the night before this test did not come as far as a dataset")
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from rlaif.llm.demo import demo_checkpoint

    dataset = datasets.load_dataset("parquet", data_files=str(night / "dataset" / "train.parquet"), split="train",
                                    cache_dir=str(tmp_path / "cache"))  # fmt: skip
    arguments = DPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, max_length=128,
                          use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    trainer = DPOTrainer(model, args=arguments, train_dataset=dataset,
                         processing_class=AutoTokenizer.from_pretrained(demo_checkpoint()))  # fmt: skip
    assert trainer.train().global_step == 1
