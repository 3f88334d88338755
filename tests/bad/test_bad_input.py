"""Malformed input of every kind, each with the error that it gives: never a traceback, nothing lost, the line named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif.config import ClientConfig
from rlaif.errors import InputError, RlaifError, RunError, UsageError
from rlaif.generate import read as reading
from rlaif.judge import definition, gold, versions
from rlaif.llm.fleet import Fleet
from rlaif.llm.parts import NoAnswer, completion_in, custom_id, parts
from rlaif.pipeline.trained import models
from rlaif.records import ImportRow, PromptRow, Review
from rlaif.review.gold import read_gold
from rlaif.run import journal
from rlaif.run.directory import Run
from rlaif.run.tables import COMPLETIONS, PROMPTS, REVIEWS, VERDICTS, scan
from rlaif.settings import load, template
from tests.bad.rooms import PROMPT, cases, said
from tests.conftest import ROOT, command
from tests.judging import judge_by
from tests.scripted import ScriptedServer
from tests.test_pipeline import goodness, judge

CASES = cases()
HELPFUL = ROOT / "judges" / "helpful"
LEAST = {"prompts": 50, "imports": 25, "settings": 50, "judges": 10, "reviews": 25, "replies": 35}


def make_queue(path: Path) -> Run:
    """A run with a queue of ten."""
    rows = [{"prompt": f"q{i}", "responses": [f"one {i} [0.{i % 9}]", f"two {i} [0.{(i * 7 + 1) % 9}]"]}
            for i in range(10)]  # fmt: skip
    with ScriptedServer(judge_by(goodness)) as server:
        run, _ = judge(path, rows, server.url, **{"pairs.human_share": 1.0})
    return run


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_queue(tmp_path_factory.mktemp("bad") / "queue")


def test_there_are_enough_of_each() -> None:
    found = Counter(case["room"] for case in CASES)
    assert all(found[room] >= least for room, least in LEAST.items()), found
    assert found.total() >= 200
    assert len({repr((case["room"], case["name"], case["text"])) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['room']}-{CASES.index(case)}")
def test_bad_input_gives_its_error(tmp_path: Path, queue: Run, case: dict[str, Any]) -> None:
    before = {path: path.read_bytes() for path in queue.journals.iterdir()}
    told = said(case, tmp_path, queue)
    assert told == case["told"]
    assert told != "accepted"
    assert "sk-secret" not in told
    assert "Traceback" not in told
    if case["room"] != "replies":
        assert told.startswith("DIR/")  # which file
    assert {path: path.read_bytes() for path in queue.journals.iterdir()} == before  # nothing written


@pytest.mark.parametrize("room", ["prompts", "imports"])
def test_the_line_is_named_wherever_it_stands(tmp_path: Path, room: str) -> None:
    """Every bad row of one line between good ones: its number is told, and skipping it loses no other."""
    kind = PromptRow if room == "prompts" else ImportRow
    good = '{"prompt": "q", "responses": ["a", "b"]}' if room == "imports" else '{"prompt": "q"}'
    for case in CASES:
        line = case["text"]
        if case["room"] != room or not case["name"].endswith(".jsonl") or "\n" in line or not line.strip():
            continue
        path = tmp_path / "rows.jsonl"
        whole = f"{good}\n{line}\n{good}\n"
        path.write_bytes(whole.encode("latin-1") if case.get("bytes") else whole.encode("utf-8", "surrogatepass"))
        with pytest.raises(InputError) as caught:
            reading.check(str(path), kind, "stop", lambda line: None)
        assert caught.value.where == f"{path}:2", line
        skipped: list[str] = []
        assert reading.check(str(path), kind, "skip", skipped.append) == 2
        assert f"{path}:2" in skipped[0]


# Anything at all

TEXT = st.text(st.characters(codec=None), max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["prompt", "id", "system", "reference", "checks", "tags", "tools", "responses", "models", "messages"]
ROW = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def named(error: RlaifError, path: Path) -> None:
    """It says where: the file, or the file and a line of it."""
    assert re.fullmatch(re.escape(str(path)) + r"(:[0-9]+)?", str(error.where)), error.where
    assert len(error.what) > 5


@FUZZ
@given(st.binary(max_size=200) | ROW.map(lambda row: repr(row).encode("utf-8", "replace")) | ROW.map(
    lambda row: json.dumps(row).encode()), st.sampled_from([".jsonl", ".csv", ".parquet"]),
    st.sampled_from([PromptRow, ImportRow]))  # fmt: skip
def test_any_bytes_are_rows_or_a_named_error(tmp_path: Path, data: bytes, ending: str, kind: Any) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(data)
    try:
        count = reading.check(str(path), kind, "stop", lambda line: None)
    except UsageError as error:
        named(error, path)
    else:
        assert count == sum(1 for _ in reading.rows(str(path), kind)) > 0


@FUZZ
@given(st.lists(st.sampled_from(template().splitlines()), max_size=12), TEXT, st.integers(0, 12), st.booleans())
def test_any_settings_are_settings_or_a_named_error(
    tmp_path: Path, lines: list[str], odd: str, place: int, uncomment: bool
) -> None:
    chosen = [line.removeprefix("# ") if uncomment and " = " in line else line for line in lines]
    chosen.insert(place, odd)
    path = tmp_path / "rlaif.toml"
    path.write_bytes("\n".join(chosen).encode("utf-8", "surrogatepass"))
    try:
        load(tmp_path, {}, {})
    except UsageError as error:
        assert str(path) in str(error)


@FUZZ
@given(TEXT, TEXT, st.integers(0, 30), st.integers(0, 9))
def test_any_judge_is_a_judge_or_a_named_error(tmp_path: Path, toml: str, prompt: str, line: int, place: int) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    text = (HELPFUL / "judge.toml").read_text().replace('"helpful"', '"mine"').splitlines()
    text.insert(line, toml)
    (folder / "judge.toml").write_bytes("\n".join(text).encode("utf-8", "surrogatepass"))
    parts = PROMPT.split("\n")
    parts.insert(place, prompt)
    (folder / "prompt.md").write_bytes("\n".join(parts).encode("utf-8", "surrogatepass"))
    try:
        definition.load(folder)
    except UsageError as error:
        assert str(folder) in str(error)


@FUZZ
@given(st.lists(st.binary(max_size=60) | st.sampled_from([b'{"key": "' + b"ab" * 32 + b'"}']), max_size=5))
def test_any_journal_is_read_or_its_line_is_named(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with contextlib.suppress(RunError):
        list(journal.read(path))
    try:
        journal.Journal(path).close()
    except RunError as error:
        assert str(error.where).startswith(f"{path}:")
    assert before.startswith(path.read_bytes())  # a torn last line may go, nothing else


@pytest.mark.parametrize("name", journal.FIELDS)
def test_a_line_that_lacks_what_its_kind_has_is_named(tmp_path: Path, queue: Run, name: str) -> None:
    path = reviewed(queue, tmp_path).journal_path(name)
    *lines, last = path.read_text().splitlines(keepends=True)
    schema = {"prompts": PROMPTS, "completions": COMPLETIONS, "verdicts": VERDICTS, "reviews": REVIEWS}[name]
    for field in journal.FIELDS[name]:
        record = json.loads(last)
        found = record.pop(field)
        assert found is not None
        for damage in (record, {**record, field: None}, {**record, field: {"5": 5}}):
            path.write_text("".join([*lines, json.dumps(damage) + "\n", last]))
            framed = field in schema and not damage.get(field)  # a frame takes any value for its text
            for readers in (journal.Journal, *([lambda path: scan(path, schema)] if framed else [])):
                with pytest.raises(RunError) as caught:
                    readers(path)
                assert caught.value.where == f"{path}:{len(lines) + 1}"


@pytest.mark.parametrize("others", [{}, {"5": 5}])
@pytest.mark.parametrize("name", journal.FIELDS)
def test_commands_name_a_line_that_lacks_its_fields(tmp_path: Path, queue: Run, name: str, others: Any) -> None:
    run = reviewed(queue, tmp_path)
    path = run.journal_path(name)
    path.write_text(
        path.read_text() + json.dumps({**dict.fromkeys(journal.FIELDS[name], others or None), "key": "cd" * 32}) + "\n"
    )
    told = [
        subprocess.run(command(*line, run.path), capture_output=True, text=True, check=False).stderr
        for line in (("status",), ("report",), ("judge", "--base-url", "http://127.0.0.1:9", "--model", "m"))
    ]
    assert "Traceback" not in "".join(told)
    assert any("damaged" in text and f"{name}.jsonl:{path.read_text().count(chr(10))}" in text for text in told)


def reviewed(queue: Run, place: Path) -> Run:
    """A copy of ``queue`` below ``place``, each of whose journals has a line."""
    shutil.copytree(queue.path, place / "run")
    run = Run(place / "run")
    pair = run.pairs().row(0, named=True)
    record = Review(key="ab" * 32, pair_id=pair["pair_id"], prompt_id=pair["prompt_id"], annotator="ann", choice="left",
                    left="a", preferred="a", route="audit")  # fmt: skip
    with run.journal("reviews") as written:
        written.append([record])
    return run


@FUZZ
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_of_a_batch_is_an_answer_or_none(line: bytes) -> None:
    assert isinstance(custom_id(line), str)
    with contextlib.suppress(NoAnswer):
        completion_in(line)


def _trained(path: Path) -> None:
    run = Run(path)
    (run.path / "model").mkdir(parents=True, exist_ok=True)
    for name in ("training.json", "adapter_config.json"):
        (run.path / "model" / name).write_bytes((path / "file").read_bytes())
    models(run, load(path, {}, {}))


def _adapter(path: Path) -> None:
    whole = {"identity": {"model": "m"}, "result": {"adapter": str(path)}}
    (path / "model").mkdir(exist_ok=True)
    (path / "model" / "training.json").write_text(json.dumps(whole))
    (path / "adapter_config.json").write_bytes((path / "file").read_bytes())
    models(Run(path), load(path, {}, {}))


def _manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "file").read_bytes())
    Run(path).manifest()


def _locked(path: Path) -> None:
    shutil.copytree(HELPFUL, path / "helpful", dirs_exist_ok=True)
    (path / "checksums.txt").write_bytes((path / "file").read_bytes())
    versions.check(definition.load(path / "helpful"))


KEPT: dict[str, Callable[[Path], object]] = {
    "batches": lambda path: parts(path / "file"),
    "training": _trained,
    "adapter": _adapter,
    "manifest": _manifest,
    "checksums": _locked,
    "gold": lambda path: gold.read(path / "file", definition.load(HELPFUL)),
    "gold of reviews": lambda path: read_gold([path / "file"]),
    "endpoints": lambda path: Fleet([f"file:{path / 'file'}"], None, ClientConfig()),
}
FACTS = st.dictionaries(
    st.sampled_from(["key", "event", "journal", "identity", "result", "model", "adapter", "r", "stages", "generate",
                     "schema_version", "prompt", "responses", "label"]), JSON, max_size=6)  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@FUZZ
@given(
    st.binary(max_size=100)
    | st.lists(FACTS.map(lambda value: json.dumps(value).encode()), max_size=3).map(b"\n".join)
    | FACTS.map(lambda value: json.dumps({"key": "ab" * 32, "schema_version": 1, **value}).encode() + b"\n")
)
def test_any_file_that_is_kept_is_read_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("kept")
    (path / "file").write_bytes(data)
    try:
        KEPT[name](path)
    except RlaifError as error:
        assert str(path) in str(error.where)


def test_gold_may_hold_any_sign_of_a_new_line(tmp_path: Path) -> None:
    """Those of Unicode are part of a text; only a line feed ends a row."""
    row = {"prompt": "one\u2028two\x85three", "responses": ["a\x0bb", "c"], "label": 1}
    (tmp_path / "gold.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row) + "\n")
    rows = gold.read(tmp_path / "gold.jsonl", definition.load(HELPFUL))
    assert [each.prompt["messages"][0]["content"] for each in rows] == [row["prompt"]] * 2


def test_a_locale_that_is_not_utf8_changes_nothing(tmp_path: Path) -> None:
    """Files are UTF-8 whatever the environment says."""
    import subprocess
    import sys

    (tmp_path / "rlaif.toml").write_text('[sampler]\nsystem = "Sei höflich. ☃"\n', encoding="utf-8")
    code = """
import sys
from pathlib import Path
from rlaif.settings import load
assert load(Path(sys.argv[1]), {}, {}).sampler.system.endswith(chr(0x2603))
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=environment)
