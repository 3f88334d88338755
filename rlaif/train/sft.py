"""Supervised fine-tuning on the chosen answers, or on any conversations in their place (demonstrations).

The loss is taken over the answers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlaif.config import TrainConfig
from rlaif.train import method, template

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.directory import Run

TITLE = "SFT"
TRAINER = "SFTTrainer"
CONFIG = "SFTConfig"
UNIT = "answers"
HEAD: method.Head = "language"
WHOLE = False
RATES = (2e-4, 2e-5)
OWN: Mapping[str, str] = {"loss_type": "loss"}


def arguments(train: TrainConfig) -> dict[str, Any]:
    return {"loss_type": method.losses(TITLE, CONFIG, train, "nll")[0], "completion_only_loss": True}


def keywords(_train: TrainConfig) -> dict[str, Any]:
    return {}


def rows(frame: pl.DataFrame, _run: Run, _train: TrainConfig, _seed: int) -> method.Rows:
    turns = [template.conversation(row) for row in frame.iter_rows(named=True)]
    tools = frame["tools"] if "tools" in frame.columns else [None] * len(turns)
    made = [
        {"prompt": row["prompt"], "completion": row["chosen"], "tools": text}
        for row, text in zip(turns, tools, strict=True)
    ]
    return method.Rows(method.conversations(made, ("prompt", "completion")))


def described(train: TrainConfig) -> str:
    return f"SFT on the chosen answers, loss {(train.loss or ['nll'])[0]}"
