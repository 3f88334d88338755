"""The next iteration: rlaif init NEXT --from RUN."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif.config.loader import load
from rlaif.config.models import Config
from rlaif.config.template import render_template
from rlaif.report.report_data import list_iterations
from rlaif.run.run import Run

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def first(tmp_path: Path) -> Run:
    """Create a run that was generated, judged and trained with flags that are not in its rlaif.toml."""
    run = Run(tmp_path / "first")
    config = Config.model_validate(
        {
            "seed": 3,
            "prompts": {"sources": ["mine.jsonl"], "heldout_fraction": 0.2},
            "sampler": {"model": ["org/base"], "n": 6, "vllm": {"max_model_len": 512, "tricky \"name": "a\\b"}},
            "panel": [{"name": "helpful", "model": "org/judge", "base_url": ["http://judge/v1"], "weight": 2.0}],
            "pairs": {"human_fraction": 0.3},
            "train": {"learning_rate": 5e-5, "output": str(run.path / "elsewhere"), "trl": {"warmup_steps": 3}},
        }
    )  # fmt: skip
    run.journals.mkdir(parents=True)
    for stage in ("generate", "judge", "train"):
        run.start_stage(stage, config)
        run.finish_stage(stage)
    merged = run.path / "elsewhere" / "merged"
    merged.mkdir(parents=True)
    stored = {"identity": {"model": "org/base", "method": "dpo"}, "result": {"merged": str(merged), "output": "o"}}
    (run.path / "elsewhere" / "training.json").write_text(json.dumps(stored))
    return run


def test_the_trained_model_becomes_the_policy_and_other_settings_stay(first: Run, tmp_path: Path, rlaif: Cli) -> None:
    second = tmp_path / "rounds" / "second"
    assert f"rlaif generate {second}" in rlaif("init", second, "--from", first.path).stdout
    config = load(second, {}, {})
    first_config = Config.model_validate(first.manifest()["stages"]["train"]["config"])
    assert config.sampler.model == [str(first.path / "elsewhere" / "merged")]
    assert config.sampler.model_copy(update={"model": first_config.sampler.model}) == first_config.sampler
    assert (config.seed, config.prompts, config.panel, config.pairs) == (
        3, first_config.prompts, first_config.panel, first_config.pairs,
    )  # fmt: skip
    assert config.train == first_config.train.model_copy(update={"output": None})
    assert config.iteration.previous_run == "../../first"
    text = (second / "rlaif.toml").read_text()
    assert text.count("\n# ") > 60  # the template's comments are still there
    assert [iteration.run for iteration in list_iterations(Run(second))] == ["first", "second"]
    assert list_iterations(Run(second))[0].policies == ["org/base"]


def test_the_next_iteration_may_have_fresh_prompts(first: Run, tmp_path: Path, rlaif: Cli) -> None:
    rlaif("init", tmp_path / "second", "--from", first.path, "--prompts", "fresh.jsonl")
    assert load(tmp_path / "second", {}, {}).prompts.sources == ["fresh.jsonl"]
    assert "--prompts needs --from" in rlaif("init", tmp_path / "x", "--prompts", "fresh.jsonl", code=2).stderr


def test_a_run_without_a_trained_model_has_no_next_iteration(first: Run, tmp_path: Path, rlaif: Cli) -> None:
    path = first.path / "elsewhere" / "training.json"
    training_json = json.loads(path.read_text())
    path.write_text(json.dumps({**training_json, "result": {"merged": None, "adapter": "a"}}))
    assert "merge = true" in rlaif("init", tmp_path / "second", "--from", first.path, code=2).stderr
    path.unlink()
    assert "no trained model" in rlaif("init", tmp_path / "second", "--from", first.path, code=2).stderr
    assert not (tmp_path / "second").exists()


def test_default_settings_render_the_template() -> None:
    # Values that are only in the template, not in the defaults, become comments.
    expected = render_template({}).replace('sources = ["everyday"]', '# sources = ["everyday"]', 1)
    expected = expected.replace('model = ["demo"]', '# model = ["demo"]', 1).replace(
        'model = "demo"', '# model = "demo"', 1
    )
    assert render_template(Config().model_dump(mode="json")).replace("\npanel = ", "\n# panel = ") == expected.replace(
        "\npanel = ", "\n# panel = "
    )
