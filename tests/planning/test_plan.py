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
from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.planning import capacity, run_estimate, workload
from rlaif.planning.capacity import StageLoad, Throughput, Workload
from rlaif.run.run import Run
from tests.conftest import write_jsonl
from tests.fake_judge import judge_by
from tests.fake_server import ScriptedServer, echo

Cli = Callable[..., subprocess.CompletedProcess[str]]
RATES = {"tokens_per_second": 1000.0, "judge_tokens_per_second": 2000.0}


def make_workload(**changes: Any) -> Workload:
    defaults: dict[str, Any] = {
        "prompts": 3600,
        "sampling": StageLoad(1, 100, 0, 1000, 4),
        "judging": StageLoad(10, 5000, 3000, 10, 10),
        "policy": Throughput(2, 500),
        "judge": Throughput(4, 1005),
        "pairs_per_prompt": 0.5,
        "bytes_per_prompt": 10_000,
        "usd_per_gpu_hour": 3.0,
        "usd_per_annotator_hour": 20.0,
        "train_gpus": 2,
        "train_pairs_per_second": 0.25,
    }
    return Workload(**{**defaults, **changes})


def test_every_figure_by_hand() -> None:
    plan = capacity.plan_capacity(make_workload())
    assert plan.pairs == 1800
    assert plan.reviews == 180
    assert plan.annotator_hours == pytest.approx(1.5)  # 180 x 30 s
    assert plan.records == 3600 * 15  # the prompt, four answers, ten verdicts
    assert plan.bytes == pytest.approx(3600 * 10_000 * run_estimate.DISK_FACTOR)
    sampling, judging = plan.stage("sampling"), plan.stage("judging")
    assert sampling.hours == pytest.approx(1.0)  # 3600 x 1000 tokens at 2 x 500 a second
    assert sampling.gpu_hours == pytest.approx(2.0)
    assert sampling.cost.cost_usd == pytest.approx(6.0)
    assert judging.hours == pytest.approx(3600 * 2010 / 4020 / 3600)  # what the cache has is not read
    assert judging.gpu_hours == pytest.approx(4 * judging.hours)
    assert judging.cost.prompt_tokens == 3600 * 5000
    assert judging.cached_tokens == 3600 * 3000
    assert plan.stage("dispatch").hours == pytest.approx(3600 * 11 / capacity.REQUESTS_PER_SECOND / 3600)
    assert plan.stage("human review").hours == pytest.approx(1.5 / 4 * 24)  # two people, two hours a day
    assert plan.stage("human review").cost.cost_usd == pytest.approx(30.0)
    assert plan.stage("training").hours == pytest.approx(1.0)  # 1800 pairs at 2 x 0.25 a second
    assert plan.cost.cost_usd == pytest.approx(3 * (2 + 2 + 2) + 30)
    assert plan.gpu_hours == pytest.approx(6.0)
    small = plan.stage("ingest").hours + plan.stage("pairing").hours
    assert plan.machine_hours == pytest.approx(1.0 + 0.5 + 1.0 + small)
    assert [stage.name for stage in plan.bottlenecks()][:3] == ["human review", "sampling", "training"]


@pytest.mark.parametrize("times", [2, 10, 1000])
def test_all_grows_in_proportion_to_the_prompts(times: int) -> None:
    few, many = capacity.plan_capacity(make_workload()), capacity.plan_capacity(make_workload(prompts=3600 * times))
    for name in (
        "pairs",
        "reviews",
        "annotator_hours",
        "records",
        "bytes",
        "memory_bytes",
        "gpu_hours",
        "machine_hours",
    ):
        assert getattr(many, name) == pytest.approx(times * getattr(few, name)), name
    assert many.cost.cost_usd == pytest.approx(times * few.cost.cost_usd)


@pytest.mark.parametrize(
    ("field", "value", "stage"),
    [
        ("policy", Throughput(4, 500), "sampling"),
        ("policy", Throughput(2, 1000), "sampling"),
        ("judge", Throughput(8, 1005), "judging"),
        ("judging", StageLoad(10, 5000, 4000, 10, 10), "judging"),
        ("train_gpus", 4, "training"),
        ("annotators", 4, "human review"),
        ("max_reviews", 90, "human review"),
        ("human_fraction", 0.05, "human review"),
        ("runs", 2, "dispatch"),
        ("runs", 2, "pairing"),
        ("requests_per_second", 3600.0, "dispatch"),
    ],
)
def test_more_of_what_is_short_takes_less_time(field: str, value: Any, stage: str) -> None:
    before, after = capacity.plan_capacity(make_workload()), capacity.plan_capacity(make_workload(**{field: value}))
    assert after.stage(stage).hours < before.stage(stage).hours
    others = [other.name for other in before.stages if other.name not in (stage, "dispatch", "pairing", "ingest")]
    for other in others:
        assert after.stage(other).hours == before.stage(other).hours, other


