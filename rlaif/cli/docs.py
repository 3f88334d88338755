"""``rlaif docs``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console


def docs(json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False) -> None:
    """List the documentation and examples of this version, which are files on this machine"""
    from rlaif import resources

    folders = {kind: resources.data_dir(kind) for kind in ("docs", "examples")}
    files = {
        kind: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix == ".md")
        for kind, folder in folders.items()
    }
    if json:
        console.echo_json({kind: {"folder": str(folders[kind]), "files": files[kind]} for kind in folders})
        return
    for kind, folder in folders.items():
        console.echo(f"{kind}: {folder}")
        for name in files[kind]:
            console.echo(f"  {name}")
