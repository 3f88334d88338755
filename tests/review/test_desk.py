"""Who gets which pair, and what becomes of labels that arrive from several sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif.errors import InputError, RunError, UsageError
from rlaif.records import unit_interval
from rlaif.review.desk import LEASE_S, OWN_LEASE_S, Desk
from rlaif.review.exchange import export_queue, import_reviews
from rlaif.review.gold import read_gold
from rlaif.review.lead import facts
from rlaif.review.people import People, Person, Rules
from rlaif.run.directory import Run
from rlaif.run.labels import human_labels
from tests.review.test_exchange import SEED, fill, make_run, pair

ADA, BOB = Person("ada", "annotator"), Person("bob", "annotator")
LEAD = Person("lead", "adjudicator")


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


def test_a_closed_tabs_pairs_come_back_to_their_person_soon_and_to_others_later(run: Run) -> None:
    clock = Clock()
    desk = Desk(run, SEED, Rules(), {}, clock)
    held = ids(desk.next(ADA, "one", [], 5))
    assert set(held).isdisjoint(ids(desk.next(ADA, "two", [], 20)))
    assert ids(desk.next(ADA, "one", [], 5)) == held, "a reload shows the same"
    clock.now += OWN_LEASE_S + 1
    assert set(held) <= set(ids(desk.next(ADA, "three", [], 20)))
    assert desk.next(BOB, "b", [], 20) == []
    clock.now += LEASE_S + 1
    assert set(held) <= set(ids(desk.next(BOB, "b", [], 20)))


def test_a_pair_goes_to_as_many_people_as_are_wanted(run: Run) -> None:
    desk = Desk(run, SEED, Rules(labels=1, overlap=0.5), {})
    shown: Counter[str] = Counter()
    for person in (ADA, BOB, Person("cyd", "annotator")):
        while items := desk.next(person, "t", [], 3):
            for item in items:
                desk.submit(person, item["id"], "left")
                shown[item["id"]] += 1
    assert shown == {row: 1 + (unit_interval(SEED, "overlap", row) < 0.5) for row in run.pairs()["pair_id"]}
    assert 1 < sum(count == 2 for count in shown.values()) < 19


def test_people_who_stop_early_share_pairs_all_the_same(tmp_path: Path) -> None:
    """With 2,000 pairs and 100 labels each by two people, chance alone would give less than one shared pair."""
    run = make_run(tmp_path / "run", [pair(number) for number in range(2000)])
    desk = Desk(run, SEED, Rules(labels=1, overlap=0.2), {})
    for _ in range(100):
        for person in (ADA, BOB):
            (item,) = desk.next(person, "t", [], 1)
            desk.submit(person, item["id"], "left")
    shared = sum(len(desk.votes(pair_id)) == 2 for pair_id in desk.queued)
    assert 10 <= shared <= 40


def test_a_late_label_is_taken_and_a_skip_goes_back_to_others(run: Run) -> None:
    desk = Desk(run, SEED, Rules(), {})
    (item,) = desk.next(ADA, "t", [], 1)
    desk.submit(BOB, item["id"], "left")
    desk.submit(ADA, item["id"], "right")
    assert len(desk.votes(item["id"])) == 2
    (other,) = desk.next(ADA, "t", [], 1)
    desk.submit(ADA, other["id"], "skip")
    assert other["id"] not in ids(desk.next(ADA, "t", [], 20))
    assert other["id"] in ids(desk.next(BOB, "t", [], 20)) or desk._leases[other["id"]] == {}


def test_an_import_and_a_new_night_are_seen_and_a_torn_line_is_cut(run: Run) -> None:
    desk = Desk(run, SEED, Rules(), {})
    first = ids(desk.next(ADA, "t", [], 1))[0]
    desk.submit(ADA, first, "left")
    path = run.path.parent / "queue.csv"
    export_queue(run, path, format="csv", annotator="bob", seed=SEED)
    import_reviews(run, fill(path, lambda row: "tie" if row < 5 else ""), annotator="bob", seed=SEED)
    with run.journal_path("reviews").open("ab") as file:
        file.write(b'{"key":"torn')
    assert desk.submit(ADA, first, "right")["saved"] == "changed"
    assert run.reviews().height == 7
    assert desk.progress(BOB)["done"] == 5
    make_run(run.path, [pair(number) for number in range(10, 30)])
    assert ids(desk.next(BOB, "t", [], 20)) != []
    assert sorted(desk.queued) == [f"pair-{number:04}" for number in range(10, 30)]
    # A pair that has left the queue is still taken, as somebody may be looking at it.
    gone = next(row for row in desk.rows if row not in desk.queued)
    assert desk.submit(ADA, gone, "left")["saved"] in ("added", "changed")
    with pytest.raises(UsageError, match="unknown pair"):
        desk.submit(ADA, "nowhere", "left")


def test_labels_go_on_while_the_run_is_written_and_wait_for_another_writer_of_labels(run: Run) -> None:
    desk = Desk(run, SEED, Rules(), {})
    one, two = ids(desk.next(ADA, "t", [], 2))
    with run.writing():
        desk.submit(ADA, one, "left")
    with run.writing("reviews"), pytest.raises(RunError, match="locked"):
        desk.submit(ADA, two, "left")
    assert desk.submit(ADA, two, "left")["saved"] == "added"
    with run.writing():
        pass  # an open page keeps nothing from starting
    desk.close()


def test_gold_pairs_look_like_others_and_enter_no_dataset(run: Run) -> None:
    gold = read_gold([gold_file(run.path.parent / "gold.jsonl")])
    desk = Desk(run, SEED, Rules(gold_share=0.5), gold)
    seen = []
    while items := desk.next(ADA, "t", [], 1):
        assert set(items[0]) == {"id", "turns", "left", "right"}
        assert desk.submit(ADA, items[0]["id"], "left")["judge"]["reason"] is None or items[0]["id"] not in gold
        seen.append(items[0]["id"])
    assert set(gold) <= set(seen)
    assert len(seen) == len(set(seen)) == 24
    assert {len(pair_id) for pair_id in gold} == {16}
    assert set(human_labels(run.reviews())["pair_id"]).isdisjoint(gold)
    people = People(b"x" * 32, ["ada", "bob"], "lead", links=True)
    (ada, bob) = facts(desk, people, 2e9)["people"]
    assert ada["gold"]["n"] == 4
    assert bob["gold"] is None
    right = round(ada["gold"]["value"] * 4)
    assert len(facts(desk, people, 2e9)["gold_missed"]) == 4 - right


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not JSON"), ('{"prompt": "p", "responses": ["a"], "label": 1}', "responses"),
     ('{"prompt": "p", "responses": ["a", "b"], "label": 3}', "label")],
)  # fmt: skip
def test_a_bad_gold_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = gold_file(tmp_path / "gold.jsonl", 2)
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(InputError, match=message) as raised:
        read_gold([path])
    assert raised.value.where == f"{path}:3"


def test_the_leads_numbers(run: Run) -> None:
    """Two people who agree on 6 of 8 pairs; one adjudication of the two splits."""
    desk = Desk(run, SEED, Rules(labels=2), {})
    pairs = sorted(desk.queued)[:8]
    for number, pair_id in enumerate(pairs):
        for person in (ADA, BOB):
            left_is = "a" if desk.shown(desk.rows[pair_id], person)["left"]["text"].startswith("First") else "b"
            wants = "a" if number % 2 == 0 else "b"
            if person is BOB and number in (0, 1):
                wants = "b" if wants == "a" else "a"
            desk.submit(person, pair_id, "left" if wants == left_is else "right", seconds=10.0 + number)
    people = People(b"x" * 32, ["ada", "bob"], "lead", links=True)
    assert sorted(ids(desk.next(LEAD, "t", [], 5))) == pairs[:2]
    desk.submit(LEAD, pairs[0], "tie")
    found = facts(desk, people, max(row["at"] for row in run.reviews().iter_rows(named=True)) + 1)
    assert found["pairs"] == {"queued": 20, "labelled": 8, "labels_due": 24}
    assert (found["disagreements"], found["adjudicated"]) == (2, 1)
    (kappa,) = found["agreement"]["kappas"]
    assert kappa["same"]["value"] == 6 / 8
    assert kappa["kappa"]["value"] == pytest.approx(0.5)
    assert found["agreement"]["pairs"] == 8
    assert [row["seconds"] for row in found["people"]] == [13.5, 13.5]
    assert found["per_hour"] == 32.0
    assert found["eta_hours"] == pytest.approx(24 / 32)
    # On the six that people agree on, the judges said a: right in three.
    assert (found["with_judges"]["value"], found["with_judges"]["n"]) == (0.5, 6)
    labels = dict(human_labels(run.reviews()).select("pair_id", "label").iter_rows())
    assert labels[pairs[0]] == "tie"
    assert labels[pairs[1]] == "disagreement"
    assert labels[pairs[2]] == "a"


def test_the_journal_of_before_still_loads(run: Run) -> None:
    """Labels from before there were edits, roles and times."""
    old = {"key": "0" * 64, "pair_id": "pair-0001", "prompt_id": "p", "annotator": "ada", "choice": "left", "left": "a",
           "preferred": "a", "comment": "c", "route": "audit", "inclusion_probability": 0.1, "at": 1.0}  # fmt: skip
    run.journal_path("reviews").parent.mkdir(parents=True)
    run.journal_path("reviews").write_text(json.dumps(old) + "\n")
    desk = Desk(run, SEED, Rules(), {})
    assert desk.progress(ADA) == {"done": 1, "left": 19}
    assert desk.submit(ADA, "pair-0001", "tie")["saved"] == "changed"
    assert human_labels(run.reviews()).select(pl.col("label")).item() == "tie"
