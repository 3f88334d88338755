"""Train on the run's dataset with TRL, from preflight to model card. Resumable.

This module contains what all methods share. The differences between methods are in :mod:`rlaif.train.methods`.

Reads RUN/dataset and writes only under OUTPUT (``train.output``, or else RUN/model):

    adapter/        the LoRA adapter (not with full training)
    merged/         a complete model with tokenizer and chat template, for any server: base and adapter, or all weights
    README.md       the model card
    training.json   settings and results, for programs
    checkpoints/    for resuming an interrupted training; may be removed when the training is finished

A rerun resumes an interrupted training from the newest complete checkpoint. After a finished training, a rerun logs
that and does nothing. All weights are safetensors, and no code from a model's repository is run.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlaif.config.models import Config, TrainConfig
from rlaif.errors import RunError, UsageError
from rlaif.run.run import Run
from rlaif.run.training_output import training_output
from rlaif.train import artifacts, checkpoints, methods, metrics, model_card, trl_config
from rlaif.train.artifacts import TrainResult
from rlaif.train.methods.base import Head, TrainerDataset, TrainingMethod
from rlaif.train.prepare import PreparedTraining, prepare


def plan(run: Run, config: Config) -> tuple[PreparedTraining, str]:
    """Return the prepared training, and one line that describes it. Nothing is written, and no model is loaded."""
    prepared, train_config, method = prepare(run, config), config.train, methods.get_method(config.train.method)
    config_kwargs = trl_config.trl_config_kwargs(
        train_config, seed=config.seed, folder=run.model, pairs=prepared.train.height
    )
    method.trainer_kwargs(train_config)
    with _silence_libraries():
        rows = method.build_dataset(prepared.train, run, train_config, config.seed)
    kept_fraction = prepared.kept_fraction if "max_length" in config_kwargs else 1.0
    count = round(kept_fraction * len(rows.dataset))
    planned = trl_config.planned_steps(train_config, count * rows.sequences_per_row)
    count_text = f"{count}" if kept_fraction == 1 else f"about {count}"
    description = _describe_training(prepared, train_config, config_kwargs, count_text)
    return prepared, f"{planned} steps of {train_config.batch_size} {description}"


def train(run: Run, config: Config, *, log: Callable[[str], None]) -> TrainResult:
    """Train, measure and write the results. ``log`` receives progress lines.

    Raises :class:`UsageError` if training is refused, and :class:`RunError` if memory or disk are exhausted.
    """
    # TRL reports each training to the hub unless this is set. Users who want the reports set it to 0.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    train_config = config.train
    prepared = prepare(run, config)
    output = training_output(run, config)
    folder = output / "checkpoints"
    config_kwargs = trl_config.trl_config_kwargs(
        train_config, seed=config.seed, folder=folder, pairs=prepared.train.height
    )
    method = methods.get_method(train_config.method)
    method.trainer_kwargs(train_config)  # raises before anything is loaded
    with _silence_libraries():
        rows = method.build_dataset(prepared.train, run, train_config, config.seed)
    fingerprint = trl_config.training_fingerprint(
        train_config, model=prepared.model, seed=config.seed, dataset=prepared.digest, rows=rows.extra_identity
    )
    if done := artifacts.finished_result(output, fingerprint, merge=train_config.merge):
        log(f"already trained with these settings in {output}; remove that folder to train again. Its result:")
        return done
    try:
        if _is_main_process():
            checkpoints.claim_dir(folder, fingerprint, trl_config.MAY_GROW, overwrite=train_config.overwrite)
            _log_preflight(prepared, log)
        with _silence_libraries():
            result, history = _train(prepared, rows, run, config, config_kwargs, output, log)
        if _is_main_process():
            model_card.write_card(output / "README.md", prepared, config, result)
            facts = {
                "identity": fingerprint,
                "result": artifacts.result_as_json(result),
                "reversed": result.reversed,
                "preflight": prepared.findings,
                "history": history,
            }
            checkpoints.write_json(output / "training.json", facts)
    except Exception as error:
        reason = artifacts.disk_error(error)
        if reason is None:
            raise
        raise RunError(
            f"cannot be written: {reason}",
            location=str(getattr(error, "filename", None) or output),
            hint="Free disk space or fix the permissions, then rerun: training resumes from the newest checkpoint.",
        ) from error
    return result


def _is_main_process() -> bool:
    """Return whether this is the only process of the training, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def _log_preflight(prepared: PreparedTraining, log: Callable[[str], None]) -> None:
    """Log the preflight's findings, and the first pair as rendered for the model."""
    passed = [finding for finding in prepared.findings if finding.level == "pass"]
    lengths = "".join(f"; {finding.message}" for finding in passed if finding.name == "length")
    log(f"preflight: {len(passed)} of {len(prepared.findings)} checks passed{lengths}")
    for finding in prepared.findings:
        if finding.level == "warn":
            log(f"warning: {finding}")
    log(f"first pair as rendered for the model:\n{prepared.example}")


