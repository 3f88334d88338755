"""When a server is kept for the next stage, and when it has to be started with other settings. With a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif import pipeline
from rlaif.config import ClientConfig
from rlaif.llm.budget import Meter
from rlaif.llm.client import Client
from rlaif.llm.engines import Engines, Local
from rlaif.llm.server import differences
from rlaif.run.directory import Run
from rlaif.settings import load
from tests.conftest import write_jsonl
from tests.llm.test_server import Make, make, said, serving  # noqa: F401  fixtures
from tests.test_pipeline import Quiet

Ask = Callable[[str, dict[str, Any]], Client]


@pytest.fixture
def ask(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Ask:  # noqa: F811
    """``ask(model, options)``: a client of one :class:`Engines` whose servers are stand-ins."""

    def new(model: str, options: dict[str, Any], *_: Any) -> Any:
        return make("serve", model=model, options=options)

    monkeypatch.setattr("rlaif.llm.engines.Server", new)
    engines = Engines(tmp_path, ClientConfig(), said.append)
    return lambda model, options: engines.client(model, [], options, Meter())


def starts(lines: list[str]) -> int:
    return sum(line.startswith("starting vLLM") for line in lines)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_model_len": 2048}, {"max-model-len": 2048}, {"dtype": "float32"}, {"enforce_eager": True}],
)
def test_a_server_with_the_same_command_line_is_kept(ask: Ask, said: list[str], options: dict[str, Any]) -> None:  # noqa: F811
    """However its options are written: float32 is what this CPU gets anyway, and so on."""
    before = {"max_model_len": 2048} if "max_model_len" in str(options).replace("-", "_") else {}
    first, second = ask("some/model", before), ask("some/model", options)
    assert first.url == second.url
    assert starts(said) == 1


def test_other_options_start_it_again_and_it_says_which(ask: Ask, said: list[str]) -> None:  # noqa: F811
    """The judge of a model that samples too must not run on the sampler's settings."""
    ask("some/model", {"max_model_len": 2048, "enable_prefix_caching": False})
    ask("some/model", {"hf_overrides": {"a": 1}})
    assert starts(said) == 2
    (line,) = [line for line in said if line.startswith("restarting")]
    assert line == (
        "restarting vLLM with some/model: max_model_len 4096 instead of 2048, max_num_batched_tokens 4096 instead of "
        '2048, no_enable_prefix_caching unset instead of on, hf_overrides {"a": 1} instead of unset'
    )


def test_an_adapter_that_is_served_beside_its_base_counts(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "rlaif.llm.engines.Server", lambda model, options, *_: make("serve", model=model, options=options)
    )
    with Engines(tmp_path, ClientConfig(), said.append) as engines:
        engines.client("base", [], {}, Meter())
        engines.know(Local("tuned", str(tmp_path / "adapter"), "base"))
        engines.client("tuned", [], {}, Meter())
        engines.client("base", [], {}, Meter())
    assert starts(said) == 2
    (line,) = [line for line in said if line.startswith("restarting")]
    assert "enable_lora on instead of unset" in line
    assert f"lora_modules tuned={tmp_path / 'adapter'} instead of unset" in line


def test_differences_are_named_as_in_rlaif_toml() -> None:
    assert differences(["--model", "m", "--a-b", "1", "--x"], ["--model", "m", "--a-b", "2", "--c", "3", "4"]) == [
        "a_b 2 instead of 1", "x unset instead of on", "c 3 4 instead of unset",
    ]  # fmt: skip
    assert differences(["--model", "m"], ["--model", "m"]) == []


def test_a_night_of_one_model_starts_vllm_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]  # noqa: F811
) -> None:  # fmt: skip
    """Pilot, generate and judge: four stages one after the other."""
    monkeypatch.setattr(
        "rlaif.llm.engines.Server", lambda model, options, *_: make("serve", model=model, options=options)
    )
    run = tmp_path / "run"
    run.mkdir()
    source = write_jsonl(run / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(12)])
    (run / "rlaif.toml").write_text(f"""
[prompts]
source = ["{source}"]
heldout_share = 0.0
[sampler]
model = ["some/model"]
n = 2
[judge]
judges = ["helpful"]
model = "some/model"
[client]
concurrency = 2
[run]
pilot = 4
""")
    told = pipeline.whole_night(Run(run), load(run, {}), Quiet())
    assert told.built is not None
    assert told.built.candidates == 12
    assert starts(said) == 1
    assert not [line for line in said if line.startswith("restarting")]
