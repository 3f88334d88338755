"""Only verdicts of the present panel and settings count, and no result depends on the order of a journal."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif import api
from rlaif.config.loader import load
from rlaif.judge import judge_file, refusal_classifier
from rlaif.llm.backends import ModelBackends
from rlaif.records import Review, Verdict, content_key
from rlaif.run.run import Run
from tests.fake_judge import fenced_parts, judge_by
from tests.fake_server import ScriptedServer
from tests.labeling.test_judging import QuietReporter
from tests.labeling.test_partitions import FILES, PANEL, import_run, panel_requests, random_verdicts

Serve = Callable[..., ScriptedServer]
JOURNALS = ("prompts", "completions", "verdicts", "reviews")


def other_settings(verdict: Verdict) -> Verdict:
    """Return the opposite of ``verdict``, as it may be in the journal from before ``--restart``."""
    changes: dict[str, Any] = {"key": content_key(before=verdict.key), "settings_hash": "other settings"}
    if verdict.prob_a is not None:
        changes["prob_a"] = 1 - verdict.prob_a
    if verdict.kind in ("rate", "reward") and verdict.score is not None:
        changes["score"] = 6 - verdict.score
    if verdict.label is not None:
        changes["label"] = {"refuse": "comply", "comply": "refuse", "partial": "refuse"}[verdict.label]
    if verdict.kind == "check" and verdict.score is not None:
        changes |= {"score": 1 - verdict.score, "judge_hash": "an older version"}
    if verdict.judge == refusal_classifier.CLASSIFIER_NAME:
        changes["judge_hash"] = "an older version"
    return verdict.model_copy(update=changes)


def rebuild(run: Run, flags: dict[str, Any]) -> list[bytes]:
    api.rebuild_dataset(run, load(run.path, PANEL | flags))
    return [(run.path / name).read_bytes() for name in FILES]


def add_reviews(run: Run) -> None:
    """Label every pair of the queue, in a random order of time."""
    rng = random.Random(4)
    queued = run.pairs().filter(pl.col("route").is_in(["audit", "targeted"]))
    with run.lock(), run.journal("reviews") as reviews:
        for number, (pair, prompt, route, pi) in enumerate(
            queued.select("pair_id", "prompt_id", "route", "inclusion_probability").iter_rows()
        ):
            for annotator in ("ada", "bob"):
                choice, preferred = rng.choice([("left", "a"), ("left", "a"), ("right", "b"), ("tie", None)])
                reviews.append([Review(
                    key=content_key(pair=pair, annotator=annotator), pair_id=pair, prompt_id=prompt,
                    annotator=annotator, left_side="a", choice=choice, preferred=preferred, route=route,
                    inclusion_probability=pi, created_at=float(number) + (annotator == "bob") / 2,
                )])  # fmt: skip


def shuffle_journals(run: Run, seed: int) -> None:
    for name in JOURNALS:
        path = run.journal_path(name)  # type: ignore[arg-type]
        lines = path.read_bytes().splitlines(keepends=True)
        random.Random(seed).shuffle(lines)
        path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("strategy", ["rate-then-compare", "round-robin", "rate-only"])
def test_tables_depend_neither_on_other_settings_nor_on_the_order_of_the_journals(
    tmp_path: Path, strategy: str
) -> None:
    """With opposite verdicts of other settings before and after, and with all journals shuffled, every table has the
    same bytes."""
    run = import_run(tmp_path / "run", 80)
    flags = {"judge.strategy": strategy, "pairs.max_tie_drop_fraction": 0.05, "pairs.max_per_prompt": 2}
    verdicts = list(random_verdicts(run, flags))
    with run.lock(), run.journal("verdicts") as journal:
        journal.append(verdicts)
    rebuild(run, flags)
    add_reviews(run)
    alone = rebuild(run, flags)
    assert pl.read_parquet(run.path / FILES[1]).height > 10
    with run.lock(), run.journal("verdicts") as journal:
        journal.append([other_settings(verdict) for verdict in verdicts])
    assert rebuild(run, flags) == alone
    for seed in (1, 2):
        shuffle_journals(run, seed)
        assert rebuild(run, flags) == alone


SETTINGS: dict[str, dict[str, Any]] = {
    "output mode": {"judge.output_mode": "logprobs"},
    "tokens": {"judge.max_tokens": 99, "judge.output_mode": "json"},
    "model": {"judge.panel": ["quality@n", "helpful@n"]},
}


@pytest.mark.parametrize("change", SETTINGS)
def test_restart_judges_again_and_resuming_sends_nothing(serve: Serve, tmp_path: Path, change: str) -> None:
    """After --restart the judges prefer the opposite, and so do all labels. Back at the first settings, the first
    verdicts count again, without a request."""
    first = {"judge.panel": ["quality@m", "helpful@m"], "judge.output_mode": "choice", "pairs.human_fraction": 0.0}
    second = first | SETTINGS[change]
    prefers_last = {"now": False}

    def quality(text: str) -> float:
        last = re.search(r"(\d+)\s*$", text)
        number = int(last[1]) / 100 if last else 0.0
        return 1 - number if prefers_last["now"] else number

    def answer(body: dict[str, Any]) -> Any:
        if "structured_outputs" in body:
            return judge_by(quality)(body)
        parts = fenced_parts(body)
        if "response_format" in body:
            score = 1 + round(4 * quality(parts[-1]))
            verdict = "A" if len(parts) > 2 and quality(parts[-2]) > quality(parts[-1]) else "B"
            return [f'{{"verdict": "{verdict if len(parts) > 2 else score}"}}']
        words = ["A", "B"] if len(parts) > 2 else ["1", "2", "3", "4", "5"]
        return judge_by(quality)({**body, "structured_outputs": {"choice": words}})

    server = serve(answer, models=("m", "n"))
    run = import_run(tmp_path / "run", 60)

    def judge(flags: dict[str, Any]) -> dict[str, str]:
        config = load(run.path, flags | {"judge.base_url": [server.url]})
        with ModelBackends(run.log, config.client, lambda line: None) as backends:
            api.judge(run, config, QuietReporter(), backends, restart=True)
        kept = pl.concat([pl.read_parquet(run.path / name) for name in FILES[1:3]])
        return {row["prompt_id"]: row["chosen"][0]["content"] for row in kept.iter_rows(named=True)}

    chosen_first = judge(first)
    num_requests = len(server.requests)
    prefers_last["now"] = True
    chosen_second = judge(second)
    assert len(server.requests) > num_requests
    common = chosen_first.keys() & chosen_second.keys()
    checked = {record["prompt_id"] for record in run_checks(run)}
    assert len(common - checked) > 10
    assert [prompt for prompt in common - checked if chosen_first[prompt] == chosen_second[prompt]] == []
    num_requests = len(server.requests)
    assert judge(second) == chosen_second
    assert judge(first) == chosen_first
    assert len(server.requests) == num_requests


def run_checks(run: Run) -> list[dict[str, Any]]:
    """Return the verdicts of the prompts' checks, which override the judges."""
    return [record for record in run.verdicts().iter_rows(named=True) if record["kind"] == "check"]


