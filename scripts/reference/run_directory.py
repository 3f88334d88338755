"""docs/reference/run-directory.md: the files of a run, the columns of its tables and the keys of its records."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from rlaif.display_names import COMPLETION_DROP_REASONS, DATASET_DROP_REASONS, PAIR_DROP_REASONS
from rlaif.evaluate.evaluation_result import EvaluationResult
from rlaif.judge.exam_metrics import ExamReport
from rlaif.labeling.build_dataset import PAIR_COLUMNS
from rlaif.llm.batch_journal import BatchJob
from rlaif.orchestrator.check_sources import SourceCheck
from rlaif.pair.dataset_writer import PROVENANCE_COLUMNS, TOOLS_COLUMN
from rlaif.records import (
    SCHEMA_VERSION,
    Completion,
    CompletionDropReason,
    DatasetDropReason,
    Failure,
    ImportRow,
    Message,
    PairDropReason,
    Prompt,
    PromptRow,
    Review,
    Verdict,
)
from rlaif.report import judge_stats
from rlaif.report.doctor import DoctorFinding
from rlaif.report.judge_stats import HistogramBin, PairStats, PositionStats
from rlaif.report.next_step import NextStep
from rlaif.report.recommendation import Recommendation
from rlaif.report.report_data import Iteration, Report, Usage
from rlaif.report.run_facts import RunFacts, StageSummary
from rlaif.report.run_status import JournalCounts, RunStatus, StageStatus
from rlaif.run import frames
from rlaif.stats import Estimate
from rlaif.train.artifacts import TrainResult
from scripts.reference.markdown import page, table

LAYOUT = """\
```
RUN/
  rlaif.toml           settings (config.md)
  manifest.json        what ran: settings, package versions, counts and results of each stage
  journal/
    prompts.jsonl      one line per prompt
    completions.jsonl  one line per answer
    verdicts.jsonl     one line per verdict of a judge
    reviews.jsonl      one line per human label
    batches.jsonl      one line per state of a batch job
  tables/
    pairs.parquet      candidate pairs with their outcome and route
  dataset/
    train.parquet      pairs to train on
    test.parquet       pairs of other prompts to test on
    README.md          dataset card
  model/               output of `rlaif train` (or `train.output`)
    training.json      settings, results and history of the training
    adapter/  merged/  weights
    checkpoints/       checkpoints of the training
  evaluation/          a run of its own: the answers and verdicts of `rlaif evaluate`
    evaluation.json    results
  report.html          `rlaif report`
  log/                 logs of `rlaif run` and of the model servers
```

