"""Requests and written bytes do not depend on the number of partitions."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif import api
from rlaif.config.loader import load
from rlaif.errors import RunError
from rlaif.judge import check_schema, judge_file, refusal_classifier, runner
from rlaif.labeling import build_dataset
from rlaif.labeling.judging import load_panel
from rlaif.llm.backends import ModelBackends
from rlaif.llm.request import Request
from rlaif.pair import human_calibration
from rlaif.records import Review, Verdict, content_key
from rlaif.run import frames, partitions
from rlaif.run.journal import Journal, iter_records
from rlaif.run.partitions import PartitionedFrames, PartitionedJournal
from rlaif.run.run import Run
from tests.conftest import write_jsonl
from tests.fake_judge import judge_by, verdict_words
from tests.fake_server import ScriptedServer, with_probabilities
from tests.labeling.test_judging import QuietReporter

Serve = Callable[..., ScriptedServer]
TAGS = [["benign"], ["harmful"], ["borderline", "law"], ["chess"], []]
CHECKS = [{"kind": "regex", "pattern": "[02468]$"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def make_rows(n: int) -> list[dict[str, Any]]:
    """Return prompts of every class with one to five answers each; some are refusals, empty or duplicates."""
    rng = random.Random(1)
    result = []
    for i in range(n):
        row: dict[str, Any] = {"id": f"id {i}", "prompt": f"Question {i}?", "tags": TAGS[i % 5], "models": []}
        row["responses"] = [f"Answer {j} to {i}, {rng.randrange(100)}" for j in range(1 + i % 5)]
        if i % 4 == 1:
            row["responses"][-1] = "I can't help with that."
        if i % 7 == 3:
            row["responses"] += ["", row["responses"][0] + " "]
        row["models"] = [f"policy {j % 2}" for j in range(len(row["responses"]))]
        row |= {"checks": CHECKS} if i % 6 == 5 else {}
        row |= {"tools": TOOLS} if i % 11 == 7 else {}
        result.append(row)
    return result


def import_run(path: Path, n: int) -> Run:
    run = Run(path)
    config = load(run.path, {"prompts.near_duplicate_threshold": 0, "prompts.heldout_fraction": 0})
    api.import_completions(run, config, str(write_jsonl(path.parent / "rows.jsonl", make_rows(n))), QuietReporter())
    return run


def panel_requests(run: Run, flags: dict[str, Any]) -> Iterator[Request]:
    """Yield all requests that the panel could send."""
    config = load(run.path, PANEL | flags)
    prompts = {record["prompt_id"]: record for _, record in iter_records(run.journal_path("prompts"))}
    answers = [record for _, record in iter_records(run.journal_path("completions"))]
    prompt_of = [prompts[answer["prompt_id"]] for answer in answers]
    for judge in load_panel(config):
        compares = judge.definition.file.kind == "compare"
        items = [
            runner.JudgeInput(i, i, j if compares else None)
            for i, first in enumerate(answers)
            for j, second in enumerate(answers)
            if first["prompt_id"] == second["prompt_id"] and (first["key"] < second["key"] if compares else i == j)
        ]
        mode = runner.expected_output_mode(judge, config)
        yield from runner.judge_requests(judge, mode, config, items, prompt_of.__getitem__, answers.__getitem__)


def request_by_question(run: Run, flags: dict[str, Any]) -> dict[tuple[Any, ...], tuple[str, str]]:
    """Return key and settings hash of all requests of the panel, by judge, model, a, b, order and aspect."""
    requests = {}
    for request in panel_requests(run, flags):
        about = request.context
        name, model = about.judge.definition.name, about.judge.member_config.model
        question = name, model, about.a, about.b, about.order, about.aspect
        requests[question] = request.keys[0], about.settings_hash
    return requests


def random_verdicts(run: Run, flags: dict[str, Any]) -> Iterator[Verdict]:
    """Yield verdicts of a rating judge, two comparing judges, a reward model, the checks and both classifiers.

    They cover most answers, are often uncertain, and sometimes contradict each other.
    """
    rng = random.Random(2)
    prompts = {record["prompt_id"]: record for _, record in iter_records(run.journal_path("prompts"))}
    answers: dict[str, list[dict[str, Any]]] = {}
    for _, record in iter_records(run.journal_path("completions")):
        answers.setdefault(record["prompt_id"], []).append(record)
    requests = request_by_question(run, flags)
    judges = {name: judge_file.find_judge(name) for name in ("quality", "helpful", "reward", "refusal")}

    def verdict(kind: Any, judge: str, model: str, prompt: str, a: str, **rest: Any) -> Verdict:
        key, asked_as = requests[judge, model, a, rest.get("b"), rest.get("order"), rest.get("aspect")]
        return Verdict(key=key, kind=kind, judge=judge, judge_hash=judges[judge].hash, model=model,
                       settings_hash=asked_as, prompt_id=prompt, a=a, created_at=0.0, **rest)  # fmt: skip

    for prompt, prompt_answers in answers.items():
        for answer in prompt_answers:
            a = answer["key"]
            for aspect in judges["quality"].file.aspects:
                if rng.random() < 0.97:
                    yield verdict("rate", "quality", "m", prompt, a, aspect=aspect.name, variance=0.2,
                                  score=rng.choice([1.0, 2.0, 3.5, 5.0]))  # fmt: skip
            if rng.random() < 0.6:
                flags = ["long"] * rng.randrange(2)
                yield verdict("reward", "reward", "r", prompt, a, score=rng.gauss(0, 1), flags=flags)
            if prompts[prompt]["checks"]:
                checked = check_schema.run_checks(prompts[prompt], answer)
                assert isinstance(checked, Verdict)
                yield checked
            yield refusal_classifier.refusal_verdict(prompt, answer)
            if rng.random() < 0.2:
                yield verdict("classify", "refusal", "m", prompt, a, label="refuse", score=0.7)
        for answer_a in prompt_answers:
            for answer_b in prompt_answers:
                for model in ("m", "n"):
                    if answer_a["key"] < answer_b["key"] and rng.random() < 0.7:
                        p = rng.choice([0.5, 0.55, 0.62, 0.9, 0.97, 0.05])
                        for order in ("ab", "ba")[: rng.choice([1, 2, 2, 2, 2, 2])]:
                            fields = {"order": order, "prob_a": p if rng.random() < 0.9 else 1 - p}
                            fields["flags"] = ["a_addresses_judge"] * (rng.random() < 0.05)
                            yield verdict(
                                "compare", "helpful", model, prompt, answer_a["key"], b=answer_b["key"], **fields
                            )


PANEL = {"judge.panel": ["quality@m", "helpful@m", "helpful@n", "reward@r", "refusal@m"], "judge.output_mode": "choice",
         "judge.base_url": ["http://localhost:1"], "pairs.human_fraction": 0.7}  # fmt: skip
FILES = ("tables/pairs.parquet", "dataset/train.parquet", "dataset/test.parquet", "dataset/README.md")


def rebuild_in_partitions(run: Run, flags: dict[str, Any], partition_count: int) -> tuple[Any, ...]:
    """Return everything that a run with this number of partitions writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            partitions, "PARTITION_BYTES", max(1, run.journal_path("completions").stat().st_size // partition_count)
        )
        patch.setattr(partitions, "MEMORY_BUFFER_BYTES", 1)
        patch.setattr(partitions, "SORT_BUFFER_ROWS", 50)
        patch.setattr(build_dataset, "CHUNK_ROWS", 20)
        patch.setattr(human_calibration, "MIN_LABELS", 4)
        result = api.rebuild_dataset(run, load(run.path, PANEL | flags))
    files = [(run.path / name).read_bytes() for name in FILES]
    return (*files, result, json.dumps(run.manifest()["stages"]["judge"]))


