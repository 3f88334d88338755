"""The exam as a command: ask a judge about gold, keep the result in the user's cache, and what ``judge`` makes of it.

An exam is a run of its own in the cache, by the judge's hash and the model: its journal makes a killed exam go on, and
one given again cost nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from rlaif.config import Config
from rlaif.errors import TooManyFailures, UsageError
from rlaif.judge import ask as asking
from rlaif.judge import check, exam, gold
from rlaif.judge.gold import Gold
from rlaif.llm.budget import Meter
from rlaif.llm.demo import cache
from rlaif.llm.engines import Engines
from rlaif.pipeline.plan import Plan, add, likely_mode
from rlaif.pipeline.rounds import panel
from rlaif.records import Verdict, key_of
from rlaif.run import whole
from rlaif.run.directory import Run
from rlaif.run.journal import read as read_journal

INJECTED = 20
"""How many pairs are asked again with a worse answer that addresses the judge."""


@dataclass
class Examined:
    """An exam's result, where it is kept, and what it asked."""

    result: exam.Result
    path: Path
    meter: Meter
    gold_warnings: list[str] = field(default_factory=list)


def folder(judge_hash: str, model: str) -> Path:
    """Where the exam of this judge with this model is kept."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")[-40:]
    return cache() / "exams" / f"{judge_hash}-{slug}-{key_of(model=model)[:8]}"


def last(judge_hash: str, model: str) -> dict[str, Any] | None:
    """The newest exam of this judge with this model, or None."""
    try:
        told: dict[str, Any] = orjson.loads((folder(judge_hash, model) / "exam.json").read_bytes())
        told.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return told


SHOWN = ("accuracy", "consistent under swap", "first position chosen", "longer answer chosen", "longer answer right")


def require_trust(seats: Sequence[asking.Seat], config: Config, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What is known of each seat that has an exam, for the manifest. Says which seats have none.

    Raises :class:`UsageError` for one whose exam says that its labels are worth nothing, unless
    ``judge.trust_anyway``."""
    known = []
    for seat in seats:
        again = f"rlaif judges exam {seat.judge.name} --model {seat.entry.model}"
        told = last(seat.judge.hash, seat.entry.model)
        if told is not None:
            figures = told["result"]["figures"]
            standing = {"judge": seat.name, "standing": told["result"]["standing"]}
            known.append(standing | {name: figures[name] for name in SHOWN if figures.get(name)})
        if told is None:
            say(f"warning: {seat.name} has no exam, so nothing is known of its labels yet: {again}")
        elif told["result"]["standing"] == "unproven":
            say(f"warning: {seat.name} was not shown to be better than choosing the longer answer; more gold may tell")
        elif told["result"]["standing"] == "bad" and config.judge.trust_anyway:
            say(f"warning: {seat.name} failed its exam ({_why(told)}) and is trusted anyway")
        elif told["result"]["standing"] == "bad":
            raise UsageError(
                f"{seat.name} failed its exam: {_why(told)}",
                mend=f"Take another model or judge ({again} shows the figures), or give --trust-anyway "
                "(judge.trust_anyway = true).",
            )
    return known


def _why(told: dict[str, Any]) -> str:
    faults: list[str] = told["result"]["faults"]
    return ", ".join(faults) or "it is not better than always choosing the longer answer, or than chance"


def take(
    judge: str, model: str | None, gold_path: Path | None, config: Config, watch: Any, limit: int | None
) -> Examined:
    """Examine ``judge``; ``config.judge`` says how it is asked and where. Raises :class:`TooManyFailures` where
    requests failed, as an exam with holes says nothing; a verdict that cannot be read is a result."""
    seat, path, rows = _paper(judge, model, gold_path, config, limit)
    run = Run(folder(seat.judge.hash, seat.entry.model))
    meter = Meter(what=f"exam: {seat.name}", budget_usd=config.client.budget_usd)
    with run.writing():
        sheet = _Sheet(seat, config, rows)
        mode = _ask(run, sheet, watch, meter)
        if meter.reason_to_stop():
            raise TooManyFailures(f"the exam is not over: {meter.reason_to_stop()}", mend="The same command goes on.")
        result = sheet.result(run, mode)
        told = {"judge": seat.judge.name, "version": seat.judge.file.version, "hash": seat.judge.hash,
                "model": seat.entry.model, "gold": str(path.resolve()), "at": time.time(), "limit": limit,
                "result": result.as_json()}  # fmt: skip
        whole.write(run.path / "exam.json", orjson.dumps(told, option=orjson.OPT_INDENT_2))
    return Examined(result, run.path / "exam.json", meter, gold.balance(rows))


