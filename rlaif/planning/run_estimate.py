"""The estimate of ``rlaif run`` before its main part starts, and the shares of time and money that follow from it.

The estimate scales up a pilot: the first prompts go through generate and judge. Time is the number of requests x the
mean wait for one / the number in flight (Little 1961). So a pilot that is too small to keep the server busy for long
still gives the rate of a busy one. Server starts are added as they were measured.
"""

from __future__ import annotations

import datetime
import itertools
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.config.fields import parse_duration_s
from rlaif.config.models import RunConfig
from rlaif.errors import RlaifError
from rlaif.evaluate import trained_model
from rlaif.format import format_count, format_duration
from rlaif.report import run_status
from rlaif.run.journal import iter_records
from rlaif.run.run import JournalName, Run

GB = 1e9
DISK_FACTOR = 2.5
"""Final bytes on disk per byte of journal: the journals, tables/ and dataset/."""


def seconds_to_deadline(config: RunConfig, now: datetime.datetime | None = None) -> float | None:
    """Return the seconds from now to the deadline, or None. ``until`` is the next such time of the local clock."""
    now = now or datetime.datetime.now()
    bounds = []
    if config.until:
        hour, minute = map(int, config.until.split(":"))
        end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        if end <= now:
            end += datetime.timedelta(days=1)
        bounds.append(end.timestamp() - now.timestamp())  # timestamps stay correct across a clock change
    if config.max_duration:
        bounds.append(parse_duration_s(config.max_duration))
    return min(bounds, default=None)


@dataclass(frozen=True)
class Cost:
    """Time, tokens and US dollars of one stage or of several."""

    seconds: float = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    cost_usd: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.prompt_tokens + other.prompt_tokens,
                    self.completion_tokens + other.completion_tokens, self.cost_usd + other.cost_usd)  # fmt: skip


@dataclass(frozen=True)
class RunEstimate:
    """Cost of the pending work, per stage, at the pilot's rates."""

    prompts: int
    """Number of prompts to answer and judge, the pilot's included."""
    generate: Cost
    judge: Cost
    disk_bytes: float
    """Bytes on disk that the run will need in addition."""
    evaluate: Cost = Cost()
    judged_prompts: float = 0.0
    """Number of prompts that are already judged."""

    @property
    def to_share(self) -> Cost:
        """Cost of the stages that share time and money if not all fits. The evaluation is small and keeps its part."""
        return self.generate + self.judge

    @property
    def total(self) -> Cost:
        return self.to_share + self.evaluate

    def fraction_that_fits(self, available_s: float | None, budget_usd: float | None, train_fraction: float) -> float:
        """Return the fraction of the pending work that fits; 1.0 or more if all does.

        ``available_s``: seconds to the deadline. ``train_fraction``: the part of them that is kept for training. None
        means no limit.
        """
        fractions = []
        if available_s is not None and self.to_share.seconds > 0:
            fractions.append(
                max(0.0, available_s - self.evaluate.seconds) * (1.0 - train_fraction) / self.to_share.seconds
            )
        if budget_usd is not None and self.to_share.cost_usd > 0:
            fractions.append(max(0.0, budget_usd - self.evaluate.cost_usd) / self.to_share.cost_usd)
        return min(fractions, default=float("inf"))

    def generate_limits(
        self, seconds: float | None, budget_usd: float | None
    ) -> tuple[float | None, float | None, int | None]:
        """Return the share of ``seconds`` and ``budget_usd`` for ``generate``, so that its answers can be judged too.

        The shares are proportional to the pending work. If answers are free, the number of prompts is limited instead:
        the third value is the number of prompts to answer, in journal order; None for all.
        """
        max_prompts = None
        if seconds is not None and self.generate.seconds:
            seconds *= self.generate.seconds / self.to_share.seconds
        if budget_usd is not None and self.generate.cost_usd:
            budget_usd *= self.generate.cost_usd / self.to_share.cost_usd
        elif budget_usd is not None and budget_usd < self.judge.cost_usd:
            max_prompts = int(
                self.judged_prompts + (self.prompts - self.judged_prompts) * budget_usd / self.judge.cost_usd
            )
        return seconds, budget_usd, max_prompts

    def describe(self, available_s: float | None, budget_usd: float | None, train_fraction: float) -> list[str]:
        """Return the estimate as log lines: the estimate, and whether it fits the limits. Arguments as for
        :meth:`fraction_that_fits`."""
        total = self.total
        by_stage = f"generate {format_duration(self.generate.seconds)}, judge {format_duration(self.judge.seconds)}"
        if self.evaluate.seconds:
            by_stage += f", evaluate {format_duration(self.evaluate.seconds)}"
        end = datetime.datetime.now() + datetime.timedelta(seconds=total.seconds)
        cost = f"${total.cost_usd:,.2f}" if total.cost_usd else "no cost"
        estimate = (
            f"estimate for {self.prompts:,} prompts: about {format_duration(total.seconds)} more ({by_stage}), until "
            f"about {end:%a %H:%M}; {format_count(total.prompt_tokens)} + {format_count(total.completion_tokens)} "
            f"tokens, {cost}, {self.disk_bytes / GB:,.1f} GB of disk"
        )
        limits = []
        if available_s is not None:
            reserved = f" ({train_fraction:.0%} of it reserved for training)" if train_fraction else ""
            limits.append(f"{format_duration(available_s)} to the deadline{reserved}")
        if budget_usd is not None:
            limits.append(f"${budget_usd:,.2f} left of the budget")
        if not limits:
            return [estimate]
        fraction = self.fraction_that_fits(available_s, budget_usd, train_fraction)
        if fraction >= 1.0:
            return [estimate, f"it fits: {' and '.join(limits)}"]
        shortfall = (
            f"it does not fit: {' and '.join(limits)}. The stages share them, enough for about {fraction:.0%} of the "
            "pending prompts; rerun the same command later to resume"
        )
        return [estimate, shortfall]


