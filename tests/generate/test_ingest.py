"""Ingesting prompts: which are dropped and why, which are held out, and that an interrupted command resumes."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif import resources
from rlaif.config.loader import load
from rlaif.config.models import Config
from rlaif.errors import InputError, UsageError
from rlaif.generate import near_duplicates
from rlaif.generate.import_completions import import_source
from rlaif.generate.ingest import IngestResult, ingest_prompts, to_prompt
from rlaif.generate.near_duplicates import PERMUTATIONS, RECALL, NearDuplicateIndex, _shingles, lsh_bands
from rlaif.generate.sources import valid_rows
from rlaif.planning import capacity
from rlaif.records import PromptRow
from rlaif.run.run import Run
from tests.conftest import read_jsonl, write_jsonl

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


def prose(seed: int, words: int = 12) -> str:
    """Return a text that is unlike the text of any other seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def config(run: Run, source: Path | str | list[str], **flags: Any) -> Config:
    overrides = {"prompts.sources": source if isinstance(source, list) else [str(source)], "sampler.model": ["m"],
             **{name.replace("__", "."): value for name, value in flags.items()}}  # fmt: skip
    return load(run.path, overrides, {})


def ingest(run: Run, source: Path | str | list[str], **flags: Any) -> IngestResult:
    return ingest_prompts(run, config(run, source, **flags), lambda line: None)


def journaled_prompts(run: Run) -> list[dict[str, Any]]:
    path = run.journal_path("prompts")
    return read_jsonl(path) if path.exists() else []


def journaled_texts(run: Run) -> list[str]:
    return [record["messages"][-1]["content"] for record in journaled_prompts(run)]


# What is journaled


def test_all_fields_of_a_row_are_journaled(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    checks = [{"kind": "regex", "pattern": "\\d", "match": True, "note": None}]
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Grüße 🙂\r\n"}], "id": 7,
           "reference": "r", "tags": ["x", "y"], "checks": checks, "checklist": ["short"],
           "tools": tools}  # fmt: skip
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "first"}, row])
    run = Run(tmp_path / "run")
    ingest(run, source, prompts__heldout_fraction=0)
    first, record = journaled_prompts(run)
    assert first["prompt_id"] == first["key"][:16]
    assert {name: value for name, value in record.items() if name != "key"} == {
        "prompt_id": "7",
        "messages": row["prompt"],
        "reference": "r",
        "checklist": ["short"],
        "checks": checks,
        "tags": ["x", "y"],
        "tools": tools,
        "split": "train",
        "source": f"{source}:2",
    }
    frame = run.prompts()
    assert frame.filter(frame["prompt_id"] == "7").select("reference", "tags", "source").row(0) == (
        "r", ["x", "y"], f"{source}:2")  # fmt: skip


def test_a_default_system_prompt_is_added_to_prompts_without_one(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": prose(1)}]
    source = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": prose(0)}, {"prompt": own}, {"prompt": prose(2), "system": "field"}]
    )
    run, plain = Run(tmp_path / "run"), Run(tmp_path / "plain")
    ingest(run, source, sampler__system="default")
    assert [record["messages"][0]["content"] for record in journaled_prompts(run)] == ["default", "own", "field"]
    ingest(plain, source)
    assert [len(record["messages"]) for record in journaled_prompts(plain)] == [1, 2, 2]
    same = [a["key"] == b["key"] for a, b in zip(journaled_prompts(run), journaled_prompts(plain), strict=True)]
    assert same == [False, True, True]  # the key depends on all that the model is shown


def test_nothing_is_journaled_if_a_row_is_invalid(tmp_path: Path) -> None:
    """Not even if it comes after thousands of valid rows, or in the second file."""
    good = write_jsonl(tmp_path / "good.jsonl", [{"prompt": prose(i)} for i in range(3000)])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": prose(9000)}, {"prompt": ""}])
    run = Run(tmp_path / "run")
    with pytest.raises(InputError, match=r"bad\.jsonl:2: prompt is empty"):
        ingest(run, [str(good), str(bad)])
    assert journaled_prompts(run) == []
    assert ingest(run, [str(bad)], prompts__on_bad_row="skip").prompts == 1
    assert journaled_texts(run) == [prose(9000)]


def test_no_source_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompts are given"):
        ingest(Run(tmp_path / "run"), [])


# Ids


def test_an_id_of_two_prompts_is_rejected_before_anything_is_written(tmp_path: Path) -> None:
    """Otherwise the answers to both would be compared with each other."""
    source = write_jsonl(
        tmp_path / "p.jsonl", [*({"prompt": prose(i), "id": i} for i in range(20)), {"prompt": "x", "id": "3"}]
    )
    run = Run(tmp_path / "run")
    with pytest.raises(InputError, match="the id '3' already belongs to another prompt") as raised:
        ingest(run, source)
    assert raised.value.location == f"{source}:21"
    assert journaled_prompts(run) == []


