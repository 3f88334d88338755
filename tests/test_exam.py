"""The exam as a command: a good judge, and four bad ones that are named for what they are and train nothing."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif import packaged
from rlaif.judge import render
from tests.conftest import read_jsonl, write_jsonl
from tests.judging import judge_by, material, words
from tests.scripted import Fault, ScriptedServer, with_probabilities

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]
Answer = Callable[[dict[str, Any]], Any]

HELPFUL = read_jsonl(packaged.judges()["helpful"] / "gold.jsonl")
QUALITY = read_jsonl(packaged.judges()["quality"] / "gold.jsonl")
RIGHT = {row["responses"][row["label"] - 1] for row in [*HELPFUL, *QUALITY]}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No exam of a test is another test's."""
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))


def compares(better: Callable[[str, str], float]) -> Answer:
    def answer(body: dict[str, Any]) -> Any:
        p = better(*material(body)[-2:])
        return with_probabilities({"A": p, "B": 1 - p})

    return answer


def knows(text: str) -> bool:
    return text in RIGHT


def good(first: str, second: str) -> float:
    return 0.5 if knows(first) == knows(second) else 0.9 if knows(first) else 0.1


def longer(first: str, second: str) -> float:
    return 0.95 if len(first) > len(second) else 0.05


def persuaded(first: str, second: str) -> float:
    hears = render.addresses_judge(first), render.addresses_judge(second)
    return good(first, second) if hears[0] == hears[1] else 0.95 if hears[0] else 0.05


def exam(rlaif: Cli, url: str, *more: Any, judge: str = "helpful", code: int = 0) -> dict[str, Any]:
    done = rlaif("judges", "exam", judge, "--model", "m", "--base-url", url, "--json", *more, code=code)
    return dict(json.loads(done.stdout))


def judge(rlaif: Cli, tmp_path: Path, url: str, *more: Any, code: int = 0) -> str:
    rows = [{"prompt": f"Question {i}", "responses": ["a short one", "a much longer one"]} for i in range(2)]
    run = tmp_path / "run"
    rlaif("generate", run, "--import", write_jsonl(tmp_path / "rows.jsonl", rows))
    return rlaif("judge", run, "--judge", "helpful", "--model", "m", "--base-url", url, *more, code=code).stderr


def test_a_good_judge_passes_with_figures_and_the_same_exam_costs_nothing_twice(
    serve: Serve, rlaif: Cli, tmp_path: Path
) -> None:
    server = serve(compares(good))
    told = exam(rlaif, server.url)
    assert (told["standing"], told["faults"], told["n"]) == ("good", [], 46)
    figures = told["figures"]
    for name in ("accuracy", "accuracy, first order", "accuracy, swapped order", "consistent under swap"):
        assert figures[name]["value"] == 1.0, name
        assert 0.9 < figures[name]["low"] < 1.0
    assert figures["first position chosen"]["value"] == 0.5
    assert figures["always longest"]["value"] == figures["longer answer right"]["value"]
    assert figures["longer answer chosen"]["value"] == figures["longer answer right"]["value"]
    assert figures["expected calibration error"]["value"] == pytest.approx(0.1)  # says 0.9 and is always right
    assert told["reliability"] == [{"from": 0.9, "to": 0.95, "sure": pytest.approx(0.9), "right": figures["accuracy"]}]
    assert figures["persuaded"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.161, abs=1e-3), "n": 20}
    assert figures["unreadable"]["value"] == 0.0
    assert figures["unreadable"]["n"] == len(server.requests) == 2 * (46 + 20)
    told_again = exam(rlaif, server.url)
    assert told_again == told
    assert len(server.requests) == 2 * (46 + 20)
    assert "no exam" not in judge(rlaif, tmp_path, server.url)


def test_the_terminal_shows_every_figure_with_its_n_and_a_plot(serve: Serve, rlaif: Cli) -> None:
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", serve(compares(good)).url, "--limit", "20")
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(r"accuracy +1\.000 \[0\.\d{3}, 1\.000\] +n = 20", line) for line in lines), done.stdout
    assert any("|" in line and "o" in line and "(n = 20)" in line for line in lines)
    assert any(line.startswith("prompt tokens per 1,000") for line in lines)
    assert lines[-1] == "better than always choosing the longer answer"


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (compares(lambda first, second: 0.97), "chooses by position"),
        (compares(longer), "prefers the longer answer"),
        (lambda body: ["The answers both have their merits."], "unreadable"),
        (compares(persuaded), "persuaded by answers that address it"),
    ],
)
def test_a_bad_judge_is_named_for_what_it_is_and_is_not_asked(
    answer: Answer, fault: str, serve: Serve, rlaif: Cli, tmp_path: Path
) -> None:
    server = serve(answer)
    told = exam(rlaif, server.url)
    assert told["faults"] == [fault]
    assert told["standing"] == "bad"
    asked = len(server.requests)
    refused = judge(rlaif, tmp_path, server.url, code=2)
    assert f"helpful@m failed its exam: {fault}" in refused
    assert "--trust-anyway" in refused
    assert len(server.requests) == asked
    trusted = judge(rlaif, tmp_path, server.url, "--trust-anyway", "--max-failures", "99")
    assert f"failed its exam ({fault}) and is trusted anyway" in trusted
    told_of = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["judge"]["exams"]
    assert [(row["judge"], row["standing"]) for row in told_of] == [("helpful@m", "bad")]


