"""The journal loses at most a torn last line, names damaged lines, and stays intact on a full disk."""

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
from rlaif.records import Completion, Failure, content_key
from rlaif.run.journal import Journal, JournalReader, iter_blocks, iter_records

shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def key(number: int) -> str:
    return content_key(number=number)


def answer(number: int, text: str = "a") -> Completion:
    return Completion(key=key(number), prompt_id=f"p{number}", index=0, model="m", text=text, created_at=0.0)


def failure(number: int) -> Failure:
    return Failure(key=key(number), error="HTTP 500", kind="endpoint", created_at=0.0)


def texts(path: Path) -> list[str]:
    return [record.get("text", record.get("error")) for _, record in iter_records(path)]


def answered_numbers(journal: Journal) -> set[int]:
    return {number for number in range(200) if key(number) in journal}


# After a crash


TEXTS = st.text(st.sampled_from('aé🙂"\\\n\r\u2028 ') | st.characters(exclude_categories=["Cs"]), max_size=12)


@shared_folder
@given(st.lists(TEXTS, min_size=1, max_size=6), st.data())
def test_a_file_cut_anywhere_keeps_its_complete_lines_and_can_be_appended_to(
    tmp_path: Path, values: list[str], data: Any
) -> None:
    """A crash can end the file at any byte: records with a newline are kept, the torn one is pending again."""
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for number, text in enumerate(values):
            journal.append([answer(number, text)])
    content = path.read_bytes()
    assert content.count(b"\n") == len(values)
    size = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:size])
    kept = content[:size].count(b"\n")

    assert texts(path) == values[:kept]  # a reader sees the same before the torn line is cut off
    with Journal(path) as journal:
        assert answered_numbers(journal) == set(range(kept))
        journal.append([answer(100, "after")])
    assert texts(path) == [*values[:kept], "after"]
    assert path.read_bytes().startswith(b"".join(content.splitlines(keepends=True)[:kept]))


@pytest.mark.parametrize("length", [10, 65535, 65536, 65537, 200_000])
def test_a_long_torn_line_is_cut_off(tmp_path: Path, length: int) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1)])
    with path.open("ab") as file:
        file.write(b'{"key":"' + b"0" * length)
    with Journal(path) as journal:
        assert answered_numbers(journal) == {1}
        journal.append([answer(2, "b")])
    assert texts(path) == ["a", "b"]


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b"x" * 70_000)
    with Journal(path) as journal:
        assert answered_numbers(journal) == set()
    assert path.read_bytes() == b""


def test_a_missing_and_an_empty_journal_have_no_records(tmp_path: Path) -> None:
    assert list(iter_records(tmp_path / "absent.jsonl")) == []
    assert list(iter_blocks(tmp_path / "absent.jsonl")) == []
    assert not (tmp_path / "absent.jsonl").exists()
    with Journal(tmp_path / "deep" / "j.jsonl") as journal:
        journal.append([])
        assert answered_numbers(journal) == set()
    assert list(iter_records(tmp_path / "deep" / "j.jsonl")) == []


DAMAGE = [
    b"not json",
    b"",
    b"   ",
    b"[1]",
    b"null",
    b"3",
    b'{"key": 3}',
    b'{"key": "xyz"}',
    b'{"text": "no key"}',
    b'{"key": "00"',
    b'{"key": "00"}{"key": "01"}',
    b'{"key": "00", "text": "\xff"}',
    b"\0\0\0",
]


@pytest.mark.parametrize("line", DAMAGE, ids=repr)
def test_the_error_names_file_and_line_of_a_damaged_line(tmp_path: Path, line: bytes) -> None:
    """Reading and opening both raise, and the file is unchanged."""
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1), answer(2), answer(3)])
    lines = path.read_bytes().splitlines()
    before = b"\n".join([*lines[:2], line, lines[2], b"torn"])
    path.write_bytes(before)
    with pytest.raises(RunError) as raised:
        list(iter_records(path))
    assert raised.value.location == f"{path}:3"
    before_open = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(RunError) as raised:
        Journal(path)
    assert raised.value.location == f"{path}:3"
    assert raised.value.hint
    assert len(list(Path("/proc/self/fd").iterdir())) == before_open
    assert path.read_bytes().startswith(b"\n".join([*lines[:2], line, lines[2]]))


# Keys and failures


def test_a_failed_key_is_pending_until_it_has_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1), failure(2), failure(3)])
        assert answered_numbers(journal) == {1}
        assert journal.failed_keys == {bytes.fromhex(key(2)), bytes.fromhex(key(3))}
        journal.append([answer(3, "at last"), failure(1)])
        assert answered_numbers(journal) == {1, 3}
        assert journal.failed_keys == {bytes.fromhex(key(2))}
    with Journal(path) as journal:
        assert answered_numbers(journal) == {1, 3}
        assert journal.failed_keys == set(), "failures of an earlier command are asked again by this one"
    assert texts(path) == ["a", "HTTP 500", "HTTP 500", "at last", "HTTP 500"]
    assert not journal.answered_keys, "a closed journal holds no keys in memory"


