"""``rlaif prompts check``: what a run would take of sources of prompts, before there is a run. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rlaif.config import Config
from rlaif.errors import InputError, UsageError
from rlaif.generate import read
from rlaif.generate.prompts import Owners, Sieve, to_prompt
from rlaif.judge import check
from rlaif.records import PromptRow


@dataclass
class Looked:
    """``prompts``: how many would be taken. ``bad``: the rows that ``generate`` refuses, and those whose checks
    ``judge`` would, as FILE:LINE and why. ``left_out``: by reason, where the other rows stand."""

    prompts: int = 0
    bad: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def look(sources: Iterable[str], config: Config) -> Looked:
    """Read ``sources``, one after the other, as ``generate`` would. Raises :class:`InputError` for one that is not
    there or cannot be read, and :class:`MissingPart` where a check needs what is not installed."""
    found, owners, sieve = Looked(), Owners(None, config), Sieve(config.prompts)
    for source in sources:
        none = True
        for where, row in read.each(source, PromptRow):
            none = False
            try:
                if isinstance(row, InputError):
                    raise row
                owners.note(where, row)
                check.prepare(row.checks, where)
            except UsageError as error:
                found.bad.append(f"{where}: {error.what}")
                continue
            prompt = to_prompt(row, where, config)
            if reason := sieve.reason(prompt):
                found.left_out.setdefault(reason, []).append(where)
            else:
                found.prompts += 1
        if none:
            found.bad.append(f"{source}: there is no prompt in it")
    return found
