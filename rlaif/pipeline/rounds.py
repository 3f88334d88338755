"""Whom the judges are asked about, round by round: ratings first, then the pairs that they point to.

Prompts are taken part by part (:mod:`rlaif.run.parts`): what is asked and what is settled is the same for any number of
parts, and only the rows of one part are in memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.judge import ask as asking
from rlaif.judge import definition, refusal, without_model
from rlaif.llm.budget import Meter
from rlaif.llm.engines import Engines
from rlaif.pair import balance, select, settle
from rlaif.records import Failure
from rlaif.run import parts, tables
from rlaif.run.directory import JournalName, Run
from rlaif.run.journal import Journal, Reader
from rlaif.run.parts import Journaled, Pieces

BLOCK = 1000
"""Records that are written at once, where they come without waiting for anybody."""

# What the frames hold of each journal. There are millions of rows, so keys are numbers and words are held once.
PROMPTS = {name: tables.PROMPTS[name] for name in ("key", "prompt_id", "tags", "split")}
COMPLETIONS = tables.small(
    {name: tables.COMPLETIONS[name] for name in ("key", "prompt_id", "model", "finish_reason", "text")},
    "model", "finish_reason",
)  # fmt: skip
WORDS = ("kind", "judge", "judge_hash", "model", "order", "aspect", "label")
VERDICTS = tables.small(
    {
        name: tables.VERDICTS[name]
        for name in ("key", "prompt_id", *WORDS, "a", "b", "p_a", "score", "variance", "flags")
    },
    *WORDS,
)


def _prompts(block: pl.DataFrame) -> pl.DataFrame:
    """Without those that are held out: they measure a model, and one that was trained on them cannot be measured."""
    block = block.filter(pl.col("split").ne_missing("heldout")).drop("split")
    return block.with_columns(tables.numbers("key")).rename({"offset": "prompt_offset"})


def _completions(block: pl.DataFrame) -> pl.DataFrame:
    rest = pl.col("key").str.tail(32).str.to_integer(base=16, dtype=pl.UInt128)  # for the ids of pairs
    return select.shorten(block).with_columns(tables.numbers("key"), rest=rest)


def _verdicts(block: pl.DataFrame) -> pl.DataFrame:
    return block.with_columns(tables.numbers("key", "a", "b")).drop("offset")


def panel(config: Config) -> list[asking.Seat]:
    """The panel's seats with their judge files. Raises :class:`UsageError` with a did-you-mean."""
    return [asking.Seat(definition.find(entry.name), entry) for entry in config.panel()]


def strategy(config: Config, seats: list[asking.Seat]) -> select.Strategy:
    """The strategy asked for, or the one that the panel's kinds allow. A reward model says which of two answers is
    better as a comparing judge does; without any of these the prompts' checks have to say it."""
    kinds = {seat.judge.file.kind for seat in seats}
    rates, compares = "rate" in kinds, bool(kinds & {"compare", "reward"})
    wanted = config.judge.strategy
    if wanted == "auto":
        return "rate-then-compare" if rates and compares else "rate-only" if rates else "round-robin"
    missing = []
    if wanted in ("rate-then-compare", "rate-only") and not rates:
        missing.append("rate")
    if wanted in ("rate-then-compare", "round-robin") and not compares and seats:
        missing.append("compare")
    if missing:
        raise UsageError(
            f"strategy {wanted} needs a judge of kind {' and '.join(sorted(missing))}",
            mend="`rlaif judges list` shows the kinds; add one with --judge.",
        )
    return wanted


def _as_frames_know(seats: list[asking.Seat]) -> list[select.Judged]:
    return [
        select.Judged(
            judge=seat.judge.name,
            judge_hash=seat.judge.hash,
            model=seat.entry.model,
            weight=seat.entry.weight,
            aspects=len(seat.judge.file.aspects),
            low=seat.judge.file.scale.low,
            high=seat.judge.file.scale.high,
        )
        for seat in seats
    ]


@dataclass(frozen=True)
class Part:
    """One part of the prompts (columns prompt_id, tags, prompt_offset) and their usable answers."""

    number: int
    prompts: pl.DataFrame
    answers: pl.DataFrame

    def several(self) -> pl.DataFrame:
        """The answers that have another to stand beside. Columns: prompt_id, a, b (null)."""
        several = self.answers.filter(pl.len().over("prompt_id") >= 2)
        return several.select("prompt_id", a="key", b=pl.lit(None, pl.UInt128))

    def placed(self, wanted: pl.DataFrame) -> pl.DataFrame:
        """The byte offsets of what is wanted, prompt by prompt. Columns: prompt_offset, a_offset, b_offset."""
        offsets = self.answers.select("key", "offset")
        return (
            wanted.join(self.prompts, on="prompt_id")
            .join(offsets.rename({"key": "a", "offset": "a_offset"}), on="a")
            .join(offsets.rename({"key": "b", "offset": "b_offset"}), on="b", how="left")
            .sort("prompt_id", "a", "b")
            .select("prompt_offset", "a_offset", "b_offset")
        )


