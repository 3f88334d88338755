"""Every error that a person can mend, as one small tree.

    RlaifError                exit 1   something failed; has a message, a location and a hint
    ├── UsageError            exit 2   flags, rlaif.toml, judge files: what was asked for cannot be
    │   ├── InputError        exit 2   a bad row in a file, named by file and line
    │   └── ConfigMismatchError     exit 2   the run was started with other settings
    │       └── DatasetChangedError     exit 2   since a training began there are other rows to train on
    ├── RunError              exit 1   the run directory: locked, damaged, not a run
    ├── EndpointError         exit 1   the model server: absent, refusing, failing
    │   └── ServerError       exit 1   the managed vLLM child did not start or kept dying
    ├── StorageError          exit 1   object storage or the hub: refusing, out of reach, nothing there
    ├── TooManyFailuresError       exit 3   finished, with more failures than --max-failures
    └── MissingDependencyError           exit 4   something is not installed on this machine

An error that is not in this tree is a bug, and is shown with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class RlaifError(Exception):
    """What happened, where (file and line, when there is one), and one way to mend it."""

    exit_code = 1

    def __init__(self, message: str, *, location: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.location = location
        self.hint = hint

    def __str__(self) -> str:
        prefix = f"{self.location}: " if self.location else ""
        hint = f"\n  {self.hint}" if self.hint else ""
        return f"{prefix}{self.message}{hint}"


class UsageError(RlaifError):
    exit_code = 2


class InputError(UsageError):
    pass


class ConfigMismatchError(UsageError):
    pass


class DatasetChangedError(ConfigMismatchError):
    pass


class RunError(RlaifError):
    pass


class EndpointError(RlaifError):
    pass


class ServerError(EndpointError):
    pass


class StorageError(RlaifError):
    pass


class TooManyFailuresError(RlaifError):
    exit_code = 3


class MissingDependencyError(RlaifError):
    exit_code = 4


def os_error_message(error: OSError) -> str:
    """The operating system's own words, out of what a library wraps around them ("... [errno 27] File too large")."""
    return (error.strerror or str(error)).rpartition("] ")[2] or type(error).__name__


def write_error(path: Path, error: OSError) -> RunError:
    """What a full disk, or one that may not be written, is told as where nothing is lost by it."""
    return RunError(
        f"cannot be written: {os_error_message(error)}",
        location=str(path),
        hint="Make room or mend the permission, then give the same command again: no answer is lost.",
    )


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A sentence that names the closest known word, or lists what there is."""
    names = sorted(candidates)
    matches = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if matches:
        return f"Did you mean {matches[0]!r}?"
    return f"There is: {', '.join(names)}." if names else "There is none yet."
