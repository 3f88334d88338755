"""``rlaif train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlaif.cli import console
from rlaif.cli.options import RunPath, Seed, config_as_judged, open_run_with_config, print_next_step, setting_option
from rlaif.config.choices import Launcher, Sharding, TrainMethod


def train(
    run: RunPath,
    method: Annotated[TrainMethod | None, setting_option("train.method")] = None,
    model: Annotated[str | None, setting_option("train.model", "--model", "-m", metavar="M")] = None,
    output: Annotated[Path | None, setting_option("train.output", "--output", "-o", metavar="DIR")] = None,
    lora: Annotated[bool | None, setting_option("train.lora", "--lora/--full")] = None,
    loss: Annotated[list[str] | None, setting_option("train.loss", metavar="NAME")] = None,
    beta: Annotated[float | None, setting_option("train.beta")] = None,
    learning_rate: Annotated[float | None, setting_option("train.learning_rate")] = None,
    epochs: Annotated[float | None, setting_option("train.epochs")] = None,
    max_steps: Annotated[int | None, setting_option("train.max_steps")] = None,
    reward_model: Annotated[str | None, setting_option("train.reward_model", metavar="DIR")] = None,
    qlora: Annotated[bool | None, setting_option("train.qlora", "--qlora")] = None,
    launcher: Annotated[Launcher | None, setting_option("train.launcher")] = None,
    num_processes: Annotated[int | None, setting_option("train.num_processes")] = None,
    num_machines: Annotated[int | None, setting_option("train.num_machines")] = None,
    machine_rank: Annotated[int | None, setting_option("train.machine_rank")] = None,
    main_process_address: Annotated[
        str | None, setting_option("train.main_process_address", metavar="HOST[:PORT]")
    ] = None,
    sharding: Annotated[Sharding | None, setting_option("train.sharding")] = None,
    overwrite: Annotated[bool | None, setting_option("train.overwrite", "--overwrite")] = None,
    seed: Seed = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the preflight, the first pair and the number of steps; train nothing"),
    ] = False,
) -> None:
    """Train a model on the dataset with TRL, or write the input of verl (ppo)"""
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
        console.echo(f"first pair as rendered for the model:\n{prepared.example}")
        console.echo(f"{description}. Nothing was trained.")
        return
    if settings.train.method == "ppo":
        folder = api.export_for_verl(target, settings)
        console.echo(f"wrote the input of verl; start the training on its GPUs with {folder / 'launch.sh'}")
        return
    result = api.train(target, settings, console.Console())
    unit = methods.get_method(settings.train.method).row_unit
    console.echo(f"trained on {result.pairs:,} {unit} in {result.steps:,} steps ({result.seconds:,.0f} s)")
    for name, path in result.paths().items():
        console.echo(f"{name}: {path}")
    print_next_step(run)
