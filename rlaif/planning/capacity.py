"""The resources that a number of prompts needs (tokens, GPU hours, cost, annotator hours, disk) and the bottleneck.

Pure arithmetic over one :class:`Workload`. Its figures were measured in a pilot run, given, or assumed;
:mod:`rlaif.planning.workload` reports the source of each. All results are expected values and grow in proportion to the
prompts, except what each run has once: a process that sends requests and writes journals, and its memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rlaif.planning.run_estimate import DISK_FACTOR, GB, Cost

SECONDS_PER_HOUR, HOURS_PER_DAY = 3600.0, 24.0

# Rates of one process on two cores, measured by the benchmarks named below.
REQUESTS_PER_SECOND = 1_800.0
"""Requests sent over the network, answered and journaled: python -m benchmarks.speed judge 100000 1."""
RECORDS_PER_SECOND = 100_000.0
"""Records journaled, without requests: python -m benchmarks.writer."""
PROMPTS_PER_SECOND = 7_500.0
"""Prompts read, compared with all earlier ones, and journaled: python -m benchmarks.writer."""
PAIRING_SECONDS_PER_PROMPT = 62.4e-6
"""From journals to tables/ and dataset/, per prompt of a run with a million: python -m benchmarks.speed pairs."""
MEMORY_BYTES_PER_PROMPT = 1.05 * 1024**3 / 1e6
"""Memory of one run while pairs are built, per prompt of a run with a million: python -m benchmarks.speed pairs.
Ingesting a million prompts, which keeps each in memory to find near duplicates, needs a little less."""
RECORD_OVERHEAD_BYTES = 420
"""Bytes of a record without its text: keys, model, usage."""
VERDICT_BYTES = 560


@dataclass(frozen=True)
class StageLoad:
    """Average load of one prompt on one stage."""

    requests: float
    prompt_tokens: float
    cached_tokens: float
    """Those of ``prompt_tokens`` that the server has in its prefix cache."""
    completion_tokens: float
    records: float
    cost_usd: float | None = 0.0
    """US dollars at the endpoint's list price; None if that is unknown."""


@dataclass(frozen=True)
class Throughput:
    """Capacity of the servers of one stage: GPUs, or an endpoint (``gpus`` 0)."""

    gpus: int = 1
    tokens_per_second: float | None = None
    """Rate of one GPU under full load. Sampling counts answer tokens; judging counts tokens read, without cached ones,
    and written."""
    requests_per_second: float | None = None
    """Rate limit of an endpoint; None for no limit."""

    def seconds(self, tokens: float, requests: float) -> float:
        """Return the wall-clock seconds with all GPUs busy. An endpoint without a rate limit takes no time."""
        if self.gpus and self.tokens_per_second:
            return tokens / (self.tokens_per_second * self.gpus)
        return requests / self.requests_per_second if self.requests_per_second else 0.0


@dataclass(frozen=True)
class Workload:
    """Everything that a plan depends on. Money is in US dollars."""

    prompts: int
    sampling: StageLoad
    judging: StageLoad
    policy: Throughput
    judge: Throughput
    pairs_per_prompt: float
    """Pairs kept per prompt."""
    bytes_per_prompt: float
    """Bytes of the journals per prompt."""
    human_fraction: float = 0.10
    """Fraction of the pairs for human review."""
    labels_per_pair: float = 1.0
    """Annotators per reviewed pair."""
    max_reviews: int | None = None
    """Upper limit on human labels, whatever ``human_fraction`` is."""
    review_seconds: float = 30.0
    annotators: int = 2
    hours_per_day: float = 2.0
    """Hours per day that each annotator labels."""
    usd_per_annotator_hour: float = 0.0
    usd_per_gpu_hour: float = 0.0
    train_gpus: int = 1
    train_pairs_per_second: float | None = None
    """Rate of one GPU; None omits training from the plan."""
    epochs: float = 1.0
    runs: int = 1
    """Parallel runs, each with a part of the prompts."""
    memory_gb: float = 64.0
    """Memory of the machine that runs rlaif."""
    requests_per_second: float = REQUESTS_PER_SECOND
    """Requests per second that the process of one run sends and journals."""
    records_per_second: float = RECORDS_PER_SECOND
    """Records per second that the process of one run journals."""


StageName = Literal["ingest", "sampling", "judging", "dispatch", "pairing", "human review", "training"]


@dataclass(frozen=True)
class PlanStage:
    """One stage of the plan. ``dispatch``: the process that sends all requests and writes all records."""

    name: StageName
    hours: float
    """Wall-clock hours from start to end."""
    gpu_hours: float = 0.0
    """GPU hours to pay for."""
    cost: Cost = field(default_factory=Cost)
    cached_tokens: float = 0.0
    requests: float = 0.0


@dataclass(frozen=True)
class CapacityPlan:
    """The plan of a :class:`Workload`.

    The ``hours`` of each stage stand alone. Sampling and judging cannot be faster than ``dispatch``, so
    :attr:`machine_hours` counts the longer of the two.
    """

    workload: Workload
    pairs: float
    """Pairs kept."""
    reviews: float
    """Labels by annotators."""
    annotator_hours: float
    records: float
    bytes: float
    memory_bytes: float
    stages: tuple[PlanStage, ...]

    def stage(self, name: StageName) -> PlanStage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def cost(self) -> Cost:
        return sum((stage.cost for stage in self.stages), Cost())

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def machine_hours(self) -> float:
        """Wall-clock hours of all stages without annotators, one after the other, as in ``rlaif run``."""
        hours_by_stage = {stage.name: stage.hours for stage in self.stages if stage.name != "human review"}
        request_hours = max(
            hours_by_stage.pop("sampling") + hours_by_stage.pop("judging"), hours_by_stage.pop("dispatch")
        )
        return request_hours + sum(hours_by_stage.values())

    @property
    def runs_needed(self) -> int:
        """Number of runs into which the prompts must be split so that each fits into memory."""
        total_memory = self.memory_bytes * self.workload.runs
        return max(1, math.ceil(total_memory / (self.workload.memory_gb * GB) - 1e-9))

    def bottlenecks(self) -> list[PlanStage]:
        """Return the stages that take time, the longest first."""
        return sorted((stage for stage in self.stages if stage.hours > 0), key=lambda stage: stage.hours, reverse=True)

    def as_json(self) -> dict[str, Any]:
        """Return all figures for `--json`."""
        fields = asdict(self)
        return fields | {
            "cost": asdict(self.cost),
            "gpu_hours": self.gpu_hours,
            "machine_hours": self.machine_hours,
            "runs_needed": self.runs_needed,
            "bottlenecks": [stage.name for stage in self.bottlenecks()],
        }


def plan_capacity(workload: Workload) -> CapacityPlan:
    """Return the expected figures for ``workload``. Wall-clock hours assume that all GPUs and annotators are always
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


def _request_stage(
    name: StageName, workload: Workload, load: StageLoad, throughput: Throughput, tokens: float
) -> PlanStage:
    """Return the stage of requests to models. ``tokens``: per prompt, as the rate of ``throughput`` counts them."""
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
