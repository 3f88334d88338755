"""How a training goes, while it runs and on held-out pairs before and after it."""

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
MAX_TEST_PAIRS = 2_000  # a share measured on so many is known to two hundredths
LOG_INTERVAL_S = 30.0


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """The log-probabilities that a model gives to the two answers of a pair, summed over their tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


def preference_accuracy(pairs: Sequence[PairLogprobs]) -> Estimate | None:
    """The share of pairs whose chosen answer is likelier a token. By token, or the shorter answer would mostly win."""
    correct = sum(
        pair.chosen / max(pair.chosen_tokens, 1) > pair.rejected / max(pair.rejected_tokens, 1) for pair in pairs
    )
    return wilson(correct, len(pairs))


def preference_shift(before: Sequence[PairLogprobs], after: Sequence[PairLogprobs]) -> Estimate | None:
    """The share of pairs whose chosen answer gained more (lost less) than the rejected one: DPO's reward accuracy."""
    gained = sum(new.chosen - old.chosen > new.rejected - old.rejected for old, new in zip(before, after, strict=True))
    return wilson(gained, len(before))


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A held-out pair as token ids: prompt and answer together, and where the answer begins."""

    chosen: list[int]
    rejected: list[int]
    start: int


def tokenize_pairs(frame: pl.DataFrame | None, tokenizer: Any, max_length: int) -> list[TokenizedPair]:
    """The pairs of ``frame`` as the model reads them, cut at ``max_length``; without those whose prompt fills it."""
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
    """Whether each process has the whole model, so that held-out pairs can be measured by one."""
    from accelerate.utils import DistributedType

    return trainer.accelerator.distributed_type not in (
        DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM,
    )  # fmt: skip


def pair_logprobs(trainer: Any, pairs: Sequence[TokenizedPair], head: Head) -> list[PairLogprobs]:
    """What ``trainer``'s model gives to the answers of ``pairs``: log-probabilities, or scores (as of one token)."""
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    pad = trainer.processing_class.pad_token_id or 0
    device = next(model.parameters()).device
    size = max(1, trainer.args.per_device_eval_batch_size)
    measured: dict[int, PairLogprobs] = {}
    training = model.training
    model.eval()
    order = sorted(range(len(pairs)), key=lambda place: max(len(pairs[place].chosen), len(pairs[place].rejected)))
    for first in range(0, len(pairs), size):  # those of one length together, so that little of a batch is padding
        indices = order[first : first + size]
        group = [pairs[index] for index in indices]
        rows = [pair.chosen for pair in group] + [pair.rejected for pair in group]
        starts = [pair.start for pair in group] * 2
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        with torch.no_grad(), trainer.accelerator.autocast():
            if head == "score":
                scored = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
                sums, counts = scored.logits.float()[:, 0].tolist(), [1] * len(rows)
            else:
                labels = [[-100] * start + row[start:] + [-100] * (longest - len(row))
                          for row, start in zip(rows, starts, strict=True)]  # fmt: skip
                # The head that TRL puts on the model: log-probabilities of labels without logits over the vocabulary.
                scored = model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    labels=torch.tensor(labels, device=device),
                    fused_lm_head=True,
                    use_cache=False,
                )
                sums = scored.log_probs.float().sum(dim=1).tolist()
                counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
        half = len(group)  # chosen first, then rejected
        results = map(PairLogprobs, sums[:half], sums[half:], counts[:half], counts[half:])
        measured |= zip(indices, results, strict=True)
    model.train(training)
    return [measured[index] for index in range(len(pairs))]


@contextlib.contextmanager
def patch_answer_only_logits() -> Iterator[None]:
    """On a CPU, have TRL compute the vocabulary's scores at the answers' tokens only; elsewhere it does so by itself.

    Off CUDA it computes them for prompts and padding too, for devices that compile anew for every shape. The numbers
    are the same without. Measured on 2 cores, 49k tokens of vocabulary: 0.46 pairs/s with them, 0.70 without.
    """
    import torch
    from trl.trainer import utils

    name = "_use_triton"  # TRL has no setting for it; where a later TRL has no such name, it is only slower
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
    """The mean loss over the last tenth of what was logged."""
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else None


TRL_LOG_KEYS = {
    "margin": ("rewards/margins", "margin"),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "reward": ("reward",),
    "kl": ("kl",),
}
"""What a log entry is called by the trainers of TRL."""


def log_point(logs: Mapping[str, Any], *, beta: float) -> dict[str, float]:
    """What one log entry says: loss, and where there is one margin, accuracy, reward, kl.

    Where the trainer logs no KL, it is estimated from the pairs: their answers were mostly sampled from the reference,
    so the mean of log p_reference - log p is an estimate of KL(reference || model), in nats an answer.
    """
    values = {"loss": float(logs["loss"])} if "loss" in logs else {}
    for name, keys in TRL_LOG_KEYS.items():
        value = next((logs[key] for key in keys if key in logs), None)
        if value is not None:
            values[name] = float(value)
    rewards = [logs.get(f"rewards/{side}") for side in ("chosen", "rejected")]
    if "kl" not in values and None not in rewards:
        values["kl"] = -sum(map(float, rewards)) / 2 / beta  # type: ignore[arg-type]  # None was looked for
    return values


def history(entries: Sequence[Mapping[str, Any]], *, beta: float) -> list[dict[str, float]]:
    """The course of a training in at most ``MAX_HISTORY_POINTS`` evenly spaced points, for its report."""
    points = [{"step": int(entry["step"]), **log_point(entry, beta=beta)} for entry in entries if "loss" in entry]
    every = max(1, -(-len(points) // MAX_HISTORY_POINTS))
    return points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])


def progress_callback(log: Callable[[str], None], *, per_step: int, unit: str, beta: float) -> Any:
    """A trainer callback that tells now and then how far it is, and ends a training whose loss is no number."""
    from transformers import TrainerCallback

    class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # the base is not typed
        def __init__(self) -> None:
            self.started = self.last_logged = 0.0
            self.first_step = 0

        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.started, self.last_logged, self.first_step = time.monotonic(), 0.0, state.global_step
            # A resumed state brings its old intervals; what was asked for now counts.
            state.save_steps, state.logging_steps = args.save_steps, max(1, int(args.logging_steps))

        def on_log(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
            logs = kwargs.get("logs") or {}
            if "loss" not in logs:
                return
            # Before the step's checkpoint is saved, so that there is none to go on from with broken weights.
            if not math.isfinite(float(logs["loss"])):
                raise RunError(
                    f"the loss is {logs['loss']} at step {state.global_step}",
                    hint="Lower learning_rate under [train], and give another --output or remove its checkpoints.",
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
            # Before the first step has been taken, all of them are zero.
            parts += [f"{title} {values[name]:.3f}" for name, title in titles.items() if name in values and any(
                values.get(key) for key in ("margin", "reward", "kl"))]  # fmt: skip
            parts.append(f"{per_step / max(seconds_per_step, 1e-9):.2g} {unit}/s")
            return ", ".join(
                [*parts, *([f"about {format_duration(seconds_per_step * remaining)} left"] if remaining else [])]
            )

    return ProgressCallback()
