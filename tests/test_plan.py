"""`rlaif plan`: closed forms with their units, what grows with what, what a pilot measured, and what is said."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.cli import plan as told
from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.pipeline import forecast, outlook, workload
from rlaif.pipeline.forecast import Engine, Load, Workload
from rlaif.run.directory import Run
from tests.conftest import write_jsonl
from tests.judging import judge_by
from tests.scripted import ScriptedServer, echo

Cli = Callable[..., subprocess.CompletedProcess[str]]
RATES = {"tokens_per_second": 1000.0, "judge_tokens_per_second": 2000.0}


def work(**changed: Any) -> Workload:
    plain: dict[str, Any] = {
        "prompts": 3600,
        "sampling": Load(1, 100, 0, 1000, 4),
        "judging": Load(10, 5000, 3000, 10, 10),
        "policy": Engine(2, 500),
        "judge": Engine(4, 1005),
        "kept": 0.5,
        "bytes_per_prompt": 10_000,
        "usd_per_gpu_hour": 3.0,
        "usd_per_person_hour": 20.0,
        "train_gpus": 2,
        "train_pairs_per_second": 0.25,
    }
    return Workload(**{**plain, **changed})


def test_every_figure_by_hand() -> None:
    seen = forecast.forecast(work())
    assert seen.pairs == 1800
    assert seen.reviews == 180
    assert seen.people_hours == pytest.approx(1.5)  # 180 x 30 s
    assert seen.records == 3600 * 15  # the prompt, four answers, ten verdicts
    assert seen.bytes == pytest.approx(3600 * 10_000 * outlook.FOR_TABLES)
    sampling, judging = seen.part("sampling"), seen.part("judging")
    assert sampling.hours == pytest.approx(1.0)  # 3600 x 1000 tokens at 2 x 500 a second
    assert sampling.gpu_hours == pytest.approx(2.0)
    assert sampling.cost.usd == pytest.approx(6.0)
    assert judging.hours == pytest.approx(3600 * 2010 / 4020 / 3600)  # what the cache has is not read
    assert judging.gpu_hours == pytest.approx(4 * judging.hours)
    assert judging.cost.prompt_tokens == 3600 * 5000
    assert judging.cached_tokens == 3600 * 3000
    assert seen.part("asking").hours == pytest.approx(3600 * 11 / forecast.REQUESTS_PER_SECOND / 3600)
    assert seen.part("people").hours == pytest.approx(1.5 / 4 * 24)  # two people, two hours a day
    assert seen.part("people").cost.usd == pytest.approx(30.0)
    assert seen.part("training").hours == pytest.approx(1.0)  # 1800 pairs at 2 x 0.25 a second
    assert seen.cost.usd == pytest.approx(3 * (2 + 2 + 2) + 30)
    assert seen.gpu_hours == pytest.approx(6.0)
    small = seen.part("taking in").hours + seen.part("pairing").hours
    assert seen.machine_hours == pytest.approx(1.0 + 0.5 + 1.0 + small)
    assert [part.name for part in seen.bottlenecks()][:3] == ["people", "sampling", "training"]


@pytest.mark.parametrize("times", [2, 10, 1000])
def test_all_grows_in_proportion_to_the_prompts(times: int) -> None:
    few, many = forecast.forecast(work()), forecast.forecast(work(prompts=3600 * times))
    for name in ("pairs", "reviews", "people_hours", "records", "bytes", "memory_bytes", "gpu_hours", "machine_hours"):
        assert getattr(many, name) == pytest.approx(times * getattr(few, name)), name
    assert many.cost.usd == pytest.approx(times * few.cost.usd)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("policy", Engine(4, 500), "sampling"),
        ("policy", Engine(2, 1000), "sampling"),
        ("judge", Engine(8, 1005), "judging"),
        ("judging", Load(10, 5000, 4000, 10, 10), "judging"),
        ("train_gpus", 4, "training"),
        ("people", 4, "people"),
        ("reviews", 90, "people"),
        ("human_share", 0.05, "people"),
        ("runs", 2, "asking"),
        ("runs", 2, "pairing"),
        ("requests_per_second", 3600.0, "asking"),
    ],
)
def test_more_of_what_is_short_takes_less_time(field: str, value: Any, part: str) -> None:
    before, after = forecast.forecast(work()), forecast.forecast(work(**{field: value}))
    assert after.part(part).hours < before.part(part).hours
    others = [other.name for other in before.parts if other.name not in (part, "asking", "pairing", "taking in")]
    for other in others:
        assert after.part(other).hours == before.part(other).hours, other


def test_twice_the_gpus_take_half_the_time_and_cost_the_same() -> None:
    one, two = forecast.forecast(work()), forecast.forecast(work(policy=Engine(4, 500)))
    assert two.part("sampling").hours == pytest.approx(one.part("sampling").hours / 2)
    assert two.cost.usd == pytest.approx(one.cost.usd)


def test_sampling_and_judging_are_no_faster_than_the_process_that_asks() -> None:
    slow = forecast.forecast(work(requests_per_second=1.0))
    assert slow.part("asking").hours == pytest.approx(11.0)
    assert slow.machine_hours == pytest.approx(11.0 + 1.0 + slow.part("taking in").hours + slow.part("pairing").hours)
    by_records = forecast.forecast(work(records_per_second=1.0))
    assert by_records.part("asking").hours == pytest.approx(15.0)


def test_a_quota_bounds_the_labels_and_never_adds_any() -> None:
    assert forecast.forecast(work(reviews=50)).reviews == 50
    assert forecast.forecast(work(reviews=10**6)).reviews == 180
    assert forecast.forecast(work(reviews=0)).part("people").hours == 0


def test_a_run_that_does_not_fit_into_memory_is_split() -> None:
    large = work(prompts=10**8)
    need = 10**8 * forecast.MEMORY_BYTES / 64e9
    assert 1 < need < 2
    assert forecast.forecast(large).runs_needed == 2
    fits = forecast.forecast(dataclasses.replace(large, runs=2))
    assert fits.memory_bytes <= 64e9
    assert fits.runs_needed == 2
    assert forecast.forecast(work()).runs_needed == 1


def test_an_endpoint_takes_dollars_and_no_gpus() -> None:
    seen = forecast.forecast(work(judge=Engine(0, None, 10.0), judging=Load(10, 5000, 0, 10, 10, 0.01)))
    judging = seen.part("judging")
    assert (judging.gpu_hours, judging.hours) == (0, pytest.approx(1.0))  # 36,000 requests at 10 a second
    assert judging.cost.usd == pytest.approx(36.0)


# Without a pilot


def config(**judge: Any) -> Config:
    return Config.model_validate({"sampler": {"model": ["p"], "n": 4}, "judge": {"model": "j", **judge}})


def loads(of: Config, **given: Any) -> tuple[Load, Load, workload.Figures]:
    made, figures = workload.workload(of, 10, {**RATES, **given}, None)
    return made.sampling, made.judging, figures


def test_requests_are_those_of_the_judge_files() -> None:
    sampling, judging, figures = loads(config())
    assert (sampling.requests, sampling.records, sampling.completion_tokens) == (1, 4, 1200)
    assert judging.requests == pytest.approx(4 * 4 + 2 * 1.2)  # four aspects of four answers; 0.2 try another pair
    assert judging.records == judging.requests
    assert judging.completion_tokens == judging.requests  # a verdict is a token
    # Each rating reads the prompt and an answer, each comparison the prompt and two, besides the rubric.
    assert judging.prompt_tokens > 16 * 400 + 2.4 * 700
    assert figures.sources["kept"] == "assumed"
    assert figures.sources["tokens_per_second"] == "given"


def test_the_cache_has_the_rubric_and_what_aspects_share() -> None:
    _, rated, _ = loads(config(judges=["quality"]))
    # Of four aspects three find the prompt and the answer there, and the first one finds the rubric.
    assert 0.6 < rated.cached_tokens / rated.prompt_tokens < 0.75
    _, compared, _ = loads(config(judges=["helpful"]))
    assert 0.2 < compared.cached_tokens / compared.prompt_tokens < 0.5  # rubric, request, but not the answers
    _, longer, _ = loads(config(judges=["helpful"]), answer_tokens=3000)
    assert longer.cached_tokens == compared.cached_tokens
    assert longer.prompt_tokens == pytest.approx(compared.prompt_tokens + compared.requests * 2 * 2700)


def test_strategies_differ_in_what_they_compare() -> None:
    _, all_pairs, _ = loads(config(judges=["helpful"]))
    assert all_pairs.requests == 6 * 2  # a comparing judge alone: round robin of four
    _, none, _ = loads(config(strategy="rate-only"))
    assert none.requests == 16


def test_an_endpoint_with_a_price_needs_no_rate() -> None:
    paid = config(judges=["helpful"], model="gpt-4.1-mini", base_url="https://api.openai.com/v1")
    made, _ = workload.workload(paid, 10, {"tokens_per_second": 1.0}, None)
    assert made.judge.gpus == 0
    assert made.judging.usd is not None
    assert 0 < made.judging.usd < 0.1
    doubled, _ = workload.workload(paid, 10, {"tokens_per_second": 1.0, "answer_tokens": 600}, None)
    assert doubled.judging.usd is not None
    assert doubled.judging.usd > made.judging.usd


@pytest.mark.parametrize(("missing", "flag"), [(0, "--tokens-per-second"), (1, "--judge-tokens-per-second")])
def test_a_rate_that_nobody_knows_is_asked_for(missing: int, flag: str) -> None:
    given = dict([item for place, item in enumerate(RATES.items()) if place != missing])
    with pytest.raises(UsageError) as raised:
        workload.workload(config(), 10, given, None)
    assert flag in str(raised.value)


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 20])
def test_pairs_that_are_kept_were_compared(kept: float) -> None:
    """Of one that is dropped another is tried, and more are kept only where more are compared."""
    _, judging, _ = loads(config(judges=["helpful", "quality"]), kept=kept)
    assert judging.requests == pytest.approx(16 + 2 * max(kept, 2 - kept))


# With one


def answer(body: dict[str, Any]) -> Any:
    if "structured_outputs" not in body:
        return echo(body)
    said = judge_by(lambda text: len(text) % 10 / 10)(body)
    return said | {
        "usage": {"prompt_tokens": 300, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 96}}
    }


@pytest.fixture
def pilot(tmp_path: Path, rlaif: Cli, serve: Callable[..., ScriptedServer]) -> Path:
    """Twelve prompts answered and judged by a scripted server."""
    run = tmp_path / "pilot"
    server = serve(answer)
    source = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": f"Number {i}, please say what {i * i} is."} for i in range(12)]
    )
    rlaif("generate", run, "--prompts", source, "-n", "3", "--model", "m", "--base-url", server.url,
          "--heldout-share", "0")  # fmt: skip
    rlaif("judge", run, "--judge", "helpful", "--judge", "quality", "--model", "m", "--base-url", server.url)
    return run


def test_a_plan_from_a_run_is_that_run_multiplied(pilot: Path, rlaif: Cli) -> None:
    run = Run(pilot)
    stages = run.manifest()["stages"]
    (first,), (second,) = stages["generate"]["history"], stages["judge"]["history"]
    seen = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, "--json").stdout)
    sampling, judging = (
        next(part for part in seen["parts"] if part["name"] == name) for name in ("sampling", "judging")
    )
    for part, facts in ((sampling, first), (judging, second)):
        assert part["requests"] == pytest.approx(100 * facts["requests"])
        assert part["cost"]["prompt_tokens"] == pytest.approx(100 * facts["prompt_tokens"])
        assert part["cost"]["completion_tokens"] == pytest.approx(100 * facts["completion_tokens"])
    facts = {"prompts": 12, "bytes": outlook.size(run), "generate": {**first, "seconds": first["asking_s"]},
             "judge": {**second, "seconds": second["asking_s"]}}  # fmt: skip
    # The estimate that a night gives before it begins, at as many requests in flight as the pilot had.
    night = outlook.outlook(facts, 1200, {"generate": 0, "judge": 0}, concurrency=12)
    assert sampling["hours"] * 3600 == pytest.approx(night.generate.seconds, rel=1e-6)
    assert seen["bytes"] == pytest.approx(night.bytes, rel=1e-6)
    routes = stages["judge"]["pairs"]["routes"]
    assert seen["pairs"] == pytest.approx(100 * sum(n for route, n in routes.items() if route != "dropped"))
    assert seen["sources"]["tokens_per_second"] == "measured"
    assert seen["sources"]["seconds_a_review"] == "assumed"


def test_what_is_given_goes_over_what_was_measured(pilot: Path) -> None:
    config = Config.model_validate(workload.as_run(Run(pilot)))
    assert (config.sampler.n, config.judge.model) == (3, "m")
    plain, _ = workload.workload(config, 10, {}, Run(pilot))
    two, _ = workload.workload(config, 10, {"pilot_gpus": 2}, Run(pilot))
    assert plain.policy.tokens_per_second is not None
    assert two.policy.tokens_per_second == pytest.approx(plain.policy.tokens_per_second / 2)
    longer, figures = workload.workload(config, 10, {"answer_tokens": 500}, Run(pilot))
    assert longer.sampling.completion_tokens == 1500
    assert longer.policy == plain.policy
    assert figures.sources["judging's tokens"] == "computed"


def test_other_models_are_planned_at_their_own_rates_and_prices(pilot: Path, rlaif: Cli) -> None:
    """Of them the pilot tells how much they are asked and how long the answers are, not how fast, nor for how much."""
    paid = ("--base-url", "https://api.openai.com/v1", "--model", "gpt-4.1-mini")
    judge = ("--judge-model", "gpt-4.1", "--judge-base-url", "https://api.openai.com/v1")
    local = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, "--json").stdout)
    seen = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, *paid, *judge, "--json").stdout)
    for name in ("sampling", "judging"):
        before, part = (next(part for part in told["parts"] if part["name"] == name) for told in (local, seen))
        assert (before["gpu_hours"] > 0, before["cost"]["usd"]) == (True, 0)
        assert part["gpu_hours"] == part["hours"] == 0
        assert part["cost"]["usd"] > 0
        if name == "sampling":
            assert part["cost"]["completion_tokens"] == pytest.approx(before["cost"]["completion_tokens"])
    assert seen["gpu_hours"] == 0
    for flag, value in (("--judge-model", "another"), ("--judge", "helpful@another")):
        told = rlaif("plan", "--prompts", "1200", "--from", pilot, flag, value, code=2).stderr
        assert "how fast judging goes is not known" in told
    slow = ("--judge-tokens-per-second", "1000", "--json")
    seen = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, "--judge-model", "another", *slow).stdout)
    assert seen["sources"]["tokens_per_second"] == "measured"
    assert seen["sources"]["judge_tokens_per_second"] == "given"


def test_a_run_that_has_asked_nothing_tells_nothing(tmp_path: Path, rlaif: Cli) -> None:
    rlaif("init", tmp_path / "run")
    told = rlaif("plan", "--prompts", "10", "--from", tmp_path / "run", code=2).stderr
    assert "how fast sampling goes is not known" in told
    rates = ("--tokens-per-second", "1000", "--judge-tokens-per-second", "1000")
    shown = rlaif("plan", "--prompts", "10", "--from", tmp_path / "run", *rates).stdout
    assert "4 answers each by demo\njudged by helpful@demo, quality@demo" in shown  # its rlaif.toml's settings
    assert "there is no such run" in rlaif("plan", "--prompts", "10", "--from", tmp_path / "none", code=1).stderr


# What is said


@pytest.mark.parametrize(
    ("text", "number"),
    [("10", 10), ("10k", 10_000), ("1.5M", 1_500_000), ("100m", 10**8), ("1,000", 1000), ("2B", 2 * 10**9)],
)
def test_numbers_as_people_write_them(text: str, number: int) -> None:
    assert told.count(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "ten", "nan", "inf", "1e99"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(UsageError, match="is no number"):
        told.count(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, ""), (7, "7"), (9_996, "10.00k"), (999_999, "1,000k"), (1.2e9, "1.20B"), (1.25e12, "1.25T")],
)
def test_large_counts_in_few_characters(number: float, text: str) -> None:
    assert told.short(number) == text


def test_the_table_names_what_gives_way_first_and_what_helps(rlaif: Cli) -> None:
    rates = ("--tokens-per-second", "8000", "--judge-tokens-per-second", "20000")
    shown = rlaif("plan", "--prompts", "100M", "--gpus", "64", *rates).stdout
    assert "First bottleneck: people" in shown
    assert "split the prompts into 2 runs" in shown
    quota = rlaif("plan", "--prompts", "100M", "--gpus", "64", "--reviews", "2000", *rates).stdout
    assert "First bottleneck: asking" in quota
    assert "--runs" in quota
    assert "human_share = 2.5e-05" in quota
    split = rlaif("plan", "--prompts", "100M", "--gpus", "64", "--reviews", "2000", "--runs", "16", *rates).stdout
    assert "First bottleneck: judging" in split
    assert max(map(len, split.splitlines())) <= 120
