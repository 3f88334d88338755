"""``rlaif run``."""

from __future__ import annotations

from typing import Annotated

from rlaif.cli import console
from rlaif.cli.options import (
    Budget,
    Concurrency,
    DryRun,
    Limit,
    MaxFailures,
    RunPath,
    Seed,
    client_flags,
    log_early_stop,
    open_run_with_config,
    print_dry_run,
    print_pair_summary,
    setting_option,
)


def run(
    run: RunPath,
    until: Annotated[str | None, setting_option("run.until", metavar="HH:MM")] = None,
    for_: Annotated[str | None, setting_option("run.max_duration", "--for", metavar="8h")] = None,
    train: Annotated[bool | None, setting_option("run.train", "--train/--no-train")] = None,
    evaluate: Annotated[bool | None, setting_option("run.evaluate", "--evaluate/--no-evaluate")] = None,
    pilot_prompts: Annotated[int | None, setting_option("run.pilot_prompts")] = None,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
) -> None:
    """Run all stages, with training and evaluation on request"""
    target, settings = open_run_with_config(
        run,
        {
            "run.until": until,
            "run.max_duration": for_,
            "run.train": train,
            "run.evaluate": evaluate,
            "run.pilot_prompts": pilot_prompts,
            "prompts.limit": limit,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import api

    if dry_run:
        print_dry_run(api.plan_run(target, settings))
        if settings.run.evaluate:
            console.log("This dry run omits the evaluation: `rlaif evaluate RUN --dry-run` shows it.")
        return
    result = api.run_pipeline(target, settings, console.Console())
    for warning in result.warnings:
        console.log(f"warning: {warning}")
    log_early_stop(result.stop_reason, settings)
    if result.build:
        print_pair_summary(result.build, run)
    if result.report:
        console.echo(f"report: {result.report}")
