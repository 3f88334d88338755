"""`rlaif plan`: its formulas, figures measured in a pilot, given and assumed ones, and the text output."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.cli.plan import FLAGS, format_large_count, parse_count
from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.planning import capacity, run_estimate, workload
from rlaif.planning.capacity import StageLoad, Throughput, Workload
from rlaif.planning.plan_settings import PLAN_SETTINGS, parse_settings
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


def test_every_figure_matches_a_calculation_by_hand() -> None:
    plan = capacity.plan_capacity(make_workload())
    assert plan.pairs == 1800
    assert plan.reviews == 180
    assert plan.annotator_hours == pytest.approx(1.5)  # 180 x 30 s
    assert plan.records == 3600 * 15  # the prompt, four answers, ten verdicts
    assert plan.bytes == pytest.approx(3600 * 10_000 * run_estimate.DISK_FACTOR)
    sampling, judging = plan.stage("sampling"), plan.stage("judging")
    assert sampling.hours == pytest.approx(1.0)  # 3600 x 1000 tokens at 2 x 500 per second
    assert sampling.gpu_hours == pytest.approx(2.0)
    assert sampling.cost.cost_usd == pytest.approx(6.0)
    assert judging.hours == pytest.approx(3600 * 2010 / 4020 / 3600)  # cached tokens are not read
    assert judging.gpu_hours == pytest.approx(4 * judging.hours)
    assert judging.cost.prompt_tokens == 3600 * 5000
    assert judging.cached_tokens == 3600 * 3000
    assert plan.stage("dispatch").hours == pytest.approx(3600 * 11 / capacity.REQUESTS_PER_SECOND / 3600)
    assert plan.stage("human review").hours == pytest.approx(1.5 / 4 * 24)  # two annotators, two hours per day
    assert plan.stage("human review").cost.cost_usd == pytest.approx(30.0)
    assert plan.stage("training").hours == pytest.approx(1.0)  # 1800 pairs at 2 x 0.25 per second
    assert plan.cost.cost_usd == pytest.approx(3 * (2 + 2 + 2) + 30)
    assert plan.gpu_hours == pytest.approx(6.0)
    small = plan.stage("ingest").hours + plan.stage("pairing").hours
    assert plan.machine_hours == pytest.approx(1.0 + 0.5 + 1.0 + small)
    assert [stage.name for stage in plan.bottlenecks()][:3] == ["human review", "sampling", "training"]


@pytest.mark.parametrize("times", [2, 10, 1000])
def test_all_figures_grow_in_proportion_to_the_prompts(times: int) -> None:
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
def test_more_resources_shorten_only_their_stage(field: str, value: Any, stage: str) -> None:
    before, after = capacity.plan_capacity(make_workload()), capacity.plan_capacity(make_workload(**{field: value}))
    assert after.stage(stage).hours < before.stage(stage).hours
    others = [other.name for other in before.stages if other.name not in (stage, "dispatch", "pairing", "ingest")]
    for other in others:
        assert after.stage(other).hours == before.stage(other).hours, other


def test_twice_the_gpus_need_half_the_time_at_the_same_cost() -> None:
    one, two = capacity.plan_capacity(make_workload()), capacity.plan_capacity(make_workload(policy=Throughput(4, 500)))
    assert two.stage("sampling").hours == pytest.approx(one.stage("sampling").hours / 2)
    assert two.cost.cost_usd == pytest.approx(one.cost.cost_usd)


def test_sampling_and_judging_are_not_faster_than_dispatch() -> None:
    slow = capacity.plan_capacity(make_workload(requests_per_second=1.0))
    assert slow.stage("dispatch").hours == pytest.approx(11.0)
    assert slow.machine_hours == pytest.approx(11.0 + 1.0 + slow.stage("ingest").hours + slow.stage("pairing").hours)
    by_records = capacity.plan_capacity(make_workload(records_per_second=1.0))
    assert by_records.stage("dispatch").hours == pytest.approx(15.0)


def test_a_quota_limits_labels_and_never_adds_any() -> None:
    assert capacity.plan_capacity(make_workload(max_reviews=50)).reviews == 50
    assert capacity.plan_capacity(make_workload(max_reviews=10**6)).reviews == 180
    assert capacity.plan_capacity(make_workload(max_reviews=0)).stage("human review").hours == 0


def test_a_run_that_exceeds_the_memory_needs_splitting() -> None:
    large = make_workload(prompts=10**8)
    need = 10**8 * capacity.MEMORY_BYTES_PER_PROMPT / 64e9
    assert 1 < need < 2
    assert capacity.plan_capacity(large).runs_needed == 2
    fits = capacity.plan_capacity(dataclasses.replace(large, runs=2))
    assert fits.memory_bytes <= 64e9
    assert fits.runs_needed == 2
    assert capacity.plan_capacity(make_workload()).runs_needed == 1


def test_an_endpoint_costs_dollars_and_no_gpu_hours() -> None:
    plan = capacity.plan_capacity(
        make_workload(judge=Throughput(0, None, 10.0), judging=StageLoad(10, 5000, 0, 10, 10, 0.01))
    )
    judging = plan.stage("judging")
    assert (judging.gpu_hours, judging.hours) == (0, pytest.approx(1.0))  # 36,000 requests at 10 per second
    assert judging.cost.cost_usd == pytest.approx(36.0)


# Without a pilot


def config(**judge: Any) -> Config:
    return Config.model_validate({"sampler": {"model": ["p"], "n": 4}, "judge": {"model": "j", **judge}})


def loads(config: Config, **given: Any) -> tuple[StageLoad, StageLoad, workload.PlanInputs]:
    planned, inputs = workload.build_workload(config, 10, {**RATES, **given}, None)
    return planned.sampling, planned.judging, inputs


def test_requests_follow_the_judge_files() -> None:
    sampling, judging, inputs = loads(config())
    assert (sampling.requests, sampling.records, sampling.completion_tokens) == (1, 4, 1200)
    assert judging.requests == pytest.approx(4 * 4 + 2 * 1.2)  # four aspects of four answers; 0.2 need another pair
    assert judging.records == judging.requests
    assert judging.completion_tokens == judging.requests  # one token per verdict
    # In addition to the rubric, a rating reads the prompt and one answer, a comparison the prompt and two.
    assert judging.prompt_tokens > 16 * 400 + 2.4 * 700
    assert inputs.sources["pairs_per_prompt"] == "assumed"
    assert inputs.sources["tokens_per_second"] == "given"


def test_the_cache_holds_the_rubric_and_the_text_that_aspects_share() -> None:
    _, rated, _ = loads(config(panel=["quality"]))
    # The first of four aspects finds the rubric in the cache; the other three find the prompt and the answer too.
    assert 0.6 < rated.cached_tokens / rated.prompt_tokens < 0.75
    _, compared, _ = loads(config(panel=["helpful"]))
    assert 0.2 < compared.cached_tokens / compared.prompt_tokens < 0.5  # the rubric and the prompt, not the answers
    _, longer, _ = loads(config(panel=["helpful"]), answer_tokens=3000)
    assert longer.cached_tokens == compared.cached_tokens
    assert longer.prompt_tokens == pytest.approx(compared.prompt_tokens + compared.requests * 2 * 2700)


def test_strategies_compare_different_pairs() -> None:
    _, all_pairs, _ = loads(config(panel=["helpful"]))
    assert all_pairs.requests == 6 * 2  # a comparing judge without a rating judge: round robin of four
    _, none, _ = loads(config(strategy="rate-only"))
    assert none.requests == 16


def test_a_paid_endpoint_needs_no_rate() -> None:
    paid = config(panel=["helpful"], model="gpt-4.1-mini", base_url="https://api.openai.com/v1")
    planned, _ = workload.build_workload(paid, 10, {"tokens_per_second": 1.0}, None)
    assert planned.judge.gpus == 0
    assert planned.judging.cost_usd is not None
    assert 0 < planned.judging.cost_usd < 0.1
    doubled, _ = workload.build_workload(paid, 10, {"tokens_per_second": 1.0, "answer_tokens": 600}, None)
    assert doubled.judging.cost_usd is not None
    assert doubled.judging.cost_usd > planned.judging.cost_usd


@pytest.mark.parametrize(("missing", "flag"), [(0, "--tokens-per-second"), (1, "--judge-tokens-per-second")])
def test_an_unknown_rate_is_an_error_that_names_the_flag(missing: int, flag: str) -> None:
    given = dict([item for index, item in enumerate(RATES.items()) if index != missing])
    with pytest.raises(UsageError) as raised:
        workload.build_workload(config(), 10, given, None)
    assert flag in str(raised.value)


@pytest.mark.parametrize("pairs_per_prompt", [0, 1, 2, 3, 20])
def test_comparisons_cover_all_kept_pairs(pairs_per_prompt: float) -> None:
    """A dropped pair is replaced by another one, and keeping more pairs needs more comparisons."""
    _, judging, _ = loads(config(panel=["helpful", "quality"]), pairs_per_prompt=pairs_per_prompt)
    assert judging.requests == pytest.approx(16 + 2 * max(pairs_per_prompt, 2 - pairs_per_prompt))


# With a pilot


def answer(body: dict[str, Any]) -> Any:
    if "structured_outputs" not in body:
        return echo(body)
    reply = judge_by(lambda text: len(text) % 10 / 10)(body)
    return reply | {
        "usage": {"prompt_tokens": 300, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 96}}
    }


@pytest.fixture
def pilot(tmp_path: Path, rlaif: Cli, serve: Callable[..., ScriptedServer]) -> Path:
    """Answer and judge twelve prompts with a scripted server."""
    run = tmp_path / "pilot"
    server = serve(answer)
    source = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": f"Number {i}, please say what {i * i} is."} for i in range(12)]
    )
    rlaif("generate", run, "--prompts", source, "-n", "3", "--model", "m", "--base-url", server.url,
          "--heldout-fraction", "0")  # fmt: skip
    rlaif("judge", run, "--judge", "helpful", "--judge", "quality", "--model", "m", "--base-url", server.url)
    return run


def test_a_plan_from_a_pilot_is_the_scaled_pilot(pilot: Path, rlaif: Cli) -> None:
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
    # The estimate of `rlaif run`, at the pilot's number of requests in flight.
    estimate = run_estimate.estimate_remaining(facts, 1200, {"generate": 0, "judge": 0}, concurrency=12)
    assert sampling["hours"] * 3600 == pytest.approx(estimate.generate.seconds, rel=1e-6)
    assert plan["bytes"] == pytest.approx(estimate.disk_bytes, rel=1e-6)
    routes = stages["judge"]["pairs"]["routes"]
    assert plan["pairs"] == pytest.approx(100 * sum(n for route, n in routes.items() if route != "dropped"))
    assert plan["sources"]["tokens_per_second"] == "measured"
    assert plan["sources"]["review_seconds"] == "assumed"


def test_given_values_override_measured_ones(pilot: Path) -> None:
    config = Config.model_validate(workload.config_of_run(Run(pilot)))
    assert (config.sampler.n, config.judge.model) == (3, "m")
    plain, _ = workload.build_workload(config, 10, {}, Run(pilot))
    two, _ = workload.build_workload(config, 10, {"pilot_gpus": 2}, Run(pilot))
    assert plain.policy.tokens_per_second is not None
    assert two.policy.tokens_per_second == pytest.approx(plain.policy.tokens_per_second / 2)
    longer, inputs = workload.build_workload(config, 10, {"answer_tokens": 500}, Run(pilot))
    assert longer.sampling.completion_tokens == 1500
    assert longer.policy == plain.policy
    assert inputs.sources["judging_tokens"] == "computed"


def test_other_models_need_their_own_rates_and_prices(pilot: Path, rlaif: Cli) -> None:
    """For other models the pilot provides the number of requests and the answer lengths, but no rate or price."""
    paid = ("--base-url", "https://api.openai.com/v1", "--model", "gpt-4.1-mini")
    judge = ("--judge-model", "gpt-4.1", "--set", "judge_base_url=https://api.openai.com/v1")
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
        assert "--judge-tokens-per-second" in stderr
    slow = ("--judge-tokens-per-second", "1000", "--json")
    plan = json.loads(rlaif("plan", "--prompts", "1200", "--from", pilot, "--judge-model", "another", *slow).stdout)
    assert plan["sources"]["tokens_per_second"] == "measured"
    assert plan["sources"]["judge_tokens_per_second"] == "given"


def test_a_run_without_requests_provides_no_rates(tmp_path: Path, rlaif: Cli) -> None:
    rlaif("init", tmp_path / "run")
    stderr = rlaif("plan", "--prompts", "10", "--from", tmp_path / "run", code=2).stderr
    assert "--tokens-per-second" in stderr
    rates = ("--tokens-per-second", "1000", "--judge-tokens-per-second", "1000")
    stdout = rlaif("plan", "--prompts", "10", "--from", tmp_path / "run", *rates).stdout
    assert "4 answers each by demo\njudged by helpful@demo, quality@demo" in stdout  # from its rlaif.toml
    assert "no such run" in rlaif("plan", "--prompts", "10", "--from", tmp_path / "none", code=1).stderr


# Text


@pytest.mark.parametrize(
    ("text", "number"),
    [("10", 10), ("10k", 10_000), ("1.5M", 1_500_000), ("100m", 10**8), ("1,000", 1000), ("2B", 2 * 10**9)],
)
def test_counts_may_have_a_suffix(text: str, number: int) -> None:
    assert parse_count("--prompts", text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "ten", "nan", "inf", "1e99"])
def test_invalid_counts_are_rejected_with_their_flag(text: str) -> None:
    with pytest.raises(UsageError, match=f"`--prompts` expects a number .*{text!r}"):
        parse_count("--prompts", text)


def test_settings_are_converted_and_checked() -> None:
    values = parse_settings(["runs=4", "memory-gb = 1.5", "strategy=rate-only"])
    assert values == {"runs": 4, "memory_gb": 1.5, "strategy": "rate-only"}
    assert isinstance(values["runs"], int)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("runs", "KEY=VALUE, got 'runs'"),
        ("runz=4", "(?s)'runz'.*Did you mean 'runs'"),
        ("gpus=4", "(?s)'gpus'.*--gpus 4"),
        ("runs=two", "runs.* an integer, got 'two'"),
        ("runs=1.5", "runs.* an integer, got '1.5'"),
        ("runs=0", "runs.* 1 or more, got '0'"),
        ("human_fraction=2", "human_fraction.* between 0 and 1, got '2'"),
        ("memory_gb=nan", "memory_gb.* got 'nan'"),
    ],
)
def test_invalid_settings_are_rejected(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_settings([assignment], flags=FLAGS)


def test_the_help_lists_every_setting(rlaif: Cli) -> None:
    stdout = rlaif("plan", "--help").stdout
    assert all(f"  {name} " in stdout for name in PLAN_SETTINGS)


@pytest.mark.parametrize("name", sorted(workload.DEFAULTS.keys() & PLAN_SETTINGS.keys()))
def test_the_help_of_a_setting_shows_its_default(name: str) -> None:
    assert re.search(rf"[ \[]{workload.DEFAULTS[name]:g}\]$", PLAN_SETTINGS[name].text)


def test_every_setting_reaches_the_plan(rlaif: Cli) -> None:
    values = {
        "prompt_tokens": 200, "answer_tokens": 400, "pairs_per_prompt": 0.5, "judge_gpus": 2, "train_gpus": 3,
        "train_pairs_per_second": 10, "human_fraction": 0.2, "review_seconds": 20, "hours_per_day": 3,
        "usd_per_annotator_hour": 20, "runs": 4, "memory_gb": 32, "requests_per_second": 900,
    }  # fmt: skip
    arguments = [text for name, value in values.items() for text in ("--set", f"{name}={value}")]
    rates = ("--tokens-per-second", "8000", "--judge-tokens-per-second", "20000")
    plan = json.loads(rlaif("plan", "--prompts", "10k", *rates, *arguments, "--json").stdout)
    given = {name for name, source in plan["sources"].items() if source == "given"}
    assert set(values) - {"human_fraction"} <= given
    assert plan["workload"]["human_fraction"] == 0.2
    assert plan["workload"]["runs"] == 4
    assert plan["workload"]["judge"]["gpus"] == 2


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, ""), (7, "7"), (9_996, "10.00k"), (999_999, "1,000k"), (1.2e9, "1.20B"), (1.25e12, "1.25T")],
)
def test_large_counts_are_short(number: float, text: str) -> None:
    assert format_large_count(number) == text


def test_the_output_names_the_first_bottleneck_and_a_remedy(rlaif: Cli) -> None:
    rates = ("--tokens-per-second", "8000", "--judge-tokens-per-second", "20000")
    stdout = rlaif("plan", "--prompts", "100M", "--gpus", "64", *rates).stdout
    assert "First bottleneck: human review" in stdout
    assert "split the prompts into 2 runs" in stdout
    stdout_with_quota = rlaif("plan", "--prompts", "100M", "--gpus", "64", "--max-reviews", "2000", *rates).stdout
    assert "First bottleneck: dispatch" in stdout_with_quota
    assert "--set runs=N" in stdout_with_quota
    assert "human_fraction = 2.5e-05" in stdout_with_quota
    split = rlaif(
        "plan", "--prompts", "100M", "--gpus", "64", "--max-reviews", "2000", "--set", "runs=16", *rates
    ).stdout
    assert "First bottleneck: judging" in split
    assert max(map(len, split.splitlines())) <= 120
