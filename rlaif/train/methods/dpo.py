"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), and TRL's other losses on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlaif.config.models import TrainConfig
from rlaif.errors import UsageError
from rlaif.train.methods import base

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.run import Run

display_name = "DPO"
trainer_class = "DPOTrainer"
config_class = "DPOConfig"
row_unit = "pairs"
head: base.Head = "language"
drops_overlong_pairs = False
# For all weights, 1e-6 is the value of TRL and the DPO paper. An adapter needs larger steps, because it has few
# parameters and starts at zero. We tried 1e-4 for it; we did not search for the best value.
default_learning_rates = (1e-4, 1e-6)
trl_fields: Mapping[str, str] = {"loss_type": "loss", "beta": "beta"}
SMOOTHING_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")


def config_kwargs(train: TrainConfig) -> dict[str, Any]:
    losses = base.resolve_losses(display_name, config_class, train, "sigmoid")
    if train.trl.get("label_smoothing") and not set(losses) & set(SMOOTHING_LOSSES):
        raise UsageError(
            f"label_smoothing has no effect with the loss {', '.join(losses)}",
            location="train.trl",
            hint=f'Set loss = ["robust"] under [train] (or one of {", ".join(SMOOTHING_LOSSES[1:])}).',
        )
    return {"loss_type": losses, "beta": train.beta}


def trainer_kwargs(_train: TrainConfig) -> dict[str, Any]:
    return {}


def build_dataset(frame: pl.DataFrame, _run: Run, _train: TrainConfig, _seed: int) -> base.TrainerDataset:
    return base.TrainerDataset(base.preference_dataset(frame))


def describe(train: TrainConfig) -> str:
    return f"DPO, loss {' + '.join(train.loss or ['sigmoid'])}, beta {train.beta:g}"
