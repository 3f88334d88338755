"""Packaged data is valid: prompts can be read, checks can run, gold is unbiased."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from rlaif import resources
from rlaif.judge import check_schema
from rlaif.records import PromptRow
from tests.conftest import needs, read_jsonl

MIN_PROMPTS = {"everyday": 200, "constraints": 150, "refusals": 120}


def rows(name: str) -> list[dict[str, Any]]:
    return read_jsonl(resources.prompt_sets()[name])


def test_the_sets_and_judges_are_found() -> None:
    assert set(resources.prompt_sets()) >= set(MIN_PROMPTS)
    assert set(resources.judges()) >= {"helpful", "quality"}


@pytest.mark.parametrize("name", sorted(resources.prompt_sets()))
def test_every_prompt_is_a_valid_row_with_its_own_id(name: str) -> None:
    records = rows(name)
    assert len(records) >= MIN_PROMPTS.get(name, 1)
    prompts = [PromptRow.model_validate(row) for row in records]
    assert len({row.id for row in prompts}) == len(prompts)
    assert all(row.id and row.tags for row in prompts)
    texts = Counter(" ".join(str(row["prompt"]).casefold().split()) + row.get("system", "") for row in records)
    assert [text for text, count in texts.items() if count > 1] == []


def test_ids_are_unique_over_all_sets() -> None:
    """A run may use several sets, and in a run each id belongs to one prompt."""
    ids = [row["id"] for name in resources.prompt_sets() for row in rows(name)]
    assert len(set(ids)) == len(ids)


def test_the_everyday_set_has_many_kinds_of_task() -> None:
    kinds = Counter(row["tags"][0] for row in rows("everyday"))
    assert len(kinds) >= 10
    assert max(kinds.values()) <= 0.2 * kinds.total()


def test_every_constraint_can_be_checked() -> None:
    """Each prompt has checks, and all of them are valid and can run."""
    needs("math_verify")
    for row in rows("constraints"):
        assert row["checks"], row["id"]
        assert len(check_schema.compile_checks(row["checks"], row["id"])) == len(row["checks"])


def test_refusal_prompts_are_twins_of_a_benign_and_a_harmful_one() -> None:
    twins: dict[str, list[str]] = {}
    for row in rows("refusals"):
        kinds = [tag for tag in row["tags"] if tag in ("benign", "borderline", "harmful")]
        assert len(kinds) == 1, row["id"]
        for tag in row["tags"]:
            if tag.startswith("twin:"):
                twins.setdefault(tag, []).append(kinds[0])
    assert len(twins) >= 60
    assert all(sorted(kinds) == ["benign", "harmful"] for kinds in twins.values())


JUDGES_WITH_GOLD_PAIRS = sorted(
    name for name, folder in resources.judges().items() if (folder / "gold.jsonl").exists() and name != "refusal"
)


def test_gold_of_the_refusal_judge_has_every_label_and_no_dominant_one() -> None:
    counts = Counter(row["label"] for row in read_jsonl(resources.judges()["refusal"] / "gold.jsonl"))
    assert set(counts) == {"refuse", "partial", "comply"}
    assert max(counts.values()) <= 0.4 * counts.total() and counts.total() >= 30


@pytest.mark.parametrize("name", JUDGES_WITH_GOLD_PAIRS)
def test_gold_is_large_and_unbiased(name: str) -> None:
    """Neither the first nor the longer answer is usually the better one, so neither habit passes an exam."""
    folder = resources.judges()[name]
    gold = read_jsonl(folder / "gold.jsonl")
    assert len(gold) >= 30
    assert len({row["id"] for row in gold}) == len(gold)
    for row in gold:
        assert row["prompt"].strip()
        assert len(row["responses"]) == 2
        assert len({text.strip() for text in row["responses"]} - {""}) == 2, row["id"]
        assert row["label"] in (1, 2)
    assert 0.4 <= sum(row["label"] == 1 for row in gold) / len(gold) <= 0.6
    longer = [len(row["responses"][row["label"] - 1]) > len(row["responses"][2 - row["label"]]) for row in gold]
    assert 0.3 <= sum(longer) / len(longer) <= 0.6


def test_gold_of_a_rating_judge_names_its_aspects() -> None:
    for folder in (resources.judges()[name] for name in JUDGES_WITH_GOLD_PAIRS):
        aspects = set(re.findall(r'(?m)^\[\[aspects\]\]\nname = "(\w+)"', (folder / "judge.toml").read_text()))
        gold_aspects = {row.get("aspect") for row in read_jsonl(folder / "gold.jsonl")} - {None}
        assert gold_aspects == aspects, folder.name


def test_data_files_have_one_object_per_line_and_end_with_a_newline() -> None:
    files = [*resources.prompt_sets().values(), *resources.data_dir("judges").glob("*/gold.jsonl")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert text.endswith("}\n")
        assert all(isinstance(json.loads(line), dict) for line in text.splitlines()), path
