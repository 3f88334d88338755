"""The records that stages hand to each other, and the keys by which a run knows what it already has.

A record is one line of a journal. Every record has a ``key``: sha256 over the canonical JSON of all that determines
the answer, so resuming a run is set difference on keys. A line that has an ``error`` instead of an answer is a
:class:`Failure`: it is counted and shown, owed again on resume, and never read as a label.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from rlaif.errors import did_you_mean

SCHEMA_VERSION = 2
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # a str joins paired ones into one character

Order = Literal["ab", "ba"]
Side = Literal["a", "b"]
Choice = Literal["left", "right", "tie", "both_bad", "skip"]
Label = Literal["refuse", "partial", "comply"]
Outcome = Literal["win", "tie", "inconsistent", "unparsable"]
Route = Literal["judge", "audit", "targeted", "dropped"]


def canonical_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8. Equal values give equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def content_key(**determinants: Any) -> str:
    """The key of a request or record: 64 hex digits, sha256 over the canonical JSON of what determines it."""
    return hashlib.sha256(canonical_json(determinants)).hexdigest()


def hash_to_unit_interval(*parts: str | int) -> float:
    """A number in [0, 1) fixed by ``parts``: for seeded choices that do not depend on the order of rows."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def replace_surrogates(text: str) -> str:
    """``text`` with lone surrogates (valid in JSON escapes, impossible in UTF-8) replaced by U+FFFD."""
    return text if text.isascii() else LONE_SURROGATE.sub("\ufffd", text)


