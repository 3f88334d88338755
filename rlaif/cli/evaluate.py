"""``rlaif evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

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
    as_judged,
    client_flags,
    engines_for,
    open_with,
    say_stopped,
    show_plan,
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
    target, settings = open_with(
        run,
        {
            "evaluate.judges": judge,
            "evaluate.model": model,
            "evaluate.base_url": base_url,
            "evaluate.source": prompts,
            "evaluate.limit": limit,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
    )
    from rlaif import pipeline

    settings = as_judged(target, settings, own_seed=True)
    if dry_run:
        show_plan(pipeline.plan_evaluate(target, settings))
        return
    with engines_for(target, settings) as engines:
        told = pipeline.evaluate(target, settings, console.Console(), engines)
    say_stopped(told["stopped"])
    for warning in told["warnings"]:
        console.say(f"warning: {warning}")
    if json:
        console.put_json(told)
        return
    for name in ("win_rate", "length_controlled_win_rate", "length_ratio", "kl_per_answer", "kl_per_token"):
        if told[name]:
            console.put(f"{name.replace('_', ' ')}: {_interval(told[name])}")
    for row in told["refusals"]:
        both = (f"{name} {_interval(row.get(name))}" for name in ("reference", "trained"))
        console.put(f"refused of prompts {row['prompts']}: {', '.join(both)}")
    if told["checks"]:
        console.put(
            "checks met: " + ", ".join(f"{name} {_interval(found)}" for name, found in map(dict.values, told["checks"]))
        )
    console.put(
        f"{told['wins']:,} wins, {told['ties']:,} ties, {told['losses']:,} losses of {told['trained']} against "
        f"{told['reference']} on {told['prompts']:,} of {told['source']}; "
        f"{told['without a readable verdict']:,} without a readable verdict. "
        f"Next: rlaif report {run}"
    )


def _interval(found: dict[str, Any] | None) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] (n = {found['n']:,})" if found else "none"
