"""``pairs.max_tie_drop_fraction`` is a fraction of prompts, before and after calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif import api
from rlaif.config.loader import load
from rlaif.labeling import build_dataset
from rlaif.pair.human_calibration import _near_ties_to_drop, apply_human_calibration
from tests.labeling.test_partitions import PANEL, import_run, random_verdicts


def routed(*rows: tuple[str, float | None, str, bool]) -> pl.DataFrame:
    """(prompt_id, new_prob_a, route, undecided)."""
    frame = pl.DataFrame(rows, schema=["prompt_id", "new_prob_a", "route", "undecided"], orient="row")
    return frame.with_columns(pair_id=pl.int_range(pl.len()).cast(pl.String).str.zfill(5))


def test_three_near_ties_of_one_prompt_cost_one_prompt() -> None:
    """All three pairs of 100 prompts become near ties, and 30 prompts may be lost."""
    pairs = routed(*((f"{i:03d}", 0.5 + i / 1000 + j / 10_000, "judge", False) for i in range(100) for j in range(3)))
    kept = pairs.filter(~pl.col("pair_id").is_in(_near_ties_to_drop(pairs, 0.65, 30).implode()))
    assert kept["prompt_id"].to_list() == [f"{i:03d}" for i in range(30, 100)]  # the most confident prompts
    assert kept["new_prob_a"].to_list() == pytest.approx([0.5002 + i / 1000 for i in range(30, 100)])


def test_a_near_tie_costs_no_prompt_that_keeps_another_pair() -> None:
    pairs = routed(
        ("confident", 0.9, "judge", False), ("confident", 0.6, "judge", False),
        ("in review", 0.5, "audit", False), ("in review", 0.6, "judge", False),
        ("unchanged", None, "judge", False), ("unchanged", 0.6, "judge", False),
        ("newly labeled", 0.9, "dropped", True), ("newly labeled", 0.6, "judge", False),
        ("dropped", None, "dropped", False), ("dropped", 0.6, "judge", False),
    )  # fmt: skip
    dropped = pairs.filter(pl.col("pair_id").is_in(_near_ties_to_drop(pairs, 0.65, 0).implode()))
    assert dropped["prompt_id"].to_list() == ["confident", "in review", "unchanged", "newly labeled"]
    assert _near_ties_to_drop(pairs, 0.65, 1).len() == 5


def test_the_budget_of_calibration_counts_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged prompts and those that are lost, not pairs: with up to five answers, a prompt has up to ten pairs."""
    run = import_run(tmp_path / "run", 120)
    flags = {"judge.strategy": "round-robin", "pairs.max_per_prompt": 2}
    with run.lock(), run.journal("verdicts") as journal:
        journal.append(list(random_verdicts(run, flags)))
    passed: dict[str, Any] = {}

    def record(*arguments: Any, **settings: Any) -> Any:
        passed.update(settings)
        return apply_human_calibration(*arguments, **settings)

    monkeypatch.setattr(build_dataset, "apply_human_calibration", record)
    api.rebuild_dataset(run, load(run.path, PANEL | flags))
    pairs = run.pairs()
    judged = pairs.filter(pl.col("prob_a").is_not_null())
    assert passed["num_judged"] == judged["prompt_id"].n_unique() < judged.height
    ties = pl.col("outcome").is_in(["tie", "inconsistent"])
    has_win = pairs.filter(pl.col("outcome") == "win")["prompt_id"]
    lost = pairs.filter(ties & ~pl.col("prompt_id").is_in(has_win.implode()))
    assert 0 < passed["num_lost"] <= lost["prompt_id"].n_unique() < lost.height
