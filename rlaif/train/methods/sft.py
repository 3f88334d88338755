"""Supervised fine-tuning on the chosen answers, or on other conversations in their place (demonstrations).

The loss is computed on the answers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlaif.config.models import TrainConfig
from rlaif.train import chat_template
from rlaif.train.methods import base

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.run import Run

display_name = "SFT"
trainer_class = "SFTTrainer"
config_class = "SFTConfig"
row_unit = "answers"
head: base.Head = "language"
drops_overlong_pairs = False
default_learning_rates = (2e-4, 2e-5)
trl_fields: Mapping[str, str] = {"loss_type": "loss"}


def config_kwargs(train: TrainConfig) -> dict[str, Any]:
    return {"loss_type": base.resolve_losses(display_name, config_class, train, "nll")[0], "completion_only_loss": True}


def trainer_kwargs(_train: TrainConfig) -> dict[str, Any]:
    return {}


def build_dataset(frame: pl.DataFrame, _run: Run, _train: TrainConfig, _seed: int) -> base.TrainerDataset:
    turns = [chat_template.to_chat_turns(row) for row in frame.iter_rows(named=True)]
    tools = frame["tools"] if "tools" in frame.columns else [None] * len(turns)
    examples = [
        {"prompt": row["prompt"], "completion": row["chosen"], "tools": text}
        for row, text in zip(turns, tools, strict=True)
    ]
    return base.TrainerDataset(base.conversation_dataset(examples, ("prompt", "completion")))


def describe(train: TrainConfig) -> str:
    return f"SFT on the chosen answers, loss {(train.loss or ['nll'])[0]}"
