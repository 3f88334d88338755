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

from benchmarks.speed import facts
from rlaif.config import Config
from rlaif.generate import prompts as taking
from rlaif.generate import sample as sampling
from rlaif.judge import ask as asking
from rlaif.llm.budget import Meter, Usage
from rlaif.llm.wire import Choice, Reply
from rlaif.pipeline.rounds import panel
from rlaif.records import Completion, Verdict
from rlaif.run.directory import Run
from rlaif.run.journal import Reader, read

ANSWER = "An answer of some three hundred tokens, as a model of eight billion parameters gives to a question. " * 12
PROMPT = "Question number {}: how does one go about it, what is to be minded, and what would {} say of it in the end? "
SAMPLES = 4


class Client:
    """What :mod:`rlaif.llm.ask` knows of a client, with nobody behind it."""

    config, model, url, urls, limit = Config().client, "m", "none", ("none",), 256.0

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def check(self) -> str:
        return "vllm"

    async def chat(self, body: dict[str, Any], _path: str) -> Reply:
        if "structured_outputs" not in body:
            return Reply([Choice(ANSWER, None, "stop", None, None)] * body["n"], Usage(100, 0, 300 * body["n"]))
        words = body["structured_outputs"]["choice"]
        top = [{"token": word, "logprob": -0.7 - place} for place, word in enumerate(words)]
        said = [{"token": words[0], "logprob": -0.7, "top_logprobs": top}]
        return Reply([Choice(words[0], None, "length", said, None)], Usage(600, 256, 1))


ENGINES: Any = SimpleNamespace(client=lambda *_: Client())


def config_of(source: Path) -> Config:
    return Config.model_validate({
        "prompts": {"source": [str(source)], "heldout_share": 0}, "sampler": {"model": ["m"], "n": SAMPLES},
        "judge": {"model": "m"},
    })  # fmt: skip


def journal(folder: Path, count: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """The records alone: as they stand when a reply has been read."""
    run, keys = Run(folder), [f"{i:064x}" for i in range(count)]
    answers = [Completion(key=key, prompt_id=key[-16:], index=i % SAMPLES, model="m", text=ANSWER,
                          completion_tokens=300) for i, key in enumerate(keys)]  # fmt: skip
    verdicts = [Verdict(key=key, kind="rate", judge="quality", judge_hash=key[-16:], model="m", prompt_id=key[-16:],
                        a=key, aspect="truthfulness", score=3.5, variance=0.4, mass=1.0, reply="4", prompt_tokens=600,
                        cached_tokens=256, completion_tokens=1) for key in keys]  # fmt: skip

    def write(name: Any, records: list[Any], each: int) -> None:
        with run.writing(), run.journal(name) as file:
            for first in range(0, count, each):
                file.append(records[first : first + each])

    yield "journal, answers by four", count, lambda: write("completions", answers, SAMPLES)
    yield "journal, verdicts one by one", count, lambda: write("verdicts", verdicts, 1)


def asked(folder: Path, count: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Prompts, answers and verdicts of one run, by the stages' own functions."""
    run, source, prompts = Run(folder), folder / "source.jsonl", max(1, count // SAMPLES)
    each = 3  # judging: 4 answers x 4 aspects and both orders of a pair make 18 verdicts a prompt
    with source.open("wb") as file:
        for i in range(prompts):
            words = f"{i * 7919 % 10007} and {i * 104729 % 10009} and {i * 1299709 % 100003}"
            file.write(orjson.dumps({"prompt": PROMPT.format(i, words)}) + b"\n")
    config = config_of(source)

    def take() -> None:
        with run.writing():
            taking.take(run, config, lambda _: None)

    def sample() -> None:
        with run.writing():
            sampling.sample(run, config, ENGINES, Meter())

    def judge() -> None:
        answers: dict[str, list[int]] = {}
        for offset, record in read(run.journal_path("completions")):
            answers.setdefault(record["prompt_id"], []).append(offset)
        places = [(offset, answers[record["prompt_id"]]) for offset, record in read(run.journal_path("prompts"))]
        few = places[: max(1, len(places) // each)]
        work = {
            "rate": [asking.Material(place, one) for place, found in few for one in found],
            "compare": [asking.Material(place, found[0], found[1]) for place, found in few],
        }
        readers = [Reader(run.journal_path(name)) for name in ("prompts", "completions")]
        with run.writing(), run.journal("verdicts") as file:
            for seat in panel(config):
                asking.ask_seat(seat, config, lambda kind=seat.judge.file.kind: work[kind], readers[0].at,
                                readers[1].at, lambda: Client(), file, Meter(), lambda _mode: None)  # fmt: skip
        for reader in readers:
            reader.close()

    yield "prompts taken in", prompts, take
    yield "sampling, four answers a request", prompts * SAMPLES, sample
    yield "judging, one verdict a request", max(1, prompts // each) * (SAMPLES * 4 + 2), judge


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--records", type=int, default=50_000)
    arguments.add_argument("--times", type=int, default=5)
    given = arguments.parse_args()
    facts()
    rates: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, int] = {}
    for _ in range(given.times):
        for way in (journal, asked):
            with tempfile.TemporaryDirectory() as place:
                for name, count, call in way(Path(place), given.records):
                    began, busy = time.monotonic(), time.process_time()
                    call()
                    taken = (count / (time.monotonic() - began), count / (time.process_time() - busy))
                    rates.setdefault(name, []).append(taken)
                    counts[name] = count
    print(f"\n| {given.times} runs: median (least to most) | records a second | a second of CPU | records a run |")
    print("|---|---|---|---|")
    for name, seen in rates.items():
        cells = (
            f"{statistics.median(row):,.0f} ({min(row):,.0f} to {max(row):,.0f})" for row in zip(*seen, strict=True)
        )
        print(f"| {name} | {' | '.join(cells)} | {counts[name]:,} |")


if __name__ == "__main__":
    main()
