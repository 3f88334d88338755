"""What a number of prompts takes: tokens, GPU hours, dollars, people's hours, disk, and what gives way first.

Pure arithmetic over one :class:`Workload`, whose figures were measured in a pilot run, given, or assumed
(:mod:`rlaif.planning.workload`, which says of each which it was). Everything is an expected value and grows in
proportion to the prompts, but for what a machine has one of: a process that asks and journals, and its memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rlaif.planning.run_estimate import DISK_FACTOR, GB, Cost

SECONDS_PER_HOUR, HOURS_PER_DAY = 3600.0, 24.0

# What one process takes on two cores, by the benchmarks that are named.
REQUESTS_PER_SECOND = 1_800.0
"""Asked over the network, answered and journaled: python -m benchmarks.speed judge 100000 1."""
RECORDS_PER_SECOND = 100_000.0
"""Journaled alone: python -m benchmarks.writer."""
PROMPTS_PER_SECOND = 7_500.0
"""Read, compared with all before them, journaled: python -m benchmarks.writer."""
PAIRING_SECONDS_PER_PROMPT = 62.4e-6
"""From journals to tables/ and dataset/, for each prompt of a million: python -m benchmarks.speed pairs."""
MEMORY_BYTES_PER_PROMPT = 1.05 * 1024**3 / 1e6
"""Of one run while it is paired, for each prompt of a million: python -m benchmarks.speed pairs. Taking a million in,
which remembers each for its near duplicates, takes a little less."""
RECORD_OVERHEAD_BYTES = 420
"""Bytes of a record besides its text: keys, model, usage."""
VERDICT_BYTES = 560


@dataclass(frozen=True)
class StageLoad:
    """What one prompt asks of one stage, on average. ``cached_tokens``: those of ``prompt_tokens`` that the server has
    in its prefix cache. ``cost_usd``: at an endpoint's list price; None where it has none that is known."""

    requests: float
    prompt_tokens: float
    cached_tokens: float
    completion_tokens: float
    records: float
    cost_usd: float | None = 0.0


@dataclass(frozen=True)
class Throughput:
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
    """What is planned. ``max_reviews``: at most so many labels, whatever the share. ``memory_gb``: of the machine that
    asks and pairs. ``train_pairs_per_second``: of one GPU; None leaves training out of the plan."""

    prompts: int
    sampling: StageLoad
    judging: StageLoad
    policy: Throughput
    judge: Throughput
    pairs_per_prompt: float
    bytes_per_prompt: float
    human_fraction: float = 0.10
    labels_per_pair: float = 1.0
    max_reviews: int | None = None
    review_seconds: float = 30.0
    annotators: int = 2
    hours_per_day: float = 2.0
    usd_per_annotator_hour: float = 0.0
    usd_per_gpu_hour: float = 0.0
    train_gpus: int = 1
    train_pairs_per_second: float | None = None
    epochs: float = 1.0
    runs: int = 1
    memory_gb: float = 64.0
    requests_per_second: float = REQUESTS_PER_SECOND
    records_per_second: float = RECORDS_PER_SECOND


@dataclass(frozen=True)
class PlanStage:
    """One thing that takes time. ``hours``: by the clock, from its begin to its end; ``gpu_hours`` that are paid."""

    name: str
    hours: float
    gpu_hours: float = 0.0
    cost: Cost = field(default_factory=Cost)
    cached_tokens: float = 0.0
    requests: float = 0.0


@dataclass(frozen=True)
class CapacityPlan:
    """``pairs`` are kept, ``reviews`` of them labelled by people. ``hours`` of ``stages`` stand for themselves;
    sampling and judging cannot be faster than ``dispatch``, so :attr:`machine_hours` counts the longer of the two."""

    workload: Workload
    pairs: float
    reviews: float
    annotator_hours: float
    records: float
    bytes: float
    memory_bytes: float
    stages: tuple[PlanStage, ...]

    def stage(self, name: str) -> PlanStage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def cost(self) -> Cost:
        return sum((stage.cost for stage in self.stages), Cost())

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def machine_hours(self) -> float:
        """Of all that needs no person, one after the other, as ``rlaif run`` does it."""
        hours_by_stage = {stage.name: stage.hours for stage in self.stages if stage.name != "human review"}
        request_hours = max(
            hours_by_stage.pop("sampling") + hours_by_stage.pop("judging"), hours_by_stage.pop("dispatch")
        )
        return request_hours + sum(hours_by_stage.values())

    @property
    def runs_needed(self) -> int:
        """Into how many runs the prompts have to be split for one of them to fit into the memory."""
        total_memory = self.memory_bytes * self.workload.runs
        return max(1, math.ceil(total_memory / (self.workload.memory_gb * GB) - 1e-9))

    def bottlenecks(self) -> list[PlanStage]:
        """The parts that take time, the longest first. What is longest is what to mend first."""
        return sorted((stage for stage in self.stages if stage.hours > 0), key=lambda stage: stage.hours, reverse=True)

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return fields | {
            "cost": asdict(self.cost),
            "gpu_hours": self.gpu_hours,
            "machine_hours": self.machine_hours,
            "runs_needed": self.runs_needed,
            "bottlenecks": [stage.name for stage in self.bottlenecks()],
        }


