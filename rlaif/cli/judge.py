"""``rlaif judge``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.shared import (
    BaseUrls,
    Budget,
    Concurrency,
    DryRun,
    Limit,
    MaxFailures,
    RunPath,
    Seed,
    client_flags,
    engines_for,
    open_with,
    say_stopped,
    show_pairs,
    show_plan,
)


def judge(
    run: RunPath,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@MODEL]", show_default=False, help='A judge; several make a panel. "check": no model.'
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="J", show_default=False, help="The model that judges.")
    ] = None,
    base_url: BaseUrls = None,
    strategy: Annotated[
        Literal["auto", "rate-then-compare", "round-robin", "rate-only"] | None,
        typer.Option(help="Which pairs are compared.", show_default=False),
    ] = None,
    human_share: Annotated[float | None, typer.Option(help="Share of pairs for people.", show_default=False)] = None,
    min_probability: Annotated[float | None, typer.Option(help="Keep a pair from here on.", show_default=False)] = None,
    min_margin: Annotated[float | None, typer.Option(help="Least gap of ratings.", show_default=False)] = None,
    trust_anyway: Annotated[
        bool, typer.Option("--trust-anyway", help="Ask a judge that failed its exam (rlaif judges exam).")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Judge anew under changed settings.")] = False,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
) -> None:
    """Judge answers, pair them, fill the queue."""
    target, settings = open_with(
        run,
        {
            "judge.judges": judge,
            "judge.model": model,
            "judge.base_url": base_url,
            "judge.strategy": strategy,
            "judge.trust_anyway": trust_anyway or None,
            "judge.limit": limit,
            "pairs.human_share": human_share,
            "pairs.min_probability": min_probability,
            "pairs.min_margin": min_margin,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import pipeline

    if dry_run:
        show_plan(pipeline.plan_judge(target, settings))
        return
    with engines_for(target, settings) as engines:
        done = pipeline.judge(target, settings, console.Console(), engines, restart=restart)
    say_stopped(done.stopped)
    show_pairs(done.built, run)
