"""``rlaif review``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.shared import OnBadRow, RunPath, as_judged, open_with, show_pairs
from rlaif.errors import UsageError


def review(
    run: RunPath,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Write the queue for a person, blind.")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", show_default=False, help="Read their choices back.")
    ] = None,
    format_: Annotated[
        Literal["csv", "jsonl"] | None, typer.Option("--format", help="By FILE's ending otherwise.")
    ] = None,
    annotator: Annotated[str, typer.Option(metavar="NAME", help="Whose labels these are.")] = "reviewer",
    merge: Annotated[bool, typer.Option("--merge", help="Write the dataset anew with what people said.")] = False,
    on_bad_row: OnBadRow = None,
) -> None:
    """Hand the queue to people, take labels back."""
    from rlaif import pipeline
    from rlaif.review import exchange

    if sum((export is not None, import_ is not None, merge)) != 1:
        raise UsageError("say what to do with the queue", mend="One of --export FILE, --import FILE, --merge.")
    target, settings = open_with(run, {})
    if export is not None:
        chosen = format_ or ("jsonl" if export.suffix == ".jsonl" else "csv")
        count = exchange.export_queue(target, export, format=chosen, annotator=annotator, seed=settings.seed)
        console.put(
            f"{count:,} pairs for {annotator} in {export}. Fill in choice (left, right, tie, both_bad, skip), "
            f"then: rlaif review {run} --import {export} --annotator {annotator}"
        )
        return
    if import_ is not None:
        result = exchange.import_reviews(
            target, import_, annotator=annotator, seed=settings.seed, on_bad_row=on_bad_row or "stop"
        )
        for problem in result.bad:
            console.say(f"skipped: {problem}")
        console.say(
            f"{result.added:,} labels read, {result.changed:,} changed, {result.unchanged:,} known before, "
            f"{result.unlabelled:,} rows still without a choice"
        )
    show_pairs(pipeline.rebuild(target, as_judged(target, settings)), run)
