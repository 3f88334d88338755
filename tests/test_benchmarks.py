"""Every benchmark starts as its text says: ``python -m benchmarks.NAME`` from the repository's root."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
IMPORTED = {"align_cells", "align_tables", "pairs", "speed_peers"}
"""What the others import."""
NAMES = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - IMPORTED)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_and_says_how_to_ask(name: str) -> None:
    source = (BENCHMARKS / f"{name}.py").read_text()
    assert f"python -m benchmarks.{name}" in source
    arguments = ["-m", f"benchmarks.{name}", "--help"] if "argparse" in source else ["-c", f"import benchmarks.{name}"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_texts_name_is_there() -> None:
    texts = [
        *BENCHMARKS.glob("*.md"),
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "rlaif").rglob("*.py"),
    ]
    for path in texts:
        mentioned = set(re.findall(r"-m benchmarks\.(\w+)", path.read_text()))
        assert mentioned <= set(NAMES), path