def plan_capacity(workload: Workload) -> CapacityPlan:
    """The expected figures for ``workload``. Hours by the clock assume that whatever there is several of is always
    busy."""
    pairs = workload.prompts * workload.pairs_per_prompt
    reviews = pairs * workload.human_fraction * workload.labels_per_pair
    if workload.max_reviews is not None:
        reviews = min(reviews, workload.max_reviews)
    annotator_hours = reviews * workload.review_seconds / SECONDS_PER_HOUR
    records = workload.prompts * (1 + workload.sampling.records + workload.judging.records)
    return CapacityPlan(
        workload=workload,
        pairs=pairs,
        reviews=reviews,
        annotator_hours=annotator_hours,
        records=records,
        bytes=workload.prompts * workload.bytes_per_prompt * DISK_FACTOR,
        memory_bytes=workload.prompts * MEMORY_BYTES_PER_PROMPT / workload.runs,
        stages=tuple(_stages(workload, pairs, annotator_hours, records)),
    )


def _stages(workload: Workload, pairs: float, annotator_hours: float, records: float) -> Iterator[PlanStage]:
    yield PlanStage("ingest", workload.prompts / PROMPTS_PER_SECOND / workload.runs / SECONDS_PER_HOUR)
    yield _request_stage("sampling", workload, workload.sampling, workload.policy, workload.sampling.completion_tokens)
    uncached_tokens = workload.judging.prompt_tokens - workload.judging.cached_tokens
    yield _request_stage(
        "judging", workload, workload.judging, workload.judge, uncached_tokens + workload.judging.completion_tokens
    )
    requests = workload.prompts * (workload.sampling.requests + workload.judging.requests)
    request_seconds = max(requests / workload.requests_per_second, records / workload.records_per_second)
    yield PlanStage("dispatch", request_seconds / workload.runs / SECONDS_PER_HOUR, requests=requests)
    yield PlanStage("pairing", workload.prompts * PAIRING_SECONDS_PER_PROMPT / workload.runs / SECONDS_PER_HOUR)
    review_usd = annotator_hours * workload.usd_per_annotator_hour
    yield PlanStage(
        "human review",
        annotator_hours / (workload.annotators * workload.hours_per_day) * HOURS_PER_DAY,
        cost=Cost(cost_usd=review_usd),
    )
    if workload.train_pairs_per_second:
        seconds = pairs * workload.epochs / (workload.train_pairs_per_second * workload.train_gpus)
        gpu_hours = seconds * workload.train_gpus / SECONDS_PER_HOUR
        yield PlanStage(
            "training",
            seconds / SECONDS_PER_HOUR,
            gpu_hours,
            Cost(seconds, cost_usd=gpu_hours * workload.usd_per_gpu_hour),
        )


def _request_stage(name: str, workload: Workload, load: StageLoad, throughput: Throughput, tokens: float) -> PlanStage:
    """``tokens``: of one prompt, as the engine's rate counts them."""
    seconds = throughput.seconds(workload.prompts * tokens, workload.prompts * load.requests)
    gpu_hours = seconds * throughput.gpus / SECONDS_PER_HOUR
    usd = gpu_hours * workload.usd_per_gpu_hour + workload.prompts * (load.cost_usd or 0.0)
    cost = Cost(seconds, workload.prompts * load.prompt_tokens, workload.prompts * load.completion_tokens, usd)
    return PlanStage(
        name,
        seconds / SECONDS_PER_HOUR,
        gpu_hours,
        cost,
        workload.prompts * load.cached_tokens,
        workload.prompts * load.requests,
    )
