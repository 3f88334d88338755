"""tables/pairs.parquet and dataset/ from settled candidates: routed, with their texts, merged with people's labels.

Whom to ask, and what people's labels say of the others, is decided over all that :mod:`rlaif.pipeline.gather` found
part by part; texts are read for a few thousand rows at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
import polars as pl

import rlaif
from rlaif.judge.ask import Seat
from rlaif.pair import balance, calibrate, card, merge, route, trust
from rlaif.pipeline.gather import Gathered, gather
from rlaif.pipeline.rounds import Rounds
from rlaif.run import tables
from rlaif.run.directory import Run
from rlaif.run.journal import Reader, blocks
from rlaif.run.labels import human_labels
from rlaif.run.parts import Pieces
from rlaif.stats import Estimate

CHUNK = 5_000
"""Pairs whose texts are in memory at once, and which are a row group of the table."""
COLUMNS = (
    "pair_id", "prompt_id", "prompt", "response_a", "response_b", "completion_a", "completion_b", "p_a", "preferred",
    "outcome", "route", "route_reason", "inclusion_probability", "reviewed", "margin",
)  # fmt: skip
"""Of tables/pairs.parquet."""


@dataclass
class Built:
    """``labels``: what people's labels say of all the others (:meth:`rlaif.pair.trust.Trust.facts`, and how they put
    the panel right), each figure with n and interval. ``balance``: what was chosen for which kind of prompt."""

    candidates: int
    outcomes: dict[str, int]
    routes: dict[str, int]
    left_out: dict[str, int]
    without_pair: int
    merged: merge.Merged
    agreement: Estimate | None
    labels: dict[str, Any]
    balance: list[dict[str, str | int]]
    warnings: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        return trust.in_words(self.labels)


def build(rounds: Rounds, candidates: Pieces) -> Built:
    """Route the settled candidates, settle them anew from people's labels, write tables/pairs.parquet and the dataset.

    The queue is chosen from what the judges said alone, so labels that come in do not change it.
    """
    run, config = rounds.run, rounds.config
    reviews = run.reviews()
    labels = human_labels(reviews)
    found = gather(rounds, candidates, labels)
    pairs = balance.guard(found.pairs, classed=found.classed)
    pairs = route.route(pairs, found.tags, human_share=config.pairs.human_share, seed=config.seed)
    pairs, calibration = calibrate.recalibrate(
        pairs,
        found.said,
        labels,
        min_probability=config.pairs.min_probability,
        max_near_ties=config.pairs.max_near_ties,
        judged=found.judged,
        dropped=found.aside["tie"] + found.aside["inconsistent"],
    )
    pairs = balance.guard_labels(pairs, classed=found.classed)
    facts = trust.measure(pairs, labels, reviews, seed=config.seed)
    pairs = pairs.with_columns(reviewed=pl.col("pair_id").is_in(labels["pair_id"].implode()))
    found.decide(pairs)
    about = Pieces(run.path)
    tables.write_parquet_pieces(_with_texts(run, found.in_order(CHUNK), about), run.pairs_path)
    merged = merge.merge(
        run.pairs_path,
        labels,
        about,
        run.dataset,
        seed=config.seed,
        test_share=config.pairs.test_share,
    )
    routes = Counter(_counts(pairs, "route"))
    routes["dropped"] += found.aside.total()
    result = Built(
        candidates=found.outcomes.total(),
        outcomes={name: found.outcomes[name] for name in ("win", "tie", "inconsistent", "unparsed")},
        routes={name: routes[name] for name in ("judge", "audit", "targeted", "dropped")},
        left_out=dict(rounds.left_out),
        without_pair=found.without_pair,
        merged=merged,
        agreement=facts.agreement,
        labels=facts.facts() | {"calibration": asdict(calibration) if calibration else None},
        balance=balance.table(_labelled(pairs, labels)),
        warnings=_warnings(found, pairs, rounds.seats),
    )
    counts = {"outcome": result.outcomes, "route": result.routes}
    recipe = _recipe(rounds, found.policies)
    card.write(run.dataset / "README.md", merged, counts, recipe, result.labels, result.balance)
    run.update_manifest(
        "judge",
        strategy=rounds.how,
        judges=[named(seat) for seat in rounds.seats],
        pairs={
            "candidates": result.candidates,
            "outcomes": result.outcomes,
            "routes": result.routes,
            "completions_left_out": result.left_out,
            "prompts_without_pair": result.without_pair,
            "dataset": {"train": merged.train, "test": merged.test, **merged.sources},
            "dataset_left_out": dict(merged.left_out),
        },
        labels=result.labels,
        balance=result.balance,
    )
    return result


def _recipe(rounds: Rounds, policies: list[str]) -> dict[str, Any]:
    return {
        "policies": policies,
        "judges": [f"{seat.name} (version {seat.judge.file.version})" for seat in rounds.seats],
        "judge_models": [seat.entry.model for seat in rounds.seats],
        "strategy": rounds.how,
        "min_probability": rounds.config.pairs.min_probability,
        "human_share": rounds.config.pairs.human_share,
        "version": rlaif.__version__,
    }


def _labelled(pairs: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """``pairs`` with the ``winner`` that the dataset has (null where it has none): people's, else that of judges where
    they decide."""
    by_people = pl.when(pl.col("label").is_in(["a", "b"])).then("label")
    by_judges = pl.when((pl.col("route") == "judge") & pl.col("label").is_null()).then("preferred")
    both = pairs.join(labels.select("pair_id", "label"), on="pair_id", how="left", maintain_order="left")
    return both.with_columns(winner=pl.coalesce(by_people, by_judges))


def _counts(frame: pl.DataFrame, column: str) -> dict[str, int]:
    return dict(frame.group_by(column).len().sort(column).iter_rows())


def _tools(run: Run) -> pl.DataFrame:
    """prompt_offset, tools, calls of the prompts that mention tools: only they are parsed a second time."""
    found = []
    for start, block in blocks(run.journal_path("prompts")):
        if b'"tools":[' not in block and b'"tool_calls":[' not in block:
            continue
        offset = start
        for line in block.splitlines(keepends=True):
            if b'"tools":[' in line or b'"tool_calls":[' in line:
                record = orjson.loads(line)
                tools = orjson.dumps(record["tools"]).decode() if record.get("tools") else None
                found.append((offset, tools, any(message.get("tool_calls") for message in record["messages"])))
            offset += len(line)
    return pl.DataFrame(
        found, schema={"prompt_offset": pl.Int64, "tools": pl.String, "calls": pl.Boolean}, orient="row"
    )


def _with_texts(run: Run, pieces: Iterator[pl.DataFrame], about: Pieces) -> Iterator[pl.DataFrame]:
    """tables/pairs.parquet in ``pieces``: the contract's columns, then margin (score of a less score of b). Into
    ``about`` goes, piece by piece, what the dataset says of each pair beside its texts: pair_id, model_a, model_b,
    tags, tools (JSON text or null), calls (whether a turn carries tool calls)."""
    prompts, answers = Reader(run.journal_path("prompts")), Reader(run.journal_path("completions"))
    tools = _tools(run)

    def read(side: str, offsets: pl.Series) -> list[pl.Series]:
        """The texts and keys of the answers at ``offsets``."""
        found = [(answer["text"], answer["key"]) for answer in map(answers.at, offsets)]
        texts, keys = zip(*found, strict=True) if found else ((), ())
        named = {f"response_{side}": texts, f"completion_{side}": keys}
        return [pl.Series(name, values, dtype=pl.String) for name, values in named.items()]

    try:
        for number, piece in enumerate(pieces):
            told = piece.join(tools, on="prompt_offset", how="left", maintain_order="left")
            about.add(
                number, told.select("pair_id", "model_a", "model_b", "tags", "tools", pl.col("calls").fill_null(False))
            )
            asked = [_conversation(prompts.at(offset)["messages"]) for offset in piece["prompt_offset"]]
            yield piece.with_columns(
                pl.Series("prompt", asked, dtype=pl.String),
                *read("a", piece["offset_a"]),
                *read("b", piece["offset_b"]),
            ).select(COLUMNS)
    finally:
        prompts.close()
        answers.close()


def _conversation(messages: list[dict[str, Any]]) -> str:
    """``messages`` as JSON text, their tool calls in the one form that the dataset's schema has."""
    turns = [
        turn | {"tool_calls": [_call(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]
    return orjson.dumps(turns).decode()


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Files have arguments as objects too, where the protocol has JSON text, and calls that are the function itself."""
    if "function" not in call:
        call = {"function": call}
    function = {name: _text(value) for name, value in call["function"].items()}
    return {name: function if name == "function" else _text(value) for name, value in call.items()}


def _text(value: Any) -> Any:
    return orjson.dumps(value).decode() if isinstance(value, dict | list) else value


def _warnings(found: Gathered, pairs: pl.DataFrame, seats: list[Seat]) -> list[str]:
    """What a person should know before trusting these labels."""
    warnings = []
    same = sorted({seat.entry.model for seat in seats} & set(found.policies))
    if same:
        warnings.append(f"{', '.join(same)} judges its own answers; a judge of another family is safer")
    if found.judged >= 20:
        contradicted = found.contradicted / found.judged
        if contradicted > 0.5:
            warnings.append(
                f"in {contradicted:.0%} of {found.judged} pairs the judges chose by position, not by content: "
                "labels of such judges are close to noise"
            )
    if not pairs.filter(pl.col("route") != "dropped").height:
        warnings.append("no pair was kept: see route_reason in tables/pairs.parquet for why")
    return warnings


def named(seat: Seat) -> dict[str, Any]:
    return {
        "name": seat.judge.name,
        "version": seat.judge.file.version,
        "hash": seat.judge.hash,
        "model": seat.entry.model,
        "weight": seat.entry.weight,
    }
