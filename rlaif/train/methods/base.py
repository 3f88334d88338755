"""Interface of a training method (:class:`TrainingMethod`), and functions that several methods share.

Everything else (preflight, checkpoints, measuring, writing, the card) is the same for all methods and in
:mod:`rlaif.train.trainer`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlaif.config.models import TrainConfig
from rlaif.errors import UsageError, did_you_mean
from rlaif.train import chat_template

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.run import Run

Head = Literal["language", "score"]


@dataclass(frozen=True, slots=True)
class TrainerDataset:
    """Training rows for a trainer.

    ``sequences_per_row``: how many sequences of a batch one row takes, because online methods answer a prompt several
    times. ``extra_identity``: fields for the training's fingerprint about data other than train.parquet.
    """

    dataset: Any
    sequences_per_row: int = 1
    extra_identity: Mapping[str, Any] = field(default_factory=dict)


class TrainingMethod(Protocol):
    """A training method: the attributes and functions of its module."""

    display_name: str
    trainer_class: str
    """Name of TRL's trainer class; ``config_class`` is the name of its configuration class."""
    config_class: str
    row_unit: str
    """Plural noun for the rows: pairs or answers."""
    head: Head
    """Output of the trained model: tokens, or one score."""
    drops_overlong_pairs: bool
    """Whether TRL drops pairs longer than max_length. Otherwise it cuts off the end of answers, and drops only pairs
    without an answer left."""
    default_learning_rates: tuple[float, float]
    """Default learning rates: for an adapter, and for all weights."""
    trl_fields: Mapping[str, str]
    """TRL's names for settings that rlaif has itself, with rlaif's names under [train]."""

    def config_kwargs(self, train: TrainConfig) -> dict[str, Any]:
        """Return the method's keyword arguments for TRL's configuration. Raises :class:`UsageError`."""

    def trainer_kwargs(self, train: TrainConfig) -> dict[str, Any]:
        """Return the method's keyword arguments for TRL's trainer. Raises :class:`UsageError`."""

    def build_dataset(self, frame: pl.DataFrame, run: Run, train: TrainConfig, seed: int) -> TrainerDataset:
        """Convert the rows of the preference dataset to this method's training rows."""

    def describe(self, train: TrainConfig) -> str:
        """Return the method with its loss and coefficients, for the model card."""


def resolve_losses(title: str, config: str, train: TrainConfig, default: str) -> list[str]:
    """Return ``train.loss``, or else ``default``. Raises :class:`UsageError` for a loss that TRL's ``config`` lacks."""
    supported = loss_names(config)
    for name in train.loss:
        if supported and name not in supported:
            raise UsageError(f"TRL has no loss {name!r}", location="train.loss", hint=did_you_mean(name, supported))
    if len(train.loss) > 1 and config != "DPOConfig":
        raise UsageError(f"{title} takes one loss, got {len(train.loss)}", location="train.loss")
    return list(train.loss) or [default]


def loss_names(config: str = "DPOConfig") -> list[str]:
    """Return the losses of the installed TRL, read from the help of ``loss_type``; empty if it lists none."""
    import trl

    helps = {
        config_field.name: config_field.metadata.get("help", "")
        for config_field in dataclasses.fields(getattr(trl, config))
    }
    return re.findall(r"`'(\w+)'`", helps.get("loss_type", ""))


def reject_loss(title: str, train: TrainConfig) -> None:
    """Raise :class:`UsageError` if a loss is set for a method that has only one."""
    if train.loss:
        raise UsageError(f"{title} has only one loss", location="train.loss", hint="Remove loss.")


def preference_dataset(frame: pl.DataFrame) -> Any:
    """Convert ``frame`` to a dataset of pairs. Only training columns are kept, because TRL guesses the role of
    others."""
    import polars as pl
    from datasets import Dataset

    plain = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    if all(frame.schema[side] == plain for side in chat_template.SIDES):
        columns = [*chat_template.SIDES, *(["tools"] if "tools" in frame.columns else [])]
        return Dataset.from_polars(frame.select(columns))
    # Turns with different fields: stored as JSON, so that a missing field does not become a null.
    rows = [chat_template.to_chat_turns(row) for row in frame.iter_rows(named=True)]
    texts = frame["tools"] if "tools" in frame.columns else [None] * len(rows)
    return conversation_dataset(
        [{**row, "tools": text} for row, text in zip(rows, texts, strict=True)], chat_template.SIDES
    )


def conversation_dataset(rows: list[dict[str, Any]], sides: Sequence[str], **others: str) -> Any:
    """Convert ``rows`` to a dataset. ``sides``: columns with lists of turns. ``others``: types of further columns, by
    name.

    The column tools has JSON text.
    """
    from datasets import Dataset, Features, Json, List, Value

    typed = {name: Value(kind) for name, kind in others.items()}
    features = Features({**{side: List(Json()) for side in sides}, "tools": Value("string"), **typed})
    return Dataset.from_list(rows, features=features)
