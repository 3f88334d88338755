"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), and TRL's other losses on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlaif.config import TrainConfig
from rlaif.errors import UsageError
from rlaif.train import method

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.directory import Run

TITLE = "DPO"
TRAINER = "DPOTrainer"
CONFIG = "DPOConfig"
UNIT = "pairs"
HEAD: method.Head = "language"
WHOLE = False
# DPO moves a model by small steps: TRL's and the DPO paper's 1e-6 for all weights. An adapter starts at zero and has
# to grow, and its own parameters are few, so it takes larger steps; 1e-4 is what was tried, not the best of several.
RATES = (1e-4, 1e-6)
OWN: Mapping[str, str] = {"loss_type": "loss", "beta": "beta"}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def arguments(train: TrainConfig) -> dict[str, Any]:
    losses = method.losses(TITLE, CONFIG, train, "sigmoid")
    if train.extra.get("label_smoothing") and not set(losses) & set(SMOOTHED):
        raise UsageError(
            f"label_smoothing does nothing under the loss {', '.join(losses)}",
            where="train.extra",
            mend=f'Set loss = ["robust"] under [train] (or one of {", ".join(SMOOTHED[1:])}).',
        )
    return {"loss_type": losses, "beta": train.beta}


def keywords(_train: TrainConfig) -> dict[str, Any]:
    return {}


def rows(frame: pl.DataFrame, _run: Run, _train: TrainConfig, _seed: int) -> method.Rows:
    return method.Rows(method.preferences(frame))


def described(train: TrainConfig) -> str:
    return f"DPO, loss {' + '.join(train.loss or ['sigmoid'])}, beta {train.beta:g}"
