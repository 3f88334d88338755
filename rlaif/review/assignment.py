"""What is shown to whom, and what becomes of a choice: the review page without its page.

Contract: :meth:`AssignmentService.submit_label` returns once the label is in the journal and on the disk; the same
label given again changes nothing. A pair goes to at most as many people as :class:`AssignmentRules` want: what somebody
is looking at is kept for them (for a while, by browser tab), and a label is always taken, also when somebody else was
faster. Labels that an import or another page has written meanwhile, and pairs that a night of judging has added, are
seen at the next request. Nothing that :meth:`AssignmentService.to_client` returns tells a model, a judge, a route, or
which side is ``a``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
"""How long a pair that was shown and not labelled is kept for whom it was shown to."""

OWN_LEASE_S = 60.0
"""The same towards the person's own other tabs, which may have been closed."""

Row = Mapping[str, Any]


class AssignmentService:
    def __init__(
        self, run: Run, seed: int, rules: AssignmentRules, gold: Mapping[str, Row], clock: Any = time.time
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

    # What is in the run

    def reload_if_changed(self) -> None:
        """See what other processes have written since."""
        with self.lock:
            pairs = _file_stamp(self.run.pairs_path)
            if pairs != self._pairs_stamp:
                # Pairs that have left the queue stay known: somebody may be looking at one.
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
        own_labels.pop(row["pair_id"], None)  # the newest label comes last
        own_labels[row["pair_id"]] = row
        labelers = self._labelers.setdefault(row["pair_id"], set())
        if row["choice"] == "skip":
            labelers.discard(row["annotator"])
        elif row["role"] == "annotator":
            labelers.add(row["annotator"])

    def labels_of(self, annotator: Annotator) -> dict[str, Row]:
        return self.labels.setdefault((annotator.name, annotator.role), {})

    # What comes next

    def next_pairs(self, annotator: Annotator, tab: str, loaded: Collection[str], count: int) -> list[dict[str, Any]]:
        """Up to ``count`` more pairs for ``person`` in ``tab`` which already has ``have``, and keeps them."""
        with self.lock:
            self.reload_if_changed()
            for pair_id in loaded:
                self._lease_pair(pair_id, annotator, tab)
            rows = self._choose_pairs(annotator, tab, set(loaded), count)
        return [
            self.to_client(row, annotator) for row in rows
        ]  # a long answer takes a moment, and others want the lock

    def _choose_pairs(self, annotator: Annotator, tab: str, loaded: set[str], count: int) -> list[Row]:
        own_labels = self.labels_of(annotator)
        if annotator.is_lead:
            open_ = [pair for pair in self.disagreements() if pair not in own_labels and pair not in loaded]
            return [self.rows[pair] for pair in open_[:count]]
        chosen = [pair for pair in self._leased_by(annotator, tab) if pair not in loaded and pair not in own_labels][
            :count
        ]
        while len(chosen) < count:
            excluded = loaded | set(chosen)
            pair = self._pick_pair(annotator, tab, excluded, nth=len(own_labels) + len(excluded))
            if pair is None:
                break
            self._lease_pair(pair, annotator, tab)
            chosen.append(pair)
        return [self.rows[pair] for pair in chosen]

    def _pick_pair(self, annotator: Annotator, tab: str, excluded: set[str], *, nth: int) -> str | None:
        """The next pair by the annotator's own order. Now and then a gold pair comes first, or one that somebody else
        has labelled and that a second person is wanted for: otherwise people who stop early share no pair at all."""
        own_labels, rules = self.labels_of(annotator), self.rules
        if hash_to_unit_interval(self.seed, "gold", annotator.name, nth) < rules.gold_fraction:
            remaining = [pair for pair in self.gold if pair not in own_labels and pair not in excluded]
            if remaining:
                return min(remaining, key=lambda pair: queue_position(self.seed, pair, annotator.name))
        new = [pair for pair in self._pending_for(annotator) if pair not in excluded and pair not in own_labels]
        second = (pair for pair in new if self._labelers.get(pair) and self._needs_more_labels(pair, annotator, tab))
        if hash_to_unit_interval(self.seed, "second", annotator.name, nth) < rules.extra_label_fraction and (
            pair := next(second, None)
        ):
            return pair
        return next((pair for pair in new if self._needs_more_labels(pair, annotator, tab)), None)

    def _pending_for(self, annotator: Annotator) -> list[str]:
        if annotator.name not in self._pending_by_annotator:
            self._pending_by_annotator[annotator.name] = sorted(
                self.queued, key=lambda pair: queue_position(self.seed, pair, annotator.name)
            )
        own_labels = self.labels_of(annotator)
        # What this person has labelled or enough others have is behind us for good.
        pending = self._pending_by_annotator[annotator.name]
        settled_count = 0
        while settled_count < len(pending) and (
            pending[settled_count] in own_labels or self._has_enough_labels(pending[settled_count], annotator)
        ):
            settled_count += 1
        del pending[:settled_count]
        return pending

    def _has_enough_labels(self, pair: str, annotator: Annotator) -> bool:
        other_labelers = self._labelers.get(pair, set()) - {annotator.name}
        return bool(other_labelers) and len(other_labelers) >= self.rules.required_labels(self.seed, pair)

    def _needs_more_labels(self, pair: str, annotator: Annotator, tab: str) -> bool:
        """Whether ``pair`` still wants a label when those who are looking at it have given theirs."""
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

    # What is shown

    def to_client(self, row: Row, annotator: Annotator) -> dict[str, Any]:
        """A pair as the browser gets it: texts, this person's own label, and for the lead what people said."""
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
        """A pair that ``person`` goes back to."""
        with self.lock:
            self.reload_if_changed()
            row = self._require_row(pair_id)
        return self.to_client(row, annotator)

    def labeled_pairs(self, annotator: Annotator) -> list[str]:
        """The pairs that ``person`` labelled, the newest last."""
        with self.lock:
            return [pair for pair in self.labels_of(annotator) if pair in self.rows]

    def _require_row(self, pair_id: str) -> Row:
        if pair_id not in self.rows:
            raise UsageError(f"unknown pair {pair_id!r}", hint="The pairs were made anew since: reload the page.")
        return self.rows[pair_id]

    # What was said

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
    ) -> dict[str, Any]:
        """Journal a label. Returns what the judges thought, seen from this person's sides: the choice is made."""
        with self.lock, self.run.lock("reviews"):
            row = self._require_row(pair_id)
            # Only what another process wrote makes the journal be read again; it may have left a torn line, too.
            if self._journal is None or _file_stamp(self.run.journal_path("reviews")) != self._reviews_stamp:
                self.close()
                self._journal = self.run.journal("reviews")
                self._read_reviews()
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
                self._journal.append([record])
                self._journal.sync()
                self._index_label(record.model_dump())
            self._reviews_stamp = _file_stamp(self.run.journal_path("reviews"))
            leases = self._leases.pop(pair_id, {})
            self._leases[pair_id] = {
                holder: expires_at for holder, expires_at in leases.items() if holder[0] != annotator.name
            }
            return {
                "saved": "unchanged" if not record else "changed" if previous else "added",
                "judge": _judge_opinion(row, item),
            }

    def close(self) -> None:
        with self.lock:
            if self._journal:
                self._journal.close()
                self._journal = None

    # For the lead

    def votes_for(self, pair_id: str) -> list[Row]:
        """The newest label of every annotator for a pair, skips left out."""
        return [rows[pair_id] for (_, role), rows in self.labels.items()
                if role == "annotator" and pair_id in rows and rows[pair_id]["choice"] != "skip"]  # fmt: skip

    def disagreements(self) -> list[str]:
        """Pairs that people label differently, gold pairs left out, in an order that says nothing."""
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
        return {pair for (_, role), rows in self.labels.items() if role == "adjudicator"
                for pair, row in rows.items() if row["choice"] != "skip"}  # fmt: skip

    def progress(self, annotator: Annotator) -> dict[str, int]:
        """``done``: pairs this person has labelled (skips too). ``remaining``: those that still may come."""
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
    """What a label says of the pair, whichever side was on the left: a, b, tie, both_bad or skip."""
    return str(row["preferred"] or row["choice"])


def _vote_to_client(vote: Row, item: ReviewItem) -> dict[str, Any]:
    side = vote["preferred"]
    choice = vote["choice"] if side is None else "left" if side == item.left_side else "right"
    return {"annotator": vote["annotator"], "choice": choice, "comment": vote["comment"] or "",
            "edited_response": vote["edited_response"], "confidence": vote["confidence"]}  # fmt: skip


def _judge_opinion(row: Row, item: ReviewItem) -> dict[str, Any]:
    prob_a = row["prob_a"]
    prob_left = None if prob_a is None else prob_a if item.left_side == "a" else 1.0 - prob_a
    # A gold pair has no verdict, and its known label is for the lead.
    reason = None if row["route"] == "gold" else f"{row['route']}: {row['route_reason']}"
    return {"prob_left": prob_left, "reason": reason}


@lru_cache(maxsize=512)
def _cached_html(text: str) -> str | None:
    return markdown_to_safe_html(text)


def _text_and_html(text: str) -> dict[str, Any]:
    """``html`` is null where the text is too long for Markdown."""
    return {"text": show_invisible_characters(text), "html": _cached_html(text)}


def _file_stamp(path: Path) -> object:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns if path.suffix == ".parquet" else 0
