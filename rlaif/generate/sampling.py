"""Sample ``n`` completions per prompt, from one policy or divided among a pool of policies.

A completion's key is the hash of the messages, the tools, the model, the sampling settings, the seed and the sample's
index, so a larger ``n`` requests only the additional samples.

One request covers all pending samples of a prompt from one model, unless there are gaps between them. The seed of a
sample is a base, fixed by seed, prompt and model, plus the sample's position among that model's samples. A request
sends the seed of its first sample, and vLLM uses seed + i for choice i. So a sample that is requested alone is the same
as one requested with others.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
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
from rlaif.run.journal import Journal, iter_records
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
    """Request and journal every pending completion, one model of the pool after the other.

    ``max_prompts`` restricts this to the first prompts, ``prompt_offsets`` to the prompts at these byte offsets in the
    journal.
    """
    with run.journal("completions") as journal:
        answered = _AnsweredOrFailed(journal)
        for policy_index in range(len(config.policies_resolved())):
            pending = functools.partial(
                pending_requests, run, config, policy_index, answered, max_prompts, prompt_offsets
            )
            _sample_from_policy(config, policy_index, pending, backends, journal, usage)
            if usage.stop_reason():
                return


def _sample_from_policy(
    config: Config,
    policy_index: int,
    pending: Callable[[], Iterator[Request]],
    backends: ModelBackends,
    journal: Journal,
    usage: UsageMeter,
) -> None:
    """Send the ``pending`` requests to one policy until there are none, or until a round brings no new answer."""
    policy = config.policies_resolved()[policy_index]

    def parse_reply(request: Request, reply: ChatResponse) -> Sequence[Completion]:
        return _to_completions(request, reply, policy.model)

    def open_client() -> Client:
        return backends.client_for(policy.model, policy.base_url, config.sampler.vllm, usage)

    async def build_requests(_client: Client, _engine: str) -> Iterable[Request]:
        return pending()

    # More than one round is needed only if a server returns fewer choices than requested.
    while not usage.stop_reason() and any(pending()):
        answered_before = len(journal.answered_keys)
        execute_requests(open_client, build_requests, parse_reply, journal, usage)
        if len(journal.answered_keys) == answered_before:
            return


@dataclass(frozen=True)
class _AnsweredOrFailed:
    """Keys that this command does not request again: those answered, and those that failed in this command. The next
    command requests the failed ones again."""

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
    """Yield the requests for the samples that are pending from the policy at ``policy_index`` of the pool, prompt by
    prompt. ``answered_keys``: keys of the samples that are not pending. The other arguments as for :func:`sample`.
    """
    pool = config.policies_resolved()
    prompts = (
        prompt
        for offset, prompt in iter_records(run.journal_path("prompts"))
        if prompt["split"] == "train" and (prompt_offsets is None or offset in prompt_offsets)
    )
    all_indexes, model = list(range(config.sampler.n)), pool[policy_index].model
    settings = config.sampler.model_dump(include={"temperature", "top_p", "max_tokens"})
    for prompt in itertools.islice(prompts, max_prompts):
        indexes = all_indexes
        if len(pool) > 1:
            indexes = [i for i in all_indexes if _policy_index(prompt["key"], i, len(pool)) == policy_index]
        body: dict[str, Any] = {"messages": prompt["messages"], **settings}  # the journal omits nulls
        if prompt.get("tools"):
            body["tools"] = prompt["tools"]
        base_seed = _base_seed(config.seed, prompt["key"], model, policy_index)
        keys = [content_key(**body, model=model, seed=base_seed, index=i) for i in indexes]
        # Positions count this model's samples only, so that one request covers them although other models' samples lie
        # between their indexes.
        pending = [position for position, key in enumerate(keys) if key not in answered_keys]
        for group in _consecutive_runs(pending):
            request_body = dict(body, n=len(group))
            if config.sampler.send_seed:
                request_body["seed"] = base_seed + group[0]
            samples = [(keys[position], indexes[position]) for position in group]
            yield Request(tuple(key for key, _ in samples), request_body, prompt["prompt_id"], samples)


def _policy_index(prompt_key: str, index: int, models: int) -> int:
    """Return the index of the policy that gives sample ``index``: in turn, starting at one fixed by the prompt."""
    return (int(prompt_key[:8], 16) + index) % models


def _base_seed(seed: int, prompt_key: str, model: str, policy_index: int) -> int:
    """Return the first seed of a prompt and policy. It differs per policy, because a pool may have a model twice."""
    digest = hashlib.sha256(f"{seed}\x1f{prompt_key}\x1f{model}\x1f{policy_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**31 - 1024)


def _consecutive_runs(positions: Iterable[int]) -> Iterator[list[int]]:
    """Split ascending ``positions`` into groups without gaps."""
    group: list[int] = []
    for position in positions:
        if group and position != group[-1] + 1:
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def _to_completions(request: Request, reply: ChatResponse, model: str) -> list[Completion]:
    """Return one record per choice. If a server ignores ``n`` and returns fewer choices, the other samples stay pending
    and are requested again."""
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
    """Divide the usage of a request among its choices, so that the parts add up to it.

    The first choice gets the prompt tokens and the cost. Completion tokens are divided in proportion to ``lengths``.
    """
    if not lengths:
        return []
    weights = lengths if sum(lengths) else [1] * len(lengths)
    parts, assigned = [], 0
    for cumulative in itertools.accumulate(weights):
        up_to_here = round(usage.completion_tokens * cumulative / sum(weights))
        parts.append(Usage(0, 0, up_to_here - assigned, 0.0))
        assigned = up_to_here
    parts[0] = Usage(usage.prompt_tokens, 0, parts[0].completion_tokens, usage.cost_usd)
    return parts
