"""The demo against scripted models: its requests, its output, and that it resumes after a kill at any point."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from rlaif.run.run import Run
from rlaif.train.artifacts import TrainResult
from tests.conftest import ROOT, read_jsonl
from tests.fake_judge import fenced_parts, judge_by, verdict_words
from tests.fake_server import ScriptedServer, with_probabilities
from tests.labeling.test_judging import goodness, read_dataset
from tests.test_examples import commands_in, parse

Serve = Callable[..., ScriptedServer]
SCRIPT = ROOT / "examples" / "demo" / "demo.py"
PROMPTS = 28


def model(body: dict[str, Any]) -> Any:
    """Answer with a text that contains its quality, and judge by that quality."""
    if "structured_outputs" in body:
        return judge_by(goodness)(body)
    return [f"\x1b[2J answer {body['seed'] + i} [{(body['seed'] + i) % 11 / 10}]" for i in range(body["n"])]


def by_position(body: dict[str, Any]) -> Any:
    """Judge like ``model``, but prefer the answer shown first in every other comparison."""
    if "structured_outputs" in body and verdict_words(body) == ["A", "B"] and len(fenced_parts(body)[0]) % 2:
        return with_probabilities({"A": 0.9, "B": 0.1})
    return model(body)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the script as a module with a fake training: other tests cover TRL's, and one here does."""
    spec = importlib.util.spec_from_file_location("demo_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def train(run: Run, *_: Any, **__: Any) -> TrainResult:
        rows = pl.read_parquet(run.dataset / "train.parquet").height
        return TrainResult(run.model, run.model / "adapter", None, rows, 1, 1.0, None)

    monkeypatch.setattr(module.api, "train", train)
    return module


def make_run(path: Path, url: str, extra: str = "") -> Path:
    """Create a run with the demo's settings and its models at ``url``."""
    path.mkdir()
    text = (SCRIPT.parent / "rlaif.toml").read_text()
    for section in ("[sampler]", "[judge]"):
        assert text.count(f"\n{section}\n") == 1
        text = text.replace(f"\n{section}\n", f'\n{section}\nbase_url = ["{url}"]\n')
    assert 'model = ["demo"]' in text
    assert 'model = "demo"' in text
    text = text.replace('model = ["demo"]', 'model = ["m"]').replace('model = "demo"', 'model = "m"')
    (path / "rlaif.toml").write_text(text + extra)
    return path


def raise_interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def count_prompts(path: Path) -> int:
    return len(read_jsonl(path / "journal" / "prompts.jsonl"))


def test_a_fast_machine_takes_all_prompts(
    demo: ModuleType, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "seconds_per_prompt", lambda *_: 5.0)
    path = make_run(tmp_path / "run", serve(by_position).url)
    demo.demo(path, clock=lambda: 0.0)
    output = capsys.readouterr().out
    assert "8 of 28 prompts took 40 s; the rest will take about 100 s." in output.replace("2 min", "100 s")
    assert count_prompts(path) == PROMPTS
    pairs = Run(path).pairs()
    assert pairs.filter(pl.col("route").is_in(["audit", "targeted"])).height >= 1
    assert pl.read_parquet(path / "dataset" / "train.parquet").height >= 1
    verdicts = read_jsonl(path / "journal" / "verdicts.jsonl")
    assert {line["kind"] for line in verdicts} >= {"rate", "compare"}
    assert {line["order"] for line in verdicts if line["kind"] == "compare"} == {"ab", "ba"}
    # The printed results
    assert str((path / "report.html").resolve()) in output
    assert (path / "report.html").read_text().startswith("<!doctype html>")
    assert len(re.findall(r"(?m)^    prompt    \S", output)) == len(re.findall(r"(?m)^    chosen    \S", output)) == 3
    assert "\\x1b[2J answer" in output
    assert "\x1b" not in output
    assert f"await blind review by annotators: rlaif review {path}" in output
    position = re.search(r"in (\d+) of (\d+) pairs helpful with m chose by position, not by content", output)
    assert position is not None
    assert 0 < int(position[1]) < int(position[2])


def test_each_step_prints_a_valid_command(
    demo: ModuleType, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.demo(make_run(tmp_path / "run", serve(model).url))
    lines = re.findall(r"(?m)^   \$ (rlaif .*)$", capsys.readouterr().out)
    parsed = [parse(line) for text in lines for line in commands_in(text)]
    assert len(parsed) == len(lines)
    assert [line.split()[1] for line in lines] == ["generate", "judge", "generate", "judge", "train", "report"]
    assert [arguments["limit"] for arguments in parsed if arguments.get("limit")] == [8, PROMPTS]


@pytest.mark.parametrize(
    ("per_prompt", "spent", "expected_prompts", "expected_output"),
    [
        (10.0, 60.0, 28, "8 of 28 prompts took 80 s; the rest will take about 3 min."),
        (20.0, 100.0, 17, "so the rest would take about 7 min. To finish soon, the demo takes 9 more (3 min)."),
        (100.0, 300.0, 8, "To finish soon, the demo takes no more."),
        (100.0, 3000.0, 8, "To finish soon, the demo takes no more."),
    ],
)  # fmt: skip
def test_a_slow_machine_takes_fewer_prompts(
    demo: ModuleType,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    per_prompt: float,
    spent: float,
    expected_prompts: int,
    expected_output: str,
) -> None:
    """A quarter of the time left of the 360 s is reserved for training."""
    monkeypatch.setattr(demo, "seconds_per_prompt", lambda *_: per_prompt)
    path, times = make_run(tmp_path / "run", serve(model).url), iter([0.0, spent, spent])
    demo.demo(path, clock=lambda: next(times))
    assert expected_output in capsys.readouterr().out
    assert count_prompts(path) == expected_prompts
    assert pl.read_parquet(path / "dataset" / "train.parquet").height >= 1


def test_a_slow_server_is_measured_and_limits_the_prompts(
    demo: ModuleType, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target time is 0 s, so no machine has time for more prompts."""
    monkeypatch.setattr(demo, "TARGET_S", 0.0)
    path = make_run(tmp_path / "run", serve(model, delay_s=0.05).url)
    demo.demo(path)
    took = demo.seconds_per_prompt(Run(path), 8)
    assert took is not None
    assert took * 8 > 2 * 0.05  # one answer, then one verdict
    assert "the demo takes no more" in capsys.readouterr().out
    assert count_prompts(path) == 8


def test_prompts_are_added_until_there_are_pairs_for_review_and_training(
    demo: ModuleType, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TARGET_S", 0.0)
    path = make_run(tmp_path / "run", serve(model).url)
    text = (path / "rlaif.toml").read_text().replace("[pairs]\n", "[pairs]\nhuman_fraction = 0.04\n")
    (path / "rlaif.toml").write_text(text)
    demo.demo(path)
    assert "No pair for human review yet" in capsys.readouterr().out
    assert 8 < count_prompts(path) < PROMPTS
    assert Run(path).pairs().filter(pl.col("route").is_in(["audit", "targeted"])).height == 1


def test_a_second_start_sends_no_request_and_keeps_the_number_of_prompts(
    demo: ModuleType, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(model)
    monkeypatch.setattr(demo, "TARGET_S", 0.0)
    path = make_run(tmp_path / "run", server.url)
    demo.demo(path)
    before, num_requests = read_dataset(path), len(server.requests)
    monkeypatch.setattr(demo, "TARGET_S", 1e9)
    demo.demo(path)
    assert len(server.requests) == num_requests
    assert read_dataset(path) == before


def test_a_start_without_stored_usage_measures_more_prompts(
    demo: ModuleType, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 after the first judging and before the decision leaves answers without their usage."""
    monkeypatch.setattr(demo, "TARGET_S", 0.0)
    path = make_run(tmp_path / "run", serve(model).url)
    with monkeypatch.context() as patched:
        patched.setattr(demo, "save_decision", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.demo(path)
    manifest = json.loads((path / "manifest.json").read_text())
    for stage in manifest["stages"].values():
        del stage["history"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert count_prompts(path) == 8
    demo.demo(path)
    assert count_prompts(path) == 12
    assert demo.seconds_per_prompt(Run(path), 12) is not None


def test_the_same_command_resumes_after_a_kill_at_any_point(
    demo: ModuleType, serve: Serve, tmp_path: Path, small: Path
) -> None:
    """kill -9 four times, then finish with a real training: the dataset equals that of an undisturbed run."""
    undisturbed = make_run(tmp_path / "undisturbed", serve(model).url)
    demo.demo(undisturbed)
    server = serve(model, delay_s=0.02)
    path = make_run(tmp_path / "run", server.url)
    toml = (path / "rlaif.toml").read_text().replace("[train]\n", f'[train]\nmodel = "{small}"\n')
    (path / "rlaif.toml").write_text(toml)
    line = [sys.executable, str(SCRIPT), str(path)]
    for requests in (3, 20, 60, 110):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while len(server.requests) < requests and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[1]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_dataset(path) == read_dataset(undisturbed)
    assert "Trained on " in done.stdout
    assert (path / "model" / "adapter" / "adapter_config.json").exists()


def test_an_interrupt_prints_one_line_and_no_traceback(serve: Serve, tmp_path: Path) -> None:
    server = serve(model, delay_s=0.05)
    path = make_run(tmp_path / "run", server.url)
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(path)], stderr=subprocess.PIPE, text=True)
    while len(server.requests) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Rerun the same command to resume" in stderr
    assert "Traceback" not in stderr


def test_existing_settings_are_kept_and_missing_ones_come_from_the_example(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "answer_and_judge", raise_interrupt)
    for text in (None, "seed = 3\n"):
        path = tmp_path / f"run-{text is None}"
        if text:
            path.mkdir()
            (path / "rlaif.toml").write_text(text)
        with pytest.raises(KeyboardInterrupt):
            demo.demo(path)
        assert (path / "rlaif.toml").read_text() == (text or (SCRIPT.parent / "rlaif.toml").read_text())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\t c", "a b c"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\u202egnirts", "\\u202egnirts"),
        ("x" * 101, "x" * 97 + "..."),
        ("é ü 漢", "é ü 漢"),
    ],
)
def test_control_characters_from_a_model_are_escaped(demo: ModuleType, text: str, expected: str) -> None:
    assert demo.shorten(text) == expected
