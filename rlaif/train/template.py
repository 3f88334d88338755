"""A row of the dataset as a chat template takes it, and what that makes of it.

``conversation`` is the one place that says how a row's turns are handed to a chat template: the preflight, training and
measuring use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import polars as pl

SIDES = ("prompt", "chosen", "rejected")
SHOWN_CHARACTERS = 1_200


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """``prompt``, ``chosen``, ``rejected`` and ``tools`` of a row, as a chat template takes them.

    Fields that a turn does not have are nulls in Parquet and are left out here: some templates ask whether a field is
    there, not whether it says something. The arguments of a tool call travel as JSON text and templates want the value.
    """
    tools = row.get("tools")
    taken: dict[str, Any] = {side: [_turn(turn) for turn in row[side]] for side in SIDES}
    taken["tools"] = orjson.loads(tools) if isinstance(tools, str) else tools
    return taken


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in turn.items() if value is not None}
    if "tool_calls" in kept:
        kept["tool_calls"] = [_call(call) for call in kept["tool_calls"]]
    return kept


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(orjson.JSONDecodeError):  # a model wrote it: what is no JSON is shown as it is
            function["arguments"] = orjson.loads(function["arguments"])
    return {**{name: value for name, value in call.items() if value is not None}, "function": function}


def ids(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, **options: Any) -> list[int]:
    """The token ids of ``turns`` in the tokenizer's chat template."""
    tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, tools=tools, **options)
    return list(tokens["input_ids"])


def common(left: list[int], right: list[int]) -> int:
    """How many ids both begin with."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def example(frame: pl.DataFrame, tokenizer: Any) -> str:
    """The first pair as the model will read it, special tokens and all; long parts are cut in the middle."""
    row = conversation(frame.row(0, named=True))
    render: Callable[..., str] = tokenizer.apply_chat_template
    prompt = render(row["prompt"], tokenize=False, add_generation_prompt=True, tools=row["tools"])
    parts = [f"prompt:\n{_cut(prompt)}"]
    for side in ("chosen", "rejected"):
        whole = render(row["prompt"] + row[side], tokenize=False, tools=row["tools"])
        answer = whole[len(prompt) :] if whole.startswith(prompt) else whole
        parts.append(f"{side}:\n{_cut(answer)}")
    return "\n".join(part.rstrip("\n") for part in parts)


def _cut(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return (
        text
        if len(text) <= SHOWN_CHARACTERS
        else f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
    )
