"""Translate the settings under [train] to TRL's, and to the fingerprint by which checkpoints are recognized.

``trl_config_kwargs`` returns the keyword arguments of TRL's configuration for the method. Names are checked against
TRL's own lists, so that a typing error is found before a model is loaded. ``training_fingerprint`` returns everything
that determines the trained weights: a training resumes only from checkpoints with the same fingerprint.
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

# TRL's names for settings that rlaif has itself, under [train] (the seed: at the top level), for every method.
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
    "use_cpu": "CUDA is used if it is available; CUDA_VISIBLE_DEVICES= hides it",
    "logging_nan_inf_filter": "a loss that is not finite must be detected",
    "disable_tqdm": "rlaif reports the progress",
    "hub_token": "secrets are read from the environment only (HF_TOKEN)",
}
# Prefixes of the settings in ``trl`` that do not affect the trained weights.
NON_WEIGHT_AFFECTING = (
    "dataloader_",
    "dataset_num_proc",
    "disable_tqdm",
    "eval_",
    "gradient_checkpointing",
    "hub_",
    "log_",
    "logging_",
    "per_device_eval",
    "push_to_hub",
    "report_to",
    "run_name",
    "save_",
    "torch_empty_cache",
)
# A longer training resumes from a shorter one's checkpoint. The learning rate then follows the longer schedule.
MAY_GROW = ("epochs", "max_steps")


def model_name(config: Config) -> str:
    """Return the model to train: ``train.model``, or the only policy of the run.

    Raises :class:`UsageError` if the run has several policies.
    """
    if config.train.model:
        return config.train.model
    names = [policy.model for policy in config.policies_resolved()]
    if len(names) > 1:
        raise UsageError(
            f"the run has {len(names)} policies, so the model to train is ambiguous: {', '.join(names)}",
            location="train.model",
            hint="Pass `--model NAME`.",
        )
    return names[0]


def learning_rate(train: TrainConfig) -> float:
    """Return ``train.learning_rate``, or the method's default for an adapter or for all weights."""
    adapter, full = methods.get_method(train.method).default_learning_rates
    return train.learning_rate or (adapter if train.lora else full)


def dtype(train: TrainConfig) -> str:
    """Return the precision of the computation: ``train.dtype``, or the fastest one that this machine supports.

    On a CPU, a reward model is trained in float32, because the scores of two answers differ by less than bfloat16's
    rounding error.
    """
    import torch

    if train.dtype != "auto":
        return train.dtype
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "float32" if train.method == "reward" else cpu.training_dtype(cpu.detect_cpu()).dtype


def batch_sizes(train: TrainConfig, processes: int = 1) -> tuple[int, int]:
    """Return the number of pairs on a device at once, and the number of such batches per step.

    A step has ``batch_size`` pairs over all ``processes``. The first number is the largest divisor of a process's share
    that is at most ``per_device_batch_size``, so that the effective batch size is exact.
    """
    share = train.batch_size // processes
    most = min(train.per_device_batch_size, share)
    device = next(size for size in range(most, 0, -1) if share % size == 0)
    return device, share // device


def world_size() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def planned_steps(train: TrainConfig, pairs: int) -> int:
    """Return the number of optimizer steps for ``pairs`` pairs. The last step of an epoch may have fewer pairs."""
    if train.max_steps is not None:
        return train.max_steps
    return math.ceil(train.epochs * max(1, math.ceil(pairs / train.batch_size)))


def trl_config_kwargs(train: TrainConfig, *, seed: int, folder: Path, pairs: int) -> dict[str, Any]:
    """Return the keyword arguments of TRL's configuration. ``pairs``: their number, which sets the logging interval.

    Raises :class:`UsageError` for a setting that TRL does not have.
    """
    import torch

    method = methods.get_method(train.method)
    method_kwargs = method.config_kwargs(train)
    _check_names(method, train)
    _check_reports(train.trl.get("report_to"))
    cuda = torch.cuda.is_available()
    precision = dtype(train)
    per_device, accumulation = batch_sizes(train, world_size())
    # An adapter's frozen base can be in bfloat16. Trained weights cannot: a change of 1e-6 would be rounded away.
    weights = precision if train.lora else "float32"
    init = {**train.trl.get("model_init_kwargs", {}), "dtype": weights, "use_safetensors": True}
    defaults = {
        "report_to": "none",
        "save_total_limit": 2,  # if the newest is incomplete, the one before it is used
        "logging_steps": 1 if planned_steps(train, pairs) <= 500 else 10,
        "gradient_checkpointing": cuda,  # trades time for memory, which a CPU has enough of
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
        "logging_nan_inf_filter": False,  # a loss that is not finite must be detected, not filtered
    }
    return {**defaults, "per_device_eval_batch_size": per_device, **train.trl, **fixed}


def trl_field_names(method: TrainingMethod) -> list[str]:
    """Return the names of all settings of TRL's configuration for ``method``."""
    import trl

    return [field.name for field in dataclasses.fields(getattr(trl, method.config_class)) if field.init]


def _check_names(method: TrainingMethod, train: TrainConfig) -> None:
    rlaif_names = {**RLAIF_NAMES, **method.trl_fields}
    known_fields = trl_field_names(method)
    for name in train.trl:
        if name in rlaif_names:
            setting = "seed" if name == "seed" else f"{rlaif_names[name]} under [train]"
            raise UsageError(f"{name} is a setting of rlaif", location="train.trl", hint=f"Set {setting} instead.")
        if name in FORBIDDEN:
            raise UsageError(f"{name} cannot be set: {FORBIDDEN[name]}", location="train.trl", hint=f"Remove {name}.")
        if name not in known_fields:
            hint = did_you_mean(name, known_fields)
            if not hint.startswith("Did you mean"):  # the list of all has more than a hundred names
                hint = f"See TRL's documentation of {method.config_class}."
            raise UsageError(f"TRL's {method.config_class} has no setting {name!r}", location="train.trl", hint=hint)


def _check_reports(requested: str | list[str] | None) -> None:
    """Check ``report_to`` before the model is loaded; TRL checks it only afterwards.

    Raises :class:`UsageError` for an unknown name, and :class:`MissingDependencyError` if a package is missing.
    """
    from transformers.integrations import integration_utils

    supported = {"none", "all", *integration_utils.INTEGRATION_TO_CALLBACK}
    for name in [requested] if isinstance(requested, str) else requested or []:
        if name not in supported:
            raise UsageError(
                f"TRL cannot report to {name!r}",
                location="train.trl.report_to",
                hint=did_you_mean(name, supported),
            )
        if name not in {"none", "all", *integration_utils.get_available_reporting_integrations()}:
            raise MissingDependencyError(
                f"report_to needs {name}, which is not installed",
                location="train.trl.report_to",
                hint=f"Run `pip install {name}`.",
            )


def training_fingerprint(
    train: TrainConfig, *, model: str, seed: int, dataset: str, rows: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that determines the trained weights, as JSON values.

    ``dataset``: the sha256 of train.parquet. ``rows``: what else the method's rows are made of.

    The number of pairs on a device at once is not included, so that a training that ran out of memory can resume with
    fewer. KTO is the exception: its KL term pairs each prompt with another answer on the same device.
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
    """Return those of the further TRL settings that affect the trained weights."""
    return {name: value for name, value in extra.items() if not name.startswith(NON_WEIGHT_AFFECTING)}