def test_an_id_in_the_run_is_rejected_for_another_prompt(tmp_path: Path) -> None:
    """Also if the first prompt was imported or came from another file."""
    run = Run(tmp_path / "run")
    import_path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "one", "id": "1", "responses": ["a"]}])
    import_source(run, config(run, []), str(import_path), lambda line: None)
    before = journaled_prompts(run)
    other = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "two", "id": "2"}, {"prompt": "three", "id": "1"}])
    with pytest.raises(InputError, match=r"p\.jsonl:2: the id '1' already belongs"):
        ingest(run, other)
    assert journaled_prompts(run) == before
    same = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "one", "id": "1"}])
    assert (ingest(run, same).prompts, len(journaled_prompts(run))) == (1, 1)


def test_a_duplicate_with_another_id_is_one_prompt(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "one", "id": "1"}, {"prompt": "one", "id": "2"}, {"prompt": "one"}]
    )
    run = Run(tmp_path / "run")
    result = ingest(run, source)
    assert (result.prompts, result.dropped) == (1, Counter({"exact_duplicate": 2}))
    assert [record["prompt_id"] for record in journaled_prompts(run)] == ["1"]


# Splits


def test_near_duplicates_are_held_out_together(tmp_path: Path) -> None:
    """Also if they are not dropped, or have different system prompts."""
    forms = ({}, {"system": "Be brief."}, {"system": "Be kind."})
    rows = [{"id": f"{topic}-{n}", "prompt": prose(topic, 60) + "!" * n, **form}
            for n, form in enumerate(forms) for topic in range(40)]  # fmt: skip
    run = Run(tmp_path / "run")
    result = ingest(run, write_jsonl(tmp_path / "p.jsonl", rows), prompts__near_duplicate_threshold=0,
                    prompts__heldout_fraction=0.4)  # fmt: skip
    split_by_id = {record["prompt_id"]: record["split"] for record in journaled_prompts(run)}
    groups = [{split_by_id[f"{topic}-{n}"] for n in range(3)} for topic in range(40)]
    assert [len(group) for group in groups] == [1] * 40
    assert 5 < groups.count({"heldout"}) < 35
    assert result.heldout == 3 * groups.count({"heldout"})
    assert {record.get("split_group") for record in journaled_prompts(run)} == {None, *(f"{n}-0" for n in range(40))}


