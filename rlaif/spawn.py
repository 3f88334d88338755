"""Environment variables of the Python processes that rlaif starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

EXCLUDED_VARIABLES = ("PYTHONDONTWRITEBYTECODE",)
"""With this variable, each of vLLM's three processes would compile torch and vLLM from source, which doubles the time
of every start."""


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment for a child: this process's own, without :data:`EXCLUDED_VARIABLES`, plus ``extra``."""
    inherited = {name: value for name, value in os.environ.items() if name not in EXCLUDED_VARIABLES}
    return {**inherited, **extra}


@contextlib.contextmanager
def without_excluded_variables() -> Iterator[None]:
    """Remove :data:`EXCLUDED_VARIABLES` from this process's own environment, for libraries that start processes."""
    removed = {name: os.environ.pop(name) for name in EXCLUDED_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)
