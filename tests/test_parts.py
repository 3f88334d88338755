"""However many parts the prompts are taken in: the same is asked, and the same is written, byte for byte."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif import pipeline
from rlaif.errors import RunError
from rlaif.judge import check, definition, refusal
from rlaif.llm.engines import Engines
from rlaif.pair import calibrate
from rlaif.pipeline import build
from rlaif.records import Review, Verdict, key_of
from rlaif.run import parts, tables
from rlaif.run.directory import Run
from rlaif.run.journal import Journal, read
from rlaif.run.parts import Journaled, Pieces
from rlaif.settings import load
from tests.conftest import write_jsonl
from tests.judging import judge_by, words
from tests.scripted import ScriptedServer, with_probabilities
from tests.test_pipeline import Quiet

Serve = Callable[..., ScriptedServer]
KINDS = [["benign"], ["harmful"], ["borderline", "law"], ["chess"], []]
CHECKS = [{"kind": "regex", "pattern": "[02468]$"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def rows(n: int) -> list[dict[str, Any]]:
    """Prompts of every class with one to five answers each, some of them refusals, empty or twice there."""
    draw = random.Random(1)
    found = []
    for i in range(n):
        row: dict[str, Any] = {"id": f"id {i}", "prompt": f"Question {i}?", "tags": KINDS[i % 5], "models": []}
        row["responses"] = [f"Answer {j} to {i}, {draw.randrange(100)}" for j in range(1 + i % 5)]
        if i % 4 == 1:
            row["responses"][-1] = "I can't help with that."
        if i % 7 == 3:
            row["responses"] += ["", row["responses"][0] + " "]
        row["models"] = [f"policy {j % 2}" for j in range(len(row["responses"]))]
        row |= {"checks": CHECKS} if i % 6 == 5 else {}
        row |= {"tools": TOOLS} if i % 11 == 7 else {}
        found.append(row)
    return found


def imported(path: Path, n: int) -> Run:
    run = Run(path)
    config = load(run.path, {"prompts.near_duplicates": 0, "prompts.heldout_share": 0})
    pipeline.import_completions(run, config, str(write_jsonl(path.parent / "rows.jsonl", rows(n))), Quiet())
    return run


def said(run: Run) -> Iterator[Verdict]:
    """What a rating, two comparing and a rewarding judge, the checks and both classifiers said: of most answers, often
    in doubt, now and then against each other."""
    draw = random.Random(2)
    prompts = {record["prompt_id"]: record for _, record in read(run.journal_path("prompts"))}
    answers: dict[str, list[dict[str, Any]]] = {}
    for _, record in read(run.journal_path("completions")):
        answers.setdefault(record["prompt_id"], []).append(record)
    seats = {name: definition.find(name) for name in ("quality", "helpful", "reward", "refusal")}

    def verdict(kind: Any, judge: str, model: str, prompt: str, a: str, **rest: Any) -> Verdict:
        key = key_of(judge=judge, model=model, a=a, **{name: rest.get(name) for name in ("b", "order", "aspect")})
        return Verdict(key=key, kind=kind, judge=judge, judge_hash=seats[judge].hash, model=model, prompt_id=prompt,
                       a=a, at=0.0, **rest)  # fmt: skip

    for prompt, given in answers.items():
        for answer in given:
            a = answer["key"]
            for aspect in seats["quality"].file.aspects:
                if draw.random() < 0.97:
                    yield verdict("rate", "quality", "m", prompt, a, aspect=aspect.name, variance=0.2,
                                  score=draw.choice([1.0, 2.0, 3.5, 5.0]))  # fmt: skip
            if draw.random() < 0.6:
                flags = ["long"] * draw.randrange(2)
                yield verdict("reward", "reward", "r", prompt, a, score=draw.gauss(0, 1), flags=flags)
            if prompts[prompt]["checks"]:
                checked = check.run(prompts[prompt], answer)
                assert isinstance(checked, Verdict)
                yield checked
            yield refusal.verdict(prompt, answer)
            if draw.random() < 0.2:
                yield verdict("classify", "refusal", "m", prompt, a, label="refuse", score=0.7)
        for one in given:
            for other in given:
                for model in ("m", "n"):
                    if one["key"] < other["key"] and draw.random() < 0.7:
                        p = draw.choice([0.5, 0.55, 0.62, 0.9, 0.97, 0.05])
                        for order in ("ab", "ba")[: draw.choice([1, 2, 2, 2, 2, 2])]:
                            told = {"order": order, "p_a": p if draw.random() < 0.9 else 1 - p}
                            told["flags"] = ["speaks to the judge"] * (draw.random() < 0.05)
                            yield verdict("compare", "helpful", model, prompt, one["key"], b=other["key"], **told)


PANEL = {"judge.judges": ["quality@m", "helpful@m", "helpful@n", "reward@r", "refusal@m"],
         "judge.base_url": ["http://localhost:1"], "pairs.human_share": 0.7}  # fmt: skip
FILES = ("tables/pairs.parquet", "dataset/train.parquet", "dataset/test.parquet", "dataset/README.md")


def built(run: Run, flags: dict[str, Any], count: int) -> tuple[Any, ...]:
    """Everything that a run in so many parts writes and says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BYTES", max(1, run.journal_path("completions").stat().st_size // count))
        patch.setattr(parts, "IN_MEMORY", 1)
        patch.setattr(parts, "HELD", 50)
        patch.setattr(build, "CHUNK", 20)
        patch.setattr(calibrate, "MIN_LABELS", 12)
        told = pipeline.rebuild(run, load(run.path, PANEL | flags))
    files = [(run.path / name).read_bytes() for name in FILES]
    return (*files, told, json.dumps(run.manifest()["stages"]["judge"]))


