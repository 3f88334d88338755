"""Counts of what a run has, what failed and what it cost, read without a lock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.config.loader import CONFIG_FILE
from rlaif.llm.batch_journal import read_jobs
from rlaif.run.journal import iter_records
from rlaif.run.run import JournalName, Run, is_run

MAX_DEPTH = 3
PAID_JOURNALS: tuple[JournalName, ...] = ("completions", "verdicts")


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalCounts:
    """Counts of one journal."""

    answers: int
    """Records with an answer"""
    failed: dict[str, int]
    """Failed requests that have no answer yet, by kind of failure"""
    cost_usd: float
    """Cost in US dollars"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """Start and end of one stage."""

    started: str
    """Time of the first start"""
    ended: str | None
    """Time of the last end; None while it runs"""
    starts: int
    """Number of starts"""
    seconds: float
    """Time of all starts, in seconds"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Counts of a run."""

    run: str
    """Path of the run"""
    busy: bool
    """True while a command holds the lock"""
    prompts: int
    """Prompts"""
    heldout: int
    """Prompts held out for evaluation"""
    completions: JournalCounts
    """Counts of completions.jsonl"""
    verdicts: JournalCounts
    """Counts of verdicts.jsonl"""
    reviews: JournalCounts
    """Counts of reviews.jsonl"""
    stages: dict[str, StageStatus]
    """Status per stage"""
    pairs: dict[str, Any] | None
    """Counts of pairs; None before judging"""
    batches: list[dict[str, Any]]
    """Batch jobs that the provider has not finished"""


def find_runs(folder: Path) -> list[Run]:
    """Return the runs in ``folder`` and up to ``MAX_DEPTH`` levels below it, including those that have not started."""
    names = [f"{'*/' * depth}{name}" for depth in range(MAX_DEPTH + 1) for name in ("manifest.json", CONFIG_FILE)]
    folders = {path.parent for name in names for path in folder.glob(name)}
    return [Run(path) for path in sorted(folders, key=lambda path: (len(path.parts), path)) if is_run(path)]


def run_status(run: Run) -> RunStatus:
    """Count what ``run`` has. Raises :class:`rlaif.errors.RunError` for a damaged manifest or journal."""
    stages = run.manifest()["stages"]
    splits = Counter(record["split"] for _, record in iter_records(run.journal_path("prompts")))
    return RunStatus(
        run=str(run.path),
        busy=run.is_locked(),
        prompts=splits.total(),
        heldout=splits["heldout"],
        completions=_journal_counts(run, "completions"),
        verdicts=_journal_counts(run, "verdicts"),
        reviews=_journal_counts(run, "reviews"),
        stages={name: _stage_status(stage) for name, stage in stages.items()},
        pairs=stages.get("judge", {}).get("pairs"),
        batches=[
            job.model_dump(include={"journal", "model", "batch", "status", "lines"})
            for job in read_jobs(run.journals / "batches.jsonl")
            if job.state != "finished"
        ],
    )


def total_cost(run: Run) -> float:
    """Cost in US dollars of the journaled answers and verdicts of ``run``."""
    return float(
        sum(record.get("cost_usd", 0.0) for name in PAID_JOURNALS for _, record in iter_records(run.journal_path(name)))
    )


def _stage_status(stage: dict[str, Any]) -> StageStatus:
    history = stage.get("history", [])
    return StageStatus(
        started=(history or [stage])[0].get("started", ""),
        ended=stage.get("ended"),
        starts=len(history) + (stage.get("ended") is None),
        seconds=round(sum(start.get("seconds", 0.0) for start in history), 1),
    )


def _journal_counts(run: Run, name: JournalName) -> JournalCounts:
    answers: set[str] = set()
    failed: dict[str, str] = {}
    cost_usd = 0.0
    for _, record in iter_records(run.journal_path(name)):
        cost_usd += record.get("cost_usd", 0.0)
        if "error" in record:
            failed[record["key"]] = record["kind"]
        else:
            answers.add(record["key"])
    kinds = Counter(kind for key, kind in failed.items() if key not in answers)
    return JournalCounts(answers=len(answers), failed=dict(kinds), cost_usd=round(cost_usd, 6))


def format_status(status: RunStatus, next_step: object) -> str:
    """Return the lines that `rlaif status` prints for one run."""
    state = " (being written now)" if status.busy else "" if status.stages else " (not started)"
    heldout = f", {status.heldout:,} of them held out" if status.heldout else ""
    journals = {"completions": status.completions, "verdicts": status.verdicts, "reviews": status.reviews}
    lines = [
        status.run + state,
        f"  prompts      {status.prompts:,}{heldout}",
        *(_journal_line(name, counts) for name, counts in journals.items()),
        *_pair_lines(status),
        *(_batch_line(batch) for batch in status.batches),
        *(_stage_line(name, stage) for name, stage in status.stages.items()),
        f"  next         {next_step}",
    ]
    return "\n".join(lines)


def _journal_line(name: str, counts: JournalCounts) -> str:
    failed = "".join(f", {count:,} {kind} failures" for kind, count in counts.failed.items())
    cost = f", ${counts.cost_usd:,.4f}" if counts.cost_usd else ""
    return f"  {name:<12} {counts.answers:,}{failed}{cost}"


def _pair_lines(status: RunStatus) -> list[str]:
    if not status.pairs:
        return []
    routes = ", ".join(f"{count:,} {route}" for route, count in status.pairs["routes"].items())
    dataset = status.pairs["dataset"]
    return [
        f"  pairs        {status.pairs['candidates']:,} candidates: {routes}",
        f"  dataset      {dataset['train']:,} train, {dataset['test']:,} test",
    ]


def _batch_line(batch: dict[str, Any]) -> str:
    return (
        f"  batch        {batch['lines']:,} requests for {batch['journal']} to {batch['model']}: "
        f"{batch['batch'] or 'not submitted'}, {batch['status'] or 'not checked yet'}"
    )


def _stage_line(name: str, stage: StageStatus) -> str:
    ended = f"ended {stage.ended}" if stage.ended else "not ended"
    starts = f" ({stage.starts} starts, {stage.seconds:,.0f} s)" if stage.starts > 1 else ""
    return f"  {name:<12} started {stage.started}, {ended}{starts}"
