"""Measure how often the 95 % intervals of rlaif cover the truth in small samples: `python -m benchmarks.coverage`.

Prints two tables. The first simulates whole runs: pairs of a calibrated or overconfident judge are routed, annotators
label the queue (with or without ties and skips), the labels calibrate the panel, and label quality is estimated. The
truth is known for every pair. The second draws samples for kappa, alpha and the calibration error. No model is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlaif.pair import human_calibration, label_quality, routing
from rlaif.report.next_step import estimate_problems
from rlaif.stats import Estimate, cohen_kappa, expected_calibration_error, krippendorff_alpha

SIZES = (20, 50, 100, 300, 2000)
SAMPLE_SIZES = (10, 20, 30, 50, 100, 300)
SIMULATIONS = 200
REVIEWS = {"pair_id": pl.String, "annotator": pl.String, "choice": pl.String, "preferred": pl.String,
           "created_at": pl.Float64}  # fmt: skip
VOTES = {"a": pl.String, "b": pl.String, "panel_judge": pl.String, "weight": pl.Float64, "p_ab": pl.Float64,
         "p_ba": pl.Float64}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A figure of one simulation with its true value; ``estimate`` is None if rlaif reports no figure."""

    figure: str
    estimate: Estimate | None
    truth: float

    @property
    def covered(self) -> bool:
        """True if the interval contains the truth. An unknown figure claims nothing."""
        return self.estimate is None or self.estimate.low - 1e-9 <= self.truth <= self.estimate.high + 1e-9


def simulate_run(
    rng: np.random.Generator, n: int, *, overconfidence: float, undecided: float, discrete: bool = False
) -> tuple[list[Trial], list[str]]:
    """Simulate a run with ``n`` kept pairs. Returns its figures, and the reasons for which training would be refused.

    ``overconfidence``: by how much the judge's confidence exceeds its accuracy. ``undecided``: share of pairs in which
    annotators choose no answer; half of them are ties, the other half are skipped. ``discrete``: the judge has only
    five levels of confidence, and many pairs share one.
    """
    confidence = rng.choice([0.7, 0.8, 0.9, 0.95, 0.98], n) if discrete else 0.65 + 0.34 * rng.beta(2, 1, n)
    is_correct = rng.random(n) < np.maximum(0.5, confidence - overconfidence)
    judged_a = rng.random(n) < 0.5
    better = np.where(is_correct == judged_a, "a", "b")
    kind = rng.choice(["choice", "tie", "skip"], n, p=[1 - undecided, undecided / 2, undecided / 2])
    pairs = pl.DataFrame({
        "pair_id": [f"{i:04}" for i in range(n)], "prompt_id": [f"p{i}" for i in range(n)],
        "a": [f"{i}-a" for i in range(n)], "b": [f"{i}-b" for i in range(n)],
        "prob_a": np.where(judged_a, confidence, 1 - confidence), "preferred": np.where(judged_a, "a", "b"),
        "decided_by": "panel", "outcome": "win", "kept": True, "chars_a": 100, "chars_b": 100,
        "flags": pl.Series([[]] * n, dtype=pl.List(pl.String)), "drop_reason": pl.Series([None] * n, dtype=pl.String),
        "score_a": pl.Series([None] * n, dtype=pl.Float64), "score_b": pl.Series([None] * n, dtype=pl.Float64),
        "label": np.where(kind == "choice", better, kind),
    })  # fmt: skip
    tags = pl.DataFrame(schema={"prompt_id": pl.String, "tags": pl.List(pl.String)})
    pairs = routing.route_pairs(pairs, tags, human_fraction=0.1, seed=int(rng.integers(1 << 30)))
    shown = pairs.filter(pl.col("route").is_in(["audit", "targeted"])).select("pair_id", "label")
    labels = shown.filter(pl.col("label") != "skip")
    reviews = shown.select(
        "pair_id",
        annotator=pl.lit("ada"),
        choice=pl.when(pl.col("label").is_in(["a", "b"])).then(pl.lit("left")).otherwise("label"),
        preferred=pl.when(pl.col("label").is_in(["a", "b"])).then("label"),
        created_at=pl.int_range(pl.len()).cast(pl.Float64),
    )
    truth = pairs.select("pair_id", true_label="label")
    pairs, _ = human_calibration.apply_human_calibration(
        pairs.drop("label"), pl.DataFrame(schema=VOTES), labels, min_confidence=0.65, max_tie_drop_fraction=0.35,
        num_judged=n,
    )  # fmt: skip
    quality = label_quality.estimate_label_quality(pairs, labels, reviews, seed=0)
    joined = pairs.join(truth, on="pair_id")
    chosen = joined.filter(pl.col("true_label").is_in(["a", "b"]))
    rows = chosen.filter(pl.col("route") == "judge")
    wrong = rows.select((pl.col("true_label") != pl.col("preferred")).mean()).item()
    trials = [
        Trial("agreement", quality.agreement, _share(chosen, pl.col("true_label") == pl.col("preferred_by_judges"))),
        Trial("tie_rate", quality.tie_rate, _share(joined.filter(pl.col("true_label") != "skip"),
                                                   pl.col("true_label") == "tie")),
        Trial("skip_rate", quality.skip_rate, _share(joined, pl.col("true_label") == "skip")),
        Trial("remaining_error", quality.remaining_error, 0.0 if wrong is None else float(wrong)),
    ]  # fmt: skip
    return trials, list(estimate_problems(quality.summary()))


