"""Write the input of verl for PPO: its dataset, and a script that starts its trainer. rlaif itself does not train PPO.

TRL has no PPO trainer. On one machine, ``rloo`` is the closest method that rlaif trains itself. Files under
OUTPUT/verl:

    train.parquet, test.parquet     prompts as verl reads them: data_source, prompt, ability, reward_model, extra_info
    launch.sh                       ``python -m verl.trainer.main_ppo`` with the settings of [train]

Field names are those of verl 0.9.1. Its configuration parser rejects unknown names; tests/train/test_verl_export.py
makes it read a launch script.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.config.models import Config
from rlaif.errors import UsageError, write_error
from rlaif.run.run import Run
from rlaif.run.training_output import training_output
from rlaif.serving import demo_model
from rlaif.train import chat_template, preflight, trl_config
from rlaif.train.methods import rloo

if TYPE_CHECKING:
    import polars as pl

DEFAULT_LEARNING_RATE = 1e-6
CRITIC_LEARNING_RATE = 1e-5
UNQUOTED = re.compile(r"[\w./:-]+")
"""Values that Hydra's overrides take unquoted. Anything else, such as a path with a comma, would be parsed."""


def export_verl(run: Run, config: Config) -> Path:
    """Write OUTPUT/verl and return its path. Raises :class:`UsageError` without a reward model or a dataset."""
    rloo.trainer_kwargs(config.train)  # raises if the reward model is missing, which PPO needs as well
    name = trl_config.model_name(config)
    findings, train = preflight.check_rows(run.dataset)
    preflight.raise_refusals(findings, location=run.dataset)
    assert train is not None  # it would have been refused
    folder = training_output(run, config) / "verl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prompts = _verl_prompts(train)
        prompts.write_parquet(folder / "train.parquet")
        test = _read_frame(run.dataset / "test.parquet")
        # verl does not start without prompts to validate on.
        validation = train.head(64) if test is None or test.is_empty() else test
        _verl_prompts(validation).write_parquet(folder / "test.parquet")
        script = folder / "launch.sh"
        values = verl_overrides(config, demo_model.resolve_model(name), folder, prompts.height)
        script.write_text(_launch_script(values), encoding="utf-8")
        script.chmod(0o755)
    except OSError as error:
        raise write_error(folder, error) from None
    return folder


def _read_frame(path: Path) -> pl.DataFrame | None:
    import polars as pl

    return pl.read_parquet(path) if path.exists() else None


def _verl_prompts(frame: pl.DataFrame) -> pl.DataFrame:
    """Return each prompt once. The ground truth stays empty, because the reward comes from the reward model."""
    import polars as pl

    unique_prompts = (
        frame.unique("prompt_id", keep="first", maintain_order=True) if "prompt_id" in frame.columns else frame
    )
    rows = []
    for index, row in enumerate(unique_prompts.iter_rows(named=True)):
        turns = [
            {"role": turn["role"], "content": turn.get("content") or ""}
            for turn in chat_template.to_chat_turns(row)["prompt"]
        ]
        rows.append(
            {
                "data_source": "rlaif",
                "prompt": turns,
                "ability": "preference",
                "reward_model": {"style": "model", "ground_truth": ""},
                "extra_info": {"index": index, "prompt_id": str(row.get("prompt_id", index))},
            }
        )
    return pl.DataFrame(rows)


def verl_overrides(config: Config, model: str, folder: Path, prompts: int) -> dict[str, Any]:
    """Return verl's settings by dotted name. Raises :class:`UsageError` if there are fewer prompts than GPUs."""
    train = config.train
    root = folder.resolve()
    reward_model = Path(str(train.reward_model))
    gpus = train.num_processes or 8
    if prompts < gpus:
        raise UsageError(
            f"{prompts} prompts cannot be divided among {gpus} GPUs",
            location="train.num_processes",
            hint="Lower num_processes under [train], the number of GPUs for verl.",
        )
    batch = min(train.batch_size, prompts // gpus) * gpus  # verl drops an incomplete last batch
    return {
        "data.train_files": root / "train.parquet",
        "data.val_files": root / "test.parquet",
        "data.prompt_key": "prompt",
        "data.max_prompt_length": train.max_length // 2,
        "data.max_response_length": train.max_length // 2,
        "data.filter_overlong_prompts": True,  # rlaif drops them too; by default verl stops with an error
        "data.train_batch_size": batch,
        "algorithm.adv_estimator": "gae",
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl.kl_coef": train.beta,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.actor.optim.lr": train.learning_rate or DEFAULT_LEARNING_RATE,
        "actor_rollout_ref.actor.ppo_mini_batch_size": batch,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": train.per_device_batch_size,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": 1,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,  # the default of 2 does not fit on one GPU
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": train.per_device_batch_size,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": train.per_device_batch_size,
        "critic.model.path": model,
        "critic.optim.lr": CRITIC_LEARNING_RATE,
        "critic.ppo_micro_batch_size_per_gpu": train.per_device_batch_size,
        "reward.reward_model.enable": True,
        "reward.reward_model.model_path": reward_model.resolve() if reward_model.is_dir() else train.reward_model,
        "reward.reward_model.rollout.name": "vllm",
        "reward.reward_model.rollout.tensor_model_parallel_size": 1,
        "trainer.logger": ["console"],  # the default includes wandb, which needs a login
        "trainer.project_name": "rlaif",
        "trainer.experiment_name": folder.parent.name,
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": gpus,
        "trainer.total_epochs": max(1, round(train.epochs)),
        "trainer.save_freq": train.save_steps,
        "trainer.default_local_dir": root / "checkpoints",
    }


def _hydra_value(value: Any) -> str:
    """Return ``value`` as an override for Hydra, quoted if Hydra would parse it otherwise."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra_value, value))}]"
    text = str(value)
    return text if UNQUOTED.fullmatch(text) else "'" + text.replace("'", "\\'") + "'"


def _launch_script(values: dict[str, Any]) -> str:
    lines = " \\\n    ".join(shlex.quote(f"{name}={_hydra_value(value)}") for name, value in values.items())
    return (
        "#!/bin/sh\n"
        "# PPO with verl against the reward model. Append any of verl's settings: ./launch.sh trainer.nnodes=2\n"
        "set -eu\n"
        f'exec python -m verl.trainer.main_ppo \\\n    {lines} \\\n    "$@"\n'
    )
