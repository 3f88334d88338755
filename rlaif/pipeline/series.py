"""The next round: a run whose policy is the model that the last one trained, with everything else as it was.

The settings are those that the stages really ran with, flags included. The same prompts under the same seed hold the
same ones out, so rounds are measured on common ground.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlaif import settings
from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.pipeline.trained import trained
from rlaif.run.directory import Run

KEPT = {
    "generate": ("seed", "prompts", "sampler"),
    "judge": ("judge", "judges", "pairs"),
    "train": ("train", "client"),
    "evaluate": ("evaluate",),
}
"""Which stage says what the next round's settings are."""


def following(run: Run, target: Path, prompts: list[str]) -> str:
    """The text of rlaif.toml for the round after ``run``, to stand in ``target``. ``prompts``: fresh ones, or none.

    Raises :class:`UsageError` where the run has no whole model that can answer.
    """
    stages = run.manifest()["stages"]
    config = Config.model_validate(stages.get("train", {}).get("config", {}))
    identity, result = trained(run, config)
    if not result.get("merged") or identity.get("method") == "reward":
        raise UsageError(
            "its training left no whole model that answers",
            where=str(result.get("output", run.model)),
            mend="Train again with merge = true under [train]; a reward model does not answer.",
        )
    values: dict[str, Any] = {}
    for stage, sections in KEPT.items():
        ran = stages.get(stage, {}).get("config", {})
        values |= {section: ran[section] for section in sections if section in ran}
    values.setdefault("prompts", {})
    values["sampler"] = {**values.get("sampler", {}), "model": [str(Path(result["merged"]).resolve())], "base_url": []}
    values["train"] = {**values.get("train", {}), "model": None, "output": None}
    if prompts:
        values["prompts"] = {**values["prompts"], "source": prompts, "limit": None}
    values["round"] = {"previous": os.path.relpath(run.path.resolve(), target.resolve())}
    return settings.filled(values)
