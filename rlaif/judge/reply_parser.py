"""Parse the replies of judges. An unparsable reply raises :class:`UnparsableReplyError`; it never becomes a tie, a 0 or
a default.

The output mode depends on what the server supports:

- ``choice``: vLLM generates one token, constrained to the verdict words, and rlaif reads its probabilities.
- ``logprobs``: the same without the constraint, so at least half of the probability must be on the words.
- ``json``: a JSON object that follows a schema, with the reasoning before the verdict if the judge reasons first.
- ``score``: the reply of a reward model, which is one number.

The reasoning of a reasoning model is not a verdict. If such a model is asked for one token, that token starts its
reasoning. This raises :class:`ReasoningReplyError`, and rlaif asks the model for JSON instead.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from rlaif.llm.chat_protocol import ChatChoice
from rlaif.llm.request import UnparsableReplyError

OutputMode = Literal["choice", "logprobs", "json", "score"]
MIN_MASS = 0.5
"""Minimum total probability of the verdict words."""
TOP_LOGPROBS = 20
"""Number of alternatives requested for the token."""
REASONING_PREFIXES = ("<think", "<|channel", "<thought", "[THINK]", "<reasoning")
"""Start of the reasoning in a reply from which the server has not separated it."""


class ReasoningReplyError(UnparsableReplyError):
    """The reply's first token starts the model's reasoning and is not a verdict."""


def decoding_params(
    mode: OutputMode, words: Sequence[str], reasoning: bool, max_tokens: int, temperature: float
) -> dict[str, Any]:
    """Return the fields of the request body that determine the form of the reply."""
    if mode == "json":
        value = {"type": "string", "enum": list(words)}
        fields = {"reasoning": {"type": "string"}, "verdict": value} if reasoning else {"verdict": value}
        schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        return {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            },
        }
    constraint = {"structured_outputs": {"choice": list(words)}} if mode == "choice" else {}
    return {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOGPROBS, **constraint}


def reply_instruction(mode: OutputMode, words: Sequence[str], reasoning: bool) -> str:
    """Return the text for the placeholder ``{reply}`` in the judge's prompt."""
    options = f"{', '.join(words[:-1])} or {words[-1]}"
    if mode != "json":
        return f"Reply with one of these and nothing else: {options}."
    if reasoning:
        return (
            "Weigh it in a few sentences, then decide. Reply with JSON only: "
            f'{{"reasoning": "...", "verdict": "..."}}, where verdict is {options}.'
        )
    return f'Reply with JSON only: {{"verdict": "..."}}, where verdict is {options}.'


def verdict_distribution(
    mode: OutputMode, choice: ChatChoice, words: Sequence[str]
) -> tuple[list[float], float | None]:
    """Return the probability of each of ``words``, normalized to 1, and their total before that (None for json).

    Raises :class:`UnparsableReplyError`.
    """
    if mode == "json":
        verdict = _json_verdict(choice, words)
        return [float(word == verdict) for word in words], None
    beginnings = (choice.text.lstrip(), _first_token(choice))
    if choice.reasoning or any(text.startswith(REASONING_PREFIXES) for text in beginnings):
        raise ReasoningReplyError("the model reasons before it answers, so its first token is not a verdict")
    weights = _token_weights(choice.logprobs, words)
    mass = sum(weights)
    if mass < MIN_MASS:
        raise UnparsableReplyError(
            f"only {mass:.2f} of the probability is on {', '.join(words)} (reply: {choice.text[:40]!r})"
        )
    return [weight / mass for weight in weights], min(mass, 1.0)


def _first_token(choice: ChatChoice) -> str:
    first = choice.logprobs[0] if choice.logprobs else None
    return str(first.get("token")).lstrip() if isinstance(first, dict) else ""


def _token_weights(tokens: Sequence[Any] | None, words: Sequence[str]) -> list[float]:
    """Return the probability of each word, summed over the alternatives of the first token that begin the word.

    Leading spaces and quotes are ignored. For words of more than one letter, so is case, and a part of the word counts.
    """
    weights = [0.0] * len(words)
    alternatives = tokens[0].get("top_logprobs") if tokens and isinstance(tokens[0], dict) else None
    if not isinstance(alternatives, list) or not alternatives:  # the token alone would count as certain
        raise UnparsableReplyError("the reply has no token probabilities")
    for alternative in alternatives:
        value = alternative if isinstance(alternative, dict) else {}
        token, logprob = value.get("token"), value.get("logprob")
        if not isinstance(token, str) or not isinstance(logprob, (int, float)) or not logprob <= 1e-3:
            raise UnparsableReplyError("the reply has invalid token probabilities")
        plain = token.strip(" \t\n\"'*[(")
        for index, word in enumerate(words):
            # A single lowercase letter may be a word ("a") instead of the verdict.
            matches = plain == word if len(word) == 1 else word.casefold().startswith(plain.casefold())
            if plain and matches:
                weights[index] += math.exp(max(logprob, -1e4))
    return weights


def _json_verdict(choice: ChatChoice, words: Sequence[str]) -> str:
    """Return the verdict word of a JSON reply. Raises :class:`UnparsableReplyError`."""
    if choice.finish_reason == "length":
        raise UnparsableReplyError("the reply was cut off at judge.max_tokens, which includes the reasoning")
    text = choice.text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise UnparsableReplyError(f"the reply is not JSON: {text[:80]!r}") from None
    verdict = value.get("verdict") if isinstance(value, dict) else None
    if isinstance(verdict, int) and not isinstance(verdict, bool):
        verdict = str(verdict)
    for word in words:  # their first letters differ even if case is ignored
        if isinstance(verdict, str) and verdict.strip().casefold() == word.casefold():
            return word
    raise UnparsableReplyError(f"the verdict is not one of {', '.join(words)}: {text[:80]!r}")
