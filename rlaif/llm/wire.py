"""What stands in a chat completion: choices and usage, read from whatever a server sent. Nothing is trusted.

A body that is no chat completion is :class:`Malformed`; a field that is odd where it decides nothing is passed over.
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
from rlaif.llm.budget import Usage
from rlaif.records import clean, clean_json

CHAT = "/chat/completions"
CLASSIFY = "/classify"
"""vLLM's, for sequence-classification models. It stands beside /v1."""


class Malformed(Exception):
    """The server answered 200 with something that is not a chat completion."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. ``logprobs`` is the protocol's list, one entry a token: {token, logprob, top_logprobs}."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    logprobs: list[dict[str, Any]] | None
    tool_calls: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Reply:
    """``choices`` of a chat, or the ``score`` that a reward model gave."""

    choices: list[Choice]
    usage: Usage
    score: float | None = None


Price = Callable[[int, int, int], float | None]
"""US dollars by prompt tokens, those of them that were cached, and completion tokens."""


def loads(raw: bytes, hide: Callable[[str], str] = str) -> Any:
    """JSON from a server. Raises :class:`Malformed`, which quotes the body's beginning without what ``hide`` takes."""
    try:
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            # Lone surrogates are legal in JSON's escapes; orjson refuses them, the standard library reads them.
            return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        # Before it is cut: of a secret at the cut a part would be left.
        quoted = hide(raw.decode("latin-1")).encode("latin-1", "replace")[:80]
        raise Malformed(f"the body is not JSON: {str(error)[:120]} ({quoted!r})") from None


def read(value: Any, price: Price, hide: Callable[[str], str] = str, path: str = CHAT) -> Reply:
    """``value`` (the JSON that came from ``path``) as a :class:`Reply`. ``hide`` takes secrets out of what a server
    says of an error.

    Raises :class:`Malformed`.
    """
    if not isinstance(value, dict):
        raise Malformed(f"the body is no object but {type(value).__name__}")
    score = _score(value) if path == CLASSIFY else None
    choices = value.get("choices") if score is None else []
    if not isinstance(choices, list) or (score is None and not choices):
        told = value.get("error")
        told = told.get("message") if isinstance(told, dict) else told
        raise Malformed("the reply has no choices" + (f": {hide(told)[:200]}" if isinstance(told, str) else ""))
    usage = value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt_tokens, completion_tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    details = usage.get("prompt_tokens_details")
    cached = min(prompt_tokens, _count(details, "cached_tokens")) if isinstance(details, dict) else 0
    usd = price(prompt_tokens, cached, completion_tokens) or 0.0
    used = Usage(prompt_tokens, cached, completion_tokens, usd)
    return Reply([_choice(choice) for choice in choices], used, score)


def _score(value: dict[str, Any]) -> float:
    """The one number that a reward model gives of one conversation."""
    data = value.get("data")
    first = data[0] if isinstance(data, list) and data else None
    numbers = first.get("probs") if isinstance(first, dict) else None
    if isinstance(numbers, list) and len(numbers) > 1:
        raise EndpointError(
            f"the model has {len(numbers)} labels; a reward model has one",
            mend="Name a sequence-classification model with num_labels = 1.",
        )
    number = numbers[0] if isinstance(numbers, list) and numbers else None
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
        raise Malformed(f"the reply holds no score ({number!r})")
    return float(number)


def _choice(value: Any) -> Choice:
    message = value.get("message") if isinstance(value, dict) else None
    if not isinstance(message, dict):
        raise Malformed("a choice has no message")
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    if not isinstance(content, str):
        raise Malformed("a message's content is not text")
    thinking: Any = message.get("reasoning_content") or message.get("reasoning")
    text = clean(content)
    if isinstance(thinking, str) and thinking:  # the server has split it off already
        thinking = clean(thinking)
    else:
        thinking, text = split_thinking(text)
    logprobs = value.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    calls = message.get("tool_calls")
    calls = [clean_json(call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else None
    finish = value.get("finish_reason")
    return Choice(
        text=text,
        reasoning=thinking,
        finish_reason=clean(finish) if isinstance(finish, str) else None,
        logprobs=tokens if isinstance(tokens, list) and tokens else None,
        tool_calls=calls or None,
    )


def split_thinking(text: str) -> tuple[str | None, str]:
    """``text`` as (thinking, answer). Thinking stands before ``</think>``, whether ``<think>`` was written by the
    model or already by its template; thinking that was cut off leaves an empty answer."""
    opened = text.lstrip().startswith("<think>")
    thinking, closed, answer = text.partition("</think>")
    if closed:
        return thinking.strip().removeprefix("<think>").strip() or None, answer.lstrip()
    if opened:
        return text.strip().removeprefix("<think>").strip() or None, ""
    return None, text


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else 0


def complaint(raw: bytes) -> str:
    """What the body of a refusal says, in a line: the protocol's ``error.message`` or the shapes that stand for it."""
    try:
        value = loads(raw)
    except Malformed:
        value = None
    if isinstance(value, dict):
        inner = value.get("error") or value
        told = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
        if isinstance(told, str) and told.strip():
            return told
    return raw.decode("utf-8", "replace") or "no reason given"


def retry_after(value: str) -> float | None:
    """Seconds from now: the header holds seconds or an HTTP date."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value.strip()):
        return float(value)
    try:
        at: datetime = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - time.time())
