"""Does the whole way make a model better? Prompts whose answers a program can check, on the embedded model, on a CPU.

    python benchmarks/align.py FOLDER                    every cell that is not there yet, then the table
    python benchmarks/align.py FOLDER --cells 1          one more cell, for whoever has an hour
    python benchmarks/align.py FOLDER --table            the table of what is there
    python benchmarks/align.py FOLDER --small            a cell of a few minutes that shows only that it runs

For each seed: 8 answers to each training prompt are sampled and labelled by the checks; passing against failing answers
are the pairs, as many of each kind of constraint as of the next (the first trial, unbalanced, lost 27 points on one
kind). Then for each share of noise that share of the labels is turned round, and the model is trained with DPO; the
"reviewed" cells give a tenth of the pairs, drawn at random, to a person who is always right, and hand the share of
wrong labels found there to the robust loss. The share of checks met on held-out prompts is that of 4 answers each, by
the reference and the trained model side by side in one vLLM. Held out are a fifth of the topics, and two kinds of
constraint that no training prompt has. Intervals are 95 %, bootstrap over prompts and seeds.

A cell is a folder; a second start goes on inside it, from the journal and the checkpoints. Nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rlaif import pipeline
from rlaif.config import Config
from rlaif.llm.budget import Meter
from rlaif.llm.server import Engines, Local
from rlaif.run.directory import Run
from rlaif.run.journal import read
from rlaif.train import loop

TOPICS = (
    "rivers, bread, winter, bees, trains, honey, clocks, rain, tea, mountains, soap, whales, chess, kites, salt, "
    "glass, owls, maps, bicycles, the moon, bridges, wool, cheese, volcanoes, paper, lighthouses, ants, violins, "
    "coffee, deserts, candles, turtles, gardens, windmills, ice, apples, fog, horses, bells, sand"
)
KINDS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "lowercase": ("Write everything in lowercase letters.", lambda text: text == text.lower()),
    "one sentence": ("Answer in exactly one sentence.", lambda text: len(re.findall(r"[.!?](?:\s|$)", text)) == 1),
    "at most 20 words": ("Use at most 20 words.", lambda text: len(text.split()) <= 20),
    "no comma": ("Do not use any comma.", lambda text: "," not in text),
    "a word": ("Use the word 'golden'.", lambda text: "golden" in text.lower()),
    "a question": ("End your answer with a question mark.", lambda text: text.rstrip().endswith("?")),
    "bullets": (
        "Answer as a list of exactly three bullet points that start with '- '.",
        lambda text: len(re.findall(r"^[-*] ", text, re.MULTILINE)) == 3,
    ),
    "title": ("Begin with a title in double angular brackets, like <<title>>.", lambda text: "<<" in text[:40]),
    # Held out: no training prompt has one of these.
    "at least 40 words": ("Use at least 40 words.", lambda text: len(text.split()) >= 40),
    "no exclamation": ("Do not use exclamation marks.", lambda text: "!" not in text),
}
UNSEEN = ("at least 40 words", "no exclamation")
SAMPLES, ANSWERS, TOKENS = 8, 4, 96
NOISE = (0.0, 0.1, 0.2, 0.3)
REVIEWED = 0.1
DRAWS = 2_000


class Lines:
    """A watch that prints lines."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    @contextlib.contextmanager
    def watch(self, meter: Meter) -> Iterator[None]:
        yield
        print(f"{meter.what}: {meter.answers} answers, {meter.failed} failed", flush=True)


@dataclasses.dataclass(frozen=True)
class Cell:
    seed: int
    noise: float
    reviewed: bool = False

    @property
    def name(self) -> str:
        return f"seed-{self.seed}-noise-{self.noise:g}{'-reviewed' if self.reviewed else ''}"


