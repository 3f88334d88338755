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

from rlaif.config.models import Config
from rlaif.errors import EndpointError, RlaifError, ServerError, TooManyFailuresError, UsageError
from rlaif.evaluate.run_evaluation import evaluate
from rlaif.evaluate.trained_model import existing_evaluation
from rlaif.format import format_duration
from rlaif.generate.ingest import IngestResult
from rlaif.judge import rule_based
from rlaif.labeling.build_dataset import BuildResult
from rlaif.llm.backends import ModelBackends
from rlaif.llm.reporter import Reporter
from rlaif.llm.stage_limits import StageLimits, new_meter
from rlaif.orchestrator import run_preflight, stages
from rlaif.orchestrator.run_log import RunLog, notify
from rlaif.planning import run_estimate
from rlaif.report import html_report
from rlaif.run.run import Run

ResultT = TypeVar("ResultT")
RETRY_WAITS_S = (60.0, 300.0, 900.0)
"""How long an endpoint that has failed is left alone before its stage goes on, each time that it fails."""


class DeadlineReached(BaseException):
    """Thrown into a training. No Exception: libraries catch those."""


@dataclass
class RunResult:
    """How it ended. ``stop_reason``: why not all was done, or None. ``failure``: what still failed when asked again."""

    stop_reason: str | None = None
    failure: TooManyFailuresError | None = None
    build: BuildResult | None = None
    training: Any = None
    evaluation: dict[str, Any] | None = None
    report: Path | None = None
    cost_usd: float = 0.0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def summary(self, run: Path, status: str) -> str:
        """The whole night in one line."""
        elapsed = format_duration(self.seconds)
        parts = [f"rlaif run {run}: {status}{' in ' if status == 'done' else '; after '}{elapsed}"]
        if self.build:
            awaiting_review = self.build.dataset_counts.left_out["awaiting_review"]
            parts.append(f"{self.build.dataset_counts.train:,} pairs to train on, {awaiting_review:,} wait for review")
        if self.training:
            parts.append(f"trained in {self.training.steps:,} steps")
        if self.evaluation and (rate := self.evaluation["win_rate"]):
            parts.append(f"win rate {rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]")
        if self.cost_usd:
            parts.append(f"${self.cost_usd:,.2f} in all")
        if self.report:
            parts.append(f"report: {self.report}")
        return "; ".join(parts)


def run_pipeline(run: Run, config: Config, reporter: Reporter) -> RunResult:
    """Run all of it. Returns when everything was done, or stopped early by deadline or budget.

    Raises what ended it (KeyboardInterrupt included), and :class:`TooManyFailuresError` after all stages are through.
    """
    started = time.monotonic()
    if not _has_policy(config) and not run.journal_path("completions").exists():
        config.policies_resolved()  # says what is missing
    with run.lock():
        run_log = RunLog(run.log / "run.log", reporter)
        result = RunResult()
        status = "failed: a bug, see the log"
        try:
            run.start_stage("run", config)
            _RunOrchestrator(run, config, run_log, result).execute()
            status = f"stopped early, {result.stop_reason}" if result.stop_reason else "done"
            if result.failure:
                status += f", {result.failure.message.split('. ')[0]}"
        except (KeyboardInterrupt, SystemExit):
            status = "interrupted; the same command goes on from here"
            raise
        except RlaifError as error:
            status = "failed: " + (f"{error.location}: " if error.location else "") + " ".join(error.message.split())
            raise
        finally:
            result.seconds = time.monotonic() - started
            with contextlib.suppress(RlaifError, OSError):  # what ended the night is what is to be shown
                result.cost_usd = run_estimate.spent_usd(run)
                run.finish_stage("run", status=status, cost_usd=result.cost_usd, seconds=round(result.seconds, 3))
            line = result.summary(run.path, status)
            run_log.log(line)
            for problem in notify(
                config.run, line, {"run": str(run.path), "status": status, "cost_usd": result.cost_usd}
            ):
                run_log.log(f"warning: {problem}")
            run_log.close()
    if result.failure:
        raise result.failure
    return result


def _has_policy(config: Config) -> bool:
    return bool(config.policies or config.sampler.model)


