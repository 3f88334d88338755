"""The review file is blind, survives spreadsheets exactly, and every label is imported into the journal once."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlaif.errors import InputError, RlaifError, RunError, UsageError
from rlaif.review.csv_escape import escape_cell, unescape_cell
from rlaif.review.file_readers import COLUMNS
from rlaif.review.import_export import ReviewImport, export_queue, import_reviews
from rlaif.review.queue import latest_labels, left_side, make_item, make_review, pending_pairs, prompt_text
from rlaif.run.run import Run

SEED = 7
SCHEMA = {
    "pair_id": pl.String,
    "prompt_id": pl.String,
    "prompt": pl.String,
    "response_a": pl.String,
    "response_b": pl.String,
    "completion_a": pl.String,
    "completion_b": pl.String,
    "prob_a": pl.Float64,
    "preferred": pl.String,
    "outcome": pl.String,
    "route": pl.String,
    "route_reason": pl.String,
    "inclusion_probability": pl.Float64,
    "reviewed": pl.Boolean,
}
HOSTILE = [
    "",
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    " =1",
    "'",
    "''=1",
    "＝1",
    'say "hi", she; said\tso',
    "a\r\nb\rc\nd",
    "nul\0 bell\a escape\x1b delete\x7f",
    "␀␍␤␤␡",
    "007",
    "1/2",
    "3e5",
    "1.50",
    "TRUE",
    "Mar 4",
    "12",
    "👩‍🚀 ünï 𝔘 \ufeff \u2028",
    "\n\n",
    "- a\n- b",
]


def pair(number: int, *, route: str = "audit", **more: Any) -> dict[str, Any]:
    return {
        "pair_id": f"pair-{number:04}",
        "prompt_id": f"prompt-{number}",
        "prompt": json.dumps([{"role": "user", "content": f"Question {number}?"}]),
        "response_a": f"First answer\nto {number}",
        "response_b": f"Second answer\nto {number}",
        "completion_a": "ca-of-secret-model",
        "completion_b": "cb-of-secret-model",
        "prob_a": 0.8642,
        "preferred": "a",
        "outcome": "win",
        "route": route,
        "route_reason": "secret-reason",
        "inclusion_probability": 0.0531 if route == "audit" else None,
        "reviewed": False,
        **more,
    }


def make_run(path: Path, pairs: list[dict[str, Any]]) -> Run:
    run = Run(path)
    run.pairs_path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(pairs, schema=SCHEMA).write_parquet(run.pairs_path)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    routes = ["audit", "targeted", "judge", "dropped", "audit", "targeted"]
    return make_run(tmp_path / "run", [pair(number, route=route) for number, route in enumerate(routes)])


def exported(run: Run, name: str = "queue.csv", annotator: str = "ann", seed: int = SEED, **options: Any) -> Path:
    path = run.path.parent / name
    format_ = "jsonl" if name.endswith("jsonl") else "csv"
    export_queue(run, path, format=format_, annotator=annotator, seed=seed, **options)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]], *, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
        return path
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def fill(path: Path, choices: Callable[[int], str], **options: Any) -> Path:
    rows = rows_of(path)
    for number, row in enumerate(rows):
        row["choice"] = choices(number)
    return write(path, rows, **options)


def load(run: Run, path: Path, annotator: str = "ann", seed: int = SEED, on_bad_row: Any = "stop") -> ReviewImport:
    return import_reviews(run, path, annotator=annotator, seed=seed, on_bad_row=on_bad_row)


def counts(result: ReviewImport) -> tuple[int, int, int, int, int]:
    return result.added, result.changed, result.unchanged, result.unlabeled, len(result.bad_rows)


# Export


@pytest.mark.parametrize("name", ["queue.csv", "queue.jsonl"])
def test_the_file_is_blind(run: Run, name: str) -> None:
    path = exported(run, name)
    text = path.read_text(encoding="utf-8")
    assert all(tuple(row) == COLUMNS for row in rows_of(path))
    assert all(row["choice"] == row["comment"] == "" for row in rows_of(path))
    for secret in ("secret-model", "secret-reason", "8642", "0531", "audit", "targeted", "win", "prompt-"):
        assert secret not in text


def test_only_queued_pairs_are_exported(run: Run) -> None:
    assert {row["pair_id"] for row in rows_of(exported(run))} == {f"pair-{number:04}" for number in (0, 1, 4, 5)}


def test_empty_queue_is_exported_as_a_header(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [pair(1, route="judge")])
    assert export_queue(run, tmp_path / "q.csv", format="csv", annotator="ann", seed=SEED) == 0
    assert (tmp_path / "q.csv").read_bytes().decode() == ",".join(COLUMNS) + "\r\n"


def test_sides_are_even_and_differ_between_annotators() -> None:
    def sides(seed: int, annotator: str) -> list[str]:
        return [left_side(seed, f"p{number}", annotator) for number in range(4000)]

    ann = sides(1, "ann")
    assert ann == sides(1, "ann")
    assert abs(ann.count("a") / len(ann) - 0.5) < 0.03
    for other in (sides(1, "bob"), sides(2, "ann")):
        same = sum(one == two for one, two in zip(ann, other, strict=True)) / len(ann)
        assert abs(same - 0.5) < 0.03


def test_sides_in_the_file_follow_the_seed(run: Run) -> None:
    for name in ("queue.csv", "queue.jsonl"):
        for row in rows_of(exported(run, name)):
            first = left_side(SEED, row["pair_id"], "ann") == "a"
            assert row["left"].startswith("First" if first else "Second")
            assert row["right"].startswith("Second" if first else "First")


def test_order_is_seeded_and_differs_between_annotators(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [pair(number) for number in range(40)])
    reviews = run.reviews()

    def order(annotator: str, seed: int = SEED) -> list[str]:
        return pending_pairs(run.pairs(), reviews, annotator=annotator, seed=seed)["pair_id"].to_list()

    assert (
        order("ann")
        == order("ann")
        == pending_pairs(run.pairs().reverse(), reviews, annotator="ann", seed=SEED)["pair_id"].to_list()
    )
    assert len({tuple(order("ann")), tuple(order("bob")), tuple(order("ann", 8)), tuple(sorted(order("ann")))}) == 4


def test_prompts_are_readable() -> None:
    user = {"role": "user", "content": "[system]\nHi"}
    assert prompt_text([user]) == "[system]\nHi"
    call = {"function": {"name": "add", "arguments": "{}"}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    assert prompt_text(turns) == (
        '[system]\nBe brief.\n\n[user]\n1+1?\n\n[assistant]\n{"name":"add","arguments":"{}"}\n\n[tool]\n2'
    )


def test_file_with_choices_is_not_overwritten(run: Run) -> None:
    path = exported(run)
    exported(run)  # a file without choices may be overwritten
    labeled = fill(path, lambda number: "left" if number == 2 else "").read_bytes()
    with pytest.raises(UsageError, match="choices or comments in 1 row"):
        exported(run)
    assert path.read_bytes() == labeled
    path.write_text("my shopping list\n")
    with pytest.raises(UsageError, match="cannot be read as a review file"):
        exported(run)
    assert path.read_text() == "my shopping list\n"
    path.write_bytes(labeled.replace(b'"', b"", 1))
    with pytest.raises(UsageError):
        exported(run)
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


def test_invalid_exports_are_rejected(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.csv"):
        export_queue(run, tmp_path / "q.txt", format="csv", annotator="ann", seed=SEED)
    with pytest.raises(UsageError, match="Did you mean 'jsonl'"):
        export_queue(run, tmp_path / "q.csv", format="json", annotator="ann", seed=SEED)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="name is empty"):
        export_queue(run, tmp_path / "q.csv", format="csv", annotator=" ", seed=SEED)
    with pytest.raises(RunError, match="no pairs yet"):
        export_queue(Run(tmp_path / "new"), tmp_path / "q.csv", format="csv", annotator="ann", seed=SEED)


# Exact texts


texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from("=+-@'\"\r\n\t,; \0\x1b\x7f␀␍␤1/2eE.x👍é\ufeff")),
    st.sampled_from(HOSTILE),
)


@given(texts)
@settings(deadline=None)
def test_cell_round_trips(text: str) -> None:
    cell = escape_cell(text)
    assert unescape_cell(cell) == text
    assert unescape_cell(cell.replace("\n", "\r\n")) == text
    assert not cell.lstrip().startswith(("=", "+", "-", "@", "＝"))
    assert not {chr(code) for code in range(32)} - {"\t", "\n"} & set(cell)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_cell_round_trips(text: str) -> None:
    assert unescape_cell(escape_cell(text)) == text


def test_only_texts_that_a_spreadsheet_changes_are_escaped() -> None:
    for text in ("12", "0", "Answer 3", "A - B", "march on", "May I?", "1. one\n2. two", "x=1", "2024 was good"):
        assert escape_cell(text) == text
    for text in ("=1", "007", "1/2", "3e5", "TRUE", "4 Mar", "May 5, 2024", "10:30 pm", "$5", "50%", "1" * 16, " 12"):
        assert escape_cell(text) == "'" + text


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4), st.sampled_from(["queue.csv", "queue.jsonl"]))
@example([(text, text + "!", "b") for text in HOSTILE], "queue.csv")
@example([(text, text + "!", "b") for text in HOSTILE], "queue.jsonl")
@settings(deadline=None, max_examples=60)
def test_any_text_round_trips(rows: list[tuple[str, str, str]], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            pair(number, prompt=json.dumps([{"role": "user", "content": prompt}]), response_a=a, response_b=b)
            for number, (prompt, a, b) in enumerate(rows)
        ]
        run = make_run(Path(folder) / "run", pairs)
        path = exported(run, name)
        read = unescape_cell if path.suffix == ".csv" else str
        for row in rows_of(path):
            prompt, a, b = rows[int(row["pair_id"].removeprefix("pair-"))]
            left, right = (a, b) if left_side(SEED, row["pair_id"], "ann") == "a" else (b, a)
            assert [read(row[column]) for column in ("prompt", "left", "right")] == [prompt, left, right]
        assert counts(load(run, fill(path, lambda _: "tie"))) == (len(rows), 0, 0, 0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"delimiter": ";", "encoding": "utf-8-sig"},
        {"delimiter": "\t", "encoding": "utf-16"},
        {"delimiter": ",", "encoding": "utf-8-sig"},
    ],
)
def test_files_saved_by_spreadsheets_are_read(tmp_path: Path, options: dict[str, str]) -> None:
    pairs = [pair(number, response_a=text, response_b=text + "?") for number, text in enumerate(HOSTILE)]
    run = make_run(tmp_path / "run", pairs)
    words = ["LEFT", " Both Bad ", "right", "both-bad", "Skip"]
    path = fill(exported(run), lambda number: words[number % 5], **options)
    encoding = options["encoding"]
    text = path.read_bytes().decode(encoding).replace("\r\n", "\n").replace("\n", "\r\n") + "\r\n;;;;;\r\n\r\n"
    if options["delimiter"] != ";":
        text = text.replace(";;;;;", "")
    path.write_bytes(text.encode(encoding))
    assert counts(load(run, path)) == (len(HOSTILE), 0, 0, 0, 0)


def test_lost_apostrophes_lost_trailing_cells_and_reordered_columns_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [pair(1, response_a="=1+1", response_b="'quoted'"), pair(2)])
    path = exported(run)
    rows = rows_of(path)
    for row in rows:
        row.update(left=row["left"].removeprefix("'"), right=row["right"].removeprefix("'"), choice="left")
    reordered = [{name: row[name] for name in ("choice", "right", "left", "pair_id", "prompt")} for row in rows]
    assert counts(load(run, write(path, [{**row, "my notes": "x"} for row in reordered]))) == (2, 0, 0, 0, 0)
    plain = run.path.parent / "short.csv"
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows([list(COLUMNS), *([row[name] for name in COLUMNS[:4]] for row in rows)])
    plain.write_text(lines.getvalue(), newline="")
    assert counts(load(run, plain)) == (0, 0, 0, 2, 0)


def test_byte_order_mark_is_optional(run: Run) -> None:
    assert exported(run).read_bytes().startswith(b"pair_id")
    path = exported(run, bom=True)
    assert path.read_bytes().startswith(b"\xef\xbb\xbfpair_id")
    assert counts(load(run, path)) == (0, 0, 0, 4, 0)


# Import


@pytest.mark.parametrize("name", ["queue.csv", "queue.jsonl"])
def test_labels_become_reviews(run: Run, name: str) -> None:
    choices = ["left", "right", "tie", "both_bad"]
    rows = rows_of(path := exported(run, name))
    for row, choice in zip(rows, choices, strict=True):
        row.update(choice=choice, comment=" why not, =1\n")
    result = load(run, write(path, rows))
    assert counts(result) == (4, 0, 0, 0, 0)
    reviews = {row["pair_id"]: row for row in run.reviews().iter_rows(named=True)}
    for row, choice in zip(rows, choices, strict=True):
        review = reviews[row["pair_id"]]
        left = left_side(SEED, row["pair_id"], "ann")
        preferred = {"left": left, "right": "b" if left == "a" else "a"}.get(choice)
        assert (review["choice"], review["left_side"], review["preferred"]) == (choice, left, preferred)
        assert (review["annotator"], review["comment"]) == ("ann", "why not, =1")
        audit = row["pair_id"] in ("pair-0000", "pair-0004")
        assert review["route"] == ("audit" if audit else "targeted")
        assert review["inclusion_probability"] == (0.0531 if audit else None)
        assert review["prompt_id"] == row["pair_id"].replace("pair-000", "prompt-")


def test_importing_again_adds_nothing_and_the_queue_shrinks(run: Run) -> None:
    path = fill(exported(run), lambda number: ["left", "skip", "", ""][number])
    assert counts(load(run, path)) == (2, 0, 0, 2, 0)
    before = run.journal_path("reviews").read_bytes()
    assert counts(load(run, path)) == (0, 0, 2, 2, 0)
    assert run.journal_path("reviews").read_bytes() == before
    assert len(rows_of(exported(run, "next.csv"))) == 2  # a skip counts as labeled


def test_changed_label_is_a_newer_record(run: Run) -> None:
    path = exported(run)
    for choice in ("left", "right", "left", "left"):
        load(run, fill(path, lambda _, choice=choice: choice))
    reviews = run.reviews()
    assert reviews.height == 12
    assert latest_labels(reviews)["choice"].to_list() == ["left"] * 4
    rows = rows_of(path)
    rows[0]["comment"] = "on second thought"
    assert counts(load(run, write(path, rows))) == (0, 1, 3, 0, 0)


def test_changed_label_is_newer_even_if_the_clock_goes_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(run)
    load(run, fill(path, lambda _: "left"))
    monkeypatch.setattr("time.time", lambda: 1.0)
    load(run, fill(path, lambda _: "right"))
    assert latest_labels(run.reviews())["choice"].to_list() == ["right"] * 4


def test_annotators_labels_are_independent(run: Run) -> None:
    ann = fill(exported(run, "ann.csv"), lambda _: "left")
    load(run, ann)
    bob = exported(run, "bob.csv", annotator="bob")
    assert len(rows_of(bob)) == 4
    assert counts(load(run, fill(bob, lambda _: "right"), annotator="bob")) == (4, 0, 0, 0, 0)
    assert counts(load(run, ann)) == (0, 0, 4, 0, 0)
    labels = latest_labels(run.reviews())
    assert labels.height == 8
    assert set(labels.filter(pl.col("annotator") == "bob")["choice"]) == {"right"}


def test_pair_that_has_left_the_queue_still_accepts_its_label(run: Run) -> None:
    path = fill(exported(run), lambda _: "left")
    pairs = run.pairs().with_columns(route=pl.lit("judge"), inclusion_probability=pl.lit(None, pl.Float64))
    pairs.write_parquet(run.pairs_path)
    assert counts(load(run, path)) == (4, 0, 0, 0, 0)
    assert set(run.reviews()["route"]) == {"judge"}


def test_only_another_writer_of_labels_locks_the_import(run: Run) -> None:
    path = fill(exported(run), lambda _: "left")
    with run.lock("reviews"), pytest.raises(RunError, match="locked"):
        load(run, path)
    assert run.reviews().is_empty()
    with run.lock():
        assert counts(load(run, path))[0] == 4


def test_import_keeps_values_that_only_the_page_can_set(run: Run) -> None:
    """A better answer and the confidence are kept while the choice is the same, and dropped when it changes."""
    path = fill(exported(run), lambda _: "left")
    row = run.pairs().filter(pl.col("route") == "audit").row(0, named=True)
    review = make_review(
        make_item(row, annotator="ann", seed=SEED),
        annotator="ann",
        choice="left",
        edited_response="Better.",
        confidence=3,
    )
    assert review
    with run.lock("reviews"), run.journal("reviews") as journal:
        journal.append([review])
    assert counts(load(run, path))[:3] == (3, 0, 1)
    fill(path, lambda _: "right")
    assert counts(load(run, path))[:3] == (0, 4, 0)
    assert latest_labels(run.reviews())["edited_response"].to_list() == [None] * 4


# Bad rows

Change = Callable[[list[dict[str, str]]], None]


def put(row: int, **cells: str) -> Change:
    return lambda rows: rows[row].update(cells)


def swap_sides(rows: list[dict[str, str]]) -> None:
    rows[1]["left"], rows[1]["right"] = rows[1]["right"], rows[1]["left"]


BAD_ROWS: dict[str, tuple[Change, str, str]] = {
    "unknown pair": (put(1, pair_id="pair-9999"), "unknown pair_id 'pair-9999'", "Export the queue again"),
    "no choice": (put(1, choice="lfet"), "'lfet'", "Did you mean 'left'"),
    "not close to a choice": (put(1, choice="A"), "'A'", "Available: both_bad, left, right, skip, tie."),
    "edited prompt": (put(1, prompt="Question?"), "prompt of pair", "export the queue again"),
    "edited left": (put(1, left="better"), "left of pair", "export the queue again"),
    "edited both": (put(1, left="x", right="y"), "left and right of pair", "export the queue again"),
    "other sides": (swap_sides, "swapped for annotator 'ann'", "--annotator"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("name", ["queue.csv", "queue.jsonl"])
def test_bad_row_stops_the_import_before_anything_is_written(run: Run, case: str, name: str) -> None:
    change, message, hint = BAD_ROWS[case]
    rows = rows_of(path := fill(exported(run, name), lambda _: "left"))
    change(rows)
    write(path, rows)
    with pytest.raises(InputError) as caught:
        load(run, path)
    # A row of the CSV spans three physical lines, because both answers have two lines.
    line = 2 if name == "queue.jsonl" else 5
    assert caught.value.location == f"{path}:{line}"
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert not run.journal_path("reviews").exists()
    result = load(run, path, on_bad_row="skip")
    assert counts(result) == (3, 0, 0, 0, 1)
    assert result.bad_rows[0].location == f"{path}:{line}"


def test_line_numbers_are_physical_and_errors_are_counted(run: Run) -> None:
    rows = rows_of(path := fill(exported(run), lambda _: "left"))
    for row in (0, 2):
        rows[row]["pair_id"] = f"gone-{row}"
    rows[3]["choice"] = "best"
    write(path, rows)
    lines = path.read_bytes().decode().split("\n")
    starts = [number for number, line in enumerate(lines, 1) if line.startswith(("pair-", "gone-"))]
    with pytest.raises(InputError) as caught:
        load(run, path)
    assert caught.value.location == f"{path}:2"
    assert f"2 rows with this error: lines {starts[0]}, {starts[2]}" in caught.value.message
    assert "1 bad row with" in caught.value.message
    bad = load(run, path, on_bad_row="skip").bad_rows
    assert [error.location for error in bad] == [f"{path}:{starts[index]}" for index in (0, 2, 3)]


def test_repeated_pair_counts_once_and_a_contradiction_not_at_all(run: Run) -> None:
    rows = rows_of(path := fill(exported(run), lambda _: "left"))
    repeated = write(path, [*rows, {**rows[0]}])
    with pytest.raises(InputError, match="repeated pair_id") as caught:
        load(run, repeated)
    assert caught.value.location == f"{path}:14"
    assert counts(load(run, repeated, on_bad_row="skip")) == (4, 0, 0, 0, 1)
    contradicting = write(path, [*rows, {**rows[0], "choice": "right"}])
    assert counts(load(run, contradicting, on_bad_row="skip")) == (0, 0, 3, 0, 2)
    unlabeled = write(path, [*rows, {**rows[0], "choice": ""}])
    assert counts(load(run, unlabeled, on_bad_row="skip")) == (0, 0, 4, 0, 1)


def test_unclosed_quote_hides_no_other_row(run: Run) -> None:
    path = fill(exported(run), lambda _: "left")
    good = path.read_bytes().decode()
    second = good.index("pair-", good.index("pair-") + 1)
    for offset in (good.index('"', second), good.index('",', second)):
        path.write_text(good[:offset] + good[offset + 1 :], encoding="utf-8", newline="")
        with pytest.raises(InputError) as caught:
            load(run, path)
        assert caught.value.location == f"{path}:5"
    result = load(run, path, on_bad_row="skip")
    assert (result.added, len(result.bad_rows)) == (3, 1)
    path.write_text(good.rstrip().removesuffix("left,") + '"left,', encoding="utf-8", newline="")
    with pytest.raises(InputError, match="never closed"):
        load(run, path)
    # A quote that opens in the choice swallows the rest of the file, but only its own row is lost.
    path.write_text(
        good[:second].removesuffix("left,\r\n") + '"left,\r\n' + good[second:], encoding="utf-8", newline=""
    )
    result = load(run, path, on_bad_row="skip")
    assert (result.added + result.unchanged, [error.location for error in result.bad_rows]) == (3, [f"{path}:2"])


def test_many_bad_rows_take_linear_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [pair(1)])
    rows = [{**dict.fromkeys(COLUMNS, "x\ny"), "pair_id": f"other-{number}"} for number in range(20_000)]
    with pytest.raises(InputError, match="20000 rows with this error"):
        load(run, write(tmp_path / "q.csv", rows))


def test_too_many_and_too_few_fields(run: Run) -> None:
    path = fill(exported(run), lambda _: "left")
    lines = path.read_bytes().decode().split("\r\n")
    path.write_text("\r\n".join([*lines[:2], lines[2] + ",more", lines[3], lines[4] + ",,,", ""]), newline="")
    with pytest.raises(InputError, match="7 fields, but the header has 6") as caught:
        load(run, path)
    assert caught.value.location == f"{path}:5"
    path.write_text("\r\n".join([*lines[:2], "pair-0001,too few", ""]), newline="")
    with pytest.raises(InputError, match="2 fields, but the header has 6"):
        load(run, path)


@pytest.fixture
def default_limit() -> Iterator[int]:
    """Restore the csv module's default limit per cell: reading prompts from CSV in this process raises it to 1 GiB."""
    changed = csv.field_size_limit(131_072)
    yield 131_072
    csv.field_size_limit(changed)


