"""What one way of training differs by from another (:class:`TrainingMethod`), and what such modules share.

Everything else (preflight, checkpoints, measuring, writing, the card) is the same for all: :mod:`rlaif.train.trainer`.
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
    """What a trainer trains on. ``sequences_per_row``: how many sequences' worth of a batch one row takes (online
    methods answer a prompt several times). ``extra_identity``: what they were made of besides train.parquet, for the
    training's identity."""

    dataset: Any
    sequences_per_row: int = 1
    extra_identity: Mapping[str, Any] = field(default_factory=dict)


class TrainingMethod(Protocol):
    """One way of training, as a module."""

    display_name: str
    trainer_class: str
    """TRL's class; ``config_class`` is its configuration."""
    config_class: str
    row_unit: str
    """What a row is, in words."""
    head: Head
    """What the trained model gives: tokens, or one score."""
    drops_overlong_pairs: bool
    """Whether TRL leaves a pair out that is longer than max_length. Else it cuts the end of an answer, and leaves out
    only what has none left."""
    default_learning_rates: tuple[float, float]
    """Learning rates where none is given: of an adapter, of all weights."""
    trl_fields: Mapping[str, str]
    """TRL's names for what has its own setting under [train]."""

    def config_kwargs(self, train: TrainConfig) -> dict[str, Any]:
        """The method's own keyword arguments of TRL's configuration."""

    def trainer_kwargs(self, train: TrainConfig) -> dict[str, Any]:
        """The method's own keyword arguments of TRL's trainer."""

    def build_dataset(self, frame: pl.DataFrame, run: Run, train: TrainConfig, seed: int) -> TrainerDataset:
        """The rows of the preference dataset as this method's trainer takes them."""

    def describe(self, train: TrainConfig) -> str:
        """The method and its strengths, for the card."""


def resolve_losses(title: str, config: str, train: TrainConfig, default: str) -> list[str]:
    """The losses asked for, checked against those that the installed TRL's ``config`` lists."""
    supported = loss_names(config)
    for name in train.loss:
        if supported and name not in supported:
            raise UsageError(f"TRL has no loss {name!r}. {did_you_mean(name, supported)}", location="train.loss")
    if len(train.loss) > 1 and config != "DPOConfig":
        raise UsageError(f"{title} takes one loss, not {len(train.loss)}", location="train.loss")
    return list(train.loss) or [default]


def loss_names(config: str = "DPOConfig") -> list[str]:
    """The losses of the TRL that is installed, from the help of ``loss_type``; empty where that lists none."""
    import trl

    helps = {
        config_field.name: config_field.metadata.get("help", "")
        for config_field in dataclasses.fields(getattr(trl, config))
    }
    return re.findall(r"`'(\w+)'`", helps.get("loss_type", ""))


def reject_loss(title: str, train: TrainConfig) -> None:
    """Raise :class:`UsageError` where a loss is given to a method that has one only."""
    if train.loss:
        raise UsageError(f"{title} has one loss only", location="train.loss", hint="Leave loss out.")


def preference_dataset(frame: pl.DataFrame) -> Any:
    """The rows as TRL takes them: only the columns that it trains on, so that it does not guess at the others."""
    import polars as pl
    from datasets import Dataset

    plain = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    if all(frame.schema[side] == plain for side in chat_template.SIDES):
        columns = [*chat_template.SIDES, *(["tools"] if "tools" in frame.columns else [])]
        return Dataset.from_polars(frame.select(columns))
    # Turns that differ in their fields: as JSON, so that what one turn lacks does not come back as a null.
    rows = [chat_template.to_chat_turns(row) for row in frame.iter_rows(named=True)]
    texts = frame["tools"] if "tools" in frame.columns else [None] * len(rows)
    return conversation_dataset(
        [{**row, "tools": text} for row, text in zip(rows, texts, strict=True)], chat_template.SIDES
    )


def conversation_dataset(rows: list[dict[str, Any]], sides: Sequence[str], **others: str) -> Any:
    """``rows`` as a dataset: ``sides`` are lists of turns, ``others`` columns by their type, and tools is JSON text."""
    from datasets import Dataset, Features, Json, List, Value

    typed = {name: Value(kind) for name, kind in others.items()}
    features = Features({**{side: List(Json()) for side in sides}, "tools": Value("string"), **typed})
    return Dataset.from_list(rows, features=features)
