"""dataset/README.md: the card, with the hub's YAML header, the recipe, the counts, and what is known of the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif.pair.dataset_writer import DatasetCounts
from rlaif.pair.label_quality import describe
from rlaif.run.atomic_write import atomic_write_text

SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(
    path: Path,
    dataset_counts: DatasetCounts,
    counts: Mapping[str, Mapping[str, int]],
    recipe: Mapping[str, Any],
    label_quality: Mapping[str, Any],
    refusals: Sequence[Mapping[str, Any]],
) -> None:
    """``label_quality``: :meth:`rlaif.pair.label_quality.LabelQuality.summary`. ``refusals``:
    :func:`rlaif.pair.refusal_guard.refusal_table`."""
    rows = dataset_counts.train + dataset_counts.test
    size = next((name for limit, name in SIZE_CATEGORIES if rows < limit), "1M<n<10M")
    policies, judges = recipe["policies"], recipe["judges"]
    quality_lines = (
        "\n".join(f"- {line}" for line in describe(label_quality))
        or "- Not measured: people have labelled no pair yet."
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

{dataset_counts.train} pairs to train on and {dataset_counts.test} to test on, split by prompt. Columns: `prompt`, `chosen` and
`rejected` as lists of {{role, content}} (TRL's explicit conversational preference format), then where each row comes
from. `rating_margin` is the rated score of the chosen answer less that of the rejected one, on a scale of 1 to 5, if the
answers were rated; `confidence` is the judges' probability that the chosen answer is better (1 for people).

```python
from datasets import load_dataset
dataset = load_dataset("parquet", data_files={{"train": "train.parquet", "test": "test.parquet"}})
```

## Recipe
- Answers by: {", ".join(policies)}
- Judged by: {", ".join(judges)}; strategy {recipe["strategy"]}; kept at p >= {recipe["min_confidence"]:g}
- {recipe["human_fraction"]:.0%} of the kept pairs went to people
- Made by rlaif {recipe["version"]}

## Labels
{_markdown_table("Source", dict(dataset_counts.sources))}
{_markdown_table("Left out", dict(dataset_counts.left_out))}
{_markdown_table("Outcome of the candidates", counts["outcome"])}
{_markdown_table("Route of the candidates", counts["route"])}
## How far to trust them
From {label_quality["reviewed"]} pairs that people labelled blind, each weighted by its chance to be drawn; intervals of 95 %.

{quality_lines}
{_calibration_line(label_quality)}{_refusals_section(refusals)}
## Known biases
Labels by language models prefer longer and better formatted answers, and answers in their own style, more than people
do. Every comparison was asked in both orders and averaged, which removes the position's effect but not these.
{_self_judging_warning(policies, recipe["judge_models"])}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)


def _markdown_table(title: str, counts: Mapping[str, int]) -> str:
    rows = "\n".join(f"| {name} | {count} |" for name, count in sorted(counts.items()))
    return f"| {title} | pairs |\n|---|---|\n{rows}\n" if rows else ""


def _calibration_line(label_quality: Mapping[str, Any]) -> str:
    calibration = label_quality["calibration"]
    if not calibration:
        return ""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in calibration["weights"].items())
    return (
        f"- {calibration['n']} of these labels put the panel right (weights: {weights}): {calibration['flipped']} labels were turned "
        f"round, {calibration['near_ties']} pairs left out as near-ties.\n"
    )


def _refusals_section(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = "\n".join(f"| {row['prompt']} | {row['chosen']} | {row['pairs']} |" for row in rows)
    return f"\n## Refusals\n| Prompt | Chosen answer | pairs |\n|---|---|---|\n{lines}\n"


def _self_judging_warning(policies: list[str], judges: list[str]) -> str:
    overlap = sorted(set(policies) & set(judges))
    return f"**Self-judging**: {', '.join(overlap)} judged its own answers.\n" if overlap else ""
