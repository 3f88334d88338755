"""``rlaif run``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.shared import (
    Budget,
    Concurrency,
    DryRun,
    Limit,
    MaxFailures,
    RunPath,
    Seed,
    client_flags,
    open_with,
    say_stopped,
    show_pairs,
    show_plan,
)


def run(
    run: RunPath,
    until: Annotated[
        str | None, typer.Option(metavar="HH:MM", help="Begin nothing new after this time of day.", show_default=False)
    ] = None,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="8h", help="The same, counted from now.", show_default=False)
    ] = None,
    train: Annotated[bool | None, typer.Option("--train/--no-train", help="Train too.", show_default=False)] = None,
    evaluate: Annotated[
        bool | None,
        typer.Option(
            "--evaluate/--no-evaluate", help="Measure the trained model against its reference.", show_default=False
        ),
    ] = None,
    pilot: Annotated[
        int | None, typer.Option(help="Prompts that go first, for the estimate; 0 for none.", show_default=False)
    ] = None,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
) -> None:
    """The whole night: generate, judge, report, and train and evaluate when asked."""
    target, settings = open_with(
        run,
        {
            "run.until": until,
            "run.duration": for_,
            "run.train": train,
            "run.evaluate": evaluate,
            "run.pilot": pilot,
            "prompts.limit": limit,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import pipeline

    if dry_run:
        show_plan(pipeline.plan_night(target, settings))
        if settings.run.evaluate:
            console.say("What the evaluation asks is not in it.")
        return
    told = pipeline.whole_night(target, settings, console.Console())
    for warning in told.warnings:
        console.say(f"warning: {warning}")
    say_stopped(told.stopped)
    if told.built:
        show_pairs(told.built, run)
    if told.report:
        console.put(f"report: {told.report}")
