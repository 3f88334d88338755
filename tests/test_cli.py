"""Errors name the value and its place and give one hint; no data is lost and no traceback is shown."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from rlaif.cli import app
from rlaif.cli.examples import EXAMPLES
from tests.conftest import read_jsonl, write_jsonl
from tests.fake_judge import judge_by
from tests.fake_server import ScriptedServer
from tests.test_examples import parse

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]


def test_init_writes_a_file_that_loads_and_never_overwrites_it(tmp_path: Path, rlaif: Cli) -> None:
    run = tmp_path / "run"
    assert "rlaif generate" in rlaif("init", run).stdout
    text = (run / "rlaif.toml").read_text()
    assert "[sampler]" in text
    (run / "rlaif.toml").write_text(text + "# mine\n")
    assert "already exists" in rlaif("init", run, code=2).stderr
    assert (run / "rlaif.toml").read_text().endswith("# mine\n")


def test_an_invalid_line_is_reported_before_any_request(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    server = serve()
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "one"}\n{"prompt": "two"\n{"prompt": "three"}\n')
    arguments = ("generate", tmp_path / "run", "--prompts", source, "--model", "m", "--base-url", server.url)
    stderr = rlaif(*arguments, code=2).stderr
    assert f"{source}:2: not JSON" in stderr
    assert "--on-bad-row skip" in stderr
    assert server.requests == []
    skipped = rlaif(*arguments, "--on-bad-row", "skip", "--heldout-fraction", "0")
    assert f"{source}:2" in skipped.stderr
    assert len(read_jsonl(tmp_path / "run" / "journal" / "prompts.jsonl")) == 2


def test_a_missing_column_error_lists_the_columns(tmp_path: Path, rlaif: Cli) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"question": "q", "topic": "t"}])
    stderr = rlaif("generate", tmp_path / "run", "--prompts", source, "--model", "m", "--base-url", "http://127.0.0.1:9/v1",
                 code=2).stderr  # fmt: skip
    assert f"{source}:1: missing 'prompt'; the row has question, topic" in stderr


def test_an_empty_file_is_rejected(tmp_path: Path, rlaif: Cli) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    stderr = rlaif("generate", tmp_path / "run", "--prompts", tmp_path / "empty.jsonl", "--model", "m", "--base-url",
                 "http://127.0.0.1:9/v1", code=2).stderr  # fmt: skip
    assert "empty.jsonl: has no rows" in stderr


def test_unknown_names_get_a_suggestion(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    server = serve(judge_by(len))
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "responses": ["a", "b"]}])
    rlaif("generate", tmp_path / "run", "--import", source)
    common = ("judge", tmp_path / "run", "--base-url", server.url)
    assert (
        "unknown judge 'helpfull'. Did you mean 'helpful'?"
        in rlaif(*common, "--model", "m", "--judge", "helpfull", code=2).stderr
    )
    stderr = rlaif(*common, "--model", "mm", "--judge", "helpful", code=1).stderr
    assert "has no model 'mm'. Did you mean 'm'?" in stderr
    stderr = rlaif("generate", tmp_path / "new", "--prompts", "everydya", "--model", "m", code=2).stderr
    assert "unknown prompt set 'everydya'. Did you mean 'everyday'?" in stderr
    (tmp_path / "run" / "rlaif.toml").write_text("[sampler]\ntemprature = 1\n")
    stderr = rlaif(*common, "--model", "m", code=2).stderr
    assert "unknown key 'sampler.temprature'. Did you mean 'temperature'?" in stderr
    assert str(tmp_path / "run" / "rlaif.toml") in stderr


def test_errors_of_server_and_key(serve: Serve, tmp_path: Path, rlaif: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    common = (
        "generate",
        tmp_path / "run",
        "--prompts",
        source,
        "--heldout-fraction",
        "0",
        "--model",
        "m",
        "--base-url",
    )
    assert "unreachable" in rlaif(*common, "http://127.0.0.1:9/v1", code=1).stderr
    assert "is not a URL" in rlaif(*common, "127.0.0.1:9", code=2).stderr
    server = serve(key="right")
    stderr = rlaif(*common, server.url, code=1).stderr
    assert "requires an API key, and none is set" in stderr
    assert "export OPENAI_API_KEY=" in stderr
    monkeypatch.setenv("OPENAI_API_KEY", "secret-wrong")
    stderr = rlaif(*common, server.url, code=1).stderr
    assert "API key was rejected" in stderr
    assert "secret-wrong" not in stderr
    monkeypatch.setenv("RLAIF_API_KEY", "right")
    rlaif(*common, server.url)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"secret-wrong" not in everything
    assert b'"right"' not in everything


@pytest.mark.parametrize(
    "command",
    [("status",), ("report",), ("review",), ("review", "--merge"), ("judge", "--model", "m"), ("train",), ("run",),
     ("train", "--method", "ppo"), ("evaluate",), ("export", "--format", "trl", "-o", "x"), ("run", "--dry-run"),
     ("judge", "--model", "m", "--dry-run"), ("evaluate", "--dry-run"), ("doctor",), ("serve",)],
)  # fmt: skip
def test_a_missing_run_is_an_error_with_the_closest_name(tmp_path: Path, rlaif: Cli, command: tuple[str, ...]) -> None:
    rlaif("init", tmp_path / "runs-12")
    stderr = rlaif(command[0], tmp_path / "run-12", *command[1:], code=1).stderr
    assert f"{tmp_path / 'run-12'}: no such run" in stderr
    assert f"Did you mean {tmp_path / 'runs-12'}?" in stderr
    assert not (tmp_path / "run-12").exists()


def test_a_stage_without_its_input_names_the_command_to_run_first(tmp_path: Path, rlaif: Cli) -> None:
    run = tmp_path / "run"
    rlaif("init", run)
    assert f"rlaif generate {run}" in rlaif("judge", run, code=2).stderr
    dry = rlaif("judge", run, "--model", "m", "--dry-run", code=2).stderr
    assert "no completions to judge" in dry
    assert f"rlaif judge {run}" in rlaif("review", run, "--export", tmp_path / "q.csv", code=1).stderr
    assert f"rlaif judge {run}" in rlaif("train", run, code=2).stderr
    assert f"rlaif judge {run}" in rlaif("review", run, code=2).stderr
    assert f"next         rlaif generate {run}" in rlaif("status", run).stdout


def test_commands_about_judges_and_prompts(tmp_path: Path, rlaif: Cli) -> None:
    assert "helpful" in rlaif("judges", "list").stdout
    assert "{response_a}" in rlaif("judges", "show", "helpful").stdout
    assert ": valid\n" in rlaif("judges", "check", "quality").stdout
    assert "everyday" in rlaif("prompts", "list").stdout
    assert rlaif("prompts", "show", "refusals").stdout.startswith('{"')
    assert "rlaif 0." in rlaif("--version").stdout
    assert "rlaif init RUN" in rlaif("status", cwd=tmp_path).stdout
    rlaif("init", tmp_path / "later" / "run")
    stdout = rlaif("status", cwd=tmp_path).stdout
    assert stdout.startswith("later/run (not started)\n")
    assert "next         rlaif generate later/run" in stdout


def test_prompts_check_needs_no_run(tmp_path: Path, rlaif: Cli) -> None:
    assert "created prompts/mine.jsonl" in rlaif("prompts", "new", "mine", cwd=tmp_path).stdout
    assert (
        "prompts to ingest: 3\ninvalid rows: 0\n"
        in rlaif("prompts", "check", "prompts/mine.jsonl", cwd=tmp_path).stdout
    )
    assert "prompt set 'mine' already exists" in rlaif("prompts", "new", "mine", code=2, cwd=tmp_path).stderr
    assert "nope.jsonl: file not found" in rlaif("prompts", "check", tmp_path / "nope.jsonl", code=2).stderr

    long = "How do I keep a sourdough starter alive in a cold kitchen through the whole of a long winter, day by day"
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one", "id": "1"}\n{"promp": "two"}\n{"prompt": "three"\n{"prompt": "one", "id": "1"}\n'
        '{"prompt": "four", "checks": [{"kind": "regx", "pattern": "x"}]}\n{"prompt": "five", "id": "1"}\n'
        f'{{"prompt": "{long}?"}}\n{{"prompt": "{long.upper()}!"}}\n'
    )
    process = rlaif("prompts", "check", file, code=2)
    assert process.stdout.splitlines() == [
        "prompts to ingest: 2",
        "invalid rows: 4",
        f"dropped (duplicate): 1 ({file}:4)",
        f"dropped (near duplicate): 1 ({file}:8)",
    ]
    for message in (
        f"{file}:2: missing 'prompt'; the row has promp",
        f"{file}:3: not JSON",
        f"{file}:5: check 1 cannot be evaluated: unknown kind 'regx'. Did you mean 'regex'?",
        f"{file}:6: the id '1' already belongs to another prompt",
    ):
        assert message in process.stderr
    result = json.loads(rlaif("prompts", "check", file, "--json", code=2).stdout)
    assert (result["prompts"], len(result["invalid"]), result["dropped"]["near_duplicate"]) == (2, 4, [f"{file}:8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts", "prompts.jsonl"]


def test_review_and_export_end_to_end(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    """Export the review queue, label it, import it: the dataset then has human labels in place of the judges'."""
    server = serve(judge_by(lambda text: 1.0 if "good" in text else 0.0))
    rows = [{"prompt": f"q{i}", "responses": [f"good {i}", f"bad {i}"]} for i in range(280)]
    run = tmp_path / "run"
    rlaif("generate", run, "--import", write_jsonl(tmp_path / "rows.jsonl", rows))
    rlaif("judge", run, "--judge", "helpful", "--model", "m", "--base-url", server.url)
    queue_file = tmp_path / "queue.csv"
    assert "28 pairs for ada" in rlaif("review", run, "--export", queue_file, "--annotator", "ada").stdout
    lines = queue_file.read_text(encoding="utf-8-sig").splitlines()
    assert lines[0] == "pair_id,prompt,left,right,choice,comment"
    filled = [lines[0]]
    for line in lines[1:]:
        pair, prompt, left, right, _, _ = line.split(",")
        # The annotator disagrees with the judges.
        filled.append(",".join([pair, prompt, left, right, "left" if left.startswith("bad") else "right", ""]))
    queue_file.write_text("\n".join(filled) + "\n", encoding="utf-8")
    process = rlaif("review", run, "--import", queue_file, "--annotator", "ada")
    assert "28 labels added" in process.stderr
    assert "agree with the judges on 0.000" in process.stderr
    assert "280 pairs to train" in process.stdout.replace(" and 0 to test on", "") or "await review" in process.stdout
    import polars as pl

    dataset = pl.concat([pl.read_parquet(run / "dataset" / f"{name}.parquet") for name in ("train", "test")])
    assert dataset.height == 280
    human = dataset.filter(pl.col("label_source") == "human")
    assert human.height == 28
    assert all(row["chosen"][0]["content"].startswith("bad") for row in human.iter_rows(named=True))
    assert rlaif("export", run, "--format", "trl", "-o", tmp_path / "out").stdout
    assert "annotators contradict the judges" in rlaif("status", run).stdout


