"""``rlaif serve``."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.options import setting_option
from rlaif.errors import UsageError


def serve(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", show_default=False, help="Run whose models are served", callback=console.remember_run
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="M",
            show_default=False,
            help="Model to serve instead of a run's; repeat for several",
        ),
    ] = None,
    backend: Annotated[Literal["ray"], typer.Option(help="Cluster software")] = "ray",
    replicas: Annotated[int | None, setting_option("cluster.replicas")] = None,
    max_replicas: Annotated[int | None, setting_option("cluster.max_replicas")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of Ray Serve, if it is not running yet [default: 8000]", show_default=False)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the models running on an existing cluster")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the models that --detach left running")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the URLs as JSON")] = False,
) -> None:
    """Serve models on a Ray cluster until Ctrl-C

    RAY_ADDRESS names the cluster. Without it, rlaif starts one on this machine. Runs with backend = "ray" under
    [cluster] find the models; other runs need the URL.
    """
    if bool(run) == bool(model):
        given = f"both {run} and --model" if run else "neither"
        raise UsageError(
            f"`rlaif serve` expects either a run or --model, got {given}",
            hint="Give one of them: `rlaif serve RUN` or `rlaif serve --model NAME`.",
        )
    from rlaif.config import loader
    from rlaif.orchestrator import serve_models
    from rlaif.run.run import open_run
    from rlaif.serving.ray_replica import ServedModel

    target = open_run(run) if run else None
    config = loader.load(
        run or Path(), {"cluster.backend": backend, "cluster.replicas": replicas, "cluster.max_replicas": max_replicas}
    )
    models = [ServedModel(name) for name in model or []] or serve_models.models_to_serve(config)
    reporter = console.Console()
    if stop:
        ended = serve_models.stop_models(config, models, reporter)
        console.echo(f"stopped: {', '.join(ended) or 'nothing, none of the models was running'}")
        return
    try:
        with serve_models.serve_models(target, config, models, reporter, port=port, detached=detach) as urls:
            names = {served_model.application_name: served_model.name for served_model in models}
            if json:
                console.echo_json([{"model": names[name], "base_url": url} for name, url in urls.items()])
            else:
                for name, url in urls.items():
                    console.echo(f"{names[name]}: base_url = {dumps(url)}")
            console.log('runs with backend = "ray" under [cluster] and the same settings use these models')
            if detach:
                return
            sys.stdout.flush()
            console.log("Press Ctrl-C to stop the models")
            serve_models.watch_replicas(models, reporter)
    except KeyboardInterrupt:
        console.log("models stopped")
