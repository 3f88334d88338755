"""SIGKILL during a training of each method: a rerun trains the same weights as an uninterrupted training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import Config
from rlaif.run.run import Run
from rlaif.train import trainer
from rlaif.train.artifacts import TrainResult
from tests.train.test_trainer import LOSS_WITHIN, WEIGHTS_WITHIN, apart, history, weights

pytestmark = pytest.mark.real


def train(run: Run, settings: dict[str, Any], lines: list[str]) -> TrainResult:
    return trainer.train(run, Config.model_validate({"train": settings}), log=lines.append)


@pytest.fixture(scope="module")
def reward_model(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a score instead of a language model head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "reward"
    AutoModelForSequenceClassification.from_pretrained(small, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["dpo", "sft", "kto", "reward", "rloo"])
def test_a_killed_training_resumes_to_the_same_weights(
    method: str, run: Run, small: Path, reward_model: Path, tmp_path: Path
) -> None:
    from tests.train import kill_child

    settings = {
        "method": method,
        "model": str(small),
        "batch_size": 4,
        "max_length": 128,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "merge": False,
        "dtype": "float32",
    }
    if method == "rloo":
        settings |= {"reward_model": str(reward_model), "trl": {"max_completion_length": 8, "num_generations": 2}}
    lines: list[str] = []
    uninterrupted = train(
        run, {**settings, "output": str(tmp_path / "uninterrupted")}, lines
    )  # more steps than an epoch has

    kill_child.kill_training(5, run.path, settings)
    assert not (run.model / "adapter").exists()
    state = run.model / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:1000])  # like a kill during the write

    resumed = train(run, settings, lines)
    assert "checkpoint-4 is incomplete and ignored" in lines
    assert any(line.startswith("resuming from step 3 of 6") for line in lines)
    assert (resumed.resumed_from, resumed.steps, uninterrupted.steps) == (3, 6, 6)
    losses = [[point["loss"] for point in history(result)] for result in (resumed, uninterrupted)]
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_WITHIN)
    assert resumed.adapter is not None
    assert uninterrupted.adapter is not None
    assert apart(weights(resumed.adapter), weights(uninterrupted.adapter)) < WEIGHTS_WITHIN
    assert (resumed.accuracy_before, resumed.accuracy_after, resumed.moved) == (
        uninterrupted.accuracy_before,
        uninterrupted.accuracy_after,
        uninterrupted.moved,
    )
