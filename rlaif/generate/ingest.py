"""Prompts into a run: read, deduplicated, decontaminated, and some of them held out.

Which prompts are taken depends on their content alone: the same sources give the same prompts, however often the
command was interrupted on the way. Held-out prompts are journaled with the others and never sampled for training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rlaif.config.models import Config, PromptsConfig
from rlaif.errors import InputError, UsageError
from rlaif.generate import sources
from rlaif.generate.near_duplicates import NearDuplicateIndex
from rlaif.records import Message, Prompt, PromptRow, content_key, hash_to_unit_interval
from rlaif.run.journal import iter_records as read_journal
from rlaif.run.run import Run

NGRAM = 13
LOG_EVERY = 100_000


@dataclass
class IngestResult:
    """How many prompts the run has, and why others were left out."""

    prompts: int = 0
    heldout: int = 0
    new: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def ingest_prompts(run: Run, config: Config, log: Callable[[str], None]) -> IngestResult:
    """Journal the prompts that ``config.prompts`` names, up to its limit. Those already there are not repeated.

    Raises :class:`InputError` before anything is written where a source has bad rows and they are not to be skipped.
    """
    settings = config.prompts
    if not settings.sources:
        raise UsageError(
            "no prompts are named",
            hint="Give --prompts SRC: a packaged set (`rlaif prompts list`), a .jsonl/.parquet/.csv file, or hf:NAME.",
        )
    id_index = PromptIdIndex(run, config)
    for source in settings.sources:
        sources.validate_source(source, PromptRow, settings.on_bad_row, log, id_index.register)
    for source in settings.decontaminate_against:
        sources.validate_source(source, PromptRow, settings.on_bad_row, log)
    heldout_keys = id_index.heldout_keys
    del id_index  # what follows needs its memory
    prompt_filter, result = PromptFilter(settings), IngestResult()
    with run.journal("prompts") as journal:
        for source in settings.sources:
            for location, row in sources.valid_rows(source, PromptRow):
                if settings.limit is not None and result.prompts >= settings.limit:
                    return result
                processed = result.prompts + result.dropped.total()
                if processed and processed % LOG_EVERY == 0:
                    log(f"{result.prompts:,} prompts taken in, {result.dropped.total():,} left out so far")
                prompt = to_prompt(row, location, config)
                if reason := prompt_filter.rejection_reason(prompt):
                    result.dropped[reason] += 1
                    continue
                already_journaled = prompt.key in journal  # and may have been imported, which holds nothing out
                result.prompts += 1
                result.heldout += (prompt.key in heldout_keys) if already_journaled else (prompt.split == "heldout")
                if not already_journaled:
                    result.new += 1
                    journal.append([prompt])
    return result


def to_prompt(row: PromptRow, location: str, config: Config, *, may_hold_out: bool = True) -> Prompt:
    """The record of ``row``. Its key is its content; its id is its own, or the first 16 digits of the key."""
    messages = row.messages()
    if config.sampler.system and messages[0].role != "system":
        messages = [Message(role="system", content=config.sampler.system), *messages]
    key = content_key(messages=[message.to_openai() for message in messages], tools=row.tools)
    prompt_id = row.id or key[:16]
    heldout = may_hold_out and hash_to_unit_interval(config.seed, "heldout", key) < config.prompts.heldout_fraction
    return Prompt(
        key=key,
        prompt_id=prompt_id,
        messages=messages,
        reference=row.reference,
        checklist=row.checklist,
        checks=row.checks,
        tags=row.tags,
        tools=row.tools,
        split="heldout" if heldout else "train",
        source=location,
    )


class PromptFilter:
    """Why a prompt is left out, going by those before it and by the evaluation files."""

    def __init__(self, settings: PromptsConfig) -> None:
        self._content_keys = set[bytes]()
        self._near_duplicates = (
            NearDuplicateIndex(settings.near_duplicate_threshold) if settings.near_duplicate_threshold > 0 else None
        )
        self._contamination = (
            ContaminationIndex(sources.prompt_texts(settings.decontaminate_against))
            if settings.decontaminate_against
            else None
        )

    def rejection_reason(self, prompt: Prompt) -> str | None:
        """None for a prompt that is taken."""
        content = bytes.fromhex(prompt.key)  # half the memory of its text
        if content in self._content_keys:
            return "exact duplicates"
        self._content_keys.add(content)
        if self._near_duplicates and self._near_duplicates.check_and_add(prompt):
            return "near duplicates"
        if self._contamination and self._contamination.matches(sources.user_text(prompt.messages)):
            return "overlaps an evaluation file"
        return None


class PromptIdIndex:
    """Which prompt each id names: in the run, and in the rows noted. Ids that rows are given by their content never
    meet. ``heldout_keys``: the keys of the run's prompts that are held out."""

    def __init__(self, run: Run | None, config: Config) -> None:
        self._config = config
        self.id_by_key: dict[str, str] = {}
        self.heldout_keys: set[str] = set()
        for _, record in read_journal(run.journal_path("prompts")) if run else ():
            self.id_by_key[record["key"]] = record["prompt_id"]
            if record["split"] == "heldout":
                self.heldout_keys.add(record["key"])
        self._key_by_id = {prompt_id: key for key, prompt_id in self.id_by_key.items()}

    def register(self, location: str, row: PromptRow) -> None:
        """Raises :class:`InputError` where the row's id already names another prompt."""
        if row.id is None:
            return
        key = to_prompt(row, location, self._config).key
        if self._key_by_id.setdefault(row.id, key) != key:
            raise InputError(
                f"the id {row.id!r} was already used for another prompt",
                location=location,
                hint="Ids name one prompt each: change one of the two. Nothing was written.",
            )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


class ContaminationIndex:
    """Overlap with evaluation texts: a common 13-word run (Brown et al. 2020, appendix C), or the same short text."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._grams: set[int] = set()
        for text in texts:
            self._grams |= self._ngram_hashes(text)

    def matches(self, text: str) -> bool:
        return not self._grams.isdisjoint(self._ngram_hashes(text))

    @staticmethod
    def _ngram_hashes(text: str) -> set[int]:
        words = _words(text) or [text]
        return {hash(tuple(words[i : i + NGRAM])) for i in range(max(1, len(words) - NGRAM + 1))}
