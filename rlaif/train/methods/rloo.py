"""Online RL against a reward model, with a KL term: REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740).

It is the method closest to PPO that TRL has. The current model answers each prompt several times, and an answer's
advantage is its reward minus the mean reward of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.config.models import TrainConfig
from rlaif.errors import UsageError
from rlaif.train import chat_template
from rlaif.train.methods import base

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.run import Run

display_name = "RLOO"
trainer_class = "RLOOTrainer"
config_class = "RLOOConfig"
row_unit = "answers"
head: base.Head = "language"
drops_overlong_pairs = False
default_learning_rates = (1e-5, 1e-6)
trl_fields: Mapping[str, str] = {"beta": "beta", "reward_funcs": "reward_model", "max_length": "max_length"}
DEFAULT_GENERATIONS = 4


def config_kwargs(train: TrainConfig) -> dict[str, Any]:
    base.reject_loss(display_name, train)
    num_generations = generations_per_prompt(train)
    if train.batch_size % num_generations:
        raise UsageError(
            f"a batch of {train.batch_size} answers is not a multiple of {num_generations} answers per prompt",
            location="train.batch_size",
            hint=f"Set batch_size to a multiple of num_generations ({num_generations}).",
        )
    return {"beta": train.beta, "num_generations": num_generations}


def generations_per_prompt(train: TrainConfig) -> int:
    """Return the number of answers per prompt. The advantage needs at least two."""
    return int(train.trl.get("num_generations", DEFAULT_GENERATIONS))


def trainer_kwargs(train: TrainConfig) -> dict[str, Any]:
    if not train.reward_model:
        raise UsageError(
            "a reward model is required",
            location="train.reward_model",
            hint="Train one with `rlaif train RUN --method reward -o DIR`, then pass `--reward-model DIR/merged`.",
        )
    folder = Path(train.reward_model)
    if folder.is_dir() and not (folder / "config.json").exists():
        merged = folder / "merged"
        hint = f"Pass `--reward-model {merged}`." if merged.is_dir() else "Pass a folder that has a config.json."
        raise UsageError("the folder contains no reward model", location=str(folder), hint=hint)
    return {"reward_funcs": train.reward_model}


def build_dataset(frame: pl.DataFrame, _run: Run, train: TrainConfig, _seed: int) -> base.TrainerDataset:
    """Return each prompt of the dataset once."""
    unique_prompts = (
        frame.unique("prompt_id", keep="first", maintain_order=True) if "prompt_id" in frame.columns else frame
    )
    examples = [
        {"prompt": chat_template.to_chat_turns(row)["prompt"], "tools": row.get("tools")}
        for row in unique_prompts.iter_rows(named=True)
    ]
    return base.TrainerDataset(
        base.conversation_dataset(examples, ("prompt",)), sequences_per_row=generations_per_prompt(train)
    )


def describe(train: TrainConfig) -> str:
    answers = f"{generations_per_prompt(train)} answers per prompt"
    return f"RLOO, {answers}, KL beta {train.beta:g}, reward model {train.reward_model}"
