"""The facts about a run, read without a lock: what it has, what failed, what it cost, what comes next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif.config.loader import CONFIG_FILE
from rlaif.llm.batch_journal import read_jobs
from rlaif.run.journal import iter_records
from rlaif.run.run import JournalName, Run, is_run

MAX_DEPTH = 3
PAID_JOURNALS: tuple[JournalName, ...] = ("completions", "verdicts")


def find_runs(folder: Path) -> list[Run]:
    """The runs in ``folder`` and a few levels below it, those that have not begun too."""
    names = [f"{'*/' * depth}{name}" for depth in range(MAX_DEPTH + 1) for name in ("manifest.json", CONFIG_FILE)]
    folders = {path.parent for name in names for path in folder.glob(name)}
    return [Run(path) for path in sorted(folders, key=lambda path: (len(path.parts), path)) if is_run(path)]


def run_status(run: Run) -> dict[str, Any]:
    """As JSON: run, busy, settings (whether there is a rlaif.toml), prompts, heldout, completions, verdicts, reviews
    (answers, failures and dollars of each), stages (started, ended, starts,
    seconds of all starts), pairs, batches (those that are with a provider), next."""
    stages = run.manifest()["stages"]
    prompts = [(record["split"], record["prompt_id"]) for _, record in iter_records(run.journal_path("prompts"))]
    status: dict[str, Any] = {
        "run": str(run.path),
        "busy": run.is_locked(),
        "prompts": len(prompts),
        "heldout": sum(split == "heldout" for split, _ in prompts),
        **{name: _journal_counts(run, name) for name in ("completions", "verdicts", "reviews")},
        "stages": {
            name: {
                "started": (stage.get("history") or [stage])[0]["started"],
                "ended": stage.get("ended"),
                "starts": len(stage.get("history", [])) + (stage.get("ended") is None),
                "seconds": round(sum(start.get("seconds", 0.0) for start in stage.get("history", [])), 1),
            }
            for name, stage in stages.items()
        },
        "pairs": stages.get("judge", {}).get("pairs"),
        "batches": [
            part.model_dump(include={"journal", "model", "batch", "status", "lines"})
            for part in read_jobs(run.journals / "batches.jsonl")
            if part.state != "finished"
        ],
        "trained": (run.model / "README.md").exists(),
    }
    status["next"] = next_command(run, status)
    return status


def total_cost(run: Run) -> float:
    """What the journaled answers and verdicts of ``run`` cost."""
    return float(
        sum(record.get("cost_usd", 0.0) for name in PAID_JOURNALS for _, record in iter_records(run.journal_path(name)))
    )


def _journal_counts(run: Run, name: JournalName) -> dict[str, Any]:
    answers: set[str] = set()
    failed: dict[str, str] = {}
    cost_usd, kinds = 0.0, Counter[str]()
    for _, record in iter_records(run.journal_path(name)):
        cost_usd += record.get("cost_usd", 0.0)
        if "error" in record:
            failed[record["key"]] = record["kind"]
        else:
            answers.add(record["key"])
    for key, kind in failed.items():
        if key not in answers:
            kinds[kind] += 1
    return {"answers": len(answers), "failed": dict(kinds), "cost_usd": round(cost_usd, 6)}


def next_command(run: Run, status: Mapping[str, Any]) -> str:
    if not status["completions"]["answers"]:
        return f"rlaif generate {run.path}"
    if not status["pairs"]:
        return f"rlaif judge {run.path}"
    awaiting_review = status["pairs"]["dataset_left_out"].get("awaiting_review", 0)
    if awaiting_review:
        return f"rlaif review {run.path}"
    return f"rlaif train {run.path}" if not status["trained"] else "the model is in " + str(run.model)


def format_status(status: Mapping[str, Any]) -> str:
    state = " (being written now)" if status["busy"] else "" if status["stages"] else " (not begun)"
    lines = [status["run"] + state]
    heldout = f", {status['heldout']:,} of them held out" if status["heldout"] else ""
    lines.append(f"  prompts      {status['prompts']:,}{heldout}")
    for name in ("completions", "verdicts", "reviews"):
        part = status[name]
        failed = "".join(f", {count:,} {kind} failures" for kind, count in part["failed"].items())
        cost = f", ${part['cost_usd']:,.4f}" if part["cost_usd"] else ""
        lines.append(f"  {name:<12} {part['answers']:,}{failed}{cost}")
    pairs = status["pairs"]
    if pairs:
        listed = ", ".join(f"{count:,} {route}" for route, count in pairs["routes"].items())
        lines.append(f"  pairs        {pairs['candidates']:,} candidates: {listed}")
        lines.append(f"  dataset      {pairs['dataset']['train']:,} train, {pairs['dataset']['test']:,} test")
    lines += [
        f"  batch        {part['lines']:,} requests for {part['journal']} by {part['model']}: "
        f"{part['batch'] or 'not submitted'}, {part['status'] or 'not looked at yet'}"
        for part in status["batches"]
    ]
    for name, stage in status["stages"].items():
        ended = f"ended {stage['ended']}" if stage["ended"] else "not ended"
        starts = f" ({stage['starts']} starts, {stage['seconds']:,.0f} s)" if stage["starts"] > 1 else ""
        lines.append(f"  {name:<12} started {stage['started']}, {ended}{starts}")
    lines.append(f"  next         {status['next']}")
    return "\n".join(lines)
