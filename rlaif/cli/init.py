"""``rlaif init``."""

from __future__ import annotations

from rlaif.cli import console
from rlaif.cli.shared import RunPath
from rlaif.errors import RlaifError, UsageError


def init(run: RunPath) -> None:
    """Make a run: a directory with a commented rlaif.toml."""
    from rlaif import settings

    path = run / settings.FILE_NAME
    if path.exists():
        raise UsageError("there is one already", where=str(path), mend="Edit it, or name another directory.")
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(settings.template(), encoding="utf-8")
    except OSError as error:
        raise RlaifError(f"cannot be written: {error.strerror}", where=str(path)) from None
    console.put(f"wrote {path}. Edit it, then: rlaif generate {run}")
