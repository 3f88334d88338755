"""The wheel contains the package, the settings template, the prompts and the judges, and is called rlaif-pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "uv", "build", "--wheel", "--quiet", "-o", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("rlaif_pipeline-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", "examples/", "prompts/"))}
    assert {"rlaif/py.typed", "rlaif/data/judges/helpful/prompt.md"} <= names
    review = ROOT / "rlaif" / "review"
    files = (path for folder in ("static", "templates") for path in (review / folder).iterdir())
    page = {path.relative_to(ROOT).as_posix() for path in files}
    assert len(page) > 10
    assert page <= names
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "site"))
    for arguments, expected in (
        (["judges", "list"], "quality"),
        (["prompts", "list"], "constraints"),
        (["docs"], "usage.md"),
        (["judges", "show", "helpful"], str(tmp_path / "site")),
        (["init", str(tmp_path / "run")], "rlaif.toml"),
    ):
        command = [sys.executable, "-m", "rlaif", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