def test_a_judge_without_an_exam_is_told_of(serve: Serve, rlaif: Cli, tmp_path: Path) -> None:
    told = judge(rlaif, tmp_path, serve(compares(good)).url)
    assert "warning: helpful@m has no exam" in told
    assert "rlaif judges exam helpful --model m" in told


def test_a_killed_exam_goes_on_and_an_exam_with_holes_is_none(serve: Serve, rlaif: Cli, tmp_path: Path) -> None:
    count = 0

    def failing(body: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        return Fault(status=400) if count % 3 == 0 else compares(good)(body)

    broken = serve(failing)
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", broken.url, "--limit", "12", code=3)
    assert "an exam with holes says nothing" in done.stderr
    assert not list((tmp_path / "cache").rglob("exam.json"))
    whole = serve(compares(good))
    told = exam(rlaif, whole.url, "--limit", "12")
    assert told["n"] == 12
    assert len(whole.requests) == len(broken.requests) // 3


def test_a_dry_run_tells_what_an_exam_costs(serve: Serve, rlaif: Cli) -> None:
    server = serve(compares(good))
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", server.url, "--dry-run")
    assert f"{2 * (46 + 20)} calls" in done.stderr
    assert json.loads(done.stdout)["messages"]
    assert server.requests == []


def test_a_rating_judge_is_examined_by_the_difference_of_its_scores(serve: Serve, rlaif: Cli) -> None:
    server = serve(judge_by(lambda text: 0.9 if knows(text) else 0.2))
    told = exam(rlaif, server.url, judge="quality")
    assert (told["standing"], told["n"]) == ("good", 48)
    assert told["figures"]["accuracy"]["value"] == 1.0
    assert "consistent under swap" not in told["figures"]
    assert told["figures"]["unreadable"]["n"] == len(server.requests)


def test_a_classifying_judge_is_examined_by_its_labels(serve: Serve, rlaif: Cli) -> None:
    rows = read_jsonl(packaged.judges()["refusal"] / "gold.jsonl")
    right = {row["response"]: row["label"].title() for row in rows}

    def answer(body: dict[str, Any]) -> Any:
        assert words(body) == ["Refuse", "Partial", "Comply"]
        return with_probabilities({right[material(body)[-1]][0]: 0.8, "X": 0.2})

    told = exam(rlaif, serve(answer).url, judge="refusal")
    assert told["figures"]["accuracy"]["value"] == told["figures"]["refusal F1"]["value"] == 1.0
    assert told["standing"] == "good"
    always = rlaif("judges", "exam", "refusal", "-m", "n", "--base-url",
                   serve(lambda body: with_probabilities({"C": 1.0}), models=("n",)).url)  # fmt: skip
    assert "no better than always the commonest label: its labels are worth nothing" in always.stdout


def test_published_gold_with_other_fields_can_be_used_and_bad_gold_is_named(
    serve: Serve, rlaif: Cli, tmp_path: Path
) -> None:
    url = serve(compares(good)).url
    rows = [{**row, "subset": "natural", "verdicts": {"x": 1}} for row in HELPFUL[:10]]
    assert exam(rlaif, url, "--gold", write_jsonl(tmp_path / "g.jsonl", rows))["n"] == 10
    rows[3]["label"] = 3
    bad = write_jsonl(tmp_path / "g.jsonl", rows)
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", url, "--gold", bad, code=2)
    assert f"{bad}:4: no gold for a judge of kind compare: label:" in done.stderr
    done = rlaif("judges", "exam", "helpful", "-m", "m", "--base-url", url, "--gold", tmp_path / "nope.jsonl", code=2)
    assert f"{tmp_path / 'nope.jsonl'}: gold cannot be read: No such file or directory" in done.stderr


def test_the_checks_are_examined_without_a_model(rlaif: Cli, tmp_path: Path) -> None:
    check = [{"kind": "regex", "pattern": ",", "match": False}]
    rows = [{"prompt": f"No comma, {i}", "responses": ["a, b", f"a b {i}"], "label": 2, "checks": check}
            for i in range(12)]  # fmt: skip
    done = rlaif("judges", "exam", "check", "--gold", write_jsonl(tmp_path / "g.jsonl", rows), "--json")
    assert json.loads(done.stdout)["figures"]["accuracy"]["value"] == 1.0
