"""The next round: a run whose policy is the model that the last one trained, with everything else as it was.

The settings are those that the stages really ran with, flags included. The same prompts under the same seed hold the
same ones out, so rounds are measured on common ground.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlaif.config import loader
from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.evaluate.trained_model import load_training
from rlaif.run.run import Run

SECTIONS_BY_STAGE = {
    "generate": ("seed", "prompts", "sampler"),
    "judge": ("judge", "panel", "pairs"),
    "train": ("train", "client"),
    "evaluate": ("evaluate",),
}
"""Which stage says what the next round's settings are."""


def next_iteration_config(run: Run, target: Path, prompts: list[str]) -> str:
    """The text of rlaif.toml for the round after ``run``, to stand in ``target``. ``prompts``: fresh ones, or none.

    Raises :class:`UsageError` where the run has no whole model that can answer.
    """
    stages = run.manifest()["stages"]
    config = Config.model_validate(stages.get("train", {}).get("config", {}))
    identity, result = load_training(run, config)
    if not result.get("merged") or identity.get("method") == "reward":
        raise UsageError(
            "its training left no whole model that answers",
            location=str(result.get("output", run.model)),
            hint="Train again with merge = true under [train]; a reward model does not answer.",
        )
    values: dict[str, Any] = {}
    for stage, sections in SECTIONS_BY_STAGE.items():
        stage_config = stages.get(stage, {}).get("config", {})
        values |= {section: stage_config[section] for section in sections if section in stage_config}
    values.setdefault("prompts", {})
    values["sampler"] = {**values.get("sampler", {}), "model": [str(Path(result["merged"]).resolve())], "base_url": []}
    values["train"] = {**values.get("train", {}), "model": None, "output": None}
    if prompts:
        values["prompts"] = {**values["prompts"], "sources": prompts, "limit": None}
    values["iteration"] = {"previous_run": os.path.relpath(run.path.resolve(), target.resolve())}
    return loader.render_template(values)
