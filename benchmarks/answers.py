"""Several answers to a prompt are worth more than review: what n and the choice of the pair do to label accuracy.

Programmatic gold and a simulated noisy judge, through the product's own choice of pairs and settling. An answer meets 0
to 6 checks (its gold); prompts differ in how hard they are. The judge's rating is the gold with noise of its own; its
comparison is the difference in gold with noise, some of it of each order alone. Half of the noise's variance belongs to
the answer: however the judge is asked, it is wrong about it in the same way. The dataset has the same size whatever n:
more answers cost judging, not labels. A pair whose answers are equal by gold counts half. Intervals of 95 % resample
prompts.

    python -m benchmarks.answers
"""

from __future__ import annotations

import numpy as np
import polars as pl

from rlaif.pair import select, settle
from rlaif.records import unit_interval
from rlaif.stats import bootstrap_ratio

SIZE = 2000
"""Pairs in every dataset."""
PROMPTS = 6000
CHECKS = 6
NOISE = 1.3
SHARED = 0.5
"""Share of the noise's variance that a rating and a comparison have in common."""
SEATS = [select.Judged("quality", "q", "m", 1.0, aspects=1), select.Judged("helpful", "h", "m", 1.0)]


def world(n: int, rng: np.random.Generator) -> pl.DataFrame:
    """PROMPTS prompts with n answers each: prompt_id, key, gold, seen (the rater's view of it, 1 to 5)."""
    ease = rng.beta(2, 2, PROMPTS)
    gold = rng.binomial(CHECKS, ease[:, None], (PROMPTS, n)).astype(float)
    felt = gold + rng.normal(0, NOISE * SHARED**0.5, gold.shape)
    seen = np.clip(1 + 4 * (felt + rng.normal(0, NOISE * (1 - SHARED) ** 0.5, gold.shape)) / CHECKS, 1, 5)
    names = np.repeat([f"p{i:05}" for i in range(PROMPTS)], n)
    keys = [f"{name}-{i % n}" for i, name in enumerate(names)]
    return pl.DataFrame(
        {"prompt_id": names, "key": keys, "gold": gold.ravel(), "felt": felt.ravel(), "seen": seen.ravel()}
    )


def compared(pairs: pl.DataFrame, felt: dict[str, float], rng: np.random.Generator) -> pl.DataFrame:
    """What the judge says of each pair, in both orders."""
    difference = np.array([felt[a] - felt[b] for a, b in pairs.select("a", "b").iter_rows()])
    once = difference + rng.normal(0, NOISE * (1 - SHARED) ** 0.5, len(difference))
    orders = [1 / (1 + np.exp(-1.2 * (once + rng.normal(0, NOISE / 2, len(once))))) for _ in range(2)]
    return pairs.select("a", "b").with_columns(
        p_ab=pl.Series(orders[0]), p_ba=pl.Series(orders[1]), flags=pl.lit([], pl.List(pl.String)), by=pl.lit("panel")
    )


def dataset(answers: pl.DataFrame, how: str, rng: np.random.Generator, tries: int = 2) -> tuple[pl.DataFrame, int]:
    """The first SIZE kept pairs, and how many judge calls they took for each of them."""
    gold = dict(answers.select("key", "gold").iter_rows())
    rated = answers.select("key", score="seen", spread=pl.lit((4 * NOISE / CHECKS) ** 2))
    side = answers.select("prompt_id", "key")
    calls = 0.0
    if how == "random pair":
        draw = pl.Series("draw", [unit_interval(0, key) for key in side["key"]])
        two = side.with_columns(draw).sort("draw").group_by("prompt_id", maintain_order=True).head(2)
        ranked = select.candidates(two.drop("draw"), None, "round-robin", min_margin=0.0, tries=1)
        strategy: select.Strategy = "round-robin"
    else:
        strategy = how  # type: ignore[assignment]
        ranked = select.candidates(side, rated, strategy, min_margin=1.0, tries=tries)
        calls += answers.height * (how != "round-robin")
    said = compared(ranked, dict(answers.select("key", "felt").iter_rows()), rng)
    settled = ranked.clear()
    for rank in range(1, int(ranked["rank"].max() or 1) + 1):  # type: ignore[arg-type]
        won = settled.filter("kept")["prompt_id"] if settled.height else pl.Series([], dtype=pl.String)
        more = ranked.filter((pl.col("rank") == rank) & ~pl.col("prompt_id").is_in(won.implode()))
        asked = more if not settled.height else pl.concat([settled.select(ranked.columns), more])
        calls += 2 * more.height * (how != "rate-only")
        settled = settle.settle(asked, said if how != "rate-only" else said.clear(), strategy,
                                min_probability=0.65, per_prompt=1)  # fmt: skip
    kept = settled.filter("kept").sort("prompt_id")
    share = min(1.0, SIZE / max(1, kept.height))
    kept = kept.head(SIZE).with_columns(
        gold_a=pl.col("a").replace_strict(gold), gold_b=pl.col("b").replace_strict(gold)
    )
    return kept, round(calls * share / max(1, kept.height), 1)  # type: ignore[return-value]


def main() -> None:
    print(f"\n## Several answers: {SIZE} pairs each, a judge that is simulated, gold from checks\n")
    print(
        "| n | choice of the pair | label accuracy | equal by gold | difference in gold | calls a pair |\n"
        + "|---" * 6
        + "|"
    )
    for n in (2, 4, 8):
        for how in ("random pair", "rate-then-compare", "rate-only", "round-robin"):
            if n == 2 and how == "round-robin":
                continue  # the same as a random pair
            rng = np.random.default_rng(n)
            kept, calls = dataset(world(n, rng), how, rng)
            towards = np.where(kept["preferred"] == "a", 1.0, -1.0) * (kept["gold_a"] - kept["gold_b"]).to_numpy()
            right = np.where(towards == 0, 0.5, towards > 0)
            found = bootstrap_ratio(right, np.ones(len(right)), kept["prompt_id"].to_numpy())
            print(f"| {n} | {how} | {found} | {(towards == 0).mean():.3f} | {towards.mean():.2f} | {calls} |")


if __name__ == "__main__":
    main()
