"""What an annotator is still to label, in which order, on which sides; and what a label becomes.

Contract: everything here but :func:`read_pairs` is a function of its arguments alone. The same seed, pair and
annotator give the same place in the queue and the same sides, on any machine, whatever else is in the table. So a
page and a file show one annotator the same thing, and an import can check what the annotator was shown.

The order is random and knows nothing of route, verdict or model: the labelled part of the audit slice is a random
part of it, however early an annotator stops. It differs between annotators, so that two of them who stop early have
covered more of the queue than one.

The newest label of an annotator for a pair wins, by ``at``. Nothing is taken back from the journal: a changed mind is
one more record, whose ``at`` is after the one before, whatever the clock says.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from rlaif.errors import UsageError
from rlaif.records import Choice, Review, Route, Side, clean, key_of, unit_interval

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.directory import Run

Role = Literal["annotator", "adjudicator"]
ROUTES = ("audit", "targeted")
"""The routes of ``tables/pairs.parquet`` that lead to people."""

COLUMNS = ("pair_id", "prompt_id", "prompt", "response_a", "response_b", "route", "inclusion_probability",
           "p_a", "preferred", "route_reason")  # fmt: skip
"""The columns of ``tables/pairs.parquet`` that reviewing needs; the last three only after a person has chosen."""


@dataclass(frozen=True, slots=True)
class Item:
    """One pair as one annotator sees it. Only ``prompt``, ``left`` and ``right`` may reach the annotator."""

    pair_id: str
    prompt_id: str
    prompt: str
    left: str
    right: str
    left_is: Side
    route: Route | Literal["gold"]
    inclusion_probability: float | None


def annotator_name(name: str) -> str:
    """``name`` without surrounding space. Raises :class:`UsageError` where nothing is left: sides hang on the name."""
    stripped = clean(name).strip()
    if not stripped:
        raise UsageError("the annotator has no name", mend="Give --annotator NAME.")
    return stripped


def left_side(seed: int, pair_id: str, annotator: str) -> Side:
    """Which response of the pair this annotator sees on the left."""
    return "a" if unit_interval(seed, "left", pair_id, annotator) < 0.5 else "b"


def queue(pairs: pl.DataFrame, reviews: pl.DataFrame, *, annotator: str, seed: int) -> pl.DataFrame:
    """The rows of ``pairs`` that wait for this annotator's label, in this annotator's order. A skip is a label."""
    import polars as pl

    done = reviews.filter(pl.col("annotator") == annotator).select("pair_id")
    waiting = pairs.filter(pl.col("route").is_in(ROUTES)).join(done, on="pair_id", how="anti", maintain_order="left")
    places = [place(seed, pair_id, annotator) for pair_id in waiting["pair_id"]]
    return waiting.with_columns(pl.Series("_place", places, dtype=pl.Float64)).sort("_place").drop("_place")


def place(seed: int, pair_id: str, annotator: str) -> float:
    """Where a pair stands in this annotator's order."""
    return unit_interval(seed, "queue", pair_id, annotator)


def item(row: Mapping[str, Any], *, annotator: str, seed: int) -> Item:
    """A row of the pairs table as this annotator is shown it."""
    left_is = left_side(seed, row["pair_id"], annotator)
    a, b = row["response_a"] or "", row["response_b"] or ""
    return Item(
        pair_id=row["pair_id"],
        prompt_id=row["prompt_id"],
        prompt=prompt_text(orjson.loads(row["prompt"])),
        left=a if left_is == "a" else b,
        right=b if left_is == "a" else a,
        left_is=left_is,
        route=row["route"],
        inclusion_probability=row["inclusion_probability"],
    )


def prompt_text(messages: list[dict[str, Any]]) -> str:
    """The prompt for a reader: a single user turn as it is; otherwise every turn under its ``[role]``."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return turn_text(messages[0])
    return "\n\n".join(f"[{message['role']}]\n{turn_text(message)}" for message in messages)


def turn_text(message: Mapping[str, Any]) -> str:
    """What a turn says: its text, and its tool calls as JSON."""
    parts = [message.get("content") or ""]
    parts += [orjson.dumps(call.get("function", call)).decode() for call in message.get("tool_calls") or []]
    return "\n".join(part for part in parts if part)


def newest(reviews: pl.DataFrame) -> pl.DataFrame:
    """One row for each annotator, role and pair: the label that counts."""
    import polars as pl

    ordered = reviews.with_columns(pl.col("role").fill_null("annotator")).sort("at", maintain_order=True)
    return ordered.unique(["annotator", "role", "pair_id"], keep="last", maintain_order=True)


def label(
    item: Item,
    *,
    annotator: str,
    choice: Choice,
    comment: str = "",
    edited: str | None = None,
    sure: int | None = None,
    seconds: float | None = None,
    role: Role = "annotator",
    before: Mapping[str, Any] | None = None,
) -> Review | None:
    """The record of a label, or None where ``before`` (the newest of this annotator for the pair) says the same.

    The key hangs on the label before it, so that going back to an earlier choice is a record of its own. How long it
    took is no part of what was said.
    """
    said = {
        "choice": choice,
        "left": item.left_is,
        "comment": clean(comment).strip(),
        "edited": clean(edited).replace("\r\n", "\n") if edited and edited.strip() else None,
        "sure": sure,
    }
    if before is not None and said == {name: before.get(name) or None for name in said} | {
        "comment": before["comment"] or ""
    }:
        return None
    other: Side = "b" if item.left_is == "a" else "a"
    preferred: dict[str, Side] = {"left": item.left_is, "right": other}
    # What is not said is no part of the key, so that a file and the page give one label one key.
    extra = {name: said[name] for name in ("edited", "sure") if said[name] is not None}
    extra |= {"role": role} if role != "annotator" else {}
    key = key_of(
        pair_id=item.pair_id,
        annotator=annotator,
        choice=choice,
        left=item.left_is,
        comment=said["comment"],
        before=before["key"] if before else None,
        **extra,
    )
    return Review(
        key=key,
        pair_id=item.pair_id,
        prompt_id=item.prompt_id,
        annotator=annotator,
        role=role,
        preferred=preferred.get(choice),
        seconds=seconds,
        route=item.route,
        inclusion_probability=item.inclusion_probability,
        # A clock that was set back must not make a newer label the older one.
        at=max(time.time(), before["at"] + 1e-3) if before else time.time(),
        **said,
    )


def read_pairs(run: Run, *, ids: Collection[str] | None = None) -> pl.DataFrame:
    """The pairs of ``run`` that reviewing needs: those with one of ``ids``, or those that are routed to people.

    The rest of the table (nine rows in ten, with their texts) is never in memory. Raises :class:`RunError` where
    nothing was judged yet.
    """
    import polars as pl

    if not run.pairs_path.exists():
        return run.pairs()
    wanted = pl.col("route").is_in(ROUTES) if ids is None else pl.col("pair_id").is_in(list(ids))
    return pl.scan_parquet(run.pairs_path).filter(wanted).select(COLUMNS).collect()
