"""A row of the dataset as a chat template takes it, and what that makes of it.

``to_chat_turns`` is the one place that says how a row's turns are handed to a chat template: the preflight, training
and measuring use it.
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
    """``prompt``, ``chosen``, ``rejected`` and ``tools`` of a row, as a chat template takes them."""
    tools = row.get("tools")
    turns: dict[str, Any] = {side: [to_template_turn(turn) for turn in row[side]] for side in SIDES}
    turns["tools"] = orjson.loads(tools) if isinstance(tools, str) else tools
    return turns


def token_ids(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, **options: Any) -> list[int]:
    """The token ids of ``turns`` in the tokenizer's chat template."""
    tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, tools=tools, **options)
    return list(tokens["input_ids"])


def common_prefix_length(left: list[int], right: list[int]) -> int:
    """How many ids both begin with."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def render_example(frame: pl.DataFrame, tokenizer: Any) -> str:
    """The first pair as the model will read it, special tokens and all; long parts are cut in the middle."""
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
