"""``rlaif prompts check``: what a run would take of sources of prompts, before there is a run. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rlaif.config.models import Config
from rlaif.errors import InputError, UsageError
from rlaif.generate import sources
from rlaif.generate.ingest import DropReason, PromptFilter, PromptIdIndex, to_prompt
from rlaif.judge import check_schema
from rlaif.records import PromptRow


@dataclass
class SourceCheck:
    """``prompts``: how many would be taken. ``invalid``: the rows that ``generate`` refuses, and those whose checks
    ``judge`` would, as FILE:LINE and why. ``dropped``: the locations of the other rows by reason."""

    prompts: int = 0
    invalid: list[str] = field(default_factory=list)
    dropped: dict[DropReason, list[str]] = field(default_factory=dict)


def check_sources(prompt_sources: Iterable[str], config: Config) -> SourceCheck:
    """Read ``prompt_sources``, one after the other, as ``generate`` would.

    Raises :class:`InputError` for one that is not
    there or cannot be read, and :class:`MissingDependencyError` where a check needs what is not installed."""
    result, id_index, prompt_filter = SourceCheck(), PromptIdIndex(None, config), PromptFilter(config.prompts)
    for source in prompt_sources:
        is_empty = True
        for location, row in sources.iter_rows(source, PromptRow):
            is_empty = False
            try:
                if isinstance(row, InputError):
                    raise row
                id_index.register(location, row)
                check_schema.compile_checks(row.checks, location)
            except UsageError as error:
                result.invalid.append(f"{location}: {error.message}")
                continue
            prompt = to_prompt(row, location, config)
            if reason := prompt_filter.drop_reason(prompt):
                result.dropped.setdefault(reason, []).append(location)
            else:
                result.prompts += 1
        if is_empty:
            result.invalid.append(f"{source}: has no rows")
    return result
