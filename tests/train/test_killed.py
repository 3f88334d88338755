"""kill -9 in the middle of a training, by each method: the same command goes on to the weights of one never killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Config
from rlaif.run.directory import Run
from rlaif.train import loop
from rlaif.train.writing import TrainResult
from tests.train.test_dpo import LOSS_WITHIN, WEIGHTS_WITHIN, apart, history, weights

pytestmark = pytest.mark.real


def trained(run: Run, settings: dict[str, Any], lines: list[str]) -> TrainResult:
    return loop.train(run, Config.model_validate({"train": settings}), say=lines.append)


@pytest.fixture(scope="module")
def reward_model(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the small model, with a score in place of words."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "reward"
    AutoModelForSequenceClassification.from_pretrained(small, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["dpo", "sft", "kto", "reward", "rloo"])
def test_a_killed_training_goes_on_to_the_same_weights(
    method: str, run: Run, small: Path, reward_model: Path, tmp_path: Path
) -> None:
    from tests.train import killed

    settings = {"method": method, "model": str(small), "batch_size": 4, "max_length": 128, "max_steps": 6,
                "learning_rate": 1e-2, "save_steps": 1, "merge": False, "dtype": "float32"}  # fmt: skip
    if method == "rloo":
        settings |= {"reward_model": str(reward_model), "extra": {"max_completion_length": 8, "num_generations": 2}}
    lines: list[str] = []
    whole = trained(run, {**settings, "output": str(tmp_path / "whole")}, lines)  # more steps than an epoch has

    killed.kill(5, run.path, settings)
    assert not (run.model / "adapter").exists()
    state = run.model / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:1000])  # as a kill in the middle of writing leaves it

    resumed = trained(run, settings, lines)
    assert "checkpoint-4 is incomplete and passed over" in lines
    assert any(line.startswith("going on from step 3 of 6 steps") for line in lines)
    assert (resumed.resumed_from, resumed.steps, whole.steps) == (3, 6, 6)
    losses = [[point["loss"] for point in history(result)] for result in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_WITHIN)
    assert resumed.adapter is not None
    assert whole.adapter is not None
    assert apart(weights(resumed.adapter), weights(whole.adapter)) < WEIGHTS_WITHIN
    assert (resumed.accuracy_before, resumed.accuracy_after, resumed.moved) == (
        whole.accuracy_before, whole.accuracy_after, whole.moved,
    )  # fmt: skip
