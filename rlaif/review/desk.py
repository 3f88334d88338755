"""What is shown to whom, and what becomes of a choice: the review page without its page.

Contract: :meth:`Desk.submit` returns once the label is in the journal and on the disk; the same label given again
changes nothing. A pair goes to at most as many people as :class:`Rules` want: what somebody is looking at is kept for
them (for a while, by browser tab), and a label is always taken, also when somebody else was faster. Labels that an
import or another page has written meanwhile, and pairs that a night of judging has added, are seen at the next request.
Nothing that :meth:`Desk.shown` returns tells a model, a judge, a route, or which side is ``a``.
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
from rlaif.records import Choice, unit_interval
from rlaif.review.people import Person, Rules
from rlaif.review.queue import Item, item, label, newest, place, read_pairs, turn_text
from rlaif.review.render import to_html, visible

if TYPE_CHECKING:
    from rlaif.run.directory import Run
    from rlaif.run.journal import Journal

LEASE_S = 30 * 60.0
"""How long a pair that was shown and not labelled is kept for whom it was shown to."""

OWN_LEASE_S = 60.0
"""The same towards the person's own other tabs, which may have been closed."""

Row = Mapping[str, Any]


class Desk:
    def __init__(self, run: Run, seed: int, rules: Rules, gold: Mapping[str, Row], clock: Any = time.time) -> None:
        self.run, self.seed, self.rules, self.gold = run, seed, rules, gold
        self._clock = clock
        self.lock = threading.RLock()
        self._journal: Journal | None = None
        self._reviews_seen: object = None
        self._pairs_seen: object = None
        self.rows: dict[str, Row] = {}
        self.queued: list[str] = []
        self._waiting: dict[str, list[str]] = {}
        self._leases: dict[str, dict[tuple[str, str], float]] = {}
        self.labels: dict[tuple[str, str], dict[str, Row]] = {}
        self._people: dict[str, set[str]] = {}
        self.catch_up()

    # What is in the run

    def catch_up(self) -> None:
        """See what other processes have written since."""
        with self.lock:
            pairs = _stamp(self.run.pairs_path)
            if pairs != self._pairs_seen:
                # Pairs that have left the queue stay known: somebody may be looking at one.
                queued = {row["pair_id"]: row for row in read_pairs(self.run).iter_rows(named=True)}
                self.queued = list(queued)
                self.rows = {**self.rows, **queued, **self.gold}
                self._pairs_seen, self._waiting = pairs, {}
            reviews = _stamp(self.run.journal_path("reviews"))
            if reviews != self._reviews_seen:
                self._read_reviews()
                self._reviews_seen = reviews

    def _read_reviews(self) -> None:
        self.labels, self._people, self._waiting = {}, {}, {}
        for row in newest(self.run.reviews()).iter_rows(named=True):
            self._note(row)

    def _note(self, row: Row) -> None:
        own = self.labels.setdefault((row["annotator"], row["role"]), {})
        own.pop(row["pair_id"], None)  # the newest label comes last
        own[row["pair_id"]] = row
        people = self._people.setdefault(row["pair_id"], set())
        if row["choice"] == "skip":
            people.discard(row["annotator"])
        elif row["role"] == "annotator":
            people.add(row["annotator"])

    def of(self, person: Person) -> dict[str, Row]:
        return self.labels.setdefault((person.name, person.role), {})

    # What comes next

    def next(self, person: Person, tab: str, have: Collection[str], count: int) -> list[dict[str, Any]]:
        """Up to ``count`` more pairs for ``person`` in ``tab`` which already has ``have``, and keeps them."""
        with self.lock:
            self.catch_up()
            for pair_id in have:
                self._lease(pair_id, person, tab)
            rows = self._choose(person, tab, set(have), count)
        return [self.shown(row, person) for row in rows]  # a long answer takes a moment, and others want the lock

    def _choose(self, person: Person, tab: str, have: set[str], count: int) -> list[Row]:
        mine = self.of(person)
        if person.is_lead:
            open_ = [pair for pair in self.disagreements() if pair not in mine and pair not in have]
            return [self.rows[pair] for pair in open_[:count]]
        chosen = [pair for pair in self._leased_by(person, tab) if pair not in have and pair not in mine][:count]
        while len(chosen) < count:
            taken = have | set(chosen)
            pair = self._pick(person, tab, taken, nth=len(mine) + len(taken))
            if pair is None:
                break
            self._lease(pair, person, tab)
            chosen.append(pair)
        return [self.rows[pair] for pair in chosen]

    def _pick(self, person: Person, tab: str, taken: set[str], *, nth: int) -> str | None:
        """The next pair by the annotator's own order. Now and then a gold pair comes first, or one that somebody else
        has labelled and that a second person is wanted for: otherwise people who stop early share no pair at all."""
        mine, rules = self.of(person), self.rules
        if unit_interval(self.seed, "gold", person.name, nth) < rules.gold_share:
            left = [pair for pair in self.gold if pair not in mine and pair not in taken]
            if left:
                return min(left, key=lambda pair: place(self.seed, pair, person.name))
        new = [pair for pair in self._waiting_for(person) if pair not in taken and pair not in mine]
        second = (pair for pair in new if self._people.get(pair) and self._is_free(pair, person, tab))
        if unit_interval(self.seed, "second", person.name, nth) < rules.overlap and (pair := next(second, None)):
            return pair
        return next((pair for pair in new if self._is_free(pair, person, tab)), None)

    def _waiting_for(self, person: Person) -> list[str]:
        if person.name not in self._waiting:
            self._waiting[person.name] = sorted(self.queued, key=lambda pair: place(self.seed, pair, person.name))
        mine = self.of(person)
        # What this person has labelled or enough others have is behind us for good.
        waiting = self._waiting[person.name]
        done = 0
        while done < len(waiting) and (waiting[done] in mine or self._is_full(waiting[done], person)):
            done += 1
        del waiting[:done]
        return waiting

    def _is_full(self, pair: str, person: Person) -> bool:
        others = self._people.get(pair, set()) - {person.name}
        return bool(others) and len(others) >= self.rules.wanted(self.seed, pair)

    def _is_free(self, pair: str, person: Person, tab: str) -> bool:
        """Whether ``pair`` still wants a label when those who are looking at it have given theirs."""
        now, looking = self._clock(), set()
        for (name, other), until in self._leases.get(pair, {}).items():
            if name != person.name and until > now:
                looking.add(name)
            elif name == person.name and other != tab and until - LEASE_S + OWN_LEASE_S > now:
                return False
        people = self._people.get(pair, set()) - {person.name}
        return len(people | looking) < self.rules.wanted(self.seed, pair)

    def _lease(self, pair: str, person: Person, tab: str) -> None:
        if pair in self.rows:
            self._leases.setdefault(pair, {})[(person.name, tab)] = self._clock() + LEASE_S

    def _leased_by(self, person: Person, tab: str) -> list[str]:
        holder, now = (person.name, tab), self._clock()
        return [pair for pair, leases in self._leases.items() if leases.get(holder, 0) > now]

    # What is shown

    def shown(self, row: Row, person: Person) -> dict[str, Any]:
        """A pair as the browser gets it: texts, this person's own label, and for the lead what people said."""
        it = item(row, annotator=person.name, seed=self.seed)
        turns = [{"role": turn["role"], **_text(turn_text(turn))} for turn in orjson.loads(row["prompt"])]
        mine = self.of(person).get(it.pair_id)
        found: dict[str, Any] = {"id": it.pair_id, "turns": turns, "left": _text(it.left), "right": _text(it.right)}
        if mine:
            found["mine"] = {name: mine[name] for name in ("choice", "comment", "edited", "sure")}
        if person.is_lead:
            with self.lock:
                found["votes"] = [_vote(vote, it) for vote in self.votes(it.pair_id)]
        return found

    def one(self, person: Person, pair_id: str) -> dict[str, Any]:
        """A pair that ``person`` goes back to."""
        with self.lock:
            self.catch_up()
            row = self._row(pair_id)
        return self.shown(row, person)

    def history(self, person: Person) -> list[str]:
        """The pairs that ``person`` labelled, the newest last."""
        with self.lock:
            return [pair for pair in self.of(person) if pair in self.rows]

    def _row(self, pair_id: str) -> Row:
        if pair_id not in self.rows:
            raise UsageError(f"unknown pair {pair_id!r}", mend="The pairs were made anew since: reload the page.")
        return self.rows[pair_id]

    # What was said

    def submit(
        self, person: Person, pair_id: str, choice: Choice, *, comment: str = "", edited: str | None = None,
        sure: int | None = None, seconds: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Journal a label. Returns what the judges thought, seen from this person's sides: the choice is made."""
        with self.lock, self.run.writing("reviews"):
            row = self._row(pair_id)
            # Only what another process wrote makes the journal be read again; it may have left a torn line, too.
            if self._journal is None or _stamp(self.run.journal_path("reviews")) != self._reviews_seen:
                self.close()
                self._journal = self.run.journal("reviews")
                self._read_reviews()
            it = item(row, annotator=person.name, seed=self.seed)
            before = self.of(person).get(pair_id)
            record = label(it, annotator=person.name, role=person.role, choice=choice, comment=comment, edited=edited,
                           sure=sure, seconds=seconds, before=before)  # fmt: skip
            if record:
                self._journal.append([record])
                self._journal.sync()
                self._note(record.model_dump())
            self._reviews_seen = _stamp(self.run.journal_path("reviews"))
            leases = self._leases.pop(pair_id, {})
            self._leases[pair_id] = {holder: until for holder, until in leases.items() if holder[0] != person.name}
            return {"saved": "unchanged" if not record else "changed" if before else "added", "judge": _judge(row, it)}

    def close(self) -> None:
        with self.lock:
            if self._journal:
                self._journal.close()
                self._journal = None

    # For the lead

    def votes(self, pair_id: str) -> list[Row]:
        """The newest label of every annotator for a pair, skips left out."""
        return [rows[pair_id] for (_, role), rows in self.labels.items()
                if role == "annotator" and pair_id in rows and rows[pair_id]["choice"] != "skip"]  # fmt: skip

    def disagreements(self) -> list[str]:
        """Pairs that people label differently, gold pairs left out, in an order that says nothing."""
        split = [pair for pair, people in self._people.items() if len(people) > 1 and pair in self.rows
                 and pair not in self.gold and len({said(vote) for vote in self.votes(pair)}) > 1]  # fmt: skip
        return sorted(split)

    def adjudicated(self) -> set[str]:
        return {pair for (_, role), rows in self.labels.items() if role == "adjudicator"
                for pair, row in rows.items() if row["choice"] != "skip"}  # fmt: skip

    def progress(self, person: Person) -> dict[str, int]:
        """``done``: pairs this person has labelled (skips too). ``left``: those that still may come."""
        with self.lock:
            mine = self.of(person)
            if person.is_lead:
                return {"done": len(mine), "left": sum(pair not in mine for pair in self.disagreements())}
            left = sum(pair not in mine and not self._is_full(pair, person) for pair in self._waiting_for(person))
            return {"done": len(mine), "left": left}


def said(row: Row) -> str:
    """What a label says of the pair, whichever side was on the left: a, b, tie, both_bad or skip."""
    return str(row["preferred"] or row["choice"])


def _vote(vote: Row, it: Item) -> dict[str, Any]:
    side = vote["preferred"]
    choice = vote["choice"] if side is None else "left" if side == it.left_is else "right"
    return {"annotator": vote["annotator"], "choice": choice, "comment": vote["comment"] or "",
            "edited": vote["edited"], "sure": vote["sure"]}  # fmt: skip


def _judge(row: Row, it: Item) -> dict[str, Any]:
    p_a = row["p_a"]
    p_left = None if p_a is None else p_a if it.left_is == "a" else 1.0 - p_a
    # A gold pair has no verdict, and its known label is for the lead.
    reason = None if row["route"] == "gold" else f"{row['route']}: {row['route_reason']}"
    return {"p_left": p_left, "reason": reason}


@lru_cache(maxsize=512)
def _html(text: str) -> str | None:
    return to_html(text)


def _text(text: str) -> dict[str, Any]:
    """``html`` is null where the text is too long for Markdown."""
    return {"text": visible(text), "html": _html(text)}


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns if path.suffix == ".parquet" else 0
