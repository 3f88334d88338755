"""Measure a training: its progress while it runs, and held-out pairs before and after it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlaif.errors import RunError
from rlaif.format import format_duration
from rlaif.stats import Estimate, wilson
from rlaif.train import chat_template
from rlaif.train.methods.base import Head

if TYPE_CHECKING:
    import polars as pl

MAX_HISTORY_POINTS = 500
MAX_TEST_PAIRS = 2_000  # enough to measure a share to within 0.02
LOG_INTERVAL_S = 30.0


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """Log-probabilities of the two answers of a pair under a model, summed over their tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


def preference_accuracy(pairs: Sequence[PairLogprobs]) -> Estimate | None:
    """Return the share of pairs whose chosen answer is more likely per token; None without pairs.

    Without division by the number of tokens, the shorter answer would nearly always win.
    """
    correct = sum(
        pair.chosen / max(pair.chosen_tokens, 1) > pair.rejected / max(pair.rejected_tokens, 1) for pair in pairs
    )
    return wilson(correct, len(pairs))


def preference_shift(before: Sequence[PairLogprobs], after: Sequence[PairLogprobs]) -> Estimate | None:
    """Return the share of pairs whose chosen answer gained more than the rejected one (DPO's reward accuracy)."""
    gained = sum(new.chosen - old.chosen > new.rejected - old.rejected for old, new in zip(before, after, strict=True))
    return wilson(gained, len(before))


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A held-out pair as token ids: prompt and answer together, and the index at which the answers start."""

    chosen: list[int]
    rejected: list[int]
    start: int


def tokenize_pairs(frame: pl.DataFrame | None, tokenizer: Any, max_length: int) -> list[TokenizedPair]:
    """Return the pairs of ``frame`` as token ids, cut at ``max_length``. Pairs whose prompt fills it are dropped."""
    pairs = []
    for row in frame.iter_rows(named=True) if frame is not None else ():
        turns = chat_template.to_chat_turns(row)
        prompt = chat_template.token_ids(tokenizer, turns["prompt"], turns["tools"], add_generation_prompt=True)
        sides = [
            chat_template.token_ids(tokenizer, turns["prompt"] + turns[side], turns["tools"])
            for side in ("chosen", "rejected")
        ]
        start = min(chat_template.common_prefix_length(prompt, side_ids) for side_ids in sides)
        if start < max_length:
            pairs.append(TokenizedPair(sides[0][:max_length], sides[1][:max_length], start))
    return pairs


def can_measure(trainer: Any) -> bool:
    """Return whether one process has all weights, which measuring held-out pairs needs."""
    from accelerate.utils import DistributedType

    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return trainer.accelerator.distributed_type not in sharded


def pair_logprobs(trainer: Any, pairs: Sequence[TokenizedPair], head: Head) -> list[PairLogprobs]:
    """Return the log-probabilities of the answers of ``pairs`` under the trainer's model.

    A reward model (``head`` "score") has scores instead, counted as one token each.
    """
    size = max(1, trainer.args.per_device_eval_batch_size)
    # Pairs of similar length together, so that a batch has little padding.
    order = sorted(range(len(pairs)), key=lambda index: max(len(pairs[index].chosen), len(pairs[index].rejected)))
    measured: dict[int, PairLogprobs] = {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    for first in range(0, len(order), size):
        indices = order[first : first + size]
        group = [pairs[index] for index in indices]
        sums, counts = _batch_logprobs(trainer, model, group, head)
        half = len(group)  # the chosen answers come first
        results = map(PairLogprobs, sums[:half], sums[half:], counts[:half], counts[half:])
        measured |= zip(indices, results, strict=True)
    model.train(was_training)
    return [measured[index] for index in range(len(pairs))]


def _batch_logprobs(
    trainer: Any, model: Any, pairs: Sequence[TokenizedPair], head: Head
) -> tuple[list[float], list[int]]:
    """Return the sum of log-probabilities and the number of tokens of all chosen, then all rejected answers."""
    import torch

    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    starts = [pair.start for pair in pairs] * 2
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    pad = trainer.processing_class.pad_token_id or 0
    input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    with torch.no_grad(), trainer.accelerator.autocast():
        if head == "score":
            output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            return output.logits.float()[:, 0].tolist(), [1] * len(rows)
        labels = [
            [-100] * start + row[start:] + [-100] * (longest - len(row))
            for row, start in zip(rows, starts, strict=True)
        ]
        # TRL's head on the model: log-probabilities of the labels, without logits over the vocabulary.
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=torch.tensor(labels, device=device),
            fused_lm_head=True,
            use_cache=False,
        )
    sums = output.log_probs.float().sum(dim=1).tolist()
    return sums, [len(row) - start for row, start in zip(rows, starts, strict=True)]


@contextlib.contextmanager
def patch_answer_only_logits() -> Iterator[None]:
    """Make TRL compute logits only at the answers' tokens on a CPU, as it does by itself on CUDA.

    Without CUDA, TRL computes them for prompts and padding too, to suit devices that compile for every shape. The
    results are the same. On 2 cores with a vocabulary of 49k tokens: 0.46 pairs/s with them, 0.70 pairs/s without.
    """
    import torch
    from trl.trainer import utils

    name = "_use_triton"  # TRL has no setting for it; if a later TRL lacks the name, training is only slower
    if torch.cuda.is_available() or not hasattr(utils, name):
        yield
        return
    original = getattr(utils, name)
    setattr(utils, name, lambda _device: True)
    try:
        yield
    finally:
        setattr(utils, name, original)


def last_loss(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean loss over the last tenth of the log entries; None without any."""
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else None


