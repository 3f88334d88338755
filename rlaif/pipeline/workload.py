"""The figures of a plan and where each comes from: given, measured in a run, computed from judge files, or assumed.

A run that was begun (a pilot of some hundred prompts is enough) gives what its stages counted: requests, tokens, the
share read from the prefix cache, the rate of its servers by Little's law as in :mod:`rlaif.pipeline.outlook`, pairs
kept, bytes, seconds a review, pairs trained a second. Without one, requests to judges are rendered from the real judge
files over texts of the lengths given, at four characters a token, and the cache is what vLLM's is: the longest
beginning, in whole blocks, that an earlier request had.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.judge import ask as asking
from rlaif.llm.budget import is_local, price
from rlaif.llm.request import Request
from rlaif.pipeline.forecast import AROUND_A_TEXT, VERDICT_BYTES, Engine, Load, Workload
from rlaif.pipeline.outlook import asking_s, size
from rlaif.pipeline.plan import CHARS_PER_TOKEN, Plan, add, likely_mode, plan_generate, plan_judge
from rlaif.pipeline.rounds import panel, strategy
from rlaif.run.directory import Run
from rlaif.run.journal import read

BLOCK = 16
"""Tokens: vLLM caches whole blocks."""
WRITTEN = {"score": 0, "choice": 1, "logprobs": 1, "json": 12}
"""Tokens of a verdict by how it is asked."""
REASONING_TOKENS = 200
"""Of a judge that writes before it decides, where none was measured."""
LENGTHS = {"prompt_tokens": 100.0, "answer_tokens": 300.0}
ASSUMED = {**LENGTHS, "kept": 0.8, "seconds_a_review": 30.0, "people": 2, "hours_a_day": 2.0, "gpus": 1,
           "memory_gb": 64.0}  # fmt: skip
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "records")
GIVEN = ("reviews", "labels_a_pair", "usd_per_person_hour", "usd_per_gpu_hour", "runs", "requests_per_second")


@dataclass
class Figures:
    """Values by name, given over measured over assumed. ``sources``: for each name that was asked for, which it was."""

    given: Mapping[str, Any]
    measured: Mapping[str, Any]
    sources: dict[str, str] = field(default_factory=dict)

    def of(self, name: str, default: Any = None) -> Any:
        for source, known in (("given", self.given), ("measured", self.measured), ("assumed", ASSUMED)):
            if known.get(name) is not None:
                self.sources[name] = source
                return known[name]
        return default

    def told(self, name: str) -> str:
        """The value of ``name`` for a person, or nothing where it is more than a number."""
        value = next(
            (known[name] for known in (self.given, self.measured, ASSUMED) if known.get(name) is not None), None
        )
        return f"{value:,.0f}" if isinstance(value, int | float) and value >= 1000 else f"{value:.3g}" if value else ""

    def any_given(self, *names: str) -> bool:
        return any(self.given.get(name) is not None for name in names)


def workload(config: Config, prompts: int, given: Mapping[str, Any], pilot: Run | None) -> tuple[Workload, Figures]:
    """``given``: figures by the names of :class:`Workload`, of ``ASSUMED``, and ``tokens_per_second``,
    ``judge_tokens_per_second``, ``judge_gpus``, ``train_gpus``; those of ``config`` that are given too (``n``,
    ``panel``, and ``policy`` and ``judge`` for the models or where they are). None is not given.

    Raises :class:`UsageError` where a rate is missing, saying how to give it.
    """
    figures = Figures(given, measured(pilot, given.get("pilot_gpus") or 1) if pilot else {})
    # Another model or endpoint has not been measured: neither its rate nor its price.
    policy_given, judge_given = figures.any_given("policy"), figures.any_given("judge")
    unknown = ["tokens_per_second"] * policy_given + ["judge_tokens_per_second"] * judge_given
    figures.measured = {name: value for name, value in figures.measured.items() if name not in unknown}
    lengths = figures.any_given(*LENGTHS, "n")
    sampling, judging = figures.measured.get("sampling"), figures.measured.get("judging")
    kept = figures.of("kept")
    if sampling is None or lengths or policy_given:
        sampling = _sampling(config, figures)
    else:
        figures.sources["sampling's tokens"] = "measured"
    if judging is None or lengths or judge_given or figures.any_given("panel"):
        judging = _judging(config, figures, kept)
        figures.sources["judging's tokens"] = "computed"
    else:
        figures.sources["judging's tokens"] = "measured"
    gpus = figures.of("gpus")
    policy = _engine("sampling", figures, "tokens_per_second", gpus, config, sampling)
    judge = _engine("judging", figures, "judge_tokens_per_second", figures.of("judge_gpus", gpus), config, judging)
    size_of = figures.measured.get("bytes_per_prompt")
    if size_of is None or lengths or figures.any_given("panel"):
        answers = sampling.records * (
            sampling.completion_tokens / max(1.0, sampling.records) * CHARS_PER_TOKEN + AROUND_A_TEXT
        )
        size_of = answers + judging.records * VERDICT_BYTES
    more = config.review.overlap if config.review.annotators else 0.0
    return Workload(
        prompts=prompts,
        sampling=sampling,
        judging=judging,
        policy=policy,
        judge=judge,
        kept=kept,
        bytes_per_prompt=size_of,
        human_share=config.pairs.human_share,
        labels_a_pair=config.review.labels + more,
        epochs=config.train.epochs,
        train_gpus=figures.of("train_gpus", gpus),
        train_pairs_per_second=figures.of("train_pairs_per_second"),
        **{name: figures.of(name) for name in ("seconds_a_review", "people", "hours_a_day", "memory_gb")},
        **{name: figures.of(name) for name in GIVEN if given.get(name) is not None},
    ), figures


def _engine(stage: str, figures: Figures, rate: str, gpus: int, config: Config, load: Load) -> Engine:
    limit = config.client.requests_per_minute
    if load.usd:  # an endpoint with a price
        return Engine(0, None, limit / 60 if limit else None)
    flag = rate.replace("_", "-")
    tokens = figures.of(rate)
    if tokens is None and load.requests:
        counts = "answer tokens" if stage == "sampling" else "tokens read (without the prefix cache) and written"
        raise UsageError(
            f"how fast {stage} goes is not known",
            mend=f"Give --from RUN, where RUN is a pilot that has come so far, or --{flag} N: {counts} a second that "
            "one GPU gives under full load.",
        )
    return Engine(gpus, tokens)


def as_run(pilot: Run) -> dict[str, Any]:
    """The settings that decide what is asked, as ``pilot`` was run with them, flags included."""
    stages, values = pilot.manifest()["stages"], dict[str, Any]()
    for stage, names in (("generate", ("sampler", "policies")), ("judge", ("judge", "judges", "pairs"))):
        config = stages.get(stage, {}).get("config", {})
        values |= {name: config[name] for name in names if name in config}
    return values


# Without a pilot


def _sampling(config: Config, figures: Figures) -> Load:
    """One request a prompt and model brings all samples that it owes."""
    n, asked = config.sampler.n, min(len(config.pool()), config.sampler.n)
    tokens, answer = figures.of("prompt_tokens"), figures.of("answer_tokens")
    usd = [_price(policy.model, policy.base_url, asked * tokens, 0, n * answer) for policy in config.pool()]
    known = [each for each in usd if each is not None]
    return Load(asked, asked * tokens, 0.0, n * answer, n, sum(known) / len(usd) if len(known) == len(usd) else None)


def _judging(config: Config, figures: Figures, kept: float) -> Load:
    """Every seat's requests for one prompt, rendered over made-up texts of the right lengths."""
    how, n, tries = strategy(config, panel(config)), config.sampler.n, config.pairs.tries
    lengths = [int(figures.of(name)) * CHARS_PER_TOKEN for name in LENGTHS]
    compared = n * (n - 1) / 2 if how == "round-robin" else max(kept, 1.0 + (tries > 1) * max(0.0, 1.0 - kept))
    total = Load(0.0, 0.0, 0.0, 0.0, 0.0)
    for seat, mode, times in _asked(config, compared):
        written = WRITTEN[mode] + (REASONING_TOKENS if seat.judge.file.reasoning == "first" else 0)
        texts = list[str]()
        for number in range(2):  # the second prompt finds the rubric in the cache
            rendered = _rendered(seat, mode, config, number, *lengths)
            bodies = ["\n".join(str(turn["content"]) for turn in request.body["messages"]) for request in rendered]
            cached = [_cached(texts + bodies[:place], body) for place, body in enumerate(bodies)]
            texts += bodies
        read_ = sum(len(body) for body in bodies) / CHARS_PER_TOKEN
        usd = _price(seat.entry.model, seat.entry.base_url, read_, sum(cached), written * len(bodies))
        one = Load(len(bodies), read_, sum(cached), written * len(bodies), len(bodies), usd)
        total = _plus(total, one, times)
    return total


