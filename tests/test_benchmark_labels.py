"""The benchmark of labels measures what it says, on pairs whose figures can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import labels
from tests.conftest import write_jsonl
from tests.scripted import ScriptedServer


def rows(n: int) -> list[dict[str, Any]]:
    """The judge is right and consistent on 7 of 10, consistently wrong on 1, contradicts itself on 1 and is silent on
    1 of them; one in 20 is a tie for people."""
    found = []
    for i in range(n):
        best = 1 + i % 2
        other = 3 - best
        verdict: dict[str, Any] = {"ab": best, "ba": best}
        if i % 10 == 7:
            verdict = {"ab": other, "ba": other}
        if i % 10 == 8:
            verdict = {"ab": 1, "ba": 2}
        if i % 10 == 9:
            verdict = {"ab": None, "ba": best}
        people: list[Any] = ["tie", "tie", 1] if i % 20 == 0 else [best, best, "tie"]
        found.append({"prompt": f"question {i}", "responses": [f"one {i}", f"two {i}"], "human": people,
                      "verdicts": {"m/plain": verdict, "m/copy": best}})  # fmt: skip
    return found


def test_stored_verdicts_go_through_the_real_pipeline(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", [*rows(120), rows(1)[0]])  # the last is a repetition
    pairs = labels.pairs_of(source)
    assert len(pairs) == 120
    with ScriptedServer(labels.replay(pairs), models=("m/plain", "m/copy")) as server:
        trial = labels.Trial(tmp_path, pairs, ["m/plain"], server.url)
        found = labels.report(trial, seeds=1)
    n = 120 - 6 - 12  # less people's ties and unreadable verdicts
    assert found["n"] == n
    right = 84 - 6 + 12 / 2
    assert found["judges"].value == pytest.approx(right / n)
    assert found["random"].value == pytest.approx(right / n + 0.1 * (1 - right / n))
    assert found["unsure"].value == pytest.approx((right + 0.1 * n / 2) / n)
    assert found["rlaif"].value > found["random"].value
    assert found["rlaif-10"].value > found["judges"].value
    assert 0.88 <= found["kept"] < 1.0
    assert labels.seats_of(pairs)["best (m/copy)"] == ["m/copy"]


def test_every_form_of_a_verdict_is_replayed(tmp_path: Path) -> None:
    line = {
        "instruction": "add",
        "input": "1 + 1",
        "responses": ["2", "3"],
        "label": 1,
        "verdicts": {"m": 0.8, "t": "tie"},
    }
    (pair,) = labels.pairs_of(write_jsonl(tmp_path / "one.jsonl", [line, line | {"responses": ["2", " 2"]}]))
    assert (pair.prompt, pair.best) == ("add\n\n1 + 1", 1)
    answer = labels.replay([pair])

    def said(model: str, first: str, second: str) -> str:
        fenced = "\n".join(f"<<<{'0' * 12}\n{text}\n{'0' * 12}>>>" for text in (pair.prompt, first, second))
        body = {"model": model, "messages": [{"content": fenced}], "structured_outputs": {"choice": ["A", "B"]}}
        return json.dumps(answer(body))

    assert '"content": "A"' in said("m", "2", "3")
    assert '"content": "B"' in said("m", "3", "2")
    assert said("t", "2", "3").count("-0.69") >= 2
    assert said("nobody", "2", "3") == '["I would rather not say."]'
