"""``rlaif review``: the review page, or the queue as a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.options import (
    OnBadRow,
    RunPath,
    config_as_judged,
    open_run_with_config,
    print_pair_summary,
    setting_option,
)
from rlaif.errors import UsageError

if TYPE_CHECKING:
    from rlaif.config.models import Config
    from rlaif.review.assignment import AssignmentService
    from rlaif.run.run import Run

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7543
Formats = Literal["csv", "jsonl", "argilla", "label-studio"]


def review(
    run: RunPath,
    annotator: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Your name, stored with your labels [default: reviewer]"),
    ] = None,
    annotators: Annotated[list[str] | None, setting_option("review.annotators", metavar="A,B")] = None,
    port: Annotated[
        int, typer.Option(metavar="P", min=0, max=65535, help="Port of the page; 0 picks a free one")
    ] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine, every annotator needs a personal link")
    ] = DEFAULT_HOST,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Write the review queue to a file, without models and verdicts"
        ),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", show_default=False, help="Read the labels back from a file"),
    ] = None,
    format_: Annotated[
        Formats | None, typer.Option("--format", help="Format of FILE [default: from its extension and content]")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Rebuild the dataset with the human labels")] = False,
    on_bad_row: OnBadRow = None,
) -> None:
    """Open the page on which annotators label the review queue, or export the queue and import the labels"""
    annotator_names = [name for names in annotators or [] for name in names.split(",") if name.strip()]
    if sum((export is not None, import_ is not None, merge)) > 1:
        raise UsageError(
            "--export, --import and --merge exclude each other",
            hint="Give one of them, or none to open the review page.",
        )
    if annotator is not None and annotator_names:
        raise UsageError("--annotator and --annotators exclude each other", hint="List all names in --annotators.")
    changes_page = bool(annotator_names) or host != DEFAULT_HOST or port != DEFAULT_PORT
    if changes_page and (export or import_ or merge):
        raise UsageError(
            "--annotators, --host and --port apply to the review page only",
            hint="Drop them; a file belongs to one annotator, set by --annotator NAME.",
        )
    target, settings = open_run_with_config(run, {"review.annotators": annotator_names or None})
    if export is not None:
        _export(target, settings, export, format_, annotator or "reviewer")
    elif import_ is not None:
        _import(target, settings, import_, format_, annotator or "reviewer", on_bad_row or "stop")
    elif merge:
        from rlaif import api

        print_pair_summary(api.rebuild_dataset(target, config_as_judged(target, settings)), run)
    else:
        _serve_page(target, settings, annotator, host, port)


def _serve_page(run: Run, settings: Config, annotator: str | None, host: str, port: int) -> None:
    """Serve the review page until Ctrl-C, and print the links and the number of new labels."""
    from rlaif import api

    labels_before = run.reviews().height

    def on_ready(links: dict[str, str], assignments: AssignmentService) -> None:
        console.log(
            f"review queue: {len(assignments.queued):,} pairs; labels are written to {run.journal_path('reviews')}"
        )
        if host != DEFAULT_HOST:
            console.log(
                "warning: the network can reach this page, and anyone with a link can label; traffic is not encrypted. "
                "Safer: drop --host and let annotators connect through ssh -L"
            )
        for name, link in links.items():
            console.echo(f"{name}: {link}")
        console.log("press Ctrl-C to close the page; every label is saved as soon as it is given")
        sys.stdout.flush()

    api.serve_review_page(
        run, config_as_judged(run, settings), annotator=annotator, host=host, port=port, on_ready=on_ready
    )
    console.log(f"{run.reviews().height - labels_before:,} new labels. Next: rlaif review {run.path} --merge")


def _export(run: Run, settings: Config, path: Path, format_: Formats | None, annotator: str) -> None:
    from rlaif.review import import_export

    chosen = format_ or ("jsonl" if path.suffix == ".jsonl" else "csv")
    count = import_export.export_queue(run, path, format=chosen, annotator=annotator, seed=settings.seed)
    console.echo(
        f"{count:,} pairs for {annotator} written to {path}. {import_export.HOW_TO_LABEL[chosen]}, "
        f"then run: rlaif review {run.path} --import {path} --annotator {annotator}"
    )


def _import(
    run: Run,
    settings: Config,
    path: Path,
    format_: Formats | None,
    annotator: str,
    on_bad_row: Literal["stop", "skip"],
) -> None:
    from rlaif import api
    from rlaif.review import import_export

    result = import_export.import_reviews(
        run, path, annotator=annotator, seed=settings.seed, on_bad_row=on_bad_row, format=format_
    )
    for problem in result.bad_rows:
        console.log(f"skipped: {problem}")
    console.log(
        f"{result.added:,} labels added, {result.changed:,} changed, {result.unchanged:,} unchanged, "
        f"{result.unlabeled:,} rows without a choice"
    )
    print_pair_summary(api.rebuild_dataset(run, config_as_judged(run, settings)), run.path)
