"""Requests to judge models and the verdicts that their replies become.

A comparison is asked in both orders, each order a record of its own, one after the other so that the second finds
the rubric and the request in the server's prefix cache; all aspects of a rating likewise. A reward model reads the
conversation with its answer as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from rlaif.config.models import Config, PanelMemberConfig
from rlaif.errors import UsageError
from rlaif.judge import prompt_rendering, reply_parser
from rlaif.judge.judge_file import Judge
from rlaif.llm.chat_protocol import CLASSIFY_PATH, ChatResponse
from rlaif.llm.client import Client
from rlaif.llm.executor import execute_requests
from rlaif.llm.request import Request
from rlaif.llm.usage import UsageMeter
from rlaif.records import Label, Order, Verdict, content_key
from rlaif.run.journal import Journal

RecordLookup = Callable[[int], dict[str, Any]]
"""A record by its byte offset in its journal."""


@dataclass(frozen=True)
class PanelJudge:
    """One member of the panel: a judge file, the model that fills it, and how a verdict is asked of that model.
    ``mode`` is None until the engine has been seen."""

    definition: Judge
    member_config: PanelMemberConfig
    mode: reply_parser.OutputMode | None = None

    @property
    def name(self) -> str:
        return f"{self.definition.name}@{self.member_config.model}"

    def vllm_settings(self, config: Config) -> dict[str, Any]:
        """vLLM's settings for this seat's model, where rlaif starts its server."""
        if self.definition.file.kind != "reward":
            return {**config.judge.vllm, **self.member_config.vllm}
        # In half precision the scores of two answers differ by less than their rounding.
        required = {} if self.member_config.base_url else {"runner": "pooling", "dtype": "float32"}
        return {**required, **config.judge.vllm, **self.member_config.vllm}


@dataclass(frozen=True, slots=True)
class JudgeInput:
    """What is judged, by byte offsets: a prompt and one answer, or two (compare)."""

    prompt: int
    a: int
    b: int | None = None


async def resolve_output_mode(
    judge: PanelJudge, config: Config, client: Client, engine: str
) -> reply_parser.OutputMode:
    """How this seat's model can be asked. A reasoning judge writes before it decides, so its reply is JSON."""
    requested = config.judge.output_mode
    if judge.definition.file.kind == "reward":
        return "score"
    check_output_mode(judge, config)
    if judge.definition.file.reasoning == "first":
        return "json"
    if requested != "auto":
        return requested
    if engine == "vllm":
        return "choice"
    return "logprobs" if await client.supports_logprobs(reply_parser.TOP_LOGPROBS) else "json"


def check_output_mode(judge: PanelJudge, config: Config) -> None:
    """Raises :class:`UsageError` where the seat's judge cannot be asked in the way that the settings want."""
    requested = config.judge.output_mode
    if judge.definition.file.reasoning == "first" and requested not in ("auto", "json"):
        raise UsageError(f"judge {judge.definition.name!r} reasons first, so verdict = {requested!r} cannot be had",
                         hint="Set verdict to auto or json.")  # fmt: skip


class _FallbackToJson(Exception):
    """The seat's model thinks before it answers, which only shows when it is asked."""


def run_judge(
    judge: PanelJudge,
    config: Config,
    inputs: Callable[[], Iterable[JudgeInput]],
    fetch_prompt: RecordLookup,
    fetch_answer: RecordLookup,
    open_client: Callable[[], Client],
    journal: Journal,
    usage: UsageMeter,
    on_mode_resolved: Callable[[reply_parser.OutputMode], None],
) -> None:
    """Ask ``judge`` about all of ``inputs`` and journal its verdicts. ``on_mode_resolved`` is told the mode before any
    of them."""

    async def build_requests(client: Client, engine: str) -> Iterable[Request]:
        mode = judge.mode or await resolve_output_mode(judge, config, client, engine)
        on_mode_resolved(mode)
        return judge_requests(judge, mode, config, inputs(), fetch_prompt, fetch_answer)

    may_batch = judge.definition.file.kind != "reward"
    try:
        execute_requests(open_client, build_requests, _parse_verdicts, journal, usage, allow_batch=may_batch)
    except _FallbackToJson:  # what came in with its first token is not kept; nothing was journaled of it
        judge = replace(judge, mode="json")
        execute_requests(open_client, build_requests, _parse_verdicts, journal, usage, allow_batch=may_batch)


