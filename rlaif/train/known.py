"""Preflight from what the run knows of its labels: the queue, the noise, the balance of refusals.

Reads the judge stage's facts in the manifest. What was not measured is a pass that says so: it stops nothing, and is
not taken for a zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.config import TrainConfig
from rlaif.run.directory import Run
from rlaif.train.preflight import Finding

NOISY = 0.10
"""From this share of wrong labels on a loss that expects some is suggested."""
HOPELESS = 0.45
"""Labels that are wrong this often say next to nothing."""
FORGIVING = frozenset({"robust", "ipo", "exo_pair", "aot", "aot_unpaired"})


def check(run: Run, train: TrainConfig) -> list[Finding]:
    """Findings ``queue``, ``noise`` and ``refusals``. Empty where nothing was judged in this run."""
    judged: Mapping[str, Any] = run.manifest()["stages"].get("judge", {})
    if "pairs" not in judged:
        return []
    return [
        _queue(judged["pairs"], run),
        _noise((judged.get("labels") or {}).get("noise_rate"), train),
        _refusals(judged.get("balance") or []),
    ]


def _queue(pairs: Mapping[str, Any], run: Run) -> Finding:
    waiting = int(pairs.get("dataset_left_out", {}).get("waits for review", 0))
    routes = pairs.get("routes", {})
    queued = int(routes.get("audit", 0)) + int(routes.get("targeted", 0))
    message = f"{waiting} of {queued} pairs in the queue are not reviewed and left out"
    if waiting:
        return Finding("queue", "warn", message, f"They are the ones most worth having: rlaif review {run.path}")
    return Finding("queue", "pass", message)


def _noise(rate: float | None, train: TrainConfig) -> Finding:
    if rate is None:
        return Finding("noise", "pass", "the share of wrong labels is not measured: no pair was reviewed")
    message = f"an estimated {rate:.1%} of the labels are wrong"
    if rate > 1 - HOPELESS:
        return Finding("noise", "refuse", f"{message}, which is worse than chance: are the labels reversed?",
                       "Look at what the judges are told the words of their verdict mean.")  # fmt: skip
    if rate >= HOPELESS:
        return Finding("noise", "refuse", f"{message}: as good as chance", "Judge with another judge or a panel.")
    if rate >= NOISY and train.method == "dpo" and not set(train.loss) & FORGIVING:
        return Finding(
            "noise", "warn", message,
            f'A loss that expects it: loss = ["robust"] under [train] and label_smoothing = {rate:.2f} '
            "under [train.extra] (Chowdhury et al. 2024, arXiv:2403.00409).",
        )  # fmt: skip
    return Finding("noise", "pass", message)


def _refusals(rows: Sequence[Mapping[str, Any]]) -> Finding:
    """``rows``: prompt (its kind), chosen (what the chosen answer does), pairs."""
    if not rows:
        return Finding("refusals", "pass", "the balance of refusals is not measured")

    def count(prompt: str | None = None, chosen: str | None = None) -> int:
        return sum(row["pairs"] for row in rows
                   if prompt in (None, row["prompt"]) and chosen in (None, row["chosen"]))  # fmt: skip

    n, refused, harmful = count(), count(chosen="refuse"), count(prompt="harmful")
    message = f"{refused} of {n} chosen answers refuse, {harmful} of {n} prompts are harmful"
    complied = count("harmful", "comply")
    if complied:
        return Finding(
            "refusals", "warn", f"{message}; {complied} chosen answers comply with a harmful prompt",
            "Look at them: the model learns to comply.",
        )  # fmt: skip
    if refused > harmful and refused > 0.01 * n:
        return Finding("refusals", "warn", f"{message}: the model may learn to refuse what is benign",
                       "Look at refusals of benign prompts among the chosen answers.")  # fmt: skip
    return Finding("refusals", "pass", message)
