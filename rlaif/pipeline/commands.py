"""One function a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlaif.config import Config
from rlaif.errors import OtherRows, TooManyFailures, UsageError, cannot_be_written
from rlaif.generate import bring as bringing
from rlaif.generate import prompts as taking
from rlaif.generate import sample as sampling
from rlaif.llm.budget import Meter
from rlaif.llm.engines import Engines
from rlaif.pipeline import exam
from rlaif.pipeline.build import Built, build
from rlaif.pipeline.rounds import Rounds, panel, strategy
from rlaif.run.directory import Run, require_completions

if TYPE_CHECKING:
    from rlaif.train.prepare import Prepared
    from rlaif.train.writing import TrainResult


class Watch(Protocol):
    """Whoever looks on: lines to say, and a meter to show while requests are under way."""

    def say(self, line: str) -> None: ...

    def watch(self, meter: Meter) -> Any:
        """A context manager that shows ``meter`` while it is open."""


@dataclass
class Generated:
    prompts: int
    heldout: int
    completions: int
    left_out: dict[str, int]
    meter: Meter
    stopped: str | None = None


@dataclass
class Judged:
    """What a judge command gave. ``built``: the pairs and the dataset; ``failed``: requests without a verdict."""

    built: Built
    meter: Meter
    failed: int
    stopped: str | None


@dataclass(frozen=True)
class Limits:
    """What a stage may use where that is not the settings' whole: dollars, and until when (``time.monotonic()``)."""

    budget_usd: float | None = None
    deadline: float | None = None


def meter_for(what: str, config: Config, limits: Limits | None) -> Meter:
    limits = limits or Limits(config.client.budget_usd)
    return Meter(what=what, budget_usd=limits.budget_usd, deadline=limits.deadline)


def generate(
    run: Run,
    config: Config,
    watch: Watch,
    engines: Engines,
    *,
    limits: Limits | None = None,
    only: int | None = None,
    taken: taking.Taken | None = None,
) -> Generated:
    """Take the prompts in, unless they are ``taken``, and sample the answers they owe; with ``only``, those of so many
    prompts, the first ones.

    Raises :class:`TooManyFailures` at the end.
    """
    config.pool()
    with run.writing():
        run.begin("generate", config)
        taken = taken or taking.take(run, config, watch.say)
        meter = meter_for("generate", config, limits)
        meter.total = min(taken.prompts - taken.heldout, only or taken.prompts) * config.sampler.n
        try:
            with watch.watch(meter):
                meter.skipped = _answered(run)
                sampling.sample(run, config, engines, meter, only=only)
        finally:
            run.end("generate", **meter.facts(), prompts=taken.prompts, heldout=taken.heldout)
        with run.journal("completions") as journal:
            done = len(journal.done)
    _enforce(config, meter)
    return Generated(
        prompts=taken.prompts,
        heldout=taken.heldout,
        completions=done,
        left_out=dict(taken.left_out),
        meter=meter,
        stopped=meter.reason_to_stop(),
    )


def take_in(run: Run, config: Config, watch: Watch) -> taking.Taken:
    """The first half of :func:`generate`: the prompts alone."""
    config.pool()
    with run.writing():
        run.begin("generate", config)
        return taking.take(run, config, watch.say)


def import_completions(run: Run, config: Config, source: str, watch: Watch) -> bringing.Brought:
    """``generate --import``: journal the prompts and answers of ``source``."""
    with run.writing():
        run.begin("import", config)
        brought = bringing.bring(run, config, source, watch.say)
        run.end("import", source=source, prompts=brought.prompts, completions=brought.completions)
    return brought


def _answered(run: Run) -> int:
    with run.journal("completions") as journal:
        return len(journal.done)


def _enforce(config: Config, meter: Meter) -> None:
    if meter.failed > config.client.max_failures and not meter.reason_to_stop():
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(meter.failures.items()))
        raise TooManyFailures(
            f"{meter.failed} answers are missing ({kinds}; allowed: {config.client.max_failures}). "
            f"The last error: {meter.last_error}",
            mend="The rest is kept. The same command asks for those again; --max-failures N accepts up to N.",
        )


