"""The commands about what comes with rlaif and with the machine: judges, prompts, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from rlaif.cli import console

Json = Annotated[bool, typer.Option("--json", help="The same as JSON.")]

judges = typer.Typer(help="The judges: list, show, check.", no_args_is_help=True)
prompts = typer.Typer(help="The packaged prompt sets: list, show.", no_args_is_help=True)


@judges.command("list")
def list_judges(json: Json = False) -> None:
    """The judges there are: packaged, and in ./judges."""
    from rlaif.judge import definition

    found = [definition.load(folder) for folder in definition.folders().values()]
    if json:
        console.put_json(
            [{**judge.file.model_dump(), "hash": judge.hash, "folder": str(judge.folder)} for judge in found]
        )
        return
    for judge in found:
        console.put(f"{judge.name:<16} {judge.file.kind:<8} version {judge.file.version:<4} {judge.file.description}")


@judges.command("show")
def show_judge(name: str) -> None:
    """A judge's prompt and settings."""
    from rlaif.judge import definition

    judge = definition.find(name)
    console.put(f"# {judge.folder}\n")
    console.put((judge.folder / "judge.toml").read_text(encoding="utf-8"))
    console.put((judge.folder / "prompt.md").read_text(encoding="utf-8"))


@judges.command("check")
def check_judge(name: str) -> None:
    """Read a judge's files and say whether they can be used."""
    from rlaif.judge import definition

    judge = definition.find(name)
    console.put(f"{judge.name} version {judge.file.version} ({judge.file.kind}), hash {judge.hash}: good")


@prompts.command("list")
def list_prompts(json: Json = False) -> None:
    """The packaged prompt sets."""
    from rlaif import packaged

    sizes = {name: sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
             for name, path in packaged.prompt_sets().items()}  # fmt: skip
    if json:
        console.put_json(sizes)
        return
    for name, size in sizes.items():
        console.put(f"{name:<16} {size:>6,} prompts")


@prompts.command("show")
def show_prompts(name: str) -> None:
    """A set's prompts, as JSON Lines."""
    from rlaif import packaged
    from rlaif.errors import UsageError, did_you_mean

    sets = packaged.prompt_sets()
    if name not in sets:
        raise UsageError(f"there is no prompt set {name!r}. {did_you_mean(name, sets)}")
    console.put(sets[name].read_text(encoding="utf-8").rstrip("\n"))


def doctor(json: Json = False) -> None:
    """What this machine has and lacks."""
    from rlaif.report import doctor as examining

    findings = examining.examine()
    if json:
        console.put_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            console.put(f"{finding.mark:<5} {finding.what:<18} {finding.told}")
            if finding.mend:
                console.put(f"{'':<24} {finding.mend}")
    if any(finding.mark == "lacks" for finding in findings):
        raise typer.Exit(4)
