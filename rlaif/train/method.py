"""What one way of training differs by from another (:class:`Method`), and what such modules share.

Everything else (preflight, checkpoints, measuring, writing, the card) is the same for all: :mod:`rlaif.train.loop`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlaif.config import TrainConfig
from rlaif.errors import UsageError, did_you_mean
from rlaif.train import template

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.directory import Run

Head = Literal["language", "score"]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a trainer trains on. ``each``: how many sequences' worth of a batch one row takes (online methods answer
    a prompt several times). ``deciding``: what they were made of besides train.parquet, for the training's identity."""

    dataset: Any
    each: int = 1
    deciding: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """One way of training, as a module."""

    TITLE: str
    TRAINER: str
    """TRL's class; ``CONFIG`` is its configuration."""
    CONFIG: str
    UNIT: str
    """What a row is, in words."""
    HEAD: Head
    """What the trained model gives: tokens, or one score."""
    WHOLE: bool
    """Whether TRL leaves a pair out that is longer than max_length. Else it cuts the end of an answer, and leaves out
    only what has none left."""
    RATES: tuple[float, float]
    """Learning rates where none is given: of an adapter, of all weights."""
    OWN: Mapping[str, str]
    """TRL's names for what has its own setting under [train]."""

    def arguments(self, train: TrainConfig) -> dict[str, Any]:
        """The method's own keyword arguments of TRL's configuration."""

    def keywords(self, train: TrainConfig) -> dict[str, Any]:
        """The method's own keyword arguments of TRL's trainer."""

    def rows(self, frame: pl.DataFrame, run: Run, train: TrainConfig, seed: int) -> Rows:
        """The rows of the preference dataset as this method's trainer takes them."""

    def described(self, train: TrainConfig) -> str:
        """The method and its strengths, for the card."""


def losses(title: str, config: str, train: TrainConfig, default: str) -> list[str]:
    """The losses asked for, checked against those that the installed TRL's ``config`` lists."""
    known = loss_names(config)
    for name in train.loss:
        if known and name not in known:
            raise UsageError(f"TRL has no loss {name!r}. {did_you_mean(name, known)}", where="train.loss")
    if len(train.loss) > 1 and config != "DPOConfig":
        raise UsageError(f"{title} takes one loss, not {len(train.loss)}", where="train.loss")
    return list(train.loss) or [default]


def loss_names(config: str = "DPOConfig") -> list[str]:
    """The losses of the TRL that is installed, from the help of ``loss_type``; empty where that lists none."""
    import trl

    helps = {each.name: each.metadata.get("help", "") for each in dataclasses.fields(getattr(trl, config))}
    return re.findall(r"`'(\w+)'`", helps.get("loss_type", ""))


def no_loss(title: str, train: TrainConfig) -> None:
    """Raise :class:`UsageError` where a loss is given to a method that has one only."""
    if train.loss:
        raise UsageError(f"{title} has one loss only", where="train.loss", mend="Leave loss out.")


def preferences(frame: pl.DataFrame) -> Any:
    """The rows as TRL takes them: only the columns that it trains on, so that it does not guess at the others."""
    import polars as pl
    from datasets import Dataset

    plain = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    if all(frame.schema[side] == plain for side in template.SIDES):
        columns = [*template.SIDES, *(["tools"] if "tools" in frame.columns else [])]
        return Dataset.from_polars(frame.select(columns))
    # Turns that differ in their fields: as JSON, so that what one turn lacks does not come back as a null.
    rows = [template.conversation(row) for row in frame.iter_rows(named=True)]
    texts = frame["tools"] if "tools" in frame.columns else [None] * len(rows)
    return conversations([{**row, "tools": text} for row, text in zip(rows, texts, strict=True)], template.SIDES)


def conversations(rows: list[dict[str, Any]], sides: Sequence[str], **others: str) -> Any:
    """``rows`` as a dataset: ``sides`` are lists of turns, ``others`` columns by their type, and tools is JSON text."""
    from datasets import Dataset, Features, Json, List, Value

    typed = {name: Value(kind) for name, kind in others.items()}
    features = Features({**{side: List(Json()) for side in sides}, "tools": Value("string"), **typed})
    return Dataset.from_list(rows, features=features)
