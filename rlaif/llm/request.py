"""Requests with their journal keys, and the function that parses a reply into records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.llm.chat_protocol import CHAT_PATH, ChatResponse
from rlaif.records import Record


class UnparsableReplyError(Exception):
    """The reply contains no verdict. The request is sent once more, then counted as a failure; it never becomes a
    label."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request without its model."""

    keys: tuple[str, ...]
    """Journal keys of the records that the reply will produce."""
    body: dict[str, Any]
    prompt_id: str
    context: Any = None
    """The caller's own value, passed back with the reply."""
    endpoint_path: str = CHAT_PATH


ReplyParser = Callable[[Request, ChatResponse], Sequence[Record]]
