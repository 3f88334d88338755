"""``rlaif evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlaif.cli import console
from rlaif.cli.options import (
    Budget,
    Concurrency,
    DryRun,
    Limit,
    MaxFailures,
    RunPath,
    Seed,
    backends_for,
    client_flags,
    config_as_judged,
    log_early_stop,
    open_run_with_config,
    print_dry_run,
)


def evaluate(
    run: RunPath,
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[@MODEL]", show_default=False, help="Default: the judges that labelled."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="J", show_default=False, help="The model that judges.")
    ] = None,
    base_url: Annotated[
        list[str] | None, typer.Option(metavar="URL", show_default=False, help="Where the judge is served.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", show_default=False, help="Default: the prompts that were held out."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="What was measured, as JSON.")] = False,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    dry_run: DryRun = False,
) -> None:
    """The trained model against its reference. Win rate, length, refusals, drift."""
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

    settings = config_as_judged(target, settings, keep_seed=True)
    if dry_run:
        print_dry_run(api.plan_evaluate(target, settings))
        return
    with backends_for(target, settings) as backends:
        result = api.evaluate(target, settings, console.Console(), backends)
    log_early_stop(result["stopped"])
    for warning in result["warnings"]:
        console.log(f"warning: {warning}")
    if json:
        console.echo_json(result)
        return
    for name in ("win_rate", "length_controlled_win_rate", "length_ratio", "kl_per_answer", "kl_per_token"):
        if result[name]:
            console.echo(f"{name.replace('_', ' ')}: {_format_interval(result[name])}")
    for row in result["refusals"]:
        parts = (f"{name} {_format_interval(row.get(name))}" for name in ("reference", "trained"))
        console.echo(f"refused of prompts {row['prompt_class']}: {', '.join(parts)}")
    if result["checks"]:
        console.echo(
            "checks met: "
            + ", ".join(f"{name} {_format_interval(estimate)}" for name, estimate in map(dict.values, result["checks"]))
        )
    console.echo(
        f"{result['wins']:,} wins, {result['ties']:,} ties, {result['losses']:,} losses of {result['trained']} against "
        f"{result['reference']} on {result['prompts']:,} of {result['source']}; "
        f"{result['unparsable_verdicts']:,} without a readable verdict. "
        f"Next: rlaif report {run}"
    )


def _format_interval(estimate: dict[str, Any] | None) -> str:
    return (
        f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}] (n = {estimate['n']:,})"
        if estimate
        else "none"
    )
