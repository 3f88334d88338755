"""dataset/README.md: the card, with the hub's YAML header, the recipe, the counts, and what is known of the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif.pair.merge import Merged
from rlaif.pair.trust import in_words

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write(
    path: Path,
    merged: Merged,
    counts: Mapping[str, Mapping[str, int]],
    recipe: Mapping[str, Any],
    labels: Mapping[str, Any],
    balance: Sequence[Mapping[str, Any]],
) -> None:
    """``labels``: :meth:`rlaif.pair.trust.Trust.facts`. ``balance``: :func:`rlaif.pair.balance.table`."""
    rows = merged.train + merged.test
    size = next((name for limit, name in SIZES if rows < limit), "1M<n<10M")
    policies, judges = recipe["policies"], recipe["judges"]
    measured = (
        "\n".join(f"- {line}" for line in in_words(labels)) or "- Not measured: people have labelled no pair yet."
    )
    text = f"""---
tags: [preference, dpo, rlaif]
size_categories: ["{size}"]
configs:
  - config_name: default
    data_files:
      - {{split: train, path: train.parquet}}
      - {{split: test, path: test.parquet}}
---

# Preference dataset

{merged.train} pairs to train on and {merged.test} to test on, split by prompt. Columns: `prompt`, `chosen` and
`rejected` as lists of {{role, content}} (TRL's explicit conversational preference format), then where each row comes
from. `margin` is the rated score of the chosen answer less that of the rejected one, on a scale of 1 to 5, where the
answers were rated; `confidence` is the judges' probability that the chosen answer is better (1 for people).

```python
from datasets import load_dataset
dataset = load_dataset("parquet", data_files={{"train": "train.parquet", "test": "test.parquet"}})
```

## Recipe
- Answers by: {", ".join(policies)}
- Judged by: {", ".join(judges)}; strategy {recipe["strategy"]}; kept at p >= {recipe["min_probability"]:g}
- {recipe["human_share"]:.0%} of the kept pairs went to people
- Made by rlaif {recipe["version"]}

## Labels
{_table("Source", dict(merged.sources))}
{_table("Left out", dict(merged.left_out))}
{_table("Outcome of the candidates", counts["outcome"])}
{_table("Route of the candidates", counts["route"])}
## How far to trust them
From {labels["reviewed"]} pairs that people labelled blind, each weighted by its chance to be drawn; intervals of 95 %.

{measured}
{_calibration(labels)}{_balance(balance)}
## Known biases
Labels by language models prefer longer and better formatted answers, and answers in their own style, more than people
do. Every comparison was asked in both orders and averaged, which removes the position's effect but not these.
{_self_judging(policies, recipe["judge_models"])}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _table(title: str, counts: Mapping[str, int]) -> str:
    rows = "\n".join(f"| {name} | {count} |" for name, count in sorted(counts.items()))
    return f"| {title} | pairs |\n|---|---|\n{rows}\n" if rows else ""


def _calibration(labels: Mapping[str, Any]) -> str:
    made = labels["calibration"]
    if not made:
        return ""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in made["weights"].items())
    return (
        f"- {made['n']} of these labels put the panel right (weights: {weights}): {made['flipped']} labels were turned "
        f"round, {made['near_ties']} pairs left out as near-ties.\n"
    )


def _balance(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = "\n".join(f"| {row['prompt']} | {row['chosen']} | {row['pairs']} |" for row in rows)
    return f"\n## Refusals\n| Prompt | Chosen answer | pairs |\n|---|---|---|\n{lines}\n"


def _self_judging(policies: list[str], judges: list[str]) -> str:
    same = sorted(set(policies) & set(judges))
    return f"**Self-judging**: {', '.join(same)} judged its own answers.\n" if same else ""
