"""Human-labelled pairs with stored verdicts: what ``benchmarks.labels`` reads, which says what a line holds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.errors import InputError
from rlaif.judge import render
from rlaif.records import clean


@dataclass(frozen=True)
class Pair:
    prompt: str
    group: str
    responses: tuple[str, str]
    best: int | None  # 1, 2 or None where people see a tie
    verdicts: dict[str, dict[str, float | None]]


def pairs_of(path: Path, subsets: tuple[str, ...] = ("",)) -> list[Pair]:
    """The file's pairs, each as a prompt of its own; a pair that came before or of equal answers is left out. Raises
    :class:`InputError` naming the line that is none."""
    found: list[Pair] = []
    seen: set[tuple[str, ...]] = set()
    prompts: Counter[str] = Counter()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            asked, (first, second), best, verdicts = _asked(row), _responses(row), _best(row), _verdicts(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"no pair of the format: {what}", where=f"{path}:{number}",
                             mend="python -m benchmarks.labels --help says what a line holds.") from None  # fmt: skip
        if not str(row.get("subset", "")).startswith(subsets):
            continue
        if (asked, *sorted((first, second))) in seen or first.split() == second.split():
            continue
        seen.add((asked, *sorted((first, second))))
        prompts[asked] += 1
        own = asked if prompts[asked] == 1 else f"{asked}\n\n({prompts[asked]})"
        found.append(Pair(own, asked, (first, second), best, verdicts))
    return _both_orders(found)


def _asked(row: dict[str, Any]) -> str:
    given = row.get("prompt")
    if isinstance(given, list):
        given = render.conversation(given)
    asked = given or "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    if not asked.strip():
        raise ValueError("the prompt is empty")
    return shown(asked)


def _responses(row: dict[str, Any]) -> tuple[str, str]:
    given = row["responses"]
    # Spreadsheets make values of texts: an answer "True" stands in PandaLM's file as true.
    if not isinstance(given, list) or len(given) != 2 or not all(isinstance(text, str | int | float) for text in given):
        raise ValueError("responses must be two texts")
    return shown(str(given[0])), shown(str(given[1]))


def shown(text: str) -> str:
    """As a judge request shows it."""
    return render.harmless(clean(text))


def _best(row: dict[str, Any]) -> int | None:
    """The label, or what more than half of the people said."""
    said = list(map(str, row["human"] if "human" in row else [row["label"]]))
    if not said or not set(said) <= {"1", "2", "tie"}:
        raise ValueError(f'people say 1, 2 or "tie", and not {said}')
    value, times = Counter(said).most_common(1)[0]
    return int(value) if value != "tie" and 2 * times > len(said) else None


def _verdicts(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The probability that the first response is better, by seat and order; None where it could not be read."""
    return {
        str(seat): {order: _p(said) for order, said in value.items() if order in ("ab", "ba")}
        if isinstance(value, dict)
        else {"ab": _p(value), "ba": _p(value)}
        for seat, value in (row.get("verdicts") or {}).items()
    }


def _p(said: Any) -> float | None:
    if said is None:
        return None
    known = {"1": 1.0, "2": 0.0, "tie": 0.5}.get(str(said))
    if known is not None:
        return known
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 <= said <= 1:
        raise ValueError(f'a verdict is 1, 2, "tie", null or a probability, and not {said!r}')
    return float(said)


def _both_orders(pairs: list[Pair]) -> list[Pair]:
    """A seat without any readable verdict in one order was not asked in it."""
    heard = {(seat, order) for pair in pairs for seat, said in pair.verdicts.items()
             for order, p in said.items() if p is not None}  # fmt: skip
    for pair in pairs:
        for seat, said in pair.verdicts.items():
            for order, other in (("ab", "ba"), ("ba", "ab")):
                if (seat, order) not in heard:
                    said[order] = said.get(other)
    return pairs
