"""Reuse of a server by the next stage, and its restart with other settings. Uses a fake vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif import api
from rlaif.config.loader import load
from rlaif.config.models import ClientConfig
from rlaif.llm.backends import LocalModel, ModelBackends
from rlaif.llm.client import Client
from rlaif.llm.usage import UsageMeter
from rlaif.run.run import Run
from rlaif.serving.vllm_server import describe_changes
from tests.conftest import write_jsonl
from tests.labeling.test_judging import QuietReporter
from tests.serving.test_vllm_server import Make, log_lines, make  # noqa: F401  # fixtures

MakeClient = Callable[[str, dict[str, Any]], Client]


@pytest.fixture
def make_client(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> MakeClient:
    """Return ``make_client(model, options)``: a client of one :class:`ModelBackends` whose servers are fake vLLMs."""

    def new(model: str, options: dict[str, Any], *_: Any) -> Any:
        return make("serve", model=model, options=options)

    monkeypatch.setattr("rlaif.llm.backends.VllmServer", new)
    backends = ModelBackends(tmp_path, ClientConfig(), log_lines.append)
    return lambda model, options: backends.client_for(model, [], options, UsageMeter())


def count_starts(lines: list[str]) -> int:
    return sum(line.startswith("starting vLLM") for line in lines)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_model_len": 2048}, {"max-model-len": 2048}, {"dtype": "float32"}, {"enforce_eager": True}],
)
def test_a_server_with_the_same_command_line_is_kept(
    make_client: MakeClient, log_lines: list[str], options: dict[str, Any]
) -> None:
    """The spelling of options does not matter, nor options that equal the defaults: this CPU uses float32 anyway."""
    before = {"max_model_len": 2048} if "max_model_len" in str(options).replace("-", "_") else {}
    first, second = make_client("some/model", before), make_client("some/model", options)
    assert first.url == second.url
    assert count_starts(log_lines) == 1


def test_other_options_restart_the_server_and_are_logged(make_client: MakeClient, log_lines: list[str]) -> None:
    """A model that is both policy and judge must not judge with the policy's settings."""
    make_client("some/model", {"max_model_len": 2048, "enable_prefix_caching": False})
    make_client("some/model", {"hf_overrides": {"a": 1}})
    assert count_starts(log_lines) == 2
    (line,) = [line for line in log_lines if line.startswith("restarting")]
    assert line == (
        "restarting vLLM with some/model: max_model_len 4096 instead of 2048, max_num_batched_tokens 4096 instead of "
        '2048, no_enable_prefix_caching unset instead of on, hf_overrides {"a": 1} instead of unset'
    )


def test_a_new_adapter_restarts_the_server_of_its_base(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(
        "rlaif.llm.backends.VllmServer", lambda model, options, *_: make("serve", model=model, options=options)
    )
    with ModelBackends(tmp_path, ClientConfig(), log_lines.append) as backends:
        backends.client_for("base", [], {}, UsageMeter())
        backends.register_local_model(LocalModel("tuned", str(tmp_path / "adapter"), "base"))
        backends.client_for("tuned", [], {}, UsageMeter())
        backends.client_for("base", [], {}, UsageMeter())
    assert count_starts(log_lines) == 2
    (line,) = [line for line in log_lines if line.startswith("restarting")]
    assert "enable_lora on instead of unset" in line
    assert f"lora_modules tuned={tmp_path / 'adapter'} instead of unset" in line


def test_changes_use_the_names_of_rlaif_toml() -> None:
    assert describe_changes(["--model", "m", "--a-b", "1", "--x"], ["--model", "m", "--a-b", "2", "--c", "3", "4"]) == [
        "a_b 2 instead of 1",
        "x unset instead of on",
        "c 3 4 instead of unset",
    ]
    assert describe_changes(["--model", "m"], ["--model", "m"]) == []


def test_a_run_with_one_model_starts_vllm_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    """Pilot, generate and judge run four stages one after the other."""
    monkeypatch.setattr(
        "rlaif.llm.backends.VllmServer", lambda model, options, *_: make("serve", model=model, options=options)
    )
    run = tmp_path / "run"
    run.mkdir()
    source = write_jsonl(run / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(12)])
    (run / "rlaif.toml").write_text(f"""
[prompts]
sources = ["{source}"]
heldout_fraction = 0.0
[sampler]
model = ["some/model"]
n = 2
[judge]
panel = ["helpful"]
model = "some/model"
[client]
concurrency = 2
[run]
pilot_prompts = 4
""")
    result = api.run_pipeline(Run(run), load(run, {}), QuietReporter())
    assert result.build is not None
    assert result.build.candidates == 12
    assert count_starts(log_lines) == 1
    assert not [line for line in log_lines if line.startswith("restarting")]
