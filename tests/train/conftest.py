"""Fixture: a run with a dataset."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from rlaif.run.run import Run
from tests.train.pairs import rows


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.dataset.mkdir(parents=True)
    pl.DataFrame(rows(16)).write_parquet(run.dataset / "train.parquet")
    pl.DataFrame(rows(4, first=16)).write_parquet(run.dataset / "test.parquet")
    return run
