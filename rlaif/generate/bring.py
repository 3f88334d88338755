"""``generate --import``: answers that somebody has already. ``{"prompt", "responses": [...], "models"?: [...]}`` a row.

The same prompt in several rows is one prompt with all their answers. A completion's key is made of its prompt, its
model, its text and its occurrence among equal ones, never of its place: swapping answers changes nothing downstream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rlaif.config import Config
from rlaif.generate import read
from rlaif.generate.prompts import Owners, to_prompt
from rlaif.llm.wire import split_thinking
from rlaif.records import Completion, ImportRow, key_of
from rlaif.run.directory import Run

UNNAMED = "unknown"


@dataclass
class Brought:
    prompts: int = 0
    completions: int = 0
    new: int = 0


def bring(run: Run, config: Config, source: str, say: Callable[[str], None]) -> Brought:
    """Journal the prompts and completions of ``source``. Those already there are not repeated. Answers to prompts that
    the run holds out are kept, and never judged.

    Raises :class:`InputError` naming file and line before anything is written.
    """
    owners = Owners(run, config)
    read.check(source, ImportRow, config.prompts.on_bad_row, say, owners.note)
    brought, seen, prompts, heldout = Brought(), Counter[str](), set[str](), 0
    with run.journal("prompts") as prompt_journal, run.journal("completions") as journal:
        for where, row in read.rows(source, ImportRow):
            prompt = to_prompt(row, where, config, may_hold_out=False)
            prompt_id = owners.ids.setdefault(prompt.key, prompt.prompt_id)
            prompts.add(prompt_id)
            heldout += prompt.key in owners.heldout
            if prompt.key not in prompt_journal:
                prompt_journal.append([prompt])
            fresh = []
            models = row.models or [UNNAMED] * len(row.responses)
            for index, (text, model) in enumerate(zip(row.responses, models, strict=True)):
                key = key_of(prompt=prompt.key, model=model, text=text, occurrence=0)
                seen[key] += 1
                if seen[key] > 1:
                    key = key_of(prompt=prompt.key, model=model, text=text, occurrence=seen[key] - 1)
                brought.completions += 1
                if key not in journal:
                    thinking, answer = split_thinking(text)
                    fresh.append(
                        Completion(key=key, prompt_id=prompt_id, index=index, model=model, text=answer,
                                   thinking=thinking, source="imported")
                    )  # fmt: skip
            journal.append(fresh)
            brought.new += len(fresh)
    brought.prompts = len(prompts)
    if heldout:
        say(f"{heldout:,} rows are of prompts that this run holds out for evaluation: their answers are not judged")
    return brought
