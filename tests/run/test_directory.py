"""One writer at a time, a manifest that is never half written, and what may change when a stage goes on."""

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
from rlaif.errors import IdentityError, RunError
from rlaif.records import Completion, Failure, Message, Prompt, Record, Verdict, key_of
from rlaif.run.directory import JournalName, Run, open_run
from rlaif.settings import load

HOLD = """
import sys
from rlaif.run.directory import Run
sys.argv = ["rlaif", "generate"]
with Run({path!r}).writing():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock until its standard input is closed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(path=str(path))], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


# The lock


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    """kill -9 releases the lock; what the dead process left in the lock file misleads nobody."""
    run = Run(tmp_path / "run")
    assert not run.is_being_written()
    with held(run.path) as process:
        assert run.is_being_written()
        with (
            pytest.raises(RunError, match=rf"locked by process {process.pid} \(rlaif generate\)") as raised,
            run.writing(),
        ):
            raise AssertionError("two writers")
        assert raised.value.where == str(run.path)
        assert raised.value.exit_code == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not run.is_being_written()
        with run.writing():
            assert run.is_being_written()
            assert f"process {os.getpid()} " in (run.path / ".lock").read_text()
    assert not run.is_being_written()


def test_the_lock_is_given_back_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with held(run.path) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    with pytest.raises(ZeroDivisionError), run.writing():
        _ = 1 / 0
    with run.writing():
        pass
    assert not run.is_being_written()


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.writing(), pytest.raises(RunError, match="locked by process"), Run(run.path).writing():
        raise AssertionError("two writers")


def test_looking_never_keeps_a_writer_out(tmp_path: Path) -> None:
    """`status` asks whether a run is being written, again and again, while another command starts."""
    run = Run(tmp_path / "run")
    with run.writing():
        pass
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            Run(run.path).is_being_written()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(200):
            with run.writing():
                pass
    finally:
        stop.set()
        looking.join()


@contextlib.contextmanager
def somebody() -> Iterator[Path]:
    """A directory that the user of this block cannot write to; root gives up being root for it."""
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


def test_a_directory_that_cannot_be_written_to_is_told() -> None:
    with somebody() as folder:
        for path in (folder / "run", folder / "absent"):
            with pytest.raises(RunError) as raised, Run(path).writing():
                raise AssertionError("written")
            assert str(raised.value) == f"{path}: cannot be written to: Permission denied"
        with pytest.raises(RunError, match=r"manifest\.json: cannot be written: Permission denied"):
            Run(folder / "run").update_manifest("generate", x=1)
        with pytest.raises(RunError, match="cannot be opened for writing: Permission denied"):
            Run(folder / "run").journal("prompts")


def test_a_file_in_the_runs_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written to: "), Run(tmp_path / "file").writing():
        raise AssertionError("written")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As NFS answers whose lock daemon is not there, and Lustre mounted without flock."""

    def no_locks(_fd: int, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("rlaif.run.directory.fcntl.flock", no_locks)
    run = Run(tmp_path / "run")
    with pytest.raises(RunError, match=f"cannot be locked: {os.strerror(number)}") as raised, run.writing():
        pytest.fail("went on without a lock")
    assert "file system has to have locks" in str(raised.value)
    assert run.is_being_written() is False


def test_a_full_disk_does_not_keep_the_lock_from_holding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder's name is a courtesy."""

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    run = Run(tmp_path / "run")
    with run.writing(), pytest.raises(RunError, match="locked by another process"), Run(run.path).writing():
        raise AssertionError("two writers")


# Opening


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such run"):
        open_run(tmp_path / "absent")
    with pytest.raises(RunError, match="this directory is not a run"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="there is no such run"):
        open_run(tmp_path / "file")


def test_a_run_that_has_only_settings_is_empty(tmp_path: Path) -> None:
    (tmp_path / "rlaif.toml").write_text("")
    run = rlaif.open_run(str(tmp_path))
    for frame in (run.prompts(), run.completions(), run.verdicts(), run.reviews()):
        assert isinstance(frame, pl.DataFrame)
        assert frame.height == 0
        assert "key" in frame.columns
    with pytest.raises(RunError, match="there are no pairs yet") as raised:
        run.pairs()
    assert f"rlaif judge {tmp_path}" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rlaif.toml"]  # reading made nothing


# The manifest


def test_facts_are_merged_by_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.manifest() == {"schema_version": 1, "stages": {}}
    run.update_manifest("generate", a=1, b=2)
    run.update_manifest("judge", a=3)
    run.update_manifest("generate", b=[4], c=None)
    assert run.manifest()["stages"] == {"generate": {"a": 1, "b": [4], "c": None}, "judge": {"a": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_another_version_put_into_the_manifest_stays(tmp_path: Path) -> None:
    value = {"schema_version": 1, "stages": {"other": {"x": 1}}, "further": "kept"}
    (tmp_path / "manifest.json").write_bytes(orjson.dumps(value))
    Run(tmp_path).update_manifest("generate", a=1)
    assert Run(tmp_path).manifest() == {**value, "stages": {"other": {"x": 1}, "generate": {"a": 1}}}


def test_the_manifest_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops the writing, the old one is still there, and no temporary file beside it."""
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


def test_a_newer_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 99, "stages": {}}')
    with pytest.raises(RunError, match=r"written by a newer rlaif \(schema 99, this one reads 1\)"):
        Run(tmp_path).manifest()
    with pytest.raises(RunError, match="newer"):
        Run(tmp_path).update_manifest("generate", a=1)


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
        '{"schema_version": 1, "stages": []}',
        '{"schema_version": 1, "stages": {"generate": 3}}',
        "\udcff",
    ],
)
def test_a_damaged_manifest_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    before = path.read_bytes()
    for attempt in (Run(tmp_path).manifest, lambda: Run(tmp_path).update_manifest("generate", a=1)):
        with pytest.raises(RunError, match="not a manifest that rlaif wrote") as raised:
            attempt()
        assert raised.value.where == str(path)
        assert raised.value.mend
    assert path.read_bytes() == before


# Beginning a stage


def configured(run: Run, **flags: Any) -> Any:
    values = {"prompts.source": ["a.jsonl"], "sampler.model": ["m"], "judge.model": "j",
              **{name.replace("__", "."): value for name, value in flags.items()}}  # fmt: skip
    return load(run.path, values, {})


def put(run: Run, name: JournalName, record: Record) -> None:
    with run.journal(name) as journal:
        journal.append([record])


KEY = key_of(x=1)
PROMPT = Prompt(key=KEY, prompt_id="p", messages=[Message(role="user", content="q")])
COMPLETION = Completion(key=KEY, prompt_id="p", index=0, model="m", text="t")
VERDICT = Verdict(key=KEY, kind="compare", judge="j", judge_hash="h", model="m", prompt_id="p", a="1", p_a=0.5)


def test_what_ran_is_recorded(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin("generate", configured(run))
    facts = run.manifest()["stages"]["generate"]
    assert facts["config"]["sampler"]["model"] == ["m"]
    assert facts["identity"]["policies"] == ["m"]
    assert re.fullmatch("[0-9a-f]{64}", facts["identity_hash"])
    assert facts["packages"]["rlaif"] == rlaif.__version__
    assert facts["ended"] is None
    run.end("generate", prompts=3)
    facts = run.manifest()["stages"]["generate"]
    assert facts["started"] <= facts["ended"]
    assert facts["history"][-1]["prompts"] == 3
    run.begin("generate", configured(run))
    assert run.manifest()["stages"]["generate"]["ended"] is None
    run.end("generate", prompts=4)
    assert [start["prompts"] for start in run.manifest()["stages"]["generate"]["history"]] == [3, 4]


def test_a_changed_identity_is_refused_and_the_manifest_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin("generate", configured(run))
    put(run, "prompts", PROMPT)
    put(run, "completions", COMPLETION)
    before = run.manifest_path.read_bytes()
    with pytest.raises(IdentityError, match=r"policies was \['m'\], now \['n'\]"):
        run.begin("generate", configured(run, sampler__model=["n"]))
    with pytest.raises(IdentityError, match=r"sampler.n may only grow: it was 4, now 3"):
        run.begin("generate", configured(run, sampler__n=3))
    assert run.manifest_path.read_bytes() == before
    run.begin("generate", configured(run, sampler__n=5, client__concurrency=7))
    with pytest.raises(IdentityError, match=r"sampler.n may only grow: it was 5, now 4"):
        run.begin("generate", configured(run))


def test_a_setting_that_has_decided_nothing_may_be_mended(tmp_path: Path) -> None:
    """A mistyped file or model stops the first command; the second, mended one is not refused for the difference.

    Prompts bind what decides prompts, answers bind what decides answers; a failure or an imported answer binds nothing.
    """
    run = Run(tmp_path)
    run.begin("generate", configured(run, prompts__source=["typo.jsonl"], sampler__model=["typo"], sampler__n=8))
    run.begin("generate", configured(run, sampler__model=["typo"], sampler__max_tokens=99999))
    put(run, "prompts", PROMPT)
    with pytest.raises(IdentityError, match=r"prompts\.source was"):
        run.begin("generate", configured(run, prompts__source=["other.jsonl"]))
    with pytest.raises(IdentityError, match="seed was 0, now 1"):
        run.begin("generate", configured(run, seed=1))
    with pytest.raises(IdentityError, match=r"sampler.system was None, now 's'"):
        run.begin("generate", configured(run, sampler__system="s"))
    put(run, "completions", Failure(key=KEY, error="HTTP 400: too many tokens", kind="endpoint"))
    put(run, "completions", COMPLETION.model_copy(update={"source": "imported"}))
    run.begin("generate", configured(run))
    put(run, "completions", COMPLETION)
    with pytest.raises(IdentityError, match="policies was"):
        run.begin("generate", configured(run, sampler__model=["typo"]))


def test_a_judge_is_bound_by_its_first_verdict_unless_restarted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    put(run, "prompts", PROMPT)
    put(run, "completions", COMPLETION)
    run.begin("judge", configured(run, judge__model="typo"))
    run.begin("judge", configured(run))
    put(run, "verdicts", VERDICT)
    with pytest.raises(IdentityError, match="--restart"):
        run.begin("judge", configured(run, judge__model="k"))
    run.begin("judge", configured(run, judge__model="k"), restart=True)
    run.begin("judge", configured(run, judge__model="k"))
