"""Prompts into a run: read, deduplicated, decontaminated, and some of them held out.

Which prompts are taken depends on their content alone: the same sources give the same prompts, however often the
command was interrupted on the way. Held-out prompts are journaled with the others and never sampled for training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rlaif.config import Config
from rlaif.errors import InputError, UsageError
from rlaif.generate import read
from rlaif.records import Message, Prompt, PromptRow, key_of, unit_interval
from rlaif.run.directory import Run
from rlaif.run.journal import read as read_journal

NGRAM = 13
PERMUTATIONS = 256
BANDS = 32
SHINGLE = 5


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
    foreign = Overlap(read.texts(settings.decontaminate)) if settings.decontaminate else None
    similar = Similar(settings.near_duplicates) if settings.near_duplicates > 0 else None

    taken, contents = Taken(), set[str]()
    with run.journal("prompts") as journal:
        for source in settings.source:
            for where, row in read.rows(source, PromptRow):
                if settings.limit is not None and taken.prompts >= settings.limit:
                    return taken
                prompt = to_prompt(row, where, config)
                if prompt.key in contents:
                    taken.left_out["exact duplicates"] += 1
                    continue
                contents.add(prompt.key)
                if similar and similar.seen(prompt):
                    taken.left_out["near duplicates"] += 1
                    continue
                if foreign and foreign.with_text(read.asked(prompt.messages)):
                    taken.left_out["overlaps an evaluation file"] += 1
                    continue
                known = prompt.key in journal  # and may have been imported, which holds nothing out
                taken.prompts += 1
                taken.heldout += (prompt.key in owners.heldout) if known else (prompt.split == "heldout")
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


class Owners:
    """Which prompt each id names: in the run, and in the rows noted. Ids that rows are given by their content never
    meet. ``heldout``: the keys of the run's prompts that are held out."""

    def __init__(self, run: Run, config: Config) -> None:
        self._config = config
        self.ids: dict[str, str] = {}
        self.heldout: set[str] = set()
        for _, record in read_journal(run.journal_path("prompts")):
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


class Similar:
    """Near duplicates by MinHash (Broder 1997) over runs of five words, Jaccard similarity at or over a threshold.

    At 0.9 about one word in a hundred differs. Case, spaces and punctuation count for nothing, but signs that carry
    meaning (C and C++, x + 5 and x - 5) do. Prompts under different system prompts or tools are never alike.
    """

    def __init__(self, threshold: float) -> None:
        import rensa

        self._threshold = threshold
        self._rensa = rensa
        self._index = rensa.RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._seen: list[tuple[str, Any]] = []

    def seen(self, prompt: Prompt) -> bool:
        """Whether something like ``prompt`` came before; if not, remember it."""
        system = [message.content for message in prompt.messages if message.role == "system"]
        around = key_of(system=system, tools=prompt.tools)
        said = "\n".join(message.content or "" for message in prompt.messages if message.role != "system")
        minhash = self._rensa.RMinHash(num_perm=PERMUTATIONS, seed=1)
        minhash.update(sorted(self._shingles(said)))
        for other, known in map(self._seen.__getitem__, self._index.query(minhash)):
            if other == around and minhash.jaccard(known) >= self._threshold:
                return True
        self._index.insert(len(self._seen), minhash)
        self._seen.append((around, minhash))
        return False

    @staticmethod
    def _shingles(text: str) -> set[str]:
        words = re.findall(r"\w+|[^\w\s.,;:!?'\"‘’“”…–—]", text.casefold()) or [text]
        words = [""] * (SHINGLE - 1) + words + [""] * (SHINGLE - 1)  # so that the first word weighs as much as others
        return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


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