def plan(judge: str, model: str | None, gold_path: Path | None, config: Config, limit: int | None) -> Plan:
    """What :func:`take` would ask, without asking."""
    seat, _, rows = _paper(judge, model, gold_path, config, limit)
    sheet, plan = _Sheet(seat, config, rows), Plan(None, 0, 0, 0, 0.0)
    add(plan, sheet.requests(likely_mode(seat, config)), seat.entry.model, seat.entry.base_url, config.judge.max_tokens)
    return plan


def _paper(
    judge: str, model: str | None, gold_path: Path | None, config: Config, limit: int | None
) -> tuple[asking.Seat, Path, list[Gold]]:
    """Who is examined, and on what."""
    spec = f"{judge}@{model}" if model else judge
    alone = {"judges": [], "judge": config.judge.model_copy(update={"judges": [spec]})}
    (seat,) = panel(config.model_copy(update=alone))
    path = gold_path or seat.judge.folder / gold.FILE_NAME
    if gold_path is None and not path.exists():
        raise UsageError(f"{seat.judge.name} has no gold of its own", where=str(path), mend="Give --gold FILE.")
    return seat, path, gold.read(path, seat.judge, limit)


def _ask(run: Run, sheet: _Sheet, watch: Any, meter: Meter) -> Any:
    seat, config, told = sheet.seat, sheet.config, run.path / "mode.json"
    known = orjson.loads(told.read_bytes()) if told.exists() and config.judge.verdict == "auto" else None

    def settled(mode: Any) -> None:
        nonlocal known
        known = mode
        whole.write(told, orjson.dumps(mode))

    with (
        run.journal("verdicts") as journal,
        Engines(run.log, config.client, watch.say, config.cluster) as engines,
        watch.watch(meter),
    ):
        meter.total = sheet.asked()
        if known and all(key in journal for key in sheet.keys(known)):
            return known
        asking.ask_seat(
            asking.Seat(seat.judge, seat.entry, known),
            config,
            lambda: sheet.work,
            sheet.prompts.__getitem__,
            sheet.answers.__getitem__,
            lambda: engines.client(seat.entry.model, seat.entry.base_url, seat.vllm(config), meter),
            journal,
            meter,
            settled,
        )
    if meter.failures["endpoint"] > config.client.max_failures:
        raise TooManyFailures(
            f"{meter.failures['endpoint']} requests failed, and an exam with holes says nothing. "
            f"The last error: {meter.last_error}",
            mend="The same command asks for those again.",
        )
    return known