@pytest.mark.parametrize("journaled", range(0, 13, 3))
def test_splits_do_not_depend_on_interruptions(tmp_path: Path, journaled: int) -> None:
    rows = [{"id": str(n), "prompt": prose(n % 4, 60) + "!" * n} for n in range(12)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    flags = {"prompts__near_duplicate_threshold": 0, "prompts__heldout_fraction": 0.5}
    complete, interrupted = Run(tmp_path / "complete"), Run(tmp_path / "interrupted")
    ingest(complete, source, **flags)
    interrupted.journals.mkdir(parents=True)
    content = complete.journal_path("prompts").read_bytes()
    interrupted.journal_path("prompts").write_bytes(b"".join(content.splitlines(keepends=True)[:journaled]))
    ingest(interrupted, source, **flags)
    assert interrupted.journal_path("prompts").read_bytes() == content


def test_a_prompt_between_two_groups_follows_the_first_and_moves_neither(tmp_path: Path) -> None:
    between = prose(1, 100)
    words = between.split()
    first, last = (" ".join([*words[:n], "xenon", *words[n + 5 : n + 10], "yeti", *words[n + 10 :]]) for n in (20, 70))
    rows = [{"id": name, "prompt": text} for name, text in (("first", first), ("last", last), ("between", between))]
    run = Run(tmp_path / "run")
    assert are_duplicates(first, last, between, threshold=0.7) == [False, False, True]
    groups = near_duplicates.SplitGroups(0.7)
    prompts = [to_prompt(PromptRow(**row), "x", config(run, "x", prompts__heldout_fraction=0)) for row in rows]
    prompts[1] = prompts[1].model_copy(update={"split": "heldout"})
    assigned = [groups.assign(prompt) for prompt in prompts]
    assert [(one.split, one.split_group) for one in assigned] == [
        ("train", None), ("heldout", None), ("train", "first")]  # fmt: skip


# Duplicates


def are_duplicates(*texts: str, threshold: float = 0.9, **row: Any) -> list[bool]:
    """Return, for each of ``texts``, whether it is a near duplicate of an earlier one."""
    index, settings = NearDuplicateIndex(threshold), load(Path("/nowhere"), {}, {})
    return [index.check_and_add(to_prompt(PromptRow(prompt=text, **row), "x", settings)) for text in texts]


def test_exact_and_near_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    long = prose(5, 300)
    rows = [{"prompt": long}, {"prompt": long}, {"prompt": long + "!"}, {"prompt": long.replace(" ", "  ").upper()},
            {"prompt": long.replace(long.split()[100], "other", 1)}, {"prompt": prose(6, 300)}]  # fmt: skip
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    near, off = Run(tmp_path / "near"), Run(tmp_path / "off")
    result = ingest(near, source)
    assert result.dropped == Counter({"exact_duplicate": 1, "near_duplicate": 3})
    assert journaled_texts(near) == [long, prose(6, 300)]
    assert ingest(off, source, prompts__near_duplicate_threshold=0).dropped == Counter({"exact_duplicate": 1})
    assert len(journaled_texts(off)) == 5


@pytest.mark.parametrize(
    "names", [*([name] for name in sorted(resources.prompt_sets())), sorted(resources.prompt_sets())]
)
def test_no_prompt_of_the_packaged_sets_is_dropped(tmp_path: Path, names: list[str]) -> None:
    """Twins in "refusals" differ in a few words, prompts in "constraints" in one number, and all of them are kept."""
    total = sum(len(read_jsonl(resources.prompt_sets()[name])) for name in names)
    result = ingest(Run(tmp_path / "run"), names)
    assert result.dropped == Counter()
    assert result.prompts == total >= 150


@pytest.mark.parametrize("words", [3, 5, 10, 20, 40, 60])
def test_twins_that_differ_in_one_word_are_kept(words: int) -> None:
    """Benign and harmful, one number and the next, at any position of the word."""
    for position in {0, 1, words // 2, words - 1}:
        for number in range(5):
            base = prose(number, words).split()
            twin = [*base[:position], "different", *base[position + 1 :]]
            assert are_duplicates(" ".join(base), " ".join(twin)) == [False, False], (words, position)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I sort a list in C?", "How do I sort a list in C++?"),
        ("How do I sort a list in C++?", "How do I sort a list in C#?"),
        ("Solve x^2 - 4x + 1 = 0 for x, step by step.", "Solve x^2 + 4x - 1 = 0 for x, step by step."),
        ("How many integers satisfy |x + 5| < 10?", "How many integers satisfy |x + 5| > 10?"),
        ("What is -5 * 3?", "What is 5 * 3?"),
        ("今日の東京の天気を教えてください。", "今日の大阪の天気を教えてください。"),
        ("???", "!!!"),
        ("🙂", "🙁"),
    ],
)
def test_prompts_that_differ_in_a_meaningful_sign_are_kept(one: str, other: str) -> None:
    assert are_duplicates(one, other) == [False, False]
    assert are_duplicates(one, one) == [False, True]


def test_a_shared_system_prompt_does_not_make_prompts_similar(tmp_path: Path) -> None:
    """And one question under two system prompts is two prompts."""
    questions = [f"How do I cook {dish}?" for dish in ("rice", "lentils", "an egg", "pasta")]
    assert are_duplicates(*questions, system=prose(1, 400)) == [False] * 4
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in questions])
    assert ingest(Run(tmp_path / "run"), source, sampler__system=prose(1, 400)).prompts == 4
    index, settings, long = NearDuplicateIndex(0.9), load(Path("/nowhere"), {}, {}), prose(2, 200)
    tools = [{"type": "function", "function": {"name": "f"}}]
    duplicates = [
        index.check_and_add(to_prompt(PromptRow(prompt=long + end, system=system, tools=with_tools), "x", settings))
        for end, system, with_tools in (("", "a", None), (".", "b", None), ("!", "a", tools), ("?", "a", None))
    ]
    assert duplicates == [False, False, False, True]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_bands_are_as_long_as_the_threshold_allows(threshold: float) -> None:
    """Prompts at the threshold are compared; longer bands reduce the number of other comparisons."""

    def compared(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows)

    band_count, rows = lsh_bands(threshold)
    assert band_count * rows <= PERMUTATIONS
    assert compared(rows) >= RECALL or rows == 1
    assert all(compared(longer) < RECALL for longer in range(rows + 1, PERMUTATIONS + 1))


def jaccard(one: str, other: str) -> float:
    return len(_shingles(one) & _shingles(other)) / len(_shingles(one) | _shingles(other))


