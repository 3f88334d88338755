"""Requests with their journal keys, and the ways in which a request can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.llm.chat_protocol import CHAT_PATH, ChatResponse
from rlaif.records import Record


class RequestFailedError(Exception):
    """This request got no answer, and another attempt now would not help. Other requests may still succeed.

    ``rejected``: the server answered and rejected this request. Otherwise it failed as any other might have.
    ``status``: the HTTP status, if there was one.
    """

    def __init__(self, message: str, *, rejected: bool = False, status: int | None = None) -> None:
        super().__init__(message)
        self.rejected, self.status = rejected, status


class RequestCancelled(Exception):  # noqa: N818  a stop, not an error
    """The command stopped before this request was sent, so the request stays pending."""


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
