"""OUTPUT, where a training writes its model: its path, and the name under which that model is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif.config.models import Config
from rlaif.records import content_key
from rlaif.run.run import Run


def training_output(run: Run, config: Config) -> Path:
    """Return OUTPUT: ``train.output``, or else RUN/model."""
    return Path(config.train.output) if config.train.output else run.model


def trained_model_name(output: Path, training: Mapping[str, Any]) -> str:
    """Return the name of the model in ``output`` that ``training`` (from training.json) describes.

    Another training gets another name, so that measurements of one model are never used for another.
    """
    steps = training.get("result", {}).get("steps")
    return f"{output.resolve().name}-{content_key(identity=training.get('identity'), steps=steps)[:8]}"