def judge_requests(
    judge: PanelJudge,
    mode: reply_parser.OutputMode,
    config: Config,
    inputs: Iterable[JudgeInput],
    fetch_prompt: RecordLookup,
    fetch_answer: RecordLookup,
) -> Iterator[Request]:
    for item in inputs:
        prompt, a = fetch_prompt(item.prompt), fetch_answer(item.a)
        match judge.definition.file.kind:
            case "compare":
                assert item.b is not None
                yield from _comparison_requests(judge, mode, config, prompt, a, fetch_answer(item.b))
            case "rate":
                yield from _rating_requests(judge, mode, config, prompt, a)
            case "classify":
                yield from _classification_requests(judge, mode, config, prompt, a)
            case "reward":
                yield _reward_request(judge, prompt, a)


def expected_output_mode(panel_judge: PanelJudge, config: Config) -> Any:
    """How the seat's model will be asked, as far as can be told without asking it."""
    if panel_judge.definition.file.kind == "reward":
        return "score"
    if config.judge.output_mode != "auto":
        return config.judge.output_mode
    return (
        "json"
        if panel_judge.definition.file.reasoning == "first"
        else "logprobs"
        if panel_judge.member_config.base_url
        else "choice"
    )


@dataclass(frozen=True, slots=True)
class _VerdictContext:
    """What a reply is read with: everything of the verdict but what the judge said."""

    judge: PanelJudge
    mode: reply_parser.OutputMode
    prompt_id: str
    a: str
    b: str | None
    order: Order | None
    aspect: str | None
    sample: int
    flags: tuple[str, ...]
    may_fall_back_to_json: bool = False


def _comparison_requests(
    judge: PanelJudge,
    mode: reply_parser.OutputMode,
    config: Config,
    prompt: dict[str, Any],
    a: dict[str, Any],
    b: dict[str, Any],
) -> Iterator[Request]:
    verdicts = judge.definition.file.verdicts
    assert verdicts is not None
    words = verdicts.words()
    flags = tuple(f"{side} addresses the judge" for side, answer in (("a", a), ("b", b))
                  if prompt_rendering.addresses_judge(answer["text"]))  # fmt: skip
    for sample in range(config.judge.samples_per_verdict if mode == "json" else 1):
        for order in get_args(Order):
            first, second = (a, b) if order == "ab" else (b, a)
            responses = {"response_a": first["text"], "response_b": second["text"]}
            context = _VerdictContext(judge, mode, prompt["prompt_id"], a["key"], b["key"], order, None, sample, flags)
            yield _build_request(context, config, prompt, words, responses, {})


def _rating_requests(
    judge: PanelJudge, mode: reply_parser.OutputMode, config: Config, prompt: dict[str, Any], answer: dict[str, Any]
) -> Iterator[Request]:
    scale = judge.definition.file.scale
    words = [str(score) for score in range(scale.low, scale.high + 1)]
    flags = _injection_flags(answer)
    for sample in range(config.judge.samples_per_verdict if mode == "json" else 1):
        for aspect in judge.definition.file.aspects:
            context = _VerdictContext(
                judge, mode, prompt["prompt_id"], answer["key"], None, None, aspect.name, sample, flags
            )
            values = {"aspect": aspect.text.strip(), "low": words[0], "high": words[-1]}
            yield _build_request(context, config, prompt, words, {"response": answer["text"]}, values)


def _classification_requests(
    judge: PanelJudge, mode: reply_parser.OutputMode, config: Config, prompt: dict[str, Any], answer: dict[str, Any]
) -> Iterator[Request]:
    labels = judge.definition.file.labels
    assert labels is not None
    context = _VerdictContext(
        judge, mode, prompt["prompt_id"], answer["key"], None, None, None, 0, _injection_flags(answer)
    )
    yield _build_request(context, config, prompt, labels.words(), {"response": answer["text"]}, {})


def _reward_request(judge: PanelJudge, prompt: dict[str, Any], answer: dict[str, Any]) -> Request:
    """The conversation as the policy saw it, and its answer. A system text of the judge goes first."""
    text = prompt_rendering.escape_control_tokens(answer["text"])
    messages: list[dict[str, Any]] = [*prompt["messages"], {"role": "assistant", "content": text}]
    if judge.definition.system:
        prompt_system = [messages.pop(0)["content"]] if messages[0]["role"] == "system" else []
        messages = [{"role": "system", "content": "\n\n".join([judge.definition.system, *prompt_system])}, *messages]
    # Without this vLLM gives the sigmoid of the score.
    body = {"messages": messages, "use_activation": False}
    context = _VerdictContext(
        judge, "score", prompt["prompt_id"], answer["key"], None, None, None, 0, _injection_flags(answer)
    )
    key = content_key(body=body, model=judge.member_config.model, judge=judge.definition.hash, a=answer["key"])
    return Request((key,), body, context.prompt_id, context, CLASSIFY_PATH)