USAGE_FIELDS = (
    "requests",
    "answers",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "cost_usd",
    "request_wait_s",
    "request_wall_s",
)


def pilot_facts(run: Run, prompts: int, record_counts: Mapping[str, int]) -> dict[str, Any]:
    """Return what the first ``prompts`` took, per stage, in the form that the manifest stores.

    ``record_counts``: the number of records per stage. A killed start leaves records without their usage; they count
    like those of the other starts.
    """
    facts: dict[str, Any] = {"prompts": prompts, "bytes": journal_bytes(run)}
    for stage, record_count in record_counts.items():
        starts = [start for start in run.manifest()["stages"][stage].get("history", []) if start.get("answers")]
        totals = {name: sum(start.get(name, 0) for start in starts) for name in USAGE_FIELDS}
        scale = record_count / totals["answers"] if starts else 0.0
        facts[stage] = {name: value * scale for name, value in totals.items()}
        startup_s = starts[-1]["seconds"] - starts[-1]["request_wall_s"] if starts else 0.0  # one server start
        facts[stage]["seconds"] = facts[stage]["request_wall_s"] + startup_s
    return facts


def model_record_counts(run: Run) -> dict[str, int]:
    """Return the number of records from models, per stage. Imported and rule-based records cost nothing and do not
    count."""
    return {"generate": _count_model_records(run, "completions"), "judge": _count_model_records(run, "verdicts")}


def _count_model_records(run: Run, name: JournalName) -> int:
    records = (record for _, record in iter_records(run.journal_path(name)) if "error" not in record)
    return len({record["key"] for record in records if record.get("model") and record.get("source") != "imported"})


def journal_rows_for(run: Run, prompts: int) -> int:
    """Return the number of journal rows that hold the first ``prompts`` training prompts; held-out ones lie between."""
    positions = (position for position, (_, record) in enumerate(iter_records(run.journal_path("prompts")), 1)
              if record["split"] == "train")  # fmt: skip
    return next(itertools.islice(positions, prompts - 1, None), prompts)


