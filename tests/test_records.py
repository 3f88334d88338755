"""Keys, cleaned text, seeded choices, and valid and invalid rows of prompt and import files."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rlaif.records import (
    Completion,
    Failure,
    ImportRow,
    Message,
    Prompt,
    PromptRow,
    canonical_json,
    content_key,
    format_validation_error,
    hash_to_unit_interval,
    replace_surrogates,
    replace_surrogates_deep,
    to_template_turn,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


# Keys


def test_keys_never_change() -> None:
    """Every version computes the same key. Otherwise all requests of existing journals would be sent again."""
    key = content_key(messages=[{"role": "user", "content": "Grüße 🙂"}], seed=0, temperature=1.0, tools=None)
    assert key == "fe1db29948e1536a5fc3a1e8be9c2c6f296264cc5ce5ab2ec374232f043de22c"


@given(st.dictionaries(TEXT, JSON, max_size=6), st.randoms())
def test_canonical_json_ignores_the_order_of_names(value: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            items = list(value.items())
            random.shuffle(items)
            return {name: shuffled(item) for name, item in items}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    assert canonical_json(shuffled(value)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value
    assert content_key(value=shuffled(value)) == content_key(value=value)


@given(JSON, JSON)
def test_different_determinants_have_different_keys(one: Any, other: Any) -> None:
    same = canonical_json(one) == canonical_json(other)
    assert (content_key(value=one) == content_key(value=other)) is same
    assert content_key(a=one) != content_key(b=one)
    assert len(content_key(value=one)) == 64


# Cleaned text


ANY_TEXT = st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE00F) | st.characters(), max_size=30)


@given(ANY_TEXT)
def test_only_lone_surrogates_are_replaced(text: str) -> None:
    expected = "".join("\ufffd" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)
    assert replace_surrogates(text) == expected
    assert replace_surrogates(replace_surrogates(text)) == replace_surrogates(text)


def test_surrogates_are_replaced_in_every_string_of_a_json_value() -> None:
    """Names and values at any depth. The result can be written as JSON and read back."""
    dirty = json.loads('{"a\\ud800": ["\\udc00x", {"\\ud83d\\ude00": "\\ud83d"}, 1, 2.5, true, null]}')
    cleaned = replace_surrogates_deep(dirty)
    assert cleaned == {"a\ufffd": ["\ufffdx", {"😀": "\ufffd"}, 1, 2.5, True, None]}
    assert orjson.loads(orjson.dumps(cleaned)) == cleaned


# Seeded choices


def test_hash_to_unit_interval_is_uniform() -> None:
    """Each tenth of [0, 1) gets a tenth of 20,000 values, within five standard deviations."""
    count = 20_000
    values = [hash_to_unit_interval(7, "heldout", f"key-{i}") for i in range(count)]
    assert all(0 <= value < 1 for value in values)
    tenths = Counter(int(value * 10) for value in values)
    assert set(tenths) == set(range(10))
    allowed = 5 * math.sqrt(count * 0.1 * 0.9)
    assert all(abs(size - count / 10) < allowed for size in tenths.values())


def test_hash_to_unit_interval_depends_only_on_its_parts() -> None:
    """Earlier calls and the order of rows do not matter; another seed, purpose or key gives another number."""
    keys = [f"key-{i}" for i in range(50)]
    forward = {key: hash_to_unit_interval(0, "x", key) for key in keys}
    backward = {key: hash_to_unit_interval(0, "x", key) for key in reversed(keys)}
    assert forward == backward
    assert (
        len(
            {
                hash_to_unit_interval(*parts)
                for parts in ((0, "x", "k"), (1, "x", "k"), (0, "y", "k"), (0, "x", "l"), (0, "xk"), (0, "x", "", "k"))
            }
        )
        == 6
    )


# Rows


def error_message(kind: type[BaseModel], row: dict[str, Any]) -> str:
    """Return the error message for ``row``. Fails if the row is valid."""
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(row)
    return format_validation_error(raised.value, kind)


USER = {"role": "user", "content": "q"}
BAD_PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n\t"}, "prompt is empty"),
    ({"prompt": []}, "prompt has no messages"),
    ({"prompt": 3}, "prompt.text: Input should be a valid string"),
    ({"prompt": "q", "id": ""}, "id is empty"),
    ({"prompt": "q", "id": "  "}, "id is empty"),
    ({"prompt": "q", "id": True}, "id: Input should be a valid string"),
    ({"prompt": "q", "tags": "a"}, "tags: Input should be a valid list"),
    ({"prompt": "q", "checks": [1]}, "checks.0: Input should be a valid dictionary"),
    ({"prompt": "q", "refrence": "x"}, "unknown key 'refrence'. Did you mean 'reference'?"),
    ({"prompt": [USER, {"role": "assistant", "content": "a"}]},
     "the last message is from 'assistant'; it must be from 'user' or 'tool'"),
    ({"prompt": [{"role": "system", "content": "s"}]},
     "the last message is from 'system'; it must be from 'user' or 'tool'"),
    ({"prompt": [{"role": "user", "content": " "}]}, "the last message is empty"),
    ({"prompt": [{"role": "user"}]}, "prompt.messages.0: a message needs content"),
    ({"prompt": ["q"]}, "prompt.messages.0: Input should be a valid dictionary or instance of Message"),
    ({"prompt": [{"role": "human", "content": "q"}]},
     "prompt.messages.0.role: Input should be 'system', 'user', 'assistant' or 'tool'"),
    ({"prompt": [{**USER, "contents": "q"}]},
     "unknown key 'prompt.messages.0.contents'. Did you mean 'content'?"),
    ({"prompt": [{"role": "system", "content": "s"}, USER], "system": "t"},
     "prompt has a system message, so the field system must not be set"),
]  # fmt: skip
BAD_IMPORTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "q"}, "responses: Field required"),
    ({"prompt": "q", "responses": []}, "responses: List should have at least 1 item after validation, not 0"),
    ({"prompt": "q", "responses": "a"}, "responses: Input should be a valid list"),
    ({"prompt": "q", "responses": ["a", None]}, "responses.1: Input should be a valid string"),
    ({"prompt": "q", "responses": ["a", "b"], "models": ["m"]}, "2 responses but 1 models"),
    ({"prompt": "q", "responses": ["a"], "models": [""]}, "models.0: String should have at least 1 character"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PROMPTS, ids=lambda value: str(value)[:50])
def test_an_invalid_prompt_row_is_explained_in_one_line(row: dict[str, Any], message: str) -> None:
    assert error_message(PromptRow, row) == message


@pytest.mark.parametrize(("row", "message"), BAD_IMPORTS, ids=lambda value: str(value)[:50])
def test_an_invalid_import_row_is_explained_in_one_line(row: dict[str, Any], message: str) -> None:
    assert error_message(ImportRow, row) == message


def test_every_error_of_a_row_is_reported() -> None:
    assert error_message(PromptRow, {"prompt": 1, "tags": 2, "id": 3.5}).count(";") == 2


def test_valid_rows() -> None:
    """Text, messages, a tool turn, a system field, a number as ID, an assistant turn that only calls tools."""
    assert PromptRow(prompt="q", id=7).id == "7"  # type: ignore[arg-type]
    assert PromptRow(prompt="q", system="s").messages() == [
        Message(role="system", content="s"),
        Message(role="user", content="q"),
    ]
    assert PromptRow(prompt=" q\r\n").messages()[0].content == " q\r\n"
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    row = PromptRow.model_validate({"prompt": turns})
    assert [message.to_openai() for message in row.messages()] == [
        USER,
        {"role": "assistant", "tool_calls": calls},
        turns[2],
    ]


def test_empty_answers_may_be_imported() -> None:
    """They are dropped later, when pairs are formed, and counted there. Dropping them here would hide them."""
    assert ImportRow(prompt="q", responses=["", "a"]).responses == ["", "a"]


def test_records_are_immutable_and_reject_unknown_fields() -> None:
    failure = Failure(key="00", error="e", kind="endpoint")
    with pytest.raises(ValidationError):
        failure.error = "x"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Completion(key="00", prompt_id="p", index=0, model="m", text="t", tokens=1)  # type: ignore[call-arg]


@settings(max_examples=50)
@given(st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=3))
def test_nulls_inside_tools_are_preserved(tools: list[dict[str, Any]]) -> None:
    """A null in the schema of a tool has a meaning, unlike a null field of a record."""
    prompt = Prompt(key="00", prompt_id="p", messages=[Message(role="user", content="q")], tools=tools)
    line = orjson.dumps(prompt.model_dump(mode="json", exclude_none=True))
    assert orjson.loads(line).get("tools") == tools


def test_a_turn_for_a_chat_template_has_parsed_arguments_and_no_nulls() -> None:
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    value = {"name": "weather", "arguments": {"city": "Oslo"}}
    for call in ({"id": None, "type": "function", "function": function}, function):
        turn = to_template_turn({"role": "assistant", "content": None, "tool_calls": [call]})
        assert turn == {"role": "assistant", "tool_calls": [{"type": "function", "function": value}]}
    # Arguments written by a model that are not JSON stay as they are. The template decides what to do with them.
    odd = {"function": {"name": "weather", "arguments": "{"}}
    assert to_template_turn({"role": "assistant", "tool_calls": [odd]})["tool_calls"] == [odd]
    assert to_template_turn({"role": "user", "content": "Hm", "tool_calls": None}) == {"role": "user", "content": "Hm"}