def _train(
    prepared: PreparedTraining,
    rows: TrainerDataset,
    run: Run,
    config: Config,
    config_kwargs: dict[str, Any],
    output: Path,
    log: Callable[[str], None],
) -> tuple[TrainResult, list[dict[str, float]]]:
    """Train, measure and write the weights. Returns the result, and the training history for the report."""
    train_config, method = config.train, methods.get_method(config.train.method)
    trainer = _build_trainer(prepared, run, config, method, rows, config_kwargs)
    if not trainer.accelerator.is_main_process:
        log = _discard_line
    count = len(trainer.train_dataset)
    if count == 0:
        reason = "pair is longer than" if method.drops_overlong_pairs else "prompt fills"
        raise UsageError(f"every {reason} max_length: no pair is left", hint="Raise max_length under [train].")
    planned = trl_config.planned_steps(train_config, count * rows.sequences_per_row)
    trainer.add_callback(
        metrics.progress_callback(log, per_step=train_config.batch_size, unit=method.row_unit, beta=train_config.beta)
    )
    checkpoint, start_step = _find_checkpoint(trainer, planned, log)
    num_processes = trainer.accelerator.num_processes
    _require_processes(num_processes)
    steps = f"resuming from step {start_step} of {planned}, in steps" if start_step else f"training {planned} steps"
    description = _describe_training(prepared, train_config, config_kwargs, f"{count}")
    together = f", {num_processes} processes" if num_processes > 1 else ""
    log(f"{steps} of {train_config.batch_size} {description}{together}")
    test = _measurable_pairs(trainer, prepared, train_config, log)
    if test:
        log(f"measuring {len(test)} held-out pairs before the training")
    with metrics.patch_answer_only_logits(), _explain_oom(train_config.method):
        before = metrics.pair_logprobs(trainer, test, method.head)  # of the base: the checkpoint is loaded later
        seconds = _run_steps(trainer, checkpoint, start_step, planned)
        after = metrics.pair_logprobs(trainer, test, method.head)
    adapter, merged = artifacts.save_weights(
        trainer,
        prepared.model,
        prepared.path,
        output,
        head=method.head,
        lora=train_config.lora,
        merge=train_config.merge,
    )
    result = TrainResult(
        output=output,
        adapter=adapter,
        merged=merged,
        pairs=count,
        steps=trainer.state.global_step,
        seconds=seconds,
        loss=metrics.last_loss(trainer.state.log_history),
        accuracy_before=metrics.preference_accuracy(before),
        accuracy_after=metrics.preference_accuracy(after),
        moved=metrics.preference_shift(before, after) if method.head == "language" else None,
        resumed_from=start_step or None,
    )
    if result.accuracy_after:
        _log_result(result, method.head, log)
    return result, metrics.history(trainer.state.log_history, beta=train_config.beta)


def _require_processes(num_processes: int) -> None:
    """Raise :class:`RunError` if fewer processes train together than were started: each would train its own model."""
    expected = int(os.environ.get("RLAIF_PROCESSES", num_processes))
    if num_processes != expected:
        raise RunError(f"expected {expected} processes to train together, but there are {num_processes}")


def _find_checkpoint(trainer: Any, planned: int, log: Callable[[str], None]) -> tuple[Path | None, int]:
    """Return the checkpoint to resume from and its step; None and 0 without one."""
    # Sharded weights are loaded only by the trainer's own loop, which then needs a step to take. So the checkpoint of
    # the last step is of no use for them.
    before = None if metrics.can_measure(trainer) else planned
    checkpoint, incomplete = checkpoints.latest_complete(Path(trainer.args.output_dir), before)
    for path in incomplete:
        log(f"{path.name} is incomplete and ignored")
    return checkpoint, checkpoints.checkpoint_step(checkpoint) if checkpoint else 0


def _measurable_pairs(
    trainer: Any, prepared: PreparedTraining, train_config: TrainConfig, log: Callable[[str], None]
) -> list[metrics.TokenizedPair]:
    """Return the held-out pairs to measure; none if the weights are sharded."""
    pairs = metrics.tokenize_pairs(prepared.test, trainer.processing_class, train_config.max_length)
    if pairs and not metrics.can_measure(trainer):
        log("held-out pairs are not measured, because the weights are sharded over several processes")
        return []
    return pairs


