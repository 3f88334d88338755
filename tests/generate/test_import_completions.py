"""Importing existing answers: every answer once, with its prompt and its model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif.config.loader import load
from rlaif.errors import InputError, RunError
from rlaif.generate.import_completions import CompletionImport, import_source
from rlaif.generate.ingest import ingest_prompts
from rlaif.run.run import Run
from tests.conftest import read_jsonl, write_jsonl
from tests.generate.test_ingest import prose


def run_import(run: Run, rows: list[dict[str, Any]] | Path, **flags: Any) -> CompletionImport:
    source = rows if isinstance(rows, Path) else write_jsonl(run.path.with_suffix(".jsonl"), rows)
    return import_source(run, load(run.path, flags, {}), str(source), lambda line: None)


def prompts(run: Run) -> list[dict[str, Any]]:
    path = run.journal_path("prompts")
    return read_jsonl(path) if path.exists() else []


def answers(run: Run) -> list[dict[str, Any]]:
    path = run.journal_path("completions")
    return read_jsonl(path) if path.exists() else []


def answer_counts(run: Run) -> Counter[tuple[str, str, str, str]]:
    """Count the answers by key, prompt, model and text."""
    return Counter((record["key"], record["prompt_id"], record["model"], record["text"]) for record in answers(run))


def test_every_answer_is_imported_unchanged(tmp_path: Path) -> None:
    """Long, empty, with CRLF, with reasoning, with a lone surrogate. A model that is not given is "unknown"."""
    responses = ["x" * 20_000, "", "a\r\nb\n", "<think>t</think>\nanswer", "lone \ud800", " spaced "]
    run = Run(tmp_path / "run")
    result = run_import(run, [{"prompt": "q", "id": 1, "tags": ["x"], "responses": responses, "models": list("abcdef")},
                           {"prompt": "r", "responses": ["s"]}])  # fmt: skip
    assert result == CompletionImport(prompts=2, completions=7, new=7)
    records = answers(run)
    assert [record["text"] for record in records] == [
        "x" * 20_000,
        "",
        "a\r\nb\n",
        "answer",
        "lone \ufffd",
        " spaced ",
        "s",
    ]
    assert [record["model"] for record in records] == [*"abcdef", "unknown"]
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4, 5, 0]
    assert records[3]["reasoning"] == "t"
    assert {record["source"] for record in records} == {"imported"}
    assert [record["prompt_id"] for record in records] == ["1"] * 6 + [prompts(run)[1]["key"][:16]]
    assert prompts(run)[0]["tags"] == ["x"]
    assert prompts(run)[0]["source"] == f"{tmp_path / 'run.jsonl'}:1"


def test_imported_prompts_are_never_held_out(tmp_path: Path) -> None:
    """Their answers were given to be judged."""
    run = Run(tmp_path / "run")
    run_import(
        run, [{"prompt": f"q{i}", "responses": ["a", "b"]} for i in range(50)], **{"prompts.heldout_fraction": 0.9}
    )
    assert Counter(record["split"] for record in prompts(run)) == {"train": 50}


def test_imported_rows_of_held_out_prompts_are_counted(tmp_path: Path) -> None:
    run, lines = Run(tmp_path / "run"), list[str]()
    rows = [{"prompt": f"q{i}"} for i in range(50)]
    config = load(run.path, {"prompts.sources": [str(write_jsonl(tmp_path / "p.jsonl", rows))],
                             "prompts.heldout_fraction": 0.4}, {})  # fmt: skip
    result = ingest_prompts(run, config, lambda line: None)
    import_path = write_jsonl(tmp_path / "a.jsonl", [{**row, "responses": ["a", "b"]} for row in rows])
    import_source(run, config, str(import_path), lines.append)
    assert 5 < result.heldout < 45
    assert lines == [f"{result.heldout} rows belong to held-out prompts; their answers are not judged"]
    assert ingest_prompts(run, config, lambda line: None).heldout == result.heldout


def test_near_duplicates_of_held_out_prompts_are_held_out_too(tmp_path: Path) -> None:
    """Otherwise the prompts that measure a model would train it, with another comma."""
    run, lines = Run(tmp_path / "run"), list[str]()
    rows = [{"prompt": prose(i, 60)} for i in range(50)]
    config = load(run.path, {"prompts.sources": [str(write_jsonl(tmp_path / "p.jsonl", rows))],
                             "prompts.heldout_fraction": 0.4}, {})  # fmt: skip
    ingested = ingest_prompts(run, config, lambda line: None)
    imported = [{"prompt": row["prompt"].upper() + "!", "responses": ["a", "b"]} for row in rows]
    import_source(run, config, str(write_jsonl(tmp_path / "a.jsonl", imported)), lines.append)
    splits = [record["split"] for record in prompts(run)]
    assert splits[50:] == splits[:50]
    assert splits[:50].count("heldout") == ingested.heldout > 5
    assert lines == [f"{ingested.heldout} rows belong to held-out prompts; their answers are not judged"]


def test_near_duplicates_of_an_imported_prompt_are_not_held_out(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    rows = [{"prompt": prose(i, 60)} for i in range(50)]
    run_import(run, [{"prompt": row["prompt"].upper() + "!", "responses": ["a", "b"]} for row in rows])
    source = str(write_jsonl(tmp_path / "p.jsonl", rows))
    result = ingest_prompts(
        run, load(run.path, {"prompts.sources": [source], "prompts.heldout_fraction": 0.9}, {}), lambda line: None
    )
    assert (result.new, result.heldout) == (50, 0)


def test_a_prompt_imported_first_is_not_counted_as_held_out(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    rows = [{"prompt": f"q{i}"} for i in range(50)]
    run_import(run, [{**row, "responses": ["a", "b"]} for row in rows[:25]])
    source = str(write_jsonl(tmp_path / "p.jsonl", rows))
    result = ingest_prompts(
        run, load(run.path, {"prompts.sources": [source], "prompts.heldout_fraction": 0.9}, {}), lambda line: None
    )
    heldout = [record for record in prompts(run) if record["split"] == "heldout"]
    assert result.heldout == len(heldout)
    assert 10 < len(heldout) <= 25


def test_several_rows_of_one_prompt_are_one_prompt_with_all_answers(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    rows = [{"prompt": "q", "id": "1", "responses": ["a", "b"]}, {"prompt": "r", "responses": ["a"]},
            {"prompt": [{"role": "user", "content": "q"}], "responses": ["c"]}]  # fmt: skip
    result = run_import(run, rows)
    assert (result.prompts, result.completions, len(prompts(run))) == (2, 4, 2)
    assert Counter(record["prompt_id"] for record in answers(run))["1"] == 3
    assert len({record["key"] for record in answers(run)}) == 4


def test_equal_answers_are_separate_records(tmp_path: Path) -> None:
    """Two samples may have the same text, in one row or in two; duplicates are removed later."""
    run = Run(tmp_path / "run")
    result = run_import(run, [{"prompt": "q", "responses": ["a", "a", "b"], "models": ["m", "n", "m"]},
                           {"prompt": "q", "responses": ["a"], "models": ["m"]}])  # fmt: skip
    assert (result.completions, result.new) == (4, 4)
    assert len({record["key"] for record in answers(run)}) == 4
    assert run.completions().height == 4


def test_importing_again_adds_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    rows = [{"prompt": f"q{i % 7}", "responses": ["a", f"b{i}", "a"], "models": ["m", "n", "m"]} for i in range(20)]
    first = run_import(run, rows)
    assert (first.completions, first.new) == (60, 60)
    before = [path.read_bytes() for path in sorted(run.journals.iterdir())]
    assert run_import(run, rows) == CompletionImport(prompts=7, completions=60, new=0)
    assert [path.read_bytes() for path in sorted(run.journals.iterdir())] == before
    assert run_import(run, [*rows, {"prompt": "q0", "responses": ["new"]}]).new == 1


ROWS = st.lists(
    st.fixed_dictionaries({"prompt": st.sampled_from(["p", "q"]), "answers": st.lists(
        st.tuples(st.sampled_from(["a", "b", ""]), st.sampled_from(["m", "n"])), min_size=1, max_size=4)}),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(ROWS, st.randoms())
def test_keys_do_not_depend_on_the_order_of_answers_and_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], random: Any
) -> None:
    """Swapping answers together with their models changes nothing downstream."""
    folder = tmp_path_factory.mktemp("order")

    def imported(name: str, rows: list[dict[str, Any]]) -> Run:
        run = Run(folder / name)
        run_import(run, [{"prompt": row["prompt"], "responses": [text for text, _ in row["answers"]],
                       "models": [model for _, model in row["answers"]]} for row in rows])  # fmt: skip
        return run

    shuffled = [{**row, "answers": random.sample(row["answers"], len(row["answers"]))} for row in rows]
    random.shuffle(shuffled)
    one, other = imported("one", rows), imported("other", shuffled)
    assert answer_counts(one) == answer_counts(other)
    assert max(Counter(record["key"] for record in answers(one)).values()) == 1
    assert {record["key"] for record in prompts(one)} == {record["key"] for record in prompts(other)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(st.floats(0, 1), st.floats(0, 1))
def test_an_interrupted_import_resumes_with_the_same_result(
    tmp_path_factory: pytest.TempPathFactory, first: float, second: float
) -> None:
    folder = tmp_path_factory.mktemp("resumed")
    rows = [{"prompt": f"q{i % 7}", "responses": ["a", f"b{i}", "a"], "models": ["m", "n", "m"]} for i in range(20)]
    source = write_jsonl(folder / "r.jsonl", rows)
    complete, interrupted = Run(folder / "complete"), Run(folder / "interrupted")
    run_import(complete, source)
    interrupted.journals.mkdir(parents=True)
    for name, fraction in (("prompts", first), ("completions", second)):
        content = (complete.journals / f"{name}.jsonl").read_bytes()
        (interrupted.journals / f"{name}.jsonl").write_bytes(content[: round(fraction * len(content))])
    run_import(interrupted, source)
    assert answer_counts(interrupted) == answer_counts(complete)
    prompt_keys = [Counter(record["key"] for record in prompts(run)) for run in (interrupted, complete)]
    assert prompt_keys[0] == prompt_keys[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "responses": ["a", "b"], "models": ["m"]}, "2 responses but 1 models"),
        ({"prompt": "q", "responses": ["a"], "models": ["m", "n"]}, "1 responses but 2 models"),
        ({"prompt": "q", "responses": []}, "responses: List should have at least 1 item"),
        ({"prompt": "other", "id": "1", "responses": ["a"]}, "the id '1' already belongs to another prompt"),
    ],
)
def test_nothing_is_written_if_a_row_is_invalid(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    run = Run(tmp_path / "run")
    good = [{"prompt": f"q{i}", "id": str(i), "responses": ["a"]} for i in range(5)]
    with pytest.raises(InputError) as raised:
        run_import(run, [*good, row])
    assert str(raised.value).startswith(f"{tmp_path / 'run.jsonl'}:6: {message}")
    assert (prompts(run), answers(run)) == ([], [])


def test_an_id_in_the_run_is_rejected_for_another_prompt(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run_import(run, [{"prompt": "q", "id": "1", "responses": ["a"]}])
    with pytest.raises(InputError, match="the id '1' already belongs"):
        run_import(run, [{"prompt": "r", "id": "1", "responses": ["a"]}])
    assert run_import(run, [{"prompt": "q", "id": "2", "responses": ["b"]}]).new == 1
    assert {record["prompt_id"] for record in answers(run)} == {"1"}, "the prompt keeps its first id"


def test_csv_and_parquet_files_are_imported(tmp_path: Path) -> None:
    import polars as pl

    run = Run(tmp_path / "run")
    (tmp_path / "r.csv").write_text('prompt,responses,models\nq,"[""a"", ""b""]","[""m"", ""n""]"\n')
    pl.DataFrame({"prompt": ["q", "r"], "responses": [["a", "b"], ["c"]], "models": [["m", "n"], None]}).write_parquet(
        tmp_path / "r.parquet"
    )
    assert run_import(run, tmp_path / "r.csv").new == 2
    assert run_import(run, tmp_path / "r.parquet").new == 1
    assert [(record["text"], record["model"]) for record in answers(run)] == [("a", "m"), ("b", "n"), ("c", "unknown")]


def test_a_damaged_journal_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run_import(run, [{"prompt": "q", "responses": ["a"]}])
    path = run.journal_path("completions")
    path.write_bytes(b"damaged\n" + path.read_bytes())
    before = [file.read_bytes() for file in sorted(run.journals.iterdir())]
    with pytest.raises(RunError) as raised:
        run_import(run, [{"prompt": "r", "responses": ["a"]}])
    assert raised.value.location == f"{path}:1"
    assert [file.read_bytes() for file in sorted(run.journals.iterdir())] == before
