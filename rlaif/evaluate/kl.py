"""How far the trained model has gone from its reference: KL(trained || reference), from its own answers.

A Monte Carlo estimate: the mean of log p_trained - log p_reference over answers sampled from the trained model. Both
are computed by transformers in one pass each over the sampled answers, with the adapter on and off where there is one,
and both at temperature 1: for answers sampled at another one, or with top_p below 1, the mean is no estimate of the KL
(``kl_caveat``). It is told all the same, as evaluations that sample alike can be compared by it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlaif.records import to_template_turn
from rlaif.stats import Estimate

MAX_TOKENS = 1_024


def estimate_kl(
    answers: Sequence[tuple[Mapping[str, Any], str]], *, reference: str, trained: str, adapter: bool
) -> dict[str, Estimate] | None:
    """``answers``: (prompt, text) of the trained model, a prompt being its messages and tools, if it has some, as the
    chat completions protocol has them. ``reference`` and ``trained`` are folders or hub names; with
    ``adapter``, ``trained`` is an adapter over ``reference``. Gives nats by ``answer`` and by ``token``; None where no
    answer has a token within the first ``MAX_TOKENS``."""
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
    # A ratio of sums: its spread is that of what each answer adds beyond its share of tokens.
    residuals = [log_ratio - per_token * count for log_ratio, count in zip(log_ratios, counts, strict=True)]
    return {
        "answer": _normal_interval(log_ratios, sum(log_ratios) / len(log_ratios), 1.0),
        "token": _normal_interval(residuals, per_token, len(counts) / sum(counts)),
    }


def kl_caveat(temperature: float, top_p: float) -> str | None:
    """What to say beside the figure of answers that were sampled so, or None."""
    if temperature == 1 and top_p == 1:
        return None
    return (
        f"the answers were sampled at temperature {temperature:g} and top_p {top_p:g}, the KL is measured at 1 and 1: "
        "it is biased, and comparable only with evaluations that sampled alike"
    )


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Without the bars that transformers draws while it loads."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _tokens(tokenizer: Any, prompt: Mapping[str, Any], text: str) -> tuple[list[int], int] | None:
    """The token ids of prompt and answer, and where the answer begins."""
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
    """``value`` with the normal interval of the mean of ``values`` times ``scale``."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((item - mean) ** 2 for item in values) / max(n - 1, 1)
    half = 1.96 * math.sqrt(variance / n) * scale
    return Estimate(value, value - half, value + half, n)
