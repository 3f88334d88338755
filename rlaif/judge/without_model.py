"""Verdicts that cost nothing: the prompts' checks, and the text classifier of refusals, answer by answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from rlaif.judge import check, refusal
from rlaif.records import Failure, Verdict
from rlaif.run.journal import Journal, blocks

Fetch = Callable[[int], dict[str, Any]]


def require_checks(prompts: Path) -> None:
    """Raise the error of the first check in the journal of prompts that cannot be evaluated, before anything is asked.
    Lines without checks are not even parsed."""
    for _, block in blocks(prompts):
        if b'"checks":[{' not in block:
            continue
        for line in block.splitlines():
            if b'"checks":[{' in line:
                prompt = orjson.loads(line)
                check.prepare(prompt["checks"], where=f"prompt {prompt['prompt_id']} ({prompt['source']})")


def verdicts(
    work: Iterable[tuple[int, int, int | None]], fetch_prompt: Fetch, fetch_answer: Fetch, journal: Journal
) -> Iterator[Verdict | Failure]:
    """What is owed for each (prompt, answer) of ``work``, given by their byte offsets and in the prompts' order."""
    at, prompt = -1, {}
    for prompt_offset, answer_offset, _ in work:
        if prompt_offset != at:
            at, prompt = prompt_offset, fetch_prompt(prompt_offset)
        answer = fetch_answer(answer_offset)
        if prompt["checks"] and check.key_for(prompt, answer["key"]) not in journal:
            yield check.run(prompt, answer)
        if refusal.key_for(answer) not in journal:
            yield refusal.verdict(prompt["prompt_id"], answer)
