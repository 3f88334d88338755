"""What a judge's reply says. A reply that cannot be read is :class:`UnparsableReplyError`: never a tie, a 0 or a
default.

Three ways to ask, by what the engine can do:

- ``choice``: vLLM is held to the verdict words, one token is generated, and its probabilities are read;
- ``logprobs``: the same without being held, so at least half of the probability must lie on the words;
- ``json``: a JSON object by schema, with the reasoning first where the judge wants it; the verdict is what it says.

A fourth, ``score``, is for reward models, whose reply is one number.

What a model thinks before it answers is no verdict. Asked for one token, a model that thinks gives the first of its
thoughts: that is :class:`ReasoningReplyError`, and such a model is asked for JSON instead.
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
TOP_LOGPROBS = 20
THINKING_PREFIXES = ("<think", "<|channel", "<thought", "[THINK]", "<reasoning")
"""How thoughts begin where no server has split them off."""


class ReasoningReplyError(UnparsableReplyError):
    """The reply's first token is the beginning of a thought, not a verdict."""


def decoding_params(
    mode: OutputMode, words: Sequence[str], reasoning: bool, max_tokens: int, temperature: float
) -> dict[str, Any]:
    """The part of a request that says how the verdict is to be given."""
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
    """The sentence that stands in the judge's prompt for ``{reply}``."""
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
    """The probability of each of ``words`` (adding up to 1), and the mass that lay on them together (None for json).

    Raises :class:`UnparsableReplyError`.
    """
    if mode == "json":
        verdict = _verdict(choice, words)
        return [float(word == verdict) for word in words], None
    if (
        choice.reasoning
        or choice.text.lstrip().startswith(THINKING_PREFIXES)
        or _first_token(choice).startswith(THINKING_PREFIXES)
    ):
        raise ReasoningReplyError("the model thinks before it answers, so its first token is no verdict")
    weights = _token_weights(choice.logprobs, words)
    mass = sum(weights)
    if mass < MIN_MASS:
        raise UnparsableReplyError(
            f"only {mass:.2f} of the probability lies on {', '.join(words)} (reply: {choice.text[:40]!r})"
        )
    return [weight / mass for weight in weights], min(mass, 1.0)


def _first_token(choice: ChatChoice) -> str:
    first = choice.logprobs[0] if choice.logprobs else None
    return str(first.get("token")).lstrip() if isinstance(first, dict) else ""


def _token_weights(tokens: Sequence[Any] | None, words: Sequence[str]) -> list[float]:
    """Probability on each word by the first token's alternatives, over the variants of a word's beginning (leading
    space, quotes; of longer words also case and a part)."""
    weights = [0.0] * len(words)
    alternatives = tokens[0].get("top_logprobs") if tokens and isinstance(tokens[0], dict) else None
    if not isinstance(alternatives, list) or not alternatives:  # the token alone would say that it is certain
        raise UnparsableReplyError("the reply carries no token probabilities")
    for alternative in alternatives:
        value = alternative if isinstance(alternative, dict) else {}
        token, logprob = value.get("token"), value.get("logprob")
        if not isinstance(token, str) or not isinstance(logprob, (int, float)) or not logprob <= 1e-3:
            raise UnparsableReplyError("the token probabilities are not readable")
        plain = token.strip(" \t\n\"'*[(")
        for index, word in enumerate(words):
            # A single letter in lower case is a word of its own ("a"), not a verdict.
            matches = plain == word if len(word) == 1 else word.casefold().startswith(plain.casefold())
            if plain and matches:
                weights[index] += math.exp(max(logprob, -1e4))
    return weights


def _verdict(choice: ChatChoice, words: Sequence[str]) -> str:
    if choice.finish_reason == "length":
        raise UnparsableReplyError(
            "the reply was cut off before its end; judge.max_tokens bounds it, thinking included"
        )
    text = choice.text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise UnparsableReplyError(f"the reply is not JSON: {text[:80]!r}") from None
    verdict = value.get("verdict") if isinstance(value, dict) else None
    if isinstance(verdict, int) and not isinstance(verdict, bool):
        verdict = str(verdict)
    for word in words:  # they differ in their first letter, whatever its case
        if isinstance(verdict, str) and verdict.strip().casefold() == word.casefold():
            return word
    raise UnparsableReplyError(f"the verdict is none of {', '.join(words)}: {text[:80]!r}")
