"""docs/scale.md says what the commands in it print. ``python -m tests.test_scale_doc`` writes their output into it."""

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

from rlaif.cli.shared import as_judged, open_with
from rlaif.config import Config
from rlaif.pipeline import forecast
from rlaif.run.directory import Run
from tests.conftest import ROOT, command
from tests.test_examples import parse
from tests.train.pairs import rows

PAGE = ROOT / "docs" / "scale.md"
CONSOLE = re.compile(r"(?s)```console\n\$ rlaif ([^\n]+)\n(.*?)```")


def printed(line: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RLAIF_")}
    done = subprocess.run(command(*shlex.split(line)), capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown() -> Iterator[tuple[str, str]]:
    for found in CONSOLE.finditer(PAGE.read_text(encoding="utf-8")):
        yield found[1], found[2]


@pytest.mark.parametrize(("line", "output"), list(shown()), ids=lambda text: text[:40])
def test_the_page_shows_what_the_command_prints(line: str, output: str) -> None:
    assert printed(line) == output, "python -m tests.test_scale_doc writes it anew"


def test_the_page_has_its_three_sizes_and_names_their_bottlenecks() -> None:
    first = [(line.split()[2], re.findall(r"First bottleneck: ([a-z ]+),", output)) for line, output in shown()]
    assert [size for size, _ in first] == ["10k", "1M", "1M", "100M", "100M"]
    assert [names for _, names in first] == [["people"]] * 4 + [["judging"]]


def test_commands_without_output_are_ones_that_rlaif_knows() -> None:
    lines = re.findall(r"(?m)^rlaif (.+)$", PAGE.read_text())
    assert len(lines) == 8
    for line in lines:
        parse(shlex.split(line))


def test_what_a_process_takes_is_what_the_plan_counts_with() -> None:
    table = dict(
        re.findall(r"\| ([^|]+) \| ([\d.,]+) \|\n", PAGE.read_text().split("as `rlaif plan` counts with it")[1])
    )
    numbers = {name: float(value.replace(",", "")) for name, value in table.items()}
    assert numbers == {
        "requests a second": forecast.REQUESTS_PER_SECOND,
        "records journaled a second": forecast.RECORDS_PER_SECOND,
        "prompts taken in a second": forecast.PROMPTS_PER_SECOND,
        "seconds to build pairs of a million prompts": pytest.approx(forecast.PAIRING_SECONDS * 1e6),
        "memory for a million prompts, GB": pytest.approx(forecast.MEMORY_BYTES * 1e6 / 1e9, abs=0.05),
    }


def test_the_process_is_the_bottleneck_from_so_many_gpus_on() -> None:
    said = int(re.findall(r"from about (\d+) GPUs on", PAGE.read_text())[0])
    line = next(line for line, _ in shown() if "--prompts 1M" in line)
    seen = json.loads(printed(f"{line} --json"))
    hours = {part["name"]: (part["hours"], part["gpu_hours"]) for part in seen["parts"]}
    assert round((hours["sampling"][1] + hours["judging"][1]) / hours["asking"][0]) == said


def test_prompts_are_split_and_datasets_merged_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, merge = re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    asked = [f"Question {number}?" for number in range(200)] * 2
    pl.DataFrame({"prompt": asked[:150]}).write_parquet("prompts/a.parquet")
    pl.DataFrame({"prompt": asked[150:]}).write_parquet("prompts/b.parquet")
    exec(split, {})
    parts = [pl.read_parquet(path)["prompt"].to_list() for path in sorted(tmp_path.glob("part-*.parquet"))]
    assert len(parts) == 16
    assert sorted(prompt for part in parts for prompt in part) == sorted(asked)
    assert sum(len(set(part)) for part in parts) == 200  # both copies of each are in the same part
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
    whole, settings = open_with(tmp_path / "all", {})
    assert as_judged(whole, settings).train.model == "demo"
    assert {name: pl.read_parquet(whole.dataset / f"{name}.parquet").height for name in ("train", "test")} == {
        "train": 16,
        "test": 4,
    }


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        CONSOLE.sub(lambda found: f"```console\n$ rlaif {found[1]}\n{printed(found[1])}```", text), encoding="utf-8"
    )
