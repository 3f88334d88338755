"""tables/pairs.parquet and dataset/ from settled candidates: routed, with their texts, merged with people's labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import polars as pl

import rlaif
from rlaif.config import Config
from rlaif.judge.ask import Seat
from rlaif.pair import card, merge, route, select
from rlaif.records import key_of
from rlaif.run import tables
from rlaif.run.directory import Run
from rlaif.run.journal import Reader
from rlaif.stats import Estimate, wilson

CHUNK = 20_000


@dataclass
class Built:
    candidates: int
    outcomes: dict[str, int]
    routes: dict[str, int]
    left_out: dict[str, int]
    without_pair: int
    merged: merge.Merged
    agreement: Estimate | None
    warnings: list[str] = field(default_factory=list)


def build(
    run: Run,
    config: Config,
    seats: list[Seat],
    how: select.Strategy,
    candidates: pl.DataFrame,
    answers: pl.DataFrame,
    left_out: dict[str, int],
) -> Built:
    """Route the settled candidates, write tables/pairs.parquet and the dataset."""
    prompts = tables.scan(run.journal_path("prompts"), tables.PROMPTS)
    reviews = run.reviews()
    pairs = candidates.with_columns(
        pl.Series("pair_id", [pair_id(a, b) for a, b in candidates.select("a", "b").iter_rows()], dtype=pl.String)
    )
    audited = reviews.filter(pl.col("route") == "audit").n_unique("pair_id") if reviews.height else 0
    pairs = route.route(
        pairs,
        prompts.select("prompt_id", "tags"),
        human_share=config.pairs.human_share,
        seed=config.seed,
        audited=audited,
    )
    labels = merge.human_labels(reviews)
    pairs = pairs.with_columns(reviewed=pl.col("pair_id").is_in(labels["pair_id"].implode()))
    tables.write_parquet_pieces(_with_texts(run, pairs, prompts, answers), run.pairs_path)
    merged = merge.merge(
        run.pairs_path,
        labels,
        answers.select("key", "model"),
        _tools(run, prompts),
        run.dataset,
        seed=config.seed,
        test_share=config.pairs.test_share,
    )
    outcomes = dict.fromkeys(("win", "tie", "inconsistent", "unparsed"), 0) | _counts(pairs, "outcome")
    routes = dict.fromkeys(("judge", "audit", "targeted", "dropped"), 0) | _counts(pairs, "route")
    agreement = _agreement(pairs, labels)
    names = sorted(answers["model"].unique().to_list())
    recipe = {
        "policies": names,
        "judges": [f"{seat.name} (version {seat.judge.file.version})" for seat in seats],
        "judge_models": [seat.entry.model for seat in seats],
        "strategy": how,
        "min_probability": config.pairs.min_probability,
        "human_share": config.pairs.human_share,
        "version": rlaif.__version__,
    }
    card.write(run.dataset / "README.md", merged, {"outcome": outcomes, "route": routes}, recipe, agreement)
    with_answers = answers["prompt_id"].n_unique()
    result = Built(
        candidates=pairs.height,
        outcomes=outcomes,
        routes=routes,
        left_out=left_out,
        without_pair=with_answers - pairs["prompt_id"].n_unique(),
        merged=merged,
        agreement=agreement,
        warnings=_warnings(pairs, names, seats),
    )
    run.update_manifest(
        "judge",
        strategy=how,
        judges=[named(seat) for seat in seats],
        pairs={
            "candidates": result.candidates,
            "outcomes": outcomes,
            "routes": routes,
            "completions_left_out": left_out,
            "prompts_without_pair": result.without_pair,
            "dataset": {"train": merged.train, "test": merged.test, **merged.sources},
            "dataset_left_out": dict(merged.left_out),
        },
    )
    return result


def pair_id(a: str, b: str) -> str:
    """The id of the pair of completions ``a`` and ``b``, in whichever order: 16 hex digits."""
    return key_of(pair=sorted((a, b)))[:16]


def _counts(frame: pl.DataFrame, column: str) -> dict[str, int]:
    return dict(frame.group_by(column).len().sort(column).iter_rows())


def _agreement(pairs: pl.DataFrame, labels: pl.DataFrame) -> Estimate | None:
    """How often people's preference is the judges', on audit rows alone."""
    seen = pairs.filter(pl.col("route") == "audit").join(labels, on="pair_id").filter(pl.col("label").is_in(["a", "b"]))
    return wilson(int((seen["label"] == seen["preferred"]).sum()), seen.height)


def _tools(run: Run, prompts: pl.DataFrame) -> pl.DataFrame:
    """prompt_id, tags, tools (JSON text or null), calls. Only prompts that mention tools are read a second time."""
    reader = Reader(run.journal_path("prompts"))
    try:
        found = []
        for prompt, offset in prompts.select("prompt_id", "offset").iter_rows():
            line = reader.line(offset)
            if b'"tools":[' in line or b'"tool_calls":[' in line:
                record = orjson.loads(line)
                tools = orjson.dumps(record["tools"]).decode() if record.get("tools") else None
                found.append((prompt, tools, any(message.get("tool_calls") for message in record["messages"])))
    finally:
        reader.close()
    with_tools = pl.DataFrame(
        found, schema={"prompt_id": pl.String, "tools": pl.String, "calls": pl.Boolean}, orient="row"
    )
    return prompts.select("prompt_id", "tags").join(with_tools, on="prompt_id", how="left")


def _with_texts(run: Run, pairs: pl.DataFrame, prompts: pl.DataFrame, answers: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """tables/pairs.parquet in pieces: the contract's columns, then margin (score of a less score of b)."""
    offsets = answers.select("key", "offset")
    placed = (
        pairs.join(prompts.select("prompt_id", prompt_offset="offset"), on="prompt_id", how="left")
        .join(offsets.rename({"key": "a", "offset": "a_offset"}), on="a", how="left")
        .join(offsets.rename({"key": "b", "offset": "b_offset"}), on="b", how="left")
        .sort("pair_id")
    )
    prompt_reader, reader = Reader(run.journal_path("prompts")), Reader(run.journal_path("completions"))

    def texts(read: Callable[[int], str], offsets: pl.Series) -> pl.Series:
        return pl.Series([read(offset) for offset in offsets], dtype=pl.String)

    try:
        for start in range(0, max(1, placed.height), CHUNK):
            piece = placed.slice(start, CHUNK)
            yield piece.select(
                "pair_id",
                "prompt_id",
                prompt=texts(
                    lambda at: orjson.dumps(prompt_reader.at(at)["messages"]).decode(), piece["prompt_offset"]
                ),
                response_a=texts(lambda at: str(reader.at(at)["text"]), piece["a_offset"]),
                response_b=texts(lambda at: str(reader.at(at)["text"]), piece["b_offset"]),
                completion_a="a",
                completion_b="b",
                p_a="p_a",
                preferred="preferred",
                outcome="outcome",
                route="route",
                route_reason="route_reason",
                inclusion_probability="inclusion_probability",
                reviewed="reviewed",
                margin=pl.col("score_a") - pl.col("score_b"),
            )
    finally:
        prompt_reader.close()
        reader.close()


def _warnings(pairs: pl.DataFrame, policies: list[str], seats: list[Seat]) -> list[str]:
    """What a person should know before trusting these labels."""
    warnings = []
    same = sorted({seat.entry.model for seat in seats} & set(policies))
    if same:
        warnings.append(f"{', '.join(same)} judges its own answers; a judge of another family is safer")
    judged = pairs.filter(pl.col("p_a").is_not_null())
    kept = judged.filter("kept")
    if judged.height >= 20:
        contradicted = judged.filter((pl.col("p_ab") - 0.5) * (pl.col("p_ba") - 0.5) < 0).height / judged.height
        if contradicted > 0.5:
            warnings.append(
                f"in {contradicted:.0%} of {judged.height} pairs the judges chose by position, not by content: "
                "labels of such judges are close to noise"
            )
    if not kept.height:
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
