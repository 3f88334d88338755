"""Scripted judges: they parse a judge request and answer like a model with known preferences."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.fake_server import with_probabilities

FENCED = re.compile(r"<<<([0-9a-f]{12})\n(.*?)\n\1>>>", re.DOTALL)


def fenced_parts(body: dict[str, Any]) -> list[str]:
    """Return the fenced parts of a judge request in order: the conversation, then one or two answers."""
    return [match[2] for match in FENCED.finditer(body["messages"][-1]["content"])]


def verdict_words(body: dict[str, Any]) -> list[str]:
    """Return the verdict words that the request allows."""
    return list(body["structured_outputs"]["choice"])


def judge_by(quality: Callable[[str], float]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a judge that prefers the answer of higher ``quality`` (0 to 1) with probability 0.9, and rates answers 1 +
    4 x quality."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        choices, parts = verdict_words(body), fenced_parts(body)
        if choices == ["A", "B"]:
            first, second = (quality(text) for text in parts[-2:])
            p = 0.5 if first == second else 0.9 if first > second else 0.1
            return with_probabilities({"A": p, "B": 1 - p})
        score = 1 + 4 * quality(parts[-1])
        low = int(min(score, 4))
        return with_probabilities({str(low): 1 - (score - low), str(low + 1): score - low})

    return answer
