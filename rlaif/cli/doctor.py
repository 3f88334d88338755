"""``rlaif doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="Run directory, to suggest vLLM settings for its models",
            callback=console.remember_run,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="M", show_default=False, help="Model to suggest vLLM settings for (repeatable)"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Output as JSON")] = False,
) -> None:
    """Check the machine and the installation; suggest vLLM settings"""
    from rlaif.report.doctor import diagnose

    models = {**(_models_served_here(run) if run else {}), **dict.fromkeys(model or [], "sampler.vllm")}
    findings = diagnose(models)
    if json:
        console.echo_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            console.echo(f"{finding.level:<5} {finding.subject:<18} {finding.message}")
            if finding.hint:
                console.echo(f"{'':<24} {finding.hint}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(4)


def _models_served_here(run: Path) -> dict[str, str]:
    """Map each model that rlaif itself serves for ``run`` to the section that holds its vLLM settings."""
    from rlaif.config import loader
    from rlaif.run.run import open_run

    config = loader.load(open_run(run).path, {})
    models = {member.model: "judge.vllm" for member in config.panel_members() if not member.base_url}
    models |= {policy.model: "sampler.vllm" for policy in config.policies_resolved() if not policy.base_url}
    return models
