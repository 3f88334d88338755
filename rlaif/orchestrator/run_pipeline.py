"""``rlaif run``: all stages as one job. Stop it at any time; the same command resumes.

    preflight   disk, settings, endpoints, packages: before any request
    pilot       the first prompts through generate and judge; the estimate is logged before the rest starts
    generate    until all prompts are answered, or its share of time and money is used
    judge       ask the panel, route the pairs, write tables/ and dataset/
    report      report.html; then training and evaluation, if requested, in the remaining time
    end         one line to the webhook or command of [run]; details are in RUN/log/run.log

The run's lock is held throughout. If an endpoint fails later, rlaif waits and retries; requests that failed are
retried once per stage. The budget counts every dollar of the run, in all of its starts.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time

from rlaif.config.models import Config
from rlaif.errors import RlaifError, UsageError
from rlaif.evaluate.trained_model import existing_evaluation
from rlaif.judge import rule_based
from rlaif.llm.backends import ModelBackends
from rlaif.llm.reporter import Reporter
from rlaif.llm.stage_limits import StageLimits, new_meter
from rlaif.llm.stop_reason import StopReason, describe_stop
from rlaif.orchestrator import run_preflight, stages
from rlaif.orchestrator.notify import notify
from rlaif.orchestrator.pilot import estimate_from_pilot
from rlaif.orchestrator.run_limits import DeadlineReached, RunLimits, raise_at
from rlaif.orchestrator.run_log import RunLog
from rlaif.orchestrator.run_result import RunResult
from rlaif.orchestrator.stage_runner import StageRunner
from rlaif.planning import run_estimate
from rlaif.planning.run_estimate import RunEstimate
from rlaif.report import html_report
from rlaif.run.run import Run

BUDGET_REASONS = (StopReason.BUDGET, StopReason.NEXT_BATCH_OVER_BUDGET)


def run_pipeline(run: Run, config: Config, reporter: Reporter) -> RunResult:
    """Run all stages. Returns if everything is done, or if deadline or budget stopped the run early.

    Raises the error that ended the run (KeyboardInterrupt included), and :class:`TooManyFailuresError` after the last
    stage if requests failed.
    """
    started = time.monotonic()
    if not _has_policy(config) and not run.journal_path("completions").exists():
        config.policies_resolved()  # raises UsageError: without a policy there must be imported answers
    with run.lock():
        run_log = RunLog(run.log / "run.log", reporter)
        result, status, done = RunResult(), "failed", False
        try:
            run.start_stage("run", config)
            _Pipeline(run, config, run_log, result).execute()
            status, done = _end_status(result, config), result.stop_reason is None and result.failure is None
        except (KeyboardInterrupt, SystemExit):
            status = "interrupted; rerun the same command to resume"
            raise
        except RlaifError as error:
            location = f"{error.location}: " if error.location else ""
            status = f"failed: {location}{' '.join(error.message.split())}"
            raise
        except Exception as error:
            status = f"failed: unexpected {type(error).__name__}: {' '.join(str(error).split())}"
            raise
        finally:
            result.seconds = time.monotonic() - started
            with contextlib.suppress(RlaifError, OSError):  # never hide the error that ended the run
                result.cost_usd = run_estimate.spent_usd(run)
                run.finish_stage("run", status=status, cost_usd=result.cost_usd, seconds=round(result.seconds, 3))
            line = result.summary(run.path, status, done=done)
            run_log.log(line)
            details = {"run": str(run.path), "status": status, "cost_usd": result.cost_usd}
            for failure in notify(config.run, line, details):
                run_log.log(f"warning: {failure}")
            run_log.close()
    if result.failure:
        raise result.failure
    return result


def _has_policy(config: Config) -> bool:
    return bool(config.policies or config.sampler.model)


def _end_status(result: RunResult, config: Config) -> str:
    status = "done"
    if result.stop_reason:
        status = f"stopped early, {describe_stop(result.stop_reason, config.client.budget_usd)}"
    return f"{status}, but some requests failed (see the log)" if result.failure else status


class _Pipeline:
    """One start of ``rlaif run``. Fills ``result`` as it proceeds."""

    def __init__(self, run: Run, config: Config, run_log: RunLog, result: RunResult) -> None:
        self.run, self.config, self.run_log, self.result = run, config, run_log, result
        self.limits = RunLimits(run, config)
        self.stage_runner = StageRunner(run, config, run_log, self.limits)
        self.generates = _has_policy(config)

    def execute(self) -> None:
        self._log_start()
        self._preflight_and_ingest()
        with self._backends() as backends:
            judge_result = self._generate_and_judge(backends)
        self.result.build = judge_result.build if judge_result else stages.rebuild_dataset(self.run, self.config)
        self._write_report()
        if self.config.run.train:
            self._train()
            self._write_report()
        if self.config.run.evaluate:
            self._evaluate()
            self._write_report()
        self.result.failure = next(iter(self.stage_runner.failures.values()), None)

    def _log_start(self) -> None:
        run_config, budget_usd = self.config.run, self.config.client.budget_usd
        limits = [
            f"until {run_config.until}" if run_config.until else "",
            f"for {run_config.max_duration}" if run_config.max_duration else "",
            f"budget ${budget_usd:g}" if budget_usd else "",
            "with training" if run_config.train else "",
            "with evaluation" if run_config.evaluate else "",
        ]
        self.run_log.write("")
        self.run_log.write(f"===== rlaif run {self.run.path}, process {os.getpid()}")
        self.run_log.log(f"run started: {', '.join(filter(None, limits)) or 'no deadline, no budget'}")

    def _preflight_and_ingest(self) -> None:
        lines, unreachable = run_preflight.preflight(self.run, self.config, generates=self.generates)
        if self.generates:
            self.stage_runner.ingested = stages.run_ingest(self.run, self.config, self.run_log)
            rule_based.validate_prompt_checks(self.run.journal_path("prompts"))
        lines += run_preflight.raise_if_needed(self.run, self.config, unreachable)
        for line in lines:
            self.run_log.log(f"preflight: {line}")

    def _backends(self) -> ModelBackends:
        return ModelBackends(self.run.log, self.config.client, self.run_log.log, self.config.cluster)

    # Generate and judge

    def _generate_and_judge(self, backends: ModelBackends) -> stages.JudgeResult | None:
        """Returns None if requests to the judges failed in two attempts."""
        estimate = estimate_from_pilot(self.stage_runner, backends, self.result.warnings) if self.generates else None
        while True:
            may_repeat = self.generates and self._generate(backends, estimate)
            # Judge even if no request may be sent: pairs are built from the verdicts that exist.
            judge_result = self.stage_runner.judge(backends, self.limits.labeling_deadline())
            if judge_result is None:
                return None
            if judge_result.stop_reason in BUDGET_REASONS:
                self.result.stop_reason = judge_result.stop_reason
            self.result.stop_reason = self.result.stop_reason or judge_result.stop_reason
            if not may_repeat or judge_result.stop_reason:
                return judge_result

    def _generate(self, backends: ModelBackends, estimate: RunEstimate | None) -> bool:
        """Answer prompts until all are answered or their share of time and money is used; the rest is for judging.

        Returns True if another round may be affordable after judging, because the cost of judging was unknown.
        """
        if estimate is None:
            deadline, budget_usd = self.limits.half_for_generating()
            max_prompts = None
        else:
            deadline, budget_usd, max_prompts = self._generate_share(estimate)
        generated = self.stage_runner.generate(backends, deadline, budget_usd, max_prompts)
        if generated is None:
            self.result.stop_reason = None
            return False
        is_capped = max_prompts is not None and max_prompts < generated.prompts - generated.heldout
        incomplete = bool(generated.stop_reason) or is_capped
        self.result.stop_reason = StopReason.DOES_NOT_FIT if incomplete else None
        return estimate is None and bool(generated.stop_reason) and bool(generated.usage.answers)

    def _generate_share(self, estimate: RunEstimate) -> tuple[float | None, float | None, int | None]:
        """Deadline, US dollars and number of prompts for ``generate``. Shared with judging only if not all fits."""
        deadline, budget_usd = self.limits.labeling_deadline(), self.limits.labeling_usd()
        fraction = estimate.fraction_that_fits(
            self.limits.remaining_s(), self.limits.remaining_usd(), self.limits.train_fraction
        )
        if fraction >= 1.0:
            return deadline, budget_usd, None
        now = time.monotonic()
        seconds, budget_usd, max_prompts = estimate.generate_limits(
            None if deadline is None else deadline - now, budget_usd
        )
        return None if seconds is None else now + seconds, budget_usd, max_prompts

    # Report, training, evaluation

    def _write_report(self) -> None:
        self.result.report = html_report.write_report(self.run)

    def _train(self) -> None:
        if self.limits.deadline_passed():
            self.result.stop_reason = StopReason.DEADLINE
            self.run_log.log("training is postponed to the next start: the deadline has passed")
            return
        try:
            with raise_at(self.limits.deadline):
                self.result.training = stages.train(
                    self.run, self.config, self.run_log, restart_if_dataset_changed=True
                )
        except DeadlineReached:
            self.result.stop_reason = StopReason.DEADLINE
            self.run_log.log(
                "the deadline stopped the training; rerun the same command to resume from the newest checkpoint"
            )
        except UsageError as error:
            if self.result.stop_reason is None:
                raise
            # The run stopped early, so the dataset may be too small to train on. Keep the report.
            self.run_log.log(f"training is postponed to the next start: {' '.join(str(error).split())}")

    def _evaluate(self) -> None:
        if self.config.run.train and not self.result.training:
            self.run_log.log("the evaluation is postponed to the next start: it needs the trained model")
            return
        if existing := existing_evaluation(self.run, self.config):
            self.run_log.log(f"{existing.trained} is already evaluated: see the report")
            self.result.evaluation = existing
            return
        limits = StageLimits(self.limits.remaining_usd(), self.limits.deadline)
        if reason := new_meter("", self.config, limits).stop_reason():
            self.result.stop_reason = reason
            reason_text = describe_stop(reason, self.config.client.budget_usd)
            self.run_log.log(f"the evaluation is postponed to the next start: {reason_text}")
            return
        _free_gpu_memory()
        with self._backends() as backends:
            evaluation = self.stage_runner.evaluate(backends, limits)
        self.result.evaluation = evaluation
        if evaluation and evaluation.stopped:
            self.result.stop_reason = evaluation.stopped


def _free_gpu_memory() -> None:
    """Release the GPU memory that a training in this process still holds: vLLM needs it."""
    if torch := sys.modules.get("torch"):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
