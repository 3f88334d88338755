"""All kinds of prompt files give the same rows, and errors name an invalid row by file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlaif import resources
from rlaif.errors import InputError, UsageError
from rlaif.generate.sources import valid_rows, validate_source
from rlaif.records import ImportRow, PromptRow
from tests.conftest import write_jsonl


def fail_on_log(line: str) -> None:
    raise AssertionError(f"unexpected log line: {line}")


def rows_by_line(source: str | Path) -> dict[int, PromptRow]:
    """Return the valid rows of ``source`` by the line or row number of their location."""
    return {int(location.rpartition(":")[2]): row for location, row in valid_rows(str(source), PromptRow)}


def validation_error(source: str | Path, kind: type[PromptRow] = PromptRow) -> str:
    with pytest.raises(UsageError) as raised:
        validate_source(str(source), kind, "stop", fail_on_log)
    assert raised.value.exit_code == 2
    return str(raised.value)


def write_file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Every kind of source


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "nullable": None}}}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "Wie spät ist es? 🕐\r\nGenau.", "id": "a", "tags": ["x", "y"], "reference": "12:00"},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "id": "b",
     "checks": [{"kind": "regex", "pattern": "\\d", "match": True}, {"kind": "length", "unit": "words", "max": 5}]},
    {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": CALLS},
                {"role": "tool", "content": "42", "tool_call_id": "1"}], "id": "c", "tools": TOOLS},
    {"prompt": "p", "id": "d", "system": "t"},
]  # fmt: skip


def as_jsonl(folder: Path) -> str:
    return str(write_jsonl(folder / "p.jsonl", ROWS))


def as_csv(folder: Path) -> str:
    with (folder / "p.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "id", "system", "reference", "tags", "checks", "tools", "else"])
        writer.writeheader()
        for row in ROWS:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return str(folder / "p.csv")


def columnar() -> list[dict[str, Any]]:
    """Return the rows as columnar files store them: one type per column, nested schemas as JSON text, nulls."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"],
            **{name: row.get(name) for name in ("id", "system", "reference", "tags")},
            **{name: json.dumps(row[name]) if name in row else None for name in ("checks", "tools")},
        }
        for row in ROWS
    ]


def as_parquet(folder: Path) -> str:
    pl.DataFrame(columnar(), infer_schema_length=None).write_parquet(folder / "p.parquet")
    return str(folder / "p.parquet")


def as_hub_dataset(folder: Path) -> str:
    """Write a folder that load_dataset reads like a dataset on the hub."""
    datasets.disable_progress_bars()
    (folder / "set").mkdir()
    datasets.Dataset.from_list(columnar()).to_parquet(folder / "set" / "train-00000-of-00001.parquet")
    return f"hf:{folder / 'set'}"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet, as_hub_dataset])
def test_every_kind_of_source_gives_the_same_rows(offline: None, tmp_path: Path, write: Callable[[Path], str]) -> None:
    """Messages, tools, checks, tags and system prompts are unchanged, and each row has its location."""
    source = write(tmp_path)
    assert validate_source(source, PromptRow, "stop", fail_on_log) == len(ROWS)
    parsed = [row for _, row in valid_rows(source, PromptRow)]
    expected = [PromptRow.model_validate(row) for row in ROWS]
    assert [row.messages() for row in parsed] == [row.messages() for row in expected]
    for name in ("id", "reference", "checks", "tags", "tools"):
        assert [getattr(row, name) for row in parsed] == [getattr(row, name) for row in expected], name
    assert all(location.startswith(source + ":") for location, _ in valid_rows(source, PromptRow))


def test_a_hub_dataset_has_splits_and_slices(offline: None, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 3)):
        pl.DataFrame({"prompt": [f"{split} {i}" for i in range(count)]}).write_parquet(folder / f"{split}.parquet")
    datasets.disable_progress_bars()
    for source, expected in ((f"hf:{folder}", 5), (f"hf:{folder}:test", 3), (f"hf:{folder}:train[1:3]", 2),
                             (f"hf:{folder}@default:test", 3)):  # fmt: skip
        assert [location for location, _ in valid_rows(source, PromptRow)] == [
            f"{source}:{i}" for i in range(1, expected + 1)
        ]
    assert validation_error(f"hf:{folder}:absent").startswith(
        f"hf:{folder}:absent: cannot be loaded from the Hugging Face Hub: "
    )
    assert "hf:NAME[@CONFIG][:SPLIT]" in validation_error(f"hf:{tmp_path / 'nothing'}")