@pytest.mark.parametrize("near_ties", [1.0, 0.05])
@pytest.mark.parametrize("strategy", ["rate-then-compare", "round-robin", "rate-only"])
def test_the_same_is_written_for_any_number_of_parts(tmp_path: Path, strategy: str, near_ties: float) -> None:
    """Of every kind of judge, with ties, refusals and unread verdicts, before and after people labelled pairs."""
    run = imported(tmp_path / "run", 240)
    with run.writing(), run.journal("verdicts") as journal:
        for verdict in said(run):
            journal.append([verdict])
    flags = {"judge.strategy": strategy, "pairs.max_near_ties": near_ties, "pairs.per_prompt": 2}
    one = built(run, flags, 1)
    for count in (2, 31):
        assert built(run, flags, count) == one
    pairs = run.pairs()
    outcomes = {"win"} if strategy == "rate-only" else {"win", "tie", "unparsed"}
    assert outcomes <= set(pairs["outcome"])
    draw = random.Random(3)
    queued = pairs.filter((pl.col("route") != "dropped") | (pl.col("pair_id").str.ends_with("7")))
    with run.writing(), run.journal("reviews") as reviews:
        for pair, prompt, route in queued.select("pair_id", "prompt_id", "route").iter_rows():
            choice, preferred = draw.choice([*[("left", "a"), ("right", "b")] * 4, ("tie", None), ("both_bad", None)])
            reviews.append([Review(key=key_of(pair=pair), pair_id=pair, prompt_id=prompt, annotator="ada", left="a",
                                   choice=choice, preferred=preferred, route=route, at=0.0,
                                   edited="better" if draw.random() < 0.2 else None)])  # fmt: skip
    after = built(run, flags, 1)
    assert after[:2] != one[:2]
    assert after[4].labels["calibration"]
    assert built(run, flags, 23) == after


@pytest.mark.parametrize("near_ties", [1.0, 0.02])
def test_the_same_is_asked_in_any_number_of_parts(serve: Serve, tmp_path: Path, near_ties: float) -> None:
    """Each question once; a second start asks nothing."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if words(body) == ["Refuse", "Partial", "Comply"]:
            return with_probabilities({"Refuse": 0.7, "Partial": 0.2, "Comply": 0.1})
        return judge_by(lambda text: int(text.rsplit(" ", 1)[-1]) // 25 / 4 if text[-1].isdigit() else 0.0)(body)

    found = []
    for count in (1, 9):
        server = serve(answer)
        run = imported(tmp_path / f"run{count}", 40)
        flags = {"judge.judges": ["quality@m", "helpful@m", "refusal@m"], "judge.base_url": [server.url],
                 "pairs.min_margin": 0.0, "pairs.tries": 3, "pairs.max_near_ties": near_ties}  # fmt: skip
        config = load(run.path, flags)
        with pytest.MonkeyPatch.context() as patch, Engines(run.log, config.client, lambda line: None) as engines:
            patch.setattr(parts, "BYTES", max(1, run.journal_path("completions").stat().st_size // count))
            pipeline.judge(run, config, Quiet(), engines)
            asked = Counter(json.dumps(body, sort_keys=True) for body in server.requests)
            pipeline.judge(run, config, Quiet(), engines)
        assert len(server.requests) == asked.total()
        found.append((asked, run.pairs()))
    (one, table), (many, other) = found
    assert one == many
    assert max(one.values()) == 1
    assert table.equals(other)


# The stores


def test_pieces_come_back_in_order_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "IN_MEMORY", 1)
    pieces = Pieces(tmp_path)
    frame = pl.DataFrame({"n": range(20), "of": [[str(i)] for i in range(20)]}).with_columns(
        key=pl.col("n").cast(pl.UInt128) + 2**100, word=pl.lit("w").cast(pl.Categorical)
    )
    for start in (0, 10):
        pieces.add_by(pl.col("n") % 3, frame.slice(start, 10))
    assert pieces.height == 20
    for part in range(4):  # the last is empty, and of the same columns
        assert pieces.read(part).equals(frame.filter(pl.col("n") % 3 == part))
        assert pieces.read(part).schema == frame.schema
    assert [n for n, *_ in pieces.rows()] == [*range(0, 20, 3), *range(1, 20, 3), *range(2, 20, 3)]
    assert list(tmp_path.iterdir()) == []


def test_a_journal_is_read_on_from_where_it_ended(tmp_path: Path) -> None:
    """A half-written line is there when it is whole, and of two answers to one key the newer one is kept."""
    path = tmp_path / "v.jsonl"
    schema = {name: tables.VERDICTS[name] for name in ("key", "prompt_id", "score")}

    def verdict(key: int, score: float) -> Verdict:
        return Verdict(key=f"{key:064x}", kind="rate", judge="j", judge_hash="h", model="m", prompt_id=f"p{key}", a="a",
                       score=score)  # fmt: skip

    journaled = Journaled(path, schema, lambda frame: frame, tmp_path, 3)
    assert sum(journaled.read(part).height for part in range(3)) == 0
    for last in range(1, 4):
        with Journal(path) as journal:
            journal.append([verdict(last, 0.0), verdict(0, float(last))])
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        journaled.catch_up()
        path.write_bytes(whole)
        journaled.catch_up()
        found = pl.concat(journaled.read(part) for part in range(3)).sort("key")
        assert found.equals(tables.scan(path, schema).sort("key"))
        assert found["score"].to_list() == [float(last)] + [0.0] * last


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "IN_MEMORY", 1)
    with pytest.raises(RunError, match="cannot be written") as raised:
        Pieces(Path("/dev/full").parent / "nowhere").add(0, pl.DataFrame({"n": [1]}))
    assert raised.value.where