def _injection_flags(answer: dict[str, Any]) -> tuple[str, ...]:
    return ("addresses the judge",) if prompt_rendering.addresses_judge(answer["text"]) else ()


def _build_request(
    context: _VerdictContext,
    config: Config,
    prompt: dict[str, Any],
    words: Sequence[str],
    responses: dict[str, str],
    values: dict[str, str],
) -> Request:
    definition = context.judge.definition
    reasoning = definition.file.reasoning == "first"
    untrusted = {
        "conversation": prompt_rendering.format_conversation(prompt["messages"]),
        "reference": prompt.get("reference") or "",
        "checklist": prompt_rendering.format_checklist(prompt.get("checklist") or []),
        **responses,
    }
    messages = prompt_rendering.build_messages(
        definition, {**values, "reply": reply_parser.reply_instruction(context.mode, words, reasoning)}, untrusted
    )
    # A classification is asked once: drawn at random, one word would be the label.
    temperature = 0.0 if config.judge.samples_per_verdict == 1 or definition.file.kind == "classify" else 1.0
    body = {
        "messages": messages,
        **reply_parser.decoding_params(context.mode, words, reasoning, config.judge.max_tokens, temperature),
    }
    key = content_key(
        body=body,
        model=context.judge.member_config.model,
        judge=definition.hash,
        a=context.a,
        b=context.b,
        order=context.order,
        aspect=context.aspect,
        sample=context.sample,
    )
    return Request(
        (key,), body, context.prompt_id, replace(context, may_fall_back_to_json=config.judge.output_mode == "auto")
    )


def _word_probabilities(
    context: _VerdictContext, reply: ChatResponse, words: Sequence[str]
) -> tuple[list[float], float | None]:
    try:
        return reply_parser.verdict_distribution(context.mode, reply.choices[0], words)
    except reply_parser.ReasoningReplyError:
        if context.may_fall_back_to_json:
            raise _FallbackToJson from None
        raise


def _parse_verdicts(request: Request, reply: ChatResponse) -> list[Verdict]:
    """Raises :class:`rlaif.llm.request.UnparsableReplyError`."""
    context: _VerdictContext = request.context
    file = context.judge.definition.file
    prob_a = score = variance = mass = None
    label: Label | None = None
    if file.kind == "reward":
        score = reply.score
    elif file.kind == "compare":
        assert file.verdicts is not None
        weights, mass = _word_probabilities(context, reply, file.verdicts.words())
        prob_first = min(1.0, weights[0] + (weights[2] / 2 if len(weights) == 3 else 0.0))
        prob_a = prob_first if context.order == "ab" else 1.0 - prob_first
    elif file.kind == "classify":
        assert file.labels is not None
        weights, mass = _word_probabilities(context, reply, file.labels.words())
        score, label = max(zip(weights, get_args(Label), strict=True), key=lambda weighted_label: weighted_label[0])
    else:
        scores = range(file.scale.low, file.scale.high + 1)
        weights, mass = _word_probabilities(context, reply, [str(score) for score in scores])
        score = sum(value * weight for value, weight in zip(scores, weights, strict=True))
        variance = sum(weight * (value - score) ** 2 for value, weight in zip(scores, weights, strict=True))
    return [
        Verdict(
            key=request.keys[0],
            kind=file.kind,
            judge=context.judge.definition.name,
            judge_hash=context.judge.definition.hash,
            model=context.judge.member_config.model,
            prompt_id=context.prompt_id,
            a=context.a,
            b=context.b,
            order=context.order,
            aspect=context.aspect,
            sample=context.sample,
            prob_a=prob_a,
            score=score,
            variance=variance,
            label=label,
            verdict_mass=mass,
            reply=reply.choices[0].text if reply.choices else "",
            flags=list(context.flags),
            prompt_tokens=reply.usage.prompt_tokens,
            cached_tokens=reply.usage.cached_tokens,
            completion_tokens=reply.usage.completion_tokens,
            cost_usd=reply.usage.cost_usd,
        )
    ]
