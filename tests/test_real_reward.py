"""A real reward model in a real vLLM, asked through the product: its scores are the model's own logits."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import command, needs, read_jsonl, write_jsonl

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with one label and random weights, and a chat template. vLLM's attention on a CPU knows no heads of
    16; 64 is what the demo model has."""
    needs("vllm")
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from rlaif.llm.demo import demo_checkpoint

    folder = tmp_path_factory.mktemp("model") / "reward"
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    torch.manual_seed(7)
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, num_labels=1,
                        pad_token_id=tokenizer.pad_token_id, initializer_range=0.2)  # fmt: skip
    LlamaForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(folder: Path, conversations: list[list[dict[str, str]]]) -> list[float]:
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    found = []
    for messages in conversations:
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            found.append(float(model(**tokens).logits[0, 0]))
    return found


def test_a_served_reward_model_is_a_seat_of_the_panel(
    reward_model: Path, tmp_path: Path, rlaif: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rows = [{"prompt": f"Name {n} birds.", "responses": [f"A wren. {n}", f"An owl and {n} crows.", "No idea."]}
            for n in (2, 3)]  # fmt: skip
    run = tmp_path / "run"
    rlaif("generate", run, "--import", write_jsonl(tmp_path / "rows.jsonl", rows))
    (run / "rlaif.toml").write_text("[judge.vllm]\nmax_model_len = 512\n")
    asked = command("judge", run, "--judge", f"reward@{reward_model}", "--min-probability", "0.5")
    told = subprocess.run(asked, capture_output=True, text=True, timeout=800)
    assert told.returncode == 0, told.stderr
    assert "has no exam" in told.stderr

    verdicts = read_jsonl(run / "journal" / "verdicts.jsonl")
    scores = {line["a"]: line["score"] for line in verdicts if line["kind"] == "reward"}
    prompts = {line["prompt_id"]: line["messages"] for line in read_jsonl(run / "journal" / "prompts.jsonl")}
    answers = read_jsonl(run / "journal" / "completions.jsonl")
    wanted = logits(
        reward_model,
        [[*prompts[line["prompt_id"]], {"role": "assistant", "content": line["text"]}] for line in answers],
    )
    assert len(scores) == 6
    assert [scores[line["key"]] for line in answers] == pytest.approx(wanted, abs=1e-3)
    assert max(wanted) - min(wanted) > 0.1

    pairs = pl.read_parquet(run / "tables" / "pairs.parquet")
    assert pairs.height == 6
    for row in pairs.iter_rows(named=True):
        gap = scores[row["completion_a"]] - scores[row["completion_b"]]
        assert row["p_a"] == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-6)
