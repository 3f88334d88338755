"""Requests to judge models and the verdicts that their replies become.

A comparison is asked in both orders, each order a record of its own, one after the other so that the second finds
the rubric and the request in the server's prefix cache; all aspects of a rating likewise. A reward model reads the
conversation with its answer as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from rlaif.config import Config, JudgeEntry
from rlaif.errors import UsageError
from rlaif.judge import read, render
from rlaif.judge.definition import Judge
from rlaif.llm.ask import ask_all
from rlaif.llm.budget import Meter
from rlaif.llm.client import Client
from rlaif.llm.request import Request
from rlaif.llm.wire import CLASSIFY, Reply
from rlaif.records import Label, Order, Verdict, key_of
from rlaif.run.journal import Journal

Fetch = Callable[[int], dict[str, Any]]
"""A record by its byte offset in its journal."""


@dataclass(frozen=True)
class Seat:
    """One member of the panel: a judge file, the model that fills it, and how a verdict is asked of that model.
    ``mode`` is None until the engine has been seen."""

    judge: Judge
    entry: JudgeEntry
    mode: read.Mode | None = None

    @property
    def name(self) -> str:
        return f"{self.judge.name}@{self.entry.model}"

    def vllm(self, config: Config) -> dict[str, Any]:
        """vLLM's settings for this seat's model, where rlaif starts its server."""
        if self.judge.file.kind != "reward":
            return {**config.judge.vllm, **self.entry.vllm}
        # In half precision the scores of two answers differ by less than their rounding.
        ours = {} if self.entry.base_url else {"runner": "pooling", "dtype": "float32"}
        return {**ours, **config.judge.vllm, **self.entry.vllm}


@dataclass(frozen=True, slots=True)
class Material:
    """What is judged, by byte offsets: a prompt and one answer, or two (compare)."""

    prompt: int
    a: int
    b: int | None = None


async def settle_mode(seat: Seat, config: Config, client: Client, engine: str) -> read.Mode:
    """How this seat's model can be asked. A reasoning judge writes before it decides, so its reply is JSON."""
    wanted = config.judge.verdict
    if seat.judge.file.kind == "reward":
        return "score"
    require_verdict(seat, config)
    if seat.judge.file.reasoning == "first":
        return "json"
    if wanted != "auto":
        return wanted
    if engine == "vllm":
        return "choice"
    return "logprobs" if await client.gives_logprobs(read.TOP_LOGPROBS) else "json"


def require_verdict(seat: Seat, config: Config) -> None:
    """Raises :class:`UsageError` where the seat's judge cannot be asked in the way that the settings want."""
    wanted = config.judge.verdict
    if seat.judge.file.reasoning == "first" and wanted not in ("auto", "json"):
        raise UsageError(f"judge {seat.judge.name!r} reasons first, so verdict = {wanted!r} cannot be had",
                         mend="Set verdict to auto or json.")  # fmt: skip


class _AskForJson(Exception):
    """The seat's model thinks before it answers, which only shows when it is asked."""


def ask_seat(
    seat: Seat,
    config: Config,
    work: Callable[[], Iterable[Material]],
    fetch_prompt: Fetch,
    fetch_answer: Fetch,
    open_client: Callable[[], Client],
    journal: Journal,
    meter: Meter,
    settled: Callable[[read.Mode], None],
) -> None:
    """Ask ``seat`` about all of ``work`` and journal its verdicts. ``settled`` is told the mode before any of them."""

    async def prepare(client: Client, engine: str) -> Iterable[Request]:
        mode = seat.mode or await settle_mode(seat, config, client, engine)
        settled(mode)
        return requests(seat, mode, config, work(), fetch_prompt, fetch_answer)

    may_batch = seat.judge.file.kind != "reward"
    try:
        ask_all(open_client, prepare, _verdicts, journal, meter, may_batch=may_batch)
    except _AskForJson:  # what came in with its first token is not kept; nothing was journaled of it
        seat = replace(seat, mode="json")
        ask_all(open_client, prepare, _verdicts, journal, meter, may_batch=may_batch)


def requests(
    seat: Seat, mode: read.Mode, config: Config, work: Iterable[Material], fetch_prompt: Fetch, fetch_answer: Fetch
) -> Iterator[Request]:
    for item in work:
        prompt, a = fetch_prompt(item.prompt), fetch_answer(item.a)
        match seat.judge.file.kind:
            case "compare":
                assert item.b is not None
                yield from _compare(seat, mode, config, prompt, a, fetch_answer(item.b))
            case "rate":
                yield from _rate(seat, mode, config, prompt, a)
            case "classify":
                yield from _classify(seat, mode, config, prompt, a)
            case "reward":
                yield _reward(seat, prompt, a)


@dataclass(frozen=True, slots=True)
class _About:
    """What a reply is read with: everything of the verdict but what the judge said."""

    seat: Seat
    mode: read.Mode
    prompt_id: str
    a: str
    b: str | None
    order: Order | None
    aspect: str | None
    sample: int
    flags: tuple[str, ...]
    may_ask_for_json: bool = False


def _compare(
    seat: Seat, mode: read.Mode, config: Config, prompt: dict[str, Any], a: dict[str, Any], b: dict[str, Any]
) -> Iterator[Request]:
    verdicts = seat.judge.file.verdicts
    assert verdicts is not None
    words = verdicts.words()
    flags = tuple(f"{side} addresses the judge" for side, answer in (("a", a), ("b", b))
                  if render.addresses_judge(answer["text"]))  # fmt: skip
    for sample in range(config.judge.samples if mode == "json" else 1):
        for order in get_args(Order):
            first, second = (a, b) if order == "ab" else (b, a)
            shown = {"response_a": first["text"], "response_b": second["text"]}
            about = _About(seat, mode, prompt["prompt_id"], a["key"], b["key"], order, None, sample, flags)
            yield _request(about, config, prompt, words, shown, {})