def replace_surrogates_deep(value: Any) -> Any:
    """``value`` with :func:`replace_surrogates` applied to every string in it, keys included."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [replace_surrogates_deep(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(str(name)): replace_surrogates_deep(item) for name, item in value.items()}
    return value


class Record(BaseModel):
    """Base of everything that is journaled: strict about names, immutable, and cheap to write."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(BaseModel):
    """One chat turn. ``content`` may be null only where an assistant turn carries tool calls instead."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _require_content(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        for call in self.tool_calls or []:
            function = call.get("function", call)
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError("a tool call needs a function with a name")
        return self

    def to_openai(self) -> dict[str, Any]:
        """The message as the chat completions protocol and TRL take it."""
        return self.model_dump(exclude_none=True)


class Prompt(Record):
    """A prompt taken into a run. ``messages`` ends with a turn that the policy answers (user or tool)."""

    key: str
    prompt_id: str
    messages: list[Message]
    reference: str | None = None
    checklist: list[str] = []
    checks: list[dict[str, Any]] = []
    tags: list[str] = []
    tools: list[dict[str, Any]] | None = None
    split: Literal["train", "heldout"] = "train"
    source: str = ""

    def to_openai(self) -> list[dict[str, Any]]:
        return [message.to_openai() for message in self.messages]


def to_template_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """``turn`` as a chat template takes it, and as servers hand it to one.

    Fields that it does not have are nulls in Parquet and are left out: some templates ask whether a field is there, not
    whether it says something. The arguments of a tool call travel as JSON text and templates want the value.
    """
    fields = {name: value for name, value in turn.items() if value is not None}
    if fields.get("tool_calls"):
        fields["tool_calls"] = [_to_template_call(call) for call in fields["tool_calls"]]
    return fields


def _to_template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" not in call:  # files have calls that are the function itself
        call = {"type": "function", "function": call}
    function = dict(call["function"] or {})
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(orjson.JSONDecodeError):  # a model wrote it: what is no JSON is shown as it is
            function["arguments"] = orjson.loads(function["arguments"])
    return {**{name: value for name, value in call.items() if value is not None}, "function": function}


def _prompt_form(value: Any) -> str:
    """Which of a prompt's two forms ``value`` is meant to be, so that only that one's mistakes are told."""
    return "messages" if isinstance(value, list) else "text"


NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class PromptRow(BaseModel):
    """One row of a prompt file: ``{"prompt": str | messages, "id"?, "system"?, "reference"?, "checklist"?, "checks"?,
    "tags"?, "tools"?}``. Also the left part of an ``--import`` row."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)

    prompt: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Message], Tag("messages")], Discriminator(_prompt_form)
    ]
    id: str | None = None
    system: str | None = None
    reference: str | None = None
    checklist: list[NonEmpty] = []
    checks: list[dict[str, Any]] = []
    tags: list[str] = []
    tools: list[dict[str, Any]] | None = None

    @field_validator("id", mode="before")
    @classmethod
    def _stringify_id(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _validate_prompt(self) -> PromptRow:
        if self.id is not None and not self.id.strip():
            raise ValueError("id is empty")
        if isinstance(self.prompt, str):
            if not self.prompt.strip():
                raise ValueError("prompt is empty")
            return self
        if not self.prompt:
            raise ValueError("prompt has no messages")
        last = self.prompt[-1]
        if last.role not in ("user", "tool"):
            raise ValueError(f"the last message is from {last.role!r}; it must be the turn that is to be answered")
        if not (last.content or "").strip():
            raise ValueError("the last message is empty")
        if self.system and any(message.role == "system" for message in self.prompt):
            raise ValueError("there is a system message in prompt and a system field too")
        return self

    def messages(self) -> list[Message]:
        turns = [Message(role="user", content=self.prompt)] if isinstance(self.prompt, str) else list(self.prompt)
        return [Message(role="system", content=self.system), *turns] if self.system else turns


class ImportRow(PromptRow):
    """One row of ``generate --import``: a prompt row with its answers, and who gave them."""

    responses: list[str] = Field(min_length=1)
    models: list[NonEmpty] | None = None

    @model_validator(mode="after")
    def _match_models_to_responses(self) -> ImportRow:
        if self.models is not None and len(self.models) != len(self.responses):
            raise ValueError(f"{len(self.responses)} responses but {len(self.models)} models")
        return self


class Completion(Record):
    """An answer to a prompt. ``text`` is what a reader sees; ``reasoning`` was split from it.

    ``completion_tokens`` is exact where the request had one choice; the tokens of a request with several choices are
    reported in one sum by the protocol and shared out here by length, so that a request's records add up to it.
    """

    key: str
    prompt_id: str
    index: int
    model: str
    text: str
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    source: Literal["sampled", "imported"] = "sampled"
    created_at: float = Field(default_factory=time.time)


class Verdict(Record):
    """What one judge said once: of two answers in one order (kind compare), of one answer and one aspect (rate), or of
    one answer (check, reward, classify).

    ``prob_a`` is the probability that completion ``a`` is better, already turned back where ``order`` is "ba".
    ``score`` of a rating is the expected score and ``variance`` its variance over the judge's scale; of a check the
    share of the prompt's checks that are met; of a reward model its raw scalar; of a classification the probability of
    its ``label``. ``verdict_mass`` is the share of probability that lay on readable verdicts (null where the server
    gave none). What no model was asked for (checks, the text classifier of refusals) has an empty ``model``.
    """

    key: str
    kind: Literal["compare", "rate", "check", "reward", "classify"]
    judge: str
    judge_hash: str
    model: str
    prompt_id: str
    a: str
    b: str | None = None
    order: Order | None = None
    aspect: str | None = None
    sample: int = 0
    prob_a: float | None = Field(default=None, ge=0, le=1)
    score: float | None = None
    variance: float | None = None
    label: Label | None = None
    verdict_mass: float | None = None
    reply: str = ""
    flags: list[str] = []
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    created_at: float = Field(default_factory=time.time)


class Review(Record):
    """One person's label of one pair. ``preferred`` is already in the pair's own a/b; null for tie, both bad, skip.

    ``edited_response`` is a better answer that the person wrote, ``confidence`` how sure they are (1 a guess, 3
    certain), ``seconds`` how long the pair was looked at. An adjudicator's label outranks everybody's. Route ``gold``
    is a pair with a known label that tests the people: it stands in no table of pairs and never enters the dataset.
    """

    key: str
    pair_id: str
    prompt_id: str
    annotator: str
    role: Literal["annotator", "adjudicator"] = "annotator"
    choice: Choice
    left_side: Side
    preferred: Side | None
    comment: str = ""
    edited_response: str | None = None
    confidence: int | None = Field(default=None, ge=1, le=3)
    seconds: float | None = Field(default=None, ge=0)
    route: Route | Literal["gold"]
    inclusion_probability: float | None = None
    created_at: float = Field(default_factory=time.time)


class Failure(Record):
    """A request that gave no answer: what was asked (by key), why it failed. Owed again when the run resumes."""

    key: str
    error: str
    kind: Literal["endpoint", "unparsable", "check"]
    prompt_id: str = ""
    created_at: float = Field(default_factory=time.time)


def format_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """A pydantic error in one line a problem: the dotted field, what is wrong, and the closest known name."""
    lines = []
    for issue in error.errors(include_url=False):
        field_path = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "extra_forbidden":
            candidates = _field_names_at(model, issue["loc"][:-1])
            lines.append(f"unknown setting {field_path!r}. {did_you_mean(str(issue['loc'][-1]), candidates)}")
        else:
            message = issue["msg"].removeprefix("Value error, ")
            lines.append(f"{field_path}: {message}" if field_path else message)
    return "; ".join(lines)


def _field_names_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The names that the part of ``model`` at ``location`` knows."""
    for part in location:
        if part in model.model_fields:  # and not a list's index, or which form of several a value has
            model = next(_models_in(model.model_fields[str(part)].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
