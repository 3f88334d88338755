"""Answers to prompts: ``n`` of each, from one policy or shared out over a pool, every one knowing its model.

A completion's key is made of the messages, the tools, the model, the sampling settings, the seed and the sample's
index; so a larger ``n`` asks only for the further samples. One request brings all the samples of a prompt that are
owed by one model. Its seed is that of its first sample, which is a base fixed by seed, prompt and model plus the
sample's place among that model's: vLLM gives the i-th choice of a request the seed + i, and so a sample asked for again
alone is the sample that it would have been.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.config import Config
from rlaif.llm.ask import ask_all
from rlaif.llm.budget import Meter, Usage
from rlaif.llm.client import Client
from rlaif.llm.engines import Engines
from rlaif.llm.request import Request
from rlaif.llm.wire import Reply
from rlaif.records import Completion, key_of
from rlaif.run.directory import Run
from rlaif.run.journal import Journal
from rlaif.run.journal import read as read_journal


def sample(
    run: Run,
    config: Config,
    engines: Engines,
    meter: Meter,
    *,
    only: int | None = None,
    among: Container[int] | None = None,
) -> None:
    """Ask for every completion that the run's prompts (the first ``only`` of them, or those at the byte offsets
    ``among``) owe, one model of the pool after the other."""
    pool = config.pool()
    with run.journal("completions") as journal:
        for position, policy in enumerate(pool):

            def read(request: Request, reply: Reply, model: str = policy.model) -> Sequence[Completion]:
                return _read(request, reply, model)

            def open_client(model: str = policy.model, urls: Sequence[str] = tuple(policy.base_url)) -> Client:
                return engines.client(model, urls, config.sampler.vllm, meter)

            async def prepare(_client: Client, _engine: str, place: int = position) -> Iterable[Request]:
                return requests(run, config, place, _Settled(journal), only, among)

            settled = _Settled(journal)
            # More than one round only where a server gives fewer choices than were asked for.
            while any(requests(run, config, position, settled, only, among)) and not meter.reason_to_stop():
                before = len(journal.done)
                ask_all(open_client, prepare, read, journal, meter)
                if len(journal.done) == before:
                    break
            if meter.reason_to_stop():
                return


@dataclass(frozen=True)
class _Settled:
    """The keys that this command need not ask for: answered, or failed in it. The next command asks again."""

    journal: Journal

    def __contains__(self, key: object) -> bool:
        return key in self.journal or (isinstance(key, str) and bytes.fromhex(key) in self.journal.failed)


def requests(
    run: Run,
    config: Config,
    position: int,
    done: Container[str],
    only: int | None = None,
    among: Container[int] | None = None,
) -> Iterator[Request]:
    """What is owed by the policy at ``position`` of the pool, prompt by prompt. ``done``: the keys that are not.
    ``only`` and ``among`` as for :func:`sample`."""
    pool = config.pool()
    prompts = (
        prompt
        for offset, prompt in read_journal(run.journal_path("prompts"))
        if prompt["split"] == "train" and (among is None or offset in among)
    )
    every, model = list(range(config.sampler.n)), pool[position].model
    settings = config.sampler.model_dump(include={"temperature", "top_p", "max_tokens"})
    for prompt in itertools.islice(prompts, only):
        indexes = every
        if len(pool) > 1:
            indexes = [i for i in every if _position(prompt["key"], i, len(pool)) == position]
        body: dict[str, Any] = {"messages": prompt["messages"], **settings}  # a journal holds no nulls
        if prompt.get("tools"):
            body["tools"] = prompt["tools"]
        base = _base(config.seed, prompt["key"], model, position)
        keys = [key_of(**body, model=model, seed=base, index=i) for i in indexes]
        # The model's own samples are counted through, so that one request brings them though others lie between.
        owed = [place for place, key in enumerate(keys) if key not in done]
        for group in _consecutive(owed):
            wire = dict(body, n=len(group))
            if config.sampler.send_seed:
                wire["seed"] = base + group[0]
            about = [(keys[place], indexes[place]) for place in group]
            yield Request(tuple(key for key, _ in about), wire, prompt["prompt_id"], about)


def _position(prompt_key: str, index: int, models: int) -> int:
    """Which model of the pool gives sample ``index``: in turn, beginning at a place fixed by the prompt."""
    return (int(prompt_key[:8], 16) + index) % models


def _base(seed: int, prompt_key: str, model: str, position: int) -> int:
    """The base of a prompt's seeds: another one for each place in the pool, where a model may stand twice."""
    digest = hashlib.sha256(f"{seed}\x1f{prompt_key}\x1f{model}\x1f{position}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**31 - 1024)


def _consecutive(places: Iterable[int]) -> Iterator[list[int]]:
    group: list[int] = []
    for place in places:
        if group and place != group[-1] + 1:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _read(request: Request, reply: Reply, model: str) -> list[Completion]:
    """One record a choice. A server that ignores ``n`` gives fewer: the others stay owed and are asked for again."""
    about = request.about[: len(reply.choices)]
    choices = reply.choices[: len(about)]
    shares = _share(reply.usage, [len(choice.text) + len(choice.reasoning or "") for choice in choices])
    return [
        Completion(
            key=key,
            prompt_id=request.prompt_id,
            index=index,
            model=model,
            text=choice.text,
            thinking=choice.reasoning,
            tool_calls=choice.tool_calls,
            finish_reason=choice.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            usd=usage.usd,
        )
        for (key, index), choice, usage in zip(about, choices, shares, strict=True)
    ]


def _share(usage: Usage, lengths: Sequence[int]) -> list[Usage]:
    """A request's usage over its choices: prompt and dollars on the first, completion tokens by length, adding up."""
    whole, total, given, seen = usage.completion_tokens, sum(lengths) or len(lengths), 0, 0
    shares = []
    for place, length in enumerate(lengths):
        seen += length if sum(lengths) else 1
        upto = round(whole * seen / total)
        first = place == 0
        shares.append(Usage(usage.prompt_tokens if first else 0, 0, upto - given, usage.usd if first else 0.0))
        given = upto
    return shares
