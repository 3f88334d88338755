"""The floor plan holds: imports point down only, stages never import each other, heavy packages load late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "rlaif"
GROUND = {"records", "config", "identity", "settings", "errors", "stats", "packaged", "cpu", "spawn"}
STAGES = {"generate", "judge", "pair", "review", "train", "evaluate", "report"}
# Who may import whom, besides itself and the ground floor.
MAY = {
    **dict.fromkeys(GROUND, GROUND),
    "run": set(),
    "llm": {"run"},
    **{stage: {"run", "llm"} for stage in STAGES},
    "pipeline": {"run", "llm", *STAGES},
    "cli": {"run", "llm", "pipeline", *STAGES},
}
HEAVY = {"torch", "transformers", "trl", "peft", "vllm", "datasets", "polars", "pyarrow", "aiohttp"}
# Modules that the command which needs them loads as a whole, inside a function.
WHOLE = {
    "run/labels",
    "run/tables",
    "run/parts",
    "pair",
    "pipeline",
    "llm/endpoint",
    "llm/ask",
    "llm/batch",
    "llm/engines",
    "judge/ask",
    "judge/read",
    "report/quality",
}


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.add(str(child.module))
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(tree)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path, top_level_only=False):
        parts = name.split(".")
        if parts[0] != "rlaif" or len(parts) == 1:
            continue
        other = parts[1]
        if other in ("__version__", room) or other in GROUND:
            continue
        assert other in MAY[room], f"{room} may not import {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_load_inside_the_command_that_needs_them(path: Path) -> None:
    place = str(path.relative_to(PACKAGE).with_suffix(""))
    heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY
    if any(place == whole or place.startswith(f"{whole}/") for whole in WHOLE):
        heavy -= {"polars", "aiohttp", "pyarrow"}
    assert not heavy, f"{place} imports {heavy} at its top"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even inside functions: what cannot be understood without the other belongs with it."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    left = {name: imports(path, top_level_only=False) & set(names) for name, path in names.items()}
    while ends := [name for name, needed in left.items() if not needed & set(left)]:
        for name in ends:
            del left[name]
    assert not left


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in MODULES} <= set(MAY) | {"__init__"}


def test_help_loads_nothing_heavy() -> None:
    """What keeps `rlaif --help` under a quarter of a second, without timing it."""
    code = (
        "import sys\nfrom rlaif.cli.app import app\nfrom typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "print(' '.join(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rlaif.cli.judge" in loaded
    assert not (HEAVY | {"pydantic", "numpy", "aiohttp", "orjson"}) & set(loaded)


def test_modules_stay_short() -> None:
    """A module that fits on a few screens holds one thing."""
    long = {str(path): len(path.read_text().splitlines()) for path in MODULES}
    assert not {path: lines for path, lines in long.items() if lines > 600}
