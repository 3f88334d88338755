"""Requests to judge models and the verdicts that their replies become, for the kinds compare and rate.

A comparison is asked in both orders, each order a record of its own, one after the other so that the second finds
the rubric and the request in the server's prefix cache; all aspects of a rating likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rlaif.config import Config, JudgeEntry
from rlaif.errors import UsageError
from rlaif.judge import read, render
from rlaif.judge.definition import Judge
from rlaif.llm.ask import Request, ask_all
from rlaif.llm.budget import Meter
from rlaif.llm.client import Client
from rlaif.llm.wire import Reply
from rlaif.records import Order, Verdict, key_of
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


@dataclass(frozen=True, slots=True)
class Material:
    """What is judged, by byte offsets: a prompt and one answer (rate) or two (compare)."""

    prompt: int
    a: int
    b: int | None = None


async def settle_mode(seat: Seat, config: Config, client: Client, engine: str) -> read.Mode:
    """How this seat's model can be asked. A reasoning judge writes before it decides, so its reply is JSON."""
    wanted = config.judge.verdict
    if seat.judge.file.reasoning == "first":
        if wanted not in ("auto", "json"):
            raise UsageError(f"judge {seat.judge.name!r} reasons first, so verdict = {wanted!r} cannot be had",
                             mend="Set verdict to auto or json.")  # fmt: skip
        return "json"
    if wanted != "auto":
        return wanted
    if engine == "vllm":
        return "choice"
    return "logprobs" if await client.gives_logprobs(read.TOP_LOGPROBS) else "json"


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

    ask_all(open_client, prepare, _verdicts, journal, meter)


def requests(
    seat: Seat, mode: read.Mode, config: Config, work: Iterable[Material], fetch_prompt: Fetch, fetch_answer: Fetch
) -> Iterator[Request]:
    for item in work:
        prompt, a = fetch_prompt(item.prompt), fetch_answer(item.a)
        if item.b is None:
            yield from _rate(seat, mode, config, prompt, a)
        else:
            yield from _compare(seat, mode, config, prompt, a, fetch_answer(item.b))


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
    flags = ("addresses the judge",) if render.addresses_judge(answer["text"]) else ()
    for sample in range(config.judge.samples if mode == "json" else 1):
        for aspect in seat.judge.file.aspects:
            about = _About(seat, mode, prompt["prompt_id"], answer["key"], None, None, aspect.name, sample, flags)
            values = {"aspect": aspect.text.strip(), "low": words[0], "high": words[-1]}
            yield _request(about, config, prompt, words, {"response": answer["text"]}, values)


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
        **shown,
    }
    messages = render.fill(judge, {**values, "reply": read.instruction(about.mode, words, reasoning)}, untrusted)
    temperature = 0.0 if config.judge.samples == 1 else 1.0
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
    return Request((key,), body, about.prompt_id, about)


def _verdicts(request: Request, reply: Reply) -> list[Verdict]:
    """Raises :class:`rlaif.llm.ask.Unreadable`."""
    about: _About = request.about
    file = about.seat.judge.file
    choice = reply.choices[0]
    p_a = score = variance = None
    if file.kind == "compare":
        assert file.verdicts is not None
        weights, mass = read.distribution(about.mode, choice, file.verdicts.words())
        p_first = min(1.0, weights[0] + (weights[2] / 2 if len(weights) == 3 else 0.0))
        p_a = p_first if about.order == "ab" else 1.0 - p_first
    else:
        scores = range(file.scale.low, file.scale.high + 1)
        weights, mass = read.distribution(about.mode, choice, [str(score) for score in scores])
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
            mass=mass,
            reply=choice.text,
            flags=list(about.flags),
            prompt_tokens=reply.usage.prompt_tokens,
            cached_tokens=reply.usage.cached_tokens,
            completion_tokens=reply.usage.completion_tokens,
            usd=reply.usage.usd,
        )
    ]
