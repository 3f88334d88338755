"""dataset/README.md: the dataset card with the hub's YAML header, the recipe, the counts and the label quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif.display_names import (
    ANSWER_LABELS,
    DATASET_DROP_REASONS,
    LABEL_DROP_REASONS,
    LABEL_SOURCES,
    OUTCOMES,
    ROUTES,
    describe_calibration,
)
from rlaif.pair.dataset_writer import DatasetCounts
from rlaif.pair.label_quality import describe
from rlaif.records import LabelDropReason
from rlaif.run import atomic_write

SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(
    path: Path,
    dataset_counts: DatasetCounts,
    counts: Mapping[str, Mapping[str, int]],
    recipe: Mapping[str, Any],
    label_quality: Mapping[str, Any],
    refusals: Sequence[Mapping[str, Any]],
    unknown_refusals: str,
) -> None:
    """Write the card to ``path``.

    ``counts``: candidates by ``outcome`` and by ``route``. ``label_quality``:
    :meth:`rlaif.pair.label_quality.LabelQuality.summary` with ``calibration``. ``refusals``:
    :func:`rlaif.pair.refusal_guard.refusal_table`. ``unknown_refusals``: a sentence on the answers of which it is
    unknown whether they refuse, or "".
    """
    sections = [
        _header(dataset_counts),
        _recipe_section(recipe),
        _counts_section(dataset_counts, counts),
        _carried_section(dataset_counts.carried, recipe["dropped_labels"]),
        _quality_section(label_quality),
        _refusals_section(refusals, unknown_refusals),
        _bias_section(recipe["policies"], recipe["judge_models"]),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write.atomic_write_text(path, "\n".join(filter(None, sections)))


def _header(counts: DatasetCounts) -> str:
    rows = counts.train + counts.test
    size = next((name for limit, name in SIZE_CATEGORIES if rows < limit), "1M<n<10M")
    return f"""---
tags: [preference, dpo, rlaif]
size_categories: ["{size}"]
configs:
  - config_name: default
    data_files:
      - {{split: train, path: train.parquet}}
      - {{split: test, path: test.parquet}}
---

# Preference dataset

{counts.train} pairs to train on and {counts.test} to test on, split by prompt. `prompt`, `chosen` and `rejected` are
lists of {{role, content}} (TRL's explicit conversational preference format). The other columns give the origin of each
row. `confidence` is the judges' probability that the chosen answer is better (1 for annotators). `rating_margin` is the
rated score of the chosen answer minus that of the rejected one, on a scale of 1 to 5 (null if they were not rated).

```python
from datasets import load_dataset
dataset = load_dataset("parquet", data_files={{"train": "train.parquet", "test": "test.parquet"}})
```
"""


def _recipe_section(recipe: Mapping[str, Any]) -> str:
    return f"""## Recipe
- Answers: {", ".join(recipe["policies"])}
- Judges: {", ".join(recipe["judges"])}; strategy {recipe["strategy"]}; pairs kept at p >= {recipe["min_confidence"]:g}
- Human review: {recipe["human_fraction"]:.0%} of the kept pairs
- Made with rlaif {recipe["version"]}
"""


def _counts_section(counts: DatasetCounts, candidates: Mapping[str, Mapping[str, int]]) -> str:
    return f"""## Labels
{_markdown_table("Labeled by", LABEL_SOURCES, counts.sources)}
{_markdown_table("Not in the dataset", DATASET_DROP_REASONS, counts.dropped)}
{_markdown_table("Outcome of the candidate pairs", OUTCOMES, candidates["outcome"])}
{_markdown_table("Route of the pairs", ROUTES, candidates["route"])}"""


def _carried_section(carried: int, dropped: Mapping[LabelDropReason, int]) -> str:
    lines = []
    if carried:
        lines.append(
            f"{carried} of the pairs by annotators are not in the current review queue: they were labeled after an "
            "earlier judging, or their labels were imported. No estimate uses them as draws of the queue."
        )
    if dropped:
        reasons = "; ".join(f"{count}: {LABEL_DROP_REASONS[code]}" for code, count in dropped.items())
        lines.append(f"{sum(dropped.values())} human labels are not used ({reasons}).")
    return "\n".join(lines) + "\n" if lines else ""


def _quality_section(label_quality: Mapping[str, Any]) -> str:
    lines = describe(label_quality) or ["Not measured: annotators have labeled no pair yet."]
    lines += [describe_calibration(calibration) for calibration in label_quality["calibration"]]
    bullets = "\n".join(f"- {line}" for line in lines)
    return f"""## Label quality
Annotators labeled {label_quality["reviewed"]} of the pairs blind. Those in the current review queue are each weighted
by the inverse of their probability to be drawn. Intervals are 95 %.

{bullets}
"""


def _refusals_section(rows: Sequence[Mapping[str, Any]], unknown: str) -> str:
    note = f"{unknown[0].upper()}{unknown[1:]}.\n" if unknown else ""
    if not rows:
        return f"## Refusals\n{note}" if unknown else ""
    lines = "\n".join(
        f"| {row['prompt']} | {ANSWER_LABELS.get(row['chosen'], row['chosen'])} | {row['pairs']} |" for row in rows
    )
    table = f"## Refusals\n| Prompt | Chosen answer | Pairs |\n|---|---|---|\n{lines}\n"
    return f"{table}\n{note}" if note else table


def _bias_section(policies: Sequence[str], judge_models: Sequence[str]) -> str:
    overlap = sorted(set(policies) & set(judge_models))
    self_judging = f"**Self-judging**: {', '.join(overlap)} judged its own answers.\n" if overlap else ""
    return f"""## Known biases
Labels by language models prefer longer and better formatted answers, and answers in their own style, more than human
labels do. Every comparison was made in both orders and averaged, which removes the effect of position but not these.
{self_judging}"""


def _markdown_table(title: str, names: Mapping[Any, str], counts: Mapping[str, int]) -> str:
    """Return a table of ``counts`` by readable name, in the order of ``names``; empty without counts."""
    rows = "".join(f"| {name} | {counts[code]} |\n" for code, name in names.items() if code in counts)
    return f"| {title} | Pairs |\n|---|---|\n{rows}" if rows else ""
