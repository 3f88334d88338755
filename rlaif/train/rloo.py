"""Online RL against a reward model, with a KL term: REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740).

The PPO family's member that TRL keeps: each prompt is answered several times by the model as it is, and an answer's
advantage is its reward less the mean of the others'.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.config import TrainConfig
from rlaif.errors import UsageError
from rlaif.train import method, template

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.directory import Run

TITLE = "RLOO"
TRAINER = "RLOOTrainer"
CONFIG = "RLOOConfig"
UNIT = "answers"
HEAD: method.Head = "language"
WHOLE = False
RATES = (1e-5, 1e-6)
OWN: Mapping[str, str] = {"beta": "beta", "reward_funcs": "reward_model", "max_length": "max_length"}
GENERATIONS = 4


def arguments(train: TrainConfig) -> dict[str, Any]:
    method.no_loss(TITLE, train)
    each = generations(train)
    if train.batch_size % each:
        raise UsageError(
            f"a batch of {train.batch_size} answers does not hold whole prompts of {each} answers",
            where="train.batch_size",
            mend=f"Set batch_size to a multiple of num_generations ({each}).",
        )
    return {"beta": train.beta, "num_generations": each}


def generations(train: TrainConfig) -> int:
    """Answers to each prompt; the advantage needs at least two."""
    return int(train.extra.get("num_generations", GENERATIONS))


def keywords(train: TrainConfig) -> dict[str, Any]:
    if not train.reward_model:
        raise UsageError(
            "RLOO needs a reward model",
            where="train.reward_model",
            mend="Train one: rlaif train RUN --method reward --output DIR; then give --reward-model DIR/merged.",
        )
    folder = Path(train.reward_model)
    if folder.is_dir() and not (folder / "config.json").exists():
        whole = folder / "merged"
        mend = f"Give --reward-model {whole}" if whole.is_dir() else "Give a folder that has a config.json."
        raise UsageError("the folder holds no reward model", where=str(folder), mend=mend)
    return {"reward_funcs": train.reward_model}


def rows(frame: pl.DataFrame, _run: Run, train: TrainConfig, _seed: int) -> method.Rows:
    """Each prompt of the dataset once."""
    once = frame.unique("prompt_id", keep="first", maintain_order=True) if "prompt_id" in frame.columns else frame
    made = [
        {"prompt": template.conversation(row)["prompt"], "tools": row.get("tools")}
        for row in once.iter_rows(named=True)
    ]
    return method.Rows(method.conversations(made, ("prompt",)), each=generations(train))


def described(train: TrainConfig) -> str:
    return f"RLOO, {generations(train)} answers a prompt, KL beta {train.beta:g}, reward model {train.reward_model}"
