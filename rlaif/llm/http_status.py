"""HTTP statuses, grouped by the way rlaif reacts to them."""

from __future__ import annotations

from http import HTTPStatus

RETRYABLE_CLIENT_ERRORS = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)
KEY_REJECTED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
REQUEST_REJECTED = frozenset(
    {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.UNAVAILABLE_FOR_LEGAL_REASONS,
    }
)
"""The server rejects this one request: it is too long, filtered, or not understood."""


def is_success(status: int) -> bool:
    return status < HTTPStatus.MULTIPLE_CHOICES


def is_server_error(status: int) -> bool:
    """Return True for 5xx, including statuses without a standard name such as 529."""
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR


def is_retryable(status: int) -> bool:
    """Return True for 408, 409, 425, 429 and 5xx."""
    return status in RETRYABLE_CLIENT_ERRORS or is_server_error(status)
