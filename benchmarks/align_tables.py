"""The tables of ``benchmarks.align``, from the results in benchmarks/align/."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.align_cells import (
    DRAWS,
    FRESH_SEEDS,
    HELD_OUT_KINDS,
    KINDS,
    NOISE,
    RESULTS,
    REVIEWED,
    SEEDS,
    TOPICS,
    TRIALS,
    Cell,
    all_waves,
    split,
)

Result = dict[str, Any]
"""The content of a result file."""
HEAD = "gain in points, 95 % | n |\n|---|---|---|---|"


@dataclasses.dataclass(frozen=True)
class Share:
    """Counts for one prompt, for the reference and the trained model: (answers that pass or refuse, answers).

    Prompts of one ``cluster`` (a topic) are resampled together.
    """

    seed: int
    cluster: str
    reference: tuple[int, int]
    trained: tuple[int, int]


def shares(result: Result, reference: Result, part: str, ids: Iterable[str]) -> list[Share]:
    """Return the shares of the prompts ``ids``. ``part``: "answers", "refused" or "ifbench"."""
    return [
        Share(
            result["seed"], prompt_id.split("/")[0], tuple(reference[part][prompt_id]), tuple(result[part][prompt_id])
        )
        for prompt_id in sorted(ids)
        if prompt_id in result.get(part, {}) and prompt_id in reference[part]
    ]


def means(rows: Sequence[Share]) -> tuple[float, float, float, float]:
    """Return the mean shares of the reference and the trained model, and the gain's 95 % interval.

    The means are over prompts. The interval is bootstrapped over seeds and, within a seed, over clusters.
    """
    pairs_of = {seed: defaultdict(list) for seed in sorted({row.seed for row in rows})}
    for row in rows:
        before, after = row.reference[0] / row.reference[1], row.trained[0] / row.trained[1]
        pairs_of[row.seed][row.cluster].append((before, after))
    # Per seed and cluster: the sums of both shares, and the number of prompts.
    sums = [
        np.array([(*np.sum(values, axis=0), len(values)) for values in by_cluster.values()])
        for by_cluster in pairs_of.values()
    ]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(DRAWS):
        total = np.zeros(3)
        for index in rng.integers(0, len(sums), len(sums)):
            clusters = sums[index]
            total += clusters[rng.integers(0, len(clusters), len(clusters))].sum(axis=0)
        gains.append((total[1] - total[0]) / total[2])
    low, high = np.quantile(gains, (0.025, 0.975))
    before, after, count = np.concatenate(sums).sum(axis=0)
    return float(before / count), float(after / count), float(low), float(high)


def format_cells(rows: Sequence[Share]) -> str:
    """Return the cells of a table row: before, after, gain with interval in points, and n."""
    if not rows:
        return "| not run | | 0 |"
    before, after, low, high = means(rows)
    seeds = len({row.seed for row in rows})
    n = f"{seeds} seed{'s' * (seeds > 1)}, {len(rows)} prompts, {sum(row.trained[1] for row in rows)} answers"
    return (
        f"| {before:.3f} -> {after:.3f} | {100 * (after - before):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {n} |"
    )


def print_tables() -> None:
    """Print the tables of all results."""
    if not (RESULTS / "base.json").exists():
        print(f"{RESULTS} has no results")
        return
    Tables(json.loads((RESULTS / "base.json").read_text())).print_all()


class Tables:
    """The results of the reference and of all finished cells."""

    def __init__(self, reference: Result) -> None:
        self.reference = reference
        cells = [cell for wave in all_waves() for cell in wave] + [Cell(0, trial=name) for name in TRIALS]
        self.results: dict[Cell, Result] = {
            cell: json.loads(cell.result.read_text()) for cell in cells if cell.result.exists()
        }
        self.plain = [cell for cell in self.results if not cell.noise and not cell.longer and cell.trial is None]

    def print_all(self) -> None:
        longer = [cell for cell in self.results if cell.longer and cell.seed in SEEDS]
        fresh = [cell for cell in self.results if cell.seed in FRESH_SEEDS and not cell.fewer]
        fewer = [cell for cell in self.results if cell.fewer]
        self._print_setting("first setting", self.plain, all_prompts=True)
        self._print_setting("second setting", longer, all_prompts=True)
        self._print_setting("second setting, fresh seeds", fresh, all_prompts=False)
        self._print_setting("third setting, fresh seeds", fewer, all_prompts=False)
        self._print_noise()
        self._print_review()
        self._print_trials([cell for cell in self.results if cell.trial is not None])

    def _shares(self, cells: Iterable[Cell], part: str, ids: Iterable[str]) -> list[Share]:
        ids = list(ids)
        return [row for cell in cells for row in shares(self.results[cell], self.reference, part, ids)]

    def _held_out(self, cells: Iterable[Cell], split_name: str) -> list[Share]:
        """Return the shares of the prompts that each cell's seed holds out in this way."""
        return [row for cell in cells for row in self._shares([cell], "answers", getattr(split(cell), split_name))]

    def _print_setting(self, setting: str, cells: Sequence[Cell], *, all_prompts: bool) -> None:
        parts = (("topic", "topics"), ("topic and kind", "kinds"), ("packaged, prompt", "packaged_prompts"),
                 ("packaged, kind", "packaged_kinds"))  # fmt: skip
        print(f"\n| {setting}, held out by | answers that pass every check | {HEAD}")
        for title, split_name in parts if all_prompts else parts[:2]:
            print(f"| {title} {format_cells(self._held_out(cells, split_name))}")
        if all_prompts:
            print(f"| IFBench {format_cells(self._shares(cells, 'ifbench', self.reference.get('ifbench', ())))}")
        print(f"\n| {setting}, by kind | answers that pass it | {HEAD}")
        for kind in KINDS:
            rows = self._shares(cells, "answers", (f"{topic}/{kind}" for topic in TOPICS))
            print(f"| {kind}{' (not trained)' if kind in HELD_OUT_KINDS else ''} {format_cells(rows)}")
        if all_prompts:
            print(f"\n| benign look-alikes, {setting} | answers that refuse | {HEAD}")
            print(f"| all {format_cells(self._shares(cells, 'refused', self.reference['refused']))}")

    def _print_noise(self) -> None:
        print(
            "\n| noise | review | held out by topic | gain in points, 95 % | n | gain kept |\n|---|---|---|---|---|---|"
        )
        for noise, reviewed in [(0.0, False), *((noise, reviewed) for noise in NOISE for reviewed in (False, True))]:
            wanted = {Cell(seed, noise, reviewed) for seed in SEEDS}
            rows = self._held_out([cell for cell in self.results if cell in wanted], "topics")
            seeds = {row.seed for row in rows}
            without_noise = self._held_out([cell for cell in self.plain if cell.seed in seeds], "topics")
            gain_kept = ""
            if rows and without_noise and {row.seed for row in without_noise} == seeds:
                (before, after, *_), (first, last, *_) = means(rows), means(without_noise)
                gain_kept = f"{(after - before) / (last - first):.0%}" if last > first else "no gain to keep"
            print(f"| {noise:.0%} | {f'{REVIEWED:.0%}' if reviewed else '-'} {format_cells(rows)} {gain_kept} |")

    def _print_review(self) -> None:
        print(f"\n| noise | held out by topic, without review -> with | {HEAD}")
        by_noise = {noise: [row for seed in SEEDS for row in self._review_effect(Cell(seed, noise))] for noise in NOISE}
        for noise, rows in by_noise.items():
            print(f"| {noise:.0%} {format_cells(rows)}")
        print(f"| all of these {format_cells([row for rows in by_noise.values() for row in rows])}")

    def _review_effect(self, plain: Cell) -> list[Share]:
        """Compare the reviewed cell with ``plain``, the same cell without review, as reference."""
        reviewed = dataclasses.replace(plain, reviewed=True)
        if plain not in self.results or reviewed not in self.results:
            return []
        return shares(self.results[reviewed], self.results[plain], "answers", split(plain).topics)

    def _print_trials(self, tried: Sequence[Cell]) -> None:
        if not tried:
            return
        trained_kinds = set(KINDS) - set(HELD_OUT_KINDS)
        print(f"\n| tried on seed 0 | answers that pass their check | {HEAD}")
        for number, cell in enumerate(tried, start=1):
            prompt_ids = [key for key in self.results[cell]["answers"] if key.partition("/")[2] in trained_kinds]
            print(f"| {number}. {cell.trial} {format_cells(self._shares([cell], 'answers', prompt_ids))}")
        numbers = range(1, len(tried) + 1)
        print(f"\n| gain in points | {' | '.join(map(str, numbers))} |\n|---|{'---|' * len(tried)}")
        for kind in KINDS:
            gains = []
            for cell in tried:
                rows = self._shares([cell], "answers", (f"{topic}/{kind}" for topic in TOPICS))
                before, after, *_ = means(rows) if rows else (0.0, 0.0)
                gains.append(f"{100 * (after - before):+.1f}" if rows else "")
            print(f"| {kind} | {' | '.join(gains)} |")
