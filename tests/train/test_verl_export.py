"""The input of verl: verl's own configuration parser reads the arguments that ``launch.sh`` passes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif import api
from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.run.run import Run
from rlaif.train import verl_export
from tests.conftest import needs_tools
from tests.labeling.test_judging import QuietReporter

COMPOSE = """
import importlib.util, json, sys
import hydra, omegaconf
from hydra.errors import HydraException
(folder,) = importlib.util.find_spec("verl").submodule_search_locations
with hydra.initialize_config_dir(folder + "/trainer/config", version_base=None):
    try:
        config = hydra.compose("ppo_trainer", overrides=sys.argv[1:])
    except HydraException as error:
        sys.exit(str(error))
print(json.dumps(omegaconf.OmegaConf.to_container(config, resolve=True)))
"""
"""Composes the configuration like verl.trainer.main_ppo, whose import would need everything that verl trains with."""


def compose(overrides: list[str]) -> subprocess.CompletedProcess[str]:
    python = needs_tools("verl", "hydra")
    return subprocess.run([python, "-c", COMPOSE, *overrides], capture_output=True, text=True)


def launch_arguments(script: Path, tmp_path: Path, *more: str) -> list[str]:
    """Run the launch script with a ``python`` that prints its arguments, and return them."""
    fake_python = tmp_path / "bin" / "python"
    fake_python.parent.mkdir(exist_ok=True)
    fake_python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    fake_python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake_python.parent}:{os.environ['PATH']}"}
    done = subprocess.run([script, *more], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\0").split("\0")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    reward = tmp_path / "reward, the first"  # without quotes, Hydra would parse this as a list
    reward.mkdir()
    (reward / "config.json").write_text("{}")
    train_settings = {
        "method": "ppo",
        "model": str(tmp_path),
        "beta": 0.02,
        "output": str(tmp_path / "it's (out)"),
        "reward_model": str(reward),
        "num_processes": 2,
        "max_length": 256,
        "save_steps": 7,
    }
    return Config.model_validate({"train": train_settings})


def test_verl_reads_the_launch_script_and_the_data(run: Run, config: Config, tmp_path: Path) -> None:
    folder = api.export_for_verl(run, config)
    module, name, *overrides = launch_arguments(folder / "launch.sh", tmp_path)
    assert (module, name) == ("-m", "verl.trainer.main_ppo")
    process = compose(overrides)
    assert process.returncode == 0, process.stderr
    read_as: dict[str, Any] = json.loads(process.stdout)

    reward = read_as["reward"]["reward_model"]
    assert (reward["enable"], Path(reward["model_path"])) == (True, Path(str(config.train.reward_model)))
    assert (Path(reward["model_path"]) / "config.json").exists()
    assert read_as["algorithm"]["kl_ctrl"]["kl_coef"] == 0.02
    assert (read_as["algorithm"]["adv_estimator"], read_as["algorithm"]["use_kl_in_reward"]) == ("gae", True)
    assert read_as["actor_rollout_ref"]["model"]["path"] == read_as["critic"]["model"]["path"] == str(tmp_path)
    assert (read_as["trainer"]["n_gpus_per_node"], read_as["trainer"]["logger"]) == (2, ["console"])
    assert read_as["trainer"]["default_local_dir"] == str(folder / "checkpoints")
    assert read_as["trainer"]["save_freq"] == 7
    batch = read_as["data"]["train_batch_size"]
    assert (
        batch
        == read_as["actor_rollout_ref"]["actor"]["ppo_mini_batch_size"]
        == read_as["critic"]["ppo_mini_batch_size"]
    )

    # The columns are those that its dataset reads, with the names from its settings.
    data = read_as["data"]
    for setting, count in (("train_files", 16), ("val_files", 4)):
        prompts = pl.read_parquet(data[setting])
        assert prompts.height == count
        assert {data["prompt_key"], data["reward_fn_key"], "reward_model", "extra_info"} <= set(prompts.columns)
        assert prompts[data["prompt_key"]][0].to_list()[0]["content"].startswith("Name a colour. (")
        assert prompts["extra_info"].struct.field("index").to_list() == list(range(count))
        assert prompts["reward_model"].struct.field("ground_truth").to_list() == [""] * count
    assert batch <= 16  # otherwise the only batch would be dropped, and nothing trained


def test_without_held_out_pairs_verl_validates_on_the_training_prompts(run: Run, config: Config) -> None:
    """verl does not start without validation prompts, and an empty file lacks the columns that it reads."""
    test = run.dataset / "test.parquet"
    pl.read_parquet(test).clear().write_parquet(test)
    folder = verl_export.export_verl(run, config)
    (train, validation) = (pl.read_parquet(folder / f"{name}.parquet") for name in ("train", "test"))
    assert validation.equals(train)
    test.unlink()
    assert pl.read_parquet(verl_export.export_verl(run, config) / "test.parquet").equals(train)


def test_verl_rejects_unknown_settings(run: Run, config: Config, tmp_path: Path) -> None:
    """This shows that the test above can fail. Arguments of the launch script override its settings."""
    overrides = launch_arguments(api.export_for_verl(run, config) / "launch.sh", tmp_path, "trainer.nnodes=3")[2:]
    assert json.loads(compose(overrides).stdout)["trainer"]["nnodes"] == 3
    misspelled = [override.replace("kl_ctrl.kl_coef", "kl_ctrl.kl_coeff") for override in overrides]
    process = compose(misspelled)
    assert process.returncode == 1
    assert "kl_coeff" in process.stderr


def test_an_export_without_reward_model_or_enough_prompts_is_rejected(run: Run, config: Config) -> None:
    train = config.train
    with pytest.raises(UsageError, match="a reward model is required"):
        verl_export.export_verl(
            run, config.model_copy(update={"train": train.model_copy(update={"reward_model": None})})
        )
    with pytest.raises(UsageError, match="16 prompts cannot be divided among 17 GPUs"):
        verl_export.export_verl(
            run, config.model_copy(update={"train": train.model_copy(update={"num_processes": 17})})
        )
    with pytest.raises(UsageError, match="verl trains"):
        api.train(run, config, QuietReporter())
