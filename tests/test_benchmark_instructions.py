"""rlaif's checks agree with IFBench's checkers, on its own prompts and one model's answers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import instructions
from rlaif.judge import check_schema
from tests.conftest import needs, needs_tools


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    needs("if_verifiable")
    code = "import importlib.util; print(*importlib.util.find_spec('ifbench').submodule_search_locations)"
    result = subprocess.run([needs_tools("ifbench"), "-c", code], capture_output=True, text=True, check=True)
    package = Path(result.stdout.strip())
    monkeypatch.syspath_prepend(str(package.parent))
    return package / "data"


def test_the_checks_agree_with_ifbench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, reasons = instructions.prompts(folder)
    assert len(rows) + sum(reasons.values()) == 294
    assert len(rows) >= 269  # the others need word lists that not every machine has
    assert all("nltk.download" in reason for reason in reasons)
    assert len({row["id"] for row in rows}) == len(rows)
    agreeing, count, met = instructions.agreement(folder, rows)
    assert agreeing == count >= 304
    assert 0.2 < met / count < 0.3  # some pass and most do not, so agreement is informative

    compile_checks = check_schema.compile_checks
    monkeypatch.setattr(
        check_schema,
        "compile_checks",
        lambda checks, where: [(kind, lambda _text: True) for kind, _ in compile_checks(checks, where)],
    )
    assert instructions.agreement(folder, rows)[0] == met
