"""Gold pairs: pairs with a known label. They test annotators and never enter the dataset.

A gold file is a judge's ``gold.jsonl``: one object per line with ``prompt`` (text or messages), ``responses`` (two) and
``label`` (1 or 2, the better one). Other fields are ignored. A gold pair becomes a row like those of the pairs table,
with an id of the same form and route ``gold``, so that the browser receives nothing that identifies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlaif.errors import InputError
from rlaif.records import Message, content_key, format_validation_error


class GoldRow(BaseModel):
    """One line of a gold file. ``why`` is the reason for the label."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str | list[Message]
    responses: list[str] = Field(min_length=2, max_length=2)
    label: Literal[1, 2]
    why: str = ""


def read_gold_pairs(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the gold pairs of ``paths`` as rows by pair id.

    ``preferred`` is the known label and ``route_reason`` the reason for it. Raises :class:`InputError` that names the
    first bad line.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", location=str(path)) from None
        for line_number, line in enumerate(lines, 1):
            if line.strip():
                row = _parse_row(line, f"{path}:{line_number}")
                rows[row["pair_id"]] = row
    return rows


def _parse_row(line: bytes, location: str) -> dict[str, Any]:
    try:
        gold = GoldRow.model_validate(orjson.loads(line))
    except orjson.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}", location=location, hint="Write one object per line.") from None
    except ValidationError as error:
        hint = 'Write the pair as {"prompt": ..., "responses": [one, other], "label": 1 or 2}.'
        raise InputError(format_validation_error(error, GoldRow), location=location, hint=hint) from None
    turns = [Message(role="user", content=gold.prompt)] if isinstance(gold.prompt, str) else gold.prompt
    messages = [turn.to_openai() for turn in turns]
    key = content_key(gold=messages, responses=gold.responses)
    return {
        "pair_id": key[:16],
        "prompt_id": key[16:32],
        "prompt": orjson.dumps(messages).decode(),
        "response_a": gold.responses[0],
        "response_b": gold.responses[1],
        "route": "gold",
        "inclusion_probability": None,
        "prob_a": None,
        "preferred": "a" if gold.label == 1 else "b",
        "route_reason": gold.why,
    }
