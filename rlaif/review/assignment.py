"""Assign pairs to annotators and record their labels: the review page without HTTP and HTML.

Contract:
- :meth:`AssignmentService.submit_label` returns when the label is journaled and on disk. Submitting the same label
  again changes nothing.
- A pair is shown to at most as many annotators as :class:`AssignmentRules` require: a displayed pair is leased to its
  annotator and browser tab for a while. A label is always accepted, even if another annotator was faster.
- The next request sees labels that an import or another page wrote meanwhile, and pairs that judging added.
- The result of :meth:`AssignmentService.to_client` reveals no model, judge, route, or which side is ``a``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict

import orjson

from rlaif.errors import UsageError
from rlaif.records import Choice, hash_to_unit_interval
from rlaif.review.annotators import Annotator, AssignmentRules
from rlaif.review.queue import ReviewItem, latest_labels, make_item, make_review, queue_position, read_pairs, turn_text
from rlaif.web.markdown import markdown_to_safe_html, show_invisible_characters

if TYPE_CHECKING:
    from rlaif.run.journal import Journal
    from rlaif.run.run import Run

LEASE_S = 30 * 60.0
"""Seconds for which a displayed pair is reserved for its annotator."""

OWN_LEASE_S = 60.0
"""The same, towards other tabs of the annotator: the first tab may have been closed."""

Row = Mapping[str, Any]
"""A pair of ``tables/pairs.parquet``, or a label of the reviews journal, by column."""


class JudgeVerdict(TypedDict):
    """The panel's verdict on a pair: probability for the answer on the left, and why the pair was queued."""

    prob_left: float | None
    reason: str | None


class SubmitResult(TypedDict):
    """The effect of a submitted label, and the judges' verdict, which the annotator may see from now on."""

    saved: Literal["added", "changed", "unchanged"]
    judge: JudgeVerdict