def judge(
    run: Run,
    config: Config,
    watch: Watch,
    engines: Engines,
    *,
    restart: bool = False,
    limits: Limits | None = None,
) -> Judged:
    """Ask the panel, settle and route the pairs, write tables/ and dataset/. Raises :class:`TooManyFailures`."""
    seats = panel(config)
    how = strategy(config, seats)
    require_completions(run)
    exams = exam.require_trust(seats, config, watch.say)
    with run.writing():
        run.begin("judge", config, restart=restart)
        run.update_manifest("judge", exams=exams)
        meter = meter_for("judge", config, limits)
        try:
            with run.journal("verdicts") as journal, watch.watch(meter):
                rounds = Rounds(run, config, engines, seats, how, journal, meter)
                candidates = rounds.all()
        finally:
            run.end("judge", **meter.facts())
        with _writing_tables(run):
            built = build(rounds, candidates)
    _enforce(config, meter)
    return Judged(built, meter, meter.failed, meter.reason_to_stop())


def rebuild(run: Run, config: Config) -> Built:
    """Tables and dataset anew from the journals, reviews included. Asks no model."""
    seats = panel(config)
    how = strategy(config, seats)
    require_completions(run)
    with run.writing():
        rounds = Rounds(run, config, None, seats, how, None, Meter())
        with _writing_tables(run):
            return build(rounds, rounds.all())


@contextlib.contextmanager
def _writing_tables(run: Run) -> Iterator[None]:
    """A disk that is full or may not be written is told as what it is, wherever it was met."""
    try:
        yield
    except OSError as error:
        raise cannot_be_written(run.path, error) from None


def plan_train(run: Run, config: Config) -> tuple[Prepared, str]:
    """The preflight of the dataset as it stands, and in a line how it would be trained on. Writes nothing."""
    from rlaif.train import loop

    _require_trained_here(run, config)
    return loop.plan(run, config)


def train(run: Run, config: Config, watch: Watch, *, anew: bool = False) -> TrainResult:
    """Merge what people have labelled since, then train: with ``anew``, from the beginning where what was trained
    before had other rows, as with ``train.restart``. The model of that stays until the new one is written."""
    from rlaif.train import launch, loop

    if launch.place(config.train).rank:  # not the first of several machines: the first one holds the run
        return launch.train(run, config, say=watch.say)
    if run.pairs_path.exists():
        rebuild(run, _seeded_as_judged(run, config))
    _require_trained_here(run, config)
    with run.writing():
        run.begin("train", config)
        begin = launch.train if config.train.launcher == "accelerate" else loop.train
        try:
            result = begin(run, config, say=watch.say)
        except OtherRows as error:
            if not anew:
                raise
            watch.say(f"{error.what}: it begins anew, in the same place")
            restarted = config.train.model_copy(update={"restart": True})
            result = begin(run, config.model_copy(update={"train": restarted}), say=watch.say)
        run.end("train", pairs=result.pairs, steps=result.steps, seconds=result.seconds)
    return result


def _seeded_as_judged(run: Run, config: Config) -> Config:
    """``config`` with the seed that the run was judged with: who is asked about what, and what is held out to test on,
    hang on it, and no training changes them."""
    judged = run.manifest()["stages"].get("judge", {}).get("config", {})
    return config.model_copy(update={"seed": judged.get("seed", config.seed)})


def _require_trained_here(run: Run, config: Config) -> None:
    if config.train.method == "ppo":
        raise UsageError("ppo is not trained here but handed over to verl", where="train.method",
                         mend=f"Give: rlaif train {run.path} --method ppo; or train here with rloo.")  # fmt: skip


def hand_over(run: Run, config: Config) -> Path:
    """Merge what people have labelled since, then write what verl trains with. Returns the folder."""
    from rlaif.train import handover

    if run.pairs_path.exists():
        rebuild(run, _seeded_as_judged(run, config))
    with run.writing():
        return handover.write(run, config)
