"""Measure the throughput of the single writer: python -m benchmarks.writer [--records 50000] [--times 5]

A run has one process that sends requests and writes the journal, no matter how many servers reply. This benchmark
measures its limit with fake servers that reply at once and without a network. rlaif's own code renders the requests,
hashes their keys, parses the replies, writes the journal, and syncs it to disk as usual.

    journal    append records, one request at a time (four answers, or one verdict)
    sampling   everything that `rlaif generate` does, with four answers of about 300 tokens per request
    judging    everything that `rlaif judge` does: both orders and four aspects, with one verdict per request
    prompts    ingest prompts from a file: read it twice, hash keys, search near duplicates, journal

Each line has the median of the runs, with their minimum and maximum, per second of wall time and per second of CPU time
of the process. (Both are the same on an idle machine, except for waiting on the disk.) Records are as a run writes
them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson

from benchmarks.speed import print_machine
from rlaif.config.models import Config
from rlaif.generate import ingest, sampling
from rlaif.judge import runner
from rlaif.labeling.judging import load_panel
from rlaif.llm.chat_protocol import ChatChoice, ChatResponse
from rlaif.llm.usage import Usage, UsageMeter
from rlaif.records import Completion, Verdict
from rlaif.run.journal import JournalReader, iter_records
from rlaif.run.run import Run

ANSWER = "An answer of some three hundred tokens, as a model of eight billion parameters gives to a question. " * 12
PROMPT = "Question number {}: how does one go about it, what is to be minded, and what would {} say of it in the end? "
SAMPLES = 4


class FakeClient:
    """A client as :mod:`rlaif.llm.executor` uses it, which replies itself."""

    config, model, url, urls, limit = Config().client, "m", "none", ("none",), 256.0

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def check(self) -> str:
        return "vllm"

    async def chat(self, body: dict[str, Any], _path: str) -> ChatResponse:
        if "structured_outputs" not in body:
            return ChatResponse(
                [ChatChoice(ANSWER, None, "stop", None, None)] * body["n"], Usage(100, 0, 300 * body["n"])
            )
        words = body["structured_outputs"]["choice"]
        top = [{"token": word, "logprob": -0.7 - rank} for rank, word in enumerate(words)]
        logprobs = [{"token": words[0], "logprob": -0.7, "top_logprobs": top}]
        return ChatResponse([ChatChoice(words[0], None, "length", logprobs, None)], Usage(600, 256, 1))


FAKE_BACKENDS: Any = SimpleNamespace(client_for=lambda *_: FakeClient())


def make_config(source: Path) -> Config:
    return Config.model_validate({
        "prompts": {"sources": [str(source)], "heldout_fraction": 0}, "sampler": {"model": ["m"], "n": SAMPLES},
        "judge": {"model": "m"},
    })  # fmt: skip


def time_journal(folder: Path, count: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Yield the journal's measurements: label, number of records, and a function that appends parsed records."""
    run, keys = Run(folder), [f"{i:064x}" for i in range(count)]
    answers = [Completion(key=key, prompt_id=key[-16:], index=i % SAMPLES, model="m", text=ANSWER,
                          completion_tokens=300) for i, key in enumerate(keys)]  # fmt: skip
    verdicts = [
        Verdict(
            key=key,
            kind="rate",
            judge="quality",
            judge_hash=key[-16:],
            model="m",
            prompt_id=key[-16:],
            a=key,
            aspect="truthfulness",
            score=3.5,
            variance=0.4,
            verdict_mass=1.0,
            reply="4",
            prompt_tokens=600,
            cached_tokens=256,
            completion_tokens=1,
        )
        for key in keys
    ]

    def write(name: Any, records: list[Any], batch_size: int) -> None:
        with run.lock(), run.journal(name) as file:
            for first in range(0, count, batch_size):
                file.append(records[first : first + batch_size])

    yield "journal, four answers at a time", count, lambda: write("completions", answers, SAMPLES)
    yield "journal, one verdict at a time", count, lambda: write("verdicts", verdicts, 1)


def time_stages(folder: Path, count: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Yield the measurements of a run's stages, in their order."""
    run, source, prompts = Run(folder), folder / "source.jsonl", max(1, count // SAMPLES)
    prompts_per_judged = 3  # a judged prompt has 18 verdicts: 4 answers x 4 aspects, and both orders of a pair
    with source.open("wb") as file:
        for i in range(prompts):
            words = f"{i * 7919 % 10007} and {i * 104729 % 10009} and {i * 1299709 % 100003}"
            file.write(orjson.dumps({"prompt": PROMPT.format(i, words)}) + b"\n")
    config = make_config(source)

    def ingest_prompts() -> None:
        with run.lock():
            ingest.ingest_prompts(run, config, lambda _: None)

    def sample() -> None:
        with run.lock():
            sampling.sample(run, config, FAKE_BACKENDS, UsageMeter())

    def judge() -> None:
        answers: dict[str, list[int]] = {}
        for offset, record in iter_records(run.journal_path("completions")):
            answers.setdefault(record["prompt_id"], []).append(offset)
        inputs: dict[str, list[runner.JudgeInput]] = {"rate": [], "compare": []}
        num_judged = max(1, prompts // prompts_per_judged)
        for prompt, record in itertools.islice(iter_records(run.journal_path("prompts")), num_judged):
            first, second, *_ = own_answers = answers[record["prompt_id"]]
            inputs["rate"] += [runner.JudgeInput(prompt, answer) for answer in own_answers]
            inputs["compare"].append(runner.JudgeInput(prompt, first, second))
        readers = [JournalReader(run.journal_path(name)) for name in ("prompts", "completions")]
        with run.lock(), run.journal("verdicts") as file:
            for panel_judge in load_panel(config):
                runner.run_judge(
                    panel_judge,
                    config,
                    lambda kind=panel_judge.definition.file.kind: inputs[kind],
                    readers[0].read_at,
                    readers[1].read_at,
                    lambda: FakeClient(),
                    file,
                    UsageMeter(),
                    lambda _mode: None,
                )
        for reader in readers:
            reader.close()

    yield "prompts ingested", prompts, ingest_prompts
    yield "sampling, four answers per request", prompts * SAMPLES, sample
    yield "judging, one verdict per request", max(1, prompts // prompts_per_judged) * (SAMPLES * 4 + 2), judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50_000, help="records per run [default: 50000]")
    parser.add_argument("--times", type=int, default=5, help="number of runs [default: 5]")
    options = parser.parse_args()
    print_machine()
    rates: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, int] = {}
    for _ in range(options.times):
        for stage in (time_journal, time_stages):
            with tempfile.TemporaryDirectory() as folder:
                for name, count, call in stage(Path(folder), options.records):
                    start, cpu_start = time.monotonic(), time.process_time()
                    call()
                    rate = (count / (time.monotonic() - start), count / (time.process_time() - cpu_start))
                    rates.setdefault(name, []).append(rate)
                    counts[name] = count
    print(f"\n| {options.times} runs: median (min to max) | records per second | per second of CPU | records per run |")
    print("|---|---|---|---|")
    for name, measurements in rates.items():
        columns = zip(*measurements, strict=True)
        cells = [f"{statistics.median(row):,.0f} ({min(row):,.0f} to {max(row):,.0f})" for row in columns]
        print(f"| {name} | {' | '.join(cells)} | {counts[name]:,} |")


if __name__ == "__main__":
    main()
