"""``rlaif generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.shared import (
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
    client_flags,
    engines_for,
    open_with,
    say_stopped,
    show_plan,
)
from rlaif.errors import UsageError


def generate(
    run: RunPath,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC", show_default=False, help="A packaged set, a file, hf:NAME, or a URL (s3://, gs://, az://)."
        ),
    ] = None,
    import_: Annotated[
        str | None,
        typer.Option("--import", metavar="SRC", show_default=False, help="Bring your own answers."),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Answers to each prompt.", show_default=False)] = None,
    model: Models = None,
    base_url: BaseUrls = None,
    temperature: Annotated[float | None, typer.Option(help="Of the sampling.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of an answer at most.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt for prompts without one.")] = None,
    heldout_share: Annotated[float | None, typer.Option(help="Share of prompts set aside for evaluation.")] = None,
    decontaminate: Annotated[
        list[str] | None, typer.Option(metavar="SRC", help="Leave out prompts that overlap this evaluation file.")
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
    """Sample answers to prompts, or --import them."""
    target, settings = open_with(
        run,
        {
            "prompts.source": prompts,
            "sampler.n": n,
            "sampler.model": model,
            "sampler.base_url": base_url,
            "sampler.temperature": temperature,
            "sampler.max_tokens": max_tokens,
            "sampler.system": system,
            "prompts.heldout_share": heldout_share,
            "prompts.decontaminate": decontaminate,
            "prompts.on_bad_row": on_bad_row,
            "prompts.limit": limit,
            "client.batch": batch,
            **client_flags(concurrency, seed, max_failures, budget_usd),
        },
        begins=True,
    )
    from rlaif import pipeline

    if import_ is not None:
        if prompts or model:
            raise UsageError("--import brings prompts and answers: --prompts and --model do not go with it")
        brought = pipeline.import_completions(target, settings, import_, console.Console())
        console.put(
            f"{brought.prompts:,} prompts with {brought.completions:,} answers ({brought.new:,} new) in {run}. "
            f"Next: rlaif judge {run}"
        )
        return
    if dry_run:
        show_plan(pipeline.plan_generate(target, settings))
        return
    with engines_for(target, settings) as engines:
        done = pipeline.generate(target, settings, console.Console(), engines)
    for reason, count in done.left_out.items():
        console.say(f"left out {count:,} prompts: {reason}")
    if done.heldout:
        console.say(f"held out {done.heldout:,} prompts for evaluation")
    say_stopped(done.stopped)
    console.put(f"{done.completions:,} answers to {done.prompts:,} prompts in {run}. Next: rlaif judge {run}")
