"""One training of the run's dataset with a trainer of TRL, resumable, from preflight to model card.

What differs from method to method stands in :mod:`rlaif.train.methods`; this is what all of them share.

Reads RUN/dataset and writes only under OUTPUT (``train.output``, else RUN/model):

    adapter/        the LoRA adapter (not with full training)
    merged/         a whole model with tokenizer and chat template, for any server: base and adapter, or all weights
    README.md       the model card            training.json   settings and results, for programs
    checkpoints/    what an interrupted training goes on from; may be removed when it is done

Given again after an interruption, it goes on from the newest whole checkpoint; given again after the end, it says so
and does nothing. Everything is safetensors, and no code from a model's repository is run.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlaif.config import Config, TrainConfig
from rlaif.errors import RunError, UsageError
from rlaif.run.directory import Run
from rlaif.train import card, checkpoints, measure, methods, settings, writing
from rlaif.train.method import Head, Method, Rows
from rlaif.train.prepare import Prepared, prepare
from rlaif.train.writing import TrainResult


def plan(run: Run, config: Config) -> tuple[Prepared, str]:
    """What would be trained on what, and in a line how. Nothing is written, and no model is loaded."""
    prepared, wanted, method = prepare(run, config), config.train, methods.of(config.train.method)
    arguments = settings.arguments(wanted, seed=config.seed, folder=run.model, pairs=prepared.train.height)
    method.keywords(wanted)
    with _quiet():
        rows = method.rows(prepared.train, run, wanted, config.seed)
    kept = prepared.kept if "max_length" in arguments else 1.0
    count = round(kept * len(rows.dataset))
    planned = settings.planned_steps(wanted, count * rows.each)
    told = f"{count}" if kept == 1 else f"about {count}"
    return prepared, f"{planned} steps of {wanted.batch_size} {_how(prepared, wanted, arguments, told)}"


def train(run: Run, config: Config, *, say: Callable[[str], None]) -> TrainResult:
    """Train, measure, write. ``say`` gets lines for the person who waits."""
    # TRL reports each training to the hub unless told not to. Whoever wants that sets it to 0.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    wanted = config.train
    prepared = prepare(run, config)
    output = Path(wanted.output) if wanted.output else run.model
    folder = output / "checkpoints"
    arguments = settings.arguments(wanted, seed=config.seed, folder=folder, pairs=prepared.train.height)
    method = methods.of(wanted.method)
    method.keywords(wanted)  # refused before anything is loaded
    with _quiet():
        rows = method.rows(prepared.train, run, wanted, config.seed)
    identity = settings.identity(
        wanted, model=prepared.model, seed=config.seed, dataset=prepared.digest, rows=rows.deciding
    )
    if done := writing.finished(output, identity, merge=wanted.merge):
        say(f"already trained with these settings in {output}; remove it to train anew. What that training gave:")
        return done
    try:
        if _is_main():
            checkpoints.claim(folder, identity, settings.GROWING, restart=wanted.restart)
            _tell(prepared, say)
        with _quiet():
            result, history = _train(prepared, rows, run, config, arguments, output, say)
        if _is_main():
            card.write(output / "README.md", prepared, config, result)
            facts = {"identity": identity, "result": writing.as_json(result), "reversed": result.reversed,
                     "preflight": prepared.findings, "history": history}  # fmt: skip
            checkpoints.write(output / "training.json", facts)
    except Exception as error:
        reason = writing.not_writable(error)
        if reason is None:
            raise
        raise RunError(
            f"cannot be written: {reason}",
            where=str(getattr(error, "filename", None) or output),
            mend="Mend that and start again: it goes on from the newest checkpoint.",
        ) from error
    return result


def _is_main() -> bool:
    """Whether this is the only process of the training, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def _tell(prepared: Prepared, say: Callable[[str], None]) -> None:
    """What the preflight found, and the first pair as the model will read it."""
    passed = [finding for finding in prepared.findings if finding.level == "pass"]
    lengths = "".join(f"; {finding.message}" for finding in passed if finding.name == "length")
    say(f"preflight: {len(passed)} of {len(prepared.findings)} checks passed{lengths}")
    for finding in prepared.findings:
        if finding.level == "warn":
            say(f"warning: {finding}")
    say(f"the first pair as the model reads it:\n{prepared.example}")


