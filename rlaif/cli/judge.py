"""``rlaif judge``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.options import (
    BaseUrls,
    Batch,
    Budget,
    Concurrency,
    DryRun,
    Limit,
    MaxFailures,
    RunPath,
    Seed,
    backends_for,
    client_flags,
    log_early_stop,
    open_run_with_config,
    print_dry_run,
    print_pair_summary,
)


def judge(
    run: RunPath,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@MODEL]", show_default=False, help='Judge on the panel (repeatable); "check" needs no model'
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="J", show_default=False, help="Judge model")
    ] = None,
    base_url: BaseUrls = None,
    strategy: Annotated[
        Literal["auto", "rate-then-compare", "round-robin", "rate-only"] | None,
        typer.Option(help="Choice of answers to compare [default: auto]", show_default=False),
    ] = None,
    human_fraction: Annotated[
        float | None, typer.Option(help="Fraction of pairs queued for human review [default: 0.1]", show_default=False)
    ] = None,
    min_confidence: Annotated[
        float | None,
        typer.Option(help="Minimum probability for the better answer, 0.5 to 1 [default: 0.65]", show_default=False),
    ] = None,
    min_rating_margin: Annotated[
        float | None, typer.Option(help="Minimum rating difference [default: 1.0]", show_default=False)
    ] = None,
    allow_failed_exam: Annotated[
        bool, typer.Option("--allow-failed-exam", help="Use judges that failed their exam")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Judge again under changed settings")] = False,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    batch: Batch = None,
    dry_run: DryRun = False,
) -> None:
    """Judge answers, pair them and fill the review queue"""
    target, settings = open_run_with_config(
        run,
        {
            "judge.panel": judge,
            "judge.model": model,
            "judge.base_url": base_url,
            "judge.strategy": strategy,
            "judge.allow_failed_exam": allow_failed_exam or None,
            "judge.limit": limit,
            "pairs.human_fraction": human_fraction,
            "pairs.min_confidence": min_confidence,
            "pairs.min_rating_margin": min_rating_margin,
            "client.use_batch_api": batch,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import api

    if dry_run:
        print_dry_run(api.plan_judge(target, settings))
        return
    with backends_for(target, settings) as backends:
        result = api.judge(target, settings, console.Console(), backends, restart=restart)
    log_early_stop(result.stop_reason)
    print_pair_summary(result.build, run)