class _RunOrchestrator:
    def __init__(self, run: Run, config: Config, run_log: RunLog, result: RunResult) -> None:
        self.run, self.config, self.run_log, self.result = run, config, run_log, result
        self.deadline = run_estimate.deadline_monotonic(config.run)
        self.estimate: run_estimate.RunEstimate | None = None
        """What is owed, where it is more than fits."""
        self.reserved_for_evaluation = run_estimate.Cost()
        """What an evaluation at the end is going to take."""
        self.failures: dict[str, TooManyFailuresError] = {}
        self.generates = _has_policy(config)
        self.ingested = IngestResult()
        self.no_estimate = False
        """Whether nothing tells how long judging takes beside generating."""

    def execute(self) -> None:
        self._log_start()
        lines, unreachable = run_preflight.preflight(self.run, self.config, generates=self.generates)
        if self.generates:
            self.ingested = stages.run_ingest(self.run, self.config, self.run_log)
            rule_based.validate_prompt_checks(self.run.journal_path("prompts"))
        for line in lines + run_preflight.raise_if_needed(self.run, self.config, unreachable):
            self.run_log.log(f"checked: {line}")
        with ModelBackends(self.run.log, self.config.client, self.run_log.log, self.config.cluster) as backends:
            if self.generates:
                self._estimate_from_pilot(backends)
            may_continue = True
            while may_continue:
                may_continue = self.generates and self._run_generate(backends)
                # Also where nothing more may be asked: pairs are built of what is there.
                judge_result = self._run_stage(
                    "judge", self._judge_call(backends, self.config, self._judging_deadline())
                )
                may_continue = may_continue and judge_result is not None and not judge_result.stop_reason
        if judge_result:
            self.result.build = judge_result.build
            self.result.stop_reason = self.result.stop_reason or judge_result.stop_reason
            if judge_result.stop_reason and "budget" in judge_result.stop_reason:
                self.result.stop_reason = self._total_budget_reason(judge_result.stop_reason)
        else:
            self.result.build = stages.rebuild_dataset(self.run, self.config)
        self._write_report()
        if self.config.run.train:
            self._run_train()
            self._write_report()
        if self.config.run.evaluate:
            self._run_evaluate()
            self._write_report()
        self.result.failure = next(iter(self.failures.values()), None)

    # Before

    def _log_start(self) -> None:
        run_config = self.config.run
        limits = [
            f"until {run_config.until}" if run_config.until else "",
            f"for {run_config.max_duration}" if run_config.max_duration else "",
            f"for ${self.config.client.budget_usd:g} in all" if self.config.client.budget_usd else "",
            "with training" if run_config.train else "",
            "with evaluation" if run_config.evaluate else "",
        ]
        self.run_log.write("")
        self.run_log.write(f"===== rlaif run {self.run.path}, process {os.getpid()}")
        self.run_log.log(f"the night begins: {', '.join(filter(None, limits)) or 'no deadline, no budget'}")

    def _estimate_from_pilot(self, backends: ModelBackends) -> None:
        """Say what is ahead. Sets ``self.estimate`` where not all of it fits,
        ``self.no_estimate`` where nothing tells."""
        prompts_to_answer, n = self.ingested.prompts - self.ingested.heldout, self.config.sampler.n
        pilot = self.run.manifest()["stages"]["run"].get("pilot")
        if pilot is None or pilot.get("n", n) != n:
            pilot = self._run_pilot(backends, prompts_to_answer)
        if pilot is None:
            self.no_estimate = True
            return
        comparisons = self._count_comparisons() if self.config.run.evaluate else 0
        existing, concurrency = run_estimate.model_record_counts(self.run), self.config.client.concurrency
        estimate = run_estimate.estimate_remaining(
            pilot, prompts_to_answer, existing, concurrency, comparisons=comparisons
        )
        self.reserved_for_evaluation = estimate.evaluate
        available_s = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        limits = (available_s, self._remaining_usd(), self.config.run.train_fraction if self.config.run.train else 0.0)
        if pilot["prompts"] < prompts_to_answer:
            for line in estimate.describe(*limits):
                self.run_log.log(line)
        if warning := run_estimate.disk_space_warning(self.run, estimate.disk_bytes):
            self.run_log.log(f"warning: {warning}")
            self.result.warnings.append(warning)
        if estimate.fraction_that_fits(*limits) < 1.0:
            self.estimate = estimate

    def _run_pilot(self, backends: ModelBackends, prompts_to_answer: int) -> dict[str, Any] | None:
        """The facts of the pilot, kept in the manifest for the next start. None where nothing can be told by it."""
        pilot_prompts = self.config.run.pilot_prompts
        pilot_size = min(prompts_to_answer, max(pilot_prompts, min(self.config.client.concurrency, 10 * pilot_prompts)))
        if not pilot_size or self.config.client.use_batch_api:
            return None  # by batch a few prompts may take as long as all of them
        journal_rows = run_estimate.journal_rows_for(self.run, pilot_size)
        previous_judging = self.run.manifest()["stages"].get("judge")
        if previous_judging and not 0 < (previous_judging["config"]["judge"]["limit"] or 0) <= journal_rows:
            return None  # what was judged before was more than a pilot: there is no going back to fewer
        self.run_log.log(f"pilot: {pilot_size:,} prompts go through generate and judge first")
        generate_result = self._run_stage(
            "generate", self._generate_call(backends, *self._half_of_budget(), max_prompts=pilot_size)
        )
        if generate_result is None or generate_result.stop_reason:
            return None
        if prompts_to_answer <= pilot_size:
            self.run_log.log("that was all of them: no estimate is needed")
        pilot_judge_config = self.config.judge.model_copy(
            update={"limit": min(journal_rows, self.config.judge.limit or journal_rows)}
        )
        pilot_config = self.config.model_copy(update={"judge": pilot_judge_config})
        judge_result = self._run_stage("judge", self._judge_call(backends, pilot_config, self.deadline))
        if judge_result is None or judge_result.stop_reason:
            return None
        n = self.config.sampler.n
        answers = {"generate": pilot_size * n, "judge": run_estimate.model_record_counts(self.run)["judge"]}
        pilot = {**run_estimate.pilot_facts(self.run, pilot_size, answers), "n": n}
        if not pilot["generate"]["requests"]:
            return None  # all was answered by starts that did not come to say what they took
        self.run.update_manifest("run", pilot=pilot)
        return pilot

    def _count_comparisons(self) -> int:
        """On how many prompts an evaluation will compare two models; of a source of its own only the limit is known."""
        eval_config = self.config.evaluate
        if eval_config.sources and eval_config.limit is None:
            self.run_log.log("the evaluation's own prompts are not counted yet: it is not in the estimate")
            return 0
        available = eval_config.limit if eval_config.sources else self.ingested.heldout
        return min(available or 0, eval_config.limit or available or 0)

    # The stages

    def _run_generate(self, backends: ModelBackends) -> bool:
        """Until all is answered, or until what is left of time and money is needed for judging what was. Gives whether
        there may be more of both once that is judged, which nothing had told before."""
        deadline, budget_usd, max_prompts = (
            self._judging_deadline(),
            self._remaining_usd(self.reserved_for_evaluation.cost_usd),
            None,
        )
        if self.estimate:
            now = time.monotonic()
            remaining_s, budget_usd, max_prompts = self.estimate.generate_limits(
                None if deadline is None else deadline - now, budget_usd
            )
            deadline = None if remaining_s is None else now + remaining_s
        elif self.no_estimate:
            deadline, budget_usd = self._half_of_budget()
        generate_result = self._run_stage("generate", self._generate_call(backends, deadline, budget_usd, max_prompts))
        incomplete = generate_result and (
            generate_result.stop_reason
            or (max_prompts is not None and max_prompts < generate_result.prompts - generate_result.heldout)
        )
        self.result.stop_reason = (
            "not all that is owed fits before the deadline and into the budget" if incomplete else None
        )
        return bool(
            self.no_estimate and generate_result and generate_result.stop_reason and generate_result.usage.answers
        )

    def _generate_call(
        self, backends: ModelBackends, deadline: float | None, budget_usd: float | None, max_prompts: int | None = None
    ) -> Callable[[], stages.GenerateResult]:
        limits = StageLimits(budget_usd, deadline)
        return lambda: stages.generate(
            self.run,
            self.config,
            self.run_log,
            backends,
            limits=limits,
            max_prompts=max_prompts,
            ingested=self.ingested,
        )

    def _judge_call(
        self, backends: ModelBackends, config: Config, deadline: float | None
    ) -> Callable[[], stages.JudgeResult]:
        return lambda: stages.judge(
            self.run,
            config,
            self.run_log,
            backends,
            limits=StageLimits(self._remaining_usd(self.reserved_for_evaluation.cost_usd), deadline),
        )

    def _run_stage(self, name: str, call: Callable[[], ResultT]) -> ResultT | None:
        """Call a stage until it is through. None where answers are still missing after a second time."""
        failed_attempts = 0
        waits = list(RETRY_WAITS_S)
        while True:
            try:
                result = call()
            except TooManyFailuresError as error:
                failed_attempts += 1
                if failed_attempts == 2:
                    self.failures[name] = error
                    self.run_log.log(f"{name}: {error.message}. The night goes on without them")
                    return None
                self.run_log.log(f"{name}: {error.message}. They are asked for once more")
            except ServerError:
                raise  # a server of our own has been started several times already
            except EndpointError as error:
                remaining_s = None if self.deadline is None else self.deadline - time.monotonic()
                if not waits or (remaining_s is not None and remaining_s < waits[0]):
                    raise
                wait_s = waits.pop(0)
                self.run_log.log(
                    f"{name}: {error.location}: {error.message}. It gets {format_duration(wait_s)} to come back"
                )
                time.sleep(wait_s)
            else:
                self.failures.pop(name, None)
                return result

    def _run_train(self) -> None:
        if self._deadline_passed():
            self.result.stop_reason = "the deadline is reached"
            self.run_log.log("training is left for another night: the deadline is reached")
            return
        try:
            with _raise_at(self.deadline):
                self.result.training = stages.train(
                    self.run, self.config, self.run_log, restart_if_dataset_changed=True
                )
        except DeadlineReached:
            self.result.stop_reason = "the deadline is reached"
            self.run_log.log("training is stopped by the deadline; the same command goes on from its newest checkpoint")
        except UsageError as error:  # a dataset that is too small to train on is no reason to lose the report
            if self.result.stop_reason is None:
                raise
            self.run_log.log(f"training is left for another night: {' '.join(str(error).split())}")

    def _run_evaluate(self) -> None:
        if self.config.run.train and not self.result.training:
            self.run_log.log("the evaluation is left for another night: it waits for the training")
            return
        if existing := existing_evaluation(self.run, self.config):
            self.run_log.log(f"{existing['trained']} was evaluated before: see the report")
            self.result.evaluation = existing
            return
        limits = StageLimits(self._remaining_usd(), self.deadline)
        if reason := new_meter("", self.config, limits).stop_reason():
            self.result.stop_reason = self._total_budget_reason(reason)
            self.run_log.log(f"the evaluation is left for another night: {self.result.stop_reason}")
            return
        _free_gpu_memory()
        with ModelBackends(self.run.log, self.config.client, self.run_log.log, self.config.cluster) as backends:
            evaluation = self._run_stage(
                "evaluate", lambda: evaluate(self.run, self.config, self.run_log, backends, limits=limits)
            )
        self.result.evaluation = evaluation
        if evaluation and evaluation["stopped"]:
            self.result.stop_reason = self._total_budget_reason(evaluation["stopped"])

    def _write_report(self) -> None:
        self.result.report = html_report.write_report(self.run)

    # Limits

    def _deadline_passed(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _judging_deadline(self) -> float | None:
        """When judging has to end: at the deadline, or earlier where evaluation and training are to have their share of
        what is left."""
        if self.deadline is None:
            return None
        now = time.monotonic()
        train_fraction = self.config.run.train_fraction if self.config.run.train else 0.0
        return now + max(0.0, self.deadline - self.reserved_for_evaluation.seconds - now) * (1.0 - train_fraction)

    def _half_of_budget(self) -> tuple[float | None, float | None]:
        """Until when, and for how many dollars, to generate where nothing tells what judging takes: half of each."""
        deadline, budget_usd = self._judging_deadline(), self._remaining_usd(self.reserved_for_evaluation.cost_usd)
        if (
            deadline is not None and not self.config.client.use_batch_api
        ):  # all of a batch is sent at once, and waited for
            deadline = (deadline + time.monotonic()) / 2
        return deadline, None if budget_usd is None else budget_usd / 2

    def _total_budget_reason(self, stop_reason: str) -> str:
        """Why a stage stopped, with the night's budget in the place of what was left of it for the stage."""
        return f"the budget of ${self.config.client.budget_usd:g} is spent" if "budget" in stop_reason else stop_reason

    def _remaining_usd(self, reserved_usd: float = 0.0) -> float | None:
        budget = self.config.client.budget_usd
        return None if budget is None else max(0.0, budget - run_estimate.spent_usd(self.run) - reserved_usd)


def _free_gpu_memory() -> None:
    """What a training in this process has left there, vLLM needs."""
    if torch := sys.modules.get("torch"):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _raise_at(deadline: float | None) -> Iterator[None]:
    """Throw :class:`DeadlineReached` into the block at ``deadline``. In other threads than the main one it does not."""
    if deadline is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_deadline(*_: object) -> None:
        raise DeadlineReached

    previous_handler = signal.signal(signal.SIGALRM, raise_deadline)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
