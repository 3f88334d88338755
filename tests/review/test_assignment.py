"""Assignment of pairs to annotators, and labels from several annotators, tabs and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif.errors import InputError, RunError, UsageError
from rlaif.pair.label_quality import estimate_label_quality
from rlaif.records import hash_to_unit_interval
from rlaif.review.annotators import Annotator, AnnotatorRegistry, AssignmentRules
from rlaif.review.assignment import LEASE_S, OWN_LEASE_S, AssignmentService
from rlaif.review.dashboard import dashboard_data
from rlaif.review.gold_pairs import read_gold_pairs
from rlaif.review.import_export import export_queue, import_reviews
from rlaif.run.human_labels import human_labels
from rlaif.run.run import Run
from tests.review.test_import_export import SEED, fill, make_run, pair

ADA, BOB = Annotator("ada", "annotator"), Annotator("bob", "annotator")
LEAD = Annotator("lead", "adjudicator")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", [pair(number) for number in range(20)])


def gold_file(path: Path, n: int = 4) -> Path:
    lines = [{"prompt": f"gold {i}", "responses": ["right", "wrong"], "label": 1, "why": "so"} for i in range(n)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["id"] for item in items]


def test_pairs_of_a_closed_tab_return_to_their_annotator_first_and_to_others_later(run: Run) -> None:
    clock = Clock()
    assignments = AssignmentService(run, SEED, AssignmentRules(), {}, clock)
    leased = ids(assignments.next_pairs(ADA, "one", [], 5))
    assert set(leased).isdisjoint(ids(assignments.next_pairs(ADA, "two", [], 20)))
    assert ids(assignments.next_pairs(ADA, "one", [], 5)) == leased, "a reload shows the same pairs"
    clock.now += OWN_LEASE_S + 1
    assert set(leased) <= set(ids(assignments.next_pairs(ADA, "three", [], 20)))
    assert assignments.next_pairs(BOB, "b", [], 20) == []
    clock.now += LEASE_S + 1
    assert set(leased) <= set(ids(assignments.next_pairs(BOB, "b", [], 20)))


def test_each_pair_gets_the_required_number_of_labels(run: Run) -> None:
    assignments = AssignmentService(run, SEED, AssignmentRules(labels_per_pair=1, extra_label_fraction=0.5), {})
    label_counts: Counter[str] = Counter()
    for annotator in (ADA, BOB, Annotator("cyd", "annotator")):
        while items := assignments.next_pairs(annotator, "t", [], 3):
            for item in items:
                assignments.submit_label(annotator, item["id"], "left")
                label_counts[item["id"]] += 1
    assert label_counts == {
        row: 1 + (hash_to_unit_interval(SEED, "overlap", row) < 0.5) for row in run.pairs()["pair_id"]
    }
    assert 1 < sum(count == 2 for count in label_counts.values()) < 19


def test_annotators_who_stop_early_still_share_pairs(tmp_path: Path) -> None:
    """With 2,000 pairs and 100 labels per annotator, two annotators would share less than one pair by chance."""
    run = make_run(tmp_path / "run", [pair(number) for number in range(2000)])
    assignments = AssignmentService(run, SEED, AssignmentRules(labels_per_pair=1, extra_label_fraction=0.2), {})
    for _ in range(100):
        for annotator in (ADA, BOB):
            (item,) = assignments.next_pairs(annotator, "t", [], 1)
            assignments.submit_label(annotator, item["id"], "left")
    shared = sum(len(assignments.votes_for(pair_id)) == 2 for pair_id in assignments.queued)
    assert 10 <= shared <= 40


def test_late_label_is_accepted_and_skipped_pair_goes_to_others(run: Run) -> None:
    assignments = AssignmentService(run, SEED, AssignmentRules(), {})
    (item,) = assignments.next_pairs(ADA, "t", [], 1)
    assignments.submit_label(BOB, item["id"], "left")
    assignments.submit_label(ADA, item["id"], "right")
    assert len(assignments.votes_for(item["id"])) == 2
    (other,) = assignments.next_pairs(ADA, "t", [], 1)
    assignments.submit_label(ADA, other["id"], "skip")
    assert other["id"] not in ids(assignments.next_pairs(ADA, "t", [], 20))
    assert other["id"] in ids(assignments.next_pairs(BOB, "t", [], 20)) or assignments._leases[other["id"]] == {}


def test_imported_labels_and_new_pairs_are_seen_and_a_torn_line_is_cut(run: Run) -> None:
    assignments = AssignmentService(run, SEED, AssignmentRules(), {})
    first = ids(assignments.next_pairs(ADA, "t", [], 1))[0]
    assignments.submit_label(ADA, first, "left")
    path = run.path.parent / "queue.csv"
    export_queue(run, path, format="csv", annotator="bob", seed=SEED)
    import_reviews(run, fill(path, lambda row: "tie" if row < 5 else ""), annotator="bob", seed=SEED)
    with run.journal_path("reviews").open("ab") as file:
        file.write(b'{"key":"torn')
    assert assignments.submit_label(ADA, first, "right")["saved"] == "changed"
    assert run.reviews().height == 7
    assert assignments.progress(BOB)["done"] == 5
    make_run(run.path, [pair(number) for number in range(10, 30)])
    assert ids(assignments.next_pairs(BOB, "t", [], 20)) != []
    assert sorted(assignments.queued) == [f"pair-{number:04}" for number in range(10, 30)]
    # A pair that has left the queue still accepts labels: an annotator may have it on display.
    removed = next(row for row in assignments.rows if row not in assignments.queued)
    assert assignments.submit_label(ADA, removed, "left")["saved"] in ("added", "changed")
    with pytest.raises(UsageError, match="unknown pair"):
        assignments.submit_label(ADA, "nowhere", "left")


def test_labels_are_written_during_judging_but_not_beside_another_writer_of_labels(run: Run) -> None:
    assignments = AssignmentService(run, SEED, AssignmentRules(), {})
    one, two = ids(assignments.next_pairs(ADA, "t", [], 2))
    with run.lock():
        assignments.submit_label(ADA, one, "left")
    with run.lock("reviews"), pytest.raises(RunError, match="locked"):
        assignments.submit_label(ADA, two, "left")
    assert assignments.submit_label(ADA, two, "left")["saved"] == "added"
    with run.lock():
        pass  # an open page does not lock the run
    assignments.close()


def test_gold_pairs_look_like_others_and_never_enter_the_dataset(run: Run) -> None:
    gold = read_gold_pairs([gold_file(run.path.parent / "gold.jsonl")])
    assignments = AssignmentService(run, SEED, AssignmentRules(gold_fraction=0.5), gold)
    labeled = []
    while items := assignments.next_pairs(ADA, "t", [], 1):
        assert set(items[0]) == {"id", "turns", "left", "right"}
        assert (
            assignments.submit_label(ADA, items[0]["id"], "left")["judge"]["reason"] is None
            or items[0]["id"] not in gold
        )
        labeled.append(items[0]["id"])
    assert set(gold) <= set(labeled)
    assert len(labeled) == len(set(labeled)) == 24
    assert {len(pair_id) for pair_id in gold} == {16}
    assert set(human_labels(run.reviews())["pair_id"]).isdisjoint(gold)
    registry = AnnotatorRegistry(b"x" * 32, ["ada", "bob"], "lead", links=True)
    (ada, bob) = dashboard_data(assignments, registry, 2e9)["annotators"]
    assert ada["gold_accuracy"]["n"] == 4
    assert bob["gold_accuracy"] is None
    correct = round(ada["gold_accuracy"]["value"] * 4)
    assert len(dashboard_data(assignments, registry, 2e9)["gold_missed"]) == 4 - correct


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not JSON"), ('{"prompt": "p", "responses": ["a"], "label": 1}', "responses"),
     ('{"prompt": "p", "responses": ["a", "b"], "label": 3}', "label")],
)  # fmt: skip
def test_bad_gold_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = gold_file(tmp_path / "gold.jsonl", 2)
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(InputError, match=message) as raised:
        read_gold_pairs([path])
    assert raised.value.location == f"{path}:3"


def test_dashboard_data(run: Run) -> None:
    """Two annotators agree on 6 of 8 pairs, and the lead adjudicates one of the other two."""
    assignments = AssignmentService(run, SEED, AssignmentRules(labels_per_pair=2), {})
    pairs = sorted(assignments.queued)[:8]
    for number, pair_id in enumerate(pairs):
        for annotator in (ADA, BOB):
            left = (
                "a"
                if assignments.to_client(assignments.rows[pair_id], annotator)["left"]["text"].startswith("First")
                else "b"
            )
            preferred = "a" if number % 2 == 0 else "b"
            if annotator is BOB and number in (0, 1):
                preferred = "b" if preferred == "a" else "a"
            assignments.submit_label(
                annotator, pair_id, "left" if preferred == left else "right", seconds=10.0 + number
            )
    registry = AnnotatorRegistry(b"x" * 32, ["ada", "bob"], "lead", links=True)
    assert sorted(ids(assignments.next_pairs(LEAD, "t", [], 5))) == pairs[:2]
    assignments.submit_label(LEAD, pairs[0], "tie")
    data = dashboard_data(
        assignments, registry, max(row["created_at"] for row in run.reviews().iter_rows(named=True)) + 1
    )
    assert data["pairs"] == {"queued": 20, "labeled": 8, "labels_due": 24}
    assert (data["disagreements"], data["adjudicated"]) == (2, 1)
    (kappa,) = data["agreement"]["kappas"]
    assert kappa["same_label"]["value"] == 6 / 8
    assert kappa["kappa"]["value"] == pytest.approx(0.5)
    assert data["agreement"]["pairs"] == 8
    assert [row["median_seconds"] for row in data["annotators"]] == [13.5, 13.5]
    assert data["labels_per_hour"] == 32.0
    assert data["eta_hours"] == pytest.approx(24 / 32)
    # On the six pairs with agreement the judges preferred a, which is right in three.
    assert (data["judge_agreement"]["value"], data["judge_agreement"]["n"]) == (0.5, 6)
    assert (data["tie_rate"]["value"], data["tie_rate"]["n"]) == (1 / 8, 8)
    assert (data["skip_rate"]["value"], data["skip_rate"]["n"]) == (0.0, 8)
    merged = human_labels(run.reviews())
    judged = run.pairs().with_columns(prob_a_by_judges="prob_a", preferred_by_judges="preferred")
    report = estimate_label_quality(judged, merged, run.reviews(), seed=SEED).summary()
    assert data["judge_agreement"] == report["agreement"]
    assert (data["tie_rate"], data["skip_rate"]) == (report["tie_rate"], report["skip_rate"])
    labels = dict(merged.select("pair_id", "label").iter_rows())
    assert labels[pairs[0]] == "tie"
    assert labels[pairs[1]] == "disagreement"
    assert labels[pairs[2]] == "a"


def test_old_journal_still_loads(run: Run) -> None:
    """A label without the newer fields: better answer, role, time."""
    old = {
        "key": "0" * 64,
        "pair_id": "pair-0001",
        "prompt_id": "p",
        "annotator": "ada",
        "choice": "left",
        "left_side": "a",
        "preferred": "a",
        "comment": "c",
        "route": "audit",
        "inclusion_probability": 0.1,
        "created_at": 1.0,
    }
    run.journal_path("reviews").parent.mkdir(parents=True)
    run.journal_path("reviews").write_text(json.dumps(old) + "\n")
    assignments = AssignmentService(run, SEED, AssignmentRules(), {})
    assert assignments.progress(ADA) == {"done": 1, "remaining": 19}
    assert assignments.submit_label(ADA, "pair-0001", "tie")["saved"] == "changed"
    assert human_labels(run.reviews()).select(pl.col("label")).item() == "tie"
