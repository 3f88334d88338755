"""``rlaif prompts``: list, show, create and check prompt sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console

MAX_ROWS_SHOWN = 20

prompts = typer.Typer(help="List, show, create and check prompt sets", no_args_is_help=True)


@prompts.command("list")
def list_prompts(json: Annotated[bool, typer.Option("--json", help="Output as JSON")] = False) -> None:
    """List the packaged prompt sets"""
    from rlaif import resources

    sizes = {}
    for name, path in resources.prompt_sets().items():
        sizes[name] = sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    if json:
        console.echo_json(sizes)
        return
    for name, size in sizes.items():
        console.echo(f"{name:<16} {size:>6,} prompts")


@prompts.command("show")
def show_prompts(name: Annotated[str, typer.Argument(metavar="SET", help="Name of a packaged prompt set")]) -> None:
    """Print a prompt set as JSON Lines"""
    from rlaif import resources
    from rlaif.errors import UsageError, did_you_mean

    sets = resources.prompt_sets()
    if name not in sets:
        raise UsageError(f"unknown prompt set {name!r}. {did_you_mean(name, sets)}")
    console.echo(sets[name].read_text(encoding="utf-8").rstrip("\n"))


@prompts.command("new")
def new_prompts(name: Annotated[str, typer.Argument(metavar="SET", help="Name of the new prompt set")]) -> None:
    """Create a prompt file to edit in ./prompts"""
    from rlaif.generate import prompt_scaffold

    path = prompt_scaffold.create_prompt_file(name)
    console.echo(f"created {path}, one prompt per line. Edit it, then run: rlaif prompts check {path}")


@prompts.command("check")
def check_prompts(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="Packaged set, file, hf:NAME, or URL (s3://, gs://, az://)"),
    ],
    json: Annotated[bool, typer.Option("--json", help="Output as JSON")] = False,
) -> None:
    """Report invalid rows, invalid checks and duplicates"""
    from rlaif.config.loader import load
    from rlaif.display_names import PROMPT_DROP_REASONS
    from rlaif.orchestrator import check_sources

    result = check_sources.check_sources(sources, load(Path(), {}))
    if json:
        console.echo_json(result.__dict__)
    else:
        for error in result.invalid[:MAX_ROWS_SHOWN]:
            console.log(error)
        if len(result.invalid) > MAX_ROWS_SHOWN:
            console.log(f"and {len(result.invalid) - MAX_ROWS_SHOWN:,} more")
        console.echo(f"prompts to ingest: {result.prompts:,}")
        console.echo(f"invalid rows: {len(result.invalid):,}")
        for reason, locations in result.dropped.items():
            shown = ", ".join(locations[:MAX_ROWS_SHOWN])
            ellipsis_ = ", ..." if len(locations) > MAX_ROWS_SHOWN else ""
            console.echo(f"dropped ({PROMPT_DROP_REASONS[reason]}): {len(locations):,} ({shown}{ellipsis_})")
    if result.invalid:
        raise typer.Exit(2)
