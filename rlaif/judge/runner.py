"""Ask judge models and turn their replies into verdicts.

A comparison is asked in both orders, and each order is a separate verdict. The second order follows the first, so that
the server finds the rubric and the request in its prefix cache. The same holds for the aspects of a rating. A reward
model reads the conversation with its answer unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from rlaif.config.models import Config, PanelMemberConfig
from rlaif.errors import UsageError
from rlaif.judge import injection, prompt_rendering, reply_parser
from rlaif.judge.judge_file import Judge
from rlaif.llm.backends import ModelBackends
from rlaif.llm.chat_protocol import CLASSIFY_PATH, ChatResponse
from rlaif.llm.client import Client
from rlaif.llm.executor import execute_requests
from rlaif.llm.request import Request
from rlaif.llm.usage import UsageMeter
from rlaif.records import Label, Order, Verdict, content_key
from rlaif.run.journal import Journal, RecordLookup


@dataclass(frozen=True)
class PanelJudge:
    """A judge on the panel: a judge file, its model and settings, and the output mode.

    ``mode`` is None until rlaif knows what the server can do.
    """

    definition: Judge
    member_config: PanelMemberConfig
    mode: reply_parser.OutputMode | None = None

    @property
    def name(self) -> str:
        return f"{self.definition.name}@{self.member_config.model}"

    def vllm_settings(self, config: Config) -> dict[str, Any]:
        """Return the vLLM settings for this judge's model, for a server that rlaif starts."""
        if self.definition.file.kind != "reward":
            return {**config.judge.vllm, **self.member_config.vllm}
        # In half precision, rounding can be larger than the difference between the scores of two answers.
        required = {} if self.member_config.base_url else {"runner": "pooling", "dtype": "float32"}
        return {**required, **config.judge.vllm, **self.member_config.vllm}

    def open_client(self, backends: ModelBackends, config: Config, usage: UsageMeter) -> Client:
        """Return a client for this judge's model. Starts its server if rlaif manages it."""
        return backends.client_for(
            self.member_config.model, self.member_config.base_url, self.vllm_settings(config), usage
        )


@dataclass(frozen=True, slots=True)
class JudgeInput:
    """Byte offsets of a prompt and of the answer to judge, or of the two answers to compare."""

    prompt: int
    a: int
    b: int | None = None


async def resolve_output_mode(
    judge: PanelJudge, config: Config, client: Client, engine: str
) -> reply_parser.OutputMode:
    """Return the output mode for this judge and its server.

    The reply of a judge that reasons before its verdict is JSON. Raises :class:`UsageError` as
    :func:`check_output_mode`.
    """
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
    """Raise :class:`UsageError` if ``judge.output_mode`` does not fit the judge."""
    requested = config.judge.output_mode
    if judge.definition.file.reasoning == "first" and requested not in ("auto", "json"):
        raise UsageError(
            f"judge {judge.definition.name!r} reasons first, which judge.output_mode = {requested!r} does not allow",
            hint='Set judge.output_mode to "auto" or "json".',
        )


class _ReasoningModelError(Exception):
    """The judge's model reasons before it answers, which only its first reply shows. rlaif asks it for JSON instead."""


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
) -> reply_parser.OutputMode | None:
    """Ask ``judge`` about all of ``inputs``, journal its verdicts, and return the output mode used.

    Adds the number of requests to ``usage.total``. If the mode is known from an earlier start (``judge.mode``) and the
    journal has every verdict, no client is opened and the requests count as skipped. ``on_mode_resolved`` is called
    before the first request. Returns None if the run stopped before the mode was known.
    """
    num_requests = requests_per_input(judge) * sum(1 for _ in inputs())
    usage.total = (usage.total or 0) + num_requests
    if judge.mode:
        requests = judge_requests(judge, judge.mode, config, inputs(), fetch_prompt, fetch_answer)
        if all(request.keys[0] in journal for request in requests):
            usage.skipped += num_requests
            return judge.mode
    mode_used: reply_parser.OutputMode | None = None

    async def build_requests(client: Client, engine: str) -> Iterable[Request]:
        nonlocal mode_used
        mode_used = judge.mode or await resolve_output_mode(judge, config, client, engine)
        on_mode_resolved(mode_used)
        return judge_requests(judge, mode_used, config, inputs(), fetch_prompt, fetch_answer)

    may_batch = judge.definition.file.kind != "reward"
    try:
        execute_requests(open_client, build_requests, _parse_verdicts, journal, usage, allow_batch=may_batch)
    except _ReasoningModelError:  # nothing is journaled from its first-token replies
        judge = replace(judge, mode="json")
        execute_requests(open_client, build_requests, _parse_verdicts, journal, usage, allow_batch=may_batch)
    return mode_used


