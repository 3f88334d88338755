"""Calibration with human labels of the review queue: what it does to the labels of unreviewed pairs.

    python -m benchmarks.calibration                        all scenarios; about 2 minutes
    python -m benchmarks.calibration --pairs 2000 --scenario flagged --scenario borderline

Simulated judges of known accuracy label pairs, :mod:`rlaif.pair.routing` queues 10 % of them, and an annotator without
errors labels the queue. Each cell has the accuracy of the judges' labels that are in the dataset, and their number
relative to the judges' labels without calibration. Ways to calibrate:

    before        no calibration
    unweighted    all labels of the queue, each with weight 1
    excluded      the same, without pairs that only people decide and without flagged pairs
    conditioned   all labels; the judges' weights may differ for each kind of pair that routing selects
    1/pi          all labels with the inverse of their inclusion probability, clipped at sqrt(n) times its mean (Ionides
                  2008)
    flattened     by group, with pi ** -0.5: rlaif without its test
    rlaif         with its test on labels drawn by chance; "applied": share of the draws in which any group passed
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from rlaif.pair import human_calibration, routing
from rlaif.stats.calibration import logit, sigmoid
from rlaif.stats.intervals import Floats

MIN_CONFIDENCE = 0.65
DRAWS = {200: 40, 400: 40, 2000: 20, 6000: 8}
METHODS = ("unweighted", "excluded", "conditioned", "1/pi", "flattened")

Votes = dict[str, Floats]
"""By judge, the probability that a is better for each pair."""


@dataclass
class Pairs:
    """Simulated pairs: whether a is better, what the judges say, and what routing selects by."""

    a_is_better: np.ndarray
    log_length_a: Floats
    log_length_b: Floats
    flagged: np.ndarray
    tags: list[list[str]]
    votes: Votes

    @classmethod
    def draw(cls, random: np.random.Generator, n: int) -> Pairs:
        """Return ``n`` pairs without votes."""
        lengths = random.normal(5, 0.4, (2, n))
        return cls(random.random(n) < 0.5, lengths[0], lengths[1], np.zeros(n, bool), [[] for _ in range(n)], {})

    def judge(self, random: np.random.Generator, accuracy: float | Floats, confidence: Floats) -> Floats:
        """Return P(a better) of a judge that is right with probability ``accuracy``."""
        is_right = random.random(len(self.a_is_better)) < accuracy
        return np.where(is_right == self.a_is_better, confidence, 1 - confidence)


Scenario = Callable[[np.random.Generator, int], Pairs]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", " ")] = function
    return function


@scenario
def good_judge(random: np.random.Generator, n: int) -> Pairs:
    pairs = Pairs.draw(random, n)
    pairs.votes["judge"] = pairs.judge(random, 0.95, random.uniform(0.8, 0.99, n))
    return pairs


@scenario
def calibrated_judge(random: np.random.Generator, n: int) -> Pairs:
    pairs, confidence = Pairs.draw(random, n), random.uniform(0.65, 0.99, n)
    pairs.votes["judge"] = pairs.judge(random, confidence, confidence)
    return pairs


@scenario
def borderline(random: np.random.Generator, n: int) -> Pairs:
    """A fifth of the prompts is borderline, where the judge is right in 55 %."""
    pairs, is_borderline = Pairs.draw(random, n), random.random(n) < 0.2
    pairs.tags = [["borderline"] if borderline else [] for borderline in is_borderline]
    pairs.votes["judge"] = pairs.judge(random, np.where(is_borderline, 0.55, 0.95), random.uniform(0.8, 0.99, n))
    return pairs


@scenario
def flagged(random: np.random.Generator, n: int) -> Pairs:
    """In a tenth of the pairs an answer addresses the judge, which is then right in 30 %."""
    pairs = Pairs.draw(random, n)
    pairs.flagged = random.random(n) < 0.1
    pairs.votes["judge"] = pairs.judge(random, np.where(pairs.flagged, 0.3, 0.95), random.uniform(0.8, 0.99, n))
    return pairs


@scenario
def stakes(random: np.random.Generator, n: int) -> Pairs:
    """The judge is worse on a topic of high stakes."""
    pairs, is_medical = Pairs.draw(random, n), random.random(n) < 0.25
    pairs.tags = [["medical"] if medical else ["other"] for medical in is_medical]
    pairs.votes["judge"] = pairs.judge(random, np.where(is_medical, 0.6, 0.95), random.uniform(0.7, 0.99, n))
    return pairs


@scenario
def suspicion(random: np.random.Generator, n: int) -> Pairs:
    """The judge guesses in the pairs that it decides for a much longer answer."""
    pairs, is_suspicious = Pairs.draw(random, n), random.random(n) < 0.15
    p = pairs.judge(random, np.where(is_suspicious, 0.5, 0.95), random.uniform(0.7, 0.99, n))
    a_is_longer = np.where(is_suspicious, p > 0.5, random.random(n) < 0.5)
    difference = np.where(is_suspicious, 1.2, random.uniform(0, 0.6, n))
    pairs.log_length_a = 5 + np.where(a_is_longer, difference, 0)
    pairs.log_length_b = 5 + np.where(a_is_longer, 0, difference)
    pairs.votes["judge"] = p
    return pairs


@scenario
def topic_cap(random: np.random.Generator, n: int) -> Pairs:
    """The judge is unsure and poor on one topic, which would fill the queue without its cap."""
    pairs, is_code = Pairs.draw(random, n), random.random(n) < 0.4
    pairs.tags = [["code"] if code else ["chat"] for code in is_code]
    confidence = np.where(is_code, random.uniform(0.65, 0.85, n), random.uniform(0.75, 0.99, n))
    pairs.votes["judge"] = pairs.judge(random, np.where(is_code, 0.6, 0.96), confidence)
    return pairs


@scenario
def wrong_if_unsure(random: np.random.Generator, n: int) -> Pairs:
    """The judge is worse than chance below a confidence of 0.7, and right in 97 % above."""
    pairs, confidence = Pairs.draw(random, n), random.uniform(0.65, 0.99, n)
    pairs.votes["judge"] = pairs.judge(random, np.where(confidence < 0.7, 0.4, 0.97), confidence)
    return pairs


@scenario
def undecided(random: np.random.Generator, n: int) -> Pairs:
    """The judge cannot decide a fifth of the pairs. Among those alone, the longer answer is better in 75 %."""
    pairs, is_undecided = Pairs.draw(random, n), random.random(n) < 0.2
    longer_is_better = np.where(is_undecided, random.random(n) < 0.75, random.random(n) < 0.5)
    difference = np.abs(random.normal(0, 0.5, n)) * np.where(longer_is_better == pairs.a_is_better, 1, -1)
    pairs.log_length_a, pairs.log_length_b = 5 + np.maximum(difference, 0), 5 + np.maximum(-difference, 0)
    pairs.votes["judge"] = pairs.judge(random, 0.95, np.where(is_undecided, 0.5, random.uniform(0.75, 0.99, n)))
    return pairs


@scenario
def length_bias(random: np.random.Generator, n: int) -> Pairs:
    """The judge prefers longer answers."""
    pairs = Pairs.draw(random, n)
    pairs.log_length_a = random.normal(5, 0.6, n)
    quality = np.where(pairs.a_is_better, 1.2, -1.2) + random.normal(0, 0.8, n)
    pairs.votes["judge"] = sigmoid(1.5 * quality + 2.0 * np.tanh(pairs.log_length_a - pairs.log_length_b))
    return pairs


@scenario
def overconfident(random: np.random.Generator, n: int) -> Pairs:
    pairs, accuracy = Pairs.draw(random, n), random.uniform(0.55, 0.9, n)
    pairs.votes["judge"] = pairs.judge(random, accuracy, sigmoid(2.5 * logit(accuracy)))
    return pairs


@scenario
def underconfident(random: np.random.Generator, n: int) -> Pairs:
    pairs, accuracy = Pairs.draw(random, n), random.uniform(0.7, 0.98, n)
    pairs.votes["judge"] = pairs.judge(random, accuracy, sigmoid(0.6 * logit(accuracy)))
    return pairs


@scenario
def three_judges(random: np.random.Generator, n: int) -> Pairs:
    """One judge is good, the others are close to chance and just as confident."""
    pairs = Pairs.draw(random, n)
    for name, accuracy in (("good", 0.9), ("poor", 0.6), ("coin", 0.52)):
        pairs.votes[name] = pairs.judge(random, accuracy, random.choice([0.8, 0.9, 0.99], n))
    return pairs


@scenario
def coin(random: np.random.Generator, n: int) -> Pairs:
    """The judge is at chance, and confident."""
    pairs = Pairs.draw(random, n)
    pairs.votes["judge"] = pairs.judge(random, 0.5, random.uniform(0.7, 0.99, n))
    return pairs


@scenario
def reversed_judge(random: np.random.Generator, n: int) -> Pairs:
    pairs = Pairs.draw(random, n)
    pairs.votes["judge"] = pairs.judge(random, 0.2, random.uniform(0.7, 0.99, n))
    return pairs


@dataclass
class Judged:
    """Routed pairs with ``better`` (the better side), the judges' votes, the labels of the queue, and the tags."""

    pairs: pl.DataFrame
    votes: pl.DataFrame
    labels: pl.DataFrame
    tags: pl.DataFrame


