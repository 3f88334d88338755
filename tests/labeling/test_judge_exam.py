"""``judges exam``: a good judge passes; four bad judges fail with their problem named, and are then rejected."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif import resources
from rlaif.judge import injection
from tests.conftest import read_jsonl, write_jsonl
from tests.fake_judge import fenced_parts, judge_by, verdict_words
from tests.fake_server import Fault, ScriptedServer, with_probabilities

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]
Answer = Callable[[dict[str, Any]], Any]

HELPFUL = read_jsonl(resources.judges()["helpful"] / "gold.jsonl")
QUALITY = read_jsonl(resources.judges()["quality"] / "gold.jsonl")
RIGHT = {row["responses"][row["label"] - 1] for row in [*HELPFUL, *QUALITY]}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test an exam cache of its own."""
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))


def comparing_judge(better: Callable[[str, str], float]) -> Answer:
    def answer(body: dict[str, Any]) -> Any:
        p = better(*fenced_parts(body)[-2:])
        return with_probabilities({"A": p, "B": 1 - p})

    return answer


def is_right(text: str) -> bool:
    return text in RIGHT


def good_judge(first: str, second: str) -> float:
    return 0.5 if is_right(first) == is_right(second) else 0.9 if is_right(first) else 0.1


def prefers_longer(first: str, second: str) -> float:
    return 0.95 if len(first) > len(second) else 0.05


def persuaded_by_injection(first: str, second: str) -> float:
    injected = injection.addresses_judge(first), injection.addresses_judge(second)
    return good_judge(first, second) if injected[0] == injected[1] else 0.95 if injected[0] else 0.05


def run_exam(rlaif: Cli, url: str, *more: Any, judge: str = "helpful", code: int = 0) -> dict[str, Any]:
    done = rlaif("judges", "exam", judge, "--model", "m", "--base-url", url, "--json", *more, code=code)
    return dict(json.loads(done.stdout))


def run_judge(rlaif: Cli, tmp_path: Path, url: str, *more: Any, code: int = 0) -> str:
    rows = [{"prompt": f"Question {i}", "responses": ["a short one", "a much longer one"]} for i in range(2)]
    run = tmp_path / "run"
    rlaif("generate", run, "--import", write_jsonl(tmp_path / "rows.jsonl", rows))
    return rlaif("judge", run, "--judge", "helpful", "--model", "m", "--base-url", url, *more, code=code).stderr


def test_a_good_judge_passes_and_repeating_the_exam_sends_nothing(serve: Serve, rlaif: Cli, tmp_path: Path) -> None:
    server = serve(comparing_judge(good_judge))
    report = run_exam(rlaif, server.url)
    assert (report["status"], report["problems"], report["n"]) == ("good", [], 46)
    figures = report["metrics"]
    for name in ("accuracy", "accuracy_first_order", "accuracy_swapped_order", "swap_consistency"):
        assert figures[name]["value"] == 1.0, name
        assert 0.9 < figures[name]["low"] < 1.0
    assert figures["first_position_rate"]["value"] == 0.5
    assert figures["always_longest_accuracy"]["value"] == figures["longer_correct_rate"]["value"]
    assert figures["longer_chosen_rate"]["value"] == figures["longer_correct_rate"]["value"]
    # Its confidence is 0.9, its accuracy 1.
    assert figures["expected_calibration_error"]["value"] == pytest.approx(0.1, abs=1e-3)
    assert report["reliability"] == [
        {"from": 0.9, "to": 0.95, "confidence": pytest.approx(0.9), "accuracy": figures["accuracy"]}
    ]
    assert figures["injection_success_rate"] == {
        "value": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.161, abs=1e-3),
        "n": 20,
    }
    assert figures["unparsable_rate"]["value"] == 0.0
    assert figures["unparsable_rate"]["n"] == len(server.requests) == 2 * (46 + 20)
    repeated = run_exam(rlaif, server.url)
    assert repeated == report
    assert len(server.requests) == 2 * (46 + 20)
    assert "no exam" not in run_judge(rlaif, tmp_path, server.url)


def test_the_terminal_shows_every_metric_with_n_and_a_plot(serve: Serve, rlaif: Cli) -> None:
    done = rlaif(
        "judges", "exam", "helpful", "-m", "m", "--base-url", serve(comparing_judge(good_judge)).url, "--limit", "20"
    )
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(r"accuracy +1\.000 \[0\.\d{3}, 1\.000\] +n = 20", line) for line in lines), done.stdout
    assert any("|" in line and "o" in line and "(n = 20)" in line for line in lines)
    assert not any("_" in line for line in lines)  # every metric has a readable name
    assert any(line.startswith("prompt tokens per 1,000") for line in lines)
    assert lines[-1] == "better than always choosing the longer answer"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (comparing_judge(lambda first, second: 0.97), "favors one position"),
        (comparing_judge(prefers_longer), "prefers longer answers"),
        (lambda body: ["The answers both have their merits."], "gives unparsable replies"),
        (comparing_judge(persuaded_by_injection), "follows instructions in the answers"),
    ],
)
def test_a_bad_judge_fails_with_its_problem_and_is_not_asked(
    answer: Answer, problem: str, serve: Serve, rlaif: Cli, tmp_path: Path
) -> None:
    server = serve(answer)
    report = run_exam(rlaif, server.url)
    assert report["problems"] == [problem]
    assert report["status"] == "bad"
    request_count = len(server.requests)
    stderr = run_judge(rlaif, tmp_path, server.url, code=2)
    assert f"helpful@m failed its exam: {problem}" in stderr
    assert "--allow-failed-exam" in stderr
    assert len(server.requests) == request_count
    stderr = run_judge(rlaif, tmp_path, server.url, "--allow-failed-exam", "--max-failures", "99")
    assert f"failed its exam ({problem}) and is used anyway" in stderr
    exams = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["judge"]["exams"]
    assert [(row["judge"], row["status"]) for row in exams] == [("helpful@m", "bad")]


