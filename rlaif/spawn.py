"""The environment of the Python processes that rlaif starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

NOT_INHERITED = ("PYTHONDONTWRITEBYTECODE",)
"""Each of vLLM's three processes would compile torch and vLLM from source, which doubles the time of every start."""


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment for a child, with ``extra`` over it and without :data:`NOT_INHERITED`."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return {**kept, **extra}


@contextlib.contextmanager
def without_them() -> Iterator[None]:
    """Leave :data:`NOT_INHERITED` out of this process's own environment, for libraries that start processes."""
    kept = {name: os.environ.pop(name) for name in NOT_INHERITED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
