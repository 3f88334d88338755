"""``rlaif serve``."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.errors import UsageError


def serve(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", show_default=False, help="Serve this run's models.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="M", show_default=False, help="Or this one; or several."),
    ] = None,
    on: Annotated[Literal["ray"], typer.Option(help="What runs the servers.")] = "ray",
    replicas: Annotated[
        int | None, typer.Option(help="Copies of each; default: as many as there are GPUs for.", show_default=False)
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Up to so many, by load.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Where Ray Serve does not run yet.", show_default=False)] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave them up on a cluster that is there.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Take down what --detach left up.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The URLs as JSON.")] = False,
) -> None:
    """Keep models up on a Ray cluster until Ctrl-C.

    The cluster is that of RAY_ADDRESS, or one is started on this machine. A run with on = "ray" under [cluster] finds
    them; others are given the URL.
    """
    if bool(run) == bool(model):
        raise UsageError("name what to serve: a run, or --model M", mend="rlaif serve RUN, or rlaif serve --model NAME")
    from rlaif import settings
    from rlaif.llm.replica import Model
    from rlaif.pipeline import serving
    from rlaif.run.directory import open_run

    target = open_run(run) if run else None
    config = settings.load(
        run or Path(), {"cluster.on": on, "cluster.replicas": replicas, "cluster.max_replicas": max_replicas}
    )
    wanted = [Model(name) for name in model or []] or serving.models(config)
    watch = console.Console()
    if down:
        ended = serving.take_down(config, wanted, watch)
        console.put(f"taken down: {', '.join(ended) or 'nothing, none of them was up'}")
        return
    try:
        with serving.serving(target, config, wanted, watch, port=port, detached=detach) as urls:
            names = {each.application: each.name for each in wanted}
            if json:
                console.put_json([{"model": names[name], "base_url": url} for name, url in urls.items()])
            else:
                for name, url in urls.items():
                    console.put(f"{names[name]}: base_url = {dumps(url)}")
            console.say('in use by every run whose rlaif.toml has on = "ray" under [cluster] and the same settings')
            if detach:
                return
            sys.stdout.flush()
            console.say("Ctrl-C takes them down")
            serving.stay(wanted, watch)
    except KeyboardInterrupt:
        console.say("taken down")
