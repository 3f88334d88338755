"""Imports point down only, stages never import each other, heavy packages load late."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "rlaif"
BASE = {"records", "display_names", "config", "errors", "installation", "format", "stats", "resources", "cpu", "spawn"}
STAGES = {"generate", "judge", "pair", "review", "train", "report"}
# Which packages each may import, besides itself and the base layer.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "web": set(),
    "run": set(),
    "serving": set(),
    "llm": {"run", "serving"},
    **{stage: {"run", "llm", "serving", "web"} for stage in STAGES},
    "labeling": {"run", "llm", "serving", "judge", "pair"},
    "evaluate": {"run", "llm", "serving", "generate", "judge", "pair", "labeling"},
    "planning": {"run", "llm", "serving", *STAGES, "labeling", "evaluate"},
    "orchestrator": {"run", "llm", "serving", "web", *STAGES, "labeling", "evaluate", "planning"},
    "api": {"orchestrator", "planning", "evaluate", "labeling", "llm", "serving", "run", *STAGES},
    "cli": {"run", "llm", "serving", *STAGES, "labeling", "evaluate", "planning", "orchestrator", "api"},
}
HEAVY = {"torch", "transformers", "trl", "peft", "vllm", "datasets", "polars", "pyarrow", "aiohttp"}
# Modules that are themselves imported inside the function that needs them.
LOADED_LATE = {
    "run/human_agreement",
    "run/human_labels",
    "run/frames",
    "run/partitions",
    "pair",
    "labeling",
    "evaluate",
    "planning",
    "orchestrator",
    "llm/endpoint",
    "llm/executor",
    "llm/batch_api",
    "llm/batch_runner",
    "llm/backends",
    "judge/runner",
    "judge/reply_parser",
    "report/judge_stats",
}


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                names.add(str(child.module))
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(tree)
    return names


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        return
    for name in imports(path, top_level_only=False):
        parts = name.split(".")
        if parts[0] != "rlaif" or len(parts) == 1:
            continue
        other = parts[1]
        if other in ("__version__", package) or other in BASE:
            continue
        assert other in ALLOWED[package], f"{package} may not import {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_load_inside_the_command_that_needs_them(path: Path) -> None:
    module = str(path.relative_to(PACKAGE).with_suffix(""))
    heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY
    if any(module == late or module.startswith(f"{late}/") for late in LOADED_LATE):
        heavy -= {"polars", "aiohttp", "pyarrow"}
    assert not heavy, f"{module} imports {heavy} at its top"


def test_no_circular_imports() -> None:
    """Not even inside functions: two modules that need each other are one."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    remaining = {name: imports(path, top_level_only=False) & set(paths) for name, path in paths.items()}
    while leaves := [name for name, needed in remaining.items() if not needed & set(remaining)]:
        for name in leaves:
            del remaining[name]
    assert not remaining


def test_every_package_has_a_layer() -> None:
    assert {package_of(path) for path in MODULES} <= set(ALLOWED) | {"__init__"}


def test_no_package_outgrows_the_others() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    total = sum(lines.values())
    for package in {package_of(path) for path in MODULES}:
        share = sum(count for path, count in lines.items() if package_of(path) == package) / total
        assert share <= 0.15, f"{package} holds {share:.0%} of the lines"


def test_no_basename_occurs_twice() -> None:
    """Except in cli/, whose files are named for their commands."""
    names = [path.stem for path in MODULES if path.name != "__init__.py" and package_of(path) != "cli"]
    assert {name for name in names if names.count(name) > 1} == set()


def test_help_loads_nothing_heavy() -> None:
    """`rlaif --help` stays quick: this checks its cause, without timing it."""
    code = (
        "import sys\nfrom rlaif.cli.app import app\nfrom typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "print(' '.join(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rlaif.cli.judge" in loaded
    assert not (HEAVY | {"pydantic", "numpy", "aiohttp", "orjson"}) & set(loaded)


def test_modules_stay_short() -> None:
    long = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {path: lines for path, lines in long.items() if lines > 600}


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md", "README.md", "docs/usage.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = set(
        re.findall(r"(?<![\w/-])(?:rlaif|tests|benchmarks|examples|prompts|judges|scripts|docs)/[\w./-]*\w", text)
    )
    allowed = {"rlaif/data", "prompts/mine.jsonl", "judges/mine", "judges/mine/judge.toml"}
    missing = {path for path in paths if not (ROOT / path).exists() and "NAME" not in path and "COMMAND" not in path}
    assert missing <= allowed