def test_twice_the_gpus_take_half_the_time_and_cost_the_same() -> None:
    one, two = capacity.plan_capacity(make_workload()), capacity.plan_capacity(make_workload(policy=Throughput(4, 500)))
    assert two.stage("sampling").hours == pytest.approx(one.stage("sampling").hours / 2)
    assert two.cost.cost_usd == pytest.approx(one.cost.cost_usd)


def test_sampling_and_judging_are_no_faster_than_the_process_that_asks() -> None:
    slow = capacity.plan_capacity(make_workload(requests_per_second=1.0))
    assert slow.stage("dispatch").hours == pytest.approx(11.0)
    assert slow.machine_hours == pytest.approx(11.0 + 1.0 + slow.stage("ingest").hours + slow.stage("pairing").hours)
    by_records = capacity.plan_capacity(make_workload(records_per_second=1.0))
    assert by_records.stage("dispatch").hours == pytest.approx(15.0)


def test_a_quota_bounds_the_labels_and_never_adds_any() -> None:
    assert capacity.plan_capacity(make_workload(max_reviews=50)).reviews == 50
    assert capacity.plan_capacity(make_workload(max_reviews=10**6)).reviews == 180
    assert capacity.plan_capacity(make_workload(max_reviews=0)).stage("human review").hours == 0


def test_a_run_that_does_not_fit_into_memory_is_split() -> None:
    large = make_workload(prompts=10**8)
    need = 10**8 * capacity.MEMORY_BYTES_PER_PROMPT / 64e9
    assert 1 < need < 2
    assert capacity.plan_capacity(large).runs_needed == 2
    fits = capacity.plan_capacity(dataclasses.replace(large, runs=2))
    assert fits.memory_bytes <= 64e9
    assert fits.runs_needed == 2
    assert capacity.plan_capacity(make_workload()).runs_needed == 1


def test_an_endpoint_takes_dollars_and_no_gpus() -> None:
    plan = capacity.plan_capacity(
        make_workload(judge=Throughput(0, None, 10.0), judging=StageLoad(10, 5000, 0, 10, 10, 0.01))
    )
    judging = plan.stage("judging")
    assert (judging.gpu_hours, judging.hours) == (0, pytest.approx(1.0))  # 36,000 requests at 10 a second
    assert judging.cost.cost_usd == pytest.approx(36.0)


# Without a pilot


def config(**judge: Any) -> Config:
    return Config.model_validate({"sampler": {"model": ["p"], "n": 4}, "judge": {"model": "j", **judge}})


def loads(config: Config, **given: Any) -> tuple[StageLoad, StageLoad, workload.PlanInputs]:
    planned, inputs = workload.build_workload(config, 10, {**RATES, **given}, None)
    return planned.sampling, planned.judging, inputs


def test_requests_are_those_of_the_judge_files() -> None:
    sampling, judging, inputs = loads(config())
    assert (sampling.requests, sampling.records, sampling.completion_tokens) == (1, 4, 1200)
    assert judging.requests == pytest.approx(4 * 4 + 2 * 1.2)  # four aspects of four answers; 0.2 try another pair
    assert judging.records == judging.requests
    assert judging.completion_tokens == judging.requests  # a verdict is a token
    # Each rating reads the prompt and an answer, each comparison the prompt and two, besides the rubric.
    assert judging.prompt_tokens > 16 * 400 + 2.4 * 700
    assert inputs.sources["pairs_per_prompt"] == "assumed"
    assert inputs.sources["tokens_per_second"] == "given"


def test_the_cache_has_the_rubric_and_what_aspects_share() -> None:
    _, rated, _ = loads(config(panel=["quality"]))
    # Of four aspects three find the prompt and the answer there, and the first one finds the rubric.
    assert 0.6 < rated.cached_tokens / rated.prompt_tokens < 0.75
    _, compared, _ = loads(config(panel=["helpful"]))
    assert 0.2 < compared.cached_tokens / compared.prompt_tokens < 0.5  # rubric, request, but not the answers
    _, longer, _ = loads(config(panel=["helpful"]), answer_tokens=3000)
    assert longer.cached_tokens == compared.cached_tokens
    assert longer.prompt_tokens == pytest.approx(compared.prompt_tokens + compared.requests * 2 * 2700)


