"""Near-duplicate prompts are in the same split of the dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from rlaif.run.run import Run
from tests.fake_judge import judge_by
from tests.fake_server import ScriptedServer
from tests.generate.test_ingest import prose
from tests.labeling.test_judging import goodness, import_and_judge

Serve = Callable[..., ScriptedServer]
FORMS = ("{}", "{}!", "PLEASE NOTE: {}", "{} ...")


def rows(topics: int, forms: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"id": f"{topic}/{form}", "prompt": form.format(prose(topic, 200)), "responses": ["one [0.1]", "two [0.9]"]}
        for form in forms
        for topic in range(topics)
    ]


def splits(run: Run) -> dict[str, str]:
    """Map the prompts of the dataset to their split."""
    return {
        prompt_id: split
        for split in ("train", "test")
        for prompt_id in pl.read_parquet(run.dataset / f"{split}.parquet")["prompt_id"]
    }


def test_near_duplicates_share_a_split_and_keep_it_when_the_run_grows(tmp_path: Path, serve: Serve) -> None:
    server = serve(judge_by(goodness), owned_by="vllm")
    flags = {"pairs.test_fraction": 0.4, "pairs.human_fraction": 0}
    run, _ = import_and_judge(tmp_path, rows(30, FORMS[:2]), server.url, **flags)
    before = splits(run)
    assert len(before) == 60
    assert 5 < sum(split == "test" for split in before.values()) < 55
    run, _ = import_and_judge(tmp_path, rows(32, FORMS), server.url, **flags)
    after = splits(run)
    assert len(after) == 128
    assert {prompt_id: after[prompt_id] for prompt_id in before} == before
    crossing = [topic for topic in range(32) if len({after[f"{topic}/{form}"] for form in FORMS}) > 1]
    assert crossing == []
    assert dict(run.pairs().select("prompt_id", "split").iter_rows()) == after