def requests_per_input(judge: PanelJudge) -> int:
    """Return the number of requests about one input: both orders of a comparison, all aspects of a rating."""
    return {"rate": len(judge.definition.file.aspects), "compare": 2}.get(judge.definition.file.kind, 1)


def judge_requests(
    judge: PanelJudge,
    mode: reply_parser.OutputMode,
    config: Config,
    inputs: Iterable[JudgeInput],
    fetch_prompt: RecordLookup,
    fetch_answer: RecordLookup,
) -> Iterator[Request]:
    """Yield the requests about ``inputs``, which are read lazily."""
    asked_as = settings_hash(judge, mode, config)
    for item in inputs:
        prompt, a = fetch_prompt(item.prompt), fetch_answer(item.a)
        b = None if item.b is None else fetch_answer(item.b)
        yield from _requests_about(judge, mode, config, prompt, a, b, asked_as)


def settings_hash(judge: PanelJudge, mode: reply_parser.OutputMode, config: Config) -> str:
    """Return a hash of how ``judge`` is asked: the key of its first request about a fixed example.

    So it covers everything that decides a request besides the texts: the judge's text and settings, its model, the
    output mode, the decoding parameters and how rlaif renders prompts.
    """
    prompt = {
        "prompt_id": "",
        "messages": [{"role": "user", "content": "prompt"}],
        "reference": "reference",
        "checklist": ["item"],
    }
    a, b = ({"key": side, "text": side} for side in ("a", "b"))
    return next(_requests_about(judge, mode, config, prompt, a, b, "")).keys[0]


def num_samples(mode: reply_parser.OutputMode, config: Config) -> int:
    """Return the number of verdicts per question. Modes that read probabilities need only one."""
    return config.judge.samples_per_verdict if mode == "json" else 1


def _requests_about(
    judge: PanelJudge,
    mode: reply_parser.OutputMode,
    config: Config,
    prompt: dict[str, Any],
    a: dict[str, Any],
    b: dict[str, Any] | None,
    asked_as: str,
) -> Iterator[Request]:
    context = _VerdictContext(judge, mode, prompt["prompt_id"], a["key"], (), asked_as)
    match judge.definition.file.kind:
        case "compare":
            assert b is not None
            yield from _comparison_requests(context, config, prompt, a, b)
        case "rate":
            yield from _rating_requests(context, config, prompt, a)
        case "classify":
            yield from _classification_requests(context, config, prompt, a)
        case "reward":
            yield _reward_request(context, prompt, a)


def expected_output_mode(panel_judge: PanelJudge, config: Config) -> reply_parser.OutputMode:
    """Return the output mode that :func:`resolve_output_mode` is likely to choose, without asking the server."""
    if panel_judge.definition.file.kind == "reward":
        return "score"
    if config.judge.output_mode != "auto":
        return config.judge.output_mode
    if panel_judge.definition.file.reasoning == "first":
        return "json"
    return "logprobs" if panel_judge.member_config.base_url else "choice"


@dataclass(frozen=True, slots=True)
class _VerdictContext:
    """The fields of a verdict that are known before the reply."""

    judge: PanelJudge
    mode: reply_parser.OutputMode
    prompt_id: str
    a: str
    flags: tuple[str, ...]
    settings_hash: str
    b: str | None = None
    order: Order | None = None
    aspect: str | None = None
    sample: int = 0
    may_fall_back_to_json: bool = False


