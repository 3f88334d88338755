"""``rlaif review``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlaif.cli import console
from rlaif.cli.shared import OnBadRow, RunPath, as_judged, open_with, show_pairs
from rlaif.errors import UsageError

if TYPE_CHECKING:
    from rlaif.config import Config
    from rlaif.run.directory import Run

DEFAULT_PORT = 7543
Formats = Literal["csv", "jsonl", "argilla", "label-studio"]


def review(
    run: RunPath,
    annotator: Annotated[
        str | None, typer.Option(metavar="NAME", show_default=False, help="Whose labels these are.")
    ] = None,
    annotators: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", show_default=False, help="Several people, each with a link of their own."),
    ] = None,
    port: Annotated[int, typer.Option(metavar="P", min=0, max=65535, help="0 is any that is free.")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Beyond this machine only by links with tokens.")] = "127.0.0.1",
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Write the queue for a person, blind.")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", show_default=False, help="Read their choices back.")
    ] = None,
    format_: Annotated[
        Formats | None, typer.Option("--format", help="Of FILE; by its ending and content otherwise.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the dataset anew with what people said.")] = False,
    on_bad_row: OnBadRow = None,
) -> None:
    """The page on which people label the queue. Or the queue as a file, and labels back."""
    if sum((export is not None, import_ is not None, merge)) > 1:
        raise UsageError(
            "one thing at a time", mend="One of --export FILE, --import FILE, --merge; without these the page opens."
        )
    named = [name for names in annotators or [] for name in names.split(",") if name.strip()]
    if annotator is not None and named:
        raise UsageError("--annotator is one person, --annotators are several", mend="Give one of them.")
    if (named or host != "127.0.0.1" or port != DEFAULT_PORT) and (export or import_ or merge):
        raise UsageError("--annotators, --host and --port belong to the page", mend="A file is for one --annotator.")
    target, settings = open_with(run, {"review.annotators": named or None})
    if export is not None:
        _export(target, settings, export, format_, annotator or "reviewer")
    elif import_ is not None:
        _import(target, settings, import_, format_, annotator or "reviewer", on_bad_row or "stop")
    elif merge:
        from rlaif import pipeline

        show_pairs(pipeline.rebuild(target, as_judged(target, settings)), run)
    else:
        _page(target, settings, annotator, host, port)


def _page(run: Run, settings: Config, annotator: str | None, host: str, port: int) -> None:
    from rlaif import pipeline

    before = run.reviews().height

    def ready(links: dict[str, str], desk: Any) -> None:
        console.say(f"pairs for people: {len(desk.queued):,}; labels go into {run.journal_path('reviews')}")
        if host != "127.0.0.1":
            console.say(
                "warning: others on the network can reach this page, and a link is all they need; it is not encrypted. "
                "Safer: leave --host away, and let people come through ssh -L"
            )
        for name, link in links.items():
            console.put(f"{name}: {link}")
        console.say("Ctrl-C closes the page; every label is on the disk by then.")
        import sys

        sys.stdout.flush()

    pipeline.review(run, as_judged(run, settings), annotator=annotator, host=host, port=port, ready=ready)
    console.say(f"{run.reviews().height - before:,} labels were given. Next: rlaif review {run.path} --merge")


def _export(run: Run, settings: Config, path: Path, format_: Formats | None, annotator: str) -> None:
    from rlaif.review import exchange

    chosen = format_ or ("jsonl" if path.suffix == ".jsonl" else "csv")
    count = exchange.export_queue(run, path, format=chosen, annotator=annotator, seed=settings.seed)
    console.put(
        f"{count:,} pairs for {annotator} in {path}. {exchange.HOW_TO_LABEL[chosen]}, "
        f"then: rlaif review {run.path} --import {path} --annotator {annotator}"
    )


def _import(
    run: Run,
    settings: Config,
    path: Path,
    format_: Formats | None,
    annotator: str,
    on_bad_row: Literal["stop", "skip"],
) -> None:
    from rlaif import pipeline
    from rlaif.review import exchange

    result = exchange.import_reviews(
        run, path, annotator=annotator, seed=settings.seed, on_bad_row=on_bad_row, format=format_
    )
    for problem in result.bad:
        console.say(f"skipped: {problem}")
    console.say(
        f"{result.added:,} labels read, {result.changed:,} changed, {result.unchanged:,} known before, "
        f"{result.unlabelled:,} rows still without a choice"
    )
    show_pairs(pipeline.rebuild(run, as_judged(run, settings)), run.path)
