"""Import the packages of the extra ``checks`` when a check needs them."""

from __future__ import annotations

import importlib
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from rlaif.errors import MissingDependencyError


def require_module(module: str) -> Any:
    """Import ``module``. Raises :class:`MissingDependencyError` if it is not installed."""
    if module in sys.modules:
        return sys.modules[module]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # some print that they download data
            return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(
            f"{module.split('.')[0]}, which this check needs, is not installed",
            extra="checks",
        ) from None