def test_strategies_differ_in_what_they_compare() -> None:
    _, all_pairs, _ = loads(config(panel=["helpful"]))
    assert all_pairs.requests == 6 * 2  # a comparing judge alone: round robin of four
    _, none, _ = loads(config(strategy="rate-only"))
    assert none.requests == 16


def test_an_endpoint_with_a_price_needs_no_rate() -> None:
    paid = config(panel=["helpful"], model="gpt-4.1-mini", base_url="https://api.openai.com/v1")
    planned, _ = workload.build_workload(paid, 10, {"tokens_per_second": 1.0}, None)
    assert planned.judge.gpus == 0
    assert planned.judging.cost_usd is not None
    assert 0 < planned.judging.cost_usd < 0.1
    doubled, _ = workload.build_workload(paid, 10, {"tokens_per_second": 1.0, "answer_tokens": 600}, None)
    assert doubled.judging.cost_usd is not None
    assert doubled.judging.cost_usd > planned.judging.cost_usd


@pytest.mark.parametrize(("missing", "flag"), [(0, "--tokens-per-second"), (1, "--judge-tokens-per-second")])
def test_a_rate_that_nobody_knows_is_asked_for(missing: int, flag: str) -> None:
    given = dict([item for index, item in enumerate(RATES.items()) if index != missing])
    with pytest.raises(UsageError) as raised:
        workload.build_workload(config(), 10, given, None)
    assert flag in str(raised.value)


@pytest.mark.parametrize("pairs_per_prompt", [0, 1, 2, 3, 20])
def test_pairs_that_are_kept_were_compared(pairs_per_prompt: float) -> None:
    """Of one that is dropped another is tried, and more are kept only where more are compared."""
    _, judging, _ = loads(config(panel=["helpful", "quality"]), pairs_per_prompt=pairs_per_prompt)
    assert judging.requests == pytest.approx(16 + 2 * max(pairs_per_prompt, 2 - pairs_per_prompt))


# With one


def answer(body: dict[str, Any]) -> Any:
    if "structured_outputs" not in body:
        return echo(body)
    reply = judge_by(lambda text: len(text) % 10 / 10)(body)
    return reply | {
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
          "--heldout-fraction", "0")  # fmt: skip
    rlaif("judge", run, "--judge", "helpful", "--judge", "quality", "--model", "m", "--base-url", server.url)
    return run


def test_a_plan_from_a_run_is_that_run_multiplied(pilot: Path, rlaif: Cli) -> None:
    run = Run(pilot)
    stages = run.manifest()["stages"]
    (first,), (second,) = stages["generate"]["history"], stages["judge"]["history"]
    plan = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, "--json").stdout)
    sampling, judging = (
        next(stage for stage in plan["stages"] if stage["name"] == name) for name in ("sampling", "judging")
    )
    for stage, facts in ((sampling, first), (judging, second)):
        assert stage["requests"] == pytest.approx(100 * facts["requests"])
        assert stage["cost"]["prompt_tokens"] == pytest.approx(100 * facts["prompt_tokens"])
        assert stage["cost"]["completion_tokens"] == pytest.approx(100 * facts["completion_tokens"])
    facts = {
        "prompts": 12,
        "bytes": run_estimate.journal_bytes(run),
        "generate": {**first, "seconds": first["request_wall_s"]},
        "judge": {**second, "seconds": second["request_wall_s"]},
    }
    # The estimate that a night gives before it begins, at as many requests in flight as the pilot had.
    estimate = run_estimate.estimate_remaining(facts, 1200, {"generate": 0, "judge": 0}, concurrency=12)
    assert sampling["hours"] * 3600 == pytest.approx(estimate.generate.seconds, rel=1e-6)
    assert plan["bytes"] == pytest.approx(estimate.disk_bytes, rel=1e-6)
    routes = stages["judge"]["pairs"]["routes"]
    assert plan["pairs"] == pytest.approx(100 * sum(n for route, n in routes.items() if route != "dropped"))
    assert plan["sources"]["tokens_per_second"] == "measured"
    assert plan["sources"]["review_seconds"] == "assumed"