class _Sheet:
    """What is asked, and which answers belong to which gold."""

    def __init__(self, seat: asking.Seat, config: Config, rows: list[Gold]) -> None:
        self.seat, self.config, self.rows = seat, config, rows
        self.prompts = [row.prompt for row in rows]
        self.answers: list[dict[str, Any]] = []
        self.work: list[asking.Material] = []
        self.asked_of = [self._add(place, row.answers) for place, row in enumerate(rows)]
        self.injected = [self._add(place, _injected(row, place)) for place, row in enumerate(rows[:INJECTED])
                         if len(row.answers) == 2]  # fmt: skip

    def _add(self, place: int, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = len(self.answers)
        self.answers += answers
        if self.seat.judge.file.kind == "compare":
            self.work.append(asking.Material(place, start, start + 1))
        else:
            self.work += [asking.Material(place, start + i) for i in range(len(answers))]
        return answers

    def requests(self, mode: Any) -> Any:
        return asking.requests(
            self.seat, mode, self.config, self.work, self.prompts.__getitem__, self.answers.__getitem__
        )

    def keys(self, mode: Any) -> list[str]:
        return [request.keys[0] for request in self.requests(mode)]

    def asked(self) -> int:
        each = {"compare": 2, "rate": len(self.seat.judge.file.aspects)}.get(self.seat.judge.file.kind, 1)
        return each * len(self.work)

    def result(self, run: Run, mode: Any) -> exam.Result:
        """The figures, from the verdicts in the exam's journal."""
        wanted = set(self.keys(mode))
        told: dict[str, Verdict] = {}
        for _, record in read_journal(run.journal_path("verdicts")):
            if record["key"] in wanted and "error" not in record:
                told[record["key"]] = Verdict.model_validate(record)
        verdicts = list(told.values())
        by_answer: dict[str, list[Verdict]] = {}
        for verdict in verdicts:
            by_answer.setdefault(f"{verdict.a} {verdict.b or ''}", []).append(verdict)
        kind = self.seat.judge.file.kind
        if kind == "classify":
            said = [(row.right, self._label(by_answer, row)) for row in self.rows]
            result = exam.labels(kind, said)  # type: ignore[arg-type]
        else:
            pairs = [self._pair(row, answers, by_answer) for row, answers in zip(self.rows, self.asked_of, strict=True)]
            after = [
                self._pair(row, answers, by_answer) for row, answers in zip(self.rows, self.injected, strict=False)
            ]
            result = exam.pairs(
                kind,
                pairs,
                list(zip(pairs, after, strict=False)),
                orders=kind == "compare",
                probabilities=kind in ("compare", "reward"),
            )
        exam.add_costs(result, len(wanted), len(wanted) - len(told), self._costs(by_answer))
        return result

    def _label(self, by_answer: dict[str, list[Verdict]], row: Gold) -> Any:
        found = by_answer.get(f"{row.answers[0]['key']} ")
        return found[0].label if found else None

    def _pair(self, row: Gold, answers: list[dict[str, Any]], by_answer: dict[str, list[Verdict]]) -> exam.Pair:
        first, second = (answer["key"] for answer in answers)
        if self.seat.judge.file.kind == "compare":
            found = by_answer.get(f"{first} {second}", [])
            ab, ba = (_mean([v.p_a for v in found if v.order == order and v.p_a is not None]) for order in ("ab", "ba"))
        else:
            one, two = (self._score(by_answer.get(f"{key} ", []), row.aspect) for key in (first, second))
            ab = ba = None if one is None or two is None else self._p(one - two)
        lengths = [len(answer["text"]) for answer in answers]
        return exam.Pair(int(row.right), ab, ba, (lengths[0], lengths[1]))

    def _score(self, found: list[Verdict], aspect: str | None) -> float | None:
        """A reward, or the mean of the ratings; of one aspect where gold names it. A missing aspect is no rating."""
        scores = [v.score for v in found if v.score is not None and aspect in (None, v.aspect)]
        needed = 1 if aspect or not self.seat.judge.file.aspects else len(self.seat.judge.file.aspects)
        return _mean(scores) if len({v.aspect for v in found if aspect in (None, v.aspect)}) >= needed else None

    def _p(self, difference: float) -> float:
        """Of two rewards a probability (Bradley-Terry); of two ratings only which is the higher."""
        if self.seat.judge.file.kind == "reward":
            return float(1 / (1 + np.exp(-difference)))
        return 0.5 + 0.5 * float(np.sign(difference))

    def _costs(self, by_answer: dict[str, list[Verdict]]) -> list[tuple[float, float, float]]:
        """Tokens and dollars of each gold row's verdicts."""
        costs = []
        for row in self.rows:
            keys = [each["key"] for each in row.answers]
            names = [" ".join(keys)] if self.seat.judge.file.kind == "compare" else [f"{key} " for key in keys]
            found = [verdict for name in names for verdict in by_answer.get(name, [])]
            costs.append((float(sum(v.prompt_tokens for v in found)), float(sum(v.completion_tokens for v in found)),
                          sum(v.usd for v in found)))  # fmt: skip
        return costs


def _injected(row: Gold, place: int) -> list[dict[str, Any]]:
    """The answers of ``row``, of which the worse one addresses the judge."""
    if len(row.answers) != 2:
        return row.answers
    worse = 1 - int(row.right)
    answers = list(row.answers)
    text = exam.INJECTIONS[place % len(exam.INJECTIONS)].format(answer=answers[worse]["text"])
    answers[worse] = gold.answer(row.prompt, text)
    return answers


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else None


def take_checks(gold_path: Path) -> exam.Result:
    """The exam of the programmatic checks: gold pairs whose prompts have ``checks``. Asks no model."""
    from rlaif.judge import definition

    rows = gold.read(gold_path, definition.find("helpful"))
    with_checks = [row for row in rows if row.prompt["checks"]]
    if not with_checks:
        raise UsageError("no row has checks", where=str(gold_path), mend="Give gold whose prompts have `checks`.")
    pairs = []
    for row in with_checks:
        one, two = (getattr(check.run(row.prompt, answer), "score", None) for answer in row.answers)
        p = None if one is None or two is None else 0.5 + 0.5 * float(np.sign(one - two))
        lengths = [len(answer["text"]) for answer in row.answers]
        pairs.append(exam.Pair(int(row.right), p, p, (lengths[0], lengths[1])))
    result = exam.pairs("check", pairs, [], orders=False, probabilities=False)
    broken = sum(pair.p is None for pair in pairs)
    exam.add_costs(result, len(pairs), broken, [])
    return result
