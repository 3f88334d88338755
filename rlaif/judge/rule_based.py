"""Verdicts that cost nothing: the prompts' checks, and the text classifier of refusals, answer by answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from rlaif.judge import check_schema, refusal_classifier
from rlaif.records import Failure, Verdict
from rlaif.run.journal import Journal, iter_blocks

RecordLookup = Callable[[int], dict[str, Any]]


def validate_prompt_checks(prompts: Path) -> None:
    """Raise the error of the first check in the journal of prompts that cannot be evaluated, before anything is asked.
    Lines without checks are not even parsed."""
    for _, block in iter_blocks(prompts):
        if b'"checks":[{' not in block:
            continue
        for line in block.splitlines():
            if b'"checks":[{' in line:
                prompt = orjson.loads(line)
                check_schema.compile_checks(
                    prompt["checks"], location=f"prompt {prompt['prompt_id']} ({prompt['source']})"
                )


def rule_based_verdicts(
    work: Iterable[tuple[int, int, int | None]],
    fetch_prompt: RecordLookup,
    fetch_answer: RecordLookup,
    journal: Journal,
) -> Iterator[Verdict | Failure]:
    """What is owed for each (prompt, answer) of ``work``, given by their byte offsets and in the prompts' order."""
    current_offset, prompt = -1, {}
    for prompt_offset, answer_offset, _ in work:
        if prompt_offset != current_offset:
            current_offset, prompt = prompt_offset, fetch_prompt(prompt_offset)
        answer = fetch_answer(answer_offset)
        if prompt["checks"] and check_schema.check_key(prompt, answer["key"]) not in journal:
            yield check_schema.run_checks(prompt, answer)
        if refusal_classifier.refusal_key(answer) not in journal:
            yield refusal_classifier.refusal_verdict(prompt["prompt_id"], answer)