def _run_steps(trainer: Any, checkpoint: Path | None, start_step: int, planned: int) -> float:
    """Train from ``checkpoint`` up to step ``planned``, and return the seconds that this took."""
    started = time.monotonic()
    if checkpoint and start_step >= planned:
        # The trainer would take one more step. Only what follows the last step is missing.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return time.monotonic() - started


def _describe_training(
    prepared: PreparedTraining, train_config: TrainConfig, config_kwargs: dict[str, Any], count: str
) -> str:
    method = methods.get_method(train_config.method)
    weights = ("QLoRA" if train_config.qlora else "LoRA") if train_config.lora else "all weights"
    return (
        f"{method.row_unit}: {method.display_name}, {weights} of {prepared.model} on {count} {method.row_unit}, "
        f"{trl_config.dtype(train_config)}, learning rate {config_kwargs['learning_rate']:g}"
    )


def _discard_line(_line: str) -> None:
    pass


def _log_result(result: TrainResult, head: Head, log: Callable[[str], None]) -> None:
    comparison = "is more likely" if head == "language" else "has the higher score"
    moved = f"; training moved towards it in {result.moved}" if result.moved else ""
    after, before = result.accuracy_after, result.accuracy_before
    log(f"held-out pairs: the chosen answer {comparison} in {after} (before: {before}){moved}")
    if result.reversed:
        log(f"warning: {result.reversed} is far below one half; the labels may be reversed")


def _build_trainer(
    prepared: PreparedTraining,
    run: Run,
    config: Config,
    method: TrainingMethod,
    rows: TrainerDataset,
    config_kwargs: dict[str, Any],
) -> Any:
    from peft import LoraConfig
    from transformers import PrinterCallback

    train_config = config.train
    is_reward_model = method.head == "score"
    lora = LoraConfig(
        r=train_config.lora_r,
        lora_alpha=train_config.lora_alpha,
        target_modules="all-linear",
        task_type="SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        modules_to_save=["score"] if is_reward_model else None,
    )
    eval_dataset = None
    if prepared.test is not None and any(name.startswith("eval_") for name in train_config.trl):
        eval_dataset = method.build_dataset(prepared.test, run, train_config, config.seed).dataset
    # Outside the try, so that a bug of rlaif is not reported as an error of TRL.
    trainer_kwargs = {
        "train_dataset": rows.dataset,
        "eval_dataset": eval_dataset,
        "processing_class": artifacts.load_tokenizer(prepared.model, prepared.path),
        "peft_config": lora if train_config.lora else None,
        **method.trainer_kwargs(train_config),
    }
    try:
        trainer = _trl_class(method.trainer_class)(
            model=prepared.path,
            args=_trl_class(method.config_class)(**config_kwargs),
            **trainer_kwargs,
            **({"quantization_config": _qlora_config()} if train_config.qlora else {}),
        )
    except OSError as error:
        raise artifacts.model_load_error(prepared.model, error) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"TRL rejects these settings: {error}", location="[train]") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trl_class(name: str) -> Any:
    import trl

    with warnings.catch_warnings():
        # Loading warns about the versions of other packages, such as vLLM, which rlaif does not run inside TRL.
        warnings.simplefilter("ignore")
        return getattr(trl, name)


def _qlora_config() -> Any:
    """Build QLoRA's configuration (Dettmers et al. 2023, arXiv:2305.14314): 4-bit NormalFloat, double quantization."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@contextlib.contextmanager
def _explain_oom(method: str) -> Iterator[None]:
    """Raise :class:`RunError` with the settings to change if the device runs out of memory."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        # KTO's KL term needs two answers at once, and the choice of the two affects the result.
        hint = (
            "Set per_device_batch_size = 2 or a smaller max_length under [train], or use LoRA. With an existing "
            "checkpoint, also pass `--overwrite`: KTO restarts after any of these changes."
            if method == "kto"
            else "Set per_device_batch_size = 1 under [train]: the effective batch size stays the same, and training "
            "resumes from its checkpoint. If that is not enough, set a smaller max_length or use LoRA."
        )
        raise RunError("the device ran out of memory", hint=hint) from error


@contextlib.contextmanager
def _silence_libraries() -> Iterator[None]:
    """Hide the libraries' progress bars and log messages; ``log`` reports the progress."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    bars, loading = not are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    disable_progress_bars()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
        if loading:
            logging.enable_progress_bar()
