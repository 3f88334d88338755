"""Turn prompts and a rubric into a preference dataset and a better model.

``rlaif.open_run(path)`` gives a run's tables as polars frames. The stages are functions of :mod:`rlaif.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlaif.run.run import Run, open_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "open_run"]


def __getattr__(name: str) -> Any:
    # Imported on first access, so that `rlaif --help` stays fast.
    if name in ("Run", "open_run"):
        from rlaif.run import run

        return getattr(run, name)
    raise AttributeError(f"module 'rlaif' has no attribute {name!r}")
