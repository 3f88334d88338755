"""``generate`` and ``judge`` with scripted models: counts, order, duplicates, strategies, interruption, settings."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif import api
from rlaif.cli import evaluate, train
from rlaif.cli.options import config_as_judged, open_run_with_config
from rlaif.config.loader import load
from rlaif.config.models import Config
from rlaif.generate.ingest import ingest_prompts
from rlaif.llm.backends import ModelBackends
from rlaif.llm.usage import UsageMeter
from rlaif.orchestrator import stages
from rlaif.run.run import Run
from rlaif.train import trainer
from tests.conftest import command, read_jsonl, write_jsonl
from tests.fake_judge import fenced_parts, judge_by, verdict_words
from tests.fake_server import Fault, ScriptedServer, with_probabilities

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]


class QuietReporter:
    """Reporter that discards everything."""

    def log(self, line: str) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, usage: UsageMeter) -> Iterator[None]:
        yield


def goodness(text: str) -> float:
    """Return the quality that a scripted answer states of itself ("... [0.7]"), else 0.5."""
    _, _, tail = text.rpartition("[")
    with contextlib.suppress(ValueError):
        return float(tail.rstrip("]"))
    return 0.5


def import_and_judge(path: Path, rows: list[dict[str, Any]], url: str, **flags: Any) -> tuple[Run, Any]:
    """Import ``rows`` into a run at ``path`` and judge them there."""
    path.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(path / "rows.jsonl", rows)
    run = Run(path / "run")
    overrides = {"judge.panel": ["helpful"], "judge.model": "m", "judge.base_url": [url], **flags}
    config = load(run.path, overrides)
    with ModelBackends(run.log, config.client, lambda line: None) as backends:
        api.import_completions(run, config, str(source), QuietReporter())
        return run, api.judge(run, config, QuietReporter(), backends)


def labels_by_text(run: Run) -> dict[tuple[str, str, str], Any]:
    """Map (prompt, better, worse), as texts, to probability, outcome and route of every candidate."""
    result = {}
    for row in run.pairs().iter_rows(named=True):
        a, b, p = row["response_a"], row["response_b"], row["prob_a"]
        if p is not None and p < 0.5:
            a, b, p = b, a, 1 - p
        if p == 0.5 or p is None:
            a, b = sorted((a, b))
        result[row["prompt"], a, b] = (None if p is None else round(p, 9), row["outcome"], row["route"])
    return result


# Counts


def test_held_out_prompts_get_no_pairs_even_if_answers_are_imported(tmp_path: Path, serve: Serve) -> None:
    """Otherwise the prompts that measure a model would train it."""
    run, server = Run(tmp_path / "run"), serve(judge_by(goodness), owned_by="vllm")
    rows = [{"prompt": f"prompt number {i * 7919}"} for i in range(40)]
    overrides = {"judge.panel": ["helpful"], "judge.model": "m", "judge.base_url": [server.url],
              "prompts.sources": [str(write_jsonl(tmp_path / "p.jsonl", rows))], "prompts.heldout_fraction": 0.4,
              "prompts.near_duplicate_threshold": 0, "pairs.human_fraction": 0}  # fmt: skip
    config = load(run.path, overrides)
    with run.lock():
        ingest_prompts(run, config, QuietReporter().log)
    answers = [{**row, "responses": ["one [0.1]", "two [0.9]", ""]} for row in rows]
    run, judge_result = import_and_judge(tmp_path, answers, server.url, **overrides)
    heldout = {
        record["prompt_id"] for record in read_jsonl(run.journal_path("prompts")) if record["split"] == "heldout"
    }
    assert 5 < len(heldout) < 35
    judged_prompts = {record["prompt_id"] for record in read_jsonl(run.journal_path("verdicts"))}
    assert judged_prompts.isdisjoint(heldout)
    assert judge_result.build.dropped_completions == {"empty": 40 - len(heldout)}
    pairs = run.pairs()
    assert heldout.isdisjoint(pairs["prompt_id"])
    assert pairs.height == 40 - len(heldout)


def test_counts_of_two_thousand_imported_prompts_add_up(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    """Wins, ties, inconsistent and unparsable verdicts all occur, and every candidate is counted exactly once."""

    def taste(body: dict[str, Any]) -> Any:
        first, second = fenced_parts(body)[-2:]
        kind = int(fenced_parts(body)[0].rsplit(" ", 1)[1]) % 10
        if kind == 0:
            return with_probabilities(
                {"A": 0.55, "B": 0.45} if goodness(first) > goodness(second) else {"A": 0.5, "B": 0.5}
            )
        if kind == 1:
            return with_probabilities({"A": 0.9, "B": 0.1})
        if kind == 2:
            return ["neither of them"]
        return judge_by(goodness)(body)

    rows = [{"prompt": f"Question number {i}", "responses": [f"one [{(i % 7) / 7}]", f"two [{(i % 5) / 5 + 0.05}]"]}
            for i in range(2000)]  # fmt: skip
    server = serve(taste)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    rlaif("generate", run, "--import", source)
    result = rlaif(
        "judge", run, "--judge", "helpful", "--model", "m", "--base-url", server.url, "--max-failures", "500"
    )
    pairs = pl.read_parquet(run / "tables" / "pairs.parquet")
    outcomes, routes = Counter(pairs["outcome"]), Counter(pairs["route"])
    assert pairs.height == pairs["pair_id"].n_unique() == 2000
    assert outcomes.total() == routes.total() == 2000
    assert outcomes["unparsable"] == 200
    assert outcomes["inconsistent"] == 200
    assert outcomes["tie"] >= 200
    kept = 2000 - routes["dropped"]
    assert kept == outcomes["win"]
    assert abs(routes["audit"] + routes["targeted"] - kept / 10) <= 1
    assert routes["audit"] > 0
    assert routes["targeted"] > 0
    dataset = pl.concat([pl.read_parquet(run / "dataset" / f"{name}.parquet") for name in ("train", "test")])
    assert dataset.height == routes["judge"]
    assert not set(dataset["pair_id"]) & set(pairs.filter(pl.col("route") != "judge")["pair_id"])
    assert "await review" in result.stdout
    for row in dataset.iter_rows(named=True):
        assert goodness(row["chosen"][0]["content"]) > goodness(row["rejected"][0]["content"])


def test_an_unparsable_verdict_stays_pending_and_is_never_a_label(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    answers = [["who knows"]]
    server = serve(lambda body: answers[0] if answers else judge_by(goodness)(body))
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "responses": ["a [0.1]", "b [0.9]"]}])
    rlaif("generate", tmp_path / "run", "--import", source)
    arguments = ("judge", tmp_path / "run", "--judge", "helpful", "--model", "m", "--base-url", server.url)
    failed = rlaif(*arguments, code=3)
    assert "2 answers are missing (2 unparsable" in failed.stderr
    assert len(server.requests) == 4  # each is retried once
    pairs = pl.read_parquet(tmp_path / "run" / "tables" / "pairs.parquet")
    assert pairs["outcome"].to_list() == ["unparsable"]
    assert pairs["prob_a"].to_list() == [None]
    assert pl.read_parquet(tmp_path / "run" / "dataset" / "train.parquet").height == 0
    answers.clear()
    rlaif(*arguments)
    assert pl.read_parquet(tmp_path / "run" / "tables" / "pairs.parquet")["outcome"].to_list() == ["win"]


# Position and leaks

TEXT = st.text(min_size=0, max_size=40)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(TEXT.filter(str.strip), st.lists(st.tuples(TEXT, st.integers(0, 9)), min_size=2, max_size=4)),
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_answers_in_the_input_does_not_change_labels(
    serve: Serve, tmp_path_factory: pytest.TempPathFactory, prompts: list[Any], rnd: random.Random
) -> None:
    """A label depends on the texts, not on their position or on the order of the rows."""
    server = serve(judge_by(goodness))
    rows = [
        {"prompt": text, "responses": [f"{answer} [{g / 9}]" for answer, g in answers]} for text, answers in prompts
    ]
    swapped = [{**row, "responses": rnd.sample(row["responses"], len(row["responses"]))} for row in rows]
    rnd.shuffle(swapped)
    first, _ = import_and_judge(tmp_path_factory.mktemp("first"), rows, server.url)
    second, _ = import_and_judge(tmp_path_factory.mktemp("second"), swapped, server.url)
    assert labels_by_text(first) == labels_by_text(second)
    assert first.pairs()["pair_id"].sort().to_list() == second.pairs()["pair_id"].sort().to_list()


AWKWARD = [
    "",
    "x" * 20_000,
    "naïve — ☃ 🎉 שלום \u202egnp.exe",
    "line one\r\nline two\r\n",
    "lone \ud800 surrogate",
    "{response_b} {conversation} {reply}",
    '"; DROP TABLE pairs; -- <script>alert(1)</script>',
    "NUL \x00 and escape \x1b[31m",
    "A",
    "same answer",
    " same  answer\r\n",
]


def test_no_answer_reaches_a_pair_of_another_prompt(serve: Serve, tmp_path: Path) -> None:
    """Every pair has two answers to its own prompt, and a judge sees no others, whatever the texts are."""
    server = serve(judge_by(lambda text: (len(text) % 97) / 97))
    rows = [
        {
            "prompt": f"prompt {i} \r\n ☃ \ud83d",
            "responses": [*(text and f"<{i}> {text}" for text in AWKWARD), " \n\t "],
        }
        for i in range(6)
    ]
    rows += rows[:2]  # two prompts twice
    run, judge_result = import_and_judge(tmp_path, rows, server.url)
    pairs = run.pairs()
    assert pairs.height == 6 * (9 * 8 // 2)  # of 12 answers two are empty and one is a copy
    assert judge_result.build.dropped_completions["empty"] >= 12
    for row in pairs.iter_rows(named=True):
        prompt_number = row["prompt"].split("prompt ")[1].split(" ")[0]
        assert row["response_a"].startswith(f"<{prompt_number}> ")
        assert row["response_b"].startswith(f"<{prompt_number}> ")
        assert row["response_a"] != row["response_b"]
    for body in server.requests:
        conversation, first, second = fenced_parts(body)
        prompt_number = conversation.split(" ")[1]
        assert first.startswith(f"<{prompt_number}> ")
        assert second.startswith(f"<{prompt_number}> ")
        # No other part of the request contains an answer.
        assert body["messages"][-1]["content"].count(f"<{prompt_number}> ") == 2


def test_duplicate_and_empty_answers_never_reach_a_judge(serve: Serve, tmp_path: Path) -> None:
    server = serve(judge_by(goodness))
    rows = [{"prompt": "q", "responses": ["Yes.\nNo.", " Yes.  \r\nNo.", "", "  ", "Yes.\r\nNo.\n"]}]
    run, judge_result = import_and_judge(tmp_path, rows, server.url)
    assert server.requests == []
    assert run.pairs().height == 0
    assert judge_result.build.dropped_completions == {"empty": 2, "duplicate": 2}


# Strategies


@pytest.mark.parametrize("strategy", ["rate-then-compare", "round-robin", "rate-only"])
def test_each_strategy_finds_the_better_answer(serve: Serve, tmp_path: Path, strategy: str) -> None:
    server = serve(judge_by(goodness))
    rows = [{"prompt": f"q{i}", "responses": [f"{'abcd'[j]}{i} [{(i * 3 + j * 5) % 11 / 10}]" for j in range(4)]}
            for i in range(20)]  # fmt: skip
    names = {"rate-then-compare": ["helpful", "quality"], "round-robin": ["helpful"], "rate-only": ["quality"]}
    run, _ = import_and_judge(tmp_path, rows, server.url, **{"judge.panel": names[strategy], "judge.strategy": strategy,
                                                  "pairs.human_fraction": 0.0})  # fmt: skip
    kept = run.pairs().filter(pl.col("route") == "judge")
    assert kept.height == 20
    for row in kept.iter_rows(named=True):
        scores = [goodness(row["response_a"]), goodness(row["response_b"])]
        assert row["preferred"] == ("a" if scores[0] > scores[1] else "b")
        goodness_of_all = [goodness(text) for text in rows[int(row["response_a"].split(" ")[0][1:])]["responses"]]
        assert max(scores) == max(goodness_of_all)
        assert min(scores) == min(goodness_of_all)
    request_counts = Counter(len(verdict_words(body)) for body in server.requests)
    expected = {"rate-then-compare": {5: 320, 2: 40}, "round-robin": {2: 240}, "rate-only": {5: 320}}
    assert request_counts == expected[strategy]


def test_after_a_near_tie_the_next_pair_is_tried(serve: Serve, tmp_path: Path) -> None:
    """Best and worst have different ratings, but compare as equal; the next pair decides."""

    def taste(body: dict[str, Any]) -> Any:
        if len(verdict_words(body)) == 5:
            return judge_by(goodness)(body)
        answers = fenced_parts(body)[-2:]
        if any("[0.0]" in text for text in answers):
            return with_probabilities({"A": 0.5, "B": 0.5})
        return judge_by(goodness)(body)

    server = serve(taste)
    rows = [{"prompt": "q", "responses": ["worst [0.0]", "bad [0.2]", "fair [0.6]", "best [1.0]"]}]
    run, _ = import_and_judge(
        tmp_path, rows, server.url, **{"judge.panel": ["helpful", "quality"], "pairs.human_fraction": 0.0}
    )
    rows_by_pair = {frozenset((row["response_a"], row["response_b"])): row for row in run.pairs().iter_rows(named=True)}
    assert rows_by_pair[frozenset(("worst [0.0]", "best [1.0]"))]["outcome"] == "tie"
    assert rows_by_pair[frozenset(("bad [0.2]", "best [1.0]"))]["route"] == "judge"
    assert len(rows_by_pair) == 2


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_a_near_tie_is_kept_only_if_the_next_pair_is_not_a_win(serve: Serve, tmp_path: Path, share: float) -> None:
    """Best and worst compare as a near tie, and on eight of ten prompts the next pair is clear. That alone keeps the
    share of prompts lost to near ties within the limit."""

    def taste(body: dict[str, Any]) -> Any:
        if len(verdict_words(body)) == 5:
            return judge_by(goodness)(body)
        first, second = fenced_parts(body)[-2:]
        clear = int(first.split()[0]) < 8 and not any("best" in text for text in (first, second))
        confidence = 0.9 if clear else 0.55
        return with_probabilities({"A": confidence, "B": 1 - confidence} if goodness(first) > goodness(second) else
                                  {"A": 1 - confidence, "B": confidence})  # fmt: skip

    server = serve(taste)
    rows = [{"prompt": f"q{i}", "responses": [f"{i} worst [0.0]", f"{i} good [0.75]", f"{i} best [1.0]"]}
            for i in range(10)]  # fmt: skip
    run, _ = import_and_judge(
        tmp_path,
        rows,
        server.url,
        **{"judge.panel": ["helpful", "quality"], "pairs.human_fraction": 0.0, "pairs.max_tie_drop_fraction": share},
    )
    pairs = run.pairs()
    assert pairs.height == 20
    kept = pairs.filter(pl.col("route") == "judge")
    assert kept["prompt_id"].n_unique() == kept.height == 8
    assert all(max(p, 1 - p) == pytest.approx(0.9) for p in kept["prob_a"])


def test_a_panel_averages_probabilities_and_ignores_a_judge_without_verdicts(serve: Serve, tmp_path: Path) -> None:
    """A judge with weight 3 outweighs a dissenting one with weight 1. A third one's replies are
    unparsable."""

    def judge_preferring(p_first_better: float) -> Any:
        def answer(body: dict[str, Any]) -> Any:
            first, second = fenced_parts(body)[-2:]
            p = p_first_better if goodness(first) > goodness(second) else 1 - p_first_better
            return with_probabilities({"A": p, "B": 1 - p})

        return answer

    correct, wrong, broken = (serve(judge_preferring(0.9)), serve(judge_preferring(0.2)), serve(lambda body: ["?"]))
    rows = [{"prompt": "q", "responses": ["good [0.9]", "bad [0.1]"]}]
    config = "".join(
        f'[[panel]]\nname = "helpful"\nmodel = "{name}"\nbase_url = ["{server.url}"]\nweight = {weight}\n'
        for name, server, weight in (("m", correct, 3.0), ("n", wrong, 1.0), ("o", broken, 5.0))
    )
    for server, name in ((correct, "m"), (wrong, "n"), (broken, "o")):
        server.models = (name,)
    (tmp_path / "run").mkdir(parents=True)
    (tmp_path / "run" / "rlaif.toml").write_text(config)
    run = Run(tmp_path / "run")
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = load(run.path, {"client.max_failures": 2})
    with ModelBackends(run.log, settings.client, lambda line: None) as backends:
        api.import_completions(run, settings, str(source), QuietReporter())
        api.judge(run, settings, QuietReporter(), backends)
    row = run.pairs().row(0, named=True)
    p = row["prob_a"] if row["response_a"].startswith("good") else 1 - row["prob_a"]
    assert p == pytest.approx((3 * 0.9 + 1 * 0.2) / 4)


# Interrupted


def count_prompts(requests: list[dict[str, Any]]) -> Counter[str]:
    return Counter(repr(body["messages"]) for body in requests)


def start_command(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read_dataset(run: Path) -> list[dict[str, Any]]:
    frames = [pl.read_parquet(run / "dataset" / f"{name}.parquet") for name in ("train", "test")]
    return sorted(pl.concat(frames).to_dicts(), key=lambda row: str(row["pair_id"]))


def test_kill_dash_nine_in_generate_and_judge_does_not_change_the_dataset(
    serve: Serve, tmp_path: Path, rlaif: Cli
) -> None:
    """After kills and restarts the dataset equals that of an uninterrupted run. Only requests in flight repeat."""

    def answer(body: dict[str, Any]) -> Any:
        if "structured_outputs" in body:
            return judge_by(goodness)(body)
        question = body["messages"][-1]["content"]
        return [f"{question} {body['seed'] + i} [{(body['seed'] + i) % 11 / 10}]" for i in range(body.get("n", 1))]

    concurrency = 8
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(150)])

    def arguments(run: Path, url: str) -> tuple[list[str | Path], list[str | Path]]:
        common: list[str | Path] = ["--model", "m", "--base-url", url, "--concurrency", str(concurrency)]
        return (["generate", run, "--prompts", source, "-n", "3", *common],
                ["judge", run, "--judge", "helpful", *common])  # fmt: skip

    clean = serve(answer)
    generate, judging = arguments(tmp_path / "clean", clean.url)
    rlaif(*generate)
    rlaif(*judging)

    disturbed = serve(answer, delay_s=0.02)
    generate, judging = arguments(tmp_path / "disturbed", disturbed.url)
    kills = 0
    for stage_arguments in (generate, judging):
        for _ in range(3):
            before = len(disturbed.requests)
            process = start_command(*stage_arguments)
            while len(disturbed.requests) < before + 30 and process.poll() is None:
                time.sleep(0.005)
            if process.poll() is None:
                process.kill()
                kills += 1
            process.wait()
        rlaif(*stage_arguments)
    assert kills >= 4
    assert read_dataset(tmp_path / "disturbed") == read_dataset(tmp_path / "clean")
    assert len(read_dataset(tmp_path / "clean")) > 50
    for name in ("prompts", "completions", "verdicts"):
        lines = [read_jsonl(tmp_path / side / "journal" / f"{name}.jsonl") for side in ("clean", "disturbed")]
        assert sorted(line["key"] for line in lines[0]) == sorted(line["key"] for line in lines[1])
    repeated = count_prompts(disturbed.requests) - count_prompts(clean.requests)
    assert repeated.total() <= kills * concurrency


def test_an_interrupt_keeps_the_requests_in_flight(serve: Serve, tmp_path: Path) -> None:
    """Ctrl-C stops new requests, those in flight are journaled, the exit code is 130, and the next start resumes."""
    server = serve(delay_s=0.3)
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(100)])
    run = tmp_path / "run"
    arguments = ("generate", run, "--prompts", source, "-n", "1", "--model", "m", "--base-url", server.url,
                 "--concurrency", "4")  # fmt: skip
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    while len(server.requests) < 6:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Rerun the same command to resume" in stderr
    assert "Traceback" not in stderr
    completions = read_jsonl(run / "journal" / "completions.jsonl")
    assert len(completions) == len(server.requests) < 100
    subprocess.run(command(*arguments), check=True, capture_output=True)
    expected_answers = sum(line["split"] == "train" for line in read_jsonl(run / "journal" / "prompts.jsonl"))
    assert len(read_jsonl(run / "journal" / "completions.jsonl")) == len(server.requests) == expected_answers


def test_transient_faults_do_not_change_labels(serve: Serve, tmp_path: Path) -> None:
    """A third of the requests fail once, in different ways; the labels equal those of a server without faults."""
    attempts: Counter[str] = Counter()
    faults = [Fault(429, {"retry-after": "0"}), Fault(500), Fault(0), Fault(200, body=b"not json"),
              Fault(200, body=b'{"choices": []}'), Fault(503)]  # fmt: skip

    def faulty(body: dict[str, Any]) -> Any:
        key = repr(body["messages"])
        attempts[key] += 1
        fault_index = sum(key.encode()) % 18
        return faults[fault_index] if fault_index < len(faults) and attempts[key] == 1 else judge_by(goodness)(body)

    rows = [{"prompt": f"q{i}", "responses": [f"one {i} [0.{i % 9}]", f"two {i} [0.{(i * 7) % 9}]"]} for i in range(60)]
    clean, _ = import_and_judge(tmp_path / "clean", rows, serve(judge_by(goodness)).url)
    disturbed, judge_result = import_and_judge(tmp_path / "disturbed", rows, serve(faulty).url)
    assert judge_result.usage.retries > 10
    assert labels_by_text(clean) == labels_by_text(disturbed)


# Settings that change


def test_other_judges_are_rejected_without_restart(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    server = serve(judge_by(goodness), models=("m", "other"))
    run = tmp_path / "run"
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "responses": ["a [0.1]", "b [0.9]"]}])
    rlaif("generate", run, "--import", source)
    common = ("judge", run, "--judge", "helpful", "--base-url", server.url)
    rlaif(*common, "--model", "m")
    result = rlaif(*common, "--model", "other", code=2)
    assert "[['helpful', 'm', 1.0]], now [['helpful', 'other', 1.0]]" in result.stderr
    assert "--restart" in result.stderr
    rlaif(*common, "--model", "other", "--restart")
    models = {line["model"] for line in read_jsonl(run / "journal" / "verdicts.jsonl")}
    assert models == {"m", "other", ""}  # "": the text classifier of refusals


def test_the_same_seed_gives_the_same_queue(serve: Serve, tmp_path: Path) -> None:
    server = serve(judge_by(goodness))
    rows = [
        {"prompt": f"q{i}", "responses": [f"one {i} [0.{i % 9}]", f"two {i} [0.{(i * 7) % 9}]"]} for i in range(200)
    ]
    queues = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        run, _ = import_and_judge(tmp_path / name, rows, server.url, seed=seed)
        queue = run.pairs().filter(pl.col("route").is_in(["audit", "targeted"]))
        assert queue["route_reason"].is_not_null().all()
        assert queue.filter(pl.col("route") == "audit")["inclusion_probability"].is_between(0, 1, closed="right").all()
        queues.append(queue.select("pair_id", "route").sort("pair_id").rows())
    assert queues[0] == queues[1] != queues[2]


def test_a_dry_run_sends_and_writes_nothing(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    server = serve()
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(10)])
    run = tmp_path / "run"
    arguments = (
        "generate",
        run,
        "--prompts",
        source,
        "-n",
        "2",
        "--heldout-fraction",
        "0",
        "--model",
        "m",
        "--base-url",
        server.url,
    )
    result = rlaif(*arguments, "--dry-run")
    assert "10 calls" in result.stderr
    assert "No requests were sent" in result.stderr
    assert '"prompt number 0"' in result.stdout
    assert server.requests == []
    assert not run.exists()
    rlaif(*arguments)
    assert "nothing is pending" in rlaif(*arguments, "--dry-run").stderr
    judging = ("judge", run, "--judge", "helpful", "--model", "m", "--base-url", server.url, "--dry-run")
    assert "at most 20 calls" in rlaif(*judging).stderr
    assert len(server.requests) == 10


def test_a_second_command_on_a_running_run_is_rejected(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    server = serve(delay_s=2.0)
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"prompt number {i * 7919}"} for i in range(20)])
    run = tmp_path / "run"
    arguments = ("generate", run, "--prompts", source, "--model", "m", "--base-url", server.url, "--concurrency", "1")
    first = start_command(*arguments)
    while not server.requests:
        time.sleep(0.01)
    result = rlaif(*arguments, code=1)
    assert f"locked by process {first.pid}" in result.stderr
    assert f"{run} (being written now)" in rlaif("status", run).stdout
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert "(being written now)" not in rlaif("status", run).stdout


def test_turns_tools_tags_and_models_reach_the_dataset(serve: Serve, tmp_path: Path) -> None:
    """A system turn is part of the prompt; tool schemas and tool calls are unchanged."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]
    rows = [
        {"id": "with-tools", "prompt": turns, "tools": tools, "tags": ["tool-use"], "models": ["large", "small"],
         "responses": ["Sunny [0.9]", "No [0.1]"]},
        {"prompt": "plain", "responses": ["Yes [0.8]", "Hm [0.2]"]},
    ]  # fmt: skip
    server = serve(judge_by(goodness))
    run, _ = import_and_judge(tmp_path, rows, server.url, **{"pairs.human_fraction": 0.0, "pairs.test_fraction": 0.0})
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=str(run.dataset / "train.parquet"), split="train",
                                   cache_dir=str(tmp_path / "cache"))  # fmt: skip
    rows_by_prompt = {row["prompt_id"]: row for row in loaded}
    row = rows_by_prompt.pop("with-tools")
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user", "assistant", "tool"]
    assert row["prompt"][2]["tool_calls"] == [call]
    assert row["prompt"][3]["tool_call_id"] == "c1"
    assert json.loads(row["tools"]) == tools
    assert row["chosen"] == [{"role": "assistant", "content": "Sunny [0.9]"}]
    assert (row["chosen_model"], row["rejected_model"], row["tags"]) == ("large", "small", ["tool-use"])
    (plain,) = rows_by_prompt.values()
    assert plain["tools"] is None
    assert [(turn["role"], turn["content"]) for turn in plain["prompt"]] == [("user", "plain")]


