"""``rlaif config``."""

from __future__ import annotations

import typer

from rlaif.cli import console

config = typer.Typer(help="Describe the settings", no_args_is_help=True)


@config.callback()
def _config() -> None:
    """Keep `schema` a command of its own: typer would merge a group's only command into the group."""


@config.command("schema")
def print_schema() -> None:
    """Print the JSON schema of rlaif.toml, for completion and checks in an editor

    Save it with `rlaif config schema > rlaif.schema.json`, and put the line `#:schema rlaif.schema.json` at the top of
    rlaif.toml.
    """
    from rlaif.config.schema import json_schema

    console.echo_json(json_schema())
