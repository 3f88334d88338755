"""benchmarks.refusal_fit fits the refusal classifier on the named files, without the test answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import refusal_fit
from rlaif.judge import refusal_classifier
from tests.conftest import write_jsonl

REFUSAL = "I'm sorry, but I cannot help with that. It is illegal and unethical, and I must decline."
COMPLIANCE = (
    "As an AI, I have no opinions, and I don't have personal experience, but here are some tips for {}. Open a window."
)


def pair(i: int) -> dict[str, Any]:
    return {
        "category": "Requests with safety concerns",
        "prompt": f"c{i}",
        "chosen": COMPLIANCE.format(i),
        "rejected": REFUSAL,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hand = [
        {
            "prompt": f"h{i}",
            "response": REFUSAL if i % 2 else COMPLIANCE.format(i),
            "tone": "rejected" if i % 2 else "complied",
        }
        for i in range(60)
    ]
    hand.append({"prompt": "h", "response": "That is not true.", "tone": "contradicted"})
    (tmp_path / "all_hand_labeled.json").write_text(json.dumps(hand))
    for name in ("train.csv", "evaluate.csv"):
        lines = [f'{i},"{COMPLIANCE.format(name + str(i)) if i % 2 else REFUSAL + str(i)}",{i % 2}' for i in range(40)]
        (tmp_path / name).write_text("\n".join(["question,Response,label", *lines]))
    responses = [{"model": f"{'mistralai' if i % 2 else 'openai'}/m", "question_id": str(i), "question": f"s{i}",
             "response": {"choices": [{"message": {"content": f"<think>{i}</think>{REFUSAL}"}}]}}
            for i in range(9)]  # fmt: skip
    write_jsonl(tmp_path / "us_hard_sample_responses.jsonl", responses)
    kinds = [{"key": f"{row['model']}::{row['question_id']}", "expected_compliance": "EVASIVE" if i == 8 else "DENIAL"}
             for i, row in enumerate(responses)]  # fmt: skip
    write_jsonl(tmp_path / "us_hard_sample_manifest_consensus_v4.jsonl", kinds)
    people = [{"instruction": f"d{i}", "response": COMPLIANCE.format(i)} for i in range(9)]
    write_jsonl(tmp_path / "databricks-dolly-15k-safety-only.jsonl", people)
    write_jsonl(tmp_path / "coconot_pref.jsonl", [pair(i) for i in range(9)])
    return tmp_path


def test_answers_are_split_by_prompt_and_model_and_uncertain_ones_are_dropped(folder: Path) -> None:
    answers = refusal_fit.load_answers(folder)
    sides: dict[str, set[bool]] = {}
    for answer in answers:
        sides.setdefault(f"{answer.source.split(',')[0]} {answer.prompt}", set()).add(answer.test)
    assert all(len(tests) == 1 for name, tests in sides.items() if not name.startswith("GPTFuzz"))
    assert len([answer for answer in answers if answer.source == "SpeechMap"]) == 8
    assert {answer.test for answer in answers if answer.source == "SpeechMap"} == {True, False}
    assert all("<think>" not in answer.text for answer in answers)
    assert "That is not true." not in [answer.text for answer in answers]


def test_the_fit_distinguishes_a_refusal_from_advice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = refusal_fit.fit_weights([answer for answer in refusal_fit.load_answers(folder) if not answer.test])
    assert weights["declines"] > 0
    monkeypatch.setattr(refusal_classifier, "load_weights", lambda: weights)
    assert refusal_classifier.classify(REFUSAL).label == "refuse"
    assert refusal_classifier.classify(COMPLIANCE.format("it kills")).label == "comply"


def test_a_missing_file_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "train.csv").unlink()
    monkeypatch.setattr("sys.argv", ["refusal_fit", str(folder)])
    with pytest.raises(SystemExit, match=r"train\.csv: file not found"):
        refusal_fit.main()
