"""The deadline and the budget of a run, and the share that each stage gets."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from rlaif.config.models import Config
from rlaif.planning import run_estimate
from rlaif.run.run import Run


class RunLimits:
    """Time and money of one run.

    The budget counts every dollar that the run ever cost, so a requeued job does not start with the full budget again.
    ``deadline``: on the clock of ``time.monotonic()``, or None. ``reserved_for_evaluation``: time and money that the
    evaluation at the end needs.
    """

    def __init__(self, run: Run, config: Config) -> None:
        self._run, self._config = run, config
        self.deadline = run_estimate.deadline_monotonic(config.run)
        self.reserved_for_evaluation = run_estimate.Cost()

    @property
    def train_fraction(self) -> float:
        """Fraction of the remaining time that is kept for training."""
        return self._config.run.train_fraction if self._config.run.train else 0.0

    def remaining_s(self) -> float | None:
        """Seconds to the deadline; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def deadline_passed(self) -> bool:
        return self.remaining_s() == 0.0

    def remaining_usd(self) -> float | None:
        """US dollars left of the budget; None without one."""
        budget = self._config.client.budget_usd
        return None if budget is None else max(0.0, budget - run_estimate.spent_usd(self._run))

    def labeling_usd(self) -> float | None:
        """US dollars left for generate and judge, without those reserved for the evaluation."""
        remaining = self.remaining_usd()
        return None if remaining is None else max(0.0, remaining - self.reserved_for_evaluation.cost_usd)

    def labeling_deadline(self) -> float | None:
        """End of generate and judge: the deadline, or earlier if evaluation and training need a share of the time."""
        if self.deadline is None:
            return None
        now = time.monotonic()
        available_s = max(0.0, self.deadline - self.reserved_for_evaluation.seconds - now)
        return now + available_s * (1.0 - self.train_fraction)

    def half_for_generating(self) -> tuple[float | None, float | None]:
        """Deadline and US dollars of ``generate`` if the cost of judging is unknown: half of each."""
        deadline, budget_usd = self.labeling_deadline(), self.labeling_usd()
        # A batch is submitted at once and then awaited: half of the time would not halve it.
        if deadline is not None and not self._config.client.use_batch_api:
            deadline = (deadline + time.monotonic()) / 2
        return deadline, None if budget_usd is None else budget_usd / 2


class DeadlineReached(BaseException):
    """Raised inside a training at the deadline. Not an Exception, because libraries catch those."""


@contextlib.contextmanager
def raise_at(deadline: float | None) -> Iterator[None]:
    """Raise :class:`DeadlineReached` inside the block at ``deadline``. Has no effect outside the main thread."""
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
