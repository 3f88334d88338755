"""Files and folders are replaced in one step."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest

from rlaif.errors import RunError
from rlaif.run.atomic_write import atomic_path, atomic_write_bytes, atomic_write_text, remove_stale_temp_files


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    atomic_write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match="File too large") as caught:
            atomic_write_bytes(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.location == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    atomic_write_text(path, "é" * 1000)
    assert path.stat().st_size == 2000


def test_the_error_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "report.html" / "a folder").mkdir(parents=True)
    for path in (tmp_path / "report.html", tmp_path / "not there" / "report.html"):
        with pytest.raises(RunError, match="cannot be written") as caught:
            atomic_write_bytes(path, b"new")
        assert caught.value.location == str(path)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_replaces_another_only_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    for content in ("first", "second"):
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            (temporary / f"{content}.txt").write_text(content)
            assert not (folder / f"{content}.txt").exists()
        assert [path.name for path in folder.iterdir()] == [f"{content}.txt"]
    with pytest.raises(ValueError, match="half"), atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / "third.txt").write_text("third")
        raise ValueError("half")
    assert [path.name for path in folder.iterdir()] == ["second.txt"]
    assert list(tmp_path.iterdir()) == [folder]


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    for name in (f".a.json.{process.pid}", f".b.json.{os.getpid()}", ".lock", ".gitignore", "c.json.1"):
        (tmp_path / name).touch()
    (tmp_path / f".merged.{process.pid}").mkdir()
    (tmp_path / f".merged.{process.pid}" / "model.safetensors").touch()
    remove_stale_temp_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".b.json.{os.getpid()}",
        ".gitignore",
        ".lock",
        "c.json.1",
    ]
