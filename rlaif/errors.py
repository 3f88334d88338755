"""The errors that a user can fix, as one small tree. docs/reference/exit-codes.md is generated from it.

An exception outside this tree is a bug and is shown with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from rlaif.installation import install_command


class RlaifError(Exception):
    """Something failed. Has a message, a location (file and line, if there is one) and a hint: one way to fix it."""

    exit_code = 1

    def __init__(self, message: str, *, location: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.location = location
        self.hint = hint

    def __str__(self) -> str:
        prefix = f"{self.location}: " if self.location else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{prefix}{self.message}{hint}"


class UsageError(RlaifError):
    """A flag, a setting in rlaif.toml or a judge file is invalid."""

    exit_code = 2


class InputError(UsageError):
    """A row of an input file is invalid; the message names the file and the line."""


class ConfigMismatchError(UsageError):
    """The run was started with other settings."""


class DatasetChangedError(ConfigMismatchError):
    """The rows to train on have changed since the training began."""


class RunError(RlaifError):
    """The run directory is locked, damaged, not writable, or not a run."""


class EndpointError(RlaifError):
    """The model server is unreachable, rejects requests, or fails."""


class ServerError(EndpointError):
    """The vLLM process that rlaif manages did not start, or failed repeatedly."""


class StorageError(RlaifError):
    """Object storage or the Hugging Face Hub is unreachable, denies access, or does not have the object."""


class TooManyFailuresError(RlaifError):
    """The command finished, but more requests failed than `--max-failures` allows."""

    exit_code = 3


class MissingDependencyError(RlaifError):
    """A package or device is missing.

    ``extra`` names the optional dependencies that bring it. The hint is then the command that installs them, followed
    by ``hint``.
    """

    exit_code = 4

    def __init__(
        self, message: str, *, extra: str | None = None, location: str | None = None, hint: str | None = None
    ) -> None:
        if extra is not None:
            hint = " ".join(filter(None, (f"Run `{install_command(extra)}`.", hint)))
        super().__init__(message, location=location, hint=hint)


def os_error_message(error: OSError) -> str:
    """Return the operating system's message, without the text that a library wrapped around it.

    An example of such text is "... [errno 27] File too large".
    """
    return (error.strerror or str(error)).rpartition("] ")[2] or type(error).__name__


def write_error(path: Path, error: OSError) -> RunError:
    """Build the error for a disk that is full or read-only, for writes that a rerun repeats without loss."""
    return RunError(
        f"cannot be written: {os_error_message(error)}",
        location=str(path),
        hint="Free disk space or fix the permissions, then rerun the same command. No answers are lost.",
    )


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return a sentence that suggests the closest candidate, or lists all of them if none is close."""
    names = sorted(candidates)
    matches = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if matches:
        return f"Did you mean {matches[0]!r}?"
    return f"Available: {', '.join(names)}." if names else "None are available."
