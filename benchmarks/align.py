"""Does the whole way make a model better? Prompts whose answers a program can check, on the embedded model, on a CPU.

    python -m benchmarks.align FOLDER             what is not there yet, cell by cell, then the tables
    python -m benchmarks.align FOLDER --tune      settings tried on seed 0, validated on topics from its training side
    python -m benchmarks.align --table            the tables of what benchmarks/align/ has

The prompts are topics times kinds of constraint, and the packaged constraints (prompts/constraints.jsonl). The base
model answers each 8 times, once for all seeds; the product's own check judge labels the answers. A seed decides which
topics and which packaged kinds and prompts are held out, which answers are paired, and how training shuffles. An
answer that meets its checks against one of the same prompt that does not is a pair, as many of one kind as of
another, and of equal lengths as far as there are. Settings were chosen on seed 0, which is in no other table; those
chosen last are counted on seeds 4 to 6 besides, by which nothing was chosen. For each share of noise that share of
the pairs is turned round. "reviewed" gives a tenth of the pairs to a person who is always right, drawn at random (a
check has no doubt by which to route), and hands the share of wrong labels found to the robust loss (Chowdhury et al.
2024, arXiv:2403.00409).

Each trained adapter then answers its seed's held-out prompts 8 times, several adapters in one vLLM. Held out are a
fifth of the topics (with the kinds that were trained, and with four that were not), and of the packaged constraints
two fifths of their kinds and a fifth of the others' prompts; and those of IFBench's prompts that the checks express
(instructions.py says what to install for them), whose kinds are none of these. Intervals are 95 %, bootstrap over
seeds and, in them, topics or prompts. Nothing is timed.

FOLDER keeps answers, checkpoints and adapters: a second start goes on from there. Results, counts only, go into
benchmarks/align/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import instructions
from rlaif import api
from rlaif.config.models import Config
from rlaif.judge import check_schema, refusal_classifier
from rlaif.llm.backends import LocalModel, ModelBackends
from rlaif.llm.usage import UsageMeter
from rlaif.records import Failure
from rlaif.resources import prompt_sets
from rlaif.run.journal import iter_records
from rlaif.run.run import Run
from rlaif.train import trainer

RESULTS = Path(__file__).parent / "align"
TOPICS = (  # noqa: SIM905
    "rivers, bread, winter, bees, trains, honey, clocks, rain, tea, mountains, soap, whales, chess, kites, salt, "
    "glass, owls, maps, bicycles, the moon, bridges, wool, cheese, volcanoes, paper, lighthouses, ants, violins, "
    "coffee, deserts, candles, turtles, gardens, windmills, ice, apples, fog, horses, bells, sand"
).split(", ")
KINDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "lowercase": (
        "Write everything in lowercase letters.",
        [{"kind": "regex", "pattern": r"\A[^A-Z]*[a-z][^A-Z]*\Z"}],
    ),
    "one sentence": (
        "Answer in exactly one sentence.",
        [{"kind": "length", "unit": "sentences", "min": 1, "max": 1}],
    ),
    "at most 20 words": ("Use at most 20 words.", [{"kind": "length", "unit": "words", "min": 1, "max": 20}]),
    "at least 30 words": ("Use at least 30 words.", [{"kind": "length", "unit": "words", "min": 30}]),
    "no comma": ("Do not use any comma.", [{"kind": "regex", "pattern": ",", "match": False}]),
    "a word": ("Use the word 'golden'.", [{"kind": "regex", "pattern": r"(?i)\bgolden\b"}]),
    "a question": ("End your answer with a question mark.", [{"kind": "regex", "pattern": r"\?\s*\Z"}]),
    "bullets": (
        "Answer as a list of exactly three bullet points that start with '- '.",
        [{"kind": "regex", "pattern": r"(?m)\A(?:(?!^- )[\s\S])*(?:^- (?:(?!^- )[\s\S])*){3}\Z"}],
    ),
    # So that length in sentences has two directions, as length in words has, and the number asked for counts: without
    # it "two sentences" fell by 19 to 25 points on validation topics.
    "three sentences": (
        "Answer in exactly three sentences.",
        [{"kind": "length", "unit": "sentences", "min": 3, "max": 3}],
    ),
    # Held out: no training prompt has one of these. (In the trials the first was trained.)
    "at least three sentences": (
        "Use at least three sentences.",
        [{"kind": "length", "unit": "sentences", "min": 3}],
    ),
    "two sentences": (
        "Answer in exactly two sentences.",
        [{"kind": "length", "unit": "sentences", "min": 2, "max": 2}],
    ),
    "no exclamation": ("Do not use exclamation marks.", [{"kind": "regex", "pattern": "!", "match": False}]),
    "title": (
        "Begin with a title in double angular brackets, like <<title>>.",
        [{"kind": "regex", "pattern": r"\A\s*<<[^<>\n]+>>"}],
    ),
}
HELD_OUT_KINDS = ("at least three sentences", "two sentences", "no exclamation", "title")
SAMPLES, TOKENS = 8, 64
HELD_OUT_TOPICS = 8
IFBENCH_SAMPLES, IFBENCH_TOKENS, MAX_PROMPT_CHARS = 2, 160, 2_500
"""Fewer and longer answers, and no prompt of more characters than that, which the model's window would not hold."""
MAX_PAIRS_PER_KIND, MAX_PAIRS_PER_PACKAGED_KIND = 28, 8
"""Pairs of one kind of constraint, and of a packaged one, since those are many and have few prompts."""
NOISE = (0.1, 0.2, 0.3)
REVIEWED = 0.1
DRAWS = 4_000
MIXED_LOSS: dict[str, Any] = {"loss": ["sigmoid", "sft"], "trl": {"loss_weights": [1.0, 0.2]}}
SETTINGS: dict[str, Any] = {"learning_rate": 4e-4, "epochs": 1.0, "beta": 0.1, **MIXED_LOSS}
"""Those of the best of the first five TRIALS on topics from seed 0's training side."""
SEEDS, FRESH_SEEDS = (1, 2, 3), (4, 5, 6)
"""Those that the first setting was counted on, and those that nobody had looked at when LONGER and FEWER_ANSWERS were tried for
what SEEDS had shown: asked about their held-out topics only."""
LONGER: dict[str, Any] = {"learning_rate": 2e-4, "epochs": 2.0}
"""Tried last, after SEEDS had shown that models swing between short and long; then on them and on FRESH_SEEDS too."""
TRIALS: dict[str, dict[str, Any]] = {
    "lr 4e-4, 1 epoch": {"loss": ["sigmoid"], "trl": {}},
    "lr 4e-4, 1 epoch, sft 0.2": {},
    # The first two were run before "three sentences" was a kind. The third had two kinds that ask for three sentences
    # or more; from the fourth on it is one, so that as many pairs want less as want more. The fourth is all of seed 0,
    # with its held-out topics, which is why seed 0 is in no other table.
    "lr 4e-4, 1 epoch, sft 0.2, three sentences trained": {},
    "lr 4e-4, 1 epoch, sft 0.2, directions balanced": {},
    "lr 4e-4, 1 epoch, sft 0.2, directions balanced, lengths matched": {},
    "lr 2e-4, 2 epochs, sft 0.2, directions balanced, lengths matched": LONGER,
    # Each beside the one before these, of which it changes one thing.
    "lr 2e-4, 2 epochs, sft 0.2, directions balanced, lengths matched, beta 0.3": {**LONGER, "beta": 0.3},
    "lr 2e-4, 2 epochs, sft 0.2, directions balanced, lengths matched, n 4": LONGER,
}
FEWER_ANSWERS = 4
"""Of the ``SAMPLES`` answers to a prompt, how many the last trial makes pairs of, and a cell that is ``fewer``."""
# A step of 8 pairs takes two cores 6 s like this; one after another in float32, with the reference asked again at
# every step, it took 16.
FIXED_SETTINGS: dict[str, Any] = {
    "model": "demo",
    "batch_size": 8,
    "per_device_batch_size": 8,
    "max_length": 256,
    "save_steps": 10,
    "merge": False,
    "dtype": "bfloat16",
    "trl": {"precompute_ref_log_probs": True},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    seed: int
    noise: float = 0.0
    reviewed: bool = False
    trial: str | None = None
    longer: bool = False
    fewer: bool = False

    @property
    def n(self) -> int:
        return FEWER_ANSWERS if self.fewer or (self.trial or "").endswith(f", n {FEWER_ANSWERS}") else SAMPLES

    @property
    def name(self) -> str:
        if self.trial is not None:
            return "tune-" + "".join(letter if letter.isalnum() else "-" for letter in self.trial)
        if self.longer:
            return f"seed-{self.seed}-longer{f'-n-{FEWER_ANSWERS}' if self.fewer else ''}"
        return f"seed-{self.seed}-noise-{self.noise:g}{'-reviewed' if self.reviewed else ''}"

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"


class PrintReporter:
    """A watch that prints lines."""

    def log(self, line: str) -> None:
        print(line, flush=True)

    @contextlib.contextmanager
    def progress(self, usage: UsageMeter) -> Iterator[None]:
        yield
        print(f"{usage.description}: {usage.answers} answers, {usage.failed} failed", flush=True)


# -- Prompts and who may see them


def template_prompts() -> list[dict[str, Any]]:
    return [
        {
            "id": f"{topic}/{kind}",
            "prompt": f"Tell me something about {topic}. {instruction}",
            "checks": checks,
            "tags": [kind],
        }
        for topic in TOPICS
        for kind, (instruction, checks) in KINDS.items()
    ]


def packaged_prompts(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in prompt_sets()[name].read_text().splitlines()]


@dataclasses.dataclass(frozen=True)
class Split:
    """Ids of prompts: those that pairs are made of; those held out by topic alone, by topic and kind, and of the
    packaged ones by prompt alone and by kind."""

    train: frozenset[str]
    topics: frozenset[str]
    kinds: frozenset[str]
    packaged_prompts: frozenset[str]
    packaged_kinds: frozenset[str]


def split(cell: Cell) -> Split:
    rng = random.Random(f"{cell.seed}/split")
    topics = rng.sample(TOPICS, len(TOPICS))
    held_out, trained_topics = topics[:HELD_OUT_TOPICS], topics[HELD_OUT_TOPICS:]
    if cell.trial is not None:  # what is tried never sees the held-out topics
        held_out, trained_topics = trained_topics[:HELD_OUT_TOPICS], trained_topics[HELD_OUT_TOPICS:]
    rows = packaged_prompts("constraints")
    kinds = sorted({row["tags"][0] for row in rows})
    held_out_kinds = set(rng.sample(kinds, len(kinds) * 2 // 5))
    trained_kind_ids = {row["id"] for row in rows if row["tags"][0] not in held_out_kinds}
    held_out_ids = set(rng.sample(sorted(trained_kind_ids), len(trained_kind_ids) // 5))
    trained_kinds = [kind for kind in KINDS if kind not in HELD_OUT_KINDS]
    return Split(
        train=frozenset(f"{topic}/{kind}" for topic in trained_topics for kind in trained_kinds)
        | (trained_kind_ids - held_out_ids),
        topics=frozenset(f"{topic}/{kind}" for topic in held_out for kind in trained_kinds),
        kinds=frozenset(f"{topic}/{kind}" for topic in held_out for kind in HELD_OUT_KINDS),
        packaged_prompts=frozenset(held_out_ids),
        packaged_kinds=frozenset({row["id"] for row in rows} - trained_kind_ids),
    )


# -- Answers and what the checks say of them


def open_backends(folder: Path) -> ModelBackends:
    return ModelBackends(folder / "log", Config().client, PrintReporter().log)


def sample_answers(
    path: Path,
    rows: Iterable[dict[str, Any]],
    model: str,
    backends: ModelBackends,
    n: int = SAMPLES,
    tokens: int = TOKENS,
) -> Run:
    """A run in which ``model`` has answered each of ``rows`` ``n`` times, up to ``tokens`` long."""
    run = Run(path)
    path.mkdir(parents=True, exist_ok=True)
    source = path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "prompts": {"sources": [str(source)], "heldout_fraction": 0, "near_duplicate_threshold": 0},
            "policies": [{"model": model}],
            "sampler": {"n": n, "max_tokens": tokens, "vllm": {"max_model_len": 1024}},
        }
    )
    api.generate(run, config, PrintReporter(), backends)
    return run


@dataclasses.dataclass(frozen=True)
class CheckedAnswers:
    """A prompt with its answers' texts, and which of them meet every check."""

    prompt: dict[str, Any]
    texts: list[str]
    met: list[bool]


def check_answers(run: Run) -> dict[str, CheckedAnswers]:
    """By prompt id. An empty answer meets nothing; one that a check breaks on is left out."""
    prompts = {record["prompt_id"]: record for _, record in iter_records(run.journal_path("prompts"))}
    by_prompt = {prompt_id: CheckedAnswers(record, [], []) for prompt_id, record in prompts.items()}
    for _, record in iter_records(run.journal_path("completions")):
        if "error" in record:
            continue
        verdict = check_schema.run_checks(prompts[record["prompt_id"]], record)
        if not isinstance(verdict, Failure):
            by_prompt[record["prompt_id"]].texts.append(record["text"])
            by_prompt[record["prompt_id"]].met.append(verdict.score == 1.0 and bool(record["text"].strip()))
    return by_prompt


def base_answers(folder: Path) -> dict[str, CheckedAnswers]:
    """The reference's answers to everything, sampled once."""
    result_path = RESULTS / "base.json"
    with open_backends(folder) as backends:
        rows = check_answers(sample_answers(folder / "base", template_prompts(), "demo", backends))
        rows |= check_answers(
            sample_answers(folder / "base-packaged", packaged_prompts("constraints"), "demo", backends)
        )
        if not result_path.exists():
            result = {"answers": met_counts(rows), "words": mean_words(rows)}
            write_result(result_path, {**result, "refused": refusal_counts(folder / "base-benign", "demo", backends)})
    return rows


def met_counts(rows: dict[str, CheckedAnswers]) -> dict[str, list[int]]:
    return {prompt_id: [sum(row.met), len(row.met)] for prompt_id, row in sorted(rows.items()) if row.met}


def mean_words(rows: dict[str, CheckedAnswers]) -> dict[str, float]:
    """Mean words of an answer, by prompt."""
    return {
        key: round(float(np.mean([len(text.split()) for text in row.texts])), 2)
        for key, row in sorted(rows.items())
        if row.texts
    }


def refusal_counts(path: Path, model: str, backends: ModelBackends) -> dict[str, list[int]]:
    """Of the answers to each benign look-alike, how many refuse, by the product's text classifier."""
    rows = [row for row in packaged_prompts("refusals") if "benign" in row["tags"]]
    run = sample_answers(path, rows, model, backends)
    counts_by_prompt: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for _, record in iter_records(run.journal_path("completions")):
        if "error" not in record:
            counts_by_prompt[record["prompt_id"]][0] += refusal_classifier.classify(record["text"]).label == "refuse"
            counts_by_prompt[record["prompt_id"]][1] += 1
    return dict(sorted(counts_by_prompt.items()))


# -- A cell: pairs, training, held-out answers


def make_pairs(rows: dict[str, CheckedAnswers], cell: Cell) -> list[dict[str, Any]]:
    """Passing against failing answers of the same prompt, as many of one kind as of another, with the cell's noise."""
    rng = random.Random(f"{cell.seed}/pairs")
    by_kind: dict[str, list[list[tuple[str, str, str]]]] = defaultdict(list)
    for prompt_id in sorted(split(cell).train):
        row = rows[prompt_id]
        texts = list(zip(row.texts, row.met, strict=True))[: cell.n]
        good = sorted({text for text, met in texts if met})
        poor = sorted({text for text, met in texts if not met and text.strip()})
        rng.shuffle(good)
        rng.shuffle(poor)
        if good and poor:
            by_kind[row.prompt["tags"][0] + ("" if "/" in prompt_id else " (packaged)")].append(
                [(prompt_id, chosen, rejected) for chosen, rejected in match_lengths(good, poor, row.prompt["checks"])]
            )
    made_pairs = []
    for kind in sorted(by_kind):
        rng.shuffle(by_kind[kind])
        # The first pair of every prompt, then the second of each: a kind seldom met takes several of a prompt.
        turns = [prompt_pairs[rank] for rank in range(3) for prompt_pairs in by_kind[kind] if rank < len(prompt_pairs)]
        for prompt_id, chosen, rejected in turns[
            : MAX_PAIRS_PER_PACKAGED_KIND if kind.endswith("(packaged)") else MAX_PAIRS_PER_KIND
        ]:
            pair_name = f"{prompt_id}/{len(made_pairs)}"
            flipped = random.Random(f"{cell.seed}/noise/{pair_name}").random() < cell.noise
            reviewed = cell.reviewed and random.Random(f"{cell.seed}/review/{pair_name}").random() < REVIEWED
            messages = rows[prompt_id].prompt["messages"]
            made_pairs.append(
                {
                    "prompt_id": prompt_id,
                    "prompt": messages,
                    "good": chosen,
                    "poor": rejected,
                    "kind": kind,
                    "turned": flipped and not reviewed,
                    "reviewed": reviewed,
                    "was_turned": flipped,
                }
            )
    return made_pairs


def match_lengths(good: list[str], poor: list[str], checks: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Up to three pairs, no answer more often than it has to be, of the most equal lengths in words, unless words are
    what is asked for: an answer without commas is a short one most often, and "short" would be learnt of it."""
    count = min(3, max(len(good), len(poor)))
    if any(check.get("unit") == "words" for check in checks):
        return [(good[index % len(good)], poor[index % len(poor)]) for index in range(count)]
    matches: list[tuple[str, str]] = []
    used: dict[str, int] = defaultdict(int)
    for _ in range(count):
        free = [(chosen, rejected) for chosen in good for rejected in poor if (chosen, rejected) not in matches]
        pair = min(
            free,
            key=lambda pair: (used[pair[0]] + used[pair[1]], abs(len(pair[0].split()) - len(pair[1].split()))),
        )
        matches.append(pair)
        for text in pair:
            used[text] += 1
    return matches


def write_dataset(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    run.dataset.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]],
            "chosen": [{"role": "assistant", "content": row["poor" if row["turned"] else "good"]}],
            "rejected": [{"role": "assistant", "content": row["good" if row["turned"] else "poor"]}],
            "prompt_id": row["prompt_id"],
            "label_source": "human" if row["reviewed"] else "judge",
        }
        for row in rows
    ]
    pl.DataFrame(records).write_parquet(run.dataset / "train.parquet")


def train_cell(folder: Path, cell: Cell, rows: dict[str, CheckedAnswers]) -> tuple[str, dict[str, Any]]:
    """The adapter's folder, and what is to be told of the training."""
    print(f"== {cell.name}", flush=True)
    run = Run(folder / cell.name)
    cell_pairs = make_pairs(rows, cell)
    write_dataset(run, cell_pairs)
    train_config = {**SETTINGS, **(LONGER if cell.longer else TRIALS[cell.trial] if cell.trial is not None else {})}
    train_config = {**FIXED_SETTINGS, **train_config, "trl": {**FIXED_SETTINGS["trl"], **train_config["trl"]}}
    reviewed = [row for row in cell_pairs if row["reviewed"]]
    wrong = sum(row["was_turned"] for row in reviewed) / max(len(reviewed), 1)
    if cell.reviewed and wrong:
        others = [loss for loss in train_config.get("loss", []) if loss != "sigmoid"]
        train_config["loss"] = ["robust", *others]
        train_config["trl"] = {**train_config["trl"], "label_smoothing": min(0.45, round(wrong, 3))}
    result = trainer.train(
        run, Config.model_validate({"seed": cell.seed, "train": train_config}), log=PrintReporter().log
    )
    assert result.adapter is not None
    by_kind = {
        kind: sum(row["kind"] == kind for row in cell_pairs) for kind in sorted({row["kind"] for row in cell_pairs})
    }
    facts = {
        "pairs": len(cell_pairs),
        "by_kind": by_kind,
        "turned": sum(row["turned"] for row in cell_pairs),
        "train": train_config,
        "reviewed": len(reviewed),
        "noise_found": wrong if cell.reviewed else None,
    }
    return str(result.adapter), facts


def run_wave(folder: Path, cells: Sequence[Cell], rows: dict[str, CheckedAnswers]) -> None:
    """Train the cells that are not there yet, then have all their adapters answer in one vLLM: first what was trained
    for, of every cell, then what else a cell without noise is asked."""
    pending = [cell for cell in cells if is_pending(cell)]
    trained = {cell: train_cell(folder, cell, rows) for cell in pending}
    with open_backends(folder) as backends:
        for cell, (adapter, _) in trained.items():
            backends.register_local_model(LocalModel(cell.name, adapter, base="demo"))
        for cell, (_, facts) in trained.items():
            ids = split(cell).topics | (frozenset() if cell.noise else split(cell).kinds)
            prompts = (row for row in template_prompts() if row["id"] in ids)
            checked = check_answers(sample_answers(folder / cell.name / "heldout", prompts, cell.name, backends))
            write_result(
                cell.result,
                {**dataclasses.asdict(cell), **facts, "answers": met_counts(checked), "words": mean_words(checked)},
            )
        for cell in filter(is_pending, pending):
            result = json.loads(cell.result.read_text())
            ids = split(cell).packaged_prompts | split(cell).packaged_kinds
            prompts = (row for row in packaged_prompts("constraints") if row["id"] in ids)
            result["answers"] |= met_counts(
                check_answers(sample_answers(folder / cell.name / "packaged", prompts, cell.name, backends))
            )
            write_result(
                cell.result, {**result, "refused": refusal_counts(folder / cell.name / "benign", cell.name, backends)}
            )


def run_ifbench(folder: Path) -> None:
    """IFBench's prompts, as far as the checks express them and none of which is trained on, answered by the reference
    and by each seed's model without noise. Last, since their answers are the longest."""
    rows, _ = instructions.prompts(instructions.data_dir())
    prompts = [row for row in rows if len(row["prompt"]) <= MAX_PROMPT_CHARS]
    cells = [(RESULTS / "base.json", folder / "base", "demo")]
    plain = [Cell(seed, longer=longer) for longer in (False, True) for seed in SEEDS]
    cells += [(cell.result, folder / cell.name, cell.name) for cell in plain]
    pending = [(result, path, name) for result, path, name in cells if "ifbench" not in json.loads(result.read_text())]
    with open_backends(folder) as backends:
        for _, path, name in pending:
            if name != "demo":
                backends.register_local_model(LocalModel(name, str(path / "model" / "adapter"), base="demo"))
        for result, path, name in pending:
            run = sample_answers(
                path.with_name(f"{path.name}-ifbench"), prompts, name, backends, IFBENCH_SAMPLES, IFBENCH_TOKENS
            )
            write_result(result, {**json.loads(result.read_text()), "ifbench": met_counts(check_answers(run))})


def is_pending(cell: Cell) -> bool:
    if not cell.result.exists():
        return True
    all_prompts = not cell.noise and cell.trial is None and cell.seed not in FRESH_SEEDS
    return all_prompts and "refused" not in json.loads(cell.result.read_text())


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"-> {path}", flush=True)


def all_waves() -> list[list[Cell]]:
    """In this order, so that each interruption leaves the most that can be said."""
    noisy = [(noise, reviewed) for noise in NOISE for reviewed in (False, True)]
    return [
        [Cell(seed) for seed in SEEDS],
        *([Cell(seed, noise, reviewed) for noise, reviewed in noisy] for seed in SEEDS),
        [Cell(seed, longer=True) for seed in SEEDS],
        [Cell(seed, longer=True, fewer=True) for seed in FRESH_SEEDS],
        [Cell(seed, longer=True) for seed in FRESH_SEEDS],
    ]


# -- Tables


@dataclasses.dataclass(frozen=True)
class Share:
    """How many of ``n`` answers to one prompt did something, by the reference and by the trained model. Prompts of one
    ``cluster`` (a topic) are drawn together."""

    seed: int
    cluster: str
    reference: tuple[int, int]
    trained: tuple[int, int]


def shares(result: dict[str, Any], reference: dict[str, Any], part: str, ids: Iterable[str]) -> list[Share]:
    """The prompts ``ids`` ``part`` of a cell's ``result`` and of the reference's (answers or refused)."""
    return [
        Share(
            result["seed"], prompt_id.split("/")[0], tuple(reference[part][prompt_id]), tuple(result[part][prompt_id])
        )
        for prompt_id in sorted(ids)
        if prompt_id in result.get(part, {}) and prompt_id in reference[part]
    ]


def means(rows: Sequence[Share]) -> tuple[float, float, float, float]:
    """The mean over prompts of the reference's and the trained model's share, and the gain's 95 % interval: bootstrap
    over seeds and, in each, over clusters."""
    pairs_of = {seed: defaultdict(list) for seed in sorted({row.seed for row in rows})}
    for row in rows:
        before, after = row.reference[0] / row.reference[1], row.trained[0] / row.trained[1]
        pairs_of[row.seed][row.cluster].append((before, after))
    # By seed and cluster: sums of both shares, and how many prompts.
    sums = [
        np.array([(*np.sum(values, axis=0), len(values)) for values in by_cluster.values()])
        for by_cluster in pairs_of.values()
    ]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(DRAWS):
        total = np.zeros(3)
        for index in rng.integers(0, len(sums), len(sums)):
            clusters = sums[index]
            total += clusters[rng.integers(0, len(clusters), len(clusters))].sum(axis=0)
        gains.append((total[1] - total[0]) / total[2])
    low, high = np.quantile(gains, (0.025, 0.975))
    before, after, count = np.concatenate(sums).sum(axis=0)
    return float(before / count), float(after / count), float(low), float(high)


def format_cells(rows: Sequence[Share]) -> str:
    """The cells of a table's row: before, after, gain with interval in points, and n."""
    if not rows:
        return "| not run | | 0 |"
    before, after, low, high = means(rows)
    seeds = len({row.seed for row in rows})
    n = f"{seeds} seed{'s' * (seeds > 1)}, {len(rows)} prompts, {sum(row.trained[1] for row in rows)} answers"
    return (
        f"| {before:.3f} -> {after:.3f} | {100 * (after - before):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {n} |"
    )


def print_tables() -> None:
    if not (RESULTS / "base.json").exists():
        print(f"nothing is in {RESULTS} yet")
        return
    reference = json.loads((RESULTS / "base.json").read_text())
    results: dict[Cell, dict[str, Any]] = {
        cell: json.loads(cell.result.read_text())
        for cells in [*all_waves(), [Cell(0, trial=name) for name in TRIALS]]
        for cell in cells
        if cell.result.exists()
    }
    plain = [cell for cell in results if not cell.noise and not cell.longer and cell.trial is None]
    longer = [cell for cell in results if cell.longer and cell.seed in SEEDS]
    fresh = [cell for cell in results if cell.seed in FRESH_SEEDS and not cell.fewer]
    fewer = [cell for cell in results if cell.fewer]

    def collect(cells: Iterable[Cell], part: str, split_name: str) -> list[Share]:
        return [
            row for cell in cells for row in shares(results[cell], reference, part, getattr(split(cell), split_name))
        ]

    head = "gain in points, 95 % | n |\n|---|---|---|---|"
    parts = (("topic", "topics"), ("topic and kind", "kinds"), ("packaged, prompt", "packaged_prompts"),
             ("packaged, kind", "packaged_kinds"))  # fmt: skip
    for setting, cells, all_prompts in (
        ("first setting", plain, True),
        ("second setting", longer, True),
        ("second setting, fresh seeds", fresh, False),
        ("third setting, fresh seeds", fewer, False),
    ):
        print(f"\n| {setting}, held out by | answers that meet every check | {head}")
        for title, split_name in parts if all_prompts else parts[:2]:
            print(f"| {title} {format_cells(collect(cells, 'answers', split_name))}")
        if all_prompts:
            prompt_ids = reference.get("ifbench", ())
            rows = [row for cell in cells for row in shares(results[cell], reference, "ifbench", prompt_ids)]
            print(f"| IFBench {format_cells(rows)}")
        print(f"\n| {setting}, by kind | answers that meet it | {head}")
        for kind in KINDS:
            ids = [f"{topic}/{kind}" for topic in TOPICS]
            rows = [row for cell in cells for row in shares(results[cell], reference, "answers", ids)]
            print(f"| {kind}{' (not trained)' if kind in HELD_OUT_KINDS else ''} {format_cells(rows)}")
        if not all_prompts:
            continue
        print(f"\n| benign look-alikes, {setting} | answers that refuse | {head}")
        benign = [row for cell in cells for row in shares(results[cell], reference, "refused", reference["refused"])]
        print(f"| all {format_cells(benign)}")

    print("\n| noise | review | held out by topic | gain in points, 95 % | n | gain kept |\n|---|---|---|---|---|---|")
    for noise, reviewed in [(0.0, False), *((noise, reviewed) for noise in NOISE for reviewed in (False, True))]:
        cells = [cell for cell in results if cell in {Cell(seed, noise, reviewed) for seed in SEEDS}]
        rows = collect(cells, "answers", "topics")
        without_noise = collect(
            [cell for cell in plain if cell.seed in {row.seed for row in rows}], "answers", "topics"
        )
        gain_kept = ""
        if rows and without_noise and len({row.seed for row in without_noise}) == len({row.seed for row in rows}):
            (before, after, *_), (first, last, *_) = means(rows), means(without_noise)
            gain_kept = f"{(after - before) / (last - first):.0%}" if last > first else "no gain to keep"
        print(f"| {noise:.0%} | {f'{REVIEWED:.0%}' if reviewed else '-'} {format_cells(rows)} {gain_kept} |")

    print(f"\n| noise | held out by topic, without review -> with | {head}")
    by_noise = {noise: [row for seed in SEEDS for row in _review_effect(results, Cell(seed, noise))] for noise in NOISE}
    for noise, rows in by_noise.items():
        print(f"| {noise:.0%} {format_cells(rows)}")
    print(f"| all of these {format_cells([row for rows in by_noise.values() for row in rows])}")

    tried = [cell for cell in results if cell.trial is not None]
    if tried:
        print(f"\n| tried on seed 0 | answers that meet their check | {head}")
        for number, cell in enumerate(tried, start=1):
            prompt_ids = [
                key for key in results[cell]["answers"] if key.partition("/")[2] in set(KINDS) - set(HELD_OUT_KINDS)
            ]
            print(f"| {number}. {cell.trial} {format_cells(shares(results[cell], reference, 'answers', prompt_ids))}")
        numbers = range(1, len(tried) + 1)
        print(f"\n| gain in points | {' | '.join(map(str, numbers))} |\n|---|{'---|' * len(tried)}")
        for kind in KINDS:
            gains = []
            for cell in tried:
                rows = shares(results[cell], reference, "answers", (f"{topic}/{kind}" for topic in TOPICS))
                before, after, *_ = means(rows) if rows else (0.0, 0.0)
                gains.append(f"{100 * (after - before):+.1f}" if rows else "")
            print(f"| {kind} | {' | '.join(gains)} |")


def _review_effect(results: dict[Cell, dict[str, Any]], plain: Cell) -> list[Share]:
    """What the reviewed neighbour of ``plain`` does beside it, which stands in the reference's place."""
    reviewed = dataclasses.replace(plain, reviewed=True)
    if plain not in results or reviewed not in results:
        return []
    return shares(results[reviewed], results[plain], "answers", split(plain).topics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="for answers, checkpoints and adapters")
    parser.add_argument("--tune", action="store_true", help="try the settings of TRIALS instead")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        if options.folder is None:
            parser.error("give a FOLDER for answers, checkpoints and adapters, or --table")
        if not options.tune:
            instructions.data_dir()  # which is needed hours later
        rows = base_answers(options.folder)
        for cells in [[Cell(0, trial=name) for name in TRIALS]] if options.tune else all_waves():
            run_wave(options.folder, cells, rows)
        if not options.tune:
            run_ifbench(options.folder)
    print_tables()


if __name__ == "__main__":
    main()
