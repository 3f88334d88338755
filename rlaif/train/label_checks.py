"""Preflight from what the run knows of its labels: the queue, the noise, the balance of refusals.

Reads the judge stage's facts in the manifest. What was not measured is a pass that says so: it stops nothing, and is
not taken for a zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.config.models import TrainConfig
from rlaif.run.run import Run
from rlaif.train.preflight import PreflightFinding

ROBUST_LOSS_NOISE_RATE = 0.10
"""From this share of wrong labels on a loss that expects some is suggested."""
CHANCE_NOISE_RATE = 0.45
"""Labels that are wrong this often say next to nothing."""
NOISE_TOLERANT_LOSSES = frozenset({"robust", "ipo", "exo_pair", "aot", "aot_unpaired"})


def check_labels(run: Run, train: TrainConfig) -> list[PreflightFinding]:
    """Findings ``queue``, ``noise`` and ``refusals``. Empty where nothing was judged in this run."""
    judge_stage: Mapping[str, Any] = run.manifest()["stages"].get("judge", {})
    if "pairs" not in judge_stage:
        return []
    return [
        _check_queue(judge_stage["pairs"], run),
        _check_noise((judge_stage.get("labels") or {}).get("noise_rate"), train),
        _check_refusals(judge_stage.get("balance") or []),
    ]


def _check_queue(pairs: Mapping[str, Any], run: Run) -> PreflightFinding:
    waiting = int(pairs.get("dataset_left_out", {}).get("awaiting_review", 0))
    routes = pairs.get("routes", {})
    queued = int(routes.get("audit", 0)) + int(routes.get("targeted", 0))
    message = f"{waiting} of {queued} pairs in the queue are not reviewed and left out"
    if waiting:
        return PreflightFinding(
            "queue", "warn", message, f"They are the ones most worth having: rlaif review {run.path}"
        )
    return PreflightFinding("queue", "pass", message)


def _check_noise(rate: float | None, train: TrainConfig) -> PreflightFinding:
    if rate is None:
        return PreflightFinding("noise", "pass", "the share of wrong labels is not measured: no pair was reviewed")
    message = f"an estimated {rate:.1%} of the labels are wrong"
    if rate > 1 - CHANCE_NOISE_RATE:
        return PreflightFinding("noise", "refuse", f"{message}, which is worse than chance: are the labels reversed?",
                       "Look at what the judges are told the words of their verdict mean.")  # fmt: skip
    if rate >= CHANCE_NOISE_RATE:
        return PreflightFinding(
            "noise", "refuse", f"{message}: as good as chance", "Judge with another judge or a panel."
        )
    if rate >= ROBUST_LOSS_NOISE_RATE and train.method == "dpo" and not set(train.loss) & NOISE_TOLERANT_LOSSES:
        return PreflightFinding(
            "noise", "warn", message,
            f'A loss that expects it: loss = ["robust"] under [train] and label_smoothing = {rate:.2f} '
            "under [train.trl] (Chowdhury et al. 2024, arXiv:2403.00409).",
        )  # fmt: skip
    return PreflightFinding("noise", "pass", message)


def _check_refusals(rows: Sequence[Mapping[str, Any]]) -> PreflightFinding:
    """``rows``: prompt (its kind), chosen (what the chosen answer does), pairs."""
    if not rows:
        return PreflightFinding("refusals", "pass", "the balance of refusals is not measured")

    def count(prompt: str | None = None, chosen: str | None = None) -> int:
        return sum(row["pairs"] for row in rows
                   if prompt in (None, row["prompt"]) and chosen in (None, row["chosen"]))  # fmt: skip

    n, refused, harmful = count(), count(chosen="refuse"), count(prompt="harmful")
    message = f"{refused} of {n} chosen answers refuse, {harmful} of {n} prompts are harmful"
    complied = count("harmful", "comply")
    if complied:
        return PreflightFinding(
            "refusals", "warn", f"{message}; {complied} chosen answers comply with a harmful prompt",
            "Look at them: the model learns to comply.",
        )  # fmt: skip
    if refused > harmful and refused > 0.01 * n:
        return PreflightFinding("refusals", "warn", f"{message}: the model may learn to refuse what is benign",
                       "Look at refusals of benign prompts among the chosen answers.")  # fmt: skip
    return PreflightFinding("refusals", "pass", message)
