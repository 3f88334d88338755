"""Malformed input of every kind and its error: no traceback, no lost data, and the line is named."""

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

from rlaif.config.loader import load
from rlaif.config.models import ClientConfig
from rlaif.config.template import render_template
from rlaif.errors import InputError, RlaifError, RunError, UsageError
from rlaif.evaluate.trained_model import evaluated_models
from rlaif.generate import sources
from rlaif.judge import gold, judge_file, version_lock
from rlaif.llm.batch_journal import BatchLineError, line_custom_id, parse_batch_line, read_jobs
from rlaif.llm.endpoint_pool import EndpointPool
from rlaif.records import ImportRow, PromptRow, Review
from rlaif.review.gold_pairs import read_gold_pairs
from rlaif.run import journal
from rlaif.run.frames import COMPLETIONS, PROMPTS, REVIEWS, VERDICTS, read_journal_frame
from rlaif.run.run import Run
from tests.bad.cases import PROMPT, cases, error_text
from tests.conftest import ROOT, command
from tests.fake_judge import judge_by
from tests.fake_server import ScriptedServer
from tests.labeling.test_judging import goodness, import_and_judge

CASES = cases()
HELPFUL = ROOT / "judges" / "helpful"
MIN_CASES = {"prompts": 50, "imports": 25, "settings": 50, "judges": 10, "reviews": 25, "replies": 35}


def make_queue(path: Path) -> Run:
    """Return a run with ten pairs in the review queue."""
    rows = [{"prompt": f"q{i}", "responses": [f"one {i} [0.{i % 9}]", f"two {i} [0.{(i * 7 + 1) % 9}]"]}
            for i in range(10)]  # fmt: skip
    with ScriptedServer(judge_by(goodness)) as server:
        run, _ = import_and_judge(path, rows, server.url, **{"pairs.human_fraction": 1.0})
    return run


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_queue(tmp_path_factory.mktemp("bad") / "queue")


