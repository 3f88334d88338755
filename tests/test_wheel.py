"""The wheel carries what the commands need: the package, its settings template, the prompts and the judges."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    build = subprocess.run([sys.executable, "-m", "uv", "build", "--wheel", "--quiet", "-o", str(tmp_path), str(ROOT)],
                           capture_output=True, text=True)  # fmt: skip
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", "examples/", "prompts/"))}
    assert {"rlaif/py.typed", "rlaif/data/judges/helpful/prompt.md"} <= names
    page = {path.relative_to(ROOT).as_posix() for part in ("static", "templates")
            for path in (ROOT / "rlaif" / "review" / part).iterdir()}  # fmt: skip
    assert len(page) > 10
    assert page <= names
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "site"))
    for arguments, expected in (
        (["judges", "list"], "quality"),
        (["prompts", "list"], "constraints"),
        (["judges", "show", "helpful"], str(tmp_path / "site")),
        (["init", str(tmp_path / "run")], "rlaif.toml"),
    ):
        done = subprocess.run([sys.executable, "-m", "rlaif", *arguments], capture_output=True, text=True, cwd=tmp_path,
                              env=environment)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
