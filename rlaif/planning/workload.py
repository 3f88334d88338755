"""The figures of a plan and the source of each: given, measured in a run, computed from judge files, or assumed.

An existing run (a pilot of a few hundred prompts is enough) provides what its stages counted: requests, tokens, the
fraction read from the prefix cache, the rate of its servers by Little's law as in :mod:`rlaif.planning.run_estimate`,
pairs kept, bytes, seconds per review, training pairs per second. Without a pilot, the requests to judges are rendered
from the real judge files over texts of the given lengths, at four characters per token. The prefix cache is modeled
like vLLM's: the longest common prefix with an earlier request, in whole blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif.config.models import Config
from rlaif.errors import UsageError
from rlaif.judge import runner
from rlaif.labeling.judging import load_panel, resolve_strategy
from rlaif.llm.dry_run import CHARS_PER_TOKEN, DryRun, add_requests
from rlaif.llm.pricing import is_local, request_cost
from rlaif.llm.request import Request
from rlaif.planning.capacity import RECORD_OVERHEAD_BYTES, VERDICT_BYTES, StageLoad, Throughput, Workload
from rlaif.planning.run_estimate import journal_bytes, request_seconds
from rlaif.planning.stage_plans import plan_generate, plan_judge
from rlaif.run.journal import RecordLookup, iter_records
from rlaif.run.run import Run

KV_BLOCK_TOKENS = 16
"""Tokens per block: vLLM caches whole blocks."""
VERDICT_TOKENS = {"score": 0, "choice": 1, "logprobs": 1, "json": 12}
"""Tokens of a verdict, by output mode."""
REASONING_TOKENS = 200
"""Tokens that a judge with reasoning writes before its verdict, if none were measured."""
DEFAULT_LENGTHS = {"prompt_tokens": 100.0, "answer_tokens": 300.0}
DEFAULTS = {
    **DEFAULT_LENGTHS,
    "pairs_per_prompt": 0.8,
    "review_seconds": 30.0,
    "annotators": 2,
    "hours_per_day": 2.0,
    "gpus": 1,
    "memory_gb": 64.0,
}
LOAD_FIELDS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "records")
OVERRIDABLE = (
    "max_reviews",
    "labels_per_pair",
    "usd_per_annotator_hour",
    "usd_per_gpu_hour",
    "runs",
    "requests_per_second",
)


@dataclass
class PlanInputs:
    """Values by name: a given value overrides a measured one, which overrides an assumed one.

    ``sources``: for each name that was read, the source of its value.
    """

    given: Mapping[str, Any]
    measured: Mapping[str, Any]
    sources: dict[str, str] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        for source, values in (("given", self.given), ("measured", self.measured), ("assumed", DEFAULTS)):
            if values.get(name) is not None:
                self.sources[name] = source
                return values[name]
        return default

    def display(self, name: str) -> str:
        """Return the value of ``name`` as text; empty if it is not a number."""
        value = next(
            (values[name] for values in (self.given, self.measured, DEFAULTS) if values.get(name) is not None), None
        )
        return f"{value:.0f}" if isinstance(value, int | float) and value >= 1000 else f"{value:.3g}" if value else ""

    def any_given(self, *names: str) -> bool:
        return any(self.given.get(name) is not None for name in names)


def build_workload(
    config: Config, prompts: int, given: Mapping[str, Any], pilot: Run | None
) -> tuple[Workload, PlanInputs]:
    """Combine given, measured and assumed figures.

    ``given``: figures by the names of :class:`Workload`, of ``DEFAULTS``, and ``tokens_per_second``,
    ``judge_tokens_per_second``, ``judge_gpus``, ``train_gpus``, ``pilot_gpus``; None means not given. ``n``, ``panel``,
    ``policy`` and ``judge`` say which settings of ``config`` differ from the pilot's: the number of answers, the
    judges, and the models or their endpoints.

    Raises :class:`UsageError` if a rate is neither given nor measured.
    """
    inputs = PlanInputs(given, measure_pilot(pilot, given.get("pilot_gpus") or 1) if pilot else {})
    # Neither the rate nor the price of another model or endpoint was measured.
    policy_given, judge_given = inputs.any_given("policy"), inputs.any_given("judge")
    unmeasured = ["tokens_per_second"] * policy_given + ["judge_tokens_per_second"] * judge_given
    inputs.measured = {name: value for name, value in inputs.measured.items() if name not in unmeasured}
    lengths_given, panel_given = inputs.any_given(*DEFAULT_LENGTHS, "n"), inputs.any_given("panel")
    sampling, judging = inputs.measured.get("sampling"), inputs.measured.get("judging")
    pairs_per_prompt = inputs.get("pairs_per_prompt")
    if sampling is None or lengths_given or policy_given:
        sampling = _sampling_load(config, inputs)
    else:
        inputs.sources["sampling_tokens"] = "measured"
    if judging is None or lengths_given or judge_given or panel_given:
        judging = _judging_load(config, inputs, pairs_per_prompt)
        inputs.sources["judging_tokens"] = "computed"
    else:
        inputs.sources["judging_tokens"] = "measured"
    gpus = inputs.get("gpus")
    policy = _throughput("sampling", inputs, "tokens_per_second", gpus, config, sampling)
    judge = _throughput("judging", inputs, "judge_tokens_per_second", inputs.get("judge_gpus", gpus), config, judging)
    bytes_per_prompt = inputs.measured.get("bytes_per_prompt")
    if bytes_per_prompt is None or lengths_given or panel_given:
        answer_bytes = sampling.completion_tokens * CHARS_PER_TOKEN + sampling.records * RECORD_OVERHEAD_BYTES
        bytes_per_prompt = answer_bytes + judging.records * VERDICT_BYTES
    extra_labels = config.review.extra_label_fraction if config.review.annotators else 0.0
    return Workload(
        prompts=prompts,
        sampling=sampling,
        judging=judging,
        policy=policy,
        judge=judge,
        pairs_per_prompt=pairs_per_prompt,
        bytes_per_prompt=bytes_per_prompt,
        human_fraction=config.pairs.human_fraction,
        labels_per_pair=config.review.labels_per_pair + extra_labels,
        epochs=config.train.epochs,
        train_gpus=inputs.get("train_gpus", gpus),
        train_pairs_per_second=inputs.get("train_pairs_per_second"),
        **{name: inputs.get(name) for name in ("review_seconds", "annotators", "hours_per_day", "memory_gb")},
        **{name: inputs.get(name) for name in OVERRIDABLE if given.get(name) is not None},
    ), inputs


def _throughput(stage: str, inputs: PlanInputs, rate: str, gpus: int, config: Config, load: StageLoad) -> Throughput:
    limit = config.client.requests_per_minute
    if load.cost_usd:  # a paid endpoint
        return Throughput(0, None, limit / 60 if limit else None)
    flag = rate.replace("_", "-")
    tokens = inputs.get(rate)
    if tokens is None and load.requests:
        unit = "answer tokens" if stage == "sampling" else "uncached tokens read and tokens written"
        raise UsageError(
            f"the rate of {stage} is unknown",
            hint=f"Give `--{flag} N` ({unit} per second per GPU at full load), or a pilot with `--from RUN`.",
        )
    return Throughput(gpus, tokens)


def config_of_run(pilot: Run) -> dict[str, Any]:
    """Return the settings of ``pilot`` that determine its requests, flags included."""
    stages, values = pilot.manifest()["stages"], dict[str, Any]()
    for stage, names in (("generate", ("sampler", "policies")), ("judge", ("judge", "panel", "pairs"))):
        config = stages.get(stage, {}).get("config", {})
        values |= {name: config[name] for name in names if name in config}
    return values


# Without a pilot


def _sampling_load(config: Config, inputs: PlanInputs) -> StageLoad:
    """Return the load of sampling: one request per prompt and model brings all of its samples."""
    n, requests = config.sampler.n, min(len(config.policies_resolved()), config.sampler.n)
    tokens, answer = inputs.get("prompt_tokens"), inputs.get("answer_tokens")
    prices = [
        _price(policy.model, policy.base_url, requests * tokens, 0, n * answer) for policy in config.policies_resolved()
    ]
    known_prices = [value for value in prices if value is not None]
    return StageLoad(
        requests,
        requests * tokens,
        0.0,
        n * answer,
        n,
        sum(known_prices) / len(prices) if len(known_prices) == len(prices) else None,
    )


def _judging_load(config: Config, inputs: PlanInputs, pairs_per_prompt: float) -> StageLoad:
    """Return the load of all judges for one prompt, with requests rendered over synthetic texts of these lengths."""
    strategy, n = resolve_strategy(config, load_panel(config)), config.sampler.n
    max_candidates = config.pairs.max_candidates_per_prompt
    lengths = [int(inputs.get(name)) * CHARS_PER_TOKEN for name in DEFAULT_LENGTHS]
    comparisons = (
        n * (n - 1) / 2
        if strategy == "round-robin"
        else max(pairs_per_prompt, 1.0 + (max_candidates > 1) * max(0.0, 1.0 - pairs_per_prompt))
    )
    total = StageLoad(0.0, 0.0, 0.0, 0.0, 0.0)
    for panel_judge, mode, times in _judge_requests_per_prompt(config, comparisons):
        reply_tokens = VERDICT_TOKENS[mode] + (
            REASONING_TOKENS if panel_judge.definition.file.reasoning == "first" else 0
        )
        texts = list[str]()
        for prompt_index in range(2):  # for the second prompt, the rubric is cached
            rendered = _render_requests(panel_judge, mode, config, prompt_index, *lengths)
            bodies = ["\n".join(str(turn["content"]) for turn in request.body["messages"]) for request in rendered]
            cached = [_cached_tokens(texts + bodies[:index], body) for index, body in enumerate(bodies)]
            texts += bodies
        prompt_tokens = sum(len(body) for body in bodies) / CHARS_PER_TOKEN
        usd = _price(
            panel_judge.member_config.model,
            panel_judge.member_config.base_url,
            prompt_tokens,
            sum(cached),
            reply_tokens * len(bodies),
        )
        load = StageLoad(len(bodies), prompt_tokens, sum(cached), reply_tokens * len(bodies), len(bodies), usd)
        total = _add(total, load, times)
    return total


def _judge_requests_per_prompt(config: Config, comparisons: float) -> Iterator[tuple[runner.PanelJudge, Any, float]]:
    """Yield each judge that is asked, its output mode, and the number of its answers or pairs per prompt.

    ``comparisons``: the number of pairs compared per prompt.
    """
    panel = load_panel(config)
    strategy = resolve_strategy(config, panel)
    for panel_judge in panel:
        kind = panel_judge.definition.file.kind
        if (kind, strategy) not in (("rate", "round-robin"), ("compare", "rate-only")):
            yield (
                panel_judge,
                runner.expected_output_mode(panel_judge, config),
                comparisons if kind == "compare" else config.sampler.n,
            )


def _render_requests(
    panel_judge: runner.PanelJudge, mode: Any, config: Config, prompt_index: int, prompt_chars: int, answer_chars: int
) -> list[Request]:
    """Return the requests about one answer or one pair. Lengths are in characters."""
    record, answers = _fake_records(prompt_index, prompt_chars, answer_chars)
    work = [runner.JudgeInput(0, 0, 1)] if panel_judge.definition.file.kind == "compare" else [runner.JudgeInput(0, 0)]
    return list(runner.judge_requests(panel_judge, mode, config, work, _constant(record), answers.__getitem__))


def plan_run(run: Run, config: Config) -> DryRun:
    """Return the dry run of ``rlaif run``: generate and judge. Assumes that missing answers have the maximum length and
    that every candidate pair is compared."""
    if not (config.policies or config.sampler.model) and run.journal_path("completions").exists():
        return plan_judge(run, config)
    plan = plan_generate(run, config)
    n, prompts, calls = config.sampler.n, plan.prompts, max(1, plan.calls)
    lengths = plan.prompt_tokens // calls * CHARS_PER_TOKEN, config.sampler.max_tokens * CHARS_PER_TOKEN
    if run.journal_path("completions").exists():
        plan = plan.combined_with(plan_judge(run, config), 1)
    if not prompts:
        return plan
    pairs = n * (n - 1) // 2
    if resolve_strategy(config, load_panel(config)) != "round-robin":
        pairs = min(config.pairs.max_candidates_per_prompt, pairs)
    for panel_judge, mode, times in _judge_requests_per_prompt(config, pairs):
        single = DryRun(None, 0, 0, 0, 0.0, at_most=True)
        add_requests(
            single,
            _render_requests(panel_judge, mode, config, 0, *lengths),
            panel_judge.member_config.model,
            panel_judge.member_config.base_url,
            config.judge.max_tokens,
        )
        plan = plan.combined_with(single, round(times) * min(prompts, config.judge.limit or prompts))
    return plan


def _add(total: StageLoad, load: StageLoad, times: float) -> StageLoad:
    """Return ``total`` plus ``times`` ``load``. The cost is unknown if either cost is."""
    counts = {name: getattr(total, name) + times * getattr(load, name) for name in LOAD_FIELDS}
    return StageLoad(
        **counts,
        cost_usd=None if total.cost_usd is None or load.cost_usd is None else total.cost_usd + times * load.cost_usd,
    )


def _constant(record: dict[str, Any]) -> RecordLookup:
    return lambda _: record


def _fake_records(
    prompt_index: int, prompt_chars: int, answer_chars: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a prompt record and two answers. Their texts share no prefix with each other or with other prompts."""
    prompt_record = {
        "prompt_id": "p",
        "messages": [{"role": "user", "content": _text(f"{prompt_index}p", prompt_chars)}],
    }
    return prompt_record, [{"key": side, "text": _text(f"{prompt_index}{side}", answer_chars)} for side in "ab"]


