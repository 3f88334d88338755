"""``rlaif judge``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.options import (
    Batch,
    Budget,
    Concurrency,
    DryRun,
    JudgeBaseUrls,
    JudgeModel,
    MaxFailures,
    RunPath,
    Seed,
    backends_for,
    client_flags,
    log_early_stop,
    open_run_with_config,
    print_dry_run,
    print_pair_summary,
    setting_option,
)
from rlaif.config.choices import Strategy


def judge(
    run: RunPath,
    judge: Annotated[list[str] | None, setting_option("judge.panel", metavar="NAME[@MODEL]")] = None,
    model: JudgeModel = None,
    base_url: JudgeBaseUrls = None,
    strategy: Annotated[Strategy | None, setting_option("judge.strategy")] = None,
    human_fraction: Annotated[float | None, setting_option("pairs.human_fraction")] = None,
    min_confidence: Annotated[float | None, setting_option("pairs.min_confidence")] = None,
    min_rating_margin: Annotated[float | None, setting_option("pairs.min_rating_margin")] = None,
    allow_failed_exam: Annotated[bool, setting_option("judge.allow_failed_exam", "--allow-failed-exam")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Judge again under changed settings")] = False,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Annotated[int | None, setting_option("judge.limit")] = None,
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
    log_early_stop(result.stop_reason, settings)
    print_pair_summary(result.build, run)