FAILING_REPORT = """
import sys
from rlaif.cli import app
from rlaif.report import html_report

def fail(*_):
    raise ZeroDivisionError("a bug")

html_report.write_report = fail
app.main()
"""


def run_failing_report(run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `rlaif report` with a bug in it."""
    arguments = [sys.executable, "-c", FAILING_REPORT, *flags, "report", str(run)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_an_unexpected_error_leaves_its_traceback_in_the_runs_log(tmp_path: Path, rlaif: Cli) -> None:
    run = tmp_path / "run"
    rlaif("init", run)
    process = run_failing_report(run)
    assert process.returncode == 1
    (path,) = (run / "log").glob("error-*.log")
    first, hint = process.stderr.splitlines()
    assert first == "rlaif: unexpected ZeroDivisionError: a bug"
    assert str(path) in hint
    assert "Traceback" in path.read_text()
    assert "ZeroDivisionError: a bug" in path.read_text()
    assert "Traceback" in run_failing_report(run, "-v").stderr


def test_an_unexpected_error_without_a_log_directory_shows_its_traceback(tmp_path: Path, rlaif: Cli) -> None:
    run = tmp_path / "run"
    rlaif("init", run)
    (run / "log").write_text("not a directory")
    process = run_failing_report(run)
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert process.stderr.splitlines()[-1] == "rlaif: unexpected ZeroDivisionError: a bug"


def test_every_command_has_two_examples_that_parse() -> None:
    commands = {name for name, _ in leaf_commands(typer.main.get_command(app.app))}
    assert commands == set(EXAMPLES)
    for name, lines in EXAMPLES.items():
        assert len(lines) >= 2, name
        for line in lines:
            assert line.startswith(f"rlaif {name}")
            parse(shlex.split(line.removeprefix("rlaif ").split(" > ")[0]))


def leaf_commands(command: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from leaf_commands(child, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", child


def test_help_shows_the_examples_and_completion_is_available(rlaif: Cli) -> None:
    assert "Examples:\n  rlaif run my-run" in rlaif("run", "--help").stdout.replace("\n    ", "\n  ")
    assert "--install-completion" in rlaif("--help").stdout
