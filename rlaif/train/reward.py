"""A reward model from the same pairs: one score for an answer (Bradley and Terry 1952; Ouyang et al. 2022).

What comes out is a sequence-classification checkpoint with one label and the base's chat template: a judge of kind
reward, and what online methods train against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlaif.config import TrainConfig
from rlaif.train import method

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.directory import Run

TITLE = "Reward model"
TRAINER = "RewardTrainer"
CONFIG = "RewardConfig"
UNIT = "pairs"
HEAD: method.Head = "score"
WHOLE = True
RATES = (1e-4, 1e-5)
OWN: Mapping[str, str] = {}


def arguments(train: TrainConfig) -> dict[str, Any]:
    method.no_loss(TITLE, train)
    return {}


def keywords(_train: TrainConfig) -> dict[str, Any]:
    return {}


def rows(frame: pl.DataFrame, _run: Run, _train: TrainConfig, _seed: int) -> method.Rows:
    return method.Rows(method.preferences(frame))


def described(_train: TrainConfig) -> str:
    return "reward model, Bradley-Terry loss"
