"""The journal loses nothing but a torn last line, says which line is damaged, and stays whole on a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif.errors import RunError
from rlaif.records import Completion, Failure, key_of
from rlaif.run import journal as journals
from rlaif.run.journal import Journal, Reader, blocks, read

shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def key(number: int) -> str:
    return key_of(number=number)


def answer(number: int, text: str = "a") -> Completion:
    return Completion(key=key(number), prompt_id=f"p{number}", index=0, model="m", text=text, at=0.0)


def failure(number: int) -> Failure:
    return Failure(key=key(number), error="HTTP 500", kind="endpoint", at=0.0)


def texts(path: Path) -> list[str]:
    return [record.get("text", record.get("error")) for _, record in read(path)]


def done(journal: Journal) -> set[int]:
    return {number for number in range(200) if key(number) in journal}


# What a crash leaves


TEXTS = st.text(st.sampled_from('aé🙂"\\\n\r\u2028 ') | st.characters(exclude_categories=["Cs"]), max_size=12)


@shared_folder
@given(st.lists(TEXTS, min_size=1, max_size=6), st.data())
def test_cut_anywhere_the_whole_lines_stay_and_writing_goes_on(tmp_path: Path, said: list[str], data: Any) -> None:
    """A crash ends the file at any byte: every record whose newline is there is kept, the torn one is owed again."""
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for number, text in enumerate(said):
            journal.append([answer(number, text)])
    whole = path.read_bytes()
    assert whole.count(b"\n") == len(said)
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    kept = whole[:size].count(b"\n")

    assert texts(path) == said[:kept]  # a reader sees the same before anybody mends the file
    with Journal(path) as journal:
        assert done(journal) == set(range(kept))
        journal.append([answer(100, "after")])
    assert texts(path) == [*said[:kept], "after"]
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:kept]))


@pytest.mark.parametrize("length", [10, 65535, 65536, 65537, 200_000])
def test_a_long_torn_line_is_cut(tmp_path: Path, length: int) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1)])
    with path.open("ab") as file:
        file.write(b'{"key":"' + b"0" * length)
    with Journal(path) as journal:
        assert done(journal) == {1}
        journal.append([answer(2, "b")])
    assert texts(path) == ["a", "b"]


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b"x" * 70_000)
    with Journal(path) as journal:
        assert done(journal) == set()
    assert path.read_bytes() == b""


def test_an_absent_and_an_empty_journal_are_empty(tmp_path: Path) -> None:
    assert list(read(tmp_path / "absent.jsonl")) == []
    assert list(blocks(tmp_path / "absent.jsonl")) == []
    assert not (tmp_path / "absent.jsonl").exists()
    with Journal(tmp_path / "deep" / "j.jsonl") as journal:
        journal.append([])
        assert done(journal) == set()
    assert list(read(tmp_path / "deep" / "j.jsonl")) == []


DAMAGE = [b"not json", b"", b"   ", b"[1]", b"null", b"3", b'{"key": 3}', b'{"key": "xyz"}', b'{"text": "no key"}',
          b'{"key": "00"', b'{"key": "00"}{"key": "01"}', b'{"key": "00", "text": "\xff"}', b"\0\0\0"]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGE, ids=repr)
def test_a_damaged_line_is_named_by_file_and_line(tmp_path: Path, line: bytes) -> None:
    """Reading and opening both refuse, and the file is left as it was."""
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1), answer(2), answer(3)])
    lines = path.read_bytes().splitlines()
    before = b"\n".join([*lines[:2], line, lines[2], b"torn"])
    path.write_bytes(before)
    with pytest.raises(RunError) as raised:
        list(read(path))
    assert raised.value.where == f"{path}:3"
    before_open = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(RunError) as raised:
        Journal(path)
    assert raised.value.where == f"{path}:3"
    assert raised.value.mend
    assert len(list(Path("/proc/self/fd").iterdir())) == before_open
    assert path.read_bytes().startswith(b"\n".join([*lines[:2], line, lines[2]]))


# Keys, failures, newest


def test_a_failure_is_owed_again_and_a_later_success_settles_it(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1), failure(2), failure(3)])
        assert done(journal) == {1}
        assert journal.failed == {bytes.fromhex(key(2)), bytes.fromhex(key(3))}
        journal.append([answer(3, "at last"), failure(1)])
        assert done(journal) == {1, 3}
        assert journal.failed == {bytes.fromhex(key(2))}
    with Journal(path) as journal:
        assert done(journal) == {1, 3}
        assert journal.failed == set(), "a failure of an earlier command is owed by this one"
    assert texts(path) == ["a", "HTTP 500", "HTTP 500", "at last", "HTTP 500"]
    assert not journal.done, "a closed journal takes no memory"


@shared_folder
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20), st.integers(0, 20))
def test_what_is_done_does_not_depend_on_how_often_the_journal_was_opened(
    tmp_path: Path, events: list[tuple[int, bool]], cut: int
) -> None:
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    for part in (events[:cut], events[cut:]):
        with Journal(path) as journal:
            for number, good in part:
                journal.append([answer(number) if good else failure(number)])
            seen = done(journal)
    assert seen == {number for number, good in events if good}
    with Journal(path) as journal:
        assert done(journal) == seen


def test_only_keys_are_in_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        assert None not in journal
        assert 3 not in journal


def test_a_block_of_records_is_one_line_each(tmp_path: Path) -> None:
    """Whatever a text holds: newlines, separators and quotes never break a line."""
    path = tmp_path / "j.jsonl"
    nasty = ["\n", "\r\n", "\u2028\u2029\x85\x0b\x0c", '"}\n{"key":"00"}', "\0", "🙂" * 3]
    with Journal(path) as journal:
        journal.append(answer(number, text) for number, text in enumerate(nasty))
    assert path.read_bytes().count(b"\n") == len(nasty)
    assert texts(path) == nasty
    assert [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:-1]] == nasty


def test_a_record_that_cannot_be_written_leaves_no_trace(tmp_path: Path) -> None:
    """Neither in the file nor among the keys: nothing of the block it came in."""
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        with pytest.raises(TypeError):
            journal.append([answer(1), answer(2, "\ud800")])
        assert done(journal) == set()
        journal.append([answer(2)])
    assert texts(path) == ["a"]


# Offsets and blocks


@shared_folder
@given(st.lists(TEXTS, max_size=30), st.integers(1, 400))
def test_offsets_lead_back_to_their_records_for_any_block_size(tmp_path: Path, said: list[str], block: int) -> None:
    """Lines longer than a block, and blocks that end within a character or exactly at a newline."""
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        journal.append(answer(number, text) for number, text in enumerate(said))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journals, "BLOCK", block)
        found = list(read(path))
        pieces = list(blocks(path))
        with Journal(path) as journal:
            assert done(journal) == set(range(len(said)))
    assert [record["text"] for _, record in found] == said
    assert b"".join(piece for _, piece in pieces) == path.read_bytes()
    assert all(piece.endswith(b"\n") for _, piece in pieces)
    assert [start for start, _ in pieces] == [sum(len(p) for _, p in pieces[:i]) for i in range(len(pieces))]
    reader = Reader(path)
    for offset, record in reversed(found):
        assert reader.at(offset) == record
    reader.close()


def test_reading_beside_a_writer_sees_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1)])
        reading = read(path)
        assert next(reading)[1]["key"] == key(1)
        with path.open("ab") as file:  # a write on its way
            file.write(b'{"key": "' + key(2).encode())
            file.flush()
            assert [record["key"] for _, record in read(path)] == [key(1)]
            file.write(b'", "text": "b"}\n')
        assert texts(path) == ["a", "b"]


# Disks


FILL = """
import json, resource, sys
from rlaif.errors import RunError
from rlaif.records import Completion, key_of
from rlaif.run.journal import Journal
from pathlib import Path
path, limit = Path(sys.argv[1]), int(sys.argv[2])
journal = Journal(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
told = None
for number in range(1000):
    try:
        journal.append([Completion(key=key_of(number=number), prompt_id="p", index=0, model="m", text="x" * 300)])
    except RunError as error:
        told = error
        break
assert told is not None
written = [key_of(number=n) in journal for n in range(number + 1)]
# Room again, and those in flight come in.
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append([Completion(key=key_of(number=9999), prompt_id="p", index=0, model="m", text="late")])
print(json.dumps({"told": str(told), "code": told.exit_code, "written": written}))
"""


@pytest.mark.parametrize("limit", [5_000, 5_001, 5_123, 4_096])
def test_a_full_disk_is_told_and_the_journal_stays_whole(tmp_path: Path, limit: int) -> None:
    """The record that did not fit is not counted as done, and what is written after it starts on a new line."""
    path = tmp_path / "j.jsonl"
    ran = subprocess.run([sys.executable, "-c", FILL, path, str(limit)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = orjson.loads(ran.stdout)
    assert found["told"].startswith(f"{path}: cannot be written: File too large\n  Make room")
    assert found["code"] == 1
    assert found["written"] == [True] * (len(found["written"]) - 1) + [False]
    assert len(found["written"]) > 5
    keys = [record["key"] for _, record in read(path)]
    assert keys == [key(number) for number in [*range(len(found["written"]) - 1), 9999]]
    with Journal(path) as journal:
        assert done(journal) == set(range(len(keys) - 1))


def test_a_disk_that_cannot_be_synced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([answer(1)])
    with pytest.raises(RunError, match="cannot be written: Input/output error"):
        journal.close()
    journal.close()  # and is closed all the same


def test_a_journal_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "j.jsonl", tmp_path):
        with pytest.raises(RunError, match="cannot be opened for writing: "):
            Journal(path)
    with pytest.raises(RunError, match="cannot be read: Is a directory"):
        list(read(tmp_path))


def test_records_are_on_disk_at_the_latest_when_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append([answer(1)])
        monkeypatch.setattr(journals, "SYNC_EVERY_S", 0.0)
        journal.append([answer(2)])
        assert len(synced) == 1
    assert len(synced) == 2
