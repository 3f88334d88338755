"""Whom the judges are asked about, round by round: ratings first, then the pairs that they point to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import polars as pl

from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.judge import ask as asking
from rlaif.judge import definition, refusal, without_model
from rlaif.llm.budget import Meter
from rlaif.llm.server import Engines
from rlaif.pair import balance, select, settle
from rlaif.records import Failure
from rlaif.run import tables
from rlaif.run.directory import Run
from rlaif.run.journal import Journal, Reader

BLOCK = 1000
"""Records that are written at once, where they come without waiting for anybody."""

# What the frames hold of each journal. There are millions of rows, so keys are numbers and words are held once.
PROMPTS = tables.small({name: tables.PROMPTS[name] for name in ("key", "prompt_id", "tags")}, "prompt_id")
COMPLETIONS = tables.small(
    {name: tables.COMPLETIONS[name] for name in ("key", "prompt_id", "model", "finish_reason", "text")},
    "prompt_id", "model", "finish_reason",
)  # fmt: skip
WORDS = ("kind", "judge", "judge_hash", "model", "prompt_id", "order", "aspect", "label")
VERDICTS = tables.small(
    {name: tables.VERDICTS[name] for name in ("key", *WORDS, "a", "b", "p_a", "score", "variance", "flags")}, *WORDS
)


def _prompts(block: pl.DataFrame) -> pl.DataFrame:
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
        self._read: pl.DataFrame | None = None
        self.prompts = tables.scan(run.journal_path("prompts"), PROMPTS, _prompts).drop("key")
        self.answers, self.left_out = select.usable(
            tables.scan(run.journal_path("completions"), COMPLETIONS, _completions)
        )
        if config.judge.limit:
            self.answers = self.answers.join(self.prompts.head(config.judge.limit), on="prompt_id", how="semi")
        self.offsets = self.answers.select("key", "offset")
        without_model.require_checks(run.journal_path("prompts"))

    def all(self) -> pl.DataFrame:
        """Ask what each round needs; returns every candidate, settled over all rounds' verdicts."""
        several = self.possible("rate")
        if self.journal is not None:
            self.answered_without_a_model(self.journal, several)
        self._ask("classify", self._unsure(several))
        self._ask("reward", several)
        rated = None
        if self.how != "round-robin":
            self._ask("rate", several)
            rated = select.ratings(self._verdicts(), self.known)
        self.checked = settle.checked(self._verdicts())
        pairs = self.config.pairs
        tries = 1 if self.how == "rate-only" else pairs.tries
        ranked = select.candidates(
            self.answers, rated, self.how, min_margin=pairs.min_margin, tries=tries, checked=self.checked
        )
        asked, settled = ranked.clear(), self._settle(ranked.clear())
        for rank in range(1, tries + 1):
            won = settled.filter("kept").group_by("prompt_id").len().filter(pl.col("len") >= pairs.per_prompt)
            wanted = ranked.filter(pl.col("rank") == rank).join(won, on="prompt_id", how="anti")
            if wanted.is_empty():
                break
            if self.how != "rate-only":
                self._ask("compare", self._undecided(wanted))
            asked = pl.concat([asked, wanted])
            settled = self._settle(asked)
        return settled

    def possible(self, kind: str) -> pl.DataFrame:
        """What judges of ``kind`` may be asked about before anything is known. Columns: prompt_id, a, b."""
        if kind != "compare":
            several = self.answers.filter(pl.len().over("prompt_id") >= 2)
            return several.select("prompt_id", a="key", b=pl.lit(None, pl.UInt128))
        pairs = select.all_pairs(self.answers)
        if self.how == "round-robin":
            return pairs.select("prompt_id", "a", "b")
        return pairs.group_by("prompt_id").head(self.config.pairs.tries).select("prompt_id", "a", "b")

    def answered_without_a_model(self, journal: Journal, several: pl.DataFrame) -> None:
        """Journal what the prompts' checks and the text classifier of refusals say of each answer."""
        self._read = None
        prompts, answers = Reader(self.run.journal_path("prompts")), Reader(self.run.journal_path("completions"))
        try:
            found = without_model.verdicts(self.placed(several).iter_rows(), prompts.at, answers.at, journal)
            for block in iter(lambda: list(itertools.islice(found, BLOCK)), []):
                journal.append(block)
                for record in block:
                    if isinstance(record, Failure):  # counted, but no sign that a server fails
                        self.meter.failures[record.kind] += 1
                        self.meter.last_error = record.error
        finally:
            prompts.close()
            answers.close()

    def _unsure(self, several: pl.DataFrame) -> pl.DataFrame:
        """Answers about which the text classifier of refusals is not sure."""
        sure = self._verdicts().filter((pl.col("judge_hash") == refusal.HASH) & (pl.col("score") >= refusal.SURE))
        return several.join(sure.select("a"), on="a", how="anti")

    def _undecided(self, wanted: pl.DataFrame) -> pl.DataFrame:
        """Pairs that the prompts' checks do not decide."""
        pairs = select.with_checks(wanted, self.checked)
        return pairs.filter((pl.col("check_a") == pl.col("check_b")).fill_null(True)).drop("check_a", "check_b")

    def placed(self, wanted: pl.DataFrame) -> pl.DataFrame:
        """The byte offsets of what is wanted, prompt by prompt. Columns: prompt_offset, a_offset, b_offset."""
        return (
            wanted.join(self.prompts, on="prompt_id")
            .join(self.offsets.rename({"key": "a", "offset": "a_offset"}), on="a")
            .join(self.offsets.rename({"key": "b", "offset": "b_offset"}), on="b", how="left")
            .sort("prompt_id", "a", "b")
            .select("prompt_offset", "a_offset", "b_offset")
        )

    def _settle(self, candidates: pl.DataFrame) -> pl.DataFrame:
        compared = settle.comparisons(self._verdicts(), self.known, candidates.select("a", "b"))
        pairs = self.config.pairs
        return settle.settle(
            candidates,
            compared,
            self.how,
            min_probability=pairs.min_probability,
            per_prompt=pairs.per_prompt,
            min_score=pairs.min_score,
            max_near_ties=pairs.max_near_ties,
        )

    def said(self, pairs: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """What each seat said of ``pairs`` (columns a, b), and what the answers were classified as."""
        verdicts = self._verdicts()
        return settle.by_seat(verdicts, self.known, pairs.select("a", "b")), balance.classes(verdicts)

    def _verdicts(self) -> pl.DataFrame:
        """What the journal holds. Read again only after something was asked: it is the largest file of a run."""
        if self._read is None:
            self._read = self._scan()
        return self._read

    def _scan(self) -> pl.DataFrame:
        return tables.scan(self.run.journal_path("verdicts"), VERDICTS, _verdicts).drop("key")

    def _ask(self, kind: str, wanted: pl.DataFrame) -> None:
        seats = [seat for seat in self.seats if seat.judge.file.kind == kind]
        if self.engines is None or wanted.is_empty() or not seats:
            return
        self._read = None
        placed = self.placed(wanted)
        prompts, answers = Reader(self.run.journal_path("prompts")), Reader(self.run.journal_path("completions"))
        try:
            for seat in seats:
                if self.meter.reason_to_stop():
                    return
                self._ask_seat(seat, placed, prompts, answers)
        finally:
            prompts.close()
            answers.close()

    def _ask_seat(self, seat: asking.Seat, placed: pl.DataFrame, prompts: Reader, answers: Reader) -> None:
        engines, journal = self.engines, self.journal
        assert engines is not None
        assert journal is not None
        modes: dict[str, Any] = self.run.manifest()["stages"]["judge"].get("modes", {})
        seat = replace(seat, mode=modes.get(seat.name)) if self.config.judge.verdict == "auto" else seat

        def work() -> Iterator[asking.Material]:
            for row in placed.iter_rows():
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
