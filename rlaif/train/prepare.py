"""Check a training before its model is loaded: packages, rows, chat template and lengths."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif.config.models import Config
from rlaif.errors import MissingDependencyError, UsageError
from rlaif.run.run import Run
from rlaif.serving import demo_model
from rlaif.train import artifacts, chat_template, label_checks, methods, metrics, preflight, trl_config

if TYPE_CHECKING:
    import polars as pl

REQUIRED_PACKAGES = ("torch", "trl", "peft", "accelerate")


@dataclass(frozen=True, slots=True)
class PreparedTraining:
    """A training that passed its preflight.

    ``model``: its name; ``path``: its files. ``digest``: the sha256 of train.parquet. ``example``: the first pair as
    rendered for the model.
    """

    model: str
    path: str
    train: pl.DataFrame
    test: pl.DataFrame | None
    digest: str
    kept_fraction: float
    """Share of the measured pairs that are not dropped for exceeding max_length."""
    findings: list[preflight.PreflightFinding]
    example: str


def prepare(run: Run, config: Config) -> PreparedTraining:
    """Run all checks that do not need the model.

    Raises :class:`UsageError` if training is refused, and :class:`MissingDependencyError` if a package or CUDA is
    missing.
    """
    missing = [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"training needs {', '.join(missing)}, not installed here", extra="train")
    _require_qlora_support(config)
    name = trl_config.model_name(config)
    findings, train = preflight.check_rows(run.dataset)
    preflight.raise_refusals(findings, location=run.dataset)
    assert train is not None  # it would have been refused
    path = demo_model.resolve_model(name)
    tokenizer = artifacts.load_tokenizer(name, path)
    drops_overlong = methods.get_method(config.train.method).drops_overlong_pairs
    token_findings, kept_fraction = preflight.check_tokens(
        train, tokenizer, max_length=config.train.max_length, drops_overlong=drops_overlong
    )
    findings += token_findings
    findings += label_checks.check_labels(run, config.train)
    preflight.raise_refusals(findings, location=run.dataset)
    digest = hashlib.sha256((run.dataset / "train.parquet").read_bytes()).hexdigest()
    test = _read_test_pairs(run.dataset / "test.parquet", config.seed)
    return PreparedTraining(
        name, path, train, test, digest, kept_fraction, findings, chat_template.render_example(train, tokenizer)
    )


def _require_qlora_support(config: Config) -> None:
    if not config.train.qlora:
        return
    if not config.train.lora:
        raise UsageError(
            "4-bit weights cannot be trained, only an adapter on them",
            location="train.qlora",
            hint="Set lora = true, or remove qlora.",
        )
    import torch

    if not torch.cuda.is_available():
        raise MissingDependencyError(
            "QLoRA needs CUDA, which this machine does not have", location="train.qlora", hint="Remove qlora."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError("bitsandbytes is not installed", hint="Run `pip install bitsandbytes`.")


def _read_test_pairs(path: Path, seed: int) -> pl.DataFrame | None:
    """Read the held-out pairs to measure on, or a random sample that is large enough; None without any."""
    import polars as pl

    if not path.exists():
        return None
    frame = pl.read_parquet(path)
    if frame.height > metrics.MAX_TEST_PAIRS:
        frame = frame.sample(metrics.MAX_TEST_PAIRS, seed=seed)
    return frame if frame.height else None
