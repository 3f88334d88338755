"""What a person asked for under [train], as TRL takes it, and as checkpoints remember it.

``trl_config_kwargs`` returns the keyword arguments of TRL's configuration for the method. Names are checked against
TRL's own lists, so that a typing error is found before a model is loaded. ``training_fingerprint`` returns what
determines the trained weights: only a checkpoint for which that is the same is gone on with.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif import cpu
from rlaif.config.models import Config, TrainConfig
from rlaif.errors import MissingDependencyError, UsageError, did_you_mean
from rlaif.train import methods
from rlaif.train.methods.base import TrainingMethod

# TRL's names for what has its own setting under [train] (or, for the seed, at the top), whatever the method.
RLAIF_NAMES = {
    "output_dir": "output",
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "per_device_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "max_length": "max_length",
    "bf16": "dtype",
    "fp16": "dtype",
    "save_steps": "save_steps",
    "seed": "seed",
}
FORBIDDEN = {
    "trust_remote_code": "no code from a model's repository is run",
    "use_cpu": "CUDA is used where it is; CUDA_VISIBLE_DEVICES= hides it",
    "logging_nan_inf_filter": "a loss that is no number has to be seen",
    "disable_tqdm": "rlaif tells how far it is",
    "hub_token": "secrets come from the environment only (HF_TOKEN)",
}
# Settings in ``trl`` that do not change the weights, by the beginning of their names.
NON_WEIGHT_AFFECTING = (
    "dataloader_", "dataset_num_proc", "disable_tqdm", "eval_", "gradient_checkpointing", "hub_", "log_", "logging_",
    "per_device_eval", "push_to_hub", "report_to", "run_name", "save_", "torch_empty_cache",
)  # fmt: skip
# A longer training goes on from a shorter one's checkpoint; the learning rate then follows the longer schedule.
MAY_GROW = ("epochs", "max_steps")


def model_name(config: Config) -> str:
    """The model to train: ``train.model``, or the only policy of the run."""
    if config.train.model:
        return config.train.model
    names = [policy.model for policy in config.policies_resolved()]
    if len(names) > 1:
        raise UsageError(
            f"the run has {len(names)} policies, and one model is trained: {', '.join(names)}",
            hint="Give --model NAME, or set model under [train].",
        )
    return names[0]


def learning_rate(train: TrainConfig) -> float:
    adapter, full = methods.get_method(train.method).default_learning_rates
    return train.learning_rate or (adapter if train.lora else full)


def dtype(train: TrainConfig) -> str:
    """Return the precision of the computation: ``train.dtype``, or the fastest one that this machine has.

    On a CPU a reward model is trained in float32: its scores of two answers differ by less than bfloat16 rounds.
    """
    import torch

    if train.dtype != "auto":
        return train.dtype
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "float32" if train.method == "reward" else cpu.training_dtype(cpu.detect_cpu()).dtype


def batch_sizes(train: TrainConfig, processes: int = 1) -> tuple[int, int]:
    """Pairs on the device at once, and how many such batches make one step of ``batch_size`` pairs over all processes.

    The first is the largest divisor of a process's share up to ``per_device_batch_size``, so that the effective batch
    is what was asked for.
    """
    share = train.batch_size // processes
    most = min(train.per_device_batch_size, share)
    device = next(size for size in range(most, 0, -1) if share % size == 0)
    return device, share // device


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def planned_steps(train: TrainConfig, pairs: int) -> int:
    """How many optimizer steps the training of ``pairs`` pairs has. The last step of an epoch may be a smaller one."""
    if train.max_steps is not None:
        return train.max_steps
    return math.ceil(train.epochs * max(1, math.ceil(pairs / train.batch_size)))


def trl_config_kwargs(train: TrainConfig, *, seed: int, folder: Path, pairs: int) -> dict[str, Any]:
    """The keyword arguments of TRL's configuration. Raises :class:`UsageError` for a name that TRL does not have.
    ``pairs``: how many pairs there are, from which it is told how often to log."""
    import torch

    method = methods.get_method(train.method)
    method_kwargs = method.config_kwargs(train)
    _check_names(method, train)
    _check_reports(train.trl.get("report_to"))
    cuda = torch.cuda.is_available()
    precision = dtype(train)
    per_device, accumulation = batch_sizes(train, world_size())
    # An adapter's frozen base may be kept in bfloat16. Weights that are trained may not: 1e-6 would round away.
    weights = precision if train.lora else "float32"
    init = {**train.trl.get("model_init_kwargs", {}), "dtype": weights, "use_safetensors": True}
    defaults = {
        "report_to": "none",
        "save_total_limit": 2,  # the newest may be torn: the one before it is the way back
        "logging_steps": 1 if planned_steps(train, pairs) <= 500 else 10,
        "gradient_checkpointing": cuda,  # memory for time: a CPU has the memory
        "dataloader_pin_memory": cuda,
    }
    fixed = {
        "output_dir": str(folder),
        **method_kwargs,
        "learning_rate": learning_rate(train),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        **({"max_length": train.max_length} if "max_length" in trl_field_names(method) else {}),
        "bf16": precision == "bfloat16",
        "save_steps": train.save_steps,
        "seed": seed,
        "model_init_kwargs": {**init, "trust_remote_code": False},
        "trust_remote_code": False,
        "use_cpu": not cuda,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # a loss that is no number has to be seen, not averaged over
    }
    return {**defaults, "per_device_eval_batch_size": per_device, **train.trl, **fixed}


def trl_field_names(method: TrainingMethod) -> list[str]:
    """The settings that TRL's configuration for ``method`` has."""
    import trl

    return [field.name for field in dataclasses.fields(getattr(trl, method.config_class)) if field.init]


