"""Gold: answers whose right label is known, for the exam.

    {"prompt": str | messages, "responses": [one, two], "label": 1 | 2}     compare, rate, reward, check
    {"prompt": str | messages, "response": str, "label": "refuse" | "partial" | "comply"}     classify

A row may have ``id``, ``system``, ``reference``, ``checklist`` and ``checks`` like a prompt, and ``aspect`` for a judge
that rates several. Other fields are passed over, so that a published set can be used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import ConfigDict, Field, ValidationError, model_validator

from rlaif.errors import InputError
from rlaif.judge.judge_file import Judge
from rlaif.records import Label, PromptRow, content_key, format_validation_error

GOLD_FILE = "gold.jsonl"


class GoldPairRow(PromptRow):
    model_config = ConfigDict(extra="ignore")

    responses: list[str] = Field(min_length=2, max_length=2)
    label: Literal[1, 2]
    aspect: str | None = None

    @model_validator(mode="after")
    def _has_two_answers(self) -> GoldPairRow:
        if not all(text.strip() for text in self.responses) or self.responses[0] == self.responses[1]:
            raise ValueError("responses must be two different answers that are not empty")
        return self


class GoldLabelRow(PromptRow):
    model_config = ConfigDict(extra="ignore")

    response: str = Field(min_length=1)
    label: Label


@dataclass(frozen=True)
class GoldExample:
    """One row as the judge sees it. ``correct`` is the better of two answers (0 or 1), or the label of one."""

    id: str
    prompt: dict[str, Any]
    answers: list[dict[str, Any]]
    correct: int | Label
    aspect: str | None = None


def read_gold(path: Path, judge: Judge, limit: int | None = None) -> list[GoldExample]:
    """The rows of ``path`` for ``judge``. Raises :class:`InputError` naming file and line."""
    row_type = GoldLabelRow if judge.file.kind == "classify" else GoldPairRow
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # and not where a text holds another sign of a new line
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"gold cannot be read: {reason}", location=str(path)) from None
    examples: list[GoldExample] = []
    aspects = {aspect.name for aspect in judge.file.aspects}
    for line_number, line in enumerate(lines, 1):
        if not line.strip() or (limit and len(examples) >= limit):
            continue
        location = f"{path}:{line_number}"
        try:
            row = row_type.model_validate(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            raise InputError(f"not JSON: {error}", location=location) from None
        except ValidationError as error:
            raise InputError(
                f"no gold for a judge of kind {judge.file.kind}: {format_validation_error(error, row_type)}",
                location=location,
            ) from None
        aspect = getattr(row, "aspect", None)
        if aspect is not None and aspects and aspect not in aspects:
            raise InputError(
                f"the judge has no aspect {aspect!r}; there is {', '.join(sorted(aspects))}", location=location
            )
        examples.append(_to_example(row, aspect if aspects else None))
    if not examples:
        raise InputError("there is no gold in it", location=str(path))
    return examples


def _to_example(row: GoldPairRow | GoldLabelRow, aspect: str | None) -> GoldExample:
    messages = [message.to_openai() for message in row.messages()]
    prompt = {"messages": messages, "reference": row.reference, "checklist": row.checklist, "checks": row.checks}
    prompt_id = row.id or content_key(**prompt)[:16]
    texts = [row.response] if isinstance(row, GoldLabelRow) else row.responses
    correct: int | Label = row.label if isinstance(row, GoldLabelRow) else row.label - 1
    return GoldExample(
        prompt_id, {"prompt_id": prompt_id, **prompt}, [make_answer(prompt, text) for text in texts], correct, aspect
    )


def make_answer(prompt: dict[str, Any], text: str) -> dict[str, Any]:
    return {"key": content_key(prompt=prompt["messages"], text=text), "text": text}


def gold_bias_warnings(gold: list[GoldExample]) -> list[str]:
    """What makes gold unfair: a habit that would pass the exam. Empty for gold that is fair, and for labels."""
    pairs = [(row.correct, [len(answer["text"]) for answer in row.answers]) for row in gold if len(row.answers) == 2]
    if len(pairs) < 10:
        return [f"only {len(pairs)} pairs: too few to tell a judge from chance"] if pairs else []
    warnings = []
    first = sum(correct == 0 for correct, _ in pairs) / len(pairs)
    longer = sum(chars[int(correct)] > chars[1 - int(correct)] for correct, chars in pairs) / len(pairs)
    if not 0.35 <= first <= 0.65:
        warnings.append(
            f"the first answer is the right one in {first:.0%}: a judge that chooses by position would do well"
        )
    if longer > 0.65:
        warnings.append(
            f"the longer answer is the right one in {longer:.0%}: a judge that prefers length would do well"
        )
    return warnings
