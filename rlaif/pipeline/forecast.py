"""What a number of prompts takes: tokens, GPU hours, dollars, people's hours, disk, and what gives way first.

Pure arithmetic over one :class:`Workload`, whose figures were measured in a pilot run, given, or assumed
(:mod:`rlaif.pipeline.workload`, which says of each which it was). Everything is an expected value and grows in
proportion to the prompts, but for what a machine has one of: a process that asks and journals, and its memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rlaif.pipeline.outlook import FOR_TABLES, GB, Cost

HOUR, DAY = 3600.0, 24.0

# What one process takes on two cores, by the benchmarks that are named.
REQUESTS_PER_SECOND = 1_800.0
"""Asked over the network, answered and journaled: python -m benchmarks.speed judge 100000 1."""
RECORDS_PER_SECOND = 100_000.0
"""Journaled alone: python -m benchmarks.writer."""
PROMPTS_PER_SECOND = 7_500.0
"""Read, compared with all before them, journaled: python -m benchmarks.writer."""
PAIRING_SECONDS = 62.4e-6
"""From journals to tables/ and dataset/, for each prompt of a million: python -m benchmarks.speed pairs."""
MEMORY_BYTES = 1.05 * 1024**3 / 1e6
"""Of one run while it is paired, for each prompt of a million: python -m benchmarks.speed pairs. Taking a million in,
which remembers each for its near duplicates, takes a little less."""
AROUND_A_TEXT = 420
"""Bytes of a record besides its text: keys, model, usage."""
VERDICT_BYTES = 560


@dataclass(frozen=True)
class Load:
    """What one prompt asks of one stage, on average. ``cached_tokens``: those of ``prompt_tokens`` that the server has
    in its prefix cache. ``usd``: at an endpoint's list price; None where it has none that is known."""

    requests: float
    prompt_tokens: float
    cached_tokens: float
    completion_tokens: float
    records: float
    usd: float | None = 0.0


@dataclass(frozen=True)
class Engine:
    """What answers a stage's requests: GPUs at so many tokens a second each under full load (of answers for sampling;
    read without the cache, and written, for judging), or an endpoint (``gpus`` 0) that takes so many requests."""

    gpus: int = 1
    tokens_per_second: float | None = None
    requests_per_second: float | None = None

    def seconds(self, tokens: float, requests: float) -> float:
        """By the clock, all GPUs busy. An endpoint without a limit takes no time of its own."""
        if self.gpus and self.tokens_per_second:
            return tokens / (self.tokens_per_second * self.gpus)
        return requests / self.requests_per_second if self.requests_per_second else 0.0


@dataclass(frozen=True)
class Workload:
    """What is planned. ``reviews``: at most so many labels, whatever the share. ``memory_gb``: of the machine that asks
    and pairs. ``train_pairs_per_second``: of one GPU; None leaves training out of the plan."""

    prompts: int
    sampling: Load
    judging: Load
    policy: Engine
    judge: Engine
    kept: float
    bytes_per_prompt: float
    human_share: float = 0.10
    labels_a_pair: float = 1.0
    reviews: int | None = None
    seconds_a_review: float = 30.0
    people: int = 2
    hours_a_day: float = 2.0
    usd_per_person_hour: float = 0.0
    usd_per_gpu_hour: float = 0.0
    train_gpus: int = 1
    train_pairs_per_second: float | None = None
    epochs: float = 1.0
    runs: int = 1
    memory_gb: float = 64.0
    requests_per_second: float = REQUESTS_PER_SECOND
    records_per_second: float = RECORDS_PER_SECOND


