"""Reward model: one score per answer, trained on the same pairs (Bradley and Terry 1952; Ouyang et al. 2022).

The result is a sequence-classification checkpoint with one label and the base's chat template. It can be used as a
judge of kind reward, and online methods train against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlaif.config.models import TrainConfig
from rlaif.train.methods import base

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.run import Run

display_name = "Reward model"
trainer_class = "RewardTrainer"
config_class = "RewardConfig"
row_unit = "pairs"
head: base.Head = "score"
drops_overlong_pairs = True
default_learning_rates = (1e-4, 1e-5)
trl_fields: Mapping[str, str] = {}


def config_kwargs(train: TrainConfig) -> dict[str, Any]:
    base.reject_loss(display_name, train)
    return {}


def trainer_kwargs(_train: TrainConfig) -> dict[str, Any]:
    return {}


def build_dataset(frame: pl.DataFrame, _run: Run, _train: TrainConfig, _seed: int) -> base.TrainerDataset:
    return base.TrainerDataset(base.preference_dataset(frame))


def describe(_train: TrainConfig) -> str:
    return "reward model, Bradley-Terry loss"