@shared_folder
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20), st.integers(0, 20))
def test_answered_keys_do_not_depend_on_how_often_the_journal_was_opened(
    tmp_path: Path, events: list[tuple[int, bool]], cut: int
) -> None:
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    for part in (events[:cut], events[cut:]):
        with Journal(path) as journal:
            for number, good in part:
                journal.append([answer(number) if good else failure(number)])
            answered = answered_numbers(journal)
    assert answered == {number for number, good in events if good}
    with Journal(path) as journal:
        assert answered_numbers(journal) == answered


def test_a_journal_contains_only_keys(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        assert None not in journal
        assert 3 not in journal


def test_each_record_is_one_line(tmp_path: Path) -> None:
    """Newlines, separators and quotes in a text never break a line."""
    path = tmp_path / "j.jsonl"
    nasty = ["\n", "\r\n", "\u2028\u2029\x85\x0b\x0c", '"}\n{"key":"00"}', "\0", "🙂" * 3]
    with Journal(path) as journal:
        journal.append(answer(number, text) for number, text in enumerate(nasty))
    assert path.read_bytes().count(b"\n") == len(nasty)
    assert texts(path) == nasty
    assert [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:-1]] == nasty


def test_a_record_that_cannot_be_serialized_leaves_no_trace(tmp_path: Path) -> None:
    """Neither the file nor the keys contain anything of its block."""
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        with pytest.raises(TypeError):
            journal.append([answer(1), answer(2, "\ud800")])
        assert answered_numbers(journal) == set()
        journal.append([answer(2)])
    assert texts(path) == ["a"]


# Offsets and blocks


@shared_folder
@given(st.lists(TEXTS, max_size=30), st.integers(1, 400))
def test_offsets_find_their_records_for_any_block_size(tmp_path: Path, values: list[str], block: int) -> None:
    """Includes lines longer than a block, and blocks that end inside a character or exactly at a newline."""
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        journal.append(answer(number, text) for number, text in enumerate(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlaif.run.journal.READ_CHUNK_BYTES", block)
        records = list(iter_records(path))
        chunks = list(iter_blocks(path))
        with Journal(path) as journal:
            assert answered_numbers(journal) == set(range(len(values)))
    assert [record["text"] for _, record in records] == values
    assert b"".join(piece for _, piece in chunks) == path.read_bytes()
    assert all(piece.endswith(b"\n") for _, piece in chunks)
    assert [start for start, _ in chunks] == [sum(len(p) for _, p in chunks[:i]) for i in range(len(chunks))]
    reader = JournalReader(path)
    for offset, record in reversed(records):
        assert reader.read_at(offset) == record
    reader.close()


def test_a_reader_beside_a_writer_sees_only_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1)])
        reading = iter_records(path)
        assert next(reading)[1]["key"] == key(1)
        with path.open("ab") as file:  # a write in progress
            file.write(b'{"key": "' + key(2).encode())
            file.flush()
            assert [record["key"] for _, record in iter_records(path)] == [key(1)]
            file.write(b'", "text": "b"}\n')
        assert texts(path) == ["a", "b"]


# Disks


FILL = """
import json, resource, sys
from rlaif.errors import RunError
from rlaif.records import Completion, content_key
from rlaif.run.journal import Journal
from pathlib import Path
path, limit = Path(sys.argv[1]), int(sys.argv[2])
journal = Journal(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
failure = None
for number in range(1000):
    try:
        journal.append([Completion(key=content_key(number=number), prompt_id="p", index=0, model="m", text="x" * 300)])
    except RunError as error:
        failure = error
        break
assert failure is not None
written = [content_key(number=n) in journal for n in range(number + 1)]
# There is space again, and requests in flight finish.
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append([Completion(key=content_key(number=9999), prompt_id="p", index=0, model="m", text="late")])
print(json.dumps({"message": str(failure), "code": failure.exit_code, "written": written}))
"""


@pytest.mark.parametrize("limit", [5_000, 5_001, 5_123, 4_096])
def test_a_full_disk_is_an_error_and_leaves_the_journal_intact(tmp_path: Path, limit: int) -> None:
    """The record that did not fit is not counted as answered, and the next record starts on a new line."""
    path = tmp_path / "j.jsonl"
    ran = subprocess.run([sys.executable, "-c", FILL, path, str(limit)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = orjson.loads(ran.stdout)
    assert result["message"].startswith(f"{path}: cannot be written: File too large\n  hint: ")
    assert result["code"] == 1
    assert result["written"] == [True] * (len(result["written"]) - 1) + [False]
    assert len(result["written"]) > 5
    keys = [record["key"] for _, record in iter_records(path)]
    assert keys == [key(number) for number in [*range(len(result["written"]) - 1), 9999]]
    with Journal(path) as journal:
        assert answered_numbers(journal) == set(range(len(keys) - 1))


def test_a_failing_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([answer(1)])
    with pytest.raises(RunError, match="cannot be written: Input/output error"):
        journal.close()
    journal.close()  # it is closed nevertheless


def test_a_journal_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "j.jsonl", tmp_path):
        with pytest.raises(RunError, match="cannot be opened for writing: "):
            Journal(path)
    with pytest.raises(RunError, match="cannot be read: Is a directory"):
        list(iter_records(tmp_path))


def test_records_are_synced_at_the_latest_on_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append([answer(1)])
        monkeypatch.setattr("rlaif.run.journal.SYNC_EVERY_S", 0.0)
        journal.append([answer(2)])
        assert len(synced) == 1
    assert len(synced) == 2
