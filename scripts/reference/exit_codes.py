"""docs/reference/exit-codes.md: the exit codes, and the errors behind them."""

from __future__ import annotations

from collections.abc import Iterator

from rlaif.errors import RlaifError
from scripts.reference.markdown import page, table

CODES = {
    0: "The command finished. `rlaif status` says what is pending.",
    1: "The run directory, a model server or storage failed, or rlaif has a bug.",
    2: "A flag, a setting or an input file is invalid.",
    3: "The command finished, but more requests failed than `--max-failures` allows.",
    4: "A package, program or device is missing. `rlaif doctor` lists what this machine has.",
    130: "Interrupted (Ctrl-C or SIGTERM). Rerun the same command to resume.",
}
INTRODUCTION = """\
An error is printed to stderr as `rlaif: LOCATION: MESSAGE`, followed by a line with a hint if there is one. The
location is a file with its line, a setting or a URL. `rlaif --verbose COMMAND` also prints the traceback. The traceback
of a bug is in `RUN/log/`, in the file that the hint names."""


def render() -> str:
    """Return the page."""
    return page(
        "Exit codes and errors",
        INTRODUCTION,
        table(["code", "meaning"], [(f"`{code}`", meaning) for code, meaning in CODES.items()]),
        "## Exceptions",
        "Python code can catch these classes of `rlaif.errors`. Every other exception is a bug.",
        table(["class", "exit code", "meaning"], _rows(RlaifError, 0)),
    )


def _rows(error: type[RlaifError], depth: int) -> Iterator[tuple[str, str, str]]:
    summary = " ".join((error.__doc__ or "").split("\n\n")[0].split())
    yield f"{'&emsp;' * depth}`{error.__name__}`", str(error.exit_code), summary
    for subclass in error.__subclasses__():
        if subclass.__module__ == error.__module__:
            yield from _rows(subclass, depth + 1)
