"""Convert rows of the dataset to the input of a chat template, and render them.

The preflight, the training and the measurements all use ``to_chat_turns``, so that they see the same turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from rlaif.records import to_template_turn

if TYPE_CHECKING:
    import polars as pl

SIDES = ("prompt", "chosen", "rejected")
MAX_SHOWN_CHARS = 1_200


def to_chat_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Return ``prompt``, ``chosen``, ``rejected`` and ``tools`` of a row in the form that chat templates expect."""
    tools = row.get("tools")
    turns: dict[str, Any] = {side: [to_template_turn(turn) for turn in row[side]] for side in SIDES}
    turns["tools"] = orjson.loads(tools) if isinstance(tools, str) else tools
    return turns


def token_ids(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, **options: Any) -> list[int]:
    """Return the token ids of ``turns`` rendered by the tokenizer's chat template."""
    tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, tools=tools, **options)
    return list(tokens["input_ids"])


def common_prefix_length(left: list[int], right: list[int]) -> int:
    """Return the number of ids that both lists begin with."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def render_example(frame: pl.DataFrame, tokenizer: Any) -> str:
    """Return the first pair as rendered for the model, with special tokens. Long parts are cut in the middle."""
    row = to_chat_turns(frame.row(0, named=True))
    render: Callable[..., str] = tokenizer.apply_chat_template
    prompt = render(row["prompt"], tokenize=False, add_generation_prompt=True, tools=row["tools"])
    parts = [f"prompt:\n{_truncate_middle(prompt)}"]
    for side in ("chosen", "rejected"):
        full_text = render(row["prompt"] + row[side], tokenize=False, tools=row["tools"])
        answer = full_text[len(prompt) :] if full_text.startswith(prompt) else full_text
        parts.append(f"{side}:\n{_truncate_middle(answer)}")
    return "\n".join(part.rstrip("\n") for part in parts)


def _truncate_middle(text: str) -> str:
    half = MAX_SHOWN_CHARS // 2
    return (
        text
        if len(text) <= MAX_SHOWN_CHARS
        else f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
    )