class AssignmentService:
    """The state of a review: queue, leases and labels. Thread-safe. A context manager that closes the journal.

    ``rows``: every known pair by id, gold pairs included. ``queued``: ids of the pairs in the review queue.
    ``labels``: the newest label by (annotator, role) and pair id, in the order in which they were given.
    """

    def __init__(
        self,
        run: Run,
        seed: int,
        rules: AssignmentRules,
        gold: Mapping[str, Row],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run, self.seed, self.rules, self.gold = run, seed, rules, gold
        self._clock = clock
        self.lock = threading.RLock()
        self._journal: Journal | None = None
        self._reviews_stamp: object = None
        self._pairs_stamp: object = None
        self.rows: dict[str, Row] = {}
        self.queued: list[str] = []
        self._pending_by_annotator: dict[str, list[str]] = {}
        self._leases: dict[str, dict[tuple[str, str], float]] = {}
        self.labels: dict[tuple[str, str], dict[str, Row]] = {}
        self._labelers: dict[str, set[str]] = {}
        self.reload_if_changed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # State of the run

    def reload_if_changed(self) -> None:
        """Load what other processes have written since the last call."""
        with self.lock:
            pairs = _file_stamp(self.run.pairs_path)
            if pairs != self._pairs_stamp:
                # Keep pairs that have left the queue: an annotator may have one on display.
                queued = {row["pair_id"]: row for row in read_pairs(self.run).iter_rows(named=True)}
                self.queued = list(queued)
                self.rows = {**self.rows, **queued, **self.gold}
                self._pairs_stamp, self._pending_by_annotator = pairs, {}
            reviews = _file_stamp(self.run.journal_path("reviews"))
            if reviews != self._reviews_stamp:
                self._read_reviews()
                self._reviews_stamp = reviews

    def _read_reviews(self) -> None:
        self.labels, self._labelers, self._pending_by_annotator = {}, {}, {}
        for row in latest_labels(self.run.reviews()).iter_rows(named=True):
            self._index_label(row)

    def _index_label(self, row: Row) -> None:
        own_labels = self.labels.setdefault((row["annotator"], row["role"]), {})
        own_labels.pop(row["pair_id"], None)  # keeps the newest label last
        own_labels[row["pair_id"]] = row
        labelers = self._labelers.setdefault(row["pair_id"], set())
        if row["choice"] == "skip":
            labelers.discard(row["annotator"])
        elif row["role"] == "annotator":
            labelers.add(row["annotator"])

    def labels_of(self, annotator: Annotator) -> dict[str, Row]:
        """Return the annotator's newest label per pair id, the newest label last."""
        return self.labels.setdefault((annotator.name, annotator.role), {})

    # Assignment

    def next_pairs(self, annotator: Annotator, tab: str, loaded: Collection[str], count: int) -> list[dict[str, Any]]:
        """Lease and return up to ``count`` more pairs for ``annotator``. ``loaded``: ids that ``tab`` already has."""
        with self.lock:
            self.reload_if_changed()
            for pair_id in loaded:
                self._lease_pair(pair_id, annotator, tab)
            rows = self._choose_pairs(annotator, tab, set(loaded), count)
        # Outside the lock: rendering a long answer takes a moment.
        return [self.to_client(row, annotator) for row in rows]

    def _choose_pairs(self, annotator: Annotator, tab: str, loaded: set[str], count: int) -> list[Row]:
        own_labels = self.labels_of(annotator)
        if annotator.is_lead:
            unresolved = [pair for pair in self.disagreements() if pair not in own_labels and pair not in loaded]
            return [self.rows[pair] for pair in unresolved[:count]]
        leased = [pair for pair in self._leased_by(annotator, tab) if pair not in loaded and pair not in own_labels]
        chosen = leased[:count]
        while len(chosen) < count:
            excluded = loaded | set(chosen)
            pair = self._pick_pair(annotator, tab, excluded, nth=len(own_labels) + len(excluded))
            if pair is None:
                break
            self._lease_pair(pair, annotator, tab)
            chosen.append(pair)
        return [self.rows[pair] for pair in chosen]

    def _pick_pair(self, annotator: Annotator, tab: str, excluded: set[str], *, nth: int) -> str | None:
        """Return the next pair in the annotator's own order, or None.

        At random, a gold pair comes first, or a pair that another annotator has labeled and that needs one more label:
        otherwise annotators who stop early would share no pair. ``nth`` numbers the random draws."""
        own_labels, rules = self.labels_of(annotator), self.rules
        if hash_to_unit_interval(self.seed, "gold", annotator.name, nth) < rules.gold_fraction:
            remaining = [pair for pair in self.gold if pair not in own_labels and pair not in excluded]
            if remaining:
                return min(remaining, key=lambda pair: queue_position(self.seed, pair, annotator.name))
        pending = [pair for pair in self._pending_for(annotator) if pair not in excluded and pair not in own_labels]
        if hash_to_unit_interval(self.seed, "second", annotator.name, nth) < rules.extra_label_fraction:
            for pair in pending:
                if self._labelers.get(pair) and self._needs_more_labels(pair, annotator, tab):
                    return pair
        return next((pair for pair in pending if self._needs_more_labels(pair, annotator, tab)), None)

    def _pending_for(self, annotator: Annotator) -> list[str]:
        """Return the queue in the annotator's own order, from the first pair that may need the annotator's label."""
        if annotator.name not in self._pending_by_annotator:
            self._pending_by_annotator[annotator.name] = sorted(
                self.queued, key=lambda pair: queue_position(self.seed, pair, annotator.name)
            )
        own_labels = self.labels_of(annotator)
        # Drop the pairs at the front that need no label from this annotator, so that they are not checked again.
        pending = self._pending_by_annotator[annotator.name]
        finished = 0
        while finished < len(pending) and (
            pending[finished] in own_labels or self._has_enough_labels(pending[finished], annotator)
        ):
            finished += 1
        del pending[:finished]
        return pending

    def _has_enough_labels(self, pair: str, annotator: Annotator) -> bool:
        other_labelers = self._labelers.get(pair, set()) - {annotator.name}
        return bool(other_labelers) and len(other_labelers) >= self.rules.required_labels(self.seed, pair)

    def _needs_more_labels(self, pair: str, annotator: Annotator, tab: str) -> bool:
        """Return True if ``pair`` needs a label in addition to those of the annotators who have it on display."""
        now, viewers = self._clock(), set()
        for (name, other_tab), expires_at in self._leases.get(pair, {}).items():
            if name != annotator.name and expires_at > now:
                viewers.add(name)
            elif name == annotator.name and other_tab != tab and expires_at - LEASE_S + OWN_LEASE_S > now:
                return False
        labelers = self._labelers.get(pair, set()) - {annotator.name}
        return len(labelers | viewers) < self.rules.required_labels(self.seed, pair)

    def _lease_pair(self, pair: str, annotator: Annotator, tab: str) -> None:
        if pair in self.rows:
            self._leases.setdefault(pair, {})[(annotator.name, tab)] = self._clock() + LEASE_S

    def _leased_by(self, annotator: Annotator, tab: str) -> list[str]:
        holder, now = (annotator.name, tab), self._clock()
        return [pair for pair, leases in self._leases.items() if leases.get(holder, 0) > now]

    # Display

    def to_client(self, row: Row, annotator: Annotator) -> dict[str, Any]:
        """Return a pair for the browser: texts, the annotator's own label, and for the lead all annotators' labels."""
        item = make_item(row, annotator=annotator.name, seed=self.seed)
        turns = [{"role": turn["role"], **_text_and_html(turn_text(turn))} for turn in orjson.loads(row["prompt"])]
        own_label = self.labels_of(annotator).get(item.pair_id)
        data: dict[str, Any] = {
            "id": item.pair_id,
            "turns": turns,
            "left": _text_and_html(item.left),
            "right": _text_and_html(item.right),
        }
        if own_label:
            data["own_label"] = {
                name: own_label[name] for name in ("choice", "comment", "edited_response", "confidence")
            }
        if annotator.is_lead:
            with self.lock:
                data["votes"] = [_vote_to_client(vote, item) for vote in self.votes_for(item.pair_id)]
        return data

    def get_pair(self, annotator: Annotator, pair_id: str) -> dict[str, Any]:
        """Return a pair that the annotator reopens. Raises :class:`UsageError` if it is unknown."""
        with self.lock:
            self.reload_if_changed()
            row = self._require_row(pair_id)
        return self.to_client(row, annotator)

    def labeled_pairs(self, annotator: Annotator) -> list[str]:
        """Return the ids of the pairs that the annotator has labeled, the newest last."""
        with self.lock:
            return [pair for pair in self.labels_of(annotator) if pair in self.rows]

    def _require_row(self, pair_id: str) -> Row:
        if pair_id not in self.rows:
            raise UsageError(f"unknown pair {pair_id!r}", hint="Reload the page: the pairs were rebuilt.")
        return self.rows[pair_id]

    # Labels

    def submit_label(
        self,
        annotator: Annotator,
        pair_id: str,
        choice: Choice,
        *,
        comment: str = "",
        edited_response: str | None = None,
        confidence: int | None = None,
        seconds: float | None = None,
    ) -> SubmitResult:
        """Journal a label and return the judges' verdict, in the annotator's left and right.

        Raises :class:`UsageError` if the pair is unknown, :class:`RunError` if another process is writing labels."""
        with self.lock, self.run.lock("reviews"):
            row = self._require_row(pair_id)
            journal = self._open_journal()
            item = make_item(row, annotator=annotator.name, seed=self.seed)
            previous = self.labels_of(annotator).get(pair_id)
            record = make_review(
                item,
                annotator=annotator.name,
                role=annotator.role,
                choice=choice,
                comment=comment,
                edited_response=edited_response,
                confidence=confidence,
                seconds=seconds,
                previous=previous,
            )
            if record:
                journal.append([record])
                journal.sync()
                self._index_label(record.model_dump())
            self._reviews_stamp = _file_stamp(self.run.journal_path("reviews"))
            self._release_leases(pair_id, annotator)
            saved: Literal["added", "changed", "unchanged"] = (
                "unchanged" if not record else "changed" if previous else "added"
            )
            return {"saved": saved, "judge": _judge_verdict(row, item)}

    def _open_journal(self) -> Journal:
        """Return the open reviews journal. Reopens it if another process wrote to it, perhaps leaving a torn line."""
        if self._journal is None or _file_stamp(self.run.journal_path("reviews")) != self._reviews_stamp:
            self.close()
            self._journal = self.run.journal("reviews")
            self._read_reviews()
        return self._journal

    def _release_leases(self, pair_id: str, annotator: Annotator) -> None:
        leases = self._leases.pop(pair_id, {})
        self._leases[pair_id] = {
            holder: expires_at for holder, expires_at in leases.items() if holder[0] != annotator.name
        }

    def close(self) -> None:
        with self.lock:
            if self._journal:
                self._journal.close()
                self._journal = None

    # Aggregates

    def votes_for(self, pair_id: str) -> list[Row]:
        """Return the newest label of every annotator for a pair, without skips."""
        return [rows[pair_id] for (_, role), rows in self.labels.items()
                if role == "annotator" and pair_id in rows and rows[pair_id]["choice"] != "skip"]  # fmt: skip

    def disagreements(self) -> list[str]:
        """Return the ids of the pairs on which annotators disagree, without gold pairs.

        Sorted by id, an order that carries no information."""
        split = [
            pair
            for pair, labelers in self._labelers.items()
            if len(labelers) > 1
            and pair in self.rows
            and pair not in self.gold
            and len({preference_of(vote) for vote in self.votes_for(pair)}) > 1
        ]
        return sorted(split)

    def adjudicated_pairs(self) -> set[str]:
        """Return the ids of the pairs that the lead has decided."""
        return {pair for (_, role), rows in self.labels.items() if role == "adjudicator"
                for pair, row in rows.items() if row["choice"] != "skip"}  # fmt: skip

    def progress(self, annotator: Annotator) -> dict[str, int]:
        """Return ``done``: pairs the annotator has labeled or skipped, and ``remaining``: pairs that may still come."""
        with self.lock:
            own_labels = self.labels_of(annotator)
            if annotator.is_lead:
                return {
                    "done": len(own_labels),
                    "remaining": sum(pair not in own_labels for pair in self.disagreements()),
                }
            remaining = sum(
                pair not in own_labels and not self._has_enough_labels(pair, annotator)
                for pair in self._pending_for(annotator)
            )
            return {"done": len(own_labels), "remaining": remaining}


def preference_of(row: Row) -> str:
    """Return the label independently of the displayed sides: a, b, tie, both_bad or skip."""
    return str(row["preferred"] or row["choice"])


def _vote_to_client(vote: Row, item: ReviewItem) -> dict[str, Any]:
    side = vote["preferred"]
    choice = vote["choice"] if side is None else "left" if side == item.left_side else "right"
    return {"annotator": vote["annotator"], "choice": choice, "comment": vote["comment"] or "",
            "edited_response": vote["edited_response"], "confidence": vote["confidence"]}  # fmt: skip


def _judge_verdict(row: Row, item: ReviewItem) -> JudgeVerdict:
    prob_a = row["prob_a"]
    prob_left = None if prob_a is None else prob_a if item.left_side == "a" else 1.0 - prob_a
    # A gold pair has no verdict, and only the lead may see its known label.
    reason = None if row["route"] == "gold" else f"{row['route']}: {row['route_reason']}"
    return {"prob_left": prob_left, "reason": reason}


@lru_cache(maxsize=512)
def _cached_html(text: str) -> str | None:
    return markdown_to_safe_html(text)


def _text_and_html(text: str) -> dict[str, Any]:
    """Return the text and its HTML; ``html`` is None if the text is too long to format."""
    return {"text": show_invisible_characters(text), "html": _cached_html(text)}


def _file_stamp(path: Path) -> object:
    """Return a value that changes when the file does, or None if the file does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns if path.suffix == ".parquet" else 0
