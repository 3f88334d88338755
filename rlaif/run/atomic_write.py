"""Write a file or folder under a temporary name, then rename it: a reader sees the old one or the new one, never half.

The temporary name is ``.NAME.PID`` in the same folder. A killed process leaves it behind, and
:func:`remove_stale_temp_files` finds it by the process that is gone.

Three writers do it by themselves: :mod:`rlaif.pair.export_formats` moves several files into a folder that may hold
others, :mod:`rlaif.serving.demo_model` may not import this package, and journals are appended to in place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlaif.errors import write_error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the temporary name at which to write the file or folder ``path``.

    It replaces ``path`` when the block ends. If the block raises, it is removed and ``path`` is unchanged.
    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            shutil.rmtree(path)  # a folder cannot be renamed over another one that has files
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``. Raises :class:`RunError` if that is not possible; ``path`` is then unchanged."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise write_error(path, error) from None


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8. Raises as :func:`atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())


def remove_stale_temp_files(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder``: ``.NAME.PID`` if no such process is running."""
    for path in folder.glob(".*.*"):
        pid = path.suffix.removeprefix(".")
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