def _comparison_requests(
    context: _VerdictContext, config: Config, prompt: dict[str, Any], a: dict[str, Any], b: dict[str, Any]
) -> Iterator[Request]:
    verdicts = context.judge.definition.file.verdicts
    assert verdicts is not None
    words = verdicts.words()
    flags = tuple(f"{side}_{flag}" for side, answer in (("a", a), ("b", b)) for flag in _injection_flags(answer))
    context = replace(context, flags=flags, b=b["key"])
    for sample in range(num_samples(context.mode, config)):
        for order in get_args(Order):
            first, second = (a, b) if order == "ab" else (b, a)
            responses = {"response_a": first["text"], "response_b": second["text"]}
            yield _build_request(replace(context, order=order, sample=sample), config, prompt, words, responses, {})


def _rating_requests(
    context: _VerdictContext, config: Config, prompt: dict[str, Any], answer: dict[str, Any]
) -> Iterator[Request]:
    file = context.judge.definition.file
    words = [str(score) for score in range(file.scale.low, file.scale.high + 1)]
    responses = {"response": answer["text"]}
    context = replace(context, flags=_injection_flags(answer))
    for sample in range(num_samples(context.mode, config)):
        for aspect in file.aspects:
            values = {"aspect": aspect.text.strip(), "low": words[0], "high": words[-1]}
            aspect_context = replace(context, aspect=aspect.name, sample=sample)
            yield _build_request(aspect_context, config, prompt, words, responses, values)


def _classification_requests(
    context: _VerdictContext, config: Config, prompt: dict[str, Any], answer: dict[str, Any]
) -> Iterator[Request]:
    labels = context.judge.definition.file.labels
    assert labels is not None
    context = replace(context, flags=_injection_flags(answer))
    yield _build_request(context, config, prompt, labels.words(), {"response": answer["text"]}, {})


def _reward_request(context: _VerdictContext, prompt: dict[str, Any], answer: dict[str, Any]) -> Request:
    """Build the request from the conversation as the policy saw it and its answer. A system text of the judge precedes
    the prompt's."""
    judge = context.judge
    text = prompt_rendering.escape_control_tokens(answer["text"])
    messages: list[dict[str, Any]] = [*prompt["messages"], {"role": "assistant", "content": text}]
    if judge.definition.system:
        prompt_system = [messages.pop(0)["content"]] if messages[0]["role"] == "system" else []
        messages = [{"role": "system", "content": "\n\n".join([judge.definition.system, *prompt_system])}, *messages]
    # Without use_activation = false, vLLM returns the sigmoid of the score.
    body = {"messages": messages, "use_activation": False}
    context = replace(context, mode="score", flags=_injection_flags(answer))
    key = content_key(body=body, model=judge.member_config.model, judge=judge.definition.hash, a=answer["key"])
    return Request((key,), body, context.prompt_id, context, CLASSIFY_PATH)


def _injection_flags(answer: dict[str, Any]) -> tuple[str, ...]:
    return ("addresses_judge",) if injection.addresses_judge(answer["text"]) else ()


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
    values = {**values, "reply": reply_parser.reply_instruction(context.mode, words, reasoning)}
    messages = prompt_rendering.build_messages(definition, values, untrusted)
    # A classification is asked once, so a word sampled at random would become the label.
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
    context = replace(context, may_fall_back_to_json=config.judge.output_mode == "auto")
    return Request((key,), body, context.prompt_id, context)


def _word_probabilities(
    context: _VerdictContext, reply: ChatResponse, words: Sequence[str]
) -> tuple[list[float], float | None]:
    try:
        return reply_parser.verdict_distribution(context.mode, reply.choices[0], words)
    except reply_parser.ReasoningReplyError:
        if context.may_fall_back_to_json:
            raise _ReasoningModelError from None
        raise


def _parse_verdicts(request: Request, reply: ChatResponse) -> list[Verdict]:
    """Turn a reply into one verdict. Raises :class:`rlaif.llm.request.UnparsableReplyError`."""
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
            settings_hash=context.settings_hash,
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
