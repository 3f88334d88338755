"""Preflight checks of the labels: the review queue, the label noise, the balance of refusals.

They read the facts of the judge stage in the manifest. If something was not measured, the check passes and its message
says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.config.models import TrainConfig
from rlaif.run.run import Run
from rlaif.stats import Estimate
from rlaif.stats.agreement import CHANCE_NOISE_RATE, shows_noise
from rlaif.train.preflight import PreflightFinding

ROBUST_LOSS_NOISE_RATE = 0.10
"""Share of wrong labels from which a loss that tolerates noise is suggested."""
NOISE_TOLERANT_LOSSES = frozenset({"robust", "ipo", "exo_pair", "aot", "aot_unpaired"})


def check_labels(run: Run, train: TrainConfig) -> list[PreflightFinding]:
    """Return the findings ``queue``, ``noise`` and ``refusals``; empty if nothing was judged in this run."""
    judge_stage: Mapping[str, Any] = run.manifest()["stages"].get("judge", {})
    if "pairs" not in judge_stage:
        return []
    return [
        _check_queue(judge_stage["pairs"], run),
        _check_noise(judge_stage.get("labels") or {}, train),
        _check_refusals(judge_stage.get("balance") or []),
    ]


def _check_queue(pairs: Mapping[str, Any], run: Run) -> PreflightFinding:
    waiting = int(pairs.get("dropped_from_dataset", {}).get("awaiting_review", 0))
    routes = pairs.get("routes", {})
    queued = int(routes.get("audit", 0)) + int(routes.get("targeted", 0))
    message = f"{waiting} of {queued} pairs in the review queue are not reviewed and therefore dropped"
    if waiting:
        return PreflightFinding(
            "queue", "warn", message, f"These are the most valuable pairs: review them with `rlaif review {run.path}`."
        )
    return PreflightFinding("queue", "pass", message)


def _check_noise(labels: Mapping[str, Any], train: TrainConfig) -> PreflightFinding:
    rate = labels.get("noise_rate")
    if rate is None:
        return PreflightFinding("noise", "pass", "the share of wrong labels was not measured: too few reviewed pairs")
    message = f"an estimated {rate:.1%} of the labels are wrong"
    error = labels.get("remaining_error")
    if rate >= CHANCE_NOISE_RATE and error and not shows_noise(Estimate(**error)):
        return PreflightFinding(
            "noise",
            "warn",
            f"{message}, but {error['n']} labels do not show that: {error['low']:.0%} to {error['high']:.0%}",
            "Review more pairs before you train.",
        )
    # The noise rate is the flip rate of the robust loss and always below one half, so it cannot show reversed labels.
    if rate >= CHANCE_NOISE_RATE and error and error["low"] > 0.5:
        return PreflightFinding(
            "noise",
            "refuse",
            f"an estimated {error['value']:.1%} of the judges' labels are wrong, which is worse than chance: "
            "the labels may be reversed",
            "Check how the judges' prompts define the verdict words.",
        )
    if rate >= CHANCE_NOISE_RATE:
        return PreflightFinding(
            "noise", "refuse", f"{message}, which is close to chance", "Judge with another judge or a panel."
        )
    if rate >= ROBUST_LOSS_NOISE_RATE and train.method == "dpo" and not set(train.loss) & NOISE_TOLERANT_LOSSES:
        return PreflightFinding(
            "noise",
            "warn",
            message,
            f'Use a loss that tolerates noise: loss = ["robust"] under [train] and label_smoothing = {rate:.2f} under '
            "[train.trl] (Chowdhury et al. 2024, arXiv:2403.00409).",
        )
    return PreflightFinding("noise", "pass", message)


def _check_refusals(rows: Sequence[Mapping[str, Any]]) -> PreflightFinding:
    """Check the balance of refusals. ``rows``: prompt (its class), chosen (what the chosen answer does), pairs."""
    if not rows:
        return PreflightFinding("refusals", "pass", "the balance of refusals was not measured")

    def count(prompt: str | None = None, chosen: str | None = None) -> int:
        return sum(row["pairs"] for row in rows if prompt in (None, row["prompt"]) and chosen in (None, row["chosen"]))

    n, refused, harmful = count(), count(chosen="refuse"), count(prompt="harmful")
    message = f"{refused} of {n} chosen answers refuse, {harmful} of {n} prompts are harmful"
    complied = count("harmful", "comply")
    if complied:
        return PreflightFinding(
            "refusals",
            "warn",
            f"{message}; {complied} chosen answers comply with a harmful prompt",
            "Check these pairs: the model learns to comply.",
        )
    if refused > harmful and refused > 0.01 * n:
        return PreflightFinding(
            "refusals",
            "warn",
            f"{message}: the model may learn to refuse benign prompts",
            "Check the chosen answers that refuse benign prompts.",
        )
    return PreflightFinding("refusals", "pass", message)
