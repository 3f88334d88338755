"""The result of ``rlaif run`` and its summary line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif.errors import TooManyFailuresError
from rlaif.evaluate.evaluation_result import EvaluationResult
from rlaif.format import format_duration
from rlaif.labeling.build_dataset import BuildResult
from rlaif.llm.stop_reason import StopReason

if TYPE_CHECKING:
    from rlaif.train.artifacts import TrainResult


@dataclass
class RunResult:
    """Outcome of a run. Each part is None if the run did not get to it."""

    stop_reason: StopReason | None = None
    """Reason why not everything was done."""
    failure: TooManyFailuresError | None = None
    """Requests that failed again in the second attempt."""
    build: BuildResult | None = None
    training: TrainResult | None = None
    evaluation: EvaluationResult | None = None
    report: Path | None = None
    cost_usd: float = 0.0
    """US dollars of all starts of the run."""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def summary(self, run: Path, status: str, *, done: bool) -> str:
        """Return the run in one line, for the log and the notification."""
        parts = [f"rlaif run {run}: {status}{' in' if done else '; after'} {format_duration(self.seconds)}"]
        if self.build:
            counts = self.build.dataset_counts
            parts.append(f"{counts.train:,} training pairs, {counts.dropped['awaiting_review']:,} awaiting review")
        if self.training:
            parts.append(f"trained for {self.training.steps:,} steps")
        if self.evaluation and (rate := self.evaluation.win_rate):
            parts.append(f"win rate {rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]")
        if self.cost_usd:
            parts.append(f"${self.cost_usd:,.2f} in total")
        if self.report:
            parts.append(f"report: {self.report}")
        return "; ".join(parts)
