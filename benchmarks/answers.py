"""Effect of the number of answers per prompt (n) and of the choice of the pair on label accuracy.

Gold is programmatic and the judge is simulated; rlaif itself chooses the pairs and aggregates the votes. An answer
passes 0 to 6 checks (its gold), and prompts differ in difficulty. The judge's rating is the gold plus noise. Its
comparison is the difference in gold plus noise, part of which differs between the two orders. Half of the variance of
the noise belongs to the answer, so ratings and comparisons share it. The dataset has the same size for every n: more
answers cost more judging, not more labels. A pair of answers with equal gold counts half. 95 % intervals, resampling
prompts.

    python -m benchmarks.answers
"""

from __future__ import annotations

import numpy as np
import polars as pl

from rlaif.pair import aggregation, candidates
from rlaif.records import hash_to_unit_interval
from rlaif.stats import bootstrap_ratio

SIZE = 2000
"""Pairs per dataset."""
PROMPTS = 6000
CHECKS = 6
NOISE = 1.3
SHARED = 0.5
"""Share of the variance of the noise that ratings and comparisons have in common."""
PANEL = [
    candidates.PanelMember("quality", "q", "m", 1.0, num_aspects=1),
    candidates.PanelMember("helpful", "h", "m", 1.0),
]


def make_answers(n: int, rng: np.random.Generator) -> pl.DataFrame:
    """Return PROMPTS prompts with n answers each.

    Columns: prompt_id, key, gold, perceived (gold plus the shared noise), rating (1 to 5).
    """
    ease = rng.beta(2, 2, PROMPTS)
    gold = rng.binomial(CHECKS, ease[:, None], (PROMPTS, n)).astype(float)
    perceived = gold + rng.normal(0, NOISE * SHARED**0.5, gold.shape)
    rating = np.clip(1 + 4 * (perceived + rng.normal(0, NOISE * (1 - SHARED) ** 0.5, gold.shape)) / CHECKS, 1, 5)
    names = np.repeat([f"p{i:05}" for i in range(PROMPTS)], n)
    keys = [f"{name}-{i % n}" for i, name in enumerate(names)]
    return pl.DataFrame(
        {
            "prompt_id": names,
            "key": keys,
            "gold": gold.ravel(),
            "perceived": perceived.ravel(),
            "rating": rating.ravel(),
        }
    )


def simulate_comparisons(pairs: pl.DataFrame, perceived: dict[str, float], rng: np.random.Generator) -> pl.DataFrame:
    """Return the judge's votes on each pair, in both orders."""
    difference = np.array([perceived[a] - perceived[b] for a, b in pairs.select("a", "b").iter_rows()])
    judged_difference = difference + rng.normal(0, NOISE * (1 - SHARED) ** 0.5, len(difference))
    orders = [
        1 / (1 + np.exp(-1.2 * (judged_difference + rng.normal(0, NOISE / 2, len(judged_difference)))))
        for _ in range(2)
    ]
    return pairs.select("a", "b").with_columns(
        p_ab=pl.Series(orders[0]),
        p_ba=pl.Series(orders[1]),
        flags=pl.lit([], pl.List(pl.String)),
        decided_by=pl.lit("panel"),
    )


def build_dataset(
    answers: pl.DataFrame, strategy_name: str, rng: np.random.Generator, max_candidates: int = 2
) -> tuple[pl.DataFrame, int]:
    """Return the first SIZE kept pairs, and the number of judge calls per pair."""
    gold = dict(answers.select("key", "gold").iter_rows())
    rated = answers.select("key", score="rating", variance=pl.lit((4 * NOISE / CHECKS) ** 2))
    keys = answers.select("prompt_id", "key")
    calls = 0.0
    if strategy_name == "random pair":
        draw = pl.Series("draw", [hash_to_unit_interval(0, key) for key in keys["key"]])
        two = keys.with_columns(draw).sort("draw").group_by("prompt_id", maintain_order=True).head(2)
        ranked = candidates.rank_candidates(
            two.drop("draw"), None, "round-robin", min_rating_margin=0.0, max_candidates=1
        )
        strategy: candidates.Strategy = "round-robin"
    else:
        strategy = strategy_name  # type: ignore[assignment]
        ranked = candidates.rank_candidates(keys, rated, strategy, min_rating_margin=1.0, max_candidates=max_candidates)
        calls += answers.height * (strategy_name != "round-robin")
    votes = simulate_comparisons(ranked, dict(answers.select("key", "perceived").iter_rows()), rng)
    decided = ranked.clear()
    for rank in range(1, int(ranked["rank"].max() or 1) + 1):  # type: ignore[arg-type]
        decided_prompts = decided.filter("kept")["prompt_id"] if decided.height else pl.Series([], dtype=pl.String)
        next_pairs = ranked.filter((pl.col("rank") == rank) & ~pl.col("prompt_id").is_in(decided_prompts.implode()))
        asked_pairs = next_pairs if not decided.height else pl.concat([decided.select(ranked.columns), next_pairs])
        calls += 2 * next_pairs.height * (strategy_name != "rate-only")
        decided = aggregation.decide_outcomes(
            asked_pairs,
            votes if strategy_name != "rate-only" else votes.clear(),
            strategy,
            min_confidence=0.65,
            max_per_prompt=1,
        )
    kept = decided.filter("kept").sort("prompt_id")
    fraction = min(1.0, SIZE / max(1, kept.height))
    kept = kept.head(SIZE).with_columns(
        gold_a=pl.col("a").replace_strict(gold), gold_b=pl.col("b").replace_strict(gold)
    )
    return kept, round(calls * fraction / max(1, kept.height), 1)  # type: ignore[return-value]


def main() -> None:
    print(f"\n## Several answers: {SIZE} pairs each, simulated judge, gold from checks\n")
    print(
        "| n | choice of the pair | label accuracy | equal by gold | difference in gold | calls per pair |\n"
        + "|---" * 6
        + "|"
    )
    for n in (2, 4, 8):
        for strategy_name in ("random pair", "rate-then-compare", "rate-only", "round-robin"):
            if n == 2 and strategy_name == "round-robin":
                continue  # the same as "random pair"
            rng = np.random.default_rng(n)
            kept, calls = build_dataset(make_answers(n, rng), strategy_name, rng)
            gold_gain = np.where(kept["preferred"] == "a", 1.0, -1.0) * (kept["gold_a"] - kept["gold_b"]).to_numpy()
            correct = np.where(gold_gain == 0, 0.5, gold_gain > 0)
            accuracy = bootstrap_ratio(correct, np.ones(len(correct)), kept["prompt_id"].to_numpy())
            figures = f"{accuracy} | {(gold_gain == 0).mean():.3f} | {gold_gain.mean():.2f} | {calls}"
            print(f"| {n} | {strategy_name} | {figures} |")


if __name__ == "__main__":
    main()