@pytest.mark.parametrize("near_ties", [1.0, 0.05])
@pytest.mark.parametrize("strategy", ["rate-then-compare", "round-robin", "rate-only"])
def test_output_does_not_depend_on_the_number_of_partitions(tmp_path: Path, strategy: str, near_ties: float) -> None:
    """All kinds of judges, with ties, refusals and missing verdicts, before and after human labels."""
    run = import_run(tmp_path / "run", 240)
    with run.lock(), run.journal("verdicts") as journal:
        for verdict in random_verdicts(run, {}):
            journal.append([verdict])
    flags = {"judge.strategy": strategy, "pairs.max_tie_drop_fraction": near_ties, "pairs.max_per_prompt": 2}
    unpartitioned = rebuild_in_partitions(run, flags, 1)
    for count in (2, 31):
        assert rebuild_in_partitions(run, flags, count) == unpartitioned
    pairs = run.pairs()
    outcomes = {"win"} if strategy == "rate-only" else {"win", "tie", "unparsable"}
    assert outcomes <= set(pairs["outcome"])
    rng = random.Random(3)
    queued = pairs.filter((pl.col("route") != "dropped") | (pl.col("pair_id").str.ends_with("7")))
    with run.lock(), run.journal("reviews") as reviews:
        for pair, prompt, route in queued.select("pair_id", "prompt_id", "route").iter_rows():
            choice, preferred = rng.choice([*[("left", "a"), ("right", "b")] * 4, ("tie", None), ("both_bad", None)])
            reviews.append(
                [
                    Review(
                        key=content_key(pair=pair),
                        pair_id=pair,
                        prompt_id=prompt,
                        annotator="ada",
                        left_side="a",
                        choice=choice,
                        preferred=preferred,
                        route=route,
                        created_at=0.0,
                        edited_response="better" if rng.random() < 0.2 else None,
                    )
                ]
            )
    after = rebuild_in_partitions(run, flags, 1)
    assert after[:2] != unpartitioned[:2]
    assert after[4].label_quality["calibration"]
    assert rebuild_in_partitions(run, flags, 23) == after


