"""``rlaif run``: the whole night as one job that can be stopped anywhere and given again.

    checks      disk, settings, endpoints, parts: before anything is asked
    pilot       the first prompts through generate and judge, for an estimate that is said before the rest is begun
    generate    until done, or until its share of the time and the money is used up
    judge       routes, and writes tables/ and dataset/
    report      and then training and evaluation, where asked for, in what is left of the time
    the end     one line to whoever wants to be told, RUN/log/run.log for the morning

The run's lock is held throughout. An endpoint that was there at the start and fails later is given time to come back;
answers that are missing after a stage are asked for once more. The budget counts every dollar of the run, whenever it
was spent: a job that is requeued does not begin with a full purse again.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlaif.config import Config
from rlaif.errors import EndpointError, RlaifError, ServerError, TooManyFailures, UsageError
from rlaif.generate.prompts import Taken
from rlaif.judge import without_model
from rlaif.llm.budget import duration
from rlaif.llm.engines import Engines
from rlaif.pipeline import checks, commands, outlook
from rlaif.pipeline.build import Built
from rlaif.pipeline.diary import Diary, notify
from rlaif.pipeline.evaluate import evaluate
from rlaif.pipeline.trained import measured
from rlaif.report import page
from rlaif.run.directory import Run

Done = TypeVar("Done")
WAITS_S = (60.0, 300.0, 900.0)
"""How long an endpoint that has failed is left alone before its stage goes on, each time that it fails."""


class DeadlineReached(BaseException):
    """Thrown into a training. No Exception: libraries catch those."""


@dataclass
class Night:
    """How it ended. ``stopped``: why not all was done, or None. ``missing``: what still failed when asked again."""

    stopped: str | None = None
    missing: TooManyFailures | None = None
    built: Built | None = None
    trained: Any = None
    evaluated: dict[str, Any] | None = None
    report: Path | None = None
    usd: float = 0.0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def line(self, run: Path, how: str) -> str:
        """The whole night in one line."""
        took = duration(self.seconds)
        parts = [f"rlaif run {run}: {how}{' in ' if how == 'done' else '; after '}{took}"]
        if self.built:
            waiting = self.built.merged.left_out["waits for review"]
            parts.append(f"{self.built.merged.train:,} pairs to train on, {waiting:,} wait for review")
        if self.trained:
            parts.append(f"trained in {self.trained.steps:,} steps")
        if self.evaluated and (rate := self.evaluated["win_rate"]):
            parts.append(f"win rate {rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]")
        if self.usd:
            parts.append(f"${self.usd:,.2f} in all")
        if self.report:
            parts.append(f"report: {self.report}")
        return "; ".join(parts)


def whole_night(run: Run, config: Config, watch: commands.Watch) -> Night:
    """Run all of it. Returns when everything was done, or stopped early by deadline or budget.

    Raises what ended it (KeyboardInterrupt included), and :class:`TooManyFailures` after all stages are through.
    """
    began = time.monotonic()
    if not _names_a_policy(config) and not run.journal_path("completions").exists():
        config.pool()  # says what is missing
    with run.writing():
        diary = Diary(run.log / "run.log", watch)
        told = Night()
        how = "failed: a bug, see the log"
        try:
            run.begin("run", config)
            _Night(run, config, diary, told).go()
            how = f"stopped early, {told.stopped}" if told.stopped else "done"
            if told.missing:
                how += f", {told.missing.what.split('. ')[0]}"
        except (KeyboardInterrupt, SystemExit):
            how = "interrupted; the same command goes on from here"
            raise
        except RlaifError as error:
            how = "failed: " + (f"{error.where}: " if error.where else "") + " ".join(error.what.split())
            raise
        finally:
            told.seconds = time.monotonic() - began
            with contextlib.suppress(RlaifError, OSError):  # what ended the night is what is to be shown
                told.usd = outlook.spent(run)
                run.end("run", how=how, usd=told.usd, seconds=round(told.seconds, 3))
            line = told.line(run.path, how)
            diary.say(line)
            for problem in notify(config.run, line, {"run": str(run.path), "how": how, "usd": told.usd}):
                diary.say(f"warning: {problem}")
            diary.close()
    if told.missing:
        raise told.missing
    return told


def _names_a_policy(config: Config) -> bool:
    return bool(config.policies or config.sampler.model)


class _Night:
    def __init__(self, run: Run, config: Config, diary: Diary, told: Night) -> None:
        self.run, self.config, self.diary, self.told = run, config, diary, told
        self.deadline = outlook.monotonic_deadline(config.run)
        self.split: outlook.Outlook | None = None
        """What is owed, where it is more than fits."""
        self.kept = outlook.Cost()
        """What an evaluation at the end is going to take."""
        self.missing: dict[str, TooManyFailures] = {}
        self.generates = _names_a_policy(config)
        self.taken = Taken()
        self.halves = False
        """Whether nothing tells how long judging takes beside generating."""

    def go(self) -> None:
        self._open()
        lines, absent = checks.check(self.run, self.config, generates=self.generates)
        if self.generates:
            self.taken = commands.take_in(self.run, self.config, self.diary)
            without_model.require_checks(self.run.journal_path("prompts"))
        for line in lines + checks.require_only_owed(self.run, self.config, absent):
            self.diary.say(f"checked: {line}")
        with Engines(self.run.log, self.config.client, self.diary.say, self.config.cluster) as engines:
            if self.generates:
                self._pilot(engines)
            more = True
            while more:
                more = self.generates and self._generate(engines)
                # Also where nothing more may be asked: pairs are built of what is there.
                judged = self._stage("judge", self._judging(engines, self.config, self._judging_ends()))
                more = more and judged is not None and not judged.stopped
        if judged:
            self.told.built = judged.built
            self.told.stopped = self.told.stopped or judged.stopped
            if judged.stopped and "budget" in judged.stopped:
                self.told.stopped = self._whole(judged.stopped)
        else:
            self.told.built = commands.rebuild(self.run, self.config)
        self._report()
        if self.config.run.train:
            self._train()
            self._report()
        if self.config.run.evaluate:
            self._evaluate()
            self._report()
        self.told.missing = next(iter(self.missing.values()), None)

    # Before

    def _open(self) -> None:
        wanted = self.config.run
        bounds = [f"until {wanted.until}" if wanted.until else "", f"for {wanted.duration}" if wanted.duration else "",
                  f"for ${self.config.client.budget_usd:g} in all" if self.config.client.budget_usd else "",
                  "with training" if wanted.train else "",
                  "with evaluation" if wanted.evaluate else ""]  # fmt: skip
        self.diary.note("")
        self.diary.note(f"===== rlaif run {self.run.path}, process {os.getpid()}")
        self.diary.say(f"the night begins: {', '.join(filter(None, bounds)) or 'no deadline, no budget'}")

    def _pilot(self, engines: Engines) -> None:
        """Say what is ahead. Sets ``self.split`` where not all of it fits, ``self.halves`` where nothing tells."""
        owing, n = self.taken.prompts - self.taken.heldout, self.config.sampler.n
        pilot = self.run.manifest()["stages"]["run"].get("pilot")
        if pilot is None or pilot.get("n", n) != n:
            pilot = self._take_pilot(engines, owing)
        if pilot is None:
            self.halves = True
            return
        compared = self._compared() if self.config.run.evaluate else 0
        known, concurrency = outlook.answered(self.run), self.config.client.concurrency
        seen = outlook.outlook(pilot, owing, known, concurrency, compared=compared)
        self.kept = seen.evaluate
        available = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        bounds = (available, self._left_usd(), self.config.run.train_share if self.config.run.train else 0.0)
        if pilot["prompts"] < owing:
            for line in seen.told(*bounds):
                self.diary.say(line)
        if warning := outlook.short_of_space(self.run, seen.bytes):
            self.diary.say(f"warning: {warning}")
            self.told.warnings.append(warning)
        if seen.share(*bounds) < 1.0:
            self.split = seen

    def _take_pilot(self, engines: Engines, owing: int) -> dict[str, Any] | None:
        """The facts of the pilot, kept in the manifest for the next start. None where nothing can be told by it."""
        wanted = self.config.run.pilot
        first = min(owing, max(wanted, min(self.config.client.concurrency, 10 * wanted)))
        if not first or self.config.client.batch:
            return None  # by batch a few prompts may take as long as all of them
        rows = outlook.rows_of(self.run, first)
        before = self.run.manifest()["stages"].get("judge")
        if before and not 0 < (before["config"]["judge"]["limit"] or 0) <= rows:
            return None  # what was judged before was more than a pilot: there is no going back to fewer
        self.diary.say(f"pilot: {first:,} prompts go through generate and judge first")
        made = self._stage("generate", self._generating(engines, *self._half(), only=first))
        if made is None or made.stopped:
            return None
        if owing <= first:
            self.diary.say("that was all of them: no estimate is needed")
        few = self.config.judge.model_copy(update={"limit": min(rows, self.config.judge.limit or rows)})
        small = self.config.model_copy(update={"judge": few})
        judged = self._stage("judge", self._judging(engines, small, self.deadline))
        if judged is None or judged.stopped:
            return None
        n = self.config.sampler.n
        answers = {"generate": first * n, "judge": outlook.answered(self.run)["judge"]}
        pilot = {**outlook.facts_of(self.run, first, answers), "n": n}
        if not pilot["generate"]["requests"]:
            return None  # all was answered by starts that did not come to say what they took
        self.run.update_manifest("run", pilot=pilot)
        return pilot

    def _compared(self) -> int:
        """On how many prompts an evaluation will compare two models; of a source of its own only the limit is known."""
        wanted = self.config.evaluate
        if wanted.source and wanted.limit is None:
            self.diary.say("the evaluation's own prompts are not counted yet: it is not in the estimate")
            return 0
        there = wanted.limit if wanted.source else self.taken.heldout
        return min(there or 0, wanted.limit or there or 0)

    # The stages

    def _generate(self, engines: Engines) -> bool:
        """Until all is answered, or until what is left of time and money is needed for judging what was. Gives whether
        there may be more of both once that is judged, which nothing had told before."""
        until, dollars, only = self._judging_ends(), self._left_usd(self.kept.usd), None
        if self.split:
            now = time.monotonic()
            left, dollars, only = self.split.generating(None if until is None else until - now, dollars)
            until = None if left is None else now + left
        elif self.halves:
            until, dollars = self._half()
        made = self._stage("generate", self._generating(engines, until, dollars, only))
        stopped = made and (made.stopped or (only is not None and only < made.prompts - made.heldout))
        self.told.stopped = "not all that is owed fits before the deadline and into the budget" if stopped else None
        return bool(self.halves and made and made.stopped and made.meter.answers)

    def _generating(
        self, engines: Engines, until: float | None, dollars: float | None, only: int | None = None
    ) -> Callable[[], commands.Generated]:
        limits = commands.Limits(dollars, until)
        return lambda: commands.generate(
            self.run, self.config, self.diary, engines, limits=limits, only=only, taken=self.taken
        )

    def _judging(self, engines: Engines, config: Config, until: float | None) -> Callable[[], commands.Judged]:
        return lambda: commands.judge(
            self.run, config, self.diary, engines, limits=commands.Limits(self._left_usd(self.kept.usd), until)
        )

    def _stage(self, name: str, call: Callable[[], Done]) -> Done | None:
        """Call a stage until it is through. None where answers are still missing after a second time."""
        missing = 0
        waits = list(WAITS_S)
        while True:
            try:
                done = call()
            except TooManyFailures as error:
                missing += 1
                if missing == 2:
                    self.missing[name] = error
                    self.diary.say(f"{name}: {error.what}. The night goes on without them")
                    return None
                self.diary.say(f"{name}: {error.what}. They are asked for once more")
            except ServerError:
                raise  # a server of our own has been started several times already
            except EndpointError as error:
                left = None if self.deadline is None else self.deadline - time.monotonic()
                if not waits or (left is not None and left < waits[0]):
                    raise
                wait = waits.pop(0)
                self.diary.say(f"{name}: {error.where}: {error.what}. It gets {duration(wait)} to come back")
                time.sleep(wait)
            else:
                self.missing.pop(name, None)
                return done

    def _train(self) -> None:
        if self._over():
            self.told.stopped = "the deadline is reached"
            self.diary.say("training is left for another night: the deadline is reached")
            return
        try:
            with _until(self.deadline):
                self.told.trained = commands.train(self.run, self.config, self.diary, anew=True)
        except DeadlineReached:
            self.told.stopped = "the deadline is reached"
            self.diary.say("training is stopped by the deadline; the same command goes on from its newest checkpoint")
        except UsageError as error:  # a dataset that is too small to train on is no reason to lose the report
            if self.told.stopped is None:
                raise
            self.diary.say(f"training is left for another night: {' '.join(str(error).split())}")

    def _evaluate(self) -> None:
        if self.config.run.train and not self.told.trained:
            self.diary.say("the evaluation is left for another night: it waits for the training")
            return
        if known := measured(self.run, self.config):
            self.diary.say(f"{known['trained']} was evaluated before: see the report")
            self.told.evaluated = known
            return
        limits = commands.Limits(self._left_usd(), self.deadline)
        if reason := commands.meter_for("", self.config, limits).reason_to_stop():
            self.told.stopped = self._whole(reason)
            self.diary.say(f"the evaluation is left for another night: {self.told.stopped}")
            return
        _leave_the_gpu()
        with Engines(self.run.log, self.config.client, self.diary.say, self.config.cluster) as engines:
            told = self._stage("evaluate", lambda: evaluate(self.run, self.config, self.diary, engines, limits=limits))
        self.told.evaluated = told
        if told and told["stopped"]:
            self.told.stopped = self._whole(told["stopped"])

    def _report(self) -> None:
        self.told.report = page.write(self.run)

    # Limits

    def _over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _judging_ends(self) -> float | None:
        """When judging has to end: at the deadline, or earlier where evaluation and training are to have their share of
        what is left."""
        if self.deadline is None:
            return None
        now = time.monotonic()
        share = self.config.run.train_share if self.config.run.train else 0.0
        return now + max(0.0, self.deadline - self.kept.seconds - now) * (1.0 - share)

    def _half(self) -> tuple[float | None, float | None]:
        """Until when, and for how many dollars, to generate where nothing tells what judging takes: half of each."""
        until, dollars = self._judging_ends(), self._left_usd(self.kept.usd)
        if until is not None and not self.config.client.batch:  # all of a batch is sent at once, and waited for
            until = (until + time.monotonic()) / 2
        return until, None if dollars is None else dollars / 2

    def _whole(self, stopped: str) -> str:
        """Why a stage stopped, with the night's budget in the place of what was left of it for the stage."""
        return f"the budget of ${self.config.client.budget_usd:g} is spent" if "budget" in stopped else stopped

    def _left_usd(self, kept: float = 0.0) -> float | None:
        budget = self.config.client.budget_usd
        return None if budget is None else max(0.0, budget - outlook.spent(self.run) - kept)


def _leave_the_gpu() -> None:
    """What a training in this process has left there, vLLM needs."""
    if torch := sys.modules.get("torch"):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _until(deadline: float | None) -> Iterator[None]:
    """Throw :class:`DeadlineReached` into the block at ``deadline``. In other threads than the main one it does not."""
    if deadline is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise DeadlineReached

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
