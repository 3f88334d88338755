"""Parser of chat completions: choices and usage, from whatever a server sent. Nothing in a reply is trusted.

A body that is not a chat completion raises :class:`MalformedResponseError`. Malformed fields that decide nothing are
ignored.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from rlaif.errors import EndpointError
from rlaif.llm.usage import Usage
from rlaif.records import replace_surrogates, replace_surrogates_deep

CHAT_PATH = "/chat/completions"
CLASSIFY_PATH = "/classify"
"""vLLM's path for sequence-classification models, next to /v1 and not below it."""


class MalformedResponseError(Exception):
    """The server answered 200 with something that is not a chat completion."""


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One answer. ``logprobs`` is the protocol's list with one entry per token: {token, logprob, top_logprobs}."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    logprobs: list[dict[str, Any]] | None
    tool_calls: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class ChatResponse:
    """The ``choices`` of a chat completion, or the ``score`` of a reward model."""

    choices: list[ChatChoice]
    usage: Usage
    score: float | None = None


CostFunction = Callable[[int, int, int], float | None]
"""Cost in US dollars of prompt tokens, cached prompt tokens (a part of the former) and completion tokens."""


def parse_json(raw: bytes, redact: Callable[[str], str] = str) -> Any:
    """Parse JSON from a server. Raises :class:`MalformedResponseError`, which quotes the start of the redacted body."""
    try:
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            # Lone surrogates are legal in JSON's escapes; orjson rejects them, the standard library accepts them.
            return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        # Redact before cutting: a cut through a secret would leave a part of it.
        excerpt = redact(raw.decode("latin-1")).encode("latin-1", "replace")[:80]
        raise MalformedResponseError(f"the body is not JSON: {str(error)[:120]} ({excerpt!r})") from None


def parse_chat_response(
    value: Any, cost_of: CostFunction, redact: Callable[[str], str] = str, endpoint_path: str = CHAT_PATH
) -> ChatResponse:
    """Parse the JSON that ``endpoint_path`` returned. ``redact`` removes secrets from a server's error message.

    Raises :class:`MalformedResponseError`, and :class:`EndpointError` if a reward model has more than one label.
    """
    if not isinstance(value, dict):
        raise MalformedResponseError(f"the body is not an object but {type(value).__name__}")
    score = _parse_score(value) if endpoint_path == CLASSIFY_PATH else None
    choices = value.get("choices") if score is None else []
    if not isinstance(choices, list) or (score is None and not choices):
        error = value.get("error")
        error = error.get("message") if isinstance(error, dict) else error
        raise MalformedResponseError(
            "the reply has no choices" + (f": {redact(error)[:200]}" if isinstance(error, str) else "")
        )
    usage = value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt_tokens, completion_tokens = _token_count(usage, "prompt_tokens"), _token_count(usage, "completion_tokens")
    details = usage.get("prompt_tokens_details")
    cached = min(prompt_tokens, _token_count(details, "cached_tokens")) if isinstance(details, dict) else 0
    cost_usd = cost_of(prompt_tokens, cached, completion_tokens) or 0.0
    token_usage = Usage(prompt_tokens, cached, completion_tokens, cost_usd)
    return ChatResponse([_parse_choice(choice) for choice in choices], token_usage, score)


def _parse_score(value: dict[str, Any]) -> float:
    """Return the score of a reward model for one conversation."""
    data = value.get("data")
    first = data[0] if isinstance(data, list) and data else None
    numbers = first.get("probs") if isinstance(first, dict) else None
    if isinstance(numbers, list) and len(numbers) > 1:
        raise EndpointError(
            f"the model has {len(numbers)} labels, but a reward model has one",
            hint="Use a sequence-classification model with `num_labels = 1`.",
        )
    number = numbers[0] if isinstance(numbers, list) and numbers else None
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
        raise MalformedResponseError(f"the reply has no score ({number!r})")
    return float(number)


def _parse_choice(value: Any) -> ChatChoice:
    message = value.get("message") if isinstance(value, dict) else None
    if not isinstance(message, dict):
        raise MalformedResponseError("a choice has no message")
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    if not isinstance(content, str):
        raise MalformedResponseError("a message's content is not text")
    reasoning: Any = message.get("reasoning_content") or message.get("reasoning")
    text = replace_surrogates(content)
    if isinstance(reasoning, str) and reasoning:  # the server has already split it off
        reasoning = replace_surrogates(reasoning)
    else:
        reasoning, text = split_reasoning(text)
    logprobs = value.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    calls = message.get("tool_calls")
    calls = (
        [replace_surrogates_deep(call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else None
    )
    finish = value.get("finish_reason")
    return ChatChoice(
        text=text,
        reasoning=reasoning,
        finish_reason=replace_surrogates(finish) if isinstance(finish, str) else None,
        logprobs=tokens if isinstance(tokens, list) and tokens else None,
        tool_calls=calls or None,
    )


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Split ``text`` into (reasoning, answer).

    Reasoning ends at ``</think>``. The model or its chat template may have written ``<think>``. Reasoning that was cut
    off leaves an empty answer.
    """
    starts_open = text.lstrip().startswith("<think>")
    reasoning, end_tag, answer = text.partition("</think>")
    if end_tag:
        return reasoning.strip().removeprefix("<think>").strip() or None, answer.lstrip()
    if starts_open:
        return text.strip().removeprefix("<think>").strip() or None, ""
    return None, text


def _token_count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else 0


def error_message(raw: bytes) -> str:
    """Return the message in the body of an HTTP error: ``error.message`` or one of the shapes used in its place."""
    try:
        value = parse_json(raw)
    except MalformedResponseError:
        value = None
    if isinstance(value, dict):
        error = value.get("error") or value
        message = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
        if isinstance(message, str) and message.strip():
            return message
    return raw.decode("utf-8", "replace") or "no reason given"


def parse_retry_after(value: str) -> float | None:
    """Return the delay in seconds, from a header with seconds or an HTTP date; None if it cannot be parsed."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value.strip()):
        return float(value)
    try:
        date: datetime = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