The journals are the source: they are append-only, and everything else can be rebuilt from them. Copy or delete a run as
a directory. Commands that write hold `RUN/.lock`."""

PAIRS = {
    "pair_id": "ID of the pair",
    "prompt_id": "ID of the prompt",
    "prompt": "Messages of the prompt, as JSON text",
    "response_a": "First answer. It is the one with the smaller key, so the order does not depend on the input",
    "response_b": "Second answer",
    "completion_a": "Key of the first answer in completions.jsonl",
    "completion_b": "Key of the second answer in completions.jsonl",
    "prob_a": "Probability that the first answer is better; null if no verdict was readable",
    "preferred": "Preferred answer, `a` or `b`; null if undecided",
    "preferred_by_judges": "The same before human labels calibrated the judges",
    "outcome": "Result of the comparison: win, tie, inconsistent (the two orders contradict each other) or unparsable",
    "route": "Use of the pair: judge (the judges' label counts), audit or targeted (human review), dropped, "
    "or carried (not a candidate any more, but with a human label)",
    "route_reason": "Reason for the route, or for the drop, in words",
    "drop_reason": "Reason for which the route is `dropped` (see below); null otherwise",
    "inclusion_probability": "Probability with which the pair entered the review queue",
    "reviewed": "True if the pair has a human label that decides it",
    "rating_margin": "Rating of the first answer minus that of the second; null if they were not rated",
    "split": "Split of the prompt: train, or test (a group of near-duplicate prompts is in one split)",
}
DATASET = {
    "prompt": "Chat turns of the prompt",
    "chosen": "Better answer, as one assistant turn",
    "rejected": "Worse answer, as one assistant turn",
    "pair_id": "ID of the pair, as in tables/pairs.parquet",
    "prompt_id": "ID of the prompt",
    "label_source": "Source of the label: judge or human",
    "confidence": "Probability of the chosen answer according to the judges; 1 if a human label decided",
    "rating_margin": "Rating of the chosen answer minus that of the rejected one; null if it was not rated",
    "chosen_model": "Model that wrote the chosen answer; `human:NAME` if an annotator did",
    "rejected_model": "Model that wrote the rejected answer",
    "tags": "Tags of the prompt",
    "decided_by": "Decision: judges, single (one annotator), majority or adjudicated",
    "num_annotators": "Number of annotators who labeled the pair; 0 if none did",
    "tools": "Tools of the prompt, as JSON text; the column is missing if no prompt has tools",
}
MANIFEST = {
    "schema_version": f"Version of the layout of the run directory, now {SCHEMA_VERSION}",
    "stages": "Entry per stage: generate, import, judge, train, evaluate, run. Its keys follow",
    "stages.*.config": "All settings of the last start, secrets excluded",
    "stages.*.identity": "Settings that may not change on resume (generate, judge)",
    "stages.*.identity_hash": "Hash of `identity`",
    "stages.*.started, ended": "Times of the last start (ISO 8601); `ended` is null while it runs or if it was killed",
    "stages.*.packages, python": "Versions of the packages and of Python",
    "stages.*.git_commit": "Commit of the working directory",
    "stages.*.history": "Entry per start that ended: its times, requests, tokens, failures and cost",
    "stages.judge.strategy": "Strategy that was used",
    "stages.judge.judges": "Judges with version, hash, model and weight",
    "stages.judge.output_modes": "Output mode per judge",
    "stages.judge.pairs": "Counts of pairs by outcome and route, and of what was dropped",
    "stages.judge.labels": "Agreement of judges and annotators, estimated label error, and the calibration",
    "stages.judge.balance": "Chosen answers by class of prompt and refusal",
    "stages.judge.unknown_answers": "Number of answers, and of those of which it is unknown whether they refuse",
    "stages.judge.exams": "Exam results of the judges",
    "stages.run.pilot": "Measurements of the pilot",
}
TRAINING = {
    "identity": "Everything that determines the weights; a checkpoint is resumed only if it is the same",
    "result": "Result of the training (below)",
    "reversed": "Estimate of how often training followed the labels, if it is far below one half; null otherwise",
    "preflight": "Findings of the checks before the training",
    "history": "Metrics of each logged step",
}
USAGE = {
    "requests": "Requests",
    "answers": "Answers",
    "retries": "Retries",
    "prompt_tokens": "Tokens of the requests",
    "cached_tokens": "Tokens of the requests that the servers had cached",
    "completion_tokens": "Tokens of the answers",
    "cost_usd": "Cost in US dollars",
    "agreement": "Agreement of annotators and judges",
    "win_rate": "Win rate of the trained model",
}
"""Fields that mean the same in several classes."""
FIELDS: Mapping[type, Mapping[str, str]] = {
    Usage: {"seconds": "Time by the clock, in seconds"},
    Iteration: {"run": "Name of the run", "policies": "Policies"},
    StageSummary: {"name": "Name of the stage", "starts": "Number of starts"},
    PairStats: {"kept": "Pairs kept", "drop_reasons": "Dropped pairs by `drop_reason`"},
    HistogramBin: {"low": "Lower bound", "high": "Upper bound", "count": "Number of values"},
    PositionStats: {"judge": "Judge", "model": "Model"},
    Recommendation: {
        "step": "Kind of step",
        "headline": "Headline of the report",
        "severity": "Color of the headline",
        "reasons": "Reasons, as text",
        "command": "Command to run; null if there is none",
    },
    RunFacts: {
        "path": "Path of the run",
        "status": "As in `rlaif status --json`",
        "stages": "Time, usage and failures per stage",
        "labels": "As `stages.judge.labels` in the manifest",
        "pairs": "Statistics of the pairs",
        "position_stats": "Position bias per judge",
    },
    Report: {
        "created_at": "Time of the report (ISO 8601)",
        "cost": "Usage of all stages together",
        "balance": "As `stages.judge.balance` in the manifest",
        "unknown_answers": "As `stages.judge.unknown_answers` in the manifest",
        "iterations": "Runs of the series, the first one first",
        "recommendation": "Next step, as the report shows it",
    },
    DoctorFinding: {
        "level": "Result: error means that some command will fail",
        "subject": "Part that was checked",
        "message": "Finding",
        "hint": "Action that fixes it",
    },
    BatchJob: {
        "state": "State of the job",
        "journal": "Journal that the answers go to",
        "model": "Model",
        "url": "Endpoint",
        "lines": "Number of requests",
        "answered": "Number of answers",
        "created_at": "Time of the line, in seconds since 1970",
    },
    Estimate: {
        "value": "Value",
        "low": "Lower end of the 95 % interval",
        "high": "Upper end of the 95 % interval",
        "n": "Number of observations",
    },
    TrainResult: {
        "output": "Output folder",
        "adapter": "Folder of the adapter",
        "merged": "Folder of the complete model",
        "pairs": "Rows trained on",
        "steps": "Steps from the start of the training",
        "seconds": "Time of the last call, in seconds",
        "loss": "Mean loss over the last tenth of the steps",
        "accuracy_before": "Fraction of held-out pairs whose chosen answer is more likely per token, before training",
        "accuracy_after": "The same, after training",
        "moved": "Fraction of held-out pairs in which training favored the chosen answer; chance is 0.5",
        "resumed_from": "Step of the checkpoint that the last call resumed from",
    },
    ExamReport: {
        "kind": "Kind of the judge",
        "n": "Number of gold rows",
        "metrics": "Estimates by name",
        "reliability": "Bins of stated probability against observed accuracy",
        "problems": "Faults of the judge",
        "status": "good, unproven (not shown to be better than always choosing the longer answer) or bad",
    },
    EvaluationResult: {
        "reference": "Name of the reference model",
        "trained": "Name of the trained model",
        "judges": "Judges",
        "limit": "Maximum number of prompts",
        "temperature": "Sampling temperature",
        "top_p": "Nucleus sampling",
        "max_tokens": "Maximum tokens per answer",
        "seed": "Seed",
        "prompts": "Prompts that both models answered",
        "wins": "Prompts on which the trained model's answer is better",
        "ties": "Prompts without a better answer",
        "losses": "Prompts on which the reference's answer is better",
        "identical_answers": "Prompts on which both answers are equal",
        "incomplete_reference": "Prompts whose answer by the reference is not complete; they are in no other figure",
        "incomplete_trained": "The same for the trained model",
        "unparsable_verdicts": "Prompts without a readable verdict of every judge in both orders",
        "win_rate": "Wins plus half of the ties, as a fraction",
        "length_controlled_win_rate": "Win rate at equal length",
        "length_ratio": "Length of the trained model's answers relative to the reference's",
        "kl_per_answer": "KL divergence from the reference per answer, in nats",
        "kl_per_token": "KL divergence from the reference per token, in nats",
        "refusals": "Refusal rates of both models by class of prompt",
        "checks": "Fractions of checks passed by both models, and the gain",
        "warnings": "Warnings",
        "samples": "Prompts with both answers",
    },
}
"""Descriptions of the fields that have none in the code, or one for developers."""


def render() -> str:
    """Return the page."""
    key_header = ["key", "type", "meaning"]
    parts = [LAYOUT, "## Journals", JOURNALS]
    for name, record in (("prompts", Prompt), ("completions", Completion), ("verdicts", Verdict), ("reviews", Review)):
        parts += [f"### journal/{name}.jsonl", _summary(record), table(key_header, _fields(record))]
        if record is Prompt:
            parts += ["Each message:", table(key_header, _fields(Message))]
    parts += ["### Failures", "A line of any journal with `error` is a failure. " + _summary(Failure)]
    parts += [table(key_header, _fields(Failure)), "### journal/batches.jsonl", _summary(BatchJob)]
    parts += [table(key_header, _fields(BatchJob)), "## Tables", "### tables/pairs.parquet"]
    parts.append(table(["column", "meaning"], _described(PAIR_COLUMNS, PAIRS, "PAIRS")))
    parts += [
        "Values of `drop_reason`:",
        table(["reason", "meaning"], _drop_reasons(PairDropReason, PAIR_DROP_REASONS)),
    ]
    columns = ["prompt", "chosen", "rejected", *(name for name, _ in PROVENANCE_COLUMNS), TOOLS_COLUMN[0]]
    parts += ["### dataset/train.parquet and test.parquet", DATASET_NOTE]
    parts.append(table(["column", "meaning"], _described(columns, DATASET, "DATASET")))
    parts += ["Pairs of the table that are not in the dataset:"]
    parts.append(table(["reason", "meaning"], _drop_reasons(DatasetDropReason, DATASET_DROP_REASONS)))
    parts += ["Answers that are not paired:"]
    parts.append(table(["reason", "meaning"], _drop_reasons(CompletionDropReason, COMPLETION_DROP_REASONS)))
    parts += ["### Frames in Python", FRAMES_NOTE, table(["frame", "columns"], _frames())]
    parts += [
        "## JSON files",
        "### Estimates",
        "Every estimate has these keys. An estimate that was not measured is null.",
        table(key_header, _fields(Estimate)),
    ]
    parts += ["### manifest.json", table(["key", "meaning"], [(f"`{name}`", text) for name, text in MANIFEST.items()])]
    parts += ["### OUTPUT/training.json", table(["key", "meaning"], [(f"`{n}`", text) for n, text in TRAINING.items()])]
    parts += ["Keys of `result`:", table(key_header, _fields(TrainResult))]
    parts += [
        "### evaluation/evaluation.json",
        _summary(EvaluationResult),
        table(key_header, _fields(EvaluationResult)),
    ]
    parts += ["### exam.json", EXAM_NOTE, table(key_header, _fields(ExamReport))]
    parts += ["### `rlaif status --json`", _summary(RunStatus), table(key_header, _fields(RunStatus))]
    parts += ["Each of `completions`, `verdicts` and `reviews`:", table(key_header, _fields(JournalCounts))]
    parts += ["Each entry of `stages`:", table(key_header, _fields(StageStatus))]
    parts += ["Besides these, `next` is the next step of the run:", table(key_header, _fields(NextStep))]
    parts += ["### `rlaif report --json`", _summary(Report), table(key_header, _fields(Report))]
    for intro, kind in (
        ("`recommendation`:", Recommendation),
        ("Each element of `stages`:", StageSummary),
        ("`cost`:", Usage),
        ("`pairs`:", PairStats),
        ("Each bin of a histogram:", HistogramBin),
        ("Each element of `position_stats`:", PositionStats),
        ("Each element of `iterations`:", Iteration),
    ):
        parts += [intro, table(key_header, _fields(kind))]
    parts += ["### `rlaif doctor --json`", "A list of findings.", table(key_header, _fields(DoctorFinding))]
    parts += ["### `rlaif prompts check --json`", _summary(SourceCheck), table(key_header, _fields(SourceCheck))]
    parts += ["## Input files", "### Prompts", _summary(PromptRow), table(key_header, _fields(PromptRow))]
    parts += ["### Answers", _summary(ImportRow), table(key_header, _fields(ImportRow))]
    return page("The run directory", *parts)


JOURNALS = """\
One JSON object per line. A file may contain several lines with the same `key`: the newest answer counts. Keys with the
value null are omitted."""
DATASET_NOTE = "The format that TRL reads. All pairs of a prompt are in the same file."
FRAMES_NOTE = """\
`rlaif.open_run(path)` gives the journals as polars frames. Besides these columns, each has `offset`: the byte offset of
the line in its journal."""
EXAM_NOTE = "Result of `rlaif judges exam`. It is in the user's cache; the command prints the path."


def _summary(kind: type) -> str:
    """Return the first paragraph of the docstring."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")


