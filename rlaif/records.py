"""The records in the journals of a run, and their keys.

A record is one line of a journal. Its ``key`` is the sha256 of the canonical JSON of everything that determines the
answer, so the pending work of a resumed run is a set difference of keys. A line with an ``error`` instead of an answer
is a :class:`Failure`: it is counted and reported, it is pending again when the run resumes, and it is never used as a
label.

docs/reference/run-directory.md is generated from the descriptions of the fields.
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
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # in a str, a pair of surrogates is one character

Order = Literal["ab", "ba"]
Side = Literal["a", "b"]
Choice = Literal["left", "right", "tie", "both_bad", "skip"]
Label = Literal["refuse", "partial", "comply"]
Outcome = Literal["win", "tie", "inconsistent", "unparsable"]
Route = Literal["judge", "audit", "targeted", "dropped", "carried"]
"""Use of a pair. "carried": not a candidate any more, but annotators labeled it after an earlier judging."""
PromptDropReason = Literal["exact_duplicate", "near_duplicate", "evaluation_overlap"]
CompletionDropReason = Literal["empty", "truncated", "incomplete", "tool_call", "duplicate"]
PairDropReason = Literal[
    "unparsable",
    "inconsistent",
    "near_tie",
    "near_tie_after_calibration",
    "low_rating",
    "contradicts_comparisons",
    "another_pair_kept",
    "benign_refusal",
    "harmful_compliance",
    "surplus_refusal",
    "borderline_prompt",
    "unknown_refusal",
    "undecided",
]
"""Reason for which a candidate pair is dropped (tables/pairs.parquet, ``drop_reason``)."""
DatasetDropReason = Literal["dropped", "awaiting_review", "tie", "both_bad", "annotators_disagree"]
"""Reason for which a pair of the table is not in the dataset."""

LabelDropReason = Literal["missing_answer", "dropped_answer", "heldout_prompt", "same_answers"]
"""Reason for which a human label cannot be used."""


def canonical_json(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, no spaces, UTF-8. Equal values give equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def content_key(**determinants: Any) -> str:
    """Return the key of a request or record: 64 hex digits, the sha256 of the canonical JSON of what determines it."""
    return hashlib.sha256(canonical_json(determinants)).hexdigest()


def hash_to_unit_interval(*parts: str | int) -> float:
    """Return a number in [0, 1) that only ``parts`` determine, for seeded choices independent of the order of rows."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates in ``text``, which are valid in JSON escapes and impossible in UTF-8, by U+FFFD."""
    return text if text.isascii() else LONE_SURROGATE.sub("\ufffd", text)


def replace_surrogates_deep(value: Any) -> Any:
    """Apply :func:`replace_surrogates` to every string in ``value``, keys included."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [replace_surrogates_deep(item) for item in value]
    if isinstance(value, dict):
        return {replace_surrogates(str(name)): replace_surrogates_deep(item) for name, item in value.items()}
    return value


class Record(BaseModel):
    """Base of everything that is journaled: unknown names are errors, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


KEY = "sha256 of the canonical JSON of everything that determines the record, as 64 hex digits"
PROMPT_ID = "ID of the prompt"
PROMPT_TOKENS = "Tokens of the request"
COST = "Cost in US dollars"
CREATED_AT = "Time of the record, in seconds since 1970"


class Message(BaseModel):
    """One chat turn. ``content`` is null only if an assistant turn has tool calls instead."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant", "tool"] = Field(description="Author of the turn")
    content: str | None = Field(default=None, description="Text; null in a turn that only calls tools")
    tool_calls: list[dict[str, Any]] | None = Field(default=None, description="Tool calls in OpenAI's format")
    tool_call_id: str | None = Field(default=None, description="ID of the tool call that this turn answers")
    name: str | None = Field(default=None, description="Name of the author or tool")

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
        """Return the message in the format of the chat completions protocol and of TRL."""
        return self.model_dump(exclude_none=True)


class Prompt(Record):
    """A prompt of the run. ``messages`` ends with a turn for the policy to answer (user or tool)."""

    key: str = Field(description=KEY)
    prompt_id: str = Field(description=PROMPT_ID)
    messages: list[Message] = Field(description="Chat turns; the last one is from the user or a tool")
    reference: str | None = Field(default=None, description="Reference answer, for judges that use one")
    checklist: list[str] = Field(default=[], description="Criteria for judges that use them")
    checks: list[dict[str, Any]] = Field(default=[], description="Checks that a program can evaluate")
    tags: list[str] = Field(default=[], description="Tags")
    tools: list[dict[str, Any]] | None = Field(default=None, description="Tools that the policy may call")
    split: Literal["train", "heldout"] = Field(default="train", description="Use of the prompt")
    split_group: str | None = Field(
        default=None,
        description="ID of the first prompt of the near duplicates that this one belongs to, which decides the split "
        "of all of them; null for that first prompt and for a prompt without near duplicates",
    )
    source: str = Field(default="", description="Set, file or dataset that it came from")

    def to_openai(self) -> list[dict[str, Any]]:
        """Return the messages in the format of the chat completions protocol and of TRL."""
        return [message.to_openai() for message in self.messages]


def to_template_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Convert ``turn`` to the form that servers pass to a chat template.

    Fields that are null (as Parquet stores missing ones) are omitted, because some templates test if a field exists.
    The arguments of a tool call are stored as JSON text, while templates expect the value.
    """
    fields = {name: value for name, value in turn.items() if value is not None}
    if fields.get("tool_calls"):
        fields["tool_calls"] = [_to_template_call(call) for call in fields["tool_calls"]]
    return fields


