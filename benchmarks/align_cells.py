"""The experiment of ``benchmarks.align``: prompts, settings, cells (one training each) and the split of a seed."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from rlaif.resources import prompt_sets

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
    # Gives the length in sentences two directions, as the length in words has, so that the requested number counts.
    # Without this kind, "two sentences" fell by 19 to 25 points on validation topics.
    "three sentences": (
        "Answer in exactly three sentences.",
        [{"kind": "length", "unit": "sentences", "min": 3, "max": 3}],
    ),
    # Held out: no training prompt has one of these. (In the trials the first one was trained.)
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
"""IFBench needs fewer but longer answers. A longer prompt would not fit into the model's context window."""
MAX_PAIRS_PER_KIND, MAX_PAIRS_PER_PACKAGED_KIND = 28, 8
"""Pairs per kind of constraint, and per packaged kind: there are many packaged kinds with few prompts each."""
NOISE = (0.1, 0.2, 0.3)
REVIEWED = 0.1
DRAWS = 4_000
MIXED_LOSS: dict[str, Any] = {"loss": ["sigmoid", "sft"], "trl": {"loss_weights": [1.0, 0.2]}}
SETTINGS: dict[str, Any] = {"learning_rate": 4e-4, "epochs": 1.0, "beta": 0.1, **MIXED_LOSS}
"""Settings of the best of the first five TRIALS, on topics from the training side of seed 0."""
SEEDS, FRESH_SEEDS = (1, 2, 3), (4, 5, 6)
"""Seeds on which the first setting was measured, and seeds that had not been looked at when the results on SEEDS led to
LONGER and FEWER_ANSWERS. The fresh seeds are measured on held-out topics only."""
LONGER: dict[str, Any] = {"learning_rate": 2e-4, "epochs": 2.0}
"""Tried last, after SEEDS had shown that models swing between short and long; measured on SEEDS and FRESH_SEEDS."""
TRIALS: dict[str, dict[str, Any]] = {
    "lr 4e-4, 1 epoch": {"loss": ["sigmoid"], "trl": {}},
    "lr 4e-4, 1 epoch, sft 0.2": {},
    # The first two ran before "three sentences" was a kind. The third had two kinds that ask for three or more
    # sentences. From the fourth on there is one, so that pairs for shorter and for longer answers are balanced. The
    # fourth used all of seed 0, including its held-out topics. Therefore seed 0 is in no other table.
    "lr 4e-4, 1 epoch, sft 0.2, three sentences trained": {},
    "lr 4e-4, 1 epoch, sft 0.2, directions balanced": {},
    "lr 4e-4, 1 epoch, sft 0.2, directions balanced, lengths matched": {},
    "lr 2e-4, 2 epochs, sft 0.2, directions balanced, lengths matched": LONGER,
    # Each of the following changes one thing of the trial above.
    "lr 2e-4, 2 epochs, sft 0.2, directions balanced, lengths matched, beta 0.3": {**LONGER, "beta": 0.3},
    "lr 2e-4, 2 epochs, sft 0.2, directions balanced, lengths matched, n 4": LONGER,
}
FEWER_ANSWERS = 4
"""Number of the ``SAMPLES`` answers per prompt from which the last trial and ``fewer`` cells make pairs."""
# With these settings a step of 8 pairs takes 6 s on two cores. In float32, one pair after another, with the reference
# computed at every step, it took 16 s.
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
    """One training: seed, share of flipped pairs, review, and settings."""

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
    """Ids of prompts: the training prompts, and those held out by topic, by topic and kind, by packaged prompt, and by
    packaged kind."""

    train: frozenset[str]
    topics: frozenset[str]
    kinds: frozenset[str]
    packaged_prompts: frozenset[str]
    packaged_kinds: frozenset[str]


def split(cell: Cell) -> Split:
    rng = random.Random(f"{cell.seed}/split")
    topics = rng.sample(TOPICS, len(TOPICS))
    held_out, trained_topics = topics[:HELD_OUT_TOPICS], topics[HELD_OUT_TOPICS:]
    if cell.trial is not None:  # trials never use the held-out topics
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


def all_waves() -> list[list[Cell]]:
    """Return the cells in an order that makes the results most informative if the benchmark is interrupted."""
    noisy = [(noise, reviewed) for noise in NOISE for reviewed in (False, True)]
    return [
        [Cell(seed) for seed in SEEDS],
        *([Cell(seed, noise, reviewed) for noise, reviewed in noisy] for seed in SEEDS),
        [Cell(seed, longer=True) for seed in SEEDS],
        [Cell(seed, longer=True, fewer=True) for seed in FRESH_SEEDS],
        [Cell(seed, longer=True) for seed in FRESH_SEEDS],
    ]
