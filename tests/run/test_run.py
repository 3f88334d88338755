"""The run directory: one writer at a time, a manifest replaced in one step, settings that may change on resume."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest

import rlaif
from rlaif.config.loader import load
from rlaif.errors import ConfigMismatchError, RunError
from rlaif.records import Completion, Failure, Message, Prompt, Record, Verdict, content_key
from rlaif.run.run import JournalName, Run, open_run

HOLD_LOCK_CODE = """
import sys
from rlaif.run.run import Run
sys.argv = ["rlaif", "generate"]
with Run({path!r}).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def lock_holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the run's lock until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK_CODE.format(path=str(path))],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


# The lock


def test_the_error_names_the_holder_and_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    """SIGKILL releases the lock, although the lock file still has the name of the dead process."""
    run = Run(tmp_path / "run")
    assert not run.is_locked()
    with lock_holder(run.path) as process:
        assert run.is_locked()
        with (
            pytest.raises(RunError, match=rf"locked by process {process.pid} \(rlaif generate\)") as raised,
            run.lock(),
        ):
            raise AssertionError("two writers")
        assert raised.value.location == str(run.path)
        assert raised.value.exit_code == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not run.is_locked()
        with run.lock():
            assert run.is_locked()
            assert f"process {os.getpid()} " in (run.path / ".lock").read_text()
    assert not run.is_locked()


def test_the_lock_is_released_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with lock_holder(run.path) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    with pytest.raises(ZeroDivisionError), run.lock():
        _ = 1 / 0
    with run.lock():
        pass
    assert not run.is_locked()


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match="locked by process"), Run(run.path).lock():
        raise AssertionError("two writers")


def test_is_locked_never_blocks_a_writer(tmp_path: Path) -> None:
    """`rlaif status` may check the lock repeatedly while another command starts."""
    run = Run(tmp_path / "run")
    with run.lock():
        pass
    stop = threading.Event()

    def check_repeatedly() -> None:
        while not stop.is_set():
            Run(run.path).is_locked()

    checker = threading.Thread(target=check_repeatedly)
    checker.start()
    try:
        for _ in range(200):
            with run.lock():
                pass
    finally:
        stop.set()
        checker.join()


@contextlib.contextmanager
def read_only_dir() -> Iterator[Path]:
    """Create a directory that this process cannot write to. A root user becomes another user inside the block."""
    folder = Path(tempfile.mkdtemp())
    (folder / "run").mkdir()
    (folder / "run").chmod(0o555)
    folder.chmod(0o555)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(me)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_the_error_names_a_read_only_directory() -> None:
    with read_only_dir() as folder:
        for path in (folder / "run", folder / "absent"):
            with pytest.raises(RunError) as raised, Run(path).lock():
                raise AssertionError("written")
            assert str(raised.value) == f"{path}: cannot be written to: Permission denied"
        with pytest.raises(RunError, match=r"manifest\.json: cannot be written: Permission denied"):
            Run(folder / "run").update_manifest("generate", x=1)
        with pytest.raises(RunError, match="cannot be opened for writing: Permission denied"):
            Run(folder / "run").journal("prompts")


def test_a_file_at_the_path_of_the_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written to: "), Run(tmp_path / "file").lock():
        raise AssertionError("written")


@pytest.mark.parametrize("error_number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int
) -> None:
    """NFS without its lock daemon, and Lustre mounted without flock, return these errors."""

    def no_locks(_fd: int, _how: int) -> None:
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr("rlaif.run.run.fcntl.flock", no_locks)
    run = Run(tmp_path / "run")
    with pytest.raises(RunError, match=f"cannot be locked: {os.strerror(error_number)}") as raised, run.lock():
        pytest.fail("continued without a lock")
    assert "file system mounted with locks" in str(raised.value)
    assert run.is_locked() is False


def test_the_lock_holds_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the holder's name is missing."""

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match="locked by another process"), Run(run.path).lock():
        raise AssertionError("two writers")


# Opening