def _rate(
    seat: Seat, mode: read.Mode, config: Config, prompt: dict[str, Any], answer: dict[str, Any]
) -> Iterator[Request]:
    scale = seat.judge.file.scale
    words = [str(score) for score in range(scale.low, scale.high + 1)]
    flags = _flags(answer)
    for sample in range(config.judge.samples if mode == "json" else 1):
        for aspect in seat.judge.file.aspects:
            about = _About(seat, mode, prompt["prompt_id"], answer["key"], None, None, aspect.name, sample, flags)
            values = {"aspect": aspect.text.strip(), "low": words[0], "high": words[-1]}
            yield _request(about, config, prompt, words, {"response": answer["text"]}, values)


def _classify(
    seat: Seat, mode: read.Mode, config: Config, prompt: dict[str, Any], answer: dict[str, Any]
) -> Iterator[Request]:
    labels = seat.judge.file.labels
    assert labels is not None
    about = _About(seat, mode, prompt["prompt_id"], answer["key"], None, None, None, 0, _flags(answer))
    yield _request(about, config, prompt, labels.words(), {"response": answer["text"]}, {})


def _reward(seat: Seat, prompt: dict[str, Any], answer: dict[str, Any]) -> Request:
    """The conversation as the policy saw it, and its answer. A system text of the judge goes first."""
    said = render.harmless(answer["text"])
    messages: list[dict[str, Any]] = [*prompt["messages"], {"role": "assistant", "content": said}]
    if seat.judge.system:
        own = [messages.pop(0)["content"]] if messages[0]["role"] == "system" else []
        messages = [{"role": "system", "content": "\n\n".join([seat.judge.system, *own])}, *messages]
    # Without this vLLM gives the sigmoid of the score.
    body = {"messages": messages, "use_activation": False}
    about = _About(seat, "score", prompt["prompt_id"], answer["key"], None, None, None, 0, _flags(answer))
    key = key_of(body=body, model=seat.entry.model, judge=seat.judge.hash, a=answer["key"])
    return Request((key,), body, about.prompt_id, about, CLASSIFY)


def _flags(answer: dict[str, Any]) -> tuple[str, ...]:
    return ("addresses the judge",) if render.addresses_judge(answer["text"]) else ()


def _request(
    about: _About,
    config: Config,
    prompt: dict[str, Any],
    words: Sequence[str],
    shown: dict[str, str],
    values: dict[str, str],
) -> Request:
    judge = about.seat.judge
    reasoning = judge.file.reasoning == "first"
    untrusted = {
        "conversation": render.conversation(prompt["messages"]),
        "reference": prompt.get("reference") or "",
        "checklist": render.checklist(prompt.get("checklist") or []),
        **shown,
    }
    messages = render.fill(judge, {**values, "reply": read.instruction(about.mode, words, reasoning)}, untrusted)
    # A classification is asked once: drawn at random, one word would be the label.
    temperature = 0.0 if config.judge.samples == 1 or judge.file.kind == "classify" else 1.0
    body = {"messages": messages, **read.body(about.mode, words, reasoning, config.judge.max_tokens, temperature)}
    key = key_of(
        body=body,
        model=about.seat.entry.model,
        judge=judge.hash,
        a=about.a,
        b=about.b,
        order=about.order,
        aspect=about.aspect,
        sample=about.sample,
    )
    return Request((key,), body, about.prompt_id, replace(about, may_ask_for_json=config.judge.verdict == "auto"))


def _distribution(about: _About, reply: Reply, words: Sequence[str]) -> tuple[list[float], float | None]:
    try:
        return read.distribution(about.mode, reply.choices[0], words)
    except read.Thinks:
        if about.may_ask_for_json:
            raise _AskForJson from None
        raise


def _verdicts(request: Request, reply: Reply) -> list[Verdict]:
    """Raises :class:`rlaif.llm.request.Unreadable`."""
    about: _About = request.about
    file = about.seat.judge.file
    p_a = score = variance = mass = None
    label: Label | None = None
    if file.kind == "reward":
        score = reply.score
    elif file.kind == "compare":
        assert file.verdicts is not None
        weights, mass = _distribution(about, reply, file.verdicts.words())
        p_first = min(1.0, weights[0] + (weights[2] / 2 if len(weights) == 3 else 0.0))
        p_a = p_first if about.order == "ab" else 1.0 - p_first
    elif file.kind == "classify":
        assert file.labels is not None
        weights, mass = _distribution(about, reply, file.labels.words())
        score, label = max(zip(weights, get_args(Label), strict=True), key=lambda told: told[0])
    else:
        scores = range(file.scale.low, file.scale.high + 1)
        weights, mass = _distribution(about, reply, [str(score) for score in scores])
        score = sum(value * weight for value, weight in zip(scores, weights, strict=True))
        variance = sum(weight * (value - score) ** 2 for value, weight in zip(scores, weights, strict=True))
    return [
        Verdict(
            key=request.keys[0],
            kind=file.kind,
            judge=about.seat.judge.name,
            judge_hash=about.seat.judge.hash,
            model=about.seat.entry.model,
            prompt_id=about.prompt_id,
            a=about.a,
            b=about.b,
            order=about.order,
            aspect=about.aspect,
            sample=about.sample,
            p_a=p_a,
            score=score,
            variance=variance,
            label=label,
            mass=mass,
            reply=reply.choices[0].text if reply.choices else "",
            flags=list(about.flags),
            prompt_tokens=reply.usage.prompt_tokens,
            cached_tokens=reply.usage.cached_tokens,
            completion_tokens=reply.usage.completion_tokens,
            usd=reply.usage.usd,
        )
    ]
