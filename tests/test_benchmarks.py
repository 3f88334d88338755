"""Every benchmark starts with the command in its docstring: ``python -m benchmarks.NAME`` in the repository root."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
IMPORTED = {"align_cells", "align_tables", "pairs", "speed_peers"}
"""Modules that other benchmarks import."""
NAMES = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - IMPORTED)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_starts_and_documents_its_command(name: str) -> None:
    source = (BENCHMARKS / f"{name}.py").read_text()
    assert f"python -m benchmarks.{name}" in source
    arguments = ["-m", f"benchmarks.{name}", "--help"] if "argparse" in source else ["-c", f"import benchmarks.{name}"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_benchmarks_named_in_texts_exist() -> None:
    texts = [
        *BENCHMARKS.glob("*.md"),
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "rlaif").rglob("*.py"),
    ]
    for path in texts:
        mentioned = set(re.findall(r"-m benchmarks\.(\w+)", path.read_text()))
        assert mentioned <= set(NAMES), path
