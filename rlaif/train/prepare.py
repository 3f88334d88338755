"""What can be found out before a model is loaded: parts, rows, template, lengths. A refused training costs nothing."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif.config import Config
from rlaif.errors import MissingPart, UsageError
from rlaif.llm import demo
from rlaif.run.directory import Run
from rlaif.train import known, measure, methods, preflight, settings, template, writing

if TYPE_CHECKING:
    import polars as pl

PARTS = ("torch", "trl", "peft", "accelerate")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A training that passed its preflight: what would be trained on what."""

    model: str
    path: str
    train: pl.DataFrame
    test: pl.DataFrame | None
    digest: str
    kept: float
    """The share of the pairs that max_length leaves in the training, by those that were measured."""
    findings: list[preflight.Finding]
    example: str


def prepare(run: Run, config: Config) -> Prepared:
    """All that can be found out without loading the model. Raises :class:`UsageError` where training is refused."""
    absent = [name for name in PARTS if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingPart(f"{', '.join(absent)} is not installed", mend="Install it: pip install 'rlaif[train]'")
    _require_quantizing(config)
    name = settings.model_name(config)
    findings, train = preflight.check_rows(run.dataset)
    preflight.refuse(findings, where=run.dataset)
    assert train is not None  # refused otherwise
    path = demo.resolve(name)
    tokenizer = writing.tokenizer(name, path)
    whole = methods.of(config.train.method).WHOLE
    found, kept = preflight.check_tokens(train, tokenizer, max_length=config.train.max_length, whole=whole)
    findings += found
    findings += known.check(run, config.train)
    preflight.refuse(findings, where=run.dataset)
    digest = hashlib.sha256((run.dataset / "train.parquet").read_bytes()).hexdigest()
    test = _read_test(run.dataset / "test.parquet", config.seed)
    return Prepared(name, path, train, test, digest, kept, findings, template.example(train, tokenizer))


def _require_quantizing(config: Config) -> None:
    if not config.train.quantize:
        return
    if not config.train.lora:
        raise UsageError("weights in 4 bits are not trained, only an adapter over them", where="train.quantize",
                         mend="Set lora = true, or leave quantize out.")  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        raise MissingPart("quantize = true (QLoRA) needs CUDA, and there is none here", mend="Leave quantize out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPart("bitsandbytes is not installed", mend="Install it: pip install bitsandbytes")


def _read_test(path: Path, seed: int) -> pl.DataFrame | None:
    """The held-out pairs to measure on: all, or so many drawn at random that their error is small enough."""
    import polars as pl

    if not path.exists():
        return None
    frame = pl.read_parquet(path)
    if frame.height > measure.TEST_PAIRS:
        frame = frame.sample(measure.TEST_PAIRS, seed=seed)
    return frame if frame.height else None