def _described(names: Iterable[str], descriptions: Mapping[str, str], where: str) -> list[tuple[str, str]]:
    names = list(names)
    if set(names) != set(descriptions):
        raise SystemExit(f"{__file__}: {where} and the code differ in {sorted(set(names) ^ set(descriptions))}")
    return [(f"`{name}`", descriptions[name]) for name in names]


def _drop_reasons(literal: Any, texts: Mapping[Any, str]) -> list[tuple[str, str]]:
    return [(f"`{reason}`", texts[reason]) for reason in get_args(literal)]


def _fields(kind: type) -> list[tuple[str, str, str]]:
    """Return name, type and description of each field of a record or dataclass."""
    if issubclass(kind, BaseModel):
        descriptions = {name: field.description for name, field in kind.model_fields.items()}
    else:
        descriptions = {field.name: None for field in dataclasses.fields(kind)}
    # Some modules import the types of their fields for type checkers only.
    hints = get_type_hints(kind, localns=vars(judge_stats))
    documented: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        if dataclasses.is_dataclass(parent) or parent is kind:
            documented |= {**USAGE, **_attribute_docstrings(parent), **FIELDS.get(parent, {})}
    rows = []
    for name, description in descriptions.items():
        text = description or documented.get(name)
        if not text:
            hint = f"Add a docstring below the field, or describe it in {__file__}."
            raise SystemExit(f"{kind.__name__}.{name} has no description\n  hint: {hint}")
        text = re.sub(
            r":\w+:`~?([\w.]+\.)?(\w+)`", r"`\2`", text.rstrip(".").replace("None", "null").replace("``", "`")
        )
        rows.append((f"`{name}`", _type_name(hints[name]), text))
    return rows


def _attribute_docstrings(kind: type) -> dict[str, str]:
    """Return the string literals that follow the fields of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


JSON_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    Path: "string",
    dict: "object",
    Any: "any value",
    Estimate: "estimate",
    Message: "message",
}


def _type_name(annotation: Any) -> str:
    """Return the JSON type of an annotation, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f'"{value}"' for value in arguments)
    if origin in (Union, types.UnionType):
        names = [_type_name(part) for part in arguments if part is not type(None)]
        nullable = len(names) < len(arguments)
        separator = ", " if all(name.startswith('"') for name in names) else " or "
        return separator.join(names) + (" or null" if nullable else "")
    if origin is list:
        return f"list of {_type_name(arguments[0])}s".replace("values", "value").replace("anys", "any")
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(f'"{member.value}"' for member in annotation)
    return JSON_TYPES.get(origin or annotation, "object")


def _frames() -> list[tuple[str, str]]:
    names = ("prompts", "completions", "verdicts", "reviews")
    return [(f"`run.{name}()`", ", ".join(f"`{column}`" for column in getattr(frames, name.upper()))) for name in names]