def simulate(name: str, n: int, seed: int) -> Judged:
    """Judge and route ``n`` pairs of the scenario ``name``."""
    drawn = SCENARIOS[name](np.random.default_rng([seed, n]), n)
    p = np.mean(list(drawn.votes.values()), axis=0)
    is_kept = (np.maximum(p, 1 - p) >= MIN_CONFIDENCE) | (p == 0.5)
    keys = {side: [f"{seed}-{i}-{side}" for i in range(n)] for side in "ab"}
    none = pl.lit(None, pl.Float64)
    pairs = pl.DataFrame(
        {"pair_id": [f"{seed}-{i:05}" for i in range(n)], "prompt_id": [f"{seed}-p{i}" for i in range(n)], **keys,
         "prob_a": p, "better": np.where(drawn.a_is_better, "a", "b"),
         "flags": [["a_addresses_judge"] if flagged else [] for flagged in drawn.flagged],
         "humans_only": ["borderline" in tags for tags in drawn.tags], "kept": is_kept},
        schema_overrides={"flags": pl.List(pl.String)},
    )  # fmt: skip
    pairs = pairs.with_columns(
        preferred=pl.when(pl.col("prob_a") > 0.5).then(pl.lit("a")).when(pl.col("prob_a") < 0.5).then(pl.lit("b")),
        outcome=pl.when(pl.col("kept") & (pl.col("prob_a") != 0.5)).then(pl.lit("win")).otherwise(pl.lit("tie")),
        decided_by=pl.lit("panel"), score_a=none, score_b=none,
        drop_reason=pl.when(~pl.col("kept")).then(pl.lit("near_tie")),
    )  # fmt: skip
    votes = pl.concat(
        pl.DataFrame({**keys, "panel_judge": judge, "weight": 1.0, "p_ab": vote, "p_ba": vote})
        for judge, vote in drawn.votes.items()
    )
    chars = np.exp([drawn.log_length_a, drawn.log_length_b]).round().ravel()
    lengths = pl.DataFrame({"key": keys["a"] + keys["b"], "chars": chars})
    tags = pl.DataFrame(
        {"prompt_id": pairs["prompt_id"], "tags": drawn.tags}, schema_overrides={"tags": pl.List(pl.String)}
    )
    pairs = routing.add_suspicion(pairs, votes, lengths)
    routed = routing.route_pairs(pairs, tags, human_fraction=0.1, seed=seed)
    queue = routed.filter(pl.col("route").is_in(["audit", "targeted"]))
    return Judged(routed, votes, queue.select("pair_id", label="better"), tags)


