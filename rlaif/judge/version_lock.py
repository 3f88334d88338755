"""The version lock: ``checksums.txt`` next to the judge folders, with a line ``name version hash`` per locked version.

It prevents a judge's text from changing without a new version. Labels from both texts would have the same name.
"""

from __future__ import annotations

from rlaif.errors import RlaifError, UsageError
from rlaif.judge.judge_file import Judge

LOCK_FILE = "checksums.txt"


def check_version_lock(judge: Judge, *, lock: bool = False) -> str:
    """Compare ``judge`` with the lock file and return the result as text. ``lock`` adds the line if it is missing.

    Raises :class:`UsageError` if the text has changed but the version has not.
    """
    path = judge.folder.resolve().parent / LOCK_FILE
    line = f"{judge.name} {judge.file.version} {judge.hash}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RlaifError(f"cannot be read: {reason}", location=str(path)) from None
    for line_number, existing in enumerate(lines, 1):
        if existing.split()[:2] == [judge.name, judge.file.version]:
            if existing == line:
                return f"locked in {path}"
            raise UsageError(
                f"judge {judge.name!r} has changed since version {judge.file.version!r} was locked",
                location=f"{path}:{line_number}",
                hint=f"Raise `version` in {judge.folder / 'judge.toml'}, or undo the change.",
            )
    if not lock:
        return f"not locked; --lock adds it to {path}"
    try:
        path.write_text("".join(f"{entry}\n" for entry in [*lines, line]), encoding="utf-8")
    except OSError as error:
        raise RlaifError(f"cannot be written: {error.strerror}", location=str(path)) from None
    return f"added to {path}"
