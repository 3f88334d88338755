"""``rlaif train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlaif.cli import console
from rlaif.cli.options import RunPath, Seed, config_as_judged, open_run_with_config


def train(
    run: RunPath,
    method: Annotated[
        Literal["dpo", "kto", "sft", "reward", "rloo", "ppo"] | None,
        typer.Option(help="How to train.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", show_default=False, help="Default: the run's policy.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Default: RUN/model.")
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora/--full", help="An adapter, or all weights.", show_default=False)
    ] = None,
    loss: Annotated[list[str] | None, typer.Option(help="A loss of TRL by name.", show_default=False)] = None,
    beta: Annotated[float | None, typer.Option(help="Strength of the KL term.", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="By method if not given.", show_default=False)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the pairs.", show_default=False)] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many.", show_default=False)] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="DIR", help="What rloo trains against.", show_default=False)
    ] = None,
    qlora: Annotated[bool | None, typer.Option("--qlora", help="The base in 4 bits.", show_default=False)] = None,
    launcher: Annotated[
        Literal["none", "accelerate"] | None, typer.Option(help="Several processes.", show_default=False)
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="On each machine; default: one a GPU.", show_default=False)
    ] = None,
    num_machines: Annotated[
        int | None,
        typer.Option(help="Given on each of them. Default: by Slurm, torchrun, Kubernetes.", show_default=False),
    ] = None,
    machine_rank: Annotated[int | None, typer.Option(help="Which of them this is, from 0.", show_default=False)] = None,
    main_process_address: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Where the first of them is.", show_default=False)
    ] = None,
    sharding: Annotated[
        Literal["fsdp", "deepspeed", "ddp"] | None, typer.Option(help="How weights are spread.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Train anew where settings or rows changed.", show_default=False)
    ] = None,
    seed: Seed = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the preflight, the first pair and the steps; train nothing.")
    ] = False,
) -> None:
    """Train on the dataset with TRL; ppo writes what verl trains with."""
    target, settings = open_run_with_config(
        run,
        {
            "train.method": method,
            "train.model": model,
            "train.output": str(output) if output else None,
            "train.lora": lora,
            "train.loss": loss,
            "train.launcher": launcher,
            "train.num_processes": num_processes,
            "train.num_machines": num_machines,
            "train.machine_rank": machine_rank,
            "train.main_process_address": main_process_address,
            "train.sharding": sharding,
            "train.reward_model": reward_model,
            "train.qlora": qlora,
            "train.beta": beta,
            "train.learning_rate": learning_rate,
            "train.epochs": epochs,
            "train.max_steps": max_steps,
            "train.overwrite": overwrite,
            "seed": seed,
        },
    )
    from rlaif import api
    from rlaif.train import methods

    settings = config_as_judged(target, settings, keep_seed=True)
    if dry_run:
        prepared, description = api.plan_train(target, settings)
        for finding in prepared.findings:
            console.echo(f"{finding.level}  {finding}")
        console.echo(f"the first pair as the model reads it:\n{prepared.example}")
        console.echo(f"{description}. Nothing was trained.")
        return
    if settings.train.method == "ppo":
        folder = api.export_for_verl(target, settings)
        console.echo(f"handed over to verl, which trains where its GPUs are: {folder / 'launch.sh'}")
        return
    result = api.train(target, settings, console.Console())
    unit = methods.get_method(settings.train.method).row_unit
    console.echo(f"trained on {result.pairs:,} {unit} in {result.steps:,} steps ({result.seconds:,.0f} s)")
    for name, path in result.paths().items():
        console.echo(f"{name}: {path}")
    if settings.train.method == "reward":  # which does not answer
        into = f"--reward-model {result.merged or 'DIR'} --output {run / 'rloo'}"
        next_command = f"rlaif train {run} --method rloo {into}"
    else:
        next_command = f"rlaif evaluate {run}"
    console.echo(f"Next: {next_command}")