def calibrate(judged: Judged, **settings: Any) -> tuple[pl.DataFrame, list[human_calibration.Calibration]]:
    """Calibrate as rlaif does."""
    defaults = {"min_confidence": MIN_CONFIDENCE, "max_tie_drop_fraction": 1.0, "num_judged": judged.pairs.height}
    return human_calibration.apply_human_calibration(judged.pairs, judged.votes, judged.labels, **(defaults | settings))


def calibrate_untested(judged: Judged, method: str) -> pl.DataFrame:
    """Calibrate by one of ``METHODS``, and apply it without a test. Returns the judge-labeled pairs, calibrated."""
    is_open = (pl.col("drop_reason") == "undecided").fill_null(False)
    rows = judged.pairs.filter((pl.col("route") != "dropped") | is_open)
    rows = rows.join(judged.labels, on="pair_id", how="left", maintain_order="left")
    rows = rows.join(judged.tags, on="prompt_id", how="left", maintain_order="left").with_columns(
        is_flagged=pl.col("flags").list.len() > 0,
        is_undecided=pl.col("preferred").is_null(),
        is_suspicious=pl.col("suspicion").is_not_null(),
        has_stakes=pl.col("tags").list.set_intersection(list(routing.STAKES_BY_TAG)).list.len() > 0,
    )
    y = np.where(rows["label"].is_null(), np.nan, (rows["label"] == "a").fill_null(False)).astype(float)
    pi = rows["inclusion_probability"].to_numpy()
    kinds = {name: rows[name].to_numpy() for name in ("is_flagged", "humans_only", "has_stakes", "is_suspicious")}
    x, _, prior = human_calibration.calibration_features(rows, judged.votes)
    groups = [np.ones(rows.height, bool)]
    weights = np.ones(rows.height)
    if method == "conditioned":
        interactions = [x[:, :-1] * kind[:, None] for kind in kinds.values() if kind.any()]
        x = np.column_stack([x, *interactions])
        prior = np.append(prior, np.zeros(x.shape[1] - len(prior)))
    elif method in ("excluded", "flattened"):
        y = np.where(kinds["humans_only"], np.nan, y)
        if method == "excluded":
            y = np.where(kinds["is_flagged"], np.nan, y)
        else:
            is_undecided = rows["is_undecided"].to_numpy() & ~kinds["is_flagged"]
            groups = [kinds["is_flagged"], is_undecided, ~kinds["is_flagged"] & ~is_undecided]
    p = rows["prob_a"].to_numpy().copy()
    for group in groups:
        labeled = group & ~np.isnan(y)
        if labeled.sum() < human_calibration.MIN_LABELS:
            continue
        if method == "1/pi":
            clipped = np.minimum(1 / pi[labeled], (1 / pi[labeled]).mean() * labeled.sum() ** 0.5)
            weights[labeled] = clipped * clipped.sum() / (clipped**2).sum()
        elif method == "flattened":
            weights[labeled] = human_calibration.flattened_weights(pi[labeled])
        q, _ = human_calibration.fit_and_predict(
            x[group], prior, y[group], rows["prompt_id"].filter(pl.Series(group)), weights[group]
        )
        p[group] = q
    side = pl.when(pl.col("prob_a") > 0.5).then(pl.lit("a")).when(pl.col("prob_a") < 0.5).then(pl.lit("b"))
    result = rows.with_columns(pl.Series("prob_a", p)).with_columns(preferred=side)
    confidence = pl.max_horizontal("prob_a", 1.0 - pl.col("prob_a")).round(9)
    return result.filter((pl.col("route") == "judge") | is_open, confidence >= MIN_CONFIDENCE, side.is_not_null())


