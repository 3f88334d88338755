"""Gold labels: answers whose correct label is known, for the exam. One JSON object per line, by the judge's kind:

    {"prompt": str | messages, "responses": [one, two], "label": 1 | 2}     compare, rate, reward, check
    {"prompt": str | messages, "response": str, "label": "refuse" | "partial" | "comply"}     classify

A row may have ``id``, ``system``, ``reference``, ``checklist`` and ``checks`` like a prompt, and ``aspect`` for a judge
that rates several aspects. Other fields are ignored, so that published datasets can be used unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import ConfigDict, Field, ValidationError, model_validator

from rlaif.errors import InputError, did_you_mean
from rlaif.judge.judge_file import Judge
from rlaif.records import Label, PromptRow, content_key, format_validation_error

GOLD_FILE = "gold.jsonl"


class GoldPairRow(PromptRow):
    """A prompt with two responses. ``label`` is the number of the better one."""

    model_config = ConfigDict(extra="ignore")

    responses: list[str] = Field(min_length=2, max_length=2)
    label: Literal[1, 2]
    aspect: str | None = None

    @model_validator(mode="after")
    def _has_two_answers(self) -> GoldPairRow:
        if not all(text.strip() for text in self.responses) or self.responses[0] == self.responses[1]:
            raise ValueError("responses must be two different, non-empty answers")
        return self


class GoldLabelRow(PromptRow):
    """A prompt with one response and its label."""

    model_config = ConfigDict(extra="ignore")

    response: str = Field(min_length=1)
    label: Label


@dataclass(frozen=True)
class GoldExample:
    """A gold row as the judge sees it. ``correct`` is the index of the better answer (0 or 1), or the label."""

    id: str
    prompt: dict[str, Any]
    answers: list[dict[str, Any]]
    correct: int | Label
    aspect: str | None = None


def read_gold(path: Path, judge: Judge, limit: int | None = None) -> list[GoldExample]:
    """Read the gold rows that ``judge`` needs, at most ``limit``. Raises :class:`InputError` with file and line."""
    row_type = GoldLabelRow if judge.file.kind == "classify" else GoldPairRow
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also splits inside texts, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"gold file cannot be read: {reason}", location=str(path)) from None
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
            reason = format_validation_error(error, row_type)
            raise InputError(
                f"invalid gold row for a judge of kind {judge.file.kind!r}: {reason}", location=location
            ) from None
        aspect = getattr(row, "aspect", None)
        if aspect is not None and aspects and aspect not in aspects:
            raise InputError(
                f"judge {judge.name!r} has no aspect {aspect!r}. {did_you_mean(aspect, aspects)}", location=location
            )
        examples.append(_to_example(row, aspect if aspects else None))
    if not examples:
        raise InputError("has no gold rows", location=str(path))
    return examples


def _to_example(row: GoldPairRow | GoldLabelRow, aspect: str | None) -> GoldExample:
    messages = [message.to_openai() for message in row.messages()]
    prompt = {"messages": messages, "reference": row.reference, "checklist": row.checklist, "checks": row.checks}
    prompt_id = row.id or content_key(**prompt)[:16]
    texts = [row.response] if isinstance(row, GoldLabelRow) else row.responses
    correct: int | Label = row.label if isinstance(row, GoldLabelRow) else row.label - 1
    answers = [make_answer(prompt, text) for text in texts]
    return GoldExample(prompt_id, {"prompt_id": prompt_id, **prompt}, answers, correct, aspect)


def make_answer(prompt: dict[str, Any], text: str) -> dict[str, Any]:
    """Return ``text`` as an answer record for the judge."""
    return {"key": content_key(prompt=prompt["messages"], text=text), "text": text}


def gold_bias_warnings(gold: list[GoldExample]) -> list[str]:
    """Return a warning for each habit, such as choosing the longer answer, that would pass an exam on ``gold``.

    Empty for unbiased gold and for gold of single answers.
    """
    pairs = [(row.correct, [len(answer["text"]) for answer in row.answers]) for row in gold if len(row.answers) == 2]
    if len(pairs) < 10:
        return [f"only {len(pairs)} pairs: too few to distinguish a judge from chance"] if pairs else []
    warnings = []
    first_share = sum(correct == 0 for correct, _ in pairs) / len(pairs)
    longer_share = sum(chars[int(correct)] > chars[1 - int(correct)] for correct, chars in pairs) / len(pairs)
    if not 0.35 <= first_share <= 0.65:
        warnings.append(
            f"the first answer is the better one in {first_share:.0%} of the pairs: "
            "a judge that always chooses one position would score well"
        )
    if longer_share > 0.65:
        warnings.append(
            f"the longer answer is the better one in {longer_share:.0%} of the pairs: "
            "a judge that prefers longer answers would score well"
        )
    return warnings
