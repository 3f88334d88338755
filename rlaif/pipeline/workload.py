"""The figures of a plan and where each comes from: given, measured in a run, computed from judge files, or assumed.

A run that was begun (a pilot of some hundred prompts is enough) gives what its stages counted: requests, tokens, the
share read from the prefix cache, the rate of its servers by Little's law as in :mod:`rlaif.pipeline.outlook`, pairs
kept, bytes, seconds a review, pairs trained a second. Without one, requests to judges are rendered from the real judge
files over texts of the lengths given, at four characters a token, and the cache is what vLLM's is: the longest
beginning, in whole blocks, that an earlier request had.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif.config import Config
from rlaif.errors import UsageError
from rlaif.judge import ask as asking
from rlaif.llm.budget import is_local, price
from rlaif.pipeline.forecast import AROUND_A_TEXT, VERDICT_BYTES, Engine, Load, Workload
from rlaif.pipeline.outlook import asking_s, size
from rlaif.pipeline.plan import CHARS_PER_TOKEN, likely_mode
from rlaif.pipeline.rounds import panel, strategy
from rlaif.run.directory import Run
from rlaif.run.journal import read

BLOCK = 16
"""Tokens: vLLM caches whole blocks."""
REASONING_TOKENS = 200
"""Of a judge that writes before it decides, where none was measured."""
LENGTHS = {"prompt_tokens": 100.0, "answer_tokens": 300.0}
ASSUMED = {**LENGTHS, "kept": 0.8, "seconds_a_review": 30.0, "people": 2, "hours_a_day": 2.0, "gpus": 1,
           "memory_gb": 64.0}  # fmt: skip
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

    def any_given(self, *names: str) -> bool:
        return any(self.given.get(name) is not None for name in names)


def workload(config: Config, prompts: int, given: Mapping[str, Any], pilot: Run | None) -> tuple[Workload, Figures]:
    """``given``: figures by the names of :class:`Workload`, of ``ASSUMED``, and ``tokens_per_second``,
    ``judge_tokens_per_second``, ``judge_gpus``, ``train_gpus``; those of ``config`` that are given too (``n``,
    ``panel``). None is not given.

    Raises :class:`UsageError` where a rate is missing, saying how to give it.
    """
    figures = Figures(given, measured(pilot) if pilot else {})
    lengths = figures.any_given(*LENGTHS, "n")
    sampling, judging = figures.measured.get("sampling"), figures.measured.get("judging")
    kept = figures.of("kept")
    if sampling is None or lengths:
        sampling = _sampling(config, figures)
    else:
        figures.sources["sampling's tokens"] = "measured"
    if judging is None or lengths or figures.any_given("panel"):
        judging = _judging(config, figures, kept)
        figures.sources["judging's tokens"] = "computed from the judge files"
    else:
        figures.sources["judging's tokens"] = "measured"
    gpus = figures.of("gpus")
    policy = _engine("sampling", figures, "tokens_per_second", gpus, config, sampling)
    judge = _engine("judging", figures, "judge_tokens_per_second", figures.of("judge_gpus", gpus), config, judging)
    size_of = figures.measured.get("bytes_per_prompt")
    if size_of is None or lengths or figures.any_given("panel"):
        answers = sampling.records * (sampling.completion_tokens / max(1.0, sampling.records) * CHARS_PER_TOKEN + AROUND_A_TEXT)
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
        **{name: given[name] for name in GIVEN if given.get(name) is not None},
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
    n = config.sampler.n
    seats = panel(config)
    how = strategy(config, seats)
    prompt_chars, answer_chars = (int(figures.of(name)) * CHARS_PER_TOKEN for name in LENGTHS)
    compared = {"rate-only": 0.0, "round-robin": n * (n - 1) / 2}.get(how, 1.0 + (config.pairs.tries > 1) * (1 - kept))
    total = Load(0.0, 0.0, 0.0, 0.0, 0.0)
    for seat in seats:
        kind = seat.judge.file.kind
        if (kind, how) in (("rate", "round-robin"), ("compare", "rate-only")):
            continue
        times = compared / 1.0 if kind == "compare" else n
        mode = likely_mode(seat, config)
        texts, written = list[str](), 0
        for number in range(2):  # the second prompt finds the rubric in the cache
            prompt, answers = _made_up(number, prompt_chars, answer_chars)
            work = [asking.Material(0, 0, 1)] if kind == "compare" else [asking.Material(0, 0)]
            rendered = list(asking.requests(seat, mode, config, work, lambda _, p=prompt: p, answers.__getitem__))
            bodies = ["\n".join(str(turn["content"]) for turn in request.body["messages"]) for request in rendered]
            cached = [_cached(texts + bodies[:place], body) for place, body in enumerate(bodies)]
            texts += bodies
            written = sum(1 if mode != "json" else REASONING_TOKENS for _ in bodies)
        read_ = sum(len(body) for body in bodies) / CHARS_PER_TOKEN
        written = 0 if mode == "score" else written
        usd = _price(seat.entry.model, seat.entry.base_url, read_, sum(cached), written)
        one = Load(len(bodies), read_, sum(cached), written, len(bodies), usd)
        total = _plus(total, one, times)
    return total


def _plus(total: Load, one: Load, times: float) -> Load:
    usd = None if total.usd is None or one.usd is None else total.usd + times * one.usd
    return Load(total.requests + times * one.requests, total.prompt_tokens + times * one.prompt_tokens,
                total.cached_tokens + times * one.cached_tokens,
                total.completion_tokens + times * one.completion_tokens, total.records + times * one.records, usd)  # fmt: skip


def _made_up(number: int, prompt: int, answer: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A prompt record and two answers to it that have no beginning in common with each other or with other prompts'."""
    asked = {"prompt_id": "p", "messages": [{"role": "user", "content": _text(f"{number}p", prompt)}]}
    return asked, [{"key": side, "text": _text(f"{number}{side}", answer)} for side in "ab"]


