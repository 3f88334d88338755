"""``rlaif``: the list of commands. Each is in the module of its name."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.config import config
from rlaif.cli.docs import docs
from rlaif.cli.doctor import doctor
from rlaif.cli.evaluate import evaluate
from rlaif.cli.examples import epilog
from rlaif.cli.export import export
from rlaif.cli.generate import generate
from rlaif.cli.init import init
from rlaif.cli.judge import judge
from rlaif.cli.judges import judges
from rlaif.cli.plan import plan
from rlaif.cli.prompts import prompts
from rlaif.cli.report import report
from rlaif.cli.review import review
from rlaif.cli.run import run
from rlaif.cli.serve import serve
from rlaif.cli.status import status
from rlaif.cli.train import train

app = typer.Typer(
    name="rlaif",
    help="Turn prompts and a rubric into a preference dataset and a better model\n\n"
    "`rlaif init RUN` creates a run. `rlaif run RUN` executes all stages; generate, judge, review and train "
    "execute one each. Rerun any command to resume it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (
    init,
    plan,
    run,
    generate,
    judge,
    review,
    train,
    evaluate,
    report,
    export,
    status,
    serve,
    doctor,
    docs,
):
    app.command(epilog=epilog(command.__name__))(command)
for group, name in ((judges, "judges"), (prompts, "prompts"), (config, "config")):
    for registered in group.registered_commands:
        registered.epilog = epilog(f"{name} {registered.name}")
    app.add_typer(group, name=name)


def _print_version(requested: bool) -> None:
    if requested:
        import rlaif

        console.echo(f"rlaif {rlaif.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error")] = False,
    _asked: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    console.verbose = verbose


def main() -> None:
    console.run_and_exit(lambda: app(standalone_mode=True))
