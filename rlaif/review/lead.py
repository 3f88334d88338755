"""The lead's numbers: pace, time, agreement among people, gold results. Read from a desk, nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from statistics import median
from typing import Any

import orjson

from rlaif.review.desk import Desk, Row, said
from rlaif.review.people import People, Person
from rlaif.stats import Estimate, cohen_kappa, krippendorff_alpha, wilson

PACE_WINDOW_S = 30 * 60.0
LABELS = ("a", "b", "tie", "both_bad")
EXCERPT = 120


def facts(desk: Desk, people: People, now: float) -> dict[str, Any]:
    """As JSON. ``seconds`` are medians a pair, ``per_hour`` the labels of the last half hour by two, ``eta_hours`` what
    is left at the pace of everybody together; each figure is null where nothing is known yet."""
    with desk.lock:
        desk.catch_up()
        return _facts(desk, people, now)


def _facts(desk: Desk, people: People, now: float) -> dict[str, Any]:
    known = {person.name: person for person in people.annotators}
    names = sorted({name for name, role in desk.labels if role == "annotator"} | set(known))
    rows = [_person(desk, name, now) for name in names]
    queued = desk.queued
    labelled = [pair for pair in queued if desk.votes(pair)]
    wanted = {pair: desk.rules.wanted(desk.seed, pair) for pair in queued}
    due = sum(max(0, wanted[pair] - len(desk.votes(pair))) for pair in queued)
    pace = sum(row["per_hour"] for row in rows)
    splits = desk.disagreements()
    return {
        "people": rows,
        "pairs": {"queued": len(queued), "labelled": len(labelled), "labels_due": due},
        "per_hour": pace,
        "eta_hours": due / pace if pace else None,
        "agreement": agreement(desk, names),
        "with_judges": _with_judges(desk),
        "disagreements": len(splits),
        "adjudicated": len(desk.adjudicated() & set(splits)),
        "gold_missed": _gold_missed(desk, names),
    }


def agreement(desk: Desk, names: list[str]) -> dict[str, Any]:
    """Krippendorff's alpha over all pairs with several labels, and Cohen's kappa of every two people. What a label
    says of the pair counts, not which side was clicked. Gold pairs are left out: they are chosen to be clear."""
    units: dict[str, dict[str, str]] = {}
    for (name, role), rows in desk.labels.items():
        if role == "annotator":
            for pair, row in rows.items():
                if row["choice"] != "skip" and pair not in desk.gold:
                    units.setdefault(pair, {})[name] = said(row)
    shared = [unit for unit in units.values() if len(unit) > 1]
    kappas = []
    for one, other in combinations(names, 2):
        both = Counter((unit[one], unit[other]) for unit in shared if one in unit and other in unit)
        if both:
            table = [[both[row, column] for column in LABELS] for row in LABELS]
            same = sum(count for (mine, theirs), count in both.items() if mine == theirs)
            kappas.append({"people": [one, other], "kappa": _as_json(cohen_kappa(table)),
                           "same": _as_json(wilson(same, both.total()))})  # fmt: skip
    alpha = krippendorff_alpha([list(unit.values()) for unit in shared])
    return {"alpha": _as_json(alpha), "pairs": len(shared), "kappas": kappas}


def _person(desk: Desk, name: str, now: float) -> dict[str, Any]:
    rows = list(desk.of(Person(name, "annotator")).values())
    timed = [row["seconds"] for row in rows if row["seconds"] is not None]
    gold = [(row, desk.gold[row["pair_id"]]) for row in rows if row["pair_id"] in desk.gold and row["choice"] != "skip"]
    recent = sum(now - row["at"] < PACE_WINDOW_S for row in rows)
    return {
        "name": name,
        "labels": sum(row["choice"] != "skip" for row in rows),
        "skips": sum(row["choice"] == "skip" for row in rows),
        "edits": sum(row["edited"] is not None for row in rows),
        "left_share": _share([row["choice"] == "left" for row in rows if row["choice"] in ("left", "right")]),
        "seconds": median(timed) if timed else None,
        "per_hour": recent * 3600.0 / PACE_WINDOW_S,
        "last_at": max((row["at"] for row in rows), default=None),
        "gold": _as_json(wilson(sum(said(row) == known["preferred"] for row, known in gold), len(gold))),
    }


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _gold_missed(desk: Desk, names: list[str]) -> list[dict[str, Any]]:
    missed = []
    for name in names:
        for pair, row in desk.of(Person(name, "annotator")).items():
            known = desk.gold.get(pair)
            if known and row["choice"] != "skip" and said(row) != known["preferred"]:
                missed.append({"annotator": name, "prompt": excerpt(known), "said": said(row),
                               "known": known["preferred"], "why": known["route_reason"]})  # fmt: skip
    return missed


def _with_judges(desk: Desk) -> dict[str, Any] | None:
    """On audited pairs, how often the one label or the unanimous ones are the judges'."""
    right = n = 0
    for pair in desk.queued:
        row, votes = desk.rows[pair], {said(vote) for vote in desk.votes(pair)}
        if row["route"] == "audit" and len(votes) == 1 and (vote := votes.pop()) in ("a", "b"):
            n, right = n + 1, right + (vote == row["preferred"])
    return _as_json(wilson(right, n))


def excerpt(row: Row) -> str:
    last: Mapping[str, Any] = orjson.loads(row["prompt"])[-1]
    text = " ".join(str(last.get("content") or "").split())
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"


def _as_json(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {
        "value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n
    }  # fmt: skip
