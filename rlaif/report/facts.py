"""The facts about a run, read without a lock: what it has, what failed, what it cost, what comes next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif.llm.parts import parts
from rlaif.run.directory import JournalName, Run, is_run
from rlaif.run.journal import read
from rlaif.settings import FILE_NAME

DEPTH = 3
ASKED: tuple[JournalName, ...] = ("completions", "verdicts")


def runs_below(folder: Path) -> list[Run]:
    """The runs in ``folder`` and a few levels below it, those that have not begun too."""
    names = [f"{'*/' * depth}{name}" for depth in range(DEPTH + 1) for name in ("manifest.json", FILE_NAME)]
    found = {path.parent for name in names for path in folder.glob(name)}
    return [Run(path) for path in sorted(found, key=lambda path: (len(path.parts), path)) if is_run(path)]


def of(run: Run) -> dict[str, Any]:
    """As JSON: run, busy, settings (whether there is a rlaif.toml), prompts, heldout, completions, verdicts, reviews
    (answers, failures and dollars of each), stages (started, ended, starts,
    seconds of all starts), pairs, batches (those that are with a provider), next."""
    stages = run.manifest()["stages"]
    prompts = [(record["split"], record["prompt_id"]) for _, record in read(run.journal_path("prompts"))]
    facts: dict[str, Any] = {
        "run": str(run.path),
        "busy": run.is_being_written(),
        "prompts": len(prompts),
        "heldout": sum(split == "heldout" for split, _ in prompts),
        **{name: _journal(run, name) for name in ("completions", "verdicts", "reviews")},
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
            for part in parts(run.journals / "batches.jsonl")
            if part.event != "ended"
        ],
        "trained": (run.model / "README.md").exists(),
    }
    facts["next"] = _next(run, facts)
    return facts


def dollars(run: Run) -> float:
    """What the journaled answers and verdicts of ``run`` cost."""
    return float(sum(record.get("usd", 0.0) for name in ASKED for _, record in read(run.journal_path(name))))


def _journal(run: Run, name: JournalName) -> dict[str, Any]:
    answers: set[str] = set()
    failed: dict[str, str] = {}
    usd, kinds = 0.0, Counter[str]()
    for _, record in read(run.journal_path(name)):
        usd += record.get("usd", 0.0)
        if "error" in record:
            failed[record["key"]] = record["kind"]
        else:
            answers.add(record["key"])
    for key, kind in failed.items():
        if key not in answers:
            kinds[kind] += 1
    return {"answers": len(answers), "failed": dict(kinds), "usd": round(usd, 6)}


def _next(run: Run, facts: Mapping[str, Any]) -> str:
    if not facts["completions"]["answers"]:
        return f"rlaif generate {run.path}"
    if not facts["pairs"]:
        return f"rlaif judge {run.path}"
    waiting = facts["pairs"]["dataset_left_out"].get("waits for review", 0)
    if waiting:
        return f"rlaif review {run.path}"
    return f"rlaif train {run.path}" if not facts["trained"] else "the model is in " + str(run.model)


def as_text(facts: Mapping[str, Any]) -> str:
    state = " (being written now)" if facts["busy"] else "" if facts["stages"] else " (not begun)"
    lines = [facts["run"] + state]
    heldout = f", {facts['heldout']:,} of them held out" if facts["heldout"] else ""
    lines.append(f"  prompts      {facts['prompts']:,}{heldout}")
    for name in ("completions", "verdicts", "reviews"):
        part = facts[name]
        failed = "".join(f", {count:,} {kind} failures" for kind, count in part["failed"].items())
        usd = f", ${part['usd']:,.4f}" if part["usd"] else ""
        lines.append(f"  {name:<12} {part['answers']:,}{failed}{usd}")
    pairs = facts["pairs"]
    if pairs:
        listed = ", ".join(f"{count:,} {route}" for route, count in pairs["routes"].items())
        lines.append(f"  pairs        {pairs['candidates']:,} candidates: {listed}")
        lines.append(f"  dataset      {pairs['dataset']['train']:,} train, {pairs['dataset']['test']:,} test")
    lines += [
        f"  batch        {part['lines']:,} requests for {part['journal']} by {part['model']}: "
        f"{part['batch'] or 'not submitted'}, {part['status'] or 'not looked at yet'}"
        for part in facts["batches"]
    ]
    for name, stage in facts["stages"].items():
        ended = f"ended {stage['ended']}" if stage["ended"] else "not ended"
        starts = f" ({stage['starts']} starts, {stage['seconds']:,.0f} s)" if stage["starts"] > 1 else ""
        lines.append(f"  {name:<12} started {stage['started']}, {ended}{starts}")
    lines.append(f"  next         {facts['next']}")
    return "\n".join(lines)
