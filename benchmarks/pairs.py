"""Human-labeled pairs with stored verdicts, the input of ``benchmarks.labels``, whose help describes the format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.errors import InputError
from rlaif.judge import prompt_rendering
from rlaif.records import replace_surrogates


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, with the human label and the verdicts of judges.

    ``prompt`` is unique; pairs of the same original prompt have the same ``group``. ``verdicts``: probability that the
    first response is better, by judge and order ("ab", "ba"), or None if it is missing.
    """

    prompt: str
    group: str
    responses: tuple[str, str]
    best: int | None  # 1, 2, or None for a tie
    verdicts: dict[str, dict[str, float | None]]


def load_pairs(path: Path, subsets: tuple[str, ...] = ("",)) -> list[Pair]:
    """Read the pairs of a file, each as a prompt of its own. Repeated pairs and equal responses are dropped.

    ``subsets``: prefixes of the subsets to keep. Raises :class:`InputError` at an invalid line.
    """
    pairs: list[Pair] = []
    visited: set[tuple[str, ...]] = set()
    prompts: Counter[str] = Counter()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", location=str(path)) from None
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line must be a JSON object")
            prompt, (first, second), best, verdicts = (
                _prompt_text(row),
                _responses(row),
                _human_preference(row),
                _verdicts(row),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"invalid pair: {message}", location=f"{path}:{line_number}",
                             hint="`python -m benchmarks.labels --help` describes the format.") from None  # fmt: skip
        if not str(row.get("subset", "")).startswith(subsets):
            continue
        if (prompt, *sorted((first, second))) in visited or first.split() == second.split():
            continue
        visited.add((prompt, *sorted((first, second))))
        prompts[prompt] += 1
        unique_prompt = prompt if prompts[prompt] == 1 else f"{prompt}\n\n({prompts[prompt]})"
        pairs.append(Pair(unique_prompt, prompt, (first, second), best, verdicts))
    return _fill_missing_order(pairs)


def _prompt_text(row: dict[str, Any]) -> str:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = prompt_rendering.format_conversation(prompt)
    text = prompt or "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    if not text.strip():
        raise ValueError("the prompt is empty")
    return as_rendered(text)


def _responses(row: dict[str, Any]) -> tuple[str, str]:
    responses = row["responses"]
    # Spreadsheets convert texts to values: in PandaLM's file the answer "True" is the value true.
    if (
        not isinstance(responses, list)
        or len(responses) != 2
        or not all(isinstance(text, str | int | float) for text in responses)
    ):
        raise ValueError("responses must be two texts")
    return as_rendered(str(responses[0])), as_rendered(str(responses[1]))


def as_rendered(text: str) -> str:
    """Return the text as a judge request shows it."""
    return prompt_rendering.escape_control_tokens(replace_surrogates(text))


def _human_preference(row: dict[str, Any]) -> int | None:
    """Return the label, or the choice of more than half of the annotators."""
    labels = list(map(str, row["human"] if "human" in row else [row["label"]]))
    if not labels or not set(labels) <= {"1", "2", "tie"}:
        raise ValueError(f'a human label must be 1, 2 or "tie", got {labels}')
    value, times = Counter(labels).most_common(1)[0]
    return int(value) if value != "tie" and 2 * times > len(labels) else None


def _verdicts(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the probability that the first response is better, by judge and order; None for a missing verdict."""
    return {
        str(judge): {order: _prob_first(verdict) for order, verdict in value.items() if order in ("ab", "ba")}
        if isinstance(value, dict)
        else {"ab": _prob_first(value), "ba": _prob_first(value)}
        for judge, value in (row.get("verdicts") or {}).items()
    }


def _prob_first(verdict: Any) -> float | None:
    if verdict is None:
        return None
    named_value = {"1": 1.0, "2": 0.0, "tie": 0.5}.get(str(verdict))
    if named_value is not None:
        return named_value
    if isinstance(verdict, bool) or not isinstance(verdict, int | float) or not 0 <= verdict <= 1:
        raise ValueError(f'a verdict must be 1, 2, "tie", null or a probability, got {verdict!r}')
    return float(verdict)


def _fill_missing_order(pairs: list[Pair]) -> list[Pair]:
    """Copy the other order's verdicts for a judge without any verdict in one order, as it was not asked in it."""
    answered = {(judge, order) for pair in pairs for judge, verdicts in pair.verdicts.items()
             for order, p in verdicts.items() if p is not None}  # fmt: skip
    for pair in pairs:
        for judge, verdicts in pair.verdicts.items():
            for order, other in (("ab", "ba"), ("ba", "ab")):
                if (judge, order) not in answered:
                    verdicts[order] = verdicts.get(other)
    return pairs
