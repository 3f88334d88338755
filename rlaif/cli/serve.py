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
        Path | None, typer.Argument(metavar="RUN", show_default=False, help="Serve this run's models.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="M", show_default=False, help="Or this one; or several."),
    ] = None,
    backend: Annotated[Literal["ray"], typer.Option(help="What runs the servers.")] = "ray",
    replicas: Annotated[int | None, setting_option("cluster.replicas")] = None,
    max_replicas: Annotated[int | None, setting_option("cluster.max_replicas")] = None,
    port: Annotated[int | None, typer.Option(help="Where Ray Serve does not run yet.", show_default=False)] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave them up on a cluster that is there.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Take down what --detach left up.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The URLs as JSON.")] = False,
) -> None:
    """Keep models up on a Ray cluster until Ctrl-C.

    The cluster is that of RAY_ADDRESS, or one is started on this machine. A run with backend = "ray" under [cluster]
    finds them; others are given the URL.
    """
    if bool(run) == bool(model):
        raise UsageError("name what to serve: a run, or --model M", hint="rlaif serve RUN, or rlaif serve --model NAME")
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
        console.echo(f"taken down: {', '.join(ended) or 'nothing, none of them was up'}")
        return
    try:
        with serve_models.serve_models(target, config, models, reporter, port=port, detached=detach) as urls:
            names = {served_model.application_name: served_model.name for served_model in models}
            if json:
                console.echo_json([{"model": names[name], "base_url": url} for name, url in urls.items()])
            else:
                for name, url in urls.items():
                    console.echo(f"{names[name]}: base_url = {dumps(url)}")
            console.log(
                'in use by every run whose rlaif.toml has backend = "ray" under [cluster] and the same settings'
            )
            if detach:
                return
            sys.stdout.flush()
            console.log("Ctrl-C takes them down")
            serve_models.watch_replicas(models, reporter)
    except KeyboardInterrupt:
        console.log("taken down")