def _share(rows: pl.DataFrame, condition: pl.Expr) -> float:
    return float(rows.select(condition.mean()).item() or 0.0)


def simulate_runs(
    n: int, simulations: int = SIMULATIONS, *, overconfidence: float, undecided: float, discrete: bool = False
) -> tuple[dict[str, list[Trial]], int]:
    """Return the trials per figure, and the number of runs whose labels rlaif refused to train on."""
    rng = np.random.default_rng([n, round(100 * overconfidence), round(100 * undecided), discrete])
    trials: dict[str, list[Trial]] = {}
    stops = 0
    for _ in range(simulations):
        figures, problems = simulate_run(rng, n, overconfidence=overconfidence, undecided=undecided, discrete=discrete)
        stops += bool(problems)
        for trial in figures:
            trials.setdefault(trial.figure, []).append(trial)
    return trials, stops


def coverage(trials: list[Trial]) -> tuple[float, float, float]:
    """Return the share of covered truths among all trials and among those with a figure, and the share without one."""
    known = [trial for trial in trials if trial.estimate is not None]
    among_known = np.mean([trial.covered for trial in known]) if known else 1.0
    return float(np.mean([trial.covered for trial in trials])), float(among_known), 1 - len(known) / len(trials)


def sample_kappa(rng: np.random.Generator, n: int, share: float, accuracy: float) -> Trial:
    """Two annotators who find the true label with ``accuracy``; ``share`` of the labels are of one kind."""
    right = np.array([[accuracy, 1 - accuracy], [1 - accuracy, accuracy]])
    cells = share * np.outer(right[0], right[0]) + (1 - share) * np.outer(right[1], right[1])
    return Trial("kappa", cohen_kappa(rng.multinomial(n, cells.ravel()).reshape(2, 2)), _true_kappa(cells))


def _true_kappa(cells: np.ndarray) -> float:
    expected = float(cells.sum(axis=0) @ cells.sum(axis=1))
    return (float(np.trace(cells)) - expected) / (1 - expected)


def sample_alpha(rng: np.random.Generator, n: int, share: float, accuracy: float) -> Trial:
    """The same with Krippendorff's alpha, which in the population equals kappa if both annotators are alike."""
    right = np.array([[accuracy, 1 - accuracy], [1 - accuracy, accuracy]])
    cells = share * np.outer(right[0], right[0]) + (1 - share) * np.outer(right[1], right[1])
    is_first = rng.random(n) < share
    labels = np.where(rng.random((n, 2)) < accuracy, is_first[:, None], ~is_first[:, None])
    return Trial("alpha", krippendorff_alpha([[str(label) for label in unit] for unit in labels]), _true_kappa(cells))


