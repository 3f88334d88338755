"""Helpers for tests of real models: one vLLM of the demo model, and tolerances for two runs of one model.

A model's results differ slightly between CPUs and between batches, as matrix products of another shape are summed in
another order. So tests compare keys and counts exactly, probabilities within ``PROBABILITY_TOLERANCE``, and texts
sampled with one seed by :func:`same_prefix_fraction`: one token on the other side of its threshold changes all that
follow.
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
"""The last option gives a cache of 19,000 tokens in at most 1 GB. Without it vLLM allocates 2 GiB."""
SMALL_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""For commands that start their own vLLM next to the shared one and a training."""

PROBABILITY_TOLERANCE = {"bfloat16": 0.15, "float32": 1e-3}
"""Maximum difference of a verdict's probability between two servers of one model, by dtype.

bfloat16 has 8 bits of mantissa, so logits between 16 and 32 are multiples of 1/8. If two logits each differ by two
rounding steps after 30 layers of rounding, their difference changes by 1/2, and a probability near 1/2 by a quarter of
that, 0.125. Between a replica and a server, 0.06 was observed in 36 verdicts. float32 has 24 bits; 1e-5 was observed.
"""

PREFIX_CHARS = 16
"""About four tokens. In bfloat16, 85 % of the demo model's answers in a batch of 32 had the same prefix as alone, and
31 % were identical (float32: all). With other seeds, none had the same prefix."""
MIN_SAME_SEED, MAX_OTHER_SEED = 0.4, 0.2
"""Bounds of :func:`same_prefix_fraction`: above the first for equal seeds, below the second for different seeds."""

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
"""Two thirds of the demo model's answers to these questions end before 64 tokens."""


class DemoServer:
    """The vLLM shared by all tests that only need a server that answers.

    The first such test starts it. It is restarted if a test killed it. :meth:`close` stops it when its memory is
    needed, and the next test that needs it starts it again.
    """

    def __init__(self, log: Path) -> None:
        self._backends = ModelBackends(log, CONFIG, lambda line: None)

    def client(self, usage: UsageMeter | None = None) -> Client:
        """Return a client that restarts the server if it dies."""
        return self._backends.client_for("demo", [], OPTIONS, usage or UsageMeter())

    def commands(self) -> dict[str, str]:
        """Return an environment in which rlaif's commands use this server, regardless of the run's rlaif.toml."""
        client = self.client()
        assert client.api_key.value
        urls = dict.fromkeys(("RLAIF_SAMPLER_BASE_URL", "RLAIF_JUDGE_BASE_URL"), client.url)
        return os.environ | urls | {"RLAIF_API_KEY": client.api_key.value}

    def close(self) -> None:
        self._backends.close()


def probability_tolerance(server: str) -> float:
    """Return the entry of PROBABILITY_TOLERANCE for a vLLM with the command line ``server``.

    Without ``--dtype``, as on a GPU, vLLM uses the dtype of the checkpoint.
    """
    match = re.search(r"--dtype (\S+)", server)
    return PROBABILITY_TOLERANCE[match[1] if match else "bfloat16"]


def same_prefix_fraction(left: Sequence[str], right: Sequence[str]) -> float:
    """Return the fraction of texts whose first characters equal those of their counterpart."""
    pairs = list(zip(left, right, strict=True))
    return sum(one[:PREFIX_CHARS] == other[:PREFIX_CHARS] for one, other in pairs) / len(pairs)