def test_every_kind_has_enough_cases() -> None:
    counts = Counter(case["kind"] for case in CASES)
    assert all(counts[kind] >= minimum for kind, minimum in MIN_CASES.items()), counts
    assert counts.total() >= 200
    assert len({repr((case["kind"], case["name"], case["text"])) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{CASES.index(case)}")
def test_bad_input_gives_its_error(tmp_path: Path, queue: Run, case: dict[str, Any]) -> None:
    before = {path: path.read_bytes() for path in queue.journals.iterdir()}
    message = error_text(case, tmp_path, queue)
    assert message == case["error"]
    assert message != "accepted"
    assert "sk-secret" not in message
    assert "Traceback" not in message
    if case["kind"] != "replies":
        assert message.startswith("DIR/")  # names the file
    assert {path: path.read_bytes() for path in queue.journals.iterdir()} == before  # nothing written


@pytest.mark.parametrize("kind", ["prompts", "imports"])
def test_bad_row_between_good_rows_is_named_by_its_line(tmp_path: Path, kind: str) -> None:
    """The error names the line, and skipping the row loses no other row."""
    row_type = PromptRow if kind == "prompts" else ImportRow
    good = '{"prompt": "q", "responses": ["a", "b"]}' if kind == "imports" else '{"prompt": "q"}'
    for case in CASES:
        line = case["text"]
        if case["kind"] != kind or not case["name"].endswith(".jsonl") or "\n" in line or not line.strip():
            continue
        path = tmp_path / "rows.jsonl"
        content = f"{good}\n{line}\n{good}\n"
        path.write_bytes(content.encode("latin-1") if case.get("bytes") else content.encode("utf-8", "surrogatepass"))
        with pytest.raises(InputError) as caught:
            sources.validate_source(str(path), row_type, "stop", lambda line: None)
        assert caught.value.location == f"{path}:2", line
        skipped: list[str] = []
        assert sources.validate_source(str(path), row_type, "skip", skipped.append) == 2
        assert f"{path}:2" in skipped[0]


# Arbitrary input

TEXT = st.text(st.characters(codec=None), max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["prompt", "id", "system", "reference", "checks", "tags", "tools", "responses", "models", "messages"]
ROW = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_located(error: RlaifError, path: Path) -> None:
    """Assert that the location is the file, or the file and a line."""
    assert re.fullmatch(re.escape(str(path)) + r"(:[0-9]+)?", str(error.location)), error.location
    assert len(error.message) > 5


@FUZZ
@given(st.binary(max_size=200) | ROW.map(lambda row: repr(row).encode("utf-8", "replace")) | ROW.map(
    lambda row: json.dumps(row).encode()), st.sampled_from([".jsonl", ".csv", ".parquet"]),
    st.sampled_from([PromptRow, ImportRow]))  # fmt: skip
def test_any_bytes_are_rows_or_a_located_error(tmp_path: Path, data: bytes, ending: str, kind: Any) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(data)
    try:
        count = sources.validate_source(str(path), kind, "stop", lambda line: None)
    except UsageError as error:
        assert_located(error, path)
    else:
        assert count == sum(1 for _ in sources.valid_rows(str(path), kind)) > 0


@FUZZ
@given(
    st.lists(st.sampled_from(render_template({}).splitlines()), max_size=12), TEXT, st.integers(0, 12), st.booleans()
)
def test_any_settings_load_or_raise_a_located_error(
    tmp_path: Path, lines: list[str], extra_line: str, position: int, uncomment: bool
) -> None:
    chosen = [line.removeprefix("# ") if uncomment and " = " in line else line for line in lines]
    chosen.insert(position, extra_line)
    path = tmp_path / "rlaif.toml"
    path.write_bytes("\n".join(chosen).encode("utf-8", "surrogatepass"))
    try:
        load(tmp_path, {}, {})
    except UsageError as error:
        assert str(path) in str(error)


@FUZZ
@given(TEXT, TEXT, st.integers(0, 30), st.integers(0, 9))
def test_any_judge_loads_or_raises_a_located_error(
    tmp_path: Path, toml: str, prompt: str, line: int, position: int
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    text = (HELPFUL / "judge.toml").read_text().replace('"helpful"', '"mine"').splitlines()
    text.insert(line, toml)
    (folder / "judge.toml").write_bytes("\n".join(text).encode("utf-8", "surrogatepass"))
    parts = PROMPT.split("\n")
    parts.insert(position, prompt)
    (folder / "prompt.md").write_bytes("\n".join(parts).encode("utf-8", "surrogatepass"))
    try:
        judge_file.load_judge(folder)
    except UsageError as error:
        assert str(folder) in str(error)


@FUZZ
@given(st.lists(st.binary(max_size=60) | st.sampled_from([b'{"key": "' + b"ab" * 32 + b'"}']), max_size=5))
def test_any_journal_is_read_or_its_bad_line_is_named(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with contextlib.suppress(RunError):
        list(journal.iter_records(path))
    try:
        journal.Journal(path).close()
    except RunError as error:
        assert str(error.location).startswith(f"{path}:")
    assert before.startswith(path.read_bytes())  # only a torn last line may be cut


@pytest.mark.parametrize("name", journal.REQUIRED_FIELDS)
def test_journal_line_without_a_required_field_is_named(tmp_path: Path, queue: Run, name: str) -> None:
    path = copy_with_review(queue, tmp_path).journal_path(name)
    *lines, last = path.read_text().splitlines(keepends=True)
    schema = {"prompts": PROMPTS, "completions": COMPLETIONS, "verdicts": VERDICTS, "reviews": REVIEWS}[name]
    for field in journal.REQUIRED_FIELDS[name]:
        record = json.loads(last)
        value = record.pop(field)
        assert value is not None
        for damage in (record, {**record, field: None}, {**record, field: {"5": 5}}):
            path.write_text("".join([*lines, json.dumps(damage) + "\n", last]))
            framed = field in schema and not damage.get(field)  # a data frame accepts any value as text
            for readers in (journal.Journal, *([lambda path: read_journal_frame(path, schema)] if framed else [])):
                with pytest.raises(RunError) as caught:
                    readers(path)
                assert caught.value.location == f"{path}:{len(lines) + 1}"


@pytest.mark.parametrize("others", [{}, {"5": 5}])
@pytest.mark.parametrize("name", journal.REQUIRED_FIELDS)
def test_commands_name_a_journal_line_without_its_fields(tmp_path: Path, queue: Run, name: str, others: Any) -> None:
    run = copy_with_review(queue, tmp_path)
    path = run.journal_path(name)
    path.write_text(
        path.read_text()
        + json.dumps({**dict.fromkeys(journal.REQUIRED_FIELDS[name], others or None), "key": "cd" * 32})
        + "\n"
    )
    outputs = [
        subprocess.run(command(*line, run.path), capture_output=True, text=True, check=False).stderr
        for line in (("status",), ("report",), ("judge", "--base-url", "http://127.0.0.1:9", "--model", "m"))
    ]
    assert "Traceback" not in "".join(outputs)
    assert any("damaged" in text and f"{name}.jsonl:{path.read_text().count(chr(10))}" in text for text in outputs)


def copy_with_review(queue: Run, parent: Path) -> Run:
    """Return a copy of ``queue`` below ``parent`` in which every journal has at least one line."""
    shutil.copytree(queue.path, parent / "run")
    run = Run(parent / "run")
    pair = run.pairs().row(0, named=True)
    record = Review(key="ab" * 32, pair_id=pair["pair_id"], prompt_id=pair["prompt_id"], annotator="ann", choice="left",
                    left_side="a", preferred="a", route="audit")  # fmt: skip
    with run.journal("reviews") as journal_:
        journal_.append([record])
    return run


@FUZZ
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_batch_line_is_parsed_or_rejected(line: bytes) -> None:
    assert isinstance(line_custom_id(line), str)
    with contextlib.suppress(BatchLineError):
        parse_batch_line(line)


def _trained(path: Path) -> None:
    run = Run(path)
    (run.path / "model").mkdir(parents=True, exist_ok=True)
    for name in ("training.json", "adapter_config.json"):
        (run.path / "model" / name).write_bytes((path / "file").read_bytes())
    evaluated_models(run, load(path, {}, {}))


def _adapter(path: Path) -> None:
    training = {"identity": {"model": "m"}, "result": {"adapter": str(path)}}
    (path / "model").mkdir(exist_ok=True)
    (path / "model" / "training.json").write_text(json.dumps(training))
    (path / "adapter_config.json").write_bytes((path / "file").read_bytes())
    evaluated_models(Run(path), load(path, {}, {}))


def _manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "file").read_bytes())
    Run(path).manifest()


def _locked(path: Path) -> None:
    shutil.copytree(HELPFUL, path / "helpful", dirs_exist_ok=True)
    (path / "checksums.txt").write_bytes((path / "file").read_bytes())
    version_lock.check_version_lock(judge_file.load_judge(path / "helpful"))


FILE_READERS: dict[str, Callable[[Path], object]] = {
    "batches": lambda path: read_jobs(path / "file"),
    "training": _trained,
    "adapter": _adapter,
    "manifest": _manifest,
    "checksums": _locked,
    "gold": lambda path: gold.read_gold(path / "file", judge_file.load_judge(HELPFUL)),
    "gold of reviews": lambda path: read_gold_pairs([path / "file"]),
    "endpoints": lambda path: EndpointPool([f"file:{path / 'file'}"], None, ClientConfig()),
}
FACTS = st.dictionaries(
    st.sampled_from(["key", "state", "journal", "identity", "result", "model", "adapter", "r", "stages", "generate",
                     "schema_version", "prompt", "responses", "label"]), JSON, max_size=6)  # fmt: skip


@pytest.mark.parametrize("name", FILE_READERS)
@FUZZ
@given(
    st.binary(max_size=100)
    | st.lists(FACTS.map(lambda value: json.dumps(value).encode()), max_size=3).map(b"\n".join)
    | FACTS.map(lambda value: json.dumps({"key": "ab" * 32, "schema_version": 1, **value}).encode() + b"\n")
)
def test_any_stored_file_is_read_or_raises_a_located_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("kept")
    (path / "file").write_bytes(data)
    try:
        FILE_READERS[name](path)
    except RlaifError as error:
        assert str(path) in str(error.location)


def test_gold_may_contain_unicode_line_breaks(tmp_path: Path) -> None:
    """Unicode line breaks are part of a text; only a line feed ends a row."""
    row = {"prompt": "one\u2028two\x85three", "responses": ["a\x0bb", "c"], "label": 1}
    (tmp_path / "gold.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row) + "\n")
    rows = gold.read_gold(tmp_path / "gold.jsonl", judge_file.load_judge(HELPFUL))
    assert [gold_row.prompt["messages"][0]["content"] for gold_row in rows] == [row["prompt"]] * 2


def test_files_are_utf8_in_any_locale(tmp_path: Path) -> None:
    """The environment's encoding does not affect files."""
    import subprocess
    import sys

    (tmp_path / "rlaif.toml").write_text('[sampler]\nsystem = "Sei höflich. ☃"\n', encoding="utf-8")
    code = """
import sys
from pathlib import Path
from rlaif.config.loader import load
assert load(Path(sys.argv[1]), {}, {}).sampler.system.endswith(chr(0x2603))
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=environment)