def _train(
    prepared: Prepared,
    rows: Rows,
    run: Run,
    config: Config,
    arguments: dict[str, Any],
    output: Path,
    say: Callable[[str], None],
) -> tuple[TrainResult, list[dict[str, float]]]:
    wanted, method = config.train, methods.of(config.train.method)
    trainer = _trainer(prepared, run, config, method, rows, arguments)
    if not trainer.accelerator.is_main_process:
        say = _silent
    count = len(trainer.train_dataset)
    if count == 0:
        what = "pair is longer than" if method.WHOLE else "prompt fills"
        raise UsageError(f"every {what} max_length: no pair is left", mend="Raise max_length under [train].")
    planned = settings.planned_steps(wanted, count * rows.each)
    trainer.add_callback(measure.teller(say, per_step=wanted.batch_size, unit=method.UNIT, beta=wanted.beta))
    # Only the trainer's own loop loads spread weights, so those need a step to take: the last one's checkpoint is none.
    resume, torn = checkpoints.newest(Path(trainer.args.output_dir), None if measure.can(trainer) else planned)
    for path in torn:
        say(f"{path.name} is incomplete and passed over")
    begun = checkpoints.step(resume) if resume else 0
    many = trainer.accelerator.num_processes
    if many != int(os.environ.get("RLAIF_PROCESSES", many)):  # each alone would train a model of its own
        raise RunError(f"{os.environ['RLAIF_PROCESSES']} processes were asked for, and {many} train together")
    say(
        f"{f'going on from step {begun} of' if begun else 'training'} {planned} steps of {wanted.batch_size} "
        + _how(prepared, wanted, arguments, f"{count}")
        + (f", {many} processes" if many > 1 else "")
    )
    test = measure.tokens(prepared.test, trainer.processing_class, wanted.max_length)
    if test and not measure.can(trainer):
        say("held-out pairs are not measured: the weights are spread over several processes")
        test = []
    with measure.only_answers_scored(), _out_of_memory_explained(wanted.method):
        if test:
            say(f"measuring {len(test)} held-out pairs first")
        before = measure.likelihoods(trainer, test, method.HEAD)  # of the base: a checkpoint is loaded after this
        started = time.monotonic()
        if resume and begun >= planned:
            # The trainer would take one more step. All that is missing is what comes after the last one.
            trainer._load_from_checkpoint(str(resume))
            trainer.state = trainer.state.load_from_json(str(resume / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = time.monotonic() - started
        after = measure.likelihoods(trainer, test, method.HEAD)
    adapter, merged = writing.weights(
        trainer, prepared.model, prepared.path, output, head=method.HEAD, lora=wanted.lora, merge=wanted.merge
    )
    result = TrainResult(
        output=output,
        adapter=adapter,
        merged=merged,
        pairs=count,
        steps=trainer.state.global_step,
        seconds=seconds,
        loss=measure.last_loss(trainer.state.log_history),
        accuracy_before=measure.accuracy(before),
        accuracy_after=measure.accuracy(after),
        moved=measure.moved(before, after) if method.HEAD == "language" else None,
        resumed_from=begun or None,
    )
    if result.accuracy_after:
        _tell_result(result, method.HEAD, say)
    return result, measure.history(trainer.state.log_history, beta=wanted.beta)


def _how(prepared: Prepared, wanted: TrainConfig, arguments: dict[str, Any], count: str) -> str:
    method = methods.of(wanted.method)
    what = ("QLoRA" if wanted.quantize else "LoRA") if wanted.lora else "all weights"
    return (
        f"{method.UNIT}: {method.TITLE}, {what} of {prepared.model} on {count} {method.UNIT}, "
        f"{settings.dtype(wanted)}, learning rate {arguments['learning_rate']:g}"
    )


def _silent(_line: str) -> None:
    pass


def _tell_result(result: TrainResult, head: Head, say: Callable[[str], None]) -> None:
    what = "is the likelier one" if head == "language" else "has the higher score"
    moved = f"; training moved towards it in {result.moved}" if result.moved else ""
    say(
        f"held-out pairs: the chosen answer {what} in {result.accuracy_after} (before: {result.accuracy_before}){moved}"
    )
    if result.reversed:
        say(f"warning: that is far below one half, {result.reversed}: are the labels reversed?")


def _trainer(
    prepared: Prepared,
    run: Run,
    config: Config,
    method: Method,
    rows: Rows,
    arguments: dict[str, Any],
) -> Any:
    from peft import LoraConfig
    from transformers import PrinterCallback

    wanted = config.train
    scored = method.HEAD == "score"
    lora = LoraConfig(
        r=wanted.lora_r,
        lora_alpha=wanted.lora_alpha,
        target_modules="all-linear",
        task_type="SEQ_CLS" if scored else "CAUSAL_LM",
        modules_to_save=["score"] if scored else None,
    )
    held_out = None
    if prepared.test is not None and any(name.startswith("eval_") for name in wanted.extra):
        held_out = method.rows(prepared.test, run, wanted, config.seed).dataset
    # What is ours stands before the try: a mistake of ours is not to be told as TRL's refusal.
    ours = {
        "train_dataset": rows.dataset,
        "eval_dataset": held_out,
        "processing_class": writing.tokenizer(prepared.model, prepared.path),
        "peft_config": lora if wanted.lora else None,
        **method.keywords(wanted),
    }
    try:
        trainer = _class(method.TRAINER)(
            model=prepared.path,
            args=_class(method.CONFIG)(**arguments),
            **ours,
            **({"quantization_config": _four_bits()} if wanted.quantize else {}),
        )
    except OSError as error:
        raise writing.cannot_load(prepared.model, error) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"TRL refuses these settings: {error}", where="[train]") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _class(name: str) -> Any:
    import trl

    with warnings.catch_warnings():
        # Loading warns of other packages' versions, vLLM's too, which TRL would run inside and rlaif runs outside.
        warnings.simplefilter("ignore")
        return getattr(trl, name)


def _four_bits() -> Any:
    """QLoRA's (Dettmers et al. 2023, arXiv:2305.14314): 4-bit NormalFloat, the constants quantised too."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


@contextlib.contextmanager
def _out_of_memory_explained(method: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        # KTO's KL term needs two answers at once, and which two is a part of what it trains.
        few = (
            "Set a smaller max_length under [train], per_device_batch_size = 2 where it is more, or LoRA; where "
            "there is a checkpoint already, restart = true too: KTO begins anew with any of them."
            if method == "kto"
            else "Set per_device_batch_size = 1 under [train] (the effective batch stays what it is, and training goes "
            "on from its checkpoint); else a smaller max_length, or LoRA."
        )
        raise RunError("the device ran out of memory", mend=few) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and remarks: ``say`` tells how far it is."""
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
