"""What stands in a chat completion: choices and usage, read from whatever a server sent. Nothing is trusted.

A body that is no chat completion is :class:`MalformedResponseError`; a field that is odd where it decides nothing is
passed over.
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
"""vLLM's, for sequence-classification models. It stands beside /v1."""


class MalformedResponseError(Exception):
    """The server answered 200 with something that is not a chat completion."""


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One answer. ``logprobs`` is the protocol's list, one entry a token: {token, logprob, top_logprobs}."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    logprobs: list[dict[str, Any]] | None
    tool_calls: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class ChatResponse:
    """``choices`` of a chat, or the ``score`` that a reward model gave."""

    choices: list[ChatChoice]
    usage: Usage
    score: float | None = None


CostFunction = Callable[[int, int, int], float | None]
"""US dollars by prompt tokens, those of them that were cached, and completion tokens."""


def parse_json(raw: bytes, redact: Callable[[str], str] = str) -> Any:
    """JSON from a server. Raises :class:`MalformedResponseError`, which quotes the body's beginning without what
    ``redact`` takes."""
    try:
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            # Lone surrogates are legal in JSON's escapes; orjson refuses them, the standard library reads them.
            return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        # Before it is cut: of a secret at the cut a part would be left.
        excerpt = redact(raw.decode("latin-1")).encode("latin-1", "replace")[:80]
        raise MalformedResponseError(f"the body is not JSON: {str(error)[:120]} ({excerpt!r})") from None


def parse_chat_response(
    value: Any, cost_of: CostFunction, redact: Callable[[str], str] = str, endpoint_path: str = CHAT_PATH
) -> ChatResponse:
    """``value`` (the JSON that came from ``endpoint_path``) as a :class:`ChatResponse`. ``redact`` takes secrets out of
    what a server says of an error.

    Raises :class:`MalformedResponseError`.
    """
    if not isinstance(value, dict):
        raise MalformedResponseError(f"the body is no object but {type(value).__name__}")
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
    """The one number that a reward model gives of one conversation."""
    data = value.get("data")
    first = data[0] if isinstance(data, list) and data else None
    numbers = first.get("probs") if isinstance(first, dict) else None
    if isinstance(numbers, list) and len(numbers) > 1:
        raise EndpointError(
            f"the model has {len(numbers)} labels; a reward model has one",
            hint="Name a sequence-classification model with num_labels = 1.",
        )
    number = numbers[0] if isinstance(numbers, list) and numbers else None
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
        raise MalformedResponseError(f"the reply holds no score ({number!r})")
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
    if isinstance(reasoning, str) and reasoning:  # the server has split it off already
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
    """``text`` as (reasoning, answer). Reasoning comes before ``</think>``, whether ``<think>`` was written by the
    model or already by its template; thinking that was cut off leaves an empty answer."""
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
    """What the body of a refusal says, in a line: the protocol's ``error.message`` or the shapes that stand for it."""
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
    """Seconds from now: the header holds seconds or an HTTP date."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value.strip()):
        return float(value)
    try:
        date: datetime = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