def _check_names(method: TrainingMethod, train: TrainConfig) -> None:
    rlaif_names = {**RLAIF_NAMES, **method.trl_fields}
    known_fields = trl_field_names(method)
    for name in train.trl:
        if name in rlaif_names:
            setting = "seed" if name == "seed" else f"{rlaif_names[name]} under [train]"
            raise UsageError(f"{name} has its own setting", location="train.trl", hint=f"Set {setting} instead.")
        if name in FORBIDDEN:
            raise UsageError(f"{name} cannot be set: {FORBIDDEN[name]}", location="train.trl", hint="Leave it out.")
        if name not in known_fields:
            close = did_you_mean(name, known_fields)  # never the list of all, which has more than a hundred
            close = (
                close
                if close.startswith("Did you mean")
                else f"TRL's documentation of {method.config_class} lists them."
            )
            raise UsageError(f"TRL's {method.config_class} has no setting {name!r}. {close}", location="train.trl")


def _check_reports(requested: str | list[str] | None) -> None:
    """Raise where what ``report_to`` names is not there; TRL would, with the model loaded."""
    from transformers.integrations import integration_utils

    supported = {"none", "all", *integration_utils.INTEGRATION_TO_CALLBACK}
    for name in [requested] if isinstance(requested, str) else requested or []:
        if name not in supported:
            raise UsageError(
                f"TRL reports to no {name!r}. {did_you_mean(name, supported)}", location="train.trl.report_to"
            )
        if name not in {"none", "all", *integration_utils.get_available_reporting_integrations()}:
            raise MissingDependencyError(
                f"{name}, which report_to names, is not installed",
                location="train.trl.report_to",
                hint=f"Install it: pip install {name}",
            )


def training_fingerprint(
    train: TrainConfig, *, model: str, seed: int, dataset: str, rows: Mapping[str, Any]
) -> dict[str, Any]:
    """What determines the trained weights, as JSON values. ``dataset``: the sha256 of train.parquet's bytes;
    ``rows``: what else the method's rows are made of.

    How many pairs stand on the device at once is not in it: a training that ran out of memory may go on with fewer.
    Except of KTO, whose KL term pairs each answer's prompt with another answer of those.
    """
    paired = train.method == "kto"
    adapter = {"lora_r": train.lora_r, "lora_alpha": train.lora_alpha} if train.lora else {}
    return {
        "dataset": dataset,
        **rows,
        "model": model,
        "method": train.method,
        "lora": train.lora,
        **adapter,
        **({"qlora": True} if train.qlora else {}),
        **methods.get_method(train.method).config_kwargs(train),
        **({"reward_model": train.reward_model} if train.reward_model else {}),
        "learning_rate": learning_rate(train),
        "epochs": train.epochs,
        "max_steps": train.max_steps,
        "batch_size": train.batch_size,
        **({"per_device_batch_size": batch_sizes(train, world_size())[0]} if paired else {}),
        "max_length": train.max_length,
        "dtype": dtype(train),
        "seed": seed,
        "trl": weight_affecting(train.trl),
    }


def weight_affecting(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The further TRL settings that have a part in the trained weights."""
    return {name: value for name, value in extra.items() if not name.startswith(NON_WEIGHT_AFFECTING)}
