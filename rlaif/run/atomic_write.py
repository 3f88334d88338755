"""Files that are written at once: beside, then renamed, so that whoever looks sees the old one or the new one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rlaif.errors import RunError


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Raises :class:`RunError` where that is not possible; the file is then as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"cannot be written: {error.strerror}", location=str(path)) from None
