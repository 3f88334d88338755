"""How a training goes, while it runs and on held-out pairs before and after it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.errors import RunError
from rlaif.stats import Estimate, wilson

TEST_PAIRS = 2_000  # a share measured on so many is known to two hundredths
SAY_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-probabilities that a model gives to the two answers of a pair, summed over their tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


def accuracy(pairs: Sequence[Likelihood]) -> Estimate | None:
    """The share of pairs whose chosen answer is likelier a token. By token, or the shorter answer would mostly win."""
    right = sum(
        pair.chosen / max(pair.chosen_tokens, 1) > pair.rejected / max(pair.rejected_tokens, 1) for pair in pairs
    )
    return wilson(right, len(pairs))


def moved(before: Sequence[Likelihood], after: Sequence[Likelihood]) -> Estimate | None:
    """The share of pairs whose chosen answer gained more (lost less) than the rejected one: DPO's reward accuracy."""
    gained = sum(new.chosen - old.chosen > new.rejected - old.rejected for old, new in zip(before, after, strict=True))
    return wilson(gained, len(before))


def likelihoods(trainer: Any) -> list[Likelihood]:
    """What ``trainer``'s model gives to the answers of its held-out pairs; empty where it has none."""
    import torch

    if trainer.eval_dataset is None or not len(trainer.eval_dataset):
        return []
    model = trainer.model
    measured: list[Likelihood] = []
    model.eval()
    for batch in trainer.get_eval_dataloader():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad(), trainer.accelerator.autocast():
            # The head that TRL puts on the model: log-probabilities of the labels without logits over the vocabulary.
            scored = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                fused_lm_head=True,
                use_cache=False,
            )
        sums = scored.log_probs.float().sum(dim=1).tolist()
        tokens = batch["completion_mask"][:, 1:].sum(dim=1).tolist()
        half = len(sums) // 2  # chosen first, then rejected
        measured += map(Likelihood, sums[:half], sums[half:], tokens[:half], tokens[half:])
    return measured


@contextlib.contextmanager
def only_answers_scored() -> Iterator[None]:
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


def teller(say: Callable[[str], None], *, pairs_per_step: int) -> Any:
    """A trainer callback that tells now and then how far it is, and ends a training whose loss is no number."""
    from transformers import TrainerCallback

    class Teller(TrainerCallback):  # type: ignore[misc]  # the base is not typed
        def __init__(self) -> None:
            self.started = self.said = 0.0
            self.first = 0

        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.started, self.said, self.first = time.monotonic(), 0.0, state.global_step
            # A resumed state brings its old intervals; what was asked for now counts.
            state.save_steps, state.logging_steps = args.save_steps, max(1, int(args.logging_steps))

        def on_log(self, _args: Any, state: Any, _control: Any, **seen: Any) -> None:
            logs = seen.get("logs") or {}
            if "loss" not in logs:
                return
            # Before the step's checkpoint is saved, so that there is none to go on from with broken weights.
            if not math.isfinite(float(logs["loss"])):
                raise RunError(
                    f"the loss is {logs['loss']} at step {state.global_step}",
                    mend="Lower learning_rate under [train], and give another --output or remove its checkpoints.",
                )
            now, last = time.monotonic(), state.global_step >= state.max_steps
            if self.said and not last and now - self.said < SAY_EVERY_S:
                return
            self.said = now
            say(self.line(state, logs, now))

        def line(self, state: Any, logs: Mapping[str, Any], now: float) -> str:
            done, left = state.global_step - self.first, state.max_steps - state.global_step
            a_step = (now - self.started) / max(done, 1)
            parts = [f"step {state.global_step}/{state.max_steps}", f"loss {float(logs['loss']):.4f}"]
            for title, name in (("reward margin", "rewards/margins"), ("reward accuracy", "rewards/accuracies")):
                if name in logs and logs.get("rewards/margins"):  # all are zero before the first step has been taken
                    parts.append(f"{title} {float(logs[name]):.3f}")
            parts.append(f"{pairs_per_step / max(a_step, 1e-9):.2g} pairs/s")
            return ", ".join([*parts, *([f"about {_duration(a_step * left)} left"] if left else [])])

    return Teller()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
