"""Prompts into a run: read, deduplicated, decontaminated, and some of them held out.

Which prompts are taken depends on their content alone: the same sources give the same prompts, however often the
command was interrupted on the way. Held-out prompts are journaled with the others and never sampled for training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rlaif.config import Config, PromptsConfig
from rlaif.errors import InputError, UsageError
from rlaif.generate import read
from rlaif.generate.similar import Similar
from rlaif.records import Message, Prompt, PromptRow, key_of, unit_interval
from rlaif.run.directory import Run
from rlaif.run.journal import read as read_journal

NGRAM = 13
SAY_EVERY = 100_000


@dataclass
class Taken:
    """How many prompts the run has, and why others were left out."""

    prompts: int = 0
    heldout: int = 0
    new: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def take(run: Run, config: Config, say: Callable[[str], None]) -> Taken:
    """Journal the prompts that ``config.prompts`` names, up to its limit. Those already there are not repeated.

    Raises :class:`InputError` before anything is written where a source has bad rows and they are not to be skipped.
    """
    settings = config.prompts
    if not settings.source:
        raise UsageError(
            "no prompts are named",
            mend="Give --prompts SRC: a packaged set (`rlaif prompts list`), a .jsonl/.parquet/.csv file, or hf:NAME.",
        )
    owners = Owners(run, config)
    for source in settings.source:
        read.check(source, PromptRow, settings.on_bad_row, say, owners.note)
    for source in settings.decontaminate:
        read.check(source, PromptRow, settings.on_bad_row, say)
    heldout = owners.heldout
    del owners  # what follows needs its memory
    sieve, taken = Sieve(settings), Taken()
    with run.journal("prompts") as journal:
        for source in settings.source:
            for where, row in read.rows(source, PromptRow):
                if settings.limit is not None and taken.prompts >= settings.limit:
                    return taken
                looked_at = taken.prompts + taken.left_out.total()
                if looked_at and looked_at % SAY_EVERY == 0:
                    say(f"{taken.prompts:,} prompts taken in, {taken.left_out.total():,} left out so far")
                prompt = to_prompt(row, where, config)
                if reason := sieve.reason(prompt):
                    taken.left_out[reason] += 1
                    continue
                known = prompt.key in journal  # and may have been imported, which holds nothing out
                taken.prompts += 1
                taken.heldout += (prompt.key in heldout) if known else (prompt.split == "heldout")
                if not known:
                    taken.new += 1
                    journal.append([prompt])
    return taken


def to_prompt(row: PromptRow, where: str, config: Config, *, may_hold_out: bool = True) -> Prompt:
    """The record of ``row``. Its key is its content; its id is its own, or the first 16 digits of the key."""
    messages = row.messages()
    if config.sampler.system and messages[0].role != "system":
        messages = [Message(role="system", content=config.sampler.system), *messages]
    key = key_of(messages=[message.wire() for message in messages], tools=row.tools)
    prompt_id = row.id or key[:16]
    heldout = may_hold_out and unit_interval(config.seed, "heldout", key) < config.prompts.heldout_share
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
        source=where,
    )


class Sieve:
    """Why a prompt is left out, going by those before it and by the evaluation files."""

    def __init__(self, settings: PromptsConfig) -> None:
        self._contents = set[bytes]()
        self._similar = Similar(settings.near_duplicates) if settings.near_duplicates > 0 else None
        self._foreign = Overlap(read.texts(settings.decontaminate)) if settings.decontaminate else None

    def reason(self, prompt: Prompt) -> str | None:
        """None for a prompt that is taken."""
        content = bytes.fromhex(prompt.key)  # half the memory of its text
        if content in self._contents:
            return "exact duplicates"
        self._contents.add(content)
        if self._similar and self._similar.seen(prompt):
            return "near duplicates"
        if self._foreign and self._foreign.with_text(read.asked(prompt.messages)):
            return "overlaps an evaluation file"
        return None


class Owners:
    """Which prompt each id names: in the run, and in the rows noted. Ids that rows are given by their content never
    meet. ``heldout``: the keys of the run's prompts that are held out."""

    def __init__(self, run: Run | None, config: Config) -> None:
        self._config = config
        self.ids: dict[str, str] = {}
        self.heldout: set[str] = set()
        for _, record in read_journal(run.journal_path("prompts")) if run else ():
            self.ids[record["key"]] = record["prompt_id"]
            if record["split"] == "heldout":
                self.heldout.add(record["key"])
        self._keys = {prompt_id: key for key, prompt_id in self.ids.items()}

    def note(self, where: str, row: PromptRow) -> None:
        """Raises :class:`InputError` where the row's id already names another prompt."""
        if row.id is None:
            return
        key = to_prompt(row, where, self._config).key
        if self._keys.setdefault(row.id, key) != key:
            raise InputError(
                f"the id {row.id!r} was already used for another prompt",
                where=where,
                mend="Ids name one prompt each: change one of the two. Nothing was written.",
            )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


class Overlap:
    """Overlap with evaluation texts: a common 13-word run (Brown et al. 2020, appendix C), or the same short text."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._grams: set[int] = set()
        for text in texts:
            self._grams |= self._of(text)

    def with_text(self, text: str) -> bool:
        return not self._grams.isdisjoint(self._of(text))

    @staticmethod
    def _of(text: str) -> set[int]:
        words = _words(text) or [text]
        return {hash(tuple(words[i : i + NGRAM])) for i in range(max(1, len(words) - NGRAM + 1))}