def _text(prefix: str, chars: int) -> str:
    return (prefix + " word" * (chars // 5 + 1))[:chars]


def _cached_tokens(earlier_texts: list[str], text: str) -> float:
    """Return the number of tokens of ``text`` that are cached after ``earlier_texts``."""
    longest = max((_common_prefix_length(earlier, text) for earlier in earlier_texts), default=0)
    return float(longest // CHARS_PER_TOKEN // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS)


def _common_prefix_length(first: str, second: str) -> int:
    """Return the number of characters before the first difference."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _price(model: str, urls: list[str], prompt: float, cached: float, completion: float) -> float | None:
    if not urls or is_local(urls[0]):
        return 0.0
    million = 1_000_000  # prices are per whole token, and these are fractions
    usd = request_cost(model, urls[0], round(prompt * million), round(cached * million), round(completion * million))
    return None if usd is None else usd / million


# With a pilot


def measure_pilot(run: Run, gpus: int = 1) -> dict[str, Any]:
    """Return the figures that ``run`` measured so far, by name. ``gpus``: number of GPUs that each of its models had;
    rates are per GPU."""
    stages = run.manifest()["stages"]
    figures: dict[str, Any] = {}
    answered_prompts, judged_prompts = _prompt_count(run, "completions"), _prompt_count(run, "verdicts")
    judgeable_fraction = (
        _judgeable_prompts(run) / answered_prompts if answered_prompts else 1.0
    )  # other prompts have answers that are truncated or all identical
    if totals := _stage_totals(stages.get("generate", {})):
        figures["sampling"] = _stage_load(totals, 1.0 / answered_prompts)
        figures["tokens_per_second"] = totals["completion_tokens"] / totals["request_wall_s"] / gpus or None
        figures["prompt_tokens"] = totals["prompt_tokens"] / totals["requests"]
        figures["answer_tokens"] = totals["completion_tokens"] / max(1, totals["answers"])
    if (totals := _stage_totals(stages.get("judge", {}))) and judged_prompts:
        figures["judging"] = _stage_load(totals, judgeable_fraction / judged_prompts)
        computed_tokens = totals["prompt_tokens"] - totals["cached_tokens"] + totals["completion_tokens"]
        figures["judge_tokens_per_second"] = computed_tokens / totals["request_wall_s"] / gpus or None
    pairs = stages.get("judge", {}).get("pairs")
    if pairs and judged_prompts:
        figures["pairs_per_prompt"] = (
            sum(count for route, count in pairs["routes"].items() if route != "dropped")
            * judgeable_fraction
            / judged_prompts
        )
        figures["bytes_per_prompt"] = journal_bytes(run) / max(answered_prompts, judged_prompts)
    review_seconds = [
        record["seconds"] for _, record in iter_records(run.journal_path("reviews")) if record.get("seconds")
    ]
    if review_seconds:
        figures["review_seconds"] = statistics.median(review_seconds)
    return figures | {name: rate / gpus for name, rate in _training_rate(run, stages.get("train", {}))}


def _stage_totals(stage: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the counters of all starts of ``stage``, and the seconds at its concurrency (``request_wall_s``). None if
    no request was sent."""
    starts = [start for start in stage.get("history", []) if start.get("requests")]
    totals = {name: sum(start.get(name, 0) for start in starts) for name in USAGE_FIELDS}
    if not totals["request_wait_s"]:
        return None
    return totals | {"request_wall_s": request_seconds(totals, stage["config"]["client"]["concurrency"])}


def _stage_load(totals: Mapping[str, float], scale: float) -> StageLoad:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "answers", "cost_usd")
    return StageLoad(*(totals[name] * scale for name in names))


def _judgeable_prompts(run: Run) -> int:
    """Return the number of prompts with at least two usable answers."""
    from rlaif.pair import candidates
    from rlaif.run import frames

    answers, _ = candidates.drop_unusable(
        frames.read_journal_frame(run.journal_path("completions"), frames.COMPLETIONS, candidates.summarize_texts)
    )
    return answers.filter(answers["prompt_id"].is_duplicated())["prompt_id"].n_unique()


USAGE_FIELDS = (
    "requests",
    "answers",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "cost_usd",
    "request_wait_s",
)


def _prompt_count(run: Run, journal: Any) -> int:
    """Return the number of prompts with records from models. Imported and rule-based records cost nothing."""
    return len({record["prompt_id"] for _, record in iter_records(run.journal_path(journal))
                if "error" not in record and record.get("model") and record.get("source") != "imported"})  # fmt: skip


def _training_rate(run: Run, stage: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    from rlaif.train import artifacts

    train_config = stage.get("config", {}).get("train", {})
    result = artifacts.load_result(Path(train_config["output"]) if train_config.get("output") else run.model)
    if result is None or result.seconds <= 0 or not train_config:
        return
    steps = result.steps - (result.resumed_from or 0)
    yield "train_pairs_per_second", steps * train_config["batch_size"] / result.seconds