@pytest.mark.parametrize("near_ties", [1.0, 0.02])
def test_requests_do_not_depend_on_the_number_of_partitions(serve: Serve, tmp_path: Path, near_ties: float) -> None:
    """Each request is sent once, and a second start sends none."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if verdict_words(body) == ["Refuse", "Partial", "Comply"]:
            return with_probabilities({"Refuse": 0.7, "Partial": 0.2, "Comply": 0.1})
        return judge_by(lambda text: int(text.rsplit(" ", 1)[-1]) // 25 / 4 if text[-1].isdigit() else 0.0)(body)

    results = []
    for count in (1, 9):
        server = serve(answer)
        run = import_run(tmp_path / f"run{count}", 40)
        flags = {
            "judge.panel": ["quality@m", "helpful@m", "refusal@m"],
            "judge.base_url": [server.url],
            "pairs.min_rating_margin": 0.0,
            "pairs.max_candidates_per_prompt": 3,
            "pairs.max_tie_drop_fraction": near_ties,
        }
        config = load(run.path, flags)
        with (
            pytest.MonkeyPatch.context() as patch,
            ModelBackends(run.log, config.client, lambda line: None) as backends,
        ):
            patch.setattr(
                partitions, "PARTITION_BYTES", max(1, run.journal_path("completions").stat().st_size // count)
            )
            api.judge(run, config, QuietReporter(), backends)
            request_counts = Counter(json.dumps(body, sort_keys=True) for body in server.requests)
            api.judge(run, config, QuietReporter(), backends)
        assert len(server.requests) == request_counts.total()
        results.append((request_counts, run.pairs()))
    (counts_one, pairs_one), (counts_many, pairs_many) = results
    assert counts_one == counts_many
    assert max(counts_one.values()) == 1
    assert pairs_one.equals(pairs_many)


# Partitioned frames and journals


def test_frames_are_read_in_order_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "MEMORY_BUFFER_BYTES", 1)
    pieces = PartitionedFrames(tmp_path)
    frame = pl.DataFrame({"n": range(20), "of": [[str(i)] for i in range(20)]}).with_columns(
        key=pl.col("n").cast(pl.UInt128) + 2**100, word=pl.lit("w").cast(pl.Categorical)
    )
    for start in (0, 10):
        pieces.add_partitioned(pl.col("n") % 3, frame.slice(start, 10))
    assert pieces.height == 20
    for partition in range(4):  # the last is empty and has the same columns
        assert pieces.read(partition).equals(frame.filter(pl.col("n") % 3 == partition))
        assert pieces.read(partition).schema == frame.schema
    assert [n for n, *_ in pieces.rows()] == [*range(0, 20, 3), *range(1, 20, 3), *range(2, 20, 3)]
    assert list(tmp_path.iterdir()) == []


def test_catch_up_reads_from_the_last_complete_line(tmp_path: Path) -> None:
    """A half-written line is read once it is complete. Of two records with one key the newer one is kept."""
    path = tmp_path / "v.jsonl"
    schema = {name: frames.VERDICTS[name] for name in ("key", "prompt_id", "score")}

    def verdict(key: int, score: float) -> Verdict:
        return Verdict(key=f"{key:064x}", kind="rate", judge="j", judge_hash="h", model="m", prompt_id=f"p{key}", a="a",
                       score=score)  # fmt: skip

    journaled = PartitionedJournal(path, schema, lambda frame: frame, tmp_path, 3)
    assert sum(journaled.read(partition).height for partition in range(3)) == 0
    for last in range(1, 4):
        with Journal(path) as journal:
            journal.append([verdict(last, 0.0), verdict(0, float(last))])
        full = path.read_bytes()
        path.write_bytes(full[:-5])
        journaled.catch_up()
        path.write_bytes(full)
        journaled.catch_up()
        frame = pl.concat(journaled.read(partition) for partition in range(3)).sort("key")
        assert frame.equals(frames.read_journal_frame(path, schema).sort("key"))
        assert frame["score"].to_list() == [float(last)] + [0.0] * last


def test_an_unwritable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "MEMORY_BUFFER_BYTES", 1)
    with pytest.raises(RunError, match="cannot be written") as raised:
        PartitionedFrames(Path("/dev/full").parent / "nowhere").add(0, pl.DataFrame({"n": [1]}))
    assert raised.value.location