def test_long_answer_is_read_and_the_csv_limit_is_restored(tmp_path: Path, default_limit: int) -> None:
    before = default_limit
    run = make_run(tmp_path / "run", [pair(1, response_a="x" * (before + 1))])
    path = exported(run)
    path.write_bytes(path.read_bytes().rstrip()[:-1] + b"tie,")
    assert counts(load(run, path)) == (1, 0, 0, 0, 0)
    assert csv.field_size_limit() == before


def test_truncated_cell_is_explained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [pair(1, response_a="long " * 10_000)])
    rows = rows_of(path := exported(run))
    for side in ("left", "right"):
        rows[0][side] = rows[0][side][:32_767]
    with pytest.raises(InputError) as caught:
        load(run, write(path, rows))
    assert "holds 32767 characters" in str(caught.value.hint)


def test_bad_json_rows(run: Run) -> None:
    path = fill(exported(run, "queue.jsonl"), lambda _: "left")
    lines = path.read_text(encoding="utf-8").splitlines()
    no_choice = json.dumps({name: value for name, value in json.loads(lines[1]).items() if name != "choice"})
    number = json.dumps({**json.loads(lines[1]), "choice": 1})
    null = json.dumps({**json.loads(lines[1]), "choice": None})
    for bad, message in (
        ("{oops", "not JSON"),
        ("[1]", "not a JSON object"),
        (no_choice, "missing column choice; found: pair_id, prompt, left, right, comment; expected: pair_id"),
        (number, "choice must be text, got 1"),
    ):
        path.write_text("\n".join([lines[0], "", bad, *lines[2:]]), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load(run, path)
        assert message in caught.value.message
        assert caught.value.location == f"{path}:3"
        assert len(load(run, path, on_bad_row="skip").bad_rows) == 1
    path.write_text("\n".join([lines[0], null, *lines[2:]]), encoding="utf-8")
    assert counts(load(run, path)) == (0, 0, 3, 1, 0)


BAD_FILES: dict[str, tuple[str, bytes, str, str]] = {
    "empty csv": ("q.csv", b"", "the file is empty", ""),
    "blank jsonl": ("q.jsonl", b"\n \n", "the file is empty", ""),
    "missing columns": (
        "q.csv",
        b"pair_id,prompt,left\r\n",
        "missing column right, choice; found: pair_id, prompt, left; expected: pair_id, prompt, left, right, cho",
        ":1",
    ),
    "no header": ("q.csv", b"pair-0000,q,a,b,left,\r\n", "missing column pair_id", ":1"),
    "two choices": ("q.csv", b"pair_id,prompt,left,right,choice,choice\r\n", "two columns are named 'choice'", ":1"),
    "latin-1": ("q.csv", ",".join(COLUMNS).encode() + b"\r\np,caf\xe9,a,b,,\r\n", "wrong encoding: byte 0xe9", ":2"),
    "half of utf-16": ("q.csv", b"\xff\xfep\0a\0i", "wrong encoding", ":1"),
    "spreadsheet": ("q.xlsx", b"PK", "unsupported file type '.xlsx'", ""),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_invalid_file_is_rejected(run: Run, case: str, on_bad_row: str) -> None:
    name, data, message, line = BAD_FILES[case]
    path = run.path.parent / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load(run, path, on_bad_row=on_bad_row)
    assert message in caught.value.message
    assert caught.value.location == f"{path}{line}"


def test_missing_file_is_rejected(run: Run) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load(run, run.path.parent / "none.csv")


@given(st.binary(max_size=200), st.sampled_from(["q.csv", "q.jsonl"]))
@example(b'pair_id,prompt,left,right,choice,comment\n\0,\r\r,"', "q.csv")
@settings(deadline=None, max_examples=150)
def test_any_bytes_are_imported_or_raise_a_located_error(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", [pair(1)])
        path = Path(folder) / name
        for content in (data, ",".join(COLUMNS).encode() + b"\n" + data):
            path.write_bytes(content)
            try:
                load(run, path, on_bad_row="skip")
            except RlaifError as error:
                assert str(path) in str(error.location)
