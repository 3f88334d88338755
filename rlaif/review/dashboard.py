"""The lead's dashboard data: pace, time left, agreement between annotators, gold results. Read-only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Any

import orjson

from rlaif.review.annotators import Annotator, AnnotatorRegistry
from rlaif.review.assignment import AssignmentService, Row, preference_of
from rlaif.stats import Estimate, cohen_kappa, krippendorff_alpha, wilson

if TYPE_CHECKING:
    from rlaif.run.run import Run

PACE_WINDOW_S = 30 * 60.0
LABELS = ("a", "b", "tie", "both_bad")
EXCERPT_CHARS = 120


def dashboard_data(assignments: AssignmentService, registry: AnnotatorRegistry, now: float) -> dict[str, Any]:
    """Return the dashboard data as JSON values; a figure without data is null.

    ``median_seconds`` is the median per pair. ``labels_per_hour`` extrapolates the last half hour. ``eta_hours`` is the
    time for the pending labels at the pace of all annotators together."""
    with assignments.lock:
        assignments.reload_if_changed()
        data = _dashboard_data(assignments, registry, now)
    return data | _judge_agreement(assignments.run)


def _dashboard_data(assignments: AssignmentService, registry: AnnotatorRegistry, now: float) -> dict[str, Any]:
    registered = {annotator.name: annotator for annotator in registry.annotators}
    names = sorted({name for name, role in assignments.labels if role == "annotator"} | set(registered))
    rows = [_annotator_stats(assignments, name, now) for name in names]
    queued = assignments.queued
    labeled = [pair for pair in queued if assignments.votes_for(pair)]
    required = {pair: assignments.rules.required_labels(assignments.seed, pair) for pair in queued}
    due = sum(max(0, required[pair] - len(assignments.votes_for(pair))) for pair in queued)
    pace = sum(row["labels_per_hour"] for row in rows)
    disagreements = assignments.disagreements()
    return {
        "annotators": rows,
        "pairs": {"queued": len(queued), "labeled": len(labeled), "labels_due": due},
        "labels_per_hour": pace,
        "eta_hours": due / pace if pace else None,
        "agreement": annotator_agreement(assignments, names),
        "disagreements": len(disagreements),
        "adjudicated": len(assignments.adjudicated_pairs() & set(disagreements)),
        "gold_missed": _missed_gold_pairs(assignments, names),
    }


def annotator_agreement(assignments: AssignmentService, names: list[str]) -> dict[str, Any]:
    """Return Krippendorff's alpha over all pairs with several labels, and Cohen's kappa per pair of annotators.

    Compares the preferred responses, not the clicked sides. Gold pairs are excluded, because they are chosen to be
    clear."""
    units: dict[str, dict[str, str]] = {}
    for (name, role), rows in assignments.labels.items():
        if role == "annotator":
            for pair, row in rows.items():
                if row["choice"] != "skip" and pair not in assignments.gold:
                    units.setdefault(pair, {})[name] = preference_of(row)
    shared = [unit for unit in units.values() if len(unit) > 1]
    kappas = []
    for name_a, name_b in combinations(names, 2):
        choice_counts = Counter((unit[name_a], unit[name_b]) for unit in shared if name_a in unit and name_b in unit)
        if choice_counts:
            table = [[choice_counts[row, column] for column in LABELS] for row in LABELS]
            agreements = sum(count for (choice_a, choice_b), count in choice_counts.items() if choice_a == choice_b)
            kappas.append({"annotators": [name_a, name_b], "kappa": _estimate_to_json(cohen_kappa(table)),
                           "same_label": _estimate_to_json(wilson(agreements, choice_counts.total()))})  # fmt: skip
    alpha = krippendorff_alpha([list(unit.values()) for unit in shared])
    return {"alpha": _estimate_to_json(alpha), "pairs": len(shared), "kappas": kappas}


def _annotator_stats(assignments: AssignmentService, name: str, now: float) -> dict[str, Any]:
    rows = list(assignments.labels_of(Annotator(name, "annotator")).values())
    durations = [row["seconds"] for row in rows if row["seconds"] is not None]
    gold = [
        (row, assignments.gold[row["pair_id"]])
        for row in rows
        if row["pair_id"] in assignments.gold and row["choice"] != "skip"
    ]
    recent = sum(now - row["created_at"] < PACE_WINDOW_S for row in rows)
    return {
        "name": name,
        "labels": sum(row["choice"] != "skip" for row in rows),
        "skips": sum(row["choice"] == "skip" for row in rows),
        "edits": sum(row["edited_response"] is not None for row in rows),
        "left_fraction": _fraction([row["choice"] == "left" for row in rows if row["choice"] in ("left", "right")]),
        "median_seconds": median(durations) if durations else None,
        "labels_per_hour": recent * 3600.0 / PACE_WINDOW_S,
        "last_label_at": max((row["created_at"] for row in rows), default=None),
        "gold_accuracy": _estimate_to_json(
            wilson(sum(preference_of(row) == gold_row["preferred"] for row, gold_row in gold), len(gold))
        ),
    }


def _fraction(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _missed_gold_pairs(assignments: AssignmentService, names: list[str]) -> list[dict[str, Any]]:
    missed = []
    for name in names:
        for pair, row in assignments.labels_of(Annotator(name, "annotator")).items():
            gold_row = assignments.gold.get(pair)
            if gold_row and row["choice"] != "skip" and preference_of(row) != gold_row["preferred"]:
                missed.append({"annotator": name, "prompt": prompt_excerpt(gold_row), "label": preference_of(row),
                               "gold_label": gold_row["preferred"], "reason": gold_row["route_reason"]})  # fmt: skip
    return missed


def _judge_agreement(run: Run) -> dict[str, Any]:
    """Return how often annotators agree with the judges, prefer neither answer, and skip, as the report shows it."""
    import polars as pl

    from rlaif.run.human_agreement import HumanAgreement, estimate_agreement
    from rlaif.run.human_labels import human_labels

    rates = HumanAgreement(None, None, None)
    if run.pairs_path.exists():
        table = pl.scan_parquet(run.pairs_path).filter(pl.col("inclusion_probability").is_not_null())
        if "preferred_by_judges" not in table.collect_schema():  # written by an earlier version
            table = table.with_columns(preferred_by_judges="preferred")
        pairs = table.select("pair_id", "route", "inclusion_probability", "preferred_by_judges").collect()
        reviews = run.reviews()
        rates = estimate_agreement(pairs, human_labels(reviews), reviews)
    return {
        "judge_agreement": _estimate_to_json(rates.agreement),
        "tie_rate": _estimate_to_json(rates.tie_rate),
        "skip_rate": _estimate_to_json(rates.skip_rate),
    }


def prompt_excerpt(row: Row) -> str:
    """Return the start of the prompt's last turn, on one line."""
    last: Mapping[str, Any] = orjson.loads(row["prompt"])[-1]
    text = " ".join(str(last.get("content") or "").split())
    return text if len(text) <= EXCERPT_CHARS else f"{text[:EXCERPT_CHARS]}…"


def _estimate_to_json(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {
        "value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n
    }  # fmt: skip