def test_a_new_seed_applies_to_training_but_not_to_the_dataset(
    tmp_path: Path, rlaif: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed from a flag, the environment or a file applies to training and evaluation, else they use the seed of
    judging. The review queue and the test split always depend on the seed of judging."""
    run = Run(tmp_path / "run")
    rlaif("init", run.path)
    run.update_manifest("judge", config=Config(seed=5).model_dump(mode="json"))
    run.pairs_path.parent.mkdir()
    run.pairs_path.touch()

    def seeds(**flags: Any) -> tuple[int, int]:
        return (
            config_as_judged(*open_run_with_config(run.path, flags)).seed,
            config_as_judged(*open_run_with_config(run.path, flags), keep_seed=True).seed,
        )

    assert seeds() == (5, 5)
    assert seeds(seed=0) == (5, 0)
    monkeypatch.setenv("RLAIF_SEED", "7")
    assert seeds() == (5, 7)
    monkeypatch.delenv("RLAIF_SEED")
    file = run.path / "rlaif.toml"
    file.write_text(file.read_text().replace("# seed = 0", "seed = 8"))
    assert seeds() == (5, 8)

    used_seeds: dict[str, int] = {}
    result = SimpleNamespace(pairs=1, steps=1, seconds=1.0, paths=dict)

    def record_seed(stage: str, config: Config) -> Any:
        used_seeds[stage] = config.seed
        return result if stage == "train" else SimpleNamespace(stopped=None, warnings=[], as_json=dict)

    monkeypatch.setattr(train, "print_next_step", lambda run: None)
    monkeypatch.setattr(stages, "rebuild_dataset", lambda run, config: record_seed("rebuild_dataset", config))
    monkeypatch.setattr(trainer, "train", lambda run, config, log: record_seed("train", config))
    monkeypatch.setattr(api, "evaluate", lambda run, config, reporter, backends: record_seed("evaluate", config))
    train.train(run.path, seed=9)
    evaluate.evaluate(run.path, seed=10, json=True)
    assert used_seeds == {"rebuild_dataset": 5, "train": 9, "evaluate": 10}


def test_tool_calls_of_every_form_reach_the_dataset(serve: Serve, tmp_path: Path) -> None:
    """Arguments may be an object or a list, and a call may be the function itself."""
    tool_calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        {"id": {"n": 2}, "function": {"name": "weather", "arguments": ["Oslo"]}},
        {"name": "weather", "arguments": {"city": "Bern"}},
    ]
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": tool_calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]
    server = serve(judge_by(goodness))
    rows = [{"prompt": turns, "responses": ["Sunny [0.9]", "No [0.1]"]}]
    run, _ = import_and_judge(tmp_path, rows, server.url, **{"pairs.human_fraction": 0.0, "pairs.test_fraction": 0.0})
    calls = pl.read_parquet(run.dataset / "train.parquet")["prompt"].to_list()[0][1]["tool_calls"]
    assert calls == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
        {"id": '{"n":2}', "type": None, "function": {"name": "weather", "arguments": '["Oslo"]'}},
        {"id": None, "type": None, "function": {"name": "weather", "arguments": '{"city":"Bern"}'}},
    ]
