"""``rlaif generate``."""

from __future__ import annotations

from typing import Annotated

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
    Models,
    OnBadRow,
    RunPath,
    Seed,
    backends_for,
    client_flags,
    log_early_stop,
    open_run_with_config,
    print_dry_run,
    setting_option,
)
from rlaif.errors import UsageError


def generate(
    run: RunPath,
    prompts: Annotated[list[str] | None, setting_option("prompts.sources", metavar="SRC")] = None,
    import_: Annotated[
        str | None,
        typer.Option(
            "--import", metavar="SRC", show_default=False, help="Prompts with your own answers instead of sampling"
        ),
    ] = None,
    n: Annotated[int | None, setting_option("sampler.n", "-n")] = None,
    model: Models = None,
    base_url: BaseUrls = None,
    temperature: Annotated[float | None, setting_option("sampler.temperature")] = None,
    max_tokens: Annotated[int | None, setting_option("sampler.max_tokens")] = None,
    system: Annotated[str | None, setting_option("sampler.system")] = None,
    heldout_fraction: Annotated[float | None, setting_option("prompts.heldout_fraction")] = None,
    decontaminate_against: Annotated[
        list[str] | None, setting_option("prompts.decontaminate_against", metavar="SRC")
    ] = None,
    on_bad_row: OnBadRow = None,
    concurrency: Concurrency = None,
    seed: Seed = None,
    limit: Limit = None,
    max_failures: MaxFailures = None,
    budget_usd: Budget = None,
    batch: Batch = None,
    dry_run: DryRun = False,
) -> None:
    """Sample answers to prompts, or import your own"""
    target, settings = open_run_with_config(
        run,
        {
            "prompts.sources": prompts,
            "sampler.n": n,
            "sampler.model": model,
            "sampler.base_url": base_url,
            "sampler.temperature": temperature,
            "sampler.max_tokens": max_tokens,
            "sampler.system": system,
            "prompts.heldout_fraction": heldout_fraction,
            "prompts.decontaminate_against": decontaminate_against,
            "prompts.on_bad_row": on_bad_row,
            "prompts.limit": limit,
            "client.use_batch_api": batch,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
        creates_run=True,
    )
    from rlaif import api
    from rlaif.display_names import PROMPT_DROP_REASONS

    if import_ is not None:
        if prompts or model:
            raise UsageError("--import cannot be combined with --prompts or --model: it has both prompts and answers")
        imported = api.import_completions(target, settings, import_, console.Console())
        console.echo(
            f"{imported.prompts:,} prompts with {imported.completions:,} answers ({imported.new:,} new) in {run}. "
            f"Next: rlaif judge {run}"
        )
        return
    if dry_run:
        print_dry_run(api.plan_generate(target, settings))
        return
    with backends_for(target, settings) as backends:
        result = api.generate(target, settings, console.Console(), backends)
    for reason, count in result.dropped.items():
        console.log(f"dropped {count:,} prompts: {PROMPT_DROP_REASONS[reason]}")
    if result.heldout:
        console.log(f"held out {result.heldout:,} prompts for evaluation")
    log_early_stop(result.stop_reason, settings)
    console.echo(f"{result.completions:,} answers to {result.prompts:,} prompts in {run}. Next: rlaif judge {run}")