def test_samples_beyond_the_setting_do_not_count(tmp_path: Path) -> None:
    """With three samples per verdict, the fourth and fifth of an earlier start are ignored."""
    run = import_run(tmp_path / "run", 20)
    judge = judge_file.find_judge("helpful")
    assert judge.file.kind == "compare"
    flags = {"judge.panel": ["helpful@m"], "judge.output_mode": "json", "judge.samples_per_verdict": 5}
    fewer = flags | {"judge.samples_per_verdict": 3}
    keys_of_five, keys_of_three = (sample_keys(run, settings) for settings in (flags, fewer))
    assert set(keys_of_three) < set(keys_of_five)

    def journal_verdicts(samples: range, prob_a: float) -> None:
        with run.lock(), run.journal("verdicts") as journal:
            journal.append([
                Verdict(key=key, kind="compare", judge="helpful", judge_hash=judge.hash, model="m",
                        settings_hash=asked_as, prompt_id=prompt, a=a, b=b, order=order, sample=sample, prob_a=prob_a)
                for key, (prompt, a, b, order, sample, asked_as) in keys_of_five.items() if sample in samples
            ])  # fmt: skip

    journal_verdicts(range(3), 0.9)
    before = rebuild(run, fewer)
    journal_verdicts(range(3, 5), 0.0)
    assert rebuild(run, fewer) == before
    assert rebuild(run, flags) != before


def sample_keys(run: Run, flags: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return prompt_id, a, b, order, sample and settings hash of every request, by key."""
    return {
        request.keys[0]: (request.prompt_id, about.a, about.b, about.order, about.sample, about.settings_hash)
        for request in panel_requests(run, flags)
        for about in [request.context]
    }