def _count(labeled: pl.DataFrame) -> np.ndarray:
    """Return the number of right labels, and of labels."""
    return np.array([labeled.filter(pl.col("preferred") == pl.col("better")).height, labeled.height])


def measure(name: str, n: int, draws: int) -> str:
    """Return a row of the table."""
    totals: dict[str, np.ndarray] = {}
    applied = 0
    for seed in range(draws):
        judged = simulate(name, n, seed)
        after, calibrations = calibrate(judged)
        applied += any(calibration.applied for calibration in calibrations)
        results = {"before": judged.pairs.filter(pl.col("route") == "judge")}
        results |= {method: calibrate_untested(judged, method) for method in METHODS}
        results["rlaif"] = after.filter(pl.col("route") == "judge")
        for method, labeled in results.items():
            totals[method] = totals.get(method, np.zeros(2)) + _count(labeled)
    before = totals.pop("before")
    cells = [f"{right / max(1, kept):.3f} / {kept / before[1]:.2f}" for right, kept in totals.values()]
    return f"| {name} | {n:,} | {before[0] / before[1]:.3f} | {' | '.join(cells)} | {applied / draws:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS)
    parser.add_argument("--pairs", type=int, action="append", help="number of pairs")
    parser.add_argument("--draws", type=int, help="number of draws per row")
    options = parser.parse_args()
    columns = ("scenario", "pairs", "before", *METHODS, "rlaif", "applied")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for name in options.scenario or SCENARIOS:
        for n in options.pairs or DRAWS:
            print(measure(name, n, options.draws or DRAWS.get(n, 10)), flush=True)


if __name__ == "__main__":
    main()
