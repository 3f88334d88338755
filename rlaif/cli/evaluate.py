"""``rlaif evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.options import (
    Budget,
    Concurrency,
    DryRun,
    MaxFailures,
    RunPath,
    Seed,
    backends_for,
    client_flags,
    config_as_judged,
    log_early_stop,
    open_run_with_config,
    print_dry_run,
    print_next_step,
    setting_option,
)


def evaluate(
    run: RunPath,
    judge: Annotated[list[str] | None, setting_option("evaluate.judges", metavar="NAME[@MODEL]")] = None,
    model: Annotated[str | None, setting_option("evaluate.model", "--model", "-m", metavar="J")] = None,
    base_url: Annotated[list[str] | None, setting_option("evaluate.base_url", metavar="URL")] = None,
    prompts: Annotated[list[str] | None, setting_option("evaluate.sources", metavar="SRC")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON")] = False,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Annotated[int | None, setting_option("evaluate.limit")] = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
) -> None:
    """Compare the trained model with its reference: win rate, length, refusals, KL divergence"""
    target, settings = open_run_with_config(
        run,
        {
            "evaluate.judges": judge,
            "evaluate.model": model,
            "evaluate.base_url": base_url,
            "evaluate.sources": prompts,
            "evaluate.limit": limit,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import api
    from rlaif.display_names import field_name
    from rlaif.evaluate.evaluation_result import ESTIMATES

    settings = config_as_judged(target, settings, keep_seed=True)
    if dry_run:
        print_dry_run(api.plan_evaluate(target, settings))
        return
    with backends_for(target, settings) as backends:
        result = api.evaluate(target, settings, console.Console(), backends)
    log_early_stop(result.stopped, settings)
    for warning in result.warnings:
        console.log(f"warning: {warning}")
    if json:
        console.echo_json(result.as_json())
        return
    for name in ESTIMATES:
        if estimate := getattr(result, name):
            console.echo(f"{field_name(name)}: {estimate}")
    for row in result.refusals:
        rates = f"reference {row.reference or 'none'}, trained {row.trained or 'none'}"
        console.echo(f"refusals on {row.prompt_class} prompts: {rates}")
    if checks := result.checks:
        console.echo(f"checks passed: reference {checks.reference}, trained {checks.trained}, gain {checks.gain}")
    console.echo(
        f"{result.wins:,} wins, {result.ties:,} ties, {result.losses:,} losses of {result.trained} against "
        f"{result.reference} on {result.prompts:,} prompts from {result.source}; "
        f"{result.unparsable_verdicts:,} without a readable verdict"
    )
    print_next_step(run)
