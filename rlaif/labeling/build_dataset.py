"""Write tables/pairs.parquet and dataset/ from judged candidates: route them, apply human labels, add the texts.

Routing and calibration need all pairs that :mod:`rlaif.labeling.candidate_table` gathered. Texts are read for a few
thousand rows at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson
import polars as pl

import rlaif
from rlaif.config.models import Config
from rlaif.display_names import describe_calibration, describe_unknown_answers
from rlaif.judge.runner import PanelJudge
from rlaif.labeling.candidate_table import CandidateTable, build_candidate_table
from rlaif.labeling.carried_labels import resolve_labels
from rlaif.labeling.judging import JudgingRounds
from rlaif.pair import dataset_card, dataset_writer, refusal_guard, routing
from rlaif.pair.human_calibration import Calibration, apply_human_calibration
from rlaif.pair.label_quality import describe, estimate_label_quality
from rlaif.records import LabelDropReason
from rlaif.run import frames
from rlaif.run.human_labels import human_labels
from rlaif.run.journal import JournalReader, iter_blocks
from rlaif.run.partitions import PartitionedFrames
from rlaif.run.run import Run
from rlaif.stats import Estimate

CHUNK_ROWS = 5_000
"""Pairs whose texts are in memory at once; also one row group of the table."""
PAIR_COLUMNS = (
    "pair_id", "prompt_id", "prompt", "response_a", "response_b", "completion_a", "completion_b", "prob_a", "preferred",
    "preferred_by_judges", "outcome", "route", "route_reason", "drop_reason", "inclusion_probability", "reviewed",
    "rating_margin", "split",
)  # fmt: skip
"""Columns of tables/pairs.parquet."""


@dataclass
class BuildResult:
    """Counts of the pairs and estimates of the quality of their labels."""

    candidates: int
    outcomes: dict[str, int]
    routes: dict[str, int]
    dropped_completions: dict[str, int]
    """Answers that were not paired, per reason."""
    prompts_without_pair: int
    dataset_counts: dataset_writer.DatasetCounts
    dropped_labels: dict[LabelDropReason, int]
    """Human labels that cannot be used, per reason."""
    agreement: Estimate | None
    """Agreement of judges and annotators."""
    label_quality: dict[str, Any]
    """:meth:`rlaif.pair.label_quality.LabelQuality.summary` and, under "calibration", the correction of the panel by
    human labels, one :class:`rlaif.pair.human_calibration.Calibration` per group of pairs. Each figure has its n and
    interval."""
    refusal_table: list[dict[str, str | int]]
    """Chosen answers per kind of prompt."""
    unknown_answers: dict[str, int | bool]
    """Number of answers, number of those of which it is unknown whether they refuse, and under "has_refusal_judge"
    True if the panel has a judge that classifies answers."""
    warnings: list[str] = field(default_factory=list)

    def describe_labels(self) -> list[str]:
        """Return ``label_quality`` as sentences."""
        return describe(self.label_quality) + [describe_calibration(one) for one in self.label_quality["calibration"]]

    def describe_unknown_answers(self) -> str:
        """Return ``unknown_answers`` as a sentence, or "" if there are none."""
        return describe_unknown_answers(self.unknown_answers) if self.unknown_answers["unknown"] else ""


def build_dataset(rounds: JudgingRounds, candidates: PartitionedFrames) -> BuildResult:
    """Route the candidates, aggregate them again with human labels, write tables/pairs.parquet and the dataset.

    Only the judges' verdicts decide the review queue, so new labels do not change it.
    """
    run, config = rounds.run, rounds.config
    reviews = run.reviews()
    resolved = resolve_labels(run, human_labels(reviews), reviews)
    labels = resolved.labels
    table = build_candidate_table(rounds, candidates, labels)
    pairs, calibrations = _decide_pairs(table, labels, config)
    quality = estimate_label_quality(pairs, labels, reviews, seed=config.seed)
    pairs = pairs.with_columns(reviewed=pl.col("pair_id").is_in(labels["pair_id"].implode()))
    table.add_decisions(pairs)
    carried = resolved.pairs.join(pairs, on="pair_id", how="anti", maintain_order="left")
    table.add_carried(carried)
    metadata = PartitionedFrames(run.path)
    frames.write_parquet_atomically(_add_texts(run, table.iter_sorted(CHUNK_ROWS), metadata, config), run.pairs_path)
    dataset_counts = dataset_writer.write_dataset(
        run.pairs_path,
        labels,
        metadata,
        run.dataset,
    )
    routes = Counter(_count_by(pairs, "route"))
    routes["dropped"] += table.dropped_outcomes.total()
    result = BuildResult(
        candidates=table.outcomes.total(),
        outcomes={name: table.outcomes[name] for name in ("win", "tie", "inconsistent", "unparsable")},
        routes={name: routes[name] for name in ("judge", "audit", "targeted", "dropped")}
        | ({"carried": carried.height} if carried.height else {}),
        dropped_completions=dict(rounds.records.dropped_completions),
        prompts_without_pair=table.prompts_without_pair,
        dataset_counts=dataset_counts,
        agreement=quality.agreement,
        label_quality=quality.summary() | {"calibration": [asdict(calibration) for calibration in calibrations]},
        refusal_table=refusal_guard.refusal_table(
            pl.concat([_add_winner(pairs, labels), _add_winner(_carried_candidates(carried), labels)])
        ),
        dropped_labels=dict(sorted(resolved.dropped.items())),
        unknown_answers={
            "answers": table.answer_count,
            "unknown": table.unknown_answer_count,
            "has_refusal_judge": any(judge.definition.file.kind == "classify" for judge in rounds.panel),
        },
        warnings=_label_warnings(table, pairs, rounds.panel, dataset_counts),
    )
    counts = {"outcome": result.outcomes, "route": result.routes}
    card_info = _card_info(rounds, table.policies) | {"dropped_labels": result.dropped_labels}
    dataset_card.write_card(
        run.dataset / "README.md",
        dataset_counts,
        counts,
        card_info,
        result.label_quality,
        result.refusal_table,
        result.describe_unknown_answers(),
    )
    _record_in_manifest(rounds, result)
    return result


def _decide_pairs(
    table: CandidateTable, labels: pl.DataFrame, config: Config
) -> tuple[pl.DataFrame, list[Calibration]]:
    """Return the pairs of ``table`` with their routes and final labels, and the calibrations by human labels."""
    pairs = refusal_guard.apply_refusal_guard(table.pairs, has_prompt_classes=table.has_prompt_class)
    pairs = routing.route_pairs(pairs, table.tags, human_fraction=config.pairs.human_fraction, seed=config.seed)
    pairs, calibrations = apply_human_calibration(
        pairs,
        table.votes,
        labels,
        min_confidence=config.pairs.min_confidence,
        max_tie_drop_fraction=config.pairs.max_tie_drop_fraction,
        num_judged=table.judged_prompt_count,
        num_lost=table.prompts_lost_to_ties,
        min_chosen_rating=config.pairs.min_chosen_rating,
    )
    pairs = refusal_guard.reapply_refusal_guard(pairs, has_prompt_classes=table.has_prompt_class)
    return pairs, calibrations


def _record_in_manifest(rounds: JudgingRounds, result: BuildResult) -> None:
    counts = result.dataset_counts
    rounds.run.update_manifest(
        "judge",
        strategy=rounds.strategy,
        judges=[_judge_info(judge) for judge in rounds.panel],
        pairs={
            "candidates": result.candidates,
            "outcomes": result.outcomes,
            "routes": result.routes,
            "dropped_completions": result.dropped_completions,
            "prompts_without_pair": result.prompts_without_pair,
            "dataset": {"train": counts.train, "test": counts.test, **counts.sources},
            "dropped_from_dataset": dict(counts.dropped),
            "carried_labels": counts.carried,
            "dropped_labels": result.dropped_labels,
        },
        labels=result.label_quality,
        balance=result.refusal_table,
        unknown_answers=result.unknown_answers,
    )


def _card_info(rounds: JudgingRounds, policies: list[str]) -> dict[str, Any]:
    return {
        "policies": policies,
        "judges": [f"{judge.name} (version {judge.definition.file.version})" for judge in rounds.panel],
        "judge_models": [judge.member_config.model for judge in rounds.panel],
        "strategy": rounds.strategy,
        "min_confidence": rounds.config.pairs.min_confidence,
        "human_fraction": rounds.config.pairs.human_fraction,
        "version": rlaif.__version__,
    }


def _carried_candidates(carried: pl.DataFrame) -> pl.DataFrame:
    """Return ``carried`` with the columns for :func:`rlaif.pair.refusal_guard.refusal_table`.

    This judging did not classify the answers of these pairs, so they count as unknown.
    """
    no_labels = pl.DataFrame(schema={"key": pl.String, "answer_label": pl.String})
    pairs = carried.with_columns(route=pl.lit("carried"), preferred=pl.lit(None, pl.String))
    tags = carried.select("prompt_id", "tags").unique("prompt_id")
    return refusal_guard.add_prompt_class(pairs, tags, no_labels).drop("a", "b")


def _add_winner(pairs: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """Return what :func:`rlaif.pair.refusal_guard.refusal_table` counts.

    ``winner`` is the side that the dataset prefers, or null.

    A human label overrides the judges, whose choice counts only if the pair's route is "judge".
    """
    human_winner = pl.when(pl.col("label").is_in(["a", "b"])).then("label")
    judge_winner = pl.when((pl.col("route") == "judge") & pl.col("label").is_null()).then("preferred")
    labeled_pairs = pairs.join(labels.select("pair_id", "label"), on="pair_id", how="left", maintain_order="left")
    return labeled_pairs.select(
        pl.col("prompt_class", "answer_label_a", "answer_label_b").cast(pl.String),
        winner=pl.coalesce(human_winner, judge_winner),
    )


def _count_by(frame: pl.DataFrame, column: str) -> dict[str, int]:
    return dict(frame.group_by(column).len().sort(column).iter_rows())


def _tool_columns(run: Run) -> pl.DataFrame:
    """Read the prompts that mention tools, the only ones that are parsed again.

    Columns: prompt_offset, tools (JSON text or null), has_tool_calls.
    """
    rows = []
    for start, block in iter_blocks(run.journal_path("prompts")):
        if b'"tools":[' not in block and b'"tool_calls":[' not in block:
            continue
        offset = start
        for line in block.splitlines(keepends=True):
            if b'"tools":[' in line or b'"tool_calls":[' in line:
                record = orjson.loads(line)
                tools = orjson.dumps(record["tools"]).decode() if record.get("tools") else None
                rows.append((offset, tools, any(message.get("tool_calls") for message in record["messages"])))
            offset += len(line)
    return pl.DataFrame(
        rows, schema={"prompt_offset": pl.Int64, "tools": pl.String, "has_tool_calls": pl.Boolean}, orient="row"
    )


def _add_texts(
    run: Run, chunks: Iterator[pl.DataFrame], metadata: PartitionedFrames, config: Config
) -> Iterator[pl.DataFrame]:
    """Yield each chunk with the columns of tables/pairs.parquet. rating_margin is the score of a minus the score of b.

    Adds to ``metadata``, one partition per chunk, the other columns that the dataset needs: pair_id, model_a, model_b,
    tags, tools (JSON text or null), has_tool_calls (True if a turn has tool calls).
    """
    tools = _tool_columns(run)

    def read_side(side: str, answers: JournalReader, offsets: pl.Series) -> list[pl.Series]:
        records = [(answer["text"], answer["key"]) for answer in map(answers.read_at, offsets)]
        texts, keys = zip(*records, strict=True) if records else ((), ())
        columns = {f"response_{side}": texts, f"completion_{side}": keys}
        return [pl.Series(name, values, dtype=pl.String) for name, values in columns.items()]

    with run.open_readers() as (prompts, answers):
        for partition, chunk in enumerate(chunks):
            with_tools = chunk.join(tools, on="prompt_offset", how="left", maintain_order="left")
            metadata.add(
                partition,
                with_tools.select(
                    "pair_id", "model_a", "model_b", "tags", "tools", pl.col("has_tool_calls").fill_null(False)
                ),
            )
            records = [prompts.read_at(offset) for offset in chunk["prompt_offset"]]
            conversations = [_conversation_json(record["messages"]) for record in records]
            splits = [
                dataset_writer.draw_split(
                    record.get("split_group") or record["prompt_id"], config.seed, config.pairs.test_fraction
                )
                for record in records
            ]
            yield chunk.with_columns(
                pl.Series("prompt", conversations, dtype=pl.String),
                pl.Series("split", splits, dtype=pl.String),
                *read_side("a", answers, chunk["offset_a"]),
                *read_side("b", answers, chunk["offset_b"]),
            ).select(PAIR_COLUMNS)


def _conversation_json(messages: list[dict[str, Any]]) -> str:
    """Return ``messages`` as JSON text, with tool calls in the one form that the dataset's schema allows."""
    turns = [
        turn | {"tool_calls": [_normalize_tool_call(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in messages
    ]
    return orjson.dumps(turns).decode()


def _normalize_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Convert other forms found in files: arguments as an object instead of JSON text, and a call without the
    "function" level."""
    if "function" not in call:
        call = {"function": call}
    function = {name: _to_json_text(value) for name, value in call["function"].items()}
    return {name: function if name == "function" else _to_json_text(value) for name, value in call.items()}


def _to_json_text(value: Any) -> Any:
    return orjson.dumps(value).decode() if isinstance(value, dict | list) else value


def _label_warnings(
    table: CandidateTable, pairs: pl.DataFrame, panel: list[PanelJudge], counts: dataset_writer.DatasetCounts
) -> list[str]:
    """Return warnings that a user should read before trusting these labels."""
    warnings = []
    self_judging = sorted({judge.member_config.model for judge in panel} & set(table.policies))
    if self_judging:
        warnings.append(f"{', '.join(self_judging)} judges its own answers; a judge from another model family is safer")
    if table.judged_count >= 20:
        contradicted = table.contradicted_count / table.judged_count
        if contradicted > 0.5:
            warnings.append(
                f"in {contradicted:.0%} of {table.judged_count} pairs the judges chose by position, not by content; "
                "labels of such judges are close to noise"
            )
    if counts.test and not counts.train:
        warnings.append("all pairs are in the test split: their prompts are near duplicates of each other")
    if not pairs.filter(pl.col("route") != "dropped").height:
        warnings.append("no pair was kept; drop_reason in tables/pairs.parquet gives the reasons")
    return warnings


def _judge_info(judge: PanelJudge) -> dict[str, Any]:
    return {
        "name": judge.definition.name,
        "version": judge.definition.file.version,
        "hash": judge.definition.hash,
        "model": judge.member_config.model,
        "weight": judge.member_config.weight,
    }
