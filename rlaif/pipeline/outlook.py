"""What a night will take, told before it begins, and how its time and money are shared out.

The estimate comes from a pilot: the first prompts go through generate and judge, and what they took is multiplied.
Time is requests x the mean wait for one / how many are in flight (Little 1961), so that a pilot that is too small to
fill the server for long still tells the rate of a full one; servers' starts are added as they were.
"""

from __future__ import annotations

import datetime
import itertools
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.config import RunConfig, duration_s
from rlaif.errors import RlaifError
from rlaif.llm.budget import duration, short
from rlaif.pipeline import trained
from rlaif.report import facts as reporting
from rlaif.run.directory import JournalName, Run
from rlaif.run.journal import read

GB = 1e9
FOR_TABLES = 2.5
"""Bytes on disk in the end for each byte of journal: the journals, tables/ and dataset/."""


def deadline_of(config: RunConfig, now: datetime.datetime | None = None) -> float | None:
    """Seconds from now to the deadline, or None. ``until`` is the next time that the clock on the wall says so."""
    now = now or datetime.datetime.now()
    left = []
    if config.until:
        hour, minute = map(int, config.until.split(":"))
        at = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        if at <= now:
            at += datetime.timedelta(days=1)
        left.append(at.timestamp() - now.timestamp())  # of local times: right when the clocks are changed that night
    if config.duration:
        left.append(duration_s(config.duration))
    return min(left, default=None)


@dataclass(frozen=True)
class Cost:
    """Of one stage, or of several."""

    seconds: float = 0.0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    usd: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.prompt_tokens + other.prompt_tokens,
                    self.completion_tokens + other.completion_tokens, self.usd + other.usd)  # fmt: skip


@dataclass(frozen=True)
class Outlook:
    """What is still owed, by stage, at the pilot's rates. ``prompts``: to be answered and judged, the pilot's
    included. ``bytes``: that the run will take on disk beyond what it has. ``judged``: of the prompts."""

    prompts: int
    generate: Cost
    judge: Cost
    bytes: float
    evaluate: Cost = Cost()
    judged: float = 0.0

    @property
    def asked(self) -> Cost:
        """What is shared out where not all fits. An evaluation is small, and kept whole."""
        return self.generate + self.judge

    @property
    def whole(self) -> Cost:
        return self.asked + self.evaluate

    def share(self, available: float | None, budget_usd: float | None, train_share: float) -> float:
        """Which part of what is owed fits: 1.0 or more is all of it. ``available``: seconds."""
        parts = []
        if available is not None and self.asked.seconds > 0:
            parts.append(max(0.0, available - self.evaluate.seconds) * (1.0 - train_share) / self.asked.seconds)
        if budget_usd is not None and self.asked.usd > 0:
            parts.append(max(0.0, budget_usd - self.evaluate.usd) / self.asked.usd)
        return min(parts, default=float("inf"))

    def generating(self, seconds: float | None, usd: float | None) -> tuple[float | None, float | None, int | None]:
        """What generating may take of so many seconds and dollars for what it answers to be judged too: of each its
        part of what is owed. Where answers cost nothing their number is bounded instead: the third is how many of the
        first prompts are answered, None for all."""
        most = None
        if seconds is not None and self.generate.seconds:
            seconds *= self.generate.seconds / self.asked.seconds
        if usd is not None and self.generate.usd:
            usd *= self.generate.usd / self.asked.usd
        elif usd is not None and usd < self.judge.usd:
            most = int(self.judged + (self.prompts - self.judged) * usd / self.judge.usd)
        return seconds, usd, most

    def told(self, available: float | None, budget_usd: float | None, train_share: float) -> list[str]:
        """The estimate as lines to say, and whether it fits."""
        whole = self.whole
        by_stage = f"generate {duration(self.generate.seconds)}, judge {duration(self.judge.seconds)}"
        if self.evaluate.seconds:
            by_stage += f", evaluate {duration(self.evaluate.seconds)}"
        end = datetime.datetime.now() + datetime.timedelta(seconds=whole.seconds)
        cost = f"${whole.usd:,.2f}" if whole.usd else "no dollars"
        estimate = (
            f"estimate for {self.prompts:,} prompts: about {duration(whole.seconds)} more ({by_stage}), until about "
            f"{end:%a %H:%M}; {short(whole.prompt_tokens)} + {short(whole.completion_tokens)} tokens, {cost}, "
            f"{self.bytes / GB:,.1f} GB"
        )
        bounds = []
        if available is not None:
            kept = f", {train_share:.0%} of it kept for training" if train_share else ""
            bounds.append(f"{duration(available)} to the deadline{kept}")
        if budget_usd is not None:
            bounds.append(f"${budget_usd:,.2f} of the budget left")
        if not bounds:
            return [estimate]
        fits = self.share(available, budget_usd, train_share)
        if fits >= 1.0:
            return [estimate, f"it fits: {' and '.join(bounds)}"]
        part = (
            f"it does not fit: {' and '.join(bounds)}. Both are shared out, so that about {fits:.0%} of what is owed "
            "is answered and judged; the same command goes on from there another night"
        )
        return [estimate, part]


