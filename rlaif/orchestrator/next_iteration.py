"""The next iteration: a run whose policy is the model that the previous run trained. All else stays the same.

The settings are those that the stages of the previous run used, flags included. The same prompts under the same seed
hold out the same prompts, so iterations are measured on the same test data.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlaif.config.models import Config
from rlaif.config.template import render_template
from rlaif.errors import UsageError
from rlaif.evaluate.trained_model import load_training
from rlaif.run.run import Run

SECTIONS_BY_STAGE = {
    "generate": ("seed", "prompts", "sampler"),
    "judge": ("judge", "panel", "pairs"),
    "train": ("train", "client"),
    "evaluate": ("evaluate",),
}
"""Sections of rlaif.toml that the next iteration copies, by the stage whose settings count."""


def next_iteration_config(run: Run, target: Path, prompts: list[str]) -> str:
    """Return the text of rlaif.toml for the iteration after ``run``. ``target``: its run directory. ``prompts``: its
    sources, if they differ.

    Raises :class:`UsageError` if the run has no merged model that can answer prompts.
    """
    stages = run.manifest()["stages"]
    config = Config.model_validate(stages.get("train", {}).get("config", {}))
    training = load_training(run, config)
    if not training.merged or training.is_reward_model:
        raise UsageError(
            "the training has no merged model that can answer prompts",
            location=str(training.output),
            hint="Train with a method other than reward and with `merge = true` under [train].",
        )
    values: dict[str, Any] = {}
    for stage, sections in SECTIONS_BY_STAGE.items():
        stage_config = stages.get(stage, {}).get("config", {})
        values |= {section: stage_config[section] for section in sections if section in stage_config}
    values.setdefault("prompts", {})
    values["sampler"] = {**values.get("sampler", {}), "model": [str(training.merged.resolve())], "base_url": []}
    values["train"] = {**values.get("train", {}), "model": None, "output": None}
    if prompts:
        values["prompts"] = {**values["prompts"], "sources": prompts, "limit": None}
    values["iteration"] = {"previous_run": os.path.relpath(run.path.resolve(), target.resolve())}
    return render_template(values)
