"""KL divergence of the trained model from its reference, KL(trained || reference), from the trained model's answers.

A Monte Carlo estimate: the mean of log p_trained - log p_reference over answers sampled from the trained model.
transformers computes both terms in one pass each over the answers; with an adapter, once with it and once without.
Both terms are at temperature 1. For answers sampled at another temperature, or with top_p below 1, the mean is biased
(``kl_caveat``). It is reported anyway, because evaluations that sample alike can be compared by it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.records import to_template_turn
from rlaif.stats import Estimate

MAX_TOKENS = 1_024
"""Tokens of prompt and answer; the rest of a longer answer is ignored."""


@dataclass(frozen=True, slots=True)
class KlEstimate:
    """KL divergence in nats, per answer and per token."""

    per_answer: Estimate
    per_token: Estimate


def estimate_kl(
    answers: Sequence[tuple[Mapping[str, Any], str]], *, reference: str, trained: str, adapter: bool
) -> KlEstimate | None:
    """Estimate the divergence from ``answers``, or return None if no answer has a token within ``MAX_TOKENS``.

    ``answers``: (prompt, text) of the trained model; a prompt has "messages" and perhaps "tools", as in the chat
    completions protocol. ``reference`` and ``trained``: folders or hub names; with ``adapter``, ``trained`` is an
    adapter on top of ``reference``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = [ids for ids in (_tokens(tokenizer, prompt, text) for prompt, text in answers) if ids is not None]
    if not batches:
        return None
    base = AutoModelForCausalLM.from_pretrained(reference, **options).to(device).eval()
    reference_logprobs = [_answer_logprob(base, ids, start, device) for ids, start in batches]
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, trained).eval()
    else:
        del base
        model = AutoModelForCausalLM.from_pretrained(trained, **options).to(device).eval()
    trained_logprobs = [_answer_logprob(model, ids, start, device) for ids, start in batches]
    log_ratios = [after - before for before, after in zip(reference_logprobs, trained_logprobs, strict=True)]
    counts = [len(ids) - start for ids, start in batches]
    per_token = sum(log_ratios) / sum(counts)
    # A ratio of sums: its variance is that of each answer's difference from what its tokens predict.
    residuals = [log_ratio - per_token * count for log_ratio, count in zip(log_ratios, counts, strict=True)]
    return KlEstimate(
        per_answer=_normal_interval(log_ratios, sum(log_ratios) / len(log_ratios), 1.0),
        per_token=_normal_interval(residuals, per_token, len(counts) / sum(counts)),
    )


def kl_caveat(temperature: float, top_p: float) -> str | None:
    """Return a warning about answers sampled with these settings, or None at 1 and 1."""
    if temperature == 1 and top_p == 1:
        return None
    return (
        f"the answers were sampled at temperature {temperature:g} and top_p {top_p:g}, but the KL divergence is "
        "measured at 1 and 1: it is biased, and comparable only between evaluations with the same sampling settings"
    )


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Disable the progress bars of transformers."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _tokens(tokenizer: Any, prompt: Mapping[str, Any], text: str) -> tuple[list[int], int] | None:
    """Return the token ids of prompt and answer, and the index of the answer's first token."""
    encoded = tokenizer.apply_chat_template(
        [to_template_turn(turn) for turn in prompt["messages"]],
        tools=prompt.get("tools") or None,
        add_generation_prompt=True,
        return_dict=True,
    )
    prompt_ids = list(encoded["input_ids"])
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*prompt_ids, *answer][:MAX_TOKENS]
    return (ids, len(prompt_ids)) if len(ids) > len(prompt_ids) else None


def _answer_logprob(model: Any, ids: list[int], start: int, device: str) -> float:
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, start - 1 : -1].float()
        chosen = torch.tensor(ids[start:], device=device)
        return float(torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None]).sum())


def _normal_interval(values: Sequence[float], value: float, scale: float) -> Estimate:
    """Return ``value`` with the 95 % normal interval of the mean of ``values``, its width times ``scale``."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((item - mean) ** 2 for item in values) / max(n - 1, 1)
    half = 1.96 * math.sqrt(variance / n) * scale
    return Estimate(value, value - half, value + half, n)