COUNTED = (
    "requests", "answers", "prompt_tokens", "cached_tokens", "completion_tokens", "usd", "waited_s", "asking_s",
)  # fmt: skip


def facts_of(run: Run, prompts: int, answers: Mapping[str, int]) -> dict[str, Any]:
    """What the first ``prompts`` took, as it is kept in the manifest. ``answers``: how many records they have of each
    stage. A start that was killed left its records and did not say what they took: that is as much as those of others.
    """
    facts: dict[str, Any] = {"prompts": prompts, "bytes": size(run)}
    for stage, known in answers.items():
        starts = [start for start in run.manifest()["stages"][stage].get("history", []) if start.get("answers")]
        told = {name: sum(start.get(name, 0) for start in starts) for name in COUNTED}
        each = known / told["answers"] if starts else 0.0
        facts[stage] = {name: value * each for name, value in told.items()}
        begun = starts[-1]["seconds"] - starts[-1]["asking_s"] if starts else 0.0  # the server's start, once
        facts[stage]["seconds"] = facts[stage]["asking_s"] + begun
    return facts


def answered(run: Run) -> dict[str, int]:
    """How many records models gave to each stage. What was imported, and what no model said, takes nothing."""
    return {"generate": _by_models(run, "completions"), "judge": _by_models(run, "verdicts")}


def _by_models(run: Run, name: JournalName) -> int:
    records = (record for _, record in read(run.journal_path(name)) if "error" not in record)
    return len({record["key"] for record in records if record.get("model") and record.get("source") != "imported"})


def rows_of(run: Run, prompts: int) -> int:
    """How many prompts the journal holds up to the first so many that are to be answered: those held out stand among
    them."""
    places = (place for place, (_, record) in enumerate(read(run.journal_path("prompts")), 1)
              if record["split"] == "train")  # fmt: skip
    return next(itertools.islice(places, prompts - 1, None), prompts)


def size(run: Run) -> int:
    """Bytes of the journals that grow with what is asked."""
    return sum(run.journal_path(name).stat().st_size for name in ("completions", "verdicts")
               if run.journal_path(name).exists())  # fmt: skip


def asking_s(facts: Mapping[str, Any], concurrency: float, part: float = 1.0) -> float:
    """Seconds for ``part`` times what ``facts`` (:meth:`Meter.facts`) took, with so many requests in flight."""
    return float(facts["waited_s"] * part / min(concurrency, max(1.0, facts["requests"] * part)))


def outlook(
    pilot: Mapping[str, Any], prompts: int, answered: Mapping[str, int], concurrency: int, *, compared: int = 0
) -> Outlook:
    """``pilot``: :func:`facts_of`. ``answered``: :func:`answered`.
    ``compared``: on how many prompts two models are to be compared in the end; each answers them once, and judges are
    taken to have as much to do with a prompt as when they label."""
    times = prompts / max(1, pilot["prompts"])
    costs = {}
    left = judged = 0.0
    evaluate = Cost()
    for stage in ("generate", "judge"):
        facts = pilot[stage]
        expected = facts["answers"] * times
        owed = max(0.0, expected - answered[stage])
        costs[stage] = _part(facts, owed, concurrency)
        each = 2 if stage == "generate" else facts["answers"] / max(1, pilot["prompts"])
        evaluate += _part(facts, compared * each, concurrency)
        judged = prompts * (1.0 - owed / expected if expected else 1.0)  # of the last stage
        left = max(left, owed / expected if expected else 0.0)
    size = pilot["bytes"] * times * left * FOR_TABLES
    return Outlook(prompts, costs["generate"], costs["judge"], size, evaluate, judged)


def _part(facts: Mapping[str, Any], answers: float, concurrency: int) -> Cost:
    """What so many answers take of a stage that took ``facts``, its server's start included."""
    part = answers / facts["answers"] if facts["answers"] else 0.0
    start = max(0.0, facts["seconds"] - facts["asking_s"])
    return Cost(
        seconds=asking_s(facts, concurrency, part) + start if answers else 0.0,
        prompt_tokens=facts["prompt_tokens"] * part,
        completion_tokens=facts["completion_tokens"] * part,
        usd=facts["usd"] * part,
    )


def spent(run: Run) -> float:
    """Dollars of the run, of all its starts: by its journals, or by what the stages counted where that is more
    (replies that gave no record were paid too)."""
    journaled = reporting.dollars(run) + reporting.dollars(Run(run.path / trained.FOLDER))
    counted = sum(start.get("usd", 0.0) for name in ("generate", "judge", "evaluate")
                  for start in run.manifest()["stages"].get(name, {}).get("history", []))  # fmt: skip
    return float(max(journaled, counted))


def monotonic_deadline(config: RunConfig) -> float | None:
    left = deadline_of(config)
    return None if left is None else time.monotonic() + left


def free(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError as error:
        raise RlaifError(f"the free space cannot be told: {error.strerror}", where=str(path)) from None


def short_of_space(run: Run, needed: float) -> str | None:
    """What to say where the disk will not hold what is coming, else None."""
    there = free(run.path)
    return f"about {needed / GB:,.1f} GB are needed and {there / GB:,.1f} GB are free" if needed > there else None