TRL_LOG_KEYS = {
    "margin": ("rewards/margins", "margin"),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "reward": ("reward",),
    "kl": ("kl",),
}
"""Names of these values in the log entries of TRL's trainers."""


def log_point(logs: Mapping[str, Any], *, beta: float) -> dict[str, float]:
    """Return the values of one log entry: loss, and if they are logged margin, accuracy, reward and kl.

    If the trainer logs no KL, it is estimated from the pairs. Their answers were mostly sampled from the reference, so
    the mean of log p_reference - log p estimates KL(reference || model), in nats per answer.
    """
    values = {"loss": float(logs["loss"])} if "loss" in logs else {}
    for name, keys in TRL_LOG_KEYS.items():
        value = next((logs[key] for key in keys if key in logs), None)
        if value is not None:
            values[name] = float(value)
    rewards = [logs.get(f"rewards/{side}") for side in ("chosen", "rejected")]
    if "kl" not in values and None not in rewards:
        values["kl"] = -sum(map(float, rewards)) / 2 / beta  # type: ignore[arg-type]  # None was excluded
    return values


def history(entries: Sequence[Mapping[str, Any]], *, beta: float) -> list[dict[str, float]]:
    """Return the training history for the report: at most ``MAX_HISTORY_POINTS`` evenly spaced points."""
    points = [{"step": int(entry["step"]), **log_point(entry, beta=beta)} for entry in entries if "loss" in entry]
    every = max(1, -(-len(points) // MAX_HISTORY_POINTS))
    return points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])


def progress_callback(log: Callable[[str], None], *, per_step: int, unit: str, beta: float) -> Any:
    """Build a trainer callback that logs progress, and stops the training if its loss is not finite."""
    from transformers import TrainerCallback

    class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # the base is not typed
        def __init__(self) -> None:
            self.started = self.last_logged = 0.0
            self.first_step = 0

        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.started, self.last_logged, self.first_step = time.monotonic(), 0.0, state.global_step
            # A resumed state has its old intervals; the current settings apply.
            state.save_steps, state.logging_steps = args.save_steps, max(1, int(args.logging_steps))

        def on_log(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
            logs = kwargs.get("logs") or {}
            if "loss" not in logs:
                return
            # Before the step's checkpoint is saved, so that no checkpoint has broken weights.
            if not math.isfinite(float(logs["loss"])):
                raise RunError(
                    f"the loss is {logs['loss']} at step {state.global_step}",
                    hint="Lower learning_rate under [train], and pass `--overwrite`.",
                )
            now, last = time.monotonic(), state.global_step >= state.max_steps
            if self.last_logged and not last and now - self.last_logged < LOG_INTERVAL_S:
                return
            self.last_logged = now
            log(self.line(state, logs, now))

        def line(self, state: Any, logs: Mapping[str, Any], now: float) -> str:
            done, remaining = state.global_step - self.first_step, state.max_steps - state.global_step
            seconds_per_step = (now - self.started) / max(done, 1)
            values = log_point(logs, beta=beta)
            parts = [f"step {state.global_step}/{state.max_steps}", f"loss {values['loss']:.4f}"]
            titles = {"margin": "reward margin", "accuracy": "reward accuracy", "reward": "reward", "kl": "KL estimate"}
            if any(values.get(key) for key in ("margin", "reward", "kl")):  # all zero before the first step
                parts += [f"{title} {values[name]:.3f}" for name, title in titles.items() if name in values]
            parts.append(f"{per_step / max(seconds_per_step, 1e-9):.2g} {unit}/s")
            if remaining:
                parts.append(f"about {format_duration(seconds_per_step * remaining)} left")
            return ", ".join(parts)

    return ProgressCallback()
