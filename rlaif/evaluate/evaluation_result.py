"""The result of an evaluation, and its JSON form in RUN/evaluation/evaluation.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from rlaif.evaluate.answer_metrics import CheckPassRates, RefusalRates
from rlaif.llm.stop_reason import StopReason
from rlaif.run.atomic_write import atomic_write_bytes
from rlaif.stats import Estimate

ESTIMATES = ("win_rate", "length_controlled_win_rate", "length_ratio", "kl_per_answer", "kl_per_token")


@dataclass(frozen=True)
class EvaluationSample:
    """One prompt with both answers, for people to read."""

    prompt_id: str
    prompt: str
    reference: str
    trained: str
    preferred: Literal["trained", "reference", "tie"]


@dataclass
class EvaluationResult:
    """Metrics of the trained model against its reference, over the prompts that both have answered
    completely.

    An estimate is None if nothing was measured. KL divergences are in nats.
    """

    reference: str
    trained: str
    judges: list[str]
    source: str
    """Sources of the prompts, in words."""
    limit: int | None
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    prompts: int
    wins: int
    ties: int
    losses: int
    identical_answers: int
    incomplete_reference: int
    incomplete_trained: int
    unparsable_verdicts: int
    win_rate: Estimate | None
    length_controlled_win_rate: Estimate | None
    length_ratio: Estimate | None
    kl_per_answer: Estimate | None
    kl_per_token: Estimate | None
    refusals: list[RefusalRates]
    checks: CheckPassRates | None
    warnings: list[str] = field(default_factory=list)
    samples: list[EvaluationSample] = field(default_factory=list)
    stopped: StopReason | None = None
    """Reason why not everything was asked, or None."""

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values. A list of rows replaces ``checks``."""
        checks = self.checks and [
            {"model": name, "pass_rate": estimate} for name, estimate in asdict(self.checks).items()
        ]
        return {**asdict(self), "checks": checks}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> EvaluationResult:
        """Rebuild the result from :meth:`as_json`. Raises KeyError, TypeError or ValueError for other values."""
        estimates = {name: _to_estimate(stored[name]) for name in ESTIMATES}
        refusals = [
            RefusalRates(row["prompt_class"], _to_estimate(row["reference"]), _to_estimate(row["trained"]))
            for row in stored["refusals"]
        ]
        checks = stored["checks"] and CheckPassRates(
            **{row["model"]: Estimate(**row["pass_rate"]) for row in stored["checks"]}
        )
        samples = [EvaluationSample(**sample) for sample in stored["samples"]]
        stopped = stored["stopped"] and StopReason(stored["stopped"])
        parsed = {**estimates, "refusals": refusals, "checks": checks, "samples": samples, "stopped": stopped}
        return cls(**{**stored, **parsed})

    def write(self, path: Path) -> None:
        """Write the result to ``path`` as JSON."""
        atomic_write_bytes(path, orjson.dumps(self.as_json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_evaluation(path: Path) -> EvaluationResult | None:
    """Read a result file. Returns None if it is missing, unreadable or of another version."""
    try:
        return EvaluationResult.from_json(orjson.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _to_estimate(stored: dict[str, Any] | None) -> Estimate | None:
    return None if stored is None else Estimate(**stored)