def _to_template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" not in call:  # in some files the call is the function itself
        call = {"type": "function", "function": call}
    function = dict(call["function"] or {})
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(orjson.JSONDecodeError):  # written by a model: invalid JSON stays text
            function["arguments"] = orjson.loads(function["arguments"])
    return {**{name: value for name, value in call.items() if value is not None}, "function": function}


def _prompt_form(value: Any) -> str:
    """Return the form of a prompt that ``value`` is meant to have, so that only errors of that form are reported."""
    return "messages" if isinstance(value, list) else "text"


NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class PromptRow(BaseModel):
    """A row of a prompt file."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)

    prompt: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Message], Tag("messages")], Discriminator(_prompt_form)
    ] = Field(description="Text of the user, or a list of messages")
    id: str | None = Field(default=None, description="ID of the prompt; by default it is derived from the content")
    system: str | None = Field(default=None, description="System prompt")
    reference: str | None = Field(default=None, description="Reference answer, for judges that use one")
    checklist: list[NonEmpty] = Field(default=[], description="Criteria for judges that use them")
    checks: list[dict[str, Any]] = Field(default=[], description="Checks that a program can evaluate")
    tags: list[str] = Field(default=[], description="Tags")
    tools: list[dict[str, Any]] | None = Field(default=None, description="Tools that the policy may call")

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
            raise ValueError(f"the last message is from {last.role!r}; it must be from 'user' or 'tool'")
        if not (last.content or "").strip():
            raise ValueError("the last message is empty")
        if self.system and any(message.role == "system" for message in self.prompt):
            raise ValueError("prompt has a system message, so the field system must not be set")
        return self

    def messages(self) -> list[Message]:
        """Return the prompt as messages, with the system prompt first."""
        turns = [Message(role="user", content=self.prompt)] if isinstance(self.prompt, str) else list(self.prompt)
        return [Message(role="system", content=self.system), *turns] if self.system else turns


class ImportRow(PromptRow):
    """A row of ``generate --import``: a prompt with its answers and the models that wrote them."""

    responses: list[str] = Field(min_length=1, description="Answers")
    models: list[NonEmpty] | None = Field(default=None, description="Model of each answer, in the same order")

    @model_validator(mode="after")
    def _match_models_to_responses(self) -> ImportRow:
        if self.models is not None and len(self.models) != len(self.responses):
            raise ValueError(f"{len(self.responses)} responses but {len(self.models)} models")
        return self


class Completion(Record):
    """An answer to a prompt.

    The protocol reports one sum of tokens for a request with several choices. It is divided here by length, so the
    records of a request add up to it; ``completion_tokens`` is exact for a request with one choice.
    """

    key: str = Field(description=KEY)
    prompt_id: str = Field(description=PROMPT_ID)
    index: int = Field(description="Number of the answer among those of this model to this prompt, from 0")
    model: str = Field(description="Model that wrote it")
    text: str = Field(description="Answer as a reader sees it")
    reasoning: str | None = Field(default=None, description="Reasoning, separated from the text")
    tool_calls: list[dict[str, Any]] | None = Field(default=None, description="Tool calls in OpenAI's format")
    finish_reason: str | None = Field(default=None, description="Reason for the end of the answer, from the server")
    prompt_tokens: int = Field(default=0, description=PROMPT_TOKENS)
    completion_tokens: int = Field(default=0, description="Tokens of the answer")
    cost_usd: float = Field(default=0.0, description=COST)
    source: Literal["sampled", "imported"] = Field(default="sampled", description="Origin of the answer")
    created_at: float = Field(default_factory=time.time, description=CREATED_AT)


class Verdict(Record):
    """One verdict of one judge: on two answers in one order (compare), on one answer and one aspect (rate), or on one
    answer (check, reward, classify).

    Verdicts without a model (checks, the text classifier of refusals) have an empty ``model``.
    """

    key: str = Field(description=KEY)
    kind: Literal["compare", "rate", "check", "reward", "classify"] = Field(description="Kind of the judge")
    judge: str = Field(description="Name of the judge")
    judge_hash: str = Field(description="Hash of the judge's text and settings")
    model: str = Field(description="Model that was asked; empty if none was")
    settings_hash: str = Field(
        default="",
        description="Hash of how the judge was asked (text, model, output mode, decoding); empty without a model",
    )
    prompt_id: str = Field(description=PROMPT_ID)
    a: str = Field(description="Key of the answer, or of the pair's first answer")
    b: str | None = Field(default=None, description="Key of the pair's second answer (compare)")
    order: Order | None = Field(default=None, description="Order in which the two answers were shown (compare)")
    aspect: str | None = Field(default=None, description="Aspect that was rated (rate)")
    sample: int = Field(default=0, description="Number of the sample, from 0")
    prob_a: float | None = Field(
        default=None, ge=0, le=1, description="Probability that `a` is better, whatever the order (compare)"
    )
    score: float | None = Field(
        default=None,
        description="rate: expected rating; check: fraction of the checks that passed; reward: the model's value; "
        "classify: probability of the label",
    )
    variance: float | None = Field(default=None, description="Variance of the rating over the judge's scale (rate)")
    label: Label | None = Field(default=None, description="Label (classify)")
    verdict_mass: float | None = Field(
        default=None,
        description="Probability that the server gave to readable verdicts; null if it returns no probabilities",
    )
    reply: str = Field(default="", description="Reply of the model")
    flags: list[str] = Field(
        default=[],
        description="Anomalies: `addresses_judge`; for a pair `a_addresses_judge` or `b_addresses_judge`",
    )
    prompt_tokens: int = Field(default=0, description=PROMPT_TOKENS)
    cached_tokens: int = Field(default=0, description="Tokens of the request that the server had cached")
    completion_tokens: int = Field(default=0, description="Tokens of the reply")
    cost_usd: float = Field(default=0.0, description=COST)
    created_at: float = Field(default_factory=time.time, description=CREATED_AT)


class Review(Record):
    """One human label of one pair. An adjudicator's label overrides those of the annotators.

    A pair on the route ``gold`` has a known label and tests the annotators. It is not in the table of pairs and never
    enters the dataset.
    """

    key: str = Field(description=KEY)
    pair_id: str = Field(description="ID of the pair")
    prompt_id: str = Field(description=PROMPT_ID)
    annotator: str = Field(description="Name of the annotator")
    role: Literal["annotator", "adjudicator"] = Field(default="annotator", description="Role of the annotator")
    choice: Choice = Field(description="Choice on the page")
    left_side: Side = Field(description="Answer of the pair that was shown on the left")
    preferred: Side | None = Field(description="Preferred answer of the pair; null for tie, both bad and skip")
    comment: str = Field(default="", description="Comment")
    edited_response: str | None = Field(default=None, description="Better answer that the annotator wrote")
    confidence: int | None = Field(default=None, ge=1, le=3, description="Confidence, from 1 (a guess) to 3 (certain)")
    seconds: float | None = Field(default=None, ge=0, description="Time that the pair was shown, in seconds")
    route: Route | Literal["gold"] = Field(description="Reason for the review")
    inclusion_probability: float | None = Field(
        default=None, description="Probability with which the pair entered the review queue"
    )
    created_at: float = Field(default_factory=time.time, description=CREATED_AT)


class Failure(Record):
    """A request without an answer. It is pending again when the run resumes."""

    key: str = Field(description="Key of the record that the request would have produced")
    error: str = Field(description="Reason")
    kind: Literal["endpoint", "unparsable", "check"] = Field(
        description="endpoint: the request failed; unparsable: the reply is not a verdict; check: a check could not run"
    )
    prompt_id: str = Field(default="", description=PROMPT_ID)
    created_at: float = Field(default_factory=time.time, description=CREATED_AT)


def format_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Format a pydantic error: for each problem the dotted field and the message, or the closest known name."""
    lines = []
    for issue in error.errors(include_url=False):
        field_path = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "extra_forbidden":
            candidates = _field_names_at(model, issue["loc"][:-1])
            lines.append(f"unknown key {field_path!r}. {did_you_mean(str(issue['loc'][-1]), candidates)}")
        else:
            message = issue["msg"].removeprefix("Value error, ")
            lines.append(f"{field_path}: {message}" if field_path else message)
    return "; ".join(lines)


def _field_names_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Return the names of the fields that ``model`` has at ``location``."""
    for part in location:
        if part in model.model_fields:  # not a list index or the tag of a union
            model = next(_models_in(model.model_fields[str(part)].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that occur in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