@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_duplicates_are_those_clearly_above_the_similarity_threshold(threshold: float) -> None:
    """Measured by the exact Jaccard similarity. The estimate is off by more than 0.03 in one case out of a hundred."""
    decided = Counter[bool]()
    for number in range(150):
        words = prose(number, 200).split()
        changed = [*words]
        for position in random.Random(number).sample(range(200), number % 15):
            changed[position] = "changed"
        one, other = " ".join(words), " ".join(changed)
        if abs(jaccard(one, other) - threshold) > 0.08:
            over = jaccard(one, other) > threshold
            assert are_duplicates(one, other, threshold=threshold) == [False, over], number
            decided[over] += 1
    assert min(decided[True], decided[False]) >= 10


def test_prompts_with_the_same_long_instruction_are_compared_with_few_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of comparisons does not grow with the number of prompts, and near duplicates are still found."""
    monkeypatch.setattr("rlaif.generate.near_duplicates.MAX_BAND_CANDIDATES", 4)
    instruction, settings, candidate_counts = prose(1, 120), load(Path("/nowhere"), {}, {}), list[int]()
    index = NearDuplicateIndex(0.9)
    candidates_of = index._candidates

    def counted(slots: Any) -> Any:
        candidates = candidates_of(slots)
        candidate_counts.append(len(candidates))
        return candidates

    monkeypatch.setattr(index, "_candidates", counted)
    texts = [f"{instruction} {prose(number, 30)}" for number in range(2, 602)]
    for text in texts:
        assert not index.check_and_add(to_prompt(PromptRow(prompt=text), "x", settings))
    assert max(candidate_counts) <= 4 * lsh_bands(0.9)[0] < 100
    for text in texts[:100]:
        assert index.check_and_add(to_prompt(PromptRow(prompt=text.upper() + "!"), "x", settings))
    twins = [" ".join([*text.split()[:-15], "changed", *text.split()[-14:]]) for text in texts[100:200]]
    assert sum(index.check_and_add(to_prompt(PromptRow(prompt=text), "x", settings)) for text in twins) >= 95


def test_the_index_grows_and_keeps_its_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.generate.near_duplicates.MIN_CAPACITY", 2)
    texts = [prose(number, 30) for number in range(300)]
    assert are_duplicates(*texts, *(text.title() + "." for text in texts)) == [False] * 300 + [True] * 300


def test_the_index_needs_no_more_memory_per_prompt_than_the_plan_assumes() -> None:
    index = NearDuplicateIndex(0.9)
    held = sum(value.nbytes for value in vars(index).values() if hasattr(value, "nbytes"))
    assert held / index._capacity < capacity.MEMORY_BYTES_PER_PROMPT


def test_ingesting_many_prompts_logs_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.generate.ingest.LOG_EVERY", 10)
    source, lines = (
        write_jsonl(tmp_path / "p.jsonl", [{"prompt": prose(number // 2)} for number in range(35)]),
        list[str](),
    )
    run = Run(tmp_path / "run")
    ingest_prompts(run, config(run, source), lines.append)
    assert lines == [f"{count} prompts ingested, {count} dropped so far" for count in (5, 10, 15)]


# Decontamination


def test_prompts_of_an_evaluation_file_are_dropped(tmp_path: Path) -> None:
    """13 consecutive words in common, or the same short question; also with a system prompt or in a conversation."""
    shared = prose(1, 13)
    evaluation = write_jsonl(
        tmp_path / "e.jsonl",
        [
            {"prompt": f"{prose(2, 30)} {shared} {prose(3, 30)}"},
            {"prompt": "What is the capital of France?", "system": "Be brief."},
            {"prompt": "..."},
        ],
    )
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    rows = [
        {"prompt": f"{prose(4, 20)} {shared.upper()}, {prose(5, 20)}"},
        {"prompt": "what is the capital of  France"},
        {"prompt": f"{prose(6, 20)} {' '.join(shared.split()[:12])} {prose(7, 20)}"},
        {"prompt": "What is the capital of Spain?"},
        {"prompt": "?!"},
        {"prompt": [*talk, {"role": "user", "content": prose(8) + " " + shared}]},
    ]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    for name, system in (("run", None), ("system", prose(9, 50))):
        run = Run(tmp_path / name)
        result = ingest(run, source, prompts__decontaminate_against=[str(evaluation)], sampler__system=system)
        assert result.dropped == Counter({"evaluation_overlap": 3})
        assert journaled_texts(run) == [rows[2]["prompt"], "What is the capital of Spain?", "?!"]


def test_an_evaluation_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """It must not count as a file that nothing overlaps."""
    evaluation = write_jsonl(tmp_path / "e.jsonl", [{"question": "What is the capital of France?"}])
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "What is the capital of France?"}])
    run = Run(tmp_path / "run")
    for mode, message in (
        ("stop", r"e\.jsonl:1: missing 'prompt'; the row has question"),
        ("skip", "has no valid rows"),
    ):
        with pytest.raises(InputError, match=message):
            ingest(run, source, prompts__decontaminate_against=[str(evaluation)], prompts__on_bad_row=mode)
    assert journaled_prompts(run) == []


# Held out


def test_the_held_out_fraction_depends_on_seed_and_content_alone(tmp_path: Path) -> None:
    """The order of rows and the other rows do not matter. The fraction is met within five standard deviations."""
    count, fraction = 3000, 0.2
    rows = [{"prompt": prose(i, 8)} for i in range(count)]

    def heldout(name: str, rows: list[dict[str, Any]], **flags: Any) -> set[str]:
        run = Run(tmp_path / name)
        result = ingest(
            run, write_jsonl(tmp_path / f"{name}.jsonl", rows), prompts__near_duplicate_threshold=0, **flags
        )
        keys = {record["key"] for record in journaled_prompts(run) if record["split"] == "heldout"}
        assert result.heldout == len(keys)
        return keys

    expected = heldout("all", rows, prompts__heldout_fraction=fraction)
    assert abs(len(expected) - fraction * count) < 5 * math.sqrt(count * fraction * (1 - fraction))
    assert heldout("reversed", rows[::-1], prompts__heldout_fraction=fraction) == expected
    assert heldout("half", rows[::2], prompts__heldout_fraction=fraction) < expected
    assert heldout("less", rows, prompts__heldout_fraction=fraction / 2) < expected
    assert heldout("seed", rows, prompts__heldout_fraction=fraction, seed=1) != expected
    assert heldout("none", rows, prompts__heldout_fraction=0.0) == set()


# Resuming


def test_the_limit_can_grow_from_call_to_call(tmp_path: Path) -> None:
    """Duplicates do not count towards it, and the prompts are those of a single call with the last limit."""
    rows = [{"prompt": prose(i // 2)} for i in range(40)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    run, once = Run(tmp_path / "run"), Run(tmp_path / "once")
    for limit, new in ((3, 3), (3, 0), (10, 7), (None, 10), (None, 0)):
        result = ingest(run, source, prompts__limit=limit)
        assert (result.prompts, result.new) == (limit or 20, new)
    ingest(once, source)
    assert journaled_prompts(run) == journaled_prompts(once)


MIXED = [{"prompt": prose(i % 23, 120) + (" tail" if i % 5 else ""), **({"id": str(i % 23)} if i % 5 == 1 else {})}
         for i in range(80) if i % 5 != 1 or i < 23]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(st.floats(0, 1))
def test_an_interrupted_command_resumes_with_the_same_result(
    tmp_path_factory: pytest.TempPathFactory, fraction: float
) -> None:
    """The journal may end at any byte: after the next call it has what a single call would have written."""
    folder = tmp_path_factory.mktemp("resumed")
    source = write_jsonl(folder / "p.jsonl", MIXED)
    complete, interrupted = Run(folder / "complete"), Run(folder / "interrupted")
    expected = ingest(complete, source)
    assert {"exact_duplicate", "near_duplicate"} <= set(expected.dropped)
    journal = complete.journal_path("prompts").read_bytes()
    size = round(fraction * len(journal))
    interrupted.journals.mkdir(parents=True)
    interrupted.journal_path("prompts").write_bytes(journal[:size])
    result = ingest(interrupted, source)
    assert interrupted.journal_path("prompts").read_bytes() == journal
    assert (result.prompts, result.heldout, result.dropped) == (expected.prompts, expected.heldout, expected.dropped)
    assert result.new == expected.prompts - journal[:size].count(b"\n")


def test_lines_added_to_a_file_are_ingested(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": prose(0)}])
    run = Run(tmp_path / "run")
    ingest(run, source)
    write_jsonl(source, [{"prompt": prose(0)}, {"prompt": prose(1)}])
    assert ingest(run, source).new == 1
    assert journaled_texts(run) == [prose(0), prose(1)]


def test_every_packaged_prompt_can_be_journaled_and_read_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    ingest(run, sorted(resources.prompt_sets()))
    by_id = {record["prompt_id"]: record for record in journaled_prompts(run)}
    for name in resources.prompt_sets():
        for _, row in valid_rows(name, PromptRow):
            record = by_id[str(row.id)]
            assert record["checks"] == row.checks
            assert record["tags"] == row.tags
            assert json.loads(json.dumps(record["messages"])) == [message.to_openai() for message in row.messages()]
