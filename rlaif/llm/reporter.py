"""Where a stage's log lines and progress go: a protocol that the console, tests and notebooks implement."""

from __future__ import annotations

from typing import Any, Protocol

from rlaif.llm.usage import UsageMeter


class Reporter(Protocol):
    """Receives log lines and request progress."""

    def log(self, line: str) -> None: ...

    def progress(self, usage: UsageMeter) -> Any:
        """A context manager that shows ``usage`` while it is open."""
