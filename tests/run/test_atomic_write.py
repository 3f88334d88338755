"""Files that are written at once."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from rlaif.errors import RunError
from rlaif.run import atomic_write


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    atomic_write.atomic_write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match=r"evaluation\.json: cannot be written: File too large"):
            atomic_write.atomic_write_bytes(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    atomic_write.atomic_write_bytes(path, b"x" * 2000)
    assert path.stat().st_size == 2000


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html" / "a folder").mkdir(parents=True)
    for path in (tmp_path / "report.html", tmp_path / "not there" / "report.html"):
        with pytest.raises(RunError, match=r"report\.html: cannot be written"):
            atomic_write.atomic_write_bytes(path, b"new")
    assert not list(tmp_path.glob(".*"))
