"""Frames hold the newest answer with each key, and the offset of its line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif.errors import RunError
from rlaif.records import Completion, Failure, Message, Prompt, Review, Verdict, content_key
from rlaif.run import frames
from rlaif.run.journal import Journal, JournalReader


def key(number: int) -> str:
    return content_key(number=number)


def answer(number: int, text: str = "a") -> Completion:
    return Completion(key=key(number), prompt_id=f"p{number}", index=number, model="m", text=text, created_at=1.5)


RECORDS: dict[str, Any] = {
    "PROMPTS": Prompt(
        key=key(1),
        prompt_id="p",
        messages=[Message(role="user", content="q")],
        reference="r",
        tags=["x", "y"],
        split="heldout",
        source="f.jsonl:1",
        checks=[{"kind": "regex"}],
    ),
    "COMPLETIONS": Completion(
        key=key(1),
        prompt_id="p",
        index=3,
        model="m",
        text="t",
        reasoning="h",
        cost_usd=0.25,
        finish_reason="stop",
        prompt_tokens=4,
        completion_tokens=5,
        source="imported",
        created_at=2.5,
        tool_calls=[{"id": "1"}],
    ),
    "VERDICTS": Verdict(
        key=key(1),
        kind="compare",
        judge="j",
        judge_hash="h",
        model="m",
        prompt_id="p",
        a="1",
        b="2",
        order="ba",
        aspect="z",
        sample=2,
        prob_a=0.75,
        score=3.5,
        variance=0.5,
        label="refuse",
        verdict_mass=0.9,
        reply="A",
        flags=["f"],
        prompt_tokens=1,
        cached_tokens=2,
        completion_tokens=3,
        cost_usd=0.5,
        created_at=3.5,
    ),
    "REVIEWS": Review(
        key=key(1),
        pair_id="1",
        prompt_id="p",
        annotator="n",
        choice="left",
        left_side="b",
        preferred="b",
        role="adjudicator",
        comment="c",
        edited_response="e",
        confidence=2,
        seconds=1.5,
        route="audit",
        inclusion_probability=0.1,
        created_at=4.5,
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_column_has_the_journaled_value(tmp_path: Path, name: str) -> None:
    """The columns are fields of the record, so that no mistyped column is always null."""
    record = RECORDS[name]
    schema = getattr(frames, name)
    assert set(schema) <= set(type(record).model_fields)
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append([record])
    frame = frames.read_journal_frame(tmp_path / "j.jsonl", schema)
    assert dict(frame.schema) == {**schema, "offset": pl.Int64}
    row = frame.row(0, named=True)
    assert row == {**{column: getattr(record, column) for column in schema}, "offset": 0}
    assert None not in row.values()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)),
        max_size=30,
    ),
    st.integers(1, 900),
)
def test_the_newest_answer_is_kept_with_the_offset_of_its_line(
    tmp_path: Path, events: list[tuple[int, str | None]], block: int
) -> None:
    """For any block size, there is one row per key, no failure, and the reader finds the row's record by its offset."""
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    newest: dict[str, str] = {}
    with Journal(path) as journal:
        for number, text in events:
            if text is None:
                journal.append([Failure(key=key(number), error="e", kind="endpoint")])
            else:
                journal.append([answer(number, text)])
                newest[key(number)] = text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlaif.run.journal.READ_CHUNK_BYTES", block)
        frame = frames.read_journal_frame(path, frames.COMPLETIONS)
    assert dict(frame.select("key", "text").rows()) == newest
    assert frame.height == len(newest)
    reader = JournalReader(path)
    for row in frame.iter_rows(named=True):
        record = reader.read_at(row["offset"])
        assert (record["key"], record["text"]) == (row["key"], row["text"])
    reader.close()


