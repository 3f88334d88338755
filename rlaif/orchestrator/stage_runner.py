"""Calls of the stages within a run's limits, with a second attempt for failed requests and waits for endpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from rlaif.config.models import Config
from rlaif.errors import EndpointError, ServerError, TooManyFailuresError
from rlaif.evaluate.evaluation_result import EvaluationResult
from rlaif.evaluate.run_evaluation import evaluate
from rlaif.format import format_duration
from rlaif.generate.ingest import IngestResult
from rlaif.llm.backends import ModelBackends
from rlaif.llm.stage_limits import StageLimits
from rlaif.orchestrator import stages
from rlaif.orchestrator.run_limits import RunLimits
from rlaif.orchestrator.run_log import RunLog
from rlaif.run.run import Run

ResultT = TypeVar("ResultT")
RETRY_WAITS_S = (60.0, 300.0, 900.0)
"""Waits before a stage resumes after its endpoint failed: the first failure, the second, the third."""


class StageRunner:
    """The stages of one run. Each method returns None if requests failed in two attempts; ``failures`` has the error.

    ``ingested``: the prompts of the run, once they are ingested.
    """

    def __init__(self, run: Run, config: Config, run_log: RunLog, limits: RunLimits) -> None:
        self.run, self.config, self.run_log, self.limits = run, config, run_log, limits
        self.ingested = IngestResult()
        self.failures: dict[str, TooManyFailuresError] = {}

    def generate(
        self,
        backends: ModelBackends,
        deadline: float | None,
        budget_usd: float | None,
        max_prompts: int | None = None,
    ) -> stages.GenerateResult | None:
        limits = StageLimits(budget_usd, deadline)
        return self._with_retries(
            "generate",
            lambda: stages.generate(
                self.run,
                self.config,
                self.run_log,
                backends,
                limits=limits,
                max_prompts=max_prompts,
                ingested=self.ingested,
            ),
        )

    def judge(
        self, backends: ModelBackends, deadline: float | None, config: Config | None = None
    ) -> stages.JudgeResult | None:
        """``config``: the settings to judge with, if they differ from the run's."""
        return self._with_retries(
            "judge",
            lambda: stages.judge(
                self.run,
                config or self.config,
                self.run_log,
                backends,
                limits=StageLimits(self.limits.labeling_usd(), deadline),
            ),
        )

    def evaluate(self, backends: ModelBackends, limits: StageLimits) -> EvaluationResult | None:
        return self._with_retries(
            "evaluate", lambda: evaluate(self.run, self.config, self.run_log, backends, limits=limits)
        )

    def _with_retries(self, stage: str, call: Callable[[], ResultT]) -> ResultT | None:
        attempts_with_failures = 0
        waits = list(RETRY_WAITS_S)
        while True:
            try:
                result = call()
            except TooManyFailuresError as error:
                attempts_with_failures += 1
                if attempts_with_failures == 2:
                    self.failures[stage] = error
                    self.run_log.log(f"{stage}: {error.message}. The run continues without them")
                    return None
                self.run_log.log(f"{stage}: {error.message}. Retrying them once")
            except ServerError:
                raise  # rlaif has already restarted its own server several times
            except EndpointError as error:
                remaining_s = self.limits.remaining_s()
                if not waits or (remaining_s is not None and remaining_s < waits[0]):
                    raise
                wait_s = waits.pop(0)
                self.run_log.log(f"{stage}: {error.location}: {error.message}; retrying in {format_duration(wait_s)}")
                time.sleep(wait_s)
            else:
                self.failures.pop(stage, None)
                return result