def test_open_run_rejects_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run"):
        open_run(tmp_path / "absent")
    with pytest.raises(RunError, match="this directory is not a run"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="no such run"):
        open_run(tmp_path / "file")


def test_a_run_that_has_only_settings_is_empty(tmp_path: Path) -> None:
    (tmp_path / "rlaif.toml").write_text("")
    run = rlaif.open_run(str(tmp_path))
    for frame in (run.prompts(), run.completions(), run.verdicts(), run.reviews()):
        assert isinstance(frame, pl.DataFrame)
        assert frame.height == 0
        assert "key" in frame.columns
    with pytest.raises(RunError, match="no pairs yet") as raised:
        run.pairs()
    assert f"rlaif judge {tmp_path}" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rlaif.toml"]  # reading creates nothing


# The manifest


def test_facts_are_merged_by_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.manifest() == {"schema_version": 2, "stages": {}}
    run.update_manifest("generate", a=1, b=2)
    run.update_manifest("judge", a=3)
    run.update_manifest("generate", b=[4], c=None)
    assert run.manifest()["stages"] == {"generate": {"a": 1, "b": [4], "c": None}, "judge": {"a": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_unknown_fields_of_the_manifest_are_kept(tmp_path: Path) -> None:
    value = {"schema_version": 2, "stages": {"other": {"x": 1}}, "further": "kept"}
    (tmp_path / "manifest.json").write_bytes(orjson.dumps(value))
    Run(tmp_path).update_manifest("generate", a=1)
    assert Run(tmp_path).manifest() == {**value, "stages": {"other": {"x": 1}, "generate": {"a": 1}}}


def test_the_manifest_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the write fails, the old manifest is unchanged and no temporary file remains."""
    run = Run(tmp_path)
    run.update_manifest("generate", a=1)
    before = run.manifest_path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match=r"manifest\.json: cannot be written: No space left on device"):
        run.update_manifest("generate", a=2)
    assert run.manifest_path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_newer_manifest_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 99, "stages": {}}')
    with pytest.raises(RunError, match="newer rlaif"):
        Run(tmp_path).manifest()
    with pytest.raises(RunError, match="newer"):
        Run(tmp_path).update_manifest("generate", a=1)


def test_a_run_of_an_earlier_layout_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "stages": {}}')
    with pytest.raises(RunError, match="earlier layout") as caught:
        Run(tmp_path).manifest()
    assert caught.value.location == str(tmp_path)
    assert "rlaif init" in str(caught.value.hint)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"schema_version": 1}',
        '{"schema_version": "x", "stages": {}}',
        '{"schema_version": null, "stages": {}}',
        '{"schema_version": 2, "stages": []}',
        '{"schema_version": 2, "stages": {"generate": 3}}',
        "\udcff",
    ],
)
def test_the_error_names_a_damaged_manifest_and_leaves_it_unchanged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    before = path.read_bytes()
    for attempt in (Run(tmp_path).manifest, lambda: Run(tmp_path).update_manifest("generate", a=1)):
        with pytest.raises(RunError, match="not a manifest that rlaif wrote") as raised:
            attempt()
        assert raised.value.location == str(path)
        assert raised.value.hint
    assert path.read_bytes() == before


# Starting a stage


def configured(run: Run, **flags: Any) -> Any:
    values = {
        "prompts.sources": ["a.jsonl"],
        "sampler.model": ["m"],
        "judge.model": "j",
        **{name.replace("__", "."): value for name, value in flags.items()},
    }
    return load(run.path, values, {})


def append_record(run: Run, name: JournalName, record: Record) -> None:
    with run.journal(name) as journal:
        journal.append([record])


KEY = content_key(x=1)
PROMPT = Prompt(key=KEY, prompt_id="p", messages=[Message(role="user", content="q")])
COMPLETION = Completion(key=KEY, prompt_id="p", index=0, model="m", text="t")
VERDICT = Verdict(key=KEY, kind="compare", judge="j", judge_hash="h", model="m", prompt_id="p", a="1", prob_a=0.5)


def test_the_manifest_records_each_start_of_a_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start_stage("generate", configured(run))
    facts = run.manifest()["stages"]["generate"]
    assert facts["config"]["sampler"]["model"] == ["m"]
    assert facts["identity"]["policies"] == ["m"]
    assert re.fullmatch("[0-9a-f]{64}", facts["identity_hash"])
    assert facts["packages"]["rlaif"] == rlaif.__version__
    assert facts["ended"] is None
    run.finish_stage("generate", prompts=3)
    facts = run.manifest()["stages"]["generate"]
    assert facts["started"] <= facts["ended"]
    assert facts["history"][-1]["prompts"] == 3
    run.start_stage("generate", configured(run))
    assert run.manifest()["stages"]["generate"]["ended"] is None
    run.finish_stage("generate", prompts=4)
    assert [start["prompts"] for start in run.manifest()["stages"]["generate"]["history"]] == [3, 4]


def test_changed_settings_are_rejected_and_the_manifest_is_unchanged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start_stage("generate", configured(run))
    append_record(run, "prompts", PROMPT)
    append_record(run, "completions", COMPLETION)
    before = run.manifest_path.read_bytes()
    with pytest.raises(ConfigMismatchError, match=r"policies was \['m'\], now \['n'\]"):
        run.start_stage("generate", configured(run, sampler__model=["n"]))
    with pytest.raises(ConfigMismatchError, match=r"sampler.n may only grow: it was 4, now 3"):
        run.start_stage("generate", configured(run, sampler__n=3))
    assert run.manifest_path.read_bytes() == before
    run.start_stage("generate", configured(run, sampler__n=5, client__concurrency=7))
    with pytest.raises(ConfigMismatchError, match=r"sampler.n may only grow: it was 5, now 4"):
        run.start_stage("generate", configured(run))


def test_a_setting_may_change_while_no_record_depends_on_it(tmp_path: Path) -> None:
    """A mistyped file or model stops the first command. The corrected command is accepted.

    Prompts fix the settings of prompts, answers fix the settings of answers. Failures and imported answers fix nothing.
    """
    run = Run(tmp_path)
    run.start_stage("generate", configured(run, prompts__sources=["typo.jsonl"], sampler__model=["typo"], sampler__n=8))
    run.start_stage("generate", configured(run, sampler__model=["typo"], sampler__max_tokens=99999))
    append_record(run, "prompts", PROMPT)
    with pytest.raises(ConfigMismatchError, match=r"prompts\.sources was"):
        run.start_stage("generate", configured(run, prompts__sources=["other.jsonl"]))
    with pytest.raises(ConfigMismatchError, match="seed was 0, now 1"):
        run.start_stage("generate", configured(run, seed=1))
    with pytest.raises(ConfigMismatchError, match=r"sampler.system was None, now 's'"):
        run.start_stage("generate", configured(run, sampler__system="s"))
    append_record(run, "completions", Failure(key=KEY, error="HTTP 400: too many tokens", kind="endpoint"))
    append_record(run, "completions", COMPLETION.model_copy(update={"source": "imported"}))
    run.start_stage("generate", configured(run))
    append_record(run, "completions", COMPLETION)
    with pytest.raises(ConfigMismatchError, match="policies was"):
        run.start_stage("generate", configured(run, sampler__model=["typo"]))


def test_the_judge_may_not_change_after_its_first_verdict_unless_restarted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    append_record(run, "prompts", PROMPT)
    append_record(run, "completions", COMPLETION)
    run.start_stage("judge", configured(run, judge__model="typo"))
    run.start_stage("judge", configured(run))
    append_record(run, "verdicts", VERDICT)
    with pytest.raises(ConfigMismatchError, match="--restart"):
        run.start_stage("judge", configured(run, judge__model="k"))
    run.start_stage("judge", configured(run, judge__model="k"), restart=True)
    run.start_stage("judge", configured(run, judge__model="k"))