class Rounds:
    """The rounds of one judge command. Without ``engines`` and ``journal`` it only
    reads what was judged before."""

    def __init__(
        self,
        run: Run,
        config: Config,
        engines: Engines | None,
        seats: list[asking.Seat],
        how: select.Strategy,
        journal: Journal | None,
        meter: Meter,
    ) -> None:
        self.run, self.config, self.engines = run, config, engines
        self.seats, self.how, self.journal, self.meter = seats, how, journal, meter
        self.known = _as_frames_know(seats)
        self.number = parts.count(run.journal_path("completions"))
        self._told: Journaled | None = None
        self._behind = False
        self._prompts = self._journaled("prompts", PROMPTS, _prompts)
        self._answers = self._pieces()
        self.left_out: Counter[str] = Counter()
        first = self._first(config.judge.limit) if config.judge.limit else None
        completions = self._journaled("completions", COMPLETIONS, _completions)
        for number in range(self.number):
            prompts = self._prompts.read(number)
            if first is not None:
                prompts = prompts.filter(pl.col("prompt_offset") <= first)
            mine = completions.read(number).join(prompts, on="prompt_id", how="semi", maintain_order="left")
            answers, left_out = select.usable(mine)
            self.left_out.update(left_out)
            self._answers.add(number, answers)
        without_model.require_checks(run.journal_path("prompts"))

    def _journaled(self, name: JournalName, schema: dict[str, Any], reduce: Callable[..., pl.DataFrame]) -> Journaled:
        return Journaled(self.run.journal_path(name), schema, reduce, self.run.path, self.number)

    def _pieces(self) -> Pieces:
        return Pieces(self.run.path)

    def _first(self, limit: int) -> int:
        """The offset of the prompt up to which there are ``limit``."""
        offsets = [self._prompts.read(number)["prompt_offset"] for number in range(self.number)]
        return int(pl.concat(offsets).sort().head(limit).max() or 0)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Part]:
        for number in range(self.number):
            yield Part(number, self._prompts.read(number).drop("key"), self._answers.read(number))

    def all(self) -> Pieces:
        """Ask what each round needs; returns every candidate, settled over all rounds' verdicts."""
        if self.journal is not None:
            self.answered_without_a_model(self.journal, self.possible("rate"))
            self._ask("classify", self._unsure)
            self._ask("reward", Part.several)
            if self.how != "round-robin":
                self._ask("rate", Part.several)
        ranked = self._pieces()
        for part in self:
            ranked.add(part.number, self._ranked(part))
        settled = self._round(ranked, 1, None)
        for rank in range(2, self._tries() + 1):
            settled = self._round(ranked, rank, settled)
        return self._rescued(settled)  # not before: a near-tie that is kept would end its prompt's tries

    def _tries(self) -> int:
        return 1 if self.how == "rate-only" else self.config.pairs.tries

    def _ranked(self, part: Part) -> pl.DataFrame:
        """The candidates of one part, the best of each prompt first."""
        verdicts = self.verdicts(part.number)
        rated = None if self.how == "round-robin" else select.ratings(verdicts, self.known)
        return select.candidates(
            part.answers,
            rated,
            self.how,
            min_margin=self.config.pairs.min_margin,
            tries=self._tries(),
            checked=settle.checked(verdicts),
        )

    def _round(self, ranked: Pieces, rank: int, before: Pieces | None) -> Pieces:
        """Ask about the candidates of ``rank`` where those ``before`` it gave too few pairs; settles all so far."""
        wanted = self._pieces()
        for number in range(self.number):
            own = ranked.read(number).filter(pl.col("rank") == rank)
            if before is not None:
                won = before.read(number).filter("kept").group_by("prompt_id").len()
                own = own.join(won.filter(pl.col("len") >= self.config.pairs.per_prompt), on="prompt_id", how="anti")
            wanted.add(number, own)
        if before is not None and not wanted.height:
            return before
        if self.how != "rate-only":
            self._ask("compare", lambda part: self._undecided(part, wanted.read(part.number)))
        return self._settle(wanted, before)

    def _settle(self, wanted: Pieces, before: Pieces | None) -> Pieces:
        """``wanted`` and those of ``before``, settled."""
        settled, pairs = self._pieces(), self.config.pairs
        for number in range(self.number):
            candidates = wanted.read(number)
            if before is not None:
                candidates = pl.concat([before.read(number).select(candidates.columns), candidates])
            own = settle.settle(
                candidates,
                settle.comparisons(self.verdicts(number), self.known, candidates.select("a", "b")),
                self.how,
                min_probability=pairs.min_probability,
                per_prompt=pairs.per_prompt,
                min_score=pairs.min_score,
            )
            settled.add(number, own)
        return settled

    def _rescued(self, settled: Pieces) -> Pieces:
        """``settled`` with as many near-ties kept as there are too many; which of them depends on all parts."""
        share, judged, lost = self.config.pairs.max_near_ties, 0, []
        if share >= 1:
            return settled
        for number in range(self.number):
            own = settled.read(number)
            lost.append(settle.lost(own))
            judged += settle.judged(own)
        spared, rescued = settle.surest(pl.concat(lost), judged, share), self._pieces()
        for number in range(self.number):
            rescued.add(number, settle.rescue(settled.read(number), spared))
        return rescued

    def possible(self, kind: str) -> Pieces:
        """Where that lies what judges of ``kind`` may be asked about before anything is known (:meth:`Part.placed`)."""

        def pairs(part: Part) -> pl.DataFrame:
            pairs = select.all_pairs(part.answers)
            return pairs if self.how == "round-robin" else pairs.group_by("prompt_id").head(self.config.pairs.tries)

        return self._placed(pairs if kind == "compare" else Part.several)

    def _placed(self, wanted: Callable[[Part], pl.DataFrame]) -> Pieces:
        placed = self._pieces()
        for part in self:
            placed.add(part.number, part.placed(wanted(part).select("prompt_id", "a", "b")))
        return placed

    def answered_without_a_model(self, journal: Journal, several: Pieces) -> None:
        """Journal what the prompts' checks and the text classifier of refusals say of each answer."""
        self._behind = True
        prompts, answers = Reader(self.run.journal_path("prompts")), Reader(self.run.journal_path("completions"))
        try:
            found = without_model.verdicts(several.rows(), prompts.at, answers.at, journal)
            for block in iter(lambda: list(itertools.islice(found, BLOCK)), []):
                journal.append(block)
                for record in block:
                    if isinstance(record, Failure):  # counted, but no sign that a server fails
                        self.meter.failures[record.kind] += 1
                        self.meter.last_error = record.error
        finally:
            prompts.close()
            answers.close()

    def _unsure(self, part: Part) -> pl.DataFrame:
        """Answers about which the text classifier of refusals is not sure."""
        told = (pl.col("judge_hash") == refusal.HASH) & (pl.col("score") >= refusal.SURE)
        return part.several().join(self.verdicts(part.number).filter(told).select("a"), on="a", how="anti")

    def _undecided(self, part: Part, wanted: pl.DataFrame) -> pl.DataFrame:
        """Pairs that the prompts' checks do not decide."""
        pairs = select.with_checks(wanted, settle.checked(self.verdicts(part.number)))
        return pairs.filter((pl.col("check_a") == pl.col("check_b")).fill_null(True))

    def said(self, number: int, pairs: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """What each seat said of ``pairs`` (columns a, b) of a part, and what its answers were classified as."""
        verdicts = self.verdicts(number)
        return settle.by_seat(verdicts, self.known, pairs.select("a", "b")), balance.classes(verdicts)

    def verdicts(self, number: int) -> pl.DataFrame:
        """What the journal holds of a part. It is read on from where it ended after something was asked."""
        if self._told is None:
            self._told = self._journaled("verdicts", VERDICTS, _verdicts)
        elif self._behind:
            self._told.catch_up()
        self._behind = False
        return self._told.read(number).drop("key")

    def _ask(self, kind: str, wanted: Callable[[Part], pl.DataFrame]) -> None:
        seats = [seat for seat in self.seats if seat.judge.file.kind == kind]
        if self.engines is None or not seats:
            return
        placed = self._placed(wanted)
        if not placed.height:
            return
        self._behind = True
        prompts, answers = Reader(self.run.journal_path("prompts")), Reader(self.run.journal_path("completions"))
        try:
            for seat in seats:
                if self.meter.reason_to_stop():
                    return
                self._ask_seat(seat, placed, prompts, answers)
        finally:
            prompts.close()
            answers.close()

    def _ask_seat(self, seat: asking.Seat, placed: Pieces, prompts: Reader, answers: Reader) -> None:
        engines, journal = self.engines, self.journal
        assert engines is not None
        assert journal is not None
        modes: dict[str, Any] = self.run.manifest()["stages"]["judge"].get("modes", {})
        seat = replace(seat, mode=modes.get(seat.name)) if self.config.judge.verdict == "auto" else seat

        def work() -> Iterator[asking.Material]:
            for row in placed.rows():
                yield asking.Material(*row)

        owed = True
        if seat.mode:  # known from an earlier start: find out without a server whether anything is owed
            pending = asking.requests(seat, seat.mode, self.config, work(), prompts.at, answers.at)
            owed = any(request.keys[0] not in journal for request in pending)
        each = {"rate": len(seat.judge.file.aspects), "compare": 2}.get(seat.judge.file.kind, 1)
        self.meter.total = (self.meter.total or 0) + placed.height * each
        if not owed:
            self.meter.skipped += placed.height * each
            return
        self.meter.what = f"judge: {seat.name}"

        def settled(mode: str) -> None:
            self.run.update_manifest("judge", modes={**modes, seat.name: mode})

        asking.ask_seat(
            seat,
            self.config,
            work,
            prompts.at,
            answers.at,
            lambda: engines.client(seat.entry.model, seat.entry.base_url, seat.vllm(self.config), self.meter),
            journal,
            self.meter,
            settled,
        )
