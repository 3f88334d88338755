"""PPO, handed over to verl: its dataset, and a launch file for its own trainer. Nothing is trained here.

TRL keeps no PPO trainer; with one machine, ``rloo`` is its nearest kin and runs here. Written under OUTPUT/verl:

    train.parquet, test.parquet     prompts as verl reads them: data_source, prompt, ability, reward_model, extra_info
    launch.sh                       ``python -m verl.trainer.main_ppo`` with the settings of [train]

Field names are those of verl 0.9.1; its configuration parser takes every one of them and refuses unknown ones
(tests/train/test_verl_export.py has it read a launch file).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.config.models import Config
from rlaif.errors import RunError, UsageError
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
"""What stands in an override of Hydra's as it is; anything else, a path with a comma say, would be parsed."""


def export_verl(run: Run, config: Config) -> Path:
    """Write the folder and return it. Raises :class:`UsageError` without a reward model or a dataset to take from."""
    rloo.trainer_kwargs(config.train)  # the same need, said in the same words
    name = trl_config.model_name(config)
    findings, train = preflight.check_rows(run.dataset)
    preflight.raise_refusals(findings, location=run.dataset)
    assert train is not None  # refused otherwise
    folder = training_output(run, config) / "verl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prompts = _verl_prompts(train)
        prompts.write_parquet(folder / "train.parquet")
        test = _read_frame(run.dataset / "test.parquet")
        # verl does not start without prompts to validate on.
        _verl_prompts(train.head(64) if test is None or test.is_empty() else test).write_parquet(
            folder / "test.parquet"
        )
        script = folder / "launch.sh"
        values = verl_overrides(config, demo_model.resolve_model(name), folder, prompts.height)
        script.write_text(_launch_script(values), encoding="utf-8")
        script.chmod(0o755)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", location=str(folder)) from None
    return folder


def _read_frame(path: Path) -> pl.DataFrame | None:
    import polars as pl

    return pl.read_parquet(path) if path.exists() else None


def _verl_prompts(frame: pl.DataFrame) -> pl.DataFrame:
    """Each prompt once. The reward comes from the reward model, so the rule's ground truth stays empty."""
    import polars as pl

    unique_prompts = (
        frame.unique("prompt_id", keep="first", maintain_order=True) if "prompt_id" in frame.columns else frame
    )
    rows = []
    for index, row in enumerate(unique_prompts.iter_rows(named=True)):
        turns = [{"role": turn["role"], "content": turn.get("content") or ""}
                 for turn in chat_template.to_chat_turns(row)["prompt"]]  # fmt: skip
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
    """verl's settings by dotted name. Raises :class:`UsageError` where there is less than one prompt a GPU."""
    train = config.train
    root = folder.resolve()
    gpus = train.num_processes or 8
    if prompts < gpus:
        raise UsageError(
            f"{prompts} prompts cannot be shared by {gpus} GPUs",
            hint="Lower num_processes under [train]: it is how many GPUs verl is told of.",
        )
    batch = min(train.batch_size, prompts // gpus) * gpus  # verl drops a last batch that is not full
    return {
        "data.train_files": root / "train.parquet",
        "data.val_files": root / "test.parquet",
        "data.prompt_key": "prompt",
        "data.max_prompt_length": train.max_length // 2,
        "data.max_response_length": train.max_length // 2,
        "data.filter_overlong_prompts": True,  # as here they are left out; by default verl stops at one
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
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,  # two by default, which one GPU cannot be
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": train.per_device_batch_size,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": train.per_device_batch_size,
        "critic.model.path": model,
        "critic.optim.lr": CRITIC_LEARNING_RATE,
        "critic.ppo_micro_batch_size_per_gpu": train.per_device_batch_size,
        "reward.reward_model.enable": True,
        "reward.reward_model.model_path": Path(str(train.reward_model)).resolve()
        if Path(str(train.reward_model)).is_dir()
        else train.reward_model,
        "reward.reward_model.rollout.name": "vllm",
        "reward.reward_model.rollout.tensor_model_parallel_size": 1,
        "trainer.logger": ["console"],  # by default wandb too, which asks for a login
        "trainer.project_name": "rlaif",
        "trainer.experiment_name": folder.parent.name,
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": gpus,
        "trainer.total_epochs": max(1, round(train.epochs)),
        "trainer.save_freq": train.save_steps,
        "trainer.default_local_dir": root / "checkpoints",
    }


def _hydra_value(value: Any) -> str:
    """``value`` as Hydra reads it, in quotes where it would be taken for something else."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra_value, value))}]"
    text = str(value)
    return text if UNQUOTED.fullmatch(text) else "'" + text.replace("'", "\\'") + "'"


def _launch_script(values: dict[str, Any]) -> str:
    lines = " \\\n    ".join(shlex.quote(f"{name}={_hydra_value(value)}") for name, value in values.items())
    return (
        "#!/bin/sh\n"
        "# PPO by verl against the reward model. Any setting of verl's can follow: ./launch.sh trainer.nnodes=2\n"
        "set -eu\n"
        f'exec python -m verl.trainer.main_ppo \\\n    {lines} \\\n    "$@"\n'
    )