def prompts(seed: int, limit: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to train on and held out; the last fifth of the shuffled topics is held out, and the unseen kinds."""
    drawn = TOPICS.split(", ")
    random.Random(seed).shuffle(drawn)
    cut = len(drawn) * 4 // 5
    made = [
        {"prompt": f"Tell me something about {topic}. {KINDS[kind][0]}", "id": f"{topic}/{kind}",
         "tags": [kind]}
        for topic in drawn for kind in KINDS
    ]  # fmt: skip
    kept = set(drawn[:cut])
    train = [row for row in made if row["id"].split("/")[0] in kept and row["tags"][0] not in UNSEEN]
    held = [row for row in made if row["id"].split("/")[0] not in kept]
    return train[:limit], held[:limit]


def passes(prompt_id: str, text: str) -> bool:
    return bool(text.strip()) and KINDS[prompt_id.split("/")[1]][1](text.strip())


def sampled(path: Path, rows: list[dict[str, Any]], models: list[str], engines: Engines, n: int, seed: int) -> Run:
    """A run in which each of ``models`` has answered each of ``rows`` ``n`` times."""
    run = Run(path)
    path.mkdir(parents=True, exist_ok=True)
    source = path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "seed": seed,
            "prompts": {"source": [str(source)], "heldout_share": 0, "near_duplicates": 0},
            "policies": [{"model": model} for model in models],
            "sampler": {"n": n * len(models), "max_tokens": TOKENS, "vllm": {"max_model_len": 512}},
        }
    )
    pipeline.generate(run, config, Lines(), engines)
    return run


def pairs(run: Run, cell: Cell) -> list[dict[str, Any]]:
    """Up to two passing/failing pairs a prompt, as many of one kind as of another, with the cell's noise."""
    chance = random.Random(f"{cell.seed}/pairs")
    texts = {record["prompt_id"]: record["messages"] for _, record in read(run.journal_path("prompts"))}
    good, bad = defaultdict(list), defaultdict(list)
    for _, record in read(run.journal_path("completions")):
        if "error" not in record and record["text"].strip():
            where = good if passes(record["prompt_id"], record["text"]) else bad
            where[record["prompt_id"]].append(record["text"])
    by_kind = defaultdict(list)
    for prompt_id in sorted(texts):
        chosen, rejected = sorted(set(good[prompt_id])), sorted(set(bad[prompt_id]))
        chance.shuffle(chosen)
        chance.shuffle(rejected)
        by_kind[prompt_id.split("/")[1]] += [(prompt_id, *both) for both in zip(chosen[:2], rejected, strict=False)]
    # Balanced: kinds that the model seldom meets would otherwise be drowned by those that it half meets already.
    each = max(1, int(np.median([len(found) for found in by_kind.values() if found] or [0])))
    rows = []
    for kind in sorted(by_kind):
        chance.shuffle(by_kind[kind])
        for prompt_id, chosen, rejected in by_kind[kind][:each]:
            place = f"{prompt_id}/{len(rows)}"
            turned = random.Random(f"{cell.seed}/noise/{place}").random() < cell.noise
            seen = cell.reviewed and random.Random(f"{cell.seed}/review/{place}").random() < REVIEWED
            rows.append({"prompt_id": prompt_id, "prompt": texts[prompt_id], "good": chosen, "poor": rejected,
                         "turned": turned and not seen, "reviewed": seen, "was_turned": turned})  # fmt: skip
    return rows


def dataset(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    run.dataset.mkdir(parents=True, exist_ok=True)
    made = [
        {
            "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]],
            "chosen": [{"role": "assistant", "content": row["poor" if row["turned"] else "good"]}],
            "rejected": [{"role": "assistant", "content": row["good" if row["turned"] else "poor"]}],
            "prompt_id": row["prompt_id"],
            "source": "human" if row["reviewed"] else "judge",
        }
        for row in rows
    ]
    pl.DataFrame(made).write_parquet(run.dataset / "train.parquet")


def run_cell(folder: Path, cell: Cell, options: argparse.Namespace) -> None:
    path = folder / cell.name
    done = path / "result.json"
    if done.exists():
        return
    print(f"== {cell.name}", flush=True)
    limit = 24 if options.small else 10_000
    train, held = prompts(cell.seed, limit)
    config = Config()
    with Engines(folder / "log", config.client, print) as engines:
        shared = sampled(folder / f"seed-{cell.seed}", train, ["demo"], engines, SAMPLES, cell.seed)
    run = Run(path)
    rows = pairs(shared, cell)
    dataset(run, rows)
    wanted: dict[str, Any] = {
        "model": "demo", "learning_rate": 1e-4, "epochs": 2, "batch_size": 8, "max_length": 256, "save_steps": 10,
        "merge": False, **({"max_steps": 2} if options.small else {}), **dict(options.train),
    }  # fmt: skip
    reviewed = [row for row in rows if row["reviewed"]]
    wrong = sum(row["was_turned"] for row in reviewed) / max(len(reviewed), 1)
    if cell.reviewed and wrong:
        wanted |= {"loss": ["robust"], "extra": {"label_smoothing": min(0.45, round(wrong, 3))}}
    result = loop.train(run, Config.model_validate({"seed": cell.seed, "train": wanted}), say=Lines().say)
    assert result.adapter is not None
    name = cell.name
    with Engines(folder / "log", config.client, print) as engines:
        engines.know(Local(name, str(result.adapter), base="demo"))
        answered = sampled(path / "heldout", held, ["demo", name], engines, 1 if options.small else ANSWERS, cell.seed)
    met: dict[str, dict[str, list[bool]]] = defaultdict(lambda: {"demo": [], name: []})
    for _, record in read(answered.journal_path("completions")):
        if "error" not in record:
            met[record["prompt_id"]][record["model"]].append(passes(record["prompt_id"], record["text"]))
    shares = {prompt_id: [float(np.mean(both["demo"])), float(np.mean(both[name]))]
              for prompt_id, both in sorted(met.items()) if both["demo"] and both[name]}  # fmt: skip
    told = {"pairs": len(rows), "noise found": wrong if cell.reviewed else None, "train": wanted, "shares": shares}
    done.write_text(json.dumps(told, indent=1))


def gain(shares: Sequence[tuple[str, float, float]]) -> str:
    """Before, after and gain, with the gain's interval: bootstrap over prompts."""
    values = np.array([(before, after) for _, before, after in shares])
    chance = np.random.default_rng(0)
    draws = [values[chance.integers(0, len(values), len(values))] for _ in range(DRAWS)]
    low, high = np.quantile([(draw[:, 1] - draw[:, 0]).mean() for draw in draws], (0.025, 0.975))
    before, after = values.mean(axis=0)
    return f"{before:.3f} -> {after:.3f} | {after - before:+.3f} [{low:+.3f}, {high:+.3f}] | {len(values)}"


def table(folder: Path, cells: Sequence[Cell]) -> None:
    rows: dict[tuple[float, bool], list[tuple[str, float, float]]] = defaultdict(list)
    seeds: dict[tuple[float, bool], int] = defaultdict(int)
    for cell in cells:
        path = folder / cell.name / "result.json"
        if path.exists():
            stored = json.loads(path.read_text())["shares"]
            rows[cell.noise, cell.reviewed] += [(prompt_id, *both) for prompt_id, both in stored.items()]
            seeds[cell.noise, cell.reviewed] += 1
    print("\n| noise | reviewed | held out | seeds | checks met | gain | n |\n|---|---|---|---|---|---|---|")
    for noise, reviewed in dict.fromkeys((cell.noise, cell.reviewed) for cell in cells):
        found = rows[noise, reviewed]
        head = f"| {noise:.0%} | {'10 %' if reviewed else '-'} |"
        if not found:
            print(f"{head} | 0 | not run | | |")
            continue
        kinds = {"topics": lambda kind: kind not in UNSEEN, "kinds and topics": lambda kind: kind in UNSEEN}
        for title, belongs in kinds.items():
            some = [row for row in found if belongs(row[0].split("/")[1])]
            if some:
                print(f"{head} {title} | {seeds[noise, reviewed]} | {gain(some)} |")
    plain = rows[0.0, False]
    if plain:
        print("\n| without noise, by kind | checks met | gain | n |\n|---|---|---|---|")
        for kind in KINDS:
            some = [row for row in plain if row[0].split("/")[1] == kind]
            if some:
                print(f"| {kind}{' (unseen)' if kind in UNSEEN else ''} | {gain(some)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=int, help="stop after so many new cells")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--small", action="store_true", help="a cell that only shows that it runs")
    parser.add_argument("--train", nargs=1, action="extend", default=[], metavar="NAME=JSON",
                        type=lambda text: (text.partition("=")[0], json.loads(text.partition("=")[2])),
                        help="a setting of [train] to try, in a folder of its own")  # fmt: skip
    options = parser.parse_args()
    cells = [Cell(seed, noise) for noise in NOISE for seed in range(options.seeds)]
    cells += [Cell(seed, noise, reviewed=True) for noise in NOISE[1:] for seed in range(options.seeds)]
    cells = [Cell(0, 0.2, reviewed=True)] if options.small else cells
    owed = [cell for cell in cells if not (options.folder / cell.name / "result.json").exists()]
    for cell in [] if options.table else owed[: options.cells]:
        run_cell(options.folder, cell, options)
    table(options.folder, cells)


if __name__ == "__main__":
    main()
