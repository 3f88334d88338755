"""A human label of two answers stays in the dataset when the run is judged again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest

from rlaif import api
from rlaif.config.loader import load
from rlaif.records import Completion, Prompt, Review, content_key
from rlaif.run.human_labels import human_labels
from rlaif.run.journal import iter_records
from rlaif.run.run import Run
from tests.fake_judge import judge_by
from tests.fake_server import ScriptedServer
from tests.labeling.test_judging import goodness, import_and_judge

Serve = Callable[..., ScriptedServer]
FLAGS = {
    "judge.panel": ["quality", "helpful"],
    "pairs.test_fraction": 0,
    "pairs.max_candidates_per_prompt": 1,
    "pairs.human_fraction": 1,
}


def rows(*answers: str, prompts: int = 10) -> list[dict[str, Any]]:
    return [{"id": str(n), "prompt": f"Question {n}?", "responses": list(answers)} for n in range(prompts)]


def label_worse(run: Run, pairs: pl.DataFrame, choice: Literal["left", "tie"] = "left") -> None:
    """Label each of ``pairs``: the answer that the judges did not prefer is better, or both are equal."""
    with run.lock(), run.journal("reviews") as journal:
        for row in pairs.iter_rows(named=True):
            side: Literal["a", "b"] = "b" if row["preferred"] == "a" else "a"
            review = Review(
                key=content_key(pair=row["pair_id"]),
                pair_id=row["pair_id"],
                prompt_id=row["prompt_id"],
                annotator="ada",
                choice=choice,
                left_side=side,
                preferred=side if choice == "left" else None,
                route=row["route"],
                inclusion_probability=row["inclusion_probability"],
            )
            journal.append([review])


def dataset(run: Run) -> pl.DataFrame:
    return pl.read_parquet(run.dataset / "train.parquet")


def texts(run: Run) -> list[tuple[str, str, str]]:
    """Return label source, chosen and rejected answer of each row of the dataset, sorted."""
    columns = dataset(run).select("label_source", "chosen", "rejected").iter_rows()
    return sorted((source, chosen[0]["content"], rejected[0]["content"]) for source, chosen, rejected in columns)


@pytest.fixture
def url(serve: Serve) -> str:
    return serve(judge_by(goodness), owned_by="vllm").url


def test_labels_of_pairs_that_are_not_compared_any_more_are_carried(tmp_path: Path, url: str) -> None:
    run, _ = import_and_judge(tmp_path, rows("x [0.4]", "y [0.7]"), url, **FLAGS)
    labeled = run.pairs()
    assert labeled["route"].is_in(["audit", "targeted"]).all()
    label_worse(run, labeled)
    more = rows("x [0.4]", "y [0.7]", "best [1.0]", "worst [0.0]")
    run, result = import_and_judge(tmp_path, more, url, **FLAGS | {"pairs.human_fraction": 0})
    pairs = run.pairs()
    carried = pairs.filter(pl.col("route") == "carried")
    assert sorted(carried["pair_id"]) == sorted(labeled["pair_id"])
    assert carried.select(
        pl.col("reviewed").all(), pl.col("inclusion_probability", "prob_a", "preferred", "outcome").is_null().all()
    ).row(0) == (True, True, True, True, True)
    # max_per_prompt is 1: it limits the judges' pairs, not the annotators'.
    assert texts(run) == [("human", "x [0.4]", "y [0.7]")] * 10 + [("judge", "best [1.0]", "worst [0.0]")] * 10
    built = result.build
    assert (built.candidates, built.routes["judge"], built.routes["carried"]) == (10, 10, 10)
    assert (built.dataset_counts.carried, built.dropped_labels) == (10, {})
    assert built.label_quality["agreement"] is None, "they are not draws of the new queue"
    assert (
        "10 of the pairs by annotators are not in the current review queue" in (run.dataset / "README.md").read_text()
    )
    assert run.manifest()["stages"]["judge"]["pairs"]["carried_labels"] == 10


def test_labels_of_dropped_pairs_stay(tmp_path: Path, url: str) -> None:
    """Round robin compares all pairs and keeps the best one."""
    flags = FLAGS | {"judge.strategy": "round-robin"}
    run, _ = import_and_judge(tmp_path, rows("x [0.4]", "y [0.7]"), url, **flags)
    label_worse(run, run.pairs())
    more = rows("x [0.4]", "y [0.7]", "best [1.0]", "worst [0.0]")
    run, result = import_and_judge(tmp_path, more, url, **flags | {"pairs.human_fraction": 0})
    assert texts(run) == [("human", "x [0.4]", "y [0.7]")] * 10 + [("judge", "best [1.0]", "worst [0.0]")] * 10
    assert "carried" not in result.build.routes
    assert result.build.dataset_counts.carried == 10


def test_a_carried_tie_is_counted_and_is_not_in_the_dataset(tmp_path: Path, url: str) -> None:
    run, _ = import_and_judge(tmp_path, rows("x [0.4]", "y [0.7]"), url, **FLAGS)
    label_worse(run, run.pairs(), "tie")
    more = rows("x [0.4]", "y [0.7]", "best [1.0]", "worst [0.0]")
    run, result = import_and_judge(tmp_path, more, url, **FLAGS | {"pairs.human_fraction": 0})
    assert {source for source, _, _ in texts(run)} == {"judge"}
    assert (result.build.dataset_counts.carried, result.build.dataset_counts.dropped["tie"]) == (0, 10)
    assert "are not in the current review queue" not in (run.dataset / "README.md").read_text()


def test_labels_follow_the_text_if_an_answer_is_replaced_by_a_copy(tmp_path: Path, url: str) -> None:
    """The copy with the smallest key is kept, which may be a new one."""
    run, _ = import_and_judge(tmp_path, rows("x [0.4]", "y [0.7]", prompts=40), url, **FLAGS)
    label_worse(run, run.pairs())
    copies = rows("x [0.4]", "y [0.7]", "x  [0.4]", "y  [0.7]", prompts=40)
    run, result = import_and_judge(tmp_path, copies, url, **FLAGS)
    old = set(human_labels(run.reviews())["pair_id"])
    assert 5 < len(old & set(run.pairs()["pair_id"])) < 35
    assert run.pairs()["reviewed"].all()
    chosen = [(chosen.split()[0], rejected.split()[0]) for _, chosen, rejected in texts(run)]
    assert chosen == [("x", "y")] * 40
    assert result.build.dropped_labels == {}


def test_labels_that_cannot_be_used_are_counted_with_the_reason(tmp_path: Path, url: str) -> None:
    run, _ = import_and_judge(tmp_path, rows("x [0.4]", "y [0.7]"), url, **FLAGS)
    label_worse(run, run.pairs())
    prompts = [Prompt.model_validate(record) for _, record in iter_records(run.journal_path("prompts"))]
    answers = [Completion.model_validate(record) for _, record in iter_records(run.journal_path("completions"))]
    prompts[0] = prompts[0].model_copy(update={"split": "heldout"})
    cut = next(one for one in answers if one.prompt_id == "1")
    lost = next(one for one in answers if one.prompt_id == "2")
    records = [
        one.model_copy(update={"finish_reason": "length"}) if one is cut else one for one in answers if one is not lost
    ]
    for name, journal in (("prompts", prompts), ("completions", records)):
        run.journal_path(name).write_text("".join(f"{one.model_dump_json()}\n" for one in journal))  # type: ignore[arg-type]
    config = load(run.path, {"judge.model": "m", "judge.base_url": [url], **FLAGS})
    built = api.rebuild_dataset(run, config)
    assert built.dropped_labels == {"dropped_answer": 1, "heldout_prompt": 1, "missing_answer": 1}
    assert texts(run) == [("human", "x [0.4]", "y [0.7]")] * 7
    assert built.label_quality["reviewed"] == 7
    card = (run.dataset / "README.md").read_text()
    assert "3 human labels are not used (1: an answer cannot be used" in card
