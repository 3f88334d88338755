"""``generate --import``: import existing answers: ``{"prompt", "responses": [...], "models"?: [...]}`` per row.

Several rows with the same prompt are one prompt with all their answers. A completion's key depends on its prompt, its
model, its text and a count of equal answers before it, not on its position: swapping answers changes nothing later.

Imported prompts are not held out, because their answers were given to be judged, except near duplicates of a prompt
that the run has already held out.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rlaif.config.models import Config
from rlaif.generate import sources
from rlaif.generate.ingest import PromptIdIndex, journaled_split_groups, to_prompt
from rlaif.llm.chat_protocol import split_reasoning
from rlaif.records import Completion, ImportRow, content_key
from rlaif.run.run import Run

UNKNOWN_MODEL = "unknown"


@dataclass
class CompletionImport:
    """Number of prompts and completions in the source, and of completions that were not in the journal before."""

    prompts: int = 0
    completions: int = 0
    new: int = 0


def import_source(run: Run, config: Config, source: str, log: Callable[[str], None]) -> CompletionImport:
    """Journal the prompts and completions of ``source``, except those already in the journal. Answers to held-out
    prompts are journaled too, but never judged.

    Raises :class:`InputError` with file and line before anything is written.
    """
    id_index = PromptIdIndex(run, config)
    sources.validate_source(source, ImportRow, config.prompts.on_bad_row, log, id_index.register)
    result, occurrences, prompt_ids, heldout_rows = CompletionImport(), Counter[str](), set[str](), 0
    heldout_keys = id_index.heldout_keys
    split_groups = functools.cache(lambda: journaled_split_groups(run, config))  # only if there is a new prompt
    with run.journal("prompts") as prompt_journal, run.journal("completions") as journal:
        for location, row in sources.valid_rows(source, ImportRow):
            prompt = to_prompt(row, location, config, may_hold_out=False)
            prompt_id = id_index.id_by_key.setdefault(prompt.key, prompt.prompt_id)
            prompt_ids.add(prompt_id)
            if prompt.key not in prompt_journal:
                prompt = split_groups().assign(prompt)
                if prompt.split == "heldout":
                    heldout_keys.add(prompt.key)
                prompt_journal.append([prompt])
            heldout_rows += prompt.key in heldout_keys
            new_completions = []
            models = row.models or [UNKNOWN_MODEL] * len(row.responses)
            for index, (text, model) in enumerate(zip(row.responses, models, strict=True)):
                key = _completion_key(prompt.key, model, text, occurrences)
                result.completions += 1
                if key not in journal:
                    reasoning, answer = split_reasoning(text)
                    completion = Completion(
                        key=key,
                        prompt_id=prompt_id,
                        index=index,
                        model=model,
                        text=answer,
                        reasoning=reasoning,
                        source="imported",
                    )
                    new_completions.append(completion)
            journal.append(new_completions)
            result.new += len(new_completions)
    result.prompts = len(prompt_ids)
    if heldout_rows:
        log(f"{heldout_rows:,} rows belong to held-out prompts; their answers are not judged")
    return result


def _completion_key(prompt_key: str, model: str, text: str, occurrences: Counter[str]) -> str:
    """Return the key of a completion and add it to ``occurrences``. Equal completions get different keys."""
    key = content_key(prompt=prompt_key, model=model, text=text, occurrence=0)
    occurrences[key] += 1
    if occurrences[key] > 1:
        key = content_key(prompt=prompt_key, model=model, text=text, occurrence=occurrences[key] - 1)
    return key
