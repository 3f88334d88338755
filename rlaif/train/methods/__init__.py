"""Training methods by name. To add one, write a module with the attributes and functions of
:class:`rlaif.train.methods.base.TrainingMethod`, and add it here and to ``rlaif.config.choices.TrainMethod``.
"""

from __future__ import annotations

from rlaif.train.methods import dpo, kto, reward, rloo, sft
from rlaif.train.methods.base import TrainingMethod

BY_NAME: dict[str, TrainingMethod] = {"dpo": dpo, "kto": kto, "reward": reward, "rloo": rloo, "sft": sft}


def get_method(name: str) -> TrainingMethod:
    """Return the method ``name``. Raises KeyError for ppo, which verl trains."""
    return BY_NAME[name]
