"""What tests of real models share: one vLLM of the demo model, and how far two runs of one model may differ.

What a model computes differs a little between CPUs and between batches: matrix products of another shape are summed in
another order. So tests compare keys and counts exactly, probabilities within ``PROBABILITY_TOLERANCE``, and texts
sampled with one seed by :func:`same_prefix_fraction`: one token that falls on the other side of its threshold changes
all that follow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from rlaif.config.models import ClientConfig
from rlaif.llm.backends import ModelBackends
from rlaif.llm.client import Client
from rlaif.llm.usage import UsageMeter

CONFIG = ClientConfig(concurrency=32)
OPTIONS = {"max_model_len": 2048, "max_num_seqs": 32, "num_gpu_blocks_override": 600}
"""The last one holds 19,000 tokens in at most 1 GB. Without it vLLM fills 2 GiB."""
SMALL_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""For commands that start a vLLM of their own, beside the shared one and a training."""

PROBABILITY_TOLERANCE = {"bfloat16": 0.15, "float32": 1e-3}
"""How far a verdict's probability may differ between two servers of one model, by the dtype they compute in.

bfloat16 has 8 bits of mantissa, so logits between 16 and 32 are multiples of 1/8. Two of them that are each rounded two
steps otherwise, after 30 layers of such roundings, are 1/2 further apart, and a probability near 1/2 moves by a quarter
of that, .125. Between a replica and a server .06 was seen in 36 verdicts. float32 has 24 bits; 1e-5 was seen.
"""

PREFIX_CHARS = 16
"""Characters, about four tokens. In bfloat16 85 % of the demo model's answers began with the same ones in a batch of 32
as alone, and 31 % were the same to the end (float32: all); of those with other seeds none began with the same ones."""
MIN_SAME_SEED, MAX_OTHER_SEED = 0.4, 0.2
"""Bounds of :func:`same_prefix_fraction`: with the same seeds it is larger than the first, with others smaller than
the second."""

QUESTIONS = (
    "Name a fruit and say in one short sentence why you like it.",
    "What is the capital of France?",
    "Say hello to a new neighbor in one sentence.",
    "Write one short sentence about rain.",
    "Name three birds.",
    "What color is the sky? Answer in a few words.",
    "Give a name for a small grey cat.",
    "What do cows drink?",
    "Name a day of the week and one thing to do on it.",
    "Complete the sentence: The best thing about summer is",
    "Is water wet? Answer in one sentence.",
    "Write a short title for a story about a lost key.",
    "Name a city in Italy.",
    "Thank a friend for a gift in one sentence.",
    "What is two plus two?",
    "Name a tool that a gardener needs.",
    "Suggest a breakfast in one short sentence.",
    "Name an animal that can swim.",
)
"""Two thirds of the demo model's answers to these end before 64 tokens."""


class DemoServer:
    """The vLLM that all tests share which only need a server that answers.

    It is started when the first of them asks for it, started again if a test killed it, and stopped with :meth:`close`
    when its memory is needed (the next test that asks for it starts it again).
    """

    def __init__(self, log: Path) -> None:
        self._backends = ModelBackends(log, CONFIG, lambda line: None)

    def client(self, usage: UsageMeter | None = None) -> Client:
        """Return a client that restarts the server if it dies."""
        return self._backends.client_for("demo", [], OPTIONS, usage or UsageMeter())

    def commands(self) -> dict[str, str]:
        """Return an environment in which rlaif's commands ask this server, whatever the run's rlaif.toml says."""
        client = self.client()
        assert client.key
        urls = dict.fromkeys(("RLAIF_SAMPLER_BASE_URL", "RLAIF_JUDGE_BASE_URL"), client.url)
        return os.environ | urls | {"RLAIF_API_KEY": client.key}

    def close(self) -> None:
        self._backends.close()


def probability_tolerance(server: str) -> float:
    """Return the entry of PROBABILITY_TOLERANCE for a vLLM with the command line ``server``.

    Without ``--dtype``, as on a GPU, it computes in that of the checkpoint.
    """
    match = re.search(r"--dtype (\S+)", server)
    return PROBABILITY_TOLERANCE[match[1] if match else "bfloat16"]


def same_prefix_fraction(left: Sequence[str], right: Sequence[str]) -> float:
    """Return the share of texts whose first characters are those of their counterpart."""
    pairs = list(zip(left, right, strict=True))
    return sum(one[:PREFIX_CHARS] == other[:PREFIX_CHARS] for one, other in pairs) / len(pairs)
