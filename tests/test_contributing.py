"""CONTRIBUTING.md, followed literally in a copy of the checkout, adds a judge and a prompt set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("rlaif", "judges", "prompts")
FILES = ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/test_resources.py", "tests/fake_server.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def commands(heading: str) -> list[str]:
    """The commands in the section ``heading`` of CONTRIBUTING.md, without comments."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def run(checkout: Path, command: str) -> None:
    program, *arguments = command.split()
    if program == "make":
        arguments = ["pytest", "-q", "-p", "no:cacheprovider", arguments[1].removeprefix("TESTS=")]
    else:
        assert program == "rlaif"
        arguments = ["rlaif", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def gold_row(number: int) -> dict[str, object]:
    good, bad = f"The answer is {number}.", "I will not say, whatever you ask me about numbers."
    label = 1 + number % 2
    if number % 4 < 2:  # the longer answer is right half of the time
        good += " It follows from the rule that was given in the question, step by step."
    responses = [good, bad] if label == 1 else [bad, good]
    return {"id": f"mine-{number:02}", "prompt": f"Which number is {number}?", "responses": responses, "label": label}


def test_a_judge(checkout: Path) -> None:
    create, *validate = commands("Add a judge")
    run(checkout, create)
    rows = [json.dumps(gold_row(number)) for number in range(32)]
    (checkout / "judges" / "mine" / "gold.jsonl").write_text("\n".join(rows) + "\n")
    assert len(validate) == 2
    for command in validate:
        run(checkout, command)
    assert "mine" in (checkout / "judges" / "checksums.txt").read_text()


def test_a_prompt_set(checkout: Path) -> None:
    rows = [
        json.dumps({"id": f"mine-{number:03}", "prompt": f"What is {number} times {number + 3}?", "tags": ["math"]})
        for number in range(5)
    ]
    (checkout / "prompts" / "mine.jsonl").write_text("\n".join(rows) + "\n")
    for command in commands("Add a prompt set"):
        run(checkout, command)