def test_a_packaged_set_is_read_by_name() -> None:
    for name, path in resources.prompt_sets().items():
        assert validate_source(name, PromptRow, "stop", fail_on_log) == path.read_bytes().count(b"\n")


def test_parquet_rows_are_numbered_across_row_groups(tmp_path: Path) -> None:
    """Batches do not restart the numbers either."""
    pl.DataFrame({"prompt": [f"p{i}" for i in range(2500)]}).write_parquet(tmp_path / "p.parquet", row_group_size=600)
    parsed = rows_by_line(tmp_path / "p.parquet")
    assert {number: row.prompt for number, row in parsed.items()} == {i + 1: f"p{i}" for i in range(2500)}


def test_messages_without_their_final_answer_are_the_prompt(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": talk}, {"messages": [*talk, talk[0]]},
                                              {"messages": talk, "prompt": "p"}])  # fmt: skip
    assert [len(row.messages()) for row in rows_by_line(path).values()] == [1, 3, 1]
    assert rows_by_line(path)[3].prompt == "p"
    assert "prompt has no messages" in validation_error(write_jsonl(tmp_path / "q.jsonl", [{"messages": talk[1:]}]))


def test_other_columns_are_ignored(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "split": "train", "score": 3, "answer": None}])
    assert rows_by_line(path)[1] == PromptRow(prompt="q")


# Text


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "p.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \r\n{"prompt": "b\\r\\n"}\r\n\n{"prompt": "c"}'
    )
    assert {line: row.prompt for line, row in rows_by_line(path).items()} == {1: "a", 4: "b\r\n", 6: "c"}
    path = write_file(tmp_path / "p.csv", b'\xef\xbb\xbfprompt,id\r\na,1\r\n\r\n"b\r\nb",2\r\n\r\nc,3')
    assert {line: (row.prompt, row.id) for line, row in rows_by_line(path).items()} == {
        2: ("a", "1"), 4: ("b\r\nb", "2"), 7: ("c", "3")}  # fmt: skip


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """They are valid in JSON escapes and impossible in UTF-8: the row stays valid, the character becomes U+FFFD."""
    path = write_file(tmp_path / "p.jsonl", '{"prompt": "a\\ud800b \\ud83d\\ude00", "tags": ["\\udfff"]}\n')
    assert rows_by_line(path)[1] == PromptRow(prompt="a\ufffdb 😀", tags=["\ufffd"])


CELLS = st.text(st.sampled_from('a,"\n\r;[{ é🙂\t') | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
                max_size=8)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(CELLS.map(lambda cell: "p" + cell), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]),
       st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))  # fmt: skip
def test_any_csv_cell_is_read_back_with_its_first_line(
    tmp_path: Path, cells: list[str], newline: str, quoting: Any
) -> None:
    assume(quoting == csv.QUOTE_ALL or "\r" not in "".join(cells))  # Python's writer leaves \r unquoted
    written = io.StringIO()
    writer = csv.writer(written, lineterminator=newline, quoting=quoting)
    writer.writerow(["id", "prompt"])
    begins = []
    for number, cell in enumerate(cells):
        # Python's csv reader ends a line at \n, at \r\n and at a single \r.
        so_far = written.getvalue().replace("\r\n", "\n").replace("\r", "\n")
        begins.append(so_far.count("\n") + 1)
        writer.writerow([number, cell])
    path = write_file(tmp_path / "p.csv", written.getvalue())
    assert [(line, row.prompt) for line, row in rows_by_line(path).items()] == list(zip(begins, cells, strict=True))


