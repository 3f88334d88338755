"""Argilla and Label Studio: the queue is exported, labeled with their own packages, and imported without loss."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import InputError, UsageError
from rlaif.review.import_export import export_queue, import_reviews
from rlaif.review.labeling_tools import COMPANIONS, TOOLS, Tool
from rlaif.review.queue import latest_labels
from rlaif.run.run import Run
from tests.conftest import needs_tools
from tests.review.test_import_export import HOSTILE, SEED, make_run, pair

CHOICES = ["left", "right", "tie", "both_bad", "skip", ""]
REAL_TOOLS = Path(__file__).with_name("real_tools.py")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def hostile(number: int, text: str) -> dict[str, Any]:
        prompt = json.dumps([{"role": "user", "content": f"{text} ?"}])
        return pair(number, response_a=f"{text} first", response_b=text, prompt=prompt)

    return make_run(tmp_path / "run", [hostile(number, text) for number, text in enumerate(HOSTILE)])


def exported(run: Run, tool: Tool) -> Path:
    path = run.path.parent / f"{tool}.json"
    assert export_queue(run, path, format=tool, annotator="ann", seed=SEED) == len(HOSTILE)
    return path


def pair_ids(tool: Tool, records: list[dict[str, Any]]) -> list[str]:
    return [record["id"] if tool == "argilla" else record["data"]["pair_id"] for record in records]


def labeled_file(path: Path, tool: Tool) -> tuple[Path, dict[str, list[str]]]:
    """Label the exported file as the tool would write it: every choice in turn, comments on some."""
    records = json.loads(path.read_text(encoding="utf-8"))
    choices = {}
    for number, pair_id in enumerate(pair_ids(tool, records)):
        choice = CHOICES[number % 6]
        comment = f"note {number}\nétoile" if number % 4 == 0 and choice not in ("", "skip") else ""
        choices[pair_id] = [choice, comment]
    for record, (choice, comment) in zip(records, choices.values(), strict=True):
        if tool == "argilla":
            record["responses"] = {name: [{"value": value, "user_id": "u"}]
                                   for name, value in (("choice", choice), ("comment", comment)) if value}  # fmt: skip
        elif choice:
            result: list[dict[str, Any]] = []
            if choice in ("left", "right"):
                result.append({"type": "pairwise", "from_name": "comparison", "value": {"selected": choice}})
            elif choice != "skip":
                result.append({"type": "choices", "from_name": "neither", "value": {"choices": [choice]}})
            if comment:
                result.append({"type": "textarea", "from_name": "comment", "value": {"text": [comment]}})
            record["annotations"] = [{"result": result, "was_cancelled": choice == "skip"}]
    target = path.with_name(f"{tool}-labeled.json")
    target.write_text(json.dumps(records), encoding="utf-8")
    return target, choices


def check(run: Run, path: Path, choices: dict[str, list[str]]) -> None:
    result = import_reviews(run, path, annotator="ann", seed=SEED)
    assert result.bad_rows == []
    imported = {
        row["pair_id"]: [row["choice"], row["comment"]] for row in latest_labels(run.reviews()).iter_rows(named=True)
    }
    assert imported == {pair_id: label for pair_id, label in choices.items() if label[0]}
    assert result.unlabeled == sum(not choice for choice, _ in choices.values())
    repeated = import_reviews(run, path, annotator="ann", seed=SEED)
    assert (repeated.added, repeated.changed, repeated.unchanged) == (0, 0, len(imported))


@pytest.mark.parametrize("tool", TOOLS)
def test_queue_round_trips_through_the_real_package(run: Run, tool: Tool) -> None:
    """The package's models read, label and write every text and every kind of choice."""
    python = needs_tools("argilla", "label_studio_sdk")
    path = exported(run, tool)
    target, choices = labeled_file(path, tool)
    target.unlink()
    choices_file = path.with_name("choices.json")
    choices_file.write_text(json.dumps(choices))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, REAL_TOOLS, tool, path, choices_file, target], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    check(run, target, choices)


@pytest.mark.parametrize("tool", TOOLS)
def test_labeled_queue_is_imported_and_export_is_blind(run: Run, tool: Tool) -> None:
    path = exported(run, tool)
    text = path.read_text(encoding="utf-8") + path.with_suffix(COMPANIONS[tool]).read_text(encoding="utf-8")
    for secret in ("secret", "0.8642", "prob_a", "targeted", "audit"):
        assert secret not in text
    check(run, *labeled_file(path, tool))