def journal_bytes(run: Run) -> int:
    """Return the bytes of the journals of answers and verdicts."""
    return sum(run.journal_path(name).stat().st_size for name in ("completions", "verdicts")
               if run.journal_path(name).exists())  # fmt: skip


def request_seconds(facts: Mapping[str, Any], concurrency: float, scale: float = 1.0) -> float:
    """Return the seconds for ``scale`` times the requests of ``facts`` (:meth:`UsageMeter.summary`), with
    ``concurrency`` of them in flight."""
    return float(facts["request_wait_s"] * scale / min(concurrency, max(1.0, facts["requests"] * scale)))


def estimate_remaining(
    pilot: Mapping[str, Any], prompts: int, existing: Mapping[str, int], concurrency: int, *, comparisons: int = 0
) -> RunEstimate:
    """Scale ``pilot`` (:func:`pilot_facts`) to ``prompts`` and subtract ``existing`` (:func:`model_record_counts`).

    ``comparisons``: the number of prompts on which the evaluation compares two models. Each model answers them once,
    and the judges are assumed to need as many requests per prompt as when they label.
    """
    scale = prompts / max(1, pilot["prompts"])
    costs = {}
    remaining_fraction = judged_prompts = 0.0
    evaluate = Cost()
    for stage in ("generate", "judge"):
        facts = pilot[stage]
        expected = facts["answers"] * scale
        pending = max(0.0, expected - existing[stage])
        costs[stage] = _stage_cost(facts, pending, concurrency)
        answers_per_prompt = 2 if stage == "generate" else facts["answers"] / max(1, pilot["prompts"])
        evaluate += _stage_cost(facts, comparisons * answers_per_prompt, concurrency)
        judged_prompts = prompts * (1.0 - pending / expected if expected else 1.0)  # the last stage counts
        remaining_fraction = max(remaining_fraction, pending / expected if expected else 0.0)
    disk_bytes = pilot["bytes"] * scale * remaining_fraction * DISK_FACTOR
    return RunEstimate(prompts, costs["generate"], costs["judge"], disk_bytes, evaluate, judged_prompts)


def _stage_cost(facts: Mapping[str, Any], answers: float, concurrency: int) -> Cost:
    """Return the cost of ``answers`` records at the rates of ``facts``, with one server start."""
    scale = answers / facts["answers"] if facts["answers"] else 0.0
    startup_s = max(0.0, facts["seconds"] - facts["request_wall_s"])
    return Cost(
        seconds=request_seconds(facts, concurrency, scale) + startup_s if answers else 0.0,
        prompt_tokens=facts["prompt_tokens"] * scale,
        completion_tokens=facts["completion_tokens"] * scale,
        cost_usd=facts["cost_usd"] * scale,
    )


def spent_usd(run: Run) -> float:
    """Return the US dollars that all starts of the run cost.

    This is the sum over its journals, or over the stages' counters if that is larger: replies without a record were
    paid too.
    """
    from_journals = run_status.total_cost(run) + run_status.total_cost(Run(run.path / trained_model.EVALUATION_DIR))
    from_history = sum(start.get("cost_usd", 0.0) for name in ("generate", "judge", "evaluate")
                  for start in run.manifest()["stages"].get(name, {}).get("history", []))  # fmt: skip
    return float(max(from_journals, from_history))


def deadline_monotonic(config: RunConfig) -> float | None:
    """Return the deadline on the clock of ``time.monotonic()``, or None."""
    remaining_s = seconds_to_deadline(config)
    return None if remaining_s is None else time.monotonic() + remaining_s


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds ``path``, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError as error:
        raise RlaifError(f"cannot read the free disk space: {error.strerror}", location=str(path)) from None


def disk_space_warning(run: Run, needed: float) -> str | None:
    """Return a warning if ``needed`` more bytes do not fit on the disk, else None."""
    free = free_bytes(run.path)
    return f"the run needs about {needed / GB:,.1f} GB of disk, {free / GB:,.1f} GB are free" if needed > free else None