def _text(begin: str, chars: int) -> str:
    return (begin + " word" * (chars // 5 + 1))[:chars]


def _cached(before: list[str], text: str) -> float:
    """Tokens of ``text`` that stand in the cache after ``before``."""
    longest = max((len(os.path.commonprefix((other, text))) for other in before), default=0)
    return float(longest // CHARS_PER_TOKEN // BLOCK * BLOCK)


def _price(model: str, urls: list[str], prompt: float, cached: float, completion: float) -> float | None:
    if not urls or is_local(urls[0]):
        return 0.0
    million = 1_000_000  # whole tokens are priced
    usd = price(model, urls[0], round(prompt * million), round(cached * million), round(completion * million))
    return None if usd is None else usd / million


# With one


def measured(run: Run) -> dict[str, Any]:
    """What ``run`` tells: as much of it as it has come to."""
    stages = run.manifest()["stages"]
    found: dict[str, Any] = {}
    answered, judged = _prompts(run, "completions"), _prompts(run, "verdicts")
    for stage, prompts, name, rate in (
        ("generate", answered, "sampling", "tokens_per_second"), ("judge", judged, "judging", "judge_tokens_per_second"),
    ):  # fmt: skip
        starts = [start for start in stages.get(stage, {}).get("history", []) if start.get("requests")]
        if not prompts or not starts:
            continue
        facts = {field: sum(start.get(field, 0) for start in starts) for field in starts[0] if field in SUMMED}
        found[name] = Load(facts["requests"] / prompts, facts["prompt_tokens"] / prompts,
                           facts["cached_tokens"] / prompts, facts["completion_tokens"] / prompts,
                           facts["answers"] / prompts, facts["usd"] / prompts)  # fmt: skip
        concurrency = stages[stage]["config"]["client"]["concurrency"]
        seconds = asking_s(facts, concurrency)
        counted = facts["completion_tokens"]
        if stage == "judge":
            counted += facts["prompt_tokens"] - facts["cached_tokens"]
        if seconds > 0:
            found[rate] = counted / seconds
        if stage == "generate":
            found["prompt_tokens"] = facts["prompt_tokens"] / facts["requests"]
            found["answer_tokens"] = facts["completion_tokens"] / max(1, facts["answers"])
    pairs = stages.get("judge", {}).get("pairs")
    if pairs and judged:
        found["kept"] = sum(count for route, count in pairs["routes"].items() if route != "dropped") / judged
        found["bytes_per_prompt"] = size(run) / judged
    seconds_each = [record["seconds"] for _, record in read(run.journal_path("reviews")) if record.get("seconds")]
    if seconds_each:
        found["seconds_a_review"] = statistics.median(seconds_each)
    return found | dict(_trained(run, stages.get("train", {})))


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