def sample_calibration_error(rng: np.random.Generator, n: int, gap: float) -> Trial:
    """A judge whose confidence exceeds its accuracy by ``gap``, in bins of 0.05."""
    # The levels are the bins' middles, so each bin's difference is the gap.
    confidence = rng.choice([0.625, 0.725, 0.825, 0.875, 0.925, 0.975], n)
    correct = rng.random(n) < confidence - gap
    return Trial("expected_calibration_error", expected_calibration_error(confidence, correct, bins=20), abs(gap))


SAMPLES: dict[str, Callable[[np.random.Generator, int], Trial]] = {
    "kappa .81, labels even": lambda rng, n: sample_kappa(rng, n, 0.5, 0.95),
    "kappa .49, labels even": lambda rng, n: sample_kappa(rng, n, 0.5, 0.85),
    "kappa .53, labels 4 to 1": lambda rng, n: sample_kappa(rng, n, 0.8, 0.9),
    "alpha .81, labels even": lambda rng, n: sample_alpha(rng, n, 0.5, 0.95),
    "alpha .49, labels even": lambda rng, n: sample_alpha(rng, n, 0.5, 0.85),
    "alpha .53, labels 4 to 1": lambda rng, n: sample_alpha(rng, n, 0.8, 0.9),
    "ECE 0": lambda rng, n: sample_calibration_error(rng, n, 0.0),
    "ECE .10": lambda rng, n: sample_calibration_error(rng, n, 0.1),
    "ECE .30": lambda rng, n: sample_calibration_error(rng, n, 0.3),
}
"""Samples of the second table, by their row."""


def sample_coverage(name: str, n: int, simulations: int) -> list[Trial]:
    """Return the trials of a row of the second table with samples of size ``n``."""
    rng = np.random.default_rng([n, *name.encode()])
    return [SAMPLES[name](rng, n) for _ in range(simulations)]


def _run_rows(simulations: int) -> Iterator[str]:
    yield "| kept | judge | ties and skips | agreement | known | ties | skips | wrong rows | known | width | stops |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for n in SIZES:
        for overconfidence in (0.0, 0.15):
            for discrete in (False, True):
                for undecided in (0.0, 0.2):
                    trials, stops = simulate_runs(
                        n, simulations, overconfidence=overconfidence, undecided=undecided, discrete=discrete
                    )
                    judge = ("overconfident" if overconfidence else "calibrated") + (", 5 levels" if discrete else "")
                    cells = [f"{n:,}", judge, f"{undecided:.0%}"]
                    for name in ("agreement", "tie_rate", "skip_rate", "remaining_error"):
                        _, among_known, unknown = coverage(trials[name])
                        cells.append(f"{among_known:.3f}" if unknown < 1 else "-")
                        cells += [f"{1 - unknown:.0%}"] if name in ("agreement", "remaining_error") else []
                    widths = [one.estimate.high - one.estimate.low for one in trials["agreement"] if one.estimate]
                    cells += [f"{np.mean(widths):.2f}" if widths else "-", str(stops)]
                    yield f"| {' | '.join(cells)} |"


def _sample_rows(simulations: int) -> Iterator[str]:
    yield f"| figure | {' | '.join(f'n = {n}' for n in SAMPLE_SIZES)} |"
    yield "|---|" + "---|" * len(SAMPLE_SIZES)
    for name in SAMPLES:
        cells = [f"{coverage(sample_coverage(name, n, simulations))[1]:.3f}" for n in SAMPLE_SIZES]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of rlaif's 95 % intervals in small samples, by simulation")
    parser.add_argument("--simulations", type=int, default=SIMULATIONS, help="Simulations per cell [default: 200]")
    simulations = parser.parse_args().simulations
    for rows in (_run_rows(simulations), _sample_rows(simulations)):
        for row in rows:
            print(row, flush=True)
        print()


if __name__ == "__main__":
    main()
