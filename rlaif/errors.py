"""Every error that a person can mend, as one small tree.

    RlaifError                exit 1   something failed; says what, where, and one way to mend it
    ├── UsageError            exit 2   flags, rlaif.toml, judge files: what was asked for cannot be
    │   ├── InputError        exit 2   a bad row in a file, named by file and line
    │   └── IdentityError     exit 2   the run was started with other settings
    │       └── OtherRows     exit 2   since a training began there are other rows to train on
    ├── RunError              exit 1   the run directory: locked, damaged, not a run
    ├── EndpointError         exit 1   the model server: absent, refusing, failing
    │   └── ServerError       exit 1   the managed vLLM child did not start or kept dying
    ├── StorageError          exit 1   object storage or the hub: refusing, out of reach, nothing there
    ├── TooManyFailures       exit 3   finished, with more failures than --max-failures
    └── MissingPart           exit 4   something is not installed on this machine

An error that is not in this tree is a bug, and is shown with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class RlaifError(Exception):
    """What happened, where (file and line, when there is one), and one way to mend it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.mend = mend

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        mend = f"\n  {self.mend}" if self.mend else ""
        return f"{place}{self.what}{mend}"


class UsageError(RlaifError):
    exit_code = 2


class InputError(UsageError):
    pass


class IdentityError(UsageError):
    pass


class OtherRows(IdentityError):
    pass


class RunError(RlaifError):
    pass


class EndpointError(RlaifError):
    pass


class ServerError(EndpointError):
    pass


class StorageError(RlaifError):
    pass


class TooManyFailures(RlaifError):
    exit_code = 3


class MissingPart(RlaifError):
    exit_code = 4


def system_says(error: OSError) -> str:
    """The operating system's own words, out of what a library wraps around them ("... [errno 27] File too large")."""
    return (error.strerror or str(error)).rpartition("] ")[2] or type(error).__name__


def cannot_be_written(where: Path, error: OSError) -> RunError:
    """What a full disk, or one that may not be written, is told as where nothing is lost by it."""
    return RunError(
        f"cannot be written: {system_says(error)}",
        where=str(where),
        mend="Make room or mend the permission, then give the same command again: no answer is lost.",
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known word, or lists what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"There is: {', '.join(names)}." if names else "There is none yet."