def test_a_judge_without_an_exam_gets_a_warning(serve: Serve, rlaif: Cli, tmp_path: Path) -> None:
    stderr = run_judge(rlaif, tmp_path, serve(comparing_judge(good_judge)).url)
    assert "warning: helpful@m has no exam" in stderr
    assert "rlaif judges exam helpful --model m" in stderr


def test_an_exam_with_failed_requests_is_not_stored_and_resumes(serve: Serve, rlaif: Cli, tmp_path: Path) -> None:
    count = 0

    def failing(body: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        return Fault(status=400) if count % 3 == 0 else comparing_judge(good_judge)(body)

    broken = serve(failing)
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", broken.url, "--limit", "12", code=3)
    assert "the exam is incomplete" in done.stderr
    assert not list((tmp_path / "cache").rglob("exam.json"))
    working = serve(comparing_judge(good_judge))
    report = run_exam(rlaif, working.url, "--limit", "12")
    assert report["n"] == 12
    assert len(working.requests) == len(broken.requests) // 3


def test_a_dry_run_counts_the_requests_of_an_exam(serve: Serve, rlaif: Cli) -> None:
    server = serve(comparing_judge(good_judge))
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", server.url, "--dry-run")
    assert f"{2 * (46 + 20)} calls" in done.stderr
    assert json.loads(done.stdout)["messages"]
    assert server.requests == []


def test_the_exam_of_a_rating_judge_compares_its_scores(serve: Serve, rlaif: Cli) -> None:
    server = serve(judge_by(lambda text: 0.9 if is_right(text) else 0.2))
    report = run_exam(rlaif, server.url, judge="quality")
    assert (report["status"], report["n"]) == ("good", 48)
    assert report["metrics"]["accuracy"]["value"] == 1.0
    assert "swap_consistency" not in report["metrics"]
    assert report["metrics"]["unparsable_rate"]["n"] == len(server.requests)


def test_the_exam_of_a_classifying_judge_compares_labels(serve: Serve, rlaif: Cli) -> None:
    rows = read_jsonl(resources.judges()["refusal"] / "gold.jsonl")
    right = {row["response"]: row["label"].title() for row in rows}

    def answer(body: dict[str, Any]) -> Any:
        assert verdict_words(body) == ["Refuse", "Partial", "Comply"]
        return with_probabilities({right[fenced_parts(body)[-1]][0]: 0.8, "X": 0.2})

    report = run_exam(rlaif, serve(answer).url, judge="refusal")
    assert report["metrics"]["accuracy"]["value"] == report["metrics"]["refusal_f1"]["value"] == 1.0
    assert report["status"] == "good"
    always = rlaif("judges", "exam", "refusal", "-m", "n", "--base-url",
                   serve(lambda body: with_probabilities({"C": 1.0}), models=("n",)).url)  # fmt: skip
    assert "not better than always choosing the most common label: do not use its labels" in always.stdout


def test_gold_may_have_further_fields_and_invalid_gold_is_an_error(serve: Serve, rlaif: Cli, tmp_path: Path) -> None:
    url = serve(comparing_judge(good_judge)).url
    rows = [{**row, "subset": "natural", "verdicts": {"x": 1}} for row in HELPFUL[:10]]
    assert run_exam(rlaif, url, "--gold", write_jsonl(tmp_path / "g.jsonl", rows))["n"] == 10
    rows[3]["label"] = 3
    bad = write_jsonl(tmp_path / "g.jsonl", rows)
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", url, "--gold", bad, code=2)
    assert f"{bad}:4: invalid gold row for a judge of kind 'compare': label:" in done.stderr
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", url, "--gold", tmp_path / "nope.jsonl", code=2)
    assert f"{tmp_path / 'nope.jsonl'}: gold file cannot be read: No such file or directory" in done.stderr


def test_the_exam_of_the_checks_needs_no_model(rlaif: Cli, tmp_path: Path) -> None:
    check = [{"kind": "regex", "pattern": ",", "match": False}]
    rows = [{"prompt": f"No comma, {i}", "responses": ["a, b", f"a b {i}"], "label": 2, "checks": check}
            for i in range(12)]  # fmt: skip
    done = rlaif("judges", "exam", "check", "--gold", write_jsonl(tmp_path / "g.jsonl", rows), "--json")
    assert json.loads(done.stdout)["metrics"]["accuracy"]["value"] == 1.0
