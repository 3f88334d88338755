"""Pairs that a model can learn in a few steps: short answers and refusals."""

from __future__ import annotations

from typing import Any

PAIRS = [
    ("Name a colour.", "Blue.", "No, I will not."),
    ("What is two and two?", "Four.", "That is hard to say."),
    ("Say hello.", "Hello there!", "Why should I?"),
    ("Name a fruit.", "An apple.", "I would rather not."),
    ("Is water wet?", "Yes, it is.", "Ask someone else."),
    ("Name a city.", "Oslo.", "Cities bore me."),
    ("What do cows drink?", "Water.", "I do not care."),
    ("Name a day.", "Monday.", "Look it up."),
]


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Return ``count`` dataset rows, numbered from ``first``."""
    examples = []
    for index in range(first, first + count):
        question, good, bad = PAIRS[index % len(PAIRS)]
        examples.append(
            {
                "prompt": [{"role": "user", "content": f"{question} ({index})"}],
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
                "pair_id": f"pair-{index}",
                "prompt_id": f"prompt-{index}",
                "label_source": "human" if index % 4 == 0 else "judge",
                "confidence": 0.9,
                "rating_margin": 1.0,
                "chosen_model": "demo",
                "rejected_model": "demo",
                "tags": ["test"],
            }
        )
    return examples
