"""The ways of training by name. To add one, write a module as :class:`rlaif.train.methods.base.TrainingMethod` says,
and name it here and in ``TrainConfig.method``.
"""

from __future__ import annotations

from rlaif.train.methods import dpo, kto, reward, rloo, sft
from rlaif.train.methods.base import TrainingMethod

BY_NAME: dict[str, TrainingMethod] = {"dpo": dpo, "kto": kto, "reward": reward, "rloo": rloo, "sft": sft}


def get_method(name: str) -> TrainingMethod:
    return BY_NAME[name]
