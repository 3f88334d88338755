"""The ways of training by name. To add one, write a module as :class:`rlaif.train.method.Method` says, and name it here
and in ``TrainConfig.method``.
"""

from __future__ import annotations

from rlaif.train import dpo, kto, reward, rloo, sft
from rlaif.train.method import Method

BY_NAME: dict[str, Method] = {"dpo": dpo, "kto": kto, "reward": reward, "rloo": rloo, "sft": sft}


def of(name: str) -> Method:
    return BY_NAME[name]
