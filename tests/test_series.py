"""The next round: rlaif init NEXT --from RUN."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif.config import Config
from rlaif.report.gather import rounds
from rlaif.run.directory import Run
from rlaif.settings import filled, load, template

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def first(tmp_path: Path) -> Run:
    """A run that was generated, judged and trained with flags that no file has."""
    run = Run(tmp_path / "first")
    config = Config.model_validate(
        {
            "seed": 3,
            "prompts": {"source": ["mine.jsonl"], "heldout_share": 0.2},
            "sampler": {"model": ["org/base"], "n": 6, "vllm": {"max_model_len": 512, "tricky \"name": "a\\b"}},
            "judges": [{"name": "helpful", "model": "org/judge", "base_url": ["http://judge/v1"], "weight": 2.0}],
            "pairs": {"human_share": 0.3},
            "train": {"learning_rate": 5e-5, "output": str(run.path / "elsewhere"), "extra": {"warmup_steps": 3}},
        }
    )  # fmt: skip
    run.journals.mkdir(parents=True)
    for stage in ("generate", "judge", "train"):
        run.begin(stage, config)
        run.end(stage)
    merged = run.path / "elsewhere" / "merged"
    merged.mkdir(parents=True)
    stored = {"identity": {"model": "org/base", "method": "dpo"}, "result": {"merged": str(merged), "output": "o"}}
    (run.path / "elsewhere" / "training.json").write_text(json.dumps(stored))
    return run


def test_the_trained_model_answers_and_the_rest_is_as_it_ran(first: Run, tmp_path: Path, rlaif: Cli) -> None:
    second = tmp_path / "rounds" / "second"
    assert f"rlaif generate {second}" in rlaif("init", second, "--from", first.path).stdout
    config = load(second, {}, {})
    before = Config.model_validate(first.manifest()["stages"]["train"]["config"])
    assert config.sampler.model == [str(first.path / "elsewhere" / "merged")]
    assert config.sampler.model_copy(update={"model": before.sampler.model}) == before.sampler
    assert (config.seed, config.prompts, config.judges, config.pairs) == (
        3, before.prompts, before.judges, before.pairs,
    )  # fmt: skip
    assert config.train == before.train.model_copy(update={"output": None})
    assert config.round.previous == "../../first"
    text = (second / "rlaif.toml").read_text()
    assert text.count("\n# ") > 60  # the template's comments are still there
    assert [each["run"] for each in rounds(Run(second))] == ["first", "second"]
    assert rounds(Run(second))[0]["policies"] == ["org/base"]


def test_fresh_prompts(first: Run, tmp_path: Path, rlaif: Cli) -> None:
    rlaif("init", tmp_path / "second", "--from", first.path, "--prompts", "fresh.jsonl")
    assert load(tmp_path / "second", {}, {}).prompts.source == ["fresh.jsonl"]
    assert "--prompts goes with --from" in rlaif("init", tmp_path / "x", "--prompts", "fresh.jsonl", code=2).stderr


def test_a_run_without_a_model_has_no_next_round(first: Run, tmp_path: Path, rlaif: Cli) -> None:
    path = first.path / "elsewhere" / "training.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "result": {"merged": None, "adapter": "a"}}))
    assert "merge = true" in rlaif("init", tmp_path / "second", "--from", first.path, code=2).stderr
    path.unlink()
    assert "no trained model is there" in rlaif("init", tmp_path / "second", "--from", first.path, code=2).stderr
    assert not (tmp_path / "second").exists()


def test_defaults_give_the_template_back() -> None:
    assert filled({}) == template()
    # What the template sets by itself, and the settings do not have, is shown only.
    nothing = template().replace('source = ["everyday"]', '# source = ["everyday"]', 1)
    nothing = nothing.replace('model = ["demo"]', '# model = ["demo"]', 1).replace(
        'model = "demo"', '# model = "demo"', 1
    )
    assert filled(Config().model_dump(mode="json")).replace("\njudges = ", "\n# judges = ") == nothing.replace(
        "\njudges = ", "\n# judges = "
    )
