"""benchmarks.labels, on pairs whose figures can be computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import labels
from benchmarks.pairs import load_pairs
from rlaif.errors import InputError, UsageError
from tests.conftest import write_jsonl
from tests.fake_server import ScriptedServer


def rows(n: int) -> list[dict[str, Any]]:
    """Return n lines. One in 20 is a tie by human label.

    Of ten, the judge is right on 7, wrong on 1, contradicts itself on 1 and has no verdict on 1.
    """
    lines = []
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
        lines.append({"prompt": f"question {i}", "responses": [f"one {i}", f"two {i}"], "human": people,
                      "verdicts": {"m/plain": verdict, "m/copy": best}})  # fmt: skip
    return lines


def test_stored_verdicts_run_through_the_real_pipeline(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "pairs.jsonl", [*rows(120), rows(1)[0]])  # the last is a duplicate
    pairs = load_pairs(source)
    assert len(pairs) == 120
    with ScriptedServer(labels.replay(pairs), models=("m/plain", "m/copy")) as server:
        trial = labels.PanelTrial(tmp_path, pairs, ["m/plain"], server.url)
        report = labels.measure_rules(trial, seeds=1)
    n = 120 - 6 - 12  # without human ties and missing verdicts
    assert report["n"] == n
    expected = 84 - 6 + 12 / 2
    assert report["judges"].value == pytest.approx(expected / n)
    assert report["random"].value == pytest.approx(expected / n + 0.1 * (1 - expected / n))
    assert report["unsure"].value == pytest.approx((expected + 0.1 * n / 2) / n)
    assert report["rlaif"].value > report["random"].value
    assert report["rlaif-10"].value > report["judges"].value
    assert 0.88 <= report["kept"] < 1.0
    assert labels.default_panels(pairs)["best (m/copy)"] == ["m/copy"]


def test_every_form_of_a_verdict_is_replayed(tmp_path: Path) -> None:
    line = {
        "instruction": "add",
        "input": "1 + 1",
        "responses": ["2", "3"],
        "label": 1,
        "verdicts": {"m": 0.8, "t": "tie"},
    }
    (pair,) = load_pairs(write_jsonl(tmp_path / "one.jsonl", [line, line | {"responses": ["2", " 2"]}]))
    assert (pair.prompt, pair.best) == ("add\n\n1 + 1", 1)
    answer = labels.replay([pair])

    def reply_of(model: str, first: str, second: str) -> str:
        fenced = "\n".join(f"<<<{'0' * 12}\n{text}\n{'0' * 12}>>>" for text in (pair.prompt, first, second))
        body = {"model": model, "messages": [{"content": fenced}], "structured_outputs": {"choice": ["A", "B"]}}
        return json.dumps(answer(body))

    assert '"content": "A"' in reply_of("m", "2", "3")
    assert '"content": "B"' in reply_of("m", "3", "2")
    assert reply_of("t", "2", "3").count("-0.69") >= 2
    assert reply_of("unknown", "2", "3") == '["I would rather not say."]'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "a human label must be 1, 2"),
        ({"label": None}, "a human label must be 1, 2"),
        ({"responses": ["one"]}, "responses must be two texts"),
        ({"verdicts": {"m": {"ab": "first"}}}, "a verdict must be 1, 2"),
        ({"prompt": " "}, "the prompt is empty"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    line = {"prompt": "add", "responses": ["2", "3"], "label": 1, "verdicts": {"m": 1}}
    with pytest.raises(InputError) as caught:
        load_pairs(write_jsonl(tmp_path / "file.jsonl", [line, line | change]))
    assert caught.value.location == f"{tmp_path / 'file.jsonl'}:2"
    assert message in caught.value.message


def test_an_answer_stored_as_a_value_is_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Is it so?", "responses": [True, "No."], "label": 1, "verdicts": {}}))
    assert [pair.responses for pair in load_pairs(path)] == [("True", "No.")]


def test_a_verdict_in_one_order_is_copied_and_a_missing_one_is_not(tmp_path: Path) -> None:
    lines = [{"prompt": str(i), "responses": ["2", "3"], "label": 1, "verdicts": {"once": {"ab": "1"}, "twice": twice}}
             for i, twice in enumerate([{"ab": 1, "ba": 2}, {"ab": 1, "ba": None}])]  # fmt: skip
    pairs = load_pairs(write_jsonl(tmp_path / "file.jsonl", lines))
    assert [pair.verdicts["once"] for pair in pairs] == [{"ab": 1.0, "ba": 1.0}] * 2
    assert [pair.verdicts["twice"] for pair in pairs] == [{"ab": 1.0, "ba": 0.0}, {"ab": 1.0, "ba": None}]


def test_five_pairs_without_review_have_figures_and_an_unknown_judge_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels.run_dataset("few", load_pairs(write_jsonl(tmp_path / "few.jsonl", rows(5))), {"one": ["m/copy"]}, 1)
    assert "| one | 4 | 1.000" in capsys.readouterr().out
    with pytest.raises(UsageError, match="'m/cpy'"):
        labels.run_dataset("few", load_pairs(tmp_path / "few.jsonl"), {"one": ["m/cpy"]}, 1)
