"""``rlaif prompts check``: read prompt sources as a run would, before there is a run. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rlaif.config.models import Config
from rlaif.errors import InputError, UsageError
from rlaif.generate import sources
from rlaif.generate.ingest import PromptFilter, PromptIdIndex, to_prompt
from rlaif.judge import check_schema
from rlaif.records import PromptDropReason, PromptRow


@dataclass
class SourceCheck:
    """Rows of prompt sources, by what a run would do with them."""

    prompts: int = 0
    """Number of prompts that would be ingested."""
    invalid: list[str] = field(default_factory=list)
    """Rows that ``generate`` rejects, or whose checks ``judge`` rejects: ``FILE:LINE: reason``."""
    dropped: dict[PromptDropReason, list[str]] = field(default_factory=dict)
    """Locations of the other rows, by reason."""


def check_sources(prompt_sources: Iterable[str], config: Config) -> SourceCheck:
    """Read ``prompt_sources`` in order, as ``generate`` would.

    Raises :class:`InputError` for a source that is missing or unreadable, and :class:`MissingDependencyError` if a
    check needs a package that is not installed.
    """
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