def test_what_is_given_goes_over_what_was_measured(pilot: Path) -> None:
    config = Config.model_validate(workload.config_of_run(Run(pilot)))
    assert (config.sampler.n, config.judge.model) == (3, "m")
    plain, _ = workload.build_workload(config, 10, {}, Run(pilot))
    two, _ = workload.build_workload(config, 10, {"pilot_gpus": 2}, Run(pilot))
    assert plain.policy.tokens_per_second is not None
    assert two.policy.tokens_per_second == pytest.approx(plain.policy.tokens_per_second / 2)
    longer, inputs = workload.build_workload(config, 10, {"answer_tokens": 500}, Run(pilot))
    assert longer.sampling.completion_tokens == 1500
    assert longer.policy == plain.policy
    assert inputs.sources["judging's tokens"] == "computed"


def test_other_models_are_planned_at_their_own_rates_and_prices(pilot: Path, rlaif: Cli) -> None:
    """Of them the pilot tells how much they are asked and how long the answers are, not how fast, nor for how much."""
    paid = ("--base-url", "https://api.openai.com/v1", "--model", "gpt-4.1-mini")
    judge = ("--judge-model", "gpt-4.1", "--judge-base-url", "https://api.openai.com/v1")
    local = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, "--json").stdout)
    plan = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, *paid, *judge, "--json").stdout)
    for name in ("sampling", "judging"):
        before, stage = (
            next(stage for stage in capacity_plan["stages"] if stage["name"] == name) for capacity_plan in (local, plan)
        )
        assert (before["gpu_hours"] > 0, before["cost"]["cost_usd"]) == (True, 0)
        assert stage["gpu_hours"] == stage["hours"] == 0
        assert stage["cost"]["cost_usd"] > 0
        if name == "sampling":
            assert stage["cost"]["completion_tokens"] == pytest.approx(before["cost"]["completion_tokens"])
    assert plan["gpu_hours"] == 0
    for flag, value in (("--judge-model", "another"), ("--judge", "helpful@another")):
        stderr = rlaif("plan", "--prompts", "1200", "--from", pilot, flag, value, code=2).stderr
        assert "how fast judging goes is not known" in stderr
    slow = ("--judge-tokens-per-second", "1000", "--json")
    plan = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, "--judge-model", "another", *slow).stdout)
    assert plan["sources"]["tokens_per_second"] == "measured"
    assert plan["sources"]["judge_tokens_per_second"] == "given"


def test_a_run_that_has_asked_nothing_tells_nothing(tmp_path: Path, rlaif: Cli) -> None:
    rlaif("init", tmp_path / "run")
    stderr = rlaif("plan", "--prompts", "10", "--from", tmp_path / "run", code=2).stderr
    assert "how fast sampling goes is not known" in stderr
    rates = ("--tokens-per-second", "1000", "--judge-tokens-per-second", "1000")
    stdout = rlaif("plan", "--prompts", "10", "--from", tmp_path / "run", *rates).stdout
    assert "4 answers each by demo\njudged by helpful@demo, quality@demo" in stdout  # its rlaif.toml's settings
    assert "no such run" in rlaif("plan", "--prompts", "10", "--from", tmp_path / "none", code=1).stderr


# What is said


@pytest.mark.parametrize(
    ("text", "number"),
    [("10", 10), ("10k", 10_000), ("1.5M", 1_500_000), ("100m", 10**8), ("1,000", 1000), ("2B", 2 * 10**9)],
)
def test_numbers_as_people_write_them(text: str, number: int) -> None:
    assert told.parse_count(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "ten", "nan", "inf", "1e99"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(UsageError, match="is no number"):
        told.parse_count(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, ""), (7, "7"), (9_996, "10.00k"), (999_999, "1,000k"), (1.2e9, "1.20B"), (1.25e12, "1.25T")],
)
def test_large_counts_in_few_characters(number: float, text: str) -> None:
    assert told.format_count(number) == text


def test_the_table_names_what_gives_way_first_and_what_helps(rlaif: Cli) -> None:
    rates = ("--tokens-per-second", "8000", "--judge-tokens-per-second", "20000")
    stdout = rlaif("plan", "--prompts", "100M", "--gpus", "64", *rates).stdout
    assert "First bottleneck: human review" in stdout
    assert "split the prompts into 2 runs" in stdout
    stdout_with_quota = rlaif("plan", "--prompts", "100M", "--gpus", "64", "--max-reviews", "2000", *rates).stdout
    assert "First bottleneck: dispatch" in stdout_with_quota
    assert "--runs" in stdout_with_quota
    assert "human_fraction = 2.5e-05" in stdout_with_quota
    split = rlaif("plan", "--prompts", "100M", "--gpus", "64", "--max-reviews", "2000", "--runs", "16", *rates).stdout
    assert "First bottleneck: judging" in split
    assert max(map(len, split.splitlines())) <= 120