@dataclass(frozen=True)
class Part:
    """One thing that takes time. ``hours``: by the clock, from its begin to its end; ``gpu_hours`` that are paid."""

    name: str
    hours: float
    gpu_hours: float = 0.0
    cost: Cost = field(default_factory=Cost)
    cached_tokens: float = 0.0
    requests: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """``pairs`` are kept, ``reviews`` of them labelled by people. ``hours`` of ``parts`` stand for themselves; sampling
    and judging cannot be faster than ``asking``, so :attr:`machine_hours` counts the longer of the two."""

    workload: Workload
    pairs: float
    reviews: float
    people_hours: float
    records: float
    bytes: float
    memory_bytes: float
    parts: tuple[Part, ...]

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    @property
    def cost(self) -> Cost:
        return sum((part.cost for part in self.parts), Cost())

    @property
    def gpu_hours(self) -> float:
        return sum(part.gpu_hours for part in self.parts)

    @property
    def machine_hours(self) -> float:
        """Of all that needs no person, one after the other, as ``rlaif run`` does it."""
        alone = {part.name: part.hours for part in self.parts if part.name != "people"}
        asked = max(alone.pop("sampling") + alone.pop("judging"), alone.pop("asking"))
        return asked + sum(alone.values())

    @property
    def runs_needed(self) -> int:
        """Into how many runs the prompts have to be split for one of them to fit into the memory."""
        whole = self.memory_bytes * self.workload.runs
        return max(1, math.ceil(whole / (self.workload.memory_gb * GB) - 1e-9))

    def bottlenecks(self) -> list[Part]:
        """The parts that take time, the longest first. What is longest is what to mend first."""
        return sorted((part for part in self.parts if part.hours > 0), key=lambda part: part.hours, reverse=True)

    def as_json(self) -> dict[str, Any]:
        told = asdict(self)
        return told | {
            "cost": asdict(self.cost),
            "gpu_hours": self.gpu_hours,
            "machine_hours": self.machine_hours,
            "runs_needed": self.runs_needed,
            "bottlenecks": [part.name for part in self.bottlenecks()],
        }


def forecast(work: Workload) -> Forecast:
    """The expected figures for ``work``. Hours by the clock assume that whatever there is several of is always busy."""
    pairs = work.prompts * work.kept
    reviews = pairs * work.human_share * work.labels_a_pair
    if work.reviews is not None:
        reviews = min(reviews, work.reviews)
    people_hours = reviews * work.seconds_a_review / HOUR
    records = work.prompts * (1 + work.sampling.records + work.judging.records)
    return Forecast(
        workload=work,
        pairs=pairs,
        reviews=reviews,
        people_hours=people_hours,
        records=records,
        bytes=work.prompts * work.bytes_per_prompt * FOR_TABLES,
        memory_bytes=work.prompts * MEMORY_BYTES / work.runs,
        parts=tuple(_parts(work, pairs, people_hours, records)),
    )


def _parts(work: Workload, pairs: float, people_hours: float, records: float) -> Iterator[Part]:
    yield Part("taking in", work.prompts / PROMPTS_PER_SECOND / work.runs / HOUR)
    yield _asked("sampling", work, work.sampling, work.policy, work.sampling.completion_tokens)
    read = work.judging.prompt_tokens - work.judging.cached_tokens
    yield _asked("judging", work, work.judging, work.judge, read + work.judging.completion_tokens)
    requests = work.prompts * (work.sampling.requests + work.judging.requests)
    slower = max(requests / work.requests_per_second, records / work.records_per_second)
    yield Part("asking", slower / work.runs / HOUR, requests=requests)
    yield Part("pairing", work.prompts * PAIRING_SECONDS / work.runs / HOUR)
    usd = people_hours * work.usd_per_person_hour
    yield Part("people", people_hours / (work.people * work.hours_a_day) * DAY, cost=Cost(usd=usd))
    if work.train_pairs_per_second:
        seconds = pairs * work.epochs / (work.train_pairs_per_second * work.train_gpus)
        gpu_hours = seconds * work.train_gpus / HOUR
        yield Part("training", seconds / HOUR, gpu_hours, Cost(seconds, usd=gpu_hours * work.usd_per_gpu_hour))


def _asked(name: str, work: Workload, load: Load, engine: Engine, tokens: float) -> Part:
    """``tokens``: of one prompt, as the engine's rate counts them."""
    seconds = engine.seconds(work.prompts * tokens, work.prompts * load.requests)
    gpu_hours = seconds * engine.gpus / HOUR
    usd = gpu_hours * work.usd_per_gpu_hour + work.prompts * (load.usd or 0.0)
    cost = Cost(seconds, work.prompts * load.prompt_tokens, work.prompts * load.completion_tokens, usd)
    return Part(name, seconds / HOUR, gpu_hours, cost, work.prompts * load.cached_tokens, work.prompts * load.requests)
