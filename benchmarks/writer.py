"""The single writer's ceiling: python -m benchmarks.writer [--records 50000] [--times 5]

A run has one process that asks and journals, however many servers answer. What it can take is measured with servers
that cost nothing: replies come at once, without a network. Requests are rendered, keyed, asked, read and journaled by
the product's own code, and synced to the disk as always.

    journal    records appended as they come: one request's at a time (four answers, or one verdict)
    sampling   the whole way of generate, four answers of about 300 tokens a request
    judging    the whole way of judge: both orders and four aspects, one verdict a request
    prompts    prompts taken in from a file: read twice, keyed, near duplicates looked for, journaled

Every line has the median of the runs with the least and the most, by the clock and by the seconds of CPU that the
process got (the same on a quiet machine, but for waiting on the disk); records are as a real run writes them.
"""

from __future__ import annotations

import argparse
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
from rlaif.generate import ingest as taking
from rlaif.generate import sampling
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
    """What :mod:`rlaif.llm.executor` knows of a client, with nobody behind it."""

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
    """The records alone: as they stand when a reply has been read."""
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

    yield "journal, answers by four", count, lambda: write("completions", answers, SAMPLES)
    yield "journal, verdicts one by one", count, lambda: write("verdicts", verdicts, 1)


def time_stages(folder: Path, count: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Prompts, answers and verdicts of one run, by the stages' own functions."""
    run, source, prompts = Run(folder), folder / "source.jsonl", max(1, count // SAMPLES)
    prompts_per_judged = 3  # judging: 4 answers x 4 aspects and both orders of a pair make 18 verdicts a prompt
    with source.open("wb") as file:
        for i in range(prompts):
            words = f"{i * 7919 % 10007} and {i * 104729 % 10009} and {i * 1299709 % 100003}"
            file.write(orjson.dumps({"prompt": PROMPT.format(i, words)}) + b"\n")
    config = make_config(source)

    def ingest() -> None:
        with run.lock():
            taking.ingest_prompts(run, config, lambda _: None)

    def sample() -> None:
        with run.lock():
            sampling.sample(run, config, FAKE_BACKENDS, UsageMeter())

    def judge() -> None:
        answers: dict[str, list[int]] = {}
        for offset, record in iter_records(run.journal_path("completions")):
            answers.setdefault(record["prompt_id"], []).append(offset)
        prompt_offsets = [
            (offset, answers[record["prompt_id"]]) for offset, record in iter_records(run.journal_path("prompts"))
        ]
        judged_prompts = prompt_offsets[: max(1, len(prompt_offsets) // prompts_per_judged)]
        work = {
            "rate": [
                runner.JudgeInput(prompt_offset, answer_offset)
                for prompt_offset, answer_offsets in judged_prompts
                for answer_offset in answer_offsets
            ],
            "compare": [
                runner.JudgeInput(prompt_offset, answer_offsets[0], answer_offsets[1])
                for prompt_offset, answer_offsets in judged_prompts
            ],
        }
        readers = [JournalReader(run.journal_path(name)) for name in ("prompts", "completions")]
        with run.lock(), run.journal("verdicts") as file:
            for panel_judge in load_panel(config):
                runner.run_judge(
                    panel_judge,
                    config,
                    lambda kind=panel_judge.definition.file.kind: work[kind],
                    readers[0].read_at,
                    readers[1].read_at,
                    lambda: FakeClient(),
                    file,
                    UsageMeter(),
                    lambda _mode: None,
                )
        for reader in readers:
            reader.close()

    yield "prompts taken in", prompts, ingest
    yield "sampling, four answers a request", prompts * SAMPLES, sample
    yield "judging, one verdict a request", max(1, prompts // prompts_per_judged) * (SAMPLES * 4 + 2), judge


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--records", type=int, default=50_000)
    arguments.add_argument("--times", type=int, default=5)
    options = arguments.parse_args()
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
    print(f"\n| {options.times} runs: median (least to most) | records a second | a second of CPU | records a run |")
    print("|---|---|---|---|")
    for name, measurements in rates.items():
        cells = (
            f"{statistics.median(row):,.0f} ({min(row):,.0f} to {max(row):,.0f})"
            for row in zip(*measurements, strict=True)
        )
        print(f"| {name} | {' | '.join(cells)} | {counts[name]:,} |")


if __name__ == "__main__":
    main()
