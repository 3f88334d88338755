"""What is known of the candidates before anything is decided over all of them, gathered part by part.

What whom to ask depends on is in memory, for the pairs that are kept or labelled, and with no more columns than it
takes. All others are dropped for what is known of them in their part, and counted. What is only written lies on disk,
in parts of another kind: by the pairs' ids, in whose order tables/pairs.parquet is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from rlaif.pair import balance, calibrate, route
from rlaif.pipeline.rounds import Part, Rounds
from rlaif.records import key_of
from rlaif.run.parts import Pieces

DECIDED = (
    "pair_id", "prompt_id", "a", "b", "p_a", "preferred", "outcome", "by", "flags", "kept", "why", "prompt_class",
    "answers_a", "answers_b", "chars_a", "chars_b", "suspicion",
)  # fmt: skip
"""What whom to ask depends on."""
WRITTEN = (
    "pair_id", "prompt_id", "p_a", "preferred", "outcome", "route", "route_reason", "inclusion_probability", "reviewed",
)  # fmt: skip
"""What was decided, as it is written."""
ABOUT = ("pair_id", "prompt_offset", "offset_a", "offset_b", "model_a", "model_b", "tags", "margin")
"""What is written beside it, whatever is decided."""


class Gathered:
    """``pairs``: the candidates to decide on (columns ``DECIDED``); ``said``: what each seat said of them; ``tags``: of
    their prompts (prompt_id, tags), where there are any. Of all candidates: ``outcomes``, of those that are not in
    ``pairs`` too (``aside``), how many were ``judged``, and ``contradicted`` by the other order; ``classed``: whether
    any prompt has a class. ``without_pair``: prompts that have answers and no candidate. ``policies``: who answered."""

    pairs: pl.DataFrame
    said: pl.DataFrame
    tags: pl.DataFrame
    policies: list[str]

    def __init__(self, folder: Path, parts: int) -> None:
        self.parts = parts
        self.outcomes, self.aside = Counter[str](), Counter[str]()
        self.judged = self.contradicted = self.without_pair = 0
        self.classed = False
        self._rows, self._about = Pieces(folder), Pieces(folder)

    def describe(self, pairs: pl.DataFrame) -> None:
        """Keep what is known of ``pairs`` beside what is decided of them. Columns: ``ABOUT``."""
        self._by_id(self._about, pairs.select(ABOUT))

    def decide(self, pairs: pl.DataFrame) -> None:
        """Keep what was decided of ``pairs``. Columns: ``WRITTEN``."""
        self._by_id(self._rows, pairs.select(WRITTEN))

    def _by_id(self, pieces: Pieces, pairs: pl.DataFrame) -> None:
        part = pl.col("pair_id").str.head(4).str.to_integer(base=16) * self.parts // 16**4
        pieces.add_by(part, pairs)

    def in_order(self, rows: int) -> Iterator[pl.DataFrame]:
        """All pairs by their id, as many at once as ``rows``; at least one frame. Columns: ``WRITTEN``, ``ABOUT``."""
        left: pl.DataFrame | None = None
        for part in range(self.parts):
            own = self._rows.read(part).join(self._about.read(part), on="pair_id").sort("pair_id")
            left = own if left is None else pl.concat([left, own])
            whole = left.height // rows * rows
            for start in range(0, whole, rows):
                yield left.slice(start, rows)
            left = left.slice(whole)
        if left is not None and (left.height or not self.outcomes):
            yield left


def gather(rounds: Rounds, candidates: Pieces, labels: pl.DataFrame) -> Gathered:
    """What is known of ``candidates``, as the rounds settled them. ``labels``: of people, by pair_id."""
    found = Gathered(rounds.run.path, rounds.number)
    pairs, said, tags, policies = [], [], [], []
    here = pl.col("kept") | pl.col("pair_id").is_in(labels["pair_id"].implode())
    for part in rounds:
        own = _with_ids(candidates.read(part.number), part)
        told, kinds = rounds.said(part.number, own)
        own = balance.with_classes(own, part.prompts.select("prompt_id", "tags"), kinds)
        own = route.suspicions(own, told, part.answers)
        found.describe(own)
        rest = own.filter(~here)
        found.decide(route.dropped(rest).with_columns(reviewed=False))
        judged = own.filter(pl.col("p_a").is_not_null())
        found.judged += judged.height
        found.contradicted += judged.filter((pl.col("p_ab") - 0.5) * (pl.col("p_ba") - 0.5) < 0).height
        found.without_pair += part.answers["prompt_id"].n_unique() - own["prompt_id"].n_unique()
        found.outcomes.update(own["outcome"].to_list())
        found.aside.update(rest["outcome"].to_list())
        found.classed |= not own["prompt_class"].is_null().all()
        own = own.filter(here).select(DECIDED)
        pairs.append(own)
        said.append(_of_these(told, own) if labels.height >= calibrate.MIN_LABELS else told.clear())
        tags.append(part.prompts.filter(pl.col("tags").list.len() > 0).join(own, on="prompt_id", how="semi"))
        policies.append(part.answers["model"].unique())
    found.pairs = pl.concat(pairs)
    found.said = pl.concat(said)
    found.tags = pl.concat(tags).select("prompt_id", "tags")
    found.policies = pl.concat(policies).unique().sort().to_list()
    return found


def _of_these(told: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """What was ``told`` of ``pairs``, and one row of each seat whatever it is of: a seat that spoke of none of them is
    one of the panel all the same."""
    these = told.with_columns(first=pl.int_range(pl.len()).over("seat") == 0).join(
        pairs.select("a", "b", these=True), on=["a", "b"], how="left", maintain_order="left"
    )
    return these.filter(pl.col("first") | pl.col("these").is_not_null()).select(told.columns)


def pair_id(a: str, b: str) -> str:
    """The id of the pair of completions ``a`` and ``b``, in whichever order: 16 hex digits."""
    return key_of(pair=sorted((a, b)))[:16]


def _with_ids(candidates: pl.DataFrame, part: Part) -> pl.DataFrame:
    """``candidates`` with pair_id, for which the halves of their keys are put together, and with ``ABOUT``."""
    for side in ("a", "b"):
        answers = part.answers.select(
            pl.col("key").alias(side), pl.col("rest", "offset", "model").name.suffix(f"_{side}")
        )
        candidates = candidates.join(answers, on=side, how="left", maintain_order="left")
    keys = candidates.select("a", "rest_a", "b", "rest_b").iter_rows()
    ids = [pair_id(f"{a:032x}{rest_a:032x}", f"{b:032x}{rest_b:032x}") for a, rest_a, b, rest_b in keys]
    return candidates.join(part.prompts, on="prompt_id", how="left", maintain_order="left").with_columns(
        pl.Series("pair_id", ids, dtype=pl.String), margin=pl.col("score_a") - pl.col("score_b")
    )