def _asked(config: Config, compared: float) -> Iterator[tuple[asking.Seat, Any, float]]:
    """Each seat that is asked, how, and about how many answers or pairs of a prompt of which so many are compared."""
    seats = panel(config)
    how = strategy(config, seats)
    for seat in seats:
        kind = seat.judge.file.kind
        if (kind, how) not in (("rate", "round-robin"), ("compare", "rate-only")):
            yield seat, likely_mode(seat, config), compared if kind == "compare" else config.sampler.n


def _rendered(seat: asking.Seat, mode: Any, config: Config, number: int, prompt: int, answer: int) -> list[Request]:
    """The requests about one answer, or one pair, of so many characters."""
    record, answers = _made_up(number, prompt, answer)
    work = [asking.Material(0, 0, 1)] if seat.judge.file.kind == "compare" else [asking.Material(0, 0)]
    return list(asking.requests(seat, mode, config, work, _always(record), answers.__getitem__))


def plan_night(run: Run, config: Config) -> Plan:
    """What ``rlaif run`` would ask to generate and to judge. Answers that are not there yet are taken to be as long as
    is allowed, and every pair that may be compared is."""
    if not (config.policies or config.sampler.model) and run.journal_path("completions").exists():
        return plan_judge(run, config)
    plan = plan_generate(run, config)
    n, prompts, asked = config.sampler.n, plan.prompts, max(1, plan.calls)
    lengths = plan.prompt_tokens // asked * CHARS_PER_TOKEN, config.sampler.max_tokens * CHARS_PER_TOKEN
    if run.journal_path("completions").exists():
        plan = plan.plus(plan_judge(run, config), 1)
    if not prompts:
        return plan
    pairs = n * (n - 1) // 2
    if strategy(config, panel(config)) != "round-robin":
        pairs = min(config.pairs.tries, pairs)
    for seat, mode, times in _asked(config, pairs):
        one = Plan(None, 0, 0, 0, 0.0, at_most=True)
        add(one, _rendered(seat, mode, config, 0, *lengths), seat.entry.model, seat.entry.base_url,
            config.judge.max_tokens)  # fmt: skip
        plan = plan.plus(one, round(times) * min(prompts, config.judge.limit or prompts))
    return plan