def put(tool: Tool, record: dict[str, Any], part: str, value: Any) -> None:
    if part == "pair_id":
        (record if tool == "argilla" else record["data"])["id" if tool == "argilla" else "pair_id"] = value
    elif part == "choice" and tool == "argilla":
        record["responses"]["choice"] = [{"value": word, "user_id": str(n)} for n, word in enumerate(value)]
    elif part == "choice":
        record["annotations"] = [{"result": [{"value": {"choices": [word]}}]} for word in value]
    else:
        names = {"left": "answer1", "right": "answer2"} if tool == "label-studio" else {}
        record["fields" if tool == "argilla" else "data"][names.get(part, part)] = value


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tool, records: put(tool, records[2], "pair_id", "foreign"), "unknown pair_id 'foreign'"),
        (lambda tool, records: put(tool, records[2], "choice", ["best"]), "choice 'best'"),
        (lambda tool, records: put(tool, records[2], "choice", ["left", "tie"]), "differently: left, tie"),
        (lambda tool, records: put(tool, records[2], "prompt", "edited"), "prompt of pair .* changed since the export"),
        (lambda tool, records: put(tool, records[2], "right", None), "(right|answer2) must be text, got None"),
        (lambda tool, records: records.__setitem__(2, "x"), "the record has no"),
    ],
)  # fmt: skip
def test_bad_record_is_named_by_number_and_the_others_are_imported(
    run: Run, tool: Tool, change: Callable[..., None], message: str
) -> None:
    path, choices = labeled_file(exported(run, tool), tool)
    records = json.loads(path.read_text(encoding="utf-8"))
    lost = pair_ids(tool, records)[2]
    change(tool, records)
    path.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(InputError, match=message) as raised:
        import_reviews(run, path, annotator="ann", seed=SEED)
    assert str(raised.value.location).endswith(".json: record 3")
    assert run.reviews().is_empty()
    result = import_reviews(run, path, annotator="ann", seed=SEED, on_bad_row="skip")
    assert len(result.bad_rows) == 1
    del choices[lost]
    assert result.added == sum(bool(choice) for choice, _ in choices.values())


@pytest.mark.parametrize("tool", TOOLS)
def test_repeated_id_counts_once(run: Run, tool: Tool) -> None:
    path, choices = labeled_file(exported(run, tool), tool)
    records = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([*records, records[0]]), encoding="utf-8")
    result = import_reviews(run, path, annotator="ann", seed=SEED, on_bad_row="skip")
    (bad,) = result.bad_rows
    assert str(bad.location).endswith(f": record {len(records) + 1}")
    assert f"repeated pair_id {pair_ids(tool, records)[0]!r}" in bad.message
    assert "record 1" in bad.message
    assert result.added == sum(bool(choice) for choice, _ in choices.values())


def test_a_side_together_with_a_tie_is_not_a_choice(run: Run) -> None:
    path, _ = labeled_file(exported(run, "label-studio"), "label-studio")
    records = json.loads(path.read_text(encoding="utf-8"))
    records[0]["annotations"][0]["result"].append({"value": {"choices": ["tie"]}})
    path.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(InputError, match="choice 'left and tie'"):
        import_reviews(run, path, annotator="ann", seed=SEED)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not JSON"), ("[{]", "not JSON"), ("{}", "not a list of records"), ("[]", "not a list of records"),
     ('[{"prompt": "p", "comparison": {}}]', "neither Argilla.*Label Studio.*: prompt, comparison")],
)  # fmt: skip
def test_other_json_is_rejected(run: Run, text: str, message: str) -> None:
    path = run.path.parent / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        import_reviews(run, path, annotator="ann", seed=SEED)


def test_labels_are_not_overwritten_and_wrong_formats_are_rejected(run: Run) -> None:
    path, _ = labeled_file(exported(run, "argilla"), "argilla")
    with pytest.raises(UsageError, match="already exists, with choices"):
        export_queue(run, path, format="label-studio", annotator="ann", seed=SEED)
    with pytest.raises(UsageError, match=r"must end in \.json"):
        export_queue(run, path.with_suffix(".csv"), format="argilla", annotator="ann", seed=SEED)
    with pytest.raises(InputError, match="format label-studio"):
        import_reviews(run, path, annotator="ann", seed=SEED, format="label-studio")
