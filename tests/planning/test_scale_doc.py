"""docs/scale.md shows what its commands print. ``python -m tests.planning.test_scale_doc`` writes their output into
it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from rlaif.cli.options import config_as_judged, open_run_with_config
from rlaif.config.models import Config
from rlaif.planning import capacity
from rlaif.run.run import Run
from tests.conftest import ROOT, command
from tests.test_examples import parse
from tests.train.pairs import rows

PAGE = ROOT / "docs" / "scale.md"
CONSOLE = re.compile(r"(?s)```console\n\$ rlaif ([^\n]+)\n(.*?)```")


def run_command(arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RLAIF_")}
    done = subprocess.run(command(*shlex.split(arguments)), capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def console_blocks() -> Iterator[tuple[str, str]]:
    for match in CONSOLE.finditer(PAGE.read_text(encoding="utf-8")):
        yield match[1], match[2]


@pytest.mark.parametrize(("line", "output"), list(console_blocks()), ids=lambda text: text[:40])
def test_the_page_shows_the_output_of_its_commands(line: str, output: str) -> None:
    assert run_command(line) == output, "update with: python -m tests.planning.test_scale_doc"


def test_the_page_covers_three_sizes_and_their_bottlenecks() -> None:
    first = [
        (line.split()[2], re.findall(r"First bottleneck: ([a-z ]+),", output)) for line, output in console_blocks()
    ]
    assert [size for size, _ in first] == ["10k", "1M", "1M", "100M", "100M"]
    assert [names for _, names in first] == [["human review"]] * 4 + [["judging"]]


def test_commands_without_output_parse() -> None:
    lines = re.findall(r"(?m)^rlaif (.+)$", PAGE.read_text())
    assert len(lines) == 8
    for line in lines:
        parse(shlex.split(line))


def test_the_rates_of_one_process_match_the_plan() -> None:
    table = dict(re.findall(r"\| ([^|]+) \| ([\d.,]+) \|\n", PAGE.read_text().split("one process in `rlaif plan`")[1]))
    numbers = {name: float(value.replace(",", "")) for name, value in table.items()}
    assert numbers == {
        "requests per second": capacity.REQUESTS_PER_SECOND,
        "records journaled per second": capacity.RECORDS_PER_SECOND,
        "prompts ingested per second": capacity.PROMPTS_PER_SECOND,
        "seconds to build the pairs of a million prompts": pytest.approx(capacity.PAIRING_SECONDS_PER_PROMPT * 1e6),
        "memory for a million prompts, GB": pytest.approx(capacity.MEMORY_BYTES_PER_PROMPT * 1e6 / 1e9, abs=0.05),
    }


def test_the_number_of_gpus_at_which_the_process_is_the_bottleneck() -> None:
    gpus = int(re.findall(r"with about (\d+) GPUs or more", PAGE.read_text())[0])
    line = next(line for line, _ in console_blocks() if "--prompts 1M" in line)
    plan = json.loads(run_command(f"{line} --json"))
    hours = {stage["name"]: (stage["hours"], stage["gpu_hours"]) for stage in plan["stages"]}
    assert round((hours["sampling"][1] + hours["judging"][1]) / hours["dispatch"][0]) == gpus


def test_the_pages_code_splits_prompts_and_merges_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, merge = re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    questions = [f"Question {number}?" for number in range(200)] * 2
    pl.DataFrame({"prompt": questions[:150]}).write_parquet("prompts/a.parquet")
    pl.DataFrame({"prompt": questions[150:]}).write_parquet("prompts/b.parquet")
    exec(split, {})
    parts = [pl.read_parquet(path)["prompt"].to_list() for path in sorted(tmp_path.glob("part-*.parquet"))]
    assert len(parts) == 16
    assert sorted(prompt for part in parts for prompt in part) == sorted(questions)
    assert sum(len(set(part)) for part in parts) == 200  # equal prompts are in the same part
    for part in range(2):
        run = Run(tmp_path / f"part-{part:02}")
        run.dataset.mkdir(parents=True)
        run.update_manifest("judge", config=Config().model_dump(mode="json"))
        (run.path / "rlaif.toml").write_text('[train]\nmodel = "demo"\n')
        pl.DataFrame(rows(8, first=8 * part)).write_parquet(run.dataset / "train.parquet")
        pl.DataFrame(rows(2, first=100 + 2 * part)).write_parquet(run.dataset / "test.parquet")
    exec(merge, {})
    (copy,) = re.findall(r"(?m)^cp .*$", PAGE.read_text())
    subprocess.run(copy, shell=True, check=True, cwd=tmp_path)
    merged_run, settings = open_run_with_config(tmp_path / "all", {})
    assert config_as_judged(merged_run, settings).train.model == "demo"
    assert {name: pl.read_parquet(merged_run.dataset / f"{name}.parquet").height for name in ("train", "test")} == {
        "train": 16,
        "test": 4,
    }


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        CONSOLE.sub(lambda match: f"```console\n$ rlaif {match[1]}\n{run_command(match[1])}```", text), encoding="utf-8"
    )