def test_a_prompt_in_brackets_is_text_unless_it_is_a_list_of_messages(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "p.csv", 'prompt\n"[1, 2] sorted?"\n"[1, 2]"\n[draft\n"[{""role"": ""user"", ""content"": ""q""}]"\n'
    )
    prompts = [row.prompt for row in rows_by_line(path).values()]
    assert prompts[:3] == ["[1, 2] sorted?", "[1, 2]", "[draft"]
    assert PromptRow(prompt=prompts[3]).messages()[0].content == "q"


def test_tags_in_csv_are_json_or_separated_by_semicolons(tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.csv", 'prompt,tags\na,x; y ;\nb,"[""x"", ""y""]"\nc,\n')
    assert [row.tags for row in rows_by_line(path).values()] == [["x", "y"], ["x", "y"], []]


# Invalid rows


BAD_LINES: list[tuple[bytes, str]] = [
    (b"{bad", "not JSON: Expecting property name enclosed in double quotes"),
    (b'{"prompt": "a"} x', "not JSON: Extra data"),
    (b'{"prompt": NaN}', "not JSON: NaN is not JSON"),
    (b'["prompt"]', "expected a JSON object, got list"),
    (b"null", "expected a JSON object, got NoneType"),
    (b'{"question": "a", "id": 3}', "missing 'prompt'; the row has id, question"),
    (b"{}", "missing 'prompt'; the row has no columns"),
    (b'{"prompt": ""}', "prompt is empty"),
    (b'{"prompt": null}', "prompt: Field required"),
    (b'{"prompt": ["a"]}', "prompt.messages.0: Input should be a valid dictionary"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8 text (byte 15 of the line)"),
    (b'{"prompt": "a", "checks": [{"a": ' + b"[" * 900 + b"]" * 900 + b"}]}", "cannot be stored: "),
    (b'{"prompt": "a", "checks": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not JSON: "),
    (
        b'{"prompt": "a", "tools": [{"max": 99999999999999999999, "x": "\\ud800"}]}',
        "cannot be stored: Integer exceeds 64",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message[:40] for _, message in BAD_LINES])
def test_an_invalid_line_is_named_and_the_others_are_kept(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_file(tmp_path / "p.jsonl", b'{"prompt": "one"}\n' + line + b'\n\n{"prompt": "two"}\n')
    assert validation_error(path).startswith(f"{path}:2: {message}")
    lines: list[str] = []
    assert validate_source(str(path), PromptRow, "skip", lines.append) == 2
    assert lines[0].startswith(f"skipped: {path}:2: {message}")
    assert lines[1:] == [f"{path}: invalid rows: 1 (skipped), valid rows: 2"]
    assert {number: row.prompt for number, row in rows_by_line(path).items()} == {1: "one", 4: "two"}


BAD_CELLS: list[tuple[bytes, str]] = [
    (b"a,1,2,3", "4 cells, but the header has 3 columns"),
    (b",1,", "missing 'prompt'; the row has id"),
    (b"caf\xe9,1,", "not UTF-8 text"),
    (b"a,1,[bad", "column 'checks' is not JSON: "),
    (b"a,1,3", "checks: Input should be a valid list"),
    (b'a,1,"' + b"[" * 5000 + b'"', "column 'checks' is not JSON: "),
]


@pytest.mark.parametrize(("line", "message"), BAD_CELLS, ids=[message[:40] for _, message in BAD_CELLS])
def test_an_invalid_csv_row_is_named_and_the_others_are_kept(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_file(tmp_path / "p.csv", b'prompt,id,checks\n"o\nne",0,\n' + line + b"\ntwo,2,\n")
    assert validation_error(path).startswith(f"{path}:4: {message}")
    assert {number: row.prompt for number, row in rows_by_line(path).items()} == {2: "o\nne", 5: "two"}


def test_an_unclosed_quote_is_reported_at_its_opening_line(tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.csv", 'prompt,id\none,1\n"two,2\nthree,3\n')
    assert validation_error(path).startswith(f"{path}:3: not CSV: unexpected end of data")
    assert list(rows_by_line(path)) == [2]


def test_an_invalid_parquet_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pl.DataFrame({"prompt": ["a", "b", None], "tools": [None, "[bad", None]}).write_parquet(path)
    message = validation_error(path)
    assert message.startswith(f"{path}:2: column 'tools' is not JSON: ")
    assert f"\n  {path}:3: missing 'prompt'; the row has no columns" in message
    assert list(rows_by_line(path)) == [1]


@pytest.mark.parametrize("bad", [1, 9, 10, 11, 25])
def test_ten_invalid_rows_are_listed_and_the_others_counted(tmp_path: Path, bad: int) -> None:
    path = write_file(tmp_path / "p.jsonl", '{"prompt": "good"}\n' + '{"prompt": 1}\n' * bad)
    message = validation_error(path)
    assert message.startswith(f"{path}:2: prompt.text: Input should be a valid string")
    assert [f"{path}:{line}:" in message for line in range(2, bad + 2)] == [line < 12 for line in range(2, bad + 2)]
    assert (f"and {bad - 10} more" in message) is (bad > 10)
    assert "--on-bad-row skip" in message.splitlines()[-1]
    lines: list[str] = []
    validate_source(str(path), PromptRow, "skip", lines.append)
    assert len(lines) == min(bad, 10) + 1


def test_an_invalid_import_row_is_named(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "r.jsonl",
        [{"prompt": "q", "responses": ["a"], "models": ["m", "n"]}, {"prompt": "q"}, {"responses": ["a"]}],
    )
    message = validation_error(path, ImportRow)
    assert message.startswith(f"{path}:1: 1 responses but 2 models")
    assert f"\n  {path}:2: missing 'responses'; the row has prompt" in message
    assert f"\n  {path}:3: missing 'prompt'; the row has responses" in message


# Invalid files


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", ""), ("p.jsonl", "\n \n"), ("p.csv", ""), ("p.csv", "prompt,id\n"), ("p.csv", "\n\n")],
)
def test_a_source_without_prompts_is_an_error(tmp_path: Path, name: str, content: str, mode: Any) -> None:
    path = write_file(tmp_path / name, content)
    with pytest.raises(InputError, match=r"p\.(jsonl|csv): has no rows"):
        validate_source(str(path), PromptRow, mode, fail_on_log)


def test_skipping_every_row_is_an_error(tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.jsonl", '{"question": "a"}\n')
    with pytest.raises(InputError, match="has no valid rows"):
        validate_source(str(path), PromptRow, "skip", lambda _: None)


def test_unknown_sources_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert validation_error("everydya").startswith("unknown prompt set 'everydya'. Did you mean 'everyday'?")
    assert "Available: constraints, everyday, refusals" in validation_error("zzz")
    assert validation_error("absent.jsonl").startswith("absent.jsonl: file not found")
    assert validation_error("some/where").startswith("some/where: file not found")
    write_file(tmp_path / "p.txt", "a")
    assert validation_error("p.txt").startswith("p.txt: unsupported file extension '.txt'")
    write_file(tmp_path / "plain", "a")
    assert validation_error("plain").startswith("plain: unsupported file extension ''")
    write_file(tmp_path / "bad.parquet", b"PAR1 not really")
    assert validation_error("bad.parquet").startswith("bad.parquet: ")
    write_file(tmp_path / "empty.parquet", b"")
    assert validation_error("empty.parquet").startswith("empty.parquet: ")


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pl.DataFrame({"prompt": [f"p{i}" * 50 for i in range(3000)]}).write_parquet(path)
    content = path.read_bytes()
    for size in (3, 100, len(content) // 2, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:size])
        assert validation_error(path).startswith(f"{path}: ")
    # Intact at the end, damaged in the middle.
    path.write_bytes(content[:50] + b"\xff" * 2000 + content[2050:])
    assert validation_error(path).startswith(f"{path}: ")


def test_utf16_is_rejected_by_line(tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.jsonl", '{"prompt": "a"}\n'.encode("utf-16"))
    assert validation_error(path).startswith(f"{path}:1: not UTF-8 text")
