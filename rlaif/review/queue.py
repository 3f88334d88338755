"""The review queue of an annotator: its pairs, their order and sides, and the record of a label.

Contract: every function here except :func:`read_pairs` depends on its arguments only. The same seed, pair and
annotator give the same position in the queue and the same sides, on any machine and independently of the other rows.
So the page and a file show an annotator the same pairs, and an import can check what the annotator was shown.

The order is random and independent of route, verdict and model, so the labeled part of the audit slice is a random
sample of it, however early an annotator stops. It differs between annotators, so that two annotators who stop early
cover more of the queue than one.

The newest label of an annotator for a pair wins, by ``created_at``. The journal is append-only: a changed label is one
more record, and its ``created_at`` is later than that of the record before, even if the clock was set back.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from rlaif.errors import UsageError
from rlaif.records import Choice, Review, Route, Side, content_key, hash_to_unit_interval, replace_surrogates

if TYPE_CHECKING:
    import polars as pl

    from rlaif.run.run import Run

Role = Literal["annotator", "adjudicator"]
ROUTES = ("audit", "targeted")
"""The routes of ``tables/pairs.parquet`` whose pairs are in the review queue."""

COLUMNS = ("pair_id", "prompt_id", "prompt", "response_a", "response_b", "route", "inclusion_probability",
           "prob_a", "preferred", "route_reason")  # fmt: skip
"""The columns of ``tables/pairs.parquet`` that review needs; the last three only after the annotator has chosen."""


@dataclass(frozen=True, slots=True)
class ReviewItem:
    """One pair as one annotator sees it. Only ``prompt``, ``left`` and ``right`` may reach the annotator."""

    pair_id: str
    prompt_id: str
    prompt: str
    left: str
    right: str
    left_side: Side
    route: Route | Literal["gold"]
    inclusion_probability: float | None


def normalize_annotator_name(name: str) -> str:
    """Strip white space. Raises :class:`UsageError` if the name is empty, because the sides depend on it."""
    stripped = replace_surrogates(name).strip()
    if not stripped:
        raise UsageError("the annotator's name is empty", hint="Give --annotator NAME.")
    return stripped


def left_side(seed: int, pair_id: str, annotator: str) -> Side:
    """Return the response of the pair, a or b, that this annotator sees on the left."""
    return "a" if hash_to_unit_interval(seed, "left", pair_id, annotator) < 0.5 else "b"


def pending_pairs(pairs: pl.DataFrame, reviews: pl.DataFrame, *, annotator: str, seed: int) -> pl.DataFrame:
    """Return the queued rows of ``pairs`` that this annotator has not labeled or skipped, in this annotator's order."""
    import polars as pl

    labeled = reviews.filter(pl.col("annotator") == annotator).select("pair_id")
    pending = pairs.filter(pl.col("route").is_in(ROUTES)).join(labeled, on="pair_id", how="anti", maintain_order="left")
    positions = [queue_position(seed, pair_id, annotator) for pair_id in pending["pair_id"]]
    return pending.with_columns(pl.Series("_position", positions, dtype=pl.Float64)).sort("_position").drop("_position")


def queue_position(seed: int, pair_id: str, annotator: str) -> float:
    """Return the sort key of a pair in this annotator's order, from 0 to 1."""
    return hash_to_unit_interval(seed, "queue", pair_id, annotator)


def make_item(row: Mapping[str, Any], *, annotator: str, seed: int) -> ReviewItem:
    """Build the item for a row of the pairs table, with the sides that this annotator sees."""
    side = left_side(seed, row["pair_id"], annotator)
    a, b = row["response_a"] or "", row["response_b"] or ""
    return ReviewItem(
        pair_id=row["pair_id"],
        prompt_id=row["prompt_id"],
        prompt=prompt_text(orjson.loads(row["prompt"])),
        left=a if side == "a" else b,
        right=b if side == "a" else a,
        left_side=side,
        route=row["route"],
        inclusion_probability=row["inclusion_probability"],
    )


def prompt_text(messages: list[dict[str, Any]]) -> str:
    """Return the prompt as text: a single user turn unchanged, otherwise every turn below its ``[role]``."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return turn_text(messages[0])
    return "\n\n".join(f"[{message['role']}]\n{turn_text(message)}" for message in messages)


def turn_text(message: Mapping[str, Any]) -> str:
    """Return the text of a turn, followed by its tool calls as JSON."""
    parts = [message.get("content") or ""]
    parts += [orjson.dumps(call.get("function", call)).decode() for call in message.get("tool_calls") or []]
    return "\n".join(part for part in parts if part)


def latest_labels(reviews: pl.DataFrame) -> pl.DataFrame:
    """Return one row per annotator, role and pair: the newest label."""
    import polars as pl

    ordered = reviews.with_columns(pl.col("role").fill_null("annotator")).sort("created_at", maintain_order=True)
    return ordered.unique(["annotator", "role", "pair_id"], keep="last", maintain_order=True)


def make_review(
    item: ReviewItem,
    *,
    annotator: str,
    choice: Choice,
    comment: str = "",
    edited_response: str | None = None,
    confidence: int | None = None,
    seconds: float | None = None,
    role: Role = "annotator",
    previous: Mapping[str, Any] | None = None,
) -> Review | None:
    """Return the record of a label, or None if it equals ``previous``, the annotator's newest label for the pair.

    The key depends on the previous label, so returning to an earlier choice is a record of its own. ``seconds`` is not
    part of the comparison or the key.
    """
    values = {
        "choice": choice,
        "left_side": item.left_side,
        "comment": replace_surrogates(comment).strip(),
        "edited_response": replace_surrogates(edited_response).replace("\r\n", "\n")
        if edited_response and edited_response.strip()
        else None,
        "confidence": confidence,
    }
    if previous is not None and values == {name: previous.get(name) or None for name in values} | {
        "comment": previous["comment"] or ""
    }:
        return None
    right_side: Side = "b" if item.left_side == "a" else "a"
    preferred: dict[str, Side] = {"left": item.left_side, "right": right_side}
    # Unset values are excluded, so that the same label has the same key from a file and from the page.
    extra = {name: values[name] for name in ("edited_response", "confidence") if values[name] is not None}
    extra |= {"role": role} if role != "annotator" else {}
    key = content_key(
        pair_id=item.pair_id,
        annotator=annotator,
        choice=choice,
        left=item.left_side,
        comment=values["comment"],
        before=previous["key"] if previous else None,
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
        # Stay later than the previous label even if the clock was set back.
        created_at=max(time.time(), previous["created_at"] + 1e-3) if previous else time.time(),
        **values,
    )


def read_pairs(run: Run, *, ids: Collection[str] | None = None) -> pl.DataFrame:
    """Return the pairs of ``run`` with one of ``ids``, or without ``ids`` those in the review queue.

    The rest of the table (nine rows in ten, with their texts) is never loaded into memory. Raises :class:`RunError` if
    the run has no pairs yet.
    """
    import polars as pl

    if not run.pairs_path.exists():
        return run.pairs()
    selection = pl.col("route").is_in(ROUTES) if ids is None else pl.col("pair_id").is_in(list(ids))
    return pl.scan_parquet(run.pairs_path).filter(selection).select(COLUMNS).collect()
