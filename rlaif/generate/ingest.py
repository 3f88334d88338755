"""Ingest prompts into a run: read, deduplicate and decontaminate them, and hold some of them out.

The content of the prompts alone decides which of them are ingested: the same sources give the same prompts, no matter
how often the command was interrupted. Held-out prompts are journaled with the others and never sampled for training.
The held-out fraction is drawn per group of near duplicates (:class:`rlaif.generate.near_duplicates.SplitGroups`).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rlaif.config.models import Config, PromptsConfig
from rlaif.errors import InputError, UsageError
from rlaif.generate import sources
from rlaif.generate.near_duplicates import NearDuplicateIndex, SplitGroups
from rlaif.records import Message, Prompt, PromptDropReason, PromptRow, content_key, hash_to_unit_interval
from rlaif.run.journal import iter_records
from rlaif.run.run import Run

NGRAM = 13
LOG_EVERY = 100_000


@dataclass
class IngestResult:
    """Numbers of prompts.

    ``prompts`` counts those in the run. ``heldout`` and ``new`` count those of them that are held out and that this
    command journaled. ``dropped`` counts the others by reason.
    """

    prompts: int = 0
    heldout: int = 0
    new: int = 0
    dropped: Counter[PromptDropReason] = field(default_factory=Counter)


def ingest_prompts(run: Run, config: Config, log: Callable[[str], None]) -> IngestResult:
    """Journal the prompts of ``config.prompts.sources``, up to the limit, except those already in the journal.

    Raises :class:`InputError` before anything is written if a source has invalid rows and ``on_bad_row`` is "stop".
    """
    settings = config.prompts
    if not settings.sources:
        raise UsageError(
            "no prompts are given",
            hint="Give --prompts SRC: a packaged set (`rlaif prompts list`), a .jsonl/.parquet/.csv file, or hf:NAME.",
        )
    id_index = PromptIdIndex(run, config)
    for source in settings.sources:
        sources.validate_source(source, PromptRow, settings.on_bad_row, log, id_index.register)
    for source in settings.decontaminate_against:
        sources.validate_source(source, PromptRow, settings.on_bad_row, log)
    heldout_keys = id_index.heldout_keys
    del id_index  # free its memory for the filter below
    prompt_filter, result = PromptFilter(settings), IngestResult()
    split_groups = functools.cache(lambda: journaled_split_groups(run, config))  # only if there is a new prompt
    with run.journal("prompts") as journal:
        for source in settings.sources:
            for location, row in sources.valid_rows(source, PromptRow):
                if settings.limit is not None and result.prompts >= settings.limit:
                    return result
                processed = result.prompts + result.dropped.total()
                if processed and processed % LOG_EVERY == 0:
                    log(f"{result.prompts:,} prompts ingested, {result.dropped.total():,} dropped so far")
                prompt = to_prompt(row, location, config)
                if reason := prompt_filter.drop_reason(prompt):
                    result.dropped[reason] += 1
                    continue
                # A journaled prompt may have been imported, and imported prompts are never held out.
                already_journaled = prompt.key in journal
                if not already_journaled:
                    prompt = split_groups().assign(prompt)
                    result.new += 1
                    journal.append([prompt])
                result.prompts += 1
                result.heldout += (prompt.key in heldout_keys) if already_journaled else (prompt.split == "heldout")
    return result


def journaled_split_groups(run: Run, config: Config) -> SplitGroups:
    """Return the groups of near duplicates among the prompts of ``run``."""
    groups = SplitGroups(config.prompts.near_duplicate_threshold)
    for _, record in iter_records(run.journal_path("prompts")):
        groups.add(Prompt.model_validate(record))
    return groups


def to_prompt(row: PromptRow, location: str, config: Config, *, may_hold_out: bool = True) -> Prompt:
    """Convert ``row`` to a record. The key is the hash of the content; a row without an id gets the key's first 16
    digits."""
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
    """Decides which prompts to drop, from the prompts seen before and from the evaluation files."""

    def __init__(self, settings: PromptsConfig) -> None:
        self._digests = set[bytes]()
        self._near_duplicates: NearDuplicateIndex | None = None
        if settings.near_duplicate_threshold > 0:
            self._near_duplicates = NearDuplicateIndex(settings.near_duplicate_threshold)
        self._contamination: ContaminationIndex | None = None
        if settings.decontaminate_against:
            self._contamination = ContaminationIndex(sources.prompt_texts(settings.decontaminate_against))

    def drop_reason(self, prompt: Prompt) -> PromptDropReason | None:
        """Return why ``prompt`` is dropped, or None for a prompt to ingest. Remembers the prompt."""
        digest = bytes.fromhex(prompt.key)  # half the memory of the hex digits
        if digest in self._digests:
            return "exact_duplicate"
        self._digests.add(digest)
        if self._near_duplicates and self._near_duplicates.check_and_add(prompt):
            return "near_duplicate"
        if self._contamination and self._contamination.matches(sources.user_text(prompt.messages)):
            return "evaluation_overlap"
        return None


class PromptIdIndex:
    """Maps ids to prompts, for the prompts in the run and the rows registered since, to detect an id used twice.

    Rows without an id need no entry: ids made from different contents differ. ``id_by_key`` and ``heldout_keys`` cover
    the run's prompts.
    """

    def __init__(self, run: Run | None, config: Config) -> None:
        self._config = config
        self.id_by_key: dict[str, str] = {}
        self.heldout_keys: set[str] = set()
        for _, record in iter_records(run.journal_path("prompts")) if run else ():
            self.id_by_key[record["key"]] = record["prompt_id"]
            if record["split"] == "heldout":
                self.heldout_keys.add(record["key"])
        self._key_by_id = {prompt_id: key for key, prompt_id in self.id_by_key.items()}

    def register(self, location: str, row: PromptRow) -> None:
        """Raise :class:`InputError` if the row's id already belongs to another prompt."""
        if row.id is None:
            return
        key = to_prompt(row, location, self._config).key
        if self._key_by_id.setdefault(row.id, key) != key:
            raise InputError(
                f"the id {row.id!r} already belongs to another prompt",
                location=location,
                hint="Give each prompt its own id. Nothing was written.",
            )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


class ContaminationIndex:
    """Detects overlap with evaluation texts: 13 consecutive words in common (Brown et al. 2020, appendix C), or, for a
    text of fewer words, the same text."""

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
