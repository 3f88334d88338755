"""A reward model from start to end: checks decide pairs, TRL trains on them, and vLLM serves the model as a judge."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.conftest import command, needs, read_jsonl, write_jsonl

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(900)]

SETTINGS = """
[prompts]
heldout_fraction = 0.0
near_duplicate_threshold = 0

[judge.vllm]
max_model_len = 512

[pairs]
human_fraction = 0.0
test_fraction = 0.25

[train]
max_steps = 5
batch_size = 8
max_length = 64
learning_rate = 1e-3
"""
THINGS = ("birds", "rivers", "cities", "songs", "games", "trees", "tools", "fruits", "plays", "stars", "ships", "soups")
ASKS = ("Name two {}.", "Which {} do you like?", "I collect {}. Which should I get?")


def rows(things: tuple[str, ...], *, checked: bool) -> list[dict[str, Any]]:
    """Return prompts with a polite and a rude answer of about the same length, and optionally with checks that
    distinguish them."""
    records: list[dict[str, Any]] = []
    for thing in things:
        for number, ask in enumerate(ASKS):
            answers = [
                f"Thank you for asking about {thing}, with pleasure.",
                f"I could not care less about {thing}, go.",
            ]
            row = {"prompt": ask.format(thing), "responses": answers[:: 1 if number % 2 else -1]}
            records.append(row | ({"checks": [{"kind": "regex", "pattern": "Thank you"}]} if checked else {}))
    return records


@dataclass(frozen=True)
class JudgedRun:
    """The trained model, and a run with other prompts that the model judged."""

    model: Path
    training: dict[str, Any]
    run: Path
    output: str


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> JudgedRun:
    needs("vllm")
    folder = tmp_path_factory.mktemp("reward")

    def rlaif(*arguments: str | Path) -> str:
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, f"{arguments[0]}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def run(name: str, things: tuple[str, ...], checked: bool) -> Path:
        (folder / name).mkdir()
        (folder / name / "rlaif.toml").write_text(SETTINGS)
        rlaif(
            "generate", folder / name, "--import", write_jsonl(folder / f"{name}.jsonl", rows(things, checked=checked))
        )
        return folder / name

    first = run("first", THINGS[:9], checked=True)
    unreachable = ("--model", "m", "--base-url", "http://127.0.0.1:9/v1")  # checks decide, so no model is needed
    rlaif("judge", first, "--judge", "helpful", *unreachable)
    trained = rlaif("train", first, "--method", "reward", "--model", "demo")
    assert f"--method rloo --reward-model {first / 'model' / 'merged'} --output" in trained
    training = json.loads((first / "model" / "training.json").read_text())
    second = run("second", THINGS[9:], checked=False)
    model = first / "model" / "merged"
    output = rlaif("judge", second, "--judge", f"reward@{model}", "--min-confidence", "0.5")
    return JudgedRun(model, training["result"], second, output)


def scored(run: Path) -> list[tuple[list[dict[str, str]], float]]:
    """Return (conversation with the answer, score) of each answer."""
    verdicts = read_jsonl(run / "journal" / "verdicts.jsonl")
    scores = {line["a"]: line["score"] for line in verdicts if line["kind"] == "reward"}
    prompts = {line["prompt_id"]: line["messages"] for line in read_jsonl(run / "journal" / "prompts.jsonl")}
    return [
        ([*prompts[line["prompt_id"]], {"role": "assistant", "content": line["text"]}], scores[line["key"]])
        for line in read_jsonl(run / "journal" / "completions.jsonl")
    ]


def logits(folder: Path, conversations: list[list[dict[str, str]]]) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    values = []
    for messages in conversations:
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            values.append(float(model(**tokens).logits[0, 0]))
    return values


def test_scores_equal_the_models_logits(judged: JudgedRun) -> None:
    conversations, scores = zip(*scored(judged.run), strict=True)
    assert len(scores) == 2 * len(rows(THINGS[9:], checked=False))
    assert all(map(math.isfinite, scores))
    assert list(scores[:6]) == pytest.approx(logits(judged.model, list(conversations[:6])), abs=1e-2)
    assert max(scores) - min(scores) > 0.1


def test_the_model_ranks_answers_to_unseen_prompts(judged: JudgedRun) -> None:
    """Its accuracy on the training's own held-out pairs is high as well."""
    assert judged.training["accuracy_after"]["value"] > 0.9
    assert judged.training["accuracy_after"]["n"] >= 5
    pairs = pl.read_parquet(judged.run / "tables" / "pairs.parquet")
    correct = [row[f"response_{row['preferred']}"].startswith("Thank you") for row in pairs.iter_rows(named=True)]
    assert len(correct) == len(rows(THINGS[9:], checked=False))
    assert sum(correct) >= len(correct) - 1


def test_a_score_difference_becomes_a_probability(judged: JudgedRun) -> None:
    """By the Bradley-Terry model, so that the panel treats a reward model like any other judge."""
    assert "has no exam" in judged.output
    scores = {turns[0]["content"] + turns[-1]["content"]: score for turns, score in scored(judged.run)}
    for row in pl.read_parquet(judged.run / "tables" / "pairs.parquet").iter_rows(named=True):
        question = json.loads(row["prompt"])[0]["content"]
        gap = scores[question + row["response_a"]] - scores[question + row["response_b"]]
        assert row["prob_a"] == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-6)