def test_reduce_is_applied_to_each_block_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(answer(number, "x" * number) for number in range(50))
    monkeypatch.setattr("rlaif.run.journal.READ_CHUNK_BYTES", 1000)
    seen: list[int] = []

    def shorten(frame: pl.DataFrame) -> pl.DataFrame:
        assert "error" not in frame.columns
        seen.append(frame.height)
        return frame.select("key", "offset", chars=pl.col("text").str.len_chars())

    frame = frames.read_journal_frame(path, frames.COMPLETIONS, shorten)
    assert frame["chars"].to_list() == list(range(50))
    assert len(seen) > 5
    assert sum(seen) == 50


def test_missing_fields_are_null_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    """An older or newer version of rlaif may have written the line."""
    path = tmp_path / "j.jsonl"
    path.write_bytes(orjson.dumps({"key": key(1), "later": {"deep": [1, {}]}, "text": "t"}) + b"\n")
    row = frames.read_journal_frame(path, frames.COMPLETIONS).row(0, named=True)
    assert (row["key"], row["text"], row["model"], row["cost_usd"]) == (key(1), "t", None, None)
    assert set(row) == {*frames.COMPLETIONS, "offset"}


@pytest.mark.parametrize("content", [None, b"", b'{"key": "torn'])
def test_a_journal_without_answers_is_an_empty_frame_with_the_same_columns(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "j.jsonl"
    if content is not None:
        path.write_bytes(content)
    empty = frames.read_journal_frame(path, frames.VERDICTS)
    assert empty.height == 0
    assert dict(empty.schema) == {**frames.VERDICTS, "offset": pl.Int64}
    path.write_bytes(b"")
    with Journal(path) as journal:
        journal.append([Failure(key=key(1), error="e", kind="endpoint")])
    assert frames.read_journal_frame(path, frames.VERDICTS).equals(empty)


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1)])
    with path.open("ab") as file:
        file.write(b'{"key": "00", "te')
    assert frames.read_journal_frame(path, frames.COMPLETIONS)["key"].to_list() == [key(1)]


@pytest.mark.parametrize(
    "line", [b"not json", b"", b"[1]", b'{"key":"00"} {"key":"01"}', b'{"key":"00","text":"\xff"}', b"\0\0"], ids=repr
)
def test_the_error_names_a_damaged_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append([answer(1), answer(2)])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, lines[1], b""]))
    with pytest.raises(RunError) as raised:
        frames.read_journal_frame(path, frames.COMPLETIONS)
    assert raised.value.location == f"{path}:2"


def test_a_field_of_the_wrong_type_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"key":"00","index":"first"}\n')
    with pytest.raises(RunError, match="a record does not have the fields of its kind") as raised:
        frames.read_journal_frame(path, frames.COMPLETIONS)
    assert raised.value.location == str(path)


# Derived tables


def make_frames(*sizes: int) -> Iterator[pl.DataFrame]:
    for size in sizes:
        yield pl.DataFrame(
            {"n": range(size), "text": ["é🙂"] * size, "many": [["a"]] * size},
            schema={"n": pl.Int64, "text": pl.String, "many": pl.List(pl.String)},
        )


def test_frames_become_row_groups_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.parquet"
    frames.write_parquet_atomically(make_frames(3, 0, 2), path)
    assert pl.read_parquet(path).equals(pl.concat(make_frames(3, 0, 2)))
    frames.write_parquet_atomically(make_frames(0), path)
    assert pl.read_parquet(path).height == 0
    assert [path.name for path in path.parent.iterdir()] == ["t.parquet"]


def test_the_old_table_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    """A reader never sees half a table, and a failure leaves no temporary file."""
    path = tmp_path / "t.parquet"
    frames.write_parquet_atomically(make_frames(4), path)
    before = path.read_bytes()

    def breaks() -> Iterator[pl.DataFrame]:
        yield from make_frames(2)
        assert path.read_bytes() == before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frames.write_parquet_atomically(breaks(), path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_a_table_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: "):
        frames.write_parquet_atomically(make_frames(1), tmp_path / "file" / "t.parquet")
    (tmp_path / f".t.parquet.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot be written: .*No space left"):
        frames.write_parquet_atomically(make_frames(100), tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
