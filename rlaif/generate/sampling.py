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

from rlaif.config.models import Config
from rlaif.llm.backends import ModelBackends
from rlaif.llm.chat_protocol import ChatResponse
from rlaif.llm.client import Client
from rlaif.llm.executor import execute_requests
from rlaif.llm.request import Request
from rlaif.llm.usage import Usage, UsageMeter
from rlaif.records import Completion, content_key
from rlaif.run.journal import Journal
from rlaif.run.journal import iter_records as read_journal
from rlaif.run.run import Run


def sample(
    run: Run,
    config: Config,
    backends: ModelBackends,
    usage: UsageMeter,
    *,
    max_prompts: int | None = None,
    prompt_offsets: Container[int] | None = None,
) -> None:
    """Ask for every completion that the run's prompts (the first ``max_prompts`` of them, or those at the byte offsets
    ``prompt_offsets``) owe, one model of the pool after the other."""
    pool = config.policies_resolved()
    with run.journal("completions") as journal:
        for policy_index, policy in enumerate(pool):

            def parse_reply(request: Request, reply: ChatResponse, model: str = policy.model) -> Sequence[Completion]:
                return _to_completions(request, reply, model)

            def open_client(model: str = policy.model, urls: Sequence[str] = tuple(policy.base_url)) -> Client:
                return backends.client_for(model, urls, config.sampler.vllm, usage)

            async def build_requests(
                _client: Client, _engine: str, policy_index: int = policy_index
            ) -> Iterable[Request]:
                return pending_requests(
                    run, config, policy_index, _AnsweredOrFailed(journal), max_prompts, prompt_offsets
                )

            answered = _AnsweredOrFailed(journal)
            # More than one round only where a server gives fewer choices than were asked for.
            while (
                any(pending_requests(run, config, policy_index, answered, max_prompts, prompt_offsets))
                and not usage.stop_reason()
            ):
                answered_before = len(journal.answered_keys)
                execute_requests(open_client, build_requests, parse_reply, journal, usage)
                if len(journal.answered_keys) == answered_before:
                    break
            if usage.stop_reason():
                return


@dataclass(frozen=True)
class _AnsweredOrFailed:
    """The keys that this command need not ask for: answered, or failed in it. The next command asks again."""

    journal: Journal

    def __contains__(self, key: object) -> bool:
        return key in self.journal or (isinstance(key, str) and bytes.fromhex(key) in self.journal.failed_keys)


def pending_requests(
    run: Run,
    config: Config,
    policy_index: int,
    answered_keys: Container[str],
    max_prompts: int | None = None,
    prompt_offsets: Container[int] | None = None,
) -> Iterator[Request]:
    """What is owed by the policy at ``policy_index`` of the pool, prompt by prompt. ``answered_keys``: the keys that
    are not.
    ``max_prompts`` and ``prompt_offsets`` as for :func:`sample`."""
    pool = config.policies_resolved()
    prompts = (
        prompt
        for offset, prompt in read_journal(run.journal_path("prompts"))
        if prompt["split"] == "train" and (prompt_offsets is None or offset in prompt_offsets)
    )
    all_indexes, model = list(range(config.sampler.n)), pool[policy_index].model
    settings = config.sampler.model_dump(include={"temperature", "top_p", "max_tokens"})
    for prompt in itertools.islice(prompts, max_prompts):
        indexes = all_indexes
        if len(pool) > 1:
            indexes = [i for i in all_indexes if _policy_index(prompt["key"], i, len(pool)) == policy_index]
        body: dict[str, Any] = {"messages": prompt["messages"], **settings}  # a journal holds no nulls
        if prompt.get("tools"):
            body["tools"] = prompt["tools"]
        base_seed = _base_seed(config.seed, prompt["key"], model, policy_index)
        keys = [content_key(**body, model=model, seed=base_seed, index=i) for i in indexes]
        # The model's own samples are counted through, so that one request brings them though others lie between.
        pending = [position for position, key in enumerate(keys) if key not in answered_keys]
        for group in _consecutive_runs(pending):
            request_body = dict(body, n=len(group))
            if config.sampler.send_seed:
                request_body["seed"] = base_seed + group[0]
            samples = [(keys[position], indexes[position]) for position in group]
            yield Request(tuple(key for key, _ in samples), request_body, prompt["prompt_id"], samples)


def _policy_index(prompt_key: str, index: int, models: int) -> int:
    """Which model of the pool gives sample ``index``: in turn, beginning at a place fixed by the prompt."""
    return (int(prompt_key[:8], 16) + index) % models


def _base_seed(seed: int, prompt_key: str, model: str, policy_index: int) -> int:
    """The base of a prompt's seeds: another one for each place in the pool, where a model may stand twice."""
    digest = hashlib.sha256(f"{seed}\x1f{prompt_key}\x1f{model}\x1f{policy_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**31 - 1024)


def _consecutive_runs(positions: Iterable[int]) -> Iterator[list[int]]:
    group: list[int] = []
    for position in positions:
        if group and position != group[-1] + 1:
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def _to_completions(request: Request, reply: ChatResponse, model: str) -> list[Completion]:
    """One record a choice. A server that ignores ``n`` gives fewer: the others stay owed and are asked for again."""
    samples = request.context[: len(reply.choices)]
    choices = reply.choices[: len(samples)]
    usages = _split_usage(reply.usage, [len(choice.text) + len(choice.reasoning or "") for choice in choices])
    return [
        Completion(
            key=key,
            prompt_id=request.prompt_id,
            index=index,
            model=model,
            text=choice.text,
            reasoning=choice.reasoning,
            tool_calls=choice.tool_calls,
            finish_reason=choice.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost_usd=usage.cost_usd,
        )
        for (key, index), choice, usage in zip(samples, choices, usages, strict=True)
    ]


def _split_usage(usage: Usage, lengths: Sequence[int]) -> list[Usage]:
    """A request's usage over its choices: prompt and dollars on the first, completion tokens by length, adding up."""
    completion_tokens, total, assigned, cumulative = usage.completion_tokens, sum(lengths) or len(lengths), 0, 0
    parts = []
    for index, length in enumerate(lengths):
        cumulative += length if sum(lengths) else 1
        upto = round(completion_tokens * cumulative / total)
        first = index == 0
        parts.append(Usage(usage.prompt_tokens if first else 0, 0, upto - assigned, usage.cost_usd if first else 0.0))
        assigned = upto
    return parts