def _plus(total: Load, one: Load, times: float) -> Load:
    """``total`` and ``times`` the figures of ``one``; dollars are unknown where either's are."""
    counts = {name: getattr(total, name) + times * getattr(one, name) for name in COUNTS}
    return Load(**counts, usd=None if total.usd is None or one.usd is None else total.usd + times * one.usd)


def _always(record: dict[str, Any]) -> asking.Fetch:
    return lambda _: record


def _made_up(number: int, prompt: int, answer: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A prompt record and two answers to it that have no beginning in common with each other or with other prompts'."""
    asked = {"prompt_id": "p", "messages": [{"role": "user", "content": _text(f"{number}p", prompt)}]}
    return asked, [{"key": side, "text": _text(f"{number}{side}", answer)} for side in "ab"]


def _text(begin: str, chars: int) -> str:
    return (begin + " word" * (chars // 5 + 1))[:chars]


def _cached(before: list[str], text: str) -> float:
    """Tokens of ``text`` that stand in the cache after ``before``."""
    longest = max((_common(other, text) for other in before), default=0)
    return float(longest // CHARS_PER_TOKEN // BLOCK * BLOCK)


def _common(one: str, other: str) -> int:
    """Characters until the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _price(model: str, urls: list[str], prompt: float, cached: float, completion: float) -> float | None:
    if not urls or is_local(urls[0]):
        return 0.0
    million = 1_000_000  # whole tokens are priced
    usd = price(model, urls[0], round(prompt * million), round(cached * million), round(completion * million))
    return None if usd is None else usd / million


# With one


def measured(run: Run, gpus: int = 1) -> dict[str, Any]:
    """What ``run``, whose models had ``gpus``, tells: as much of it as it has come to. Rates are of one GPU."""
    stages = run.manifest()["stages"]
    found: dict[str, Any] = {}
    answered, judged = _prompts(run, "completions"), _prompts(run, "verdicts")
    able = _judgeable(run) / answered if answered else 1.0  # the others' answers were cut off, or are all the same
    if facts := _facts(stages.get("generate", {})):
        found["sampling"] = _load(facts, 1.0 / answered)
        found["tokens_per_second"] = facts["completion_tokens"] / facts["asking_s"] / gpus or None
        found["prompt_tokens"] = facts["prompt_tokens"] / facts["requests"]
        found["answer_tokens"] = facts["completion_tokens"] / max(1, facts["answers"])
    if (facts := _facts(stages.get("judge", {}))) and judged:
        found["judging"] = _load(facts, able / judged)
        counted = facts["prompt_tokens"] - facts["cached_tokens"] + facts["completion_tokens"]
        found["judge_tokens_per_second"] = counted / facts["asking_s"] / gpus or None
    pairs = stages.get("judge", {}).get("pairs")
    if pairs and judged:
        found["kept"] = sum(count for route, count in pairs["routes"].items() if route != "dropped") * able / judged
        found["bytes_per_prompt"] = size(run) / max(answered, judged)
    seconds_each = [record["seconds"] for _, record in read(run.journal_path("reviews")) if record.get("seconds")]
    if seconds_each:
        found["seconds_a_review"] = statistics.median(seconds_each)
    return found | {name: rate / gpus for name, rate in _trained(run, stages.get("train", {}))}


def _facts(stage: Mapping[str, Any]) -> dict[str, float] | None:
    """What all starts of ``stage`` counted, and the seconds that it takes with as many requests in flight as it had
    (``asking_s``). None where nothing was asked."""
    starts = [start for start in stage.get("history", []) if start.get("requests")]
    facts = {name: sum(start.get(name, 0) for start in starts) for name in SUMMED}
    if not facts["waited_s"]:
        return None
    return facts | {"asking_s": asking_s(facts, stage["config"]["client"]["concurrency"])}


def _load(facts: Mapping[str, float], share: float) -> Load:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "answers", "usd")
    return Load(*(facts[name] * share for name in names))


def _judgeable(run: Run) -> int:
    """Prompts with two usable answers or more."""
    from rlaif.pair import select
    from rlaif.run import tables

    answers, _ = select.usable(tables.scan(run.journal_path("completions"), tables.COMPLETIONS, select.shorten))
    return answers.filter(answers["prompt_id"].is_duplicated())["prompt_id"].n_unique()


SUMMED = ("requests", "answers", "prompt_tokens", "cached_tokens", "completion_tokens", "usd", "waited_s")


def _prompts(run: Run, journal: Any) -> int:
    """How many prompts models were asked about. What was imported, and what no model said, cost nothing."""
    return len({record["prompt_id"] for _, record in read(run.journal_path(journal))
                if "error" not in record and record.get("model") and record.get("source") != "imported"})  # fmt: skip


def _trained(run: Run, stage: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    from rlaif.train import writing

    wanted = stage.get("config", {}).get("train", {})
    result = writing.stored(Path(wanted["output"]) if wanted.get("output") else run.model)
    if result is None or result.seconds <= 0 or not wanted:
        return
    steps = result.steps - (result.resumed_from or 0)
    yield "train_pairs_per_second", steps * wanted["batch_size"] / result.seconds
