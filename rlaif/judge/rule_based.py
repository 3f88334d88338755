"""Rule-based verdicts, which need no model: the prompts' checks and the text classifier of refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson

from rlaif.judge import check_schema, refusal_classifier
from rlaif.llm.usage import UsageMeter
from rlaif.records import Failure, Verdict
from rlaif.run.journal import Journal, RecordLookup, iter_blocks

RECORD_BATCH = 1000
"""Verdicts written to the journal at once."""


def validate_prompt_checks(prompts: Path) -> None:
    """Compile all checks in the journal ``prompts``. Raises the error of the first check that cannot be evaluated.

    Lines without checks are not parsed.
    """
    has_checks = b'"checks":[{'
    for _, block in iter_blocks(prompts):
        if has_checks not in block:
            continue
        for line in block.splitlines():
            if has_checks in line:
                prompt = orjson.loads(line)
                location = f"prompt {prompt['prompt_id']} ({prompt['source']})"
                check_schema.compile_checks(prompt["checks"], location)


def run_rule_based(
    inputs: Iterable[tuple[int, int, int | None]],
    fetch_prompt: RecordLookup,
    fetch_answer: RecordLookup,
    journal: Journal,
    usage: UsageMeter,
) -> None:
    """Journal the pending verdicts of the prompts' checks and of the text classifier of refusals.

    ``inputs``: byte offsets of prompt and answer, in the order of the prompts; the third value is ignored. A check that
    cannot be evaluated counts as a failure in ``usage``, but not as a sign that a server fails.
    """
    verdicts = _rule_based_verdicts(inputs, fetch_prompt, fetch_answer, journal)
    for batch in iter(lambda: list(itertools.islice(verdicts, RECORD_BATCH)), []):
        journal.append(batch)
        for record in batch:
            if isinstance(record, Failure):
                usage.failures[record.kind] += 1
                usage.last_error = record.error


def _rule_based_verdicts(
    inputs: Iterable[tuple[int, int, int | None]],
    fetch_prompt: RecordLookup,
    fetch_answer: RecordLookup,
    journal: Journal,
) -> Iterator[Verdict | Failure]:
    current_offset, prompt = -1, {}
    for prompt_offset, answer_offset, _ in inputs:
        if prompt_offset != current_offset:
            current_offset, prompt = prompt_offset, fetch_prompt(prompt_offset)
        answer = fetch_answer(answer_offset)
        if prompt["checks"] and check_schema.check_key(prompt, answer["key"]) not in journal:
            yield check_schema.run_checks(prompt, answer)
        if refusal_classifier.refusal_key(answer) not in journal:
            yield refusal_classifier.refusal_verdict(prompt["prompt_id"], answer)
