"""Collect everything that the report shows. `rlaif report --json` prints it and html_report.py renders it.

Reads the run and writes nothing. A value that was not measured is None, and ``missing_reasons`` says why, so that the
page never shows a gap as a zero. Besides the facts of :mod:`rlaif.report.run_facts`, other stages leave here:

    manifest stages.judge.balance               chosen answers by class of prompt and refusal
    manifest stages.judge.unknown_answers       answers of which it is unknown whether they refuse
    manifest stages.judge.exams                 exams of the judges
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rlaif
from rlaif.report import next_step, recommendation
from rlaif.report.recommendation import Recommendation
from rlaif.report.run_facts import (
    PIPELINE_STAGE,
    RunFacts,
    StageSummary,
    collect_facts,
    find_estimate,
    load_evaluation,
    load_training,
)
from rlaif.run.run import Run
from rlaif.stats import Estimate

MAX_ITERATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Usage of all stages together. ``seconds``: by the clock."""

    seconds: float
    requests: int
    answers: int
    retries: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One run in a series of iterations."""

    run: str
    policies: list[str]
    train_pairs: int
    """Pairs in its training set"""
    agreement: Estimate | None
    win_rate: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Report(RunFacts):
    """Content of the report."""

    run: str
    """Name of the run"""
    version: str
    """Version of rlaif"""
    created_at: str
    settings: dict[str, Any]
    """Requested settings, by name"""
    last_run: str | None
    """How the last `rlaif run` ended"""
    cost: Usage
    balance: list[dict[str, Any]] | None
    """:func:`rlaif.pair.refusal_guard.refusal_table`"""
    unknown_answers: dict[str, Any] | None
    """Answers of which it is unknown whether they refuse: ``stages.judge.unknown_answers`` in the manifest"""
    exams: list[dict[str, Any]] | None
    """Exams of the judges"""
    iterations: list[Iteration]
    samples: list[dict[str, Any]]
    """Random pairs with their texts and human labels"""
    missing_reasons: dict[str, str]
    """Reason for each field that was not measured"""
    recommendation: Recommendation

    @property
    def next_step(self) -> next_step.NextStep:
        """Next step of the run."""
        return next_step.decide(self)


def collect_report(run: Run, *, samples: bool = True) -> Report:
    """Collect the report. Raises :class:`rlaif.errors.RunError` for a damaged manifest or journal."""
    stages: dict[str, Any] = run.manifest()["stages"]
    judge_stage = stages.get("judge", {})
    facts = collect_facts(run)
    balance, exams = judge_stage.get("balance") or None, judge_stage.get("exams") or None
    return Report(
        **{field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)},
        run=run.path.resolve().name,
        version=rlaif.__version__,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        settings=requested_settings(stages),
        last_run=(stages.get(PIPELINE_STAGE, {}).get("history") or [{}])[-1].get("status"),
        cost=_total_usage(facts.stages),
        balance=balance,
        unknown_answers=judge_stage.get("unknown_answers"),
        exams=exams,
        iterations=list_iterations(run),
        samples=_labeled_samples(run) if samples and facts.pairs else [],
        missing_reasons=_missing_reasons(facts, balance=balance, exams=exams),
        recommendation=recommendation.recommend(facts),
    )


def requested_settings(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were requested, each from the newest stage that has it."""
    settings: dict[str, Any] = {}
    for stage in ("generate", "judge", "train"):
        config = stages.get(stage, {}).get("config")
        if not config:
            continue
        if stage == "generate":
            names = [policy["model"] for policy in config["policies"]] or config["sampler"]["model"]
            settings["policies"] = names
            settings["prompts"] = config["prompts"]["sources"]
            settings["samples_per_prompt"] = config["sampler"]["n"]
            settings["temperature"] = config["sampler"]["temperature"]
        elif stage == "judge":
            judges = stages[stage].get("judges", [])
            settings["judges"] = [f"{judge['name']} version {judge['version']}, {judge['model']}" for judge in judges]
            settings["strategy"] = stages[stage].get("strategy")
            settings["human_fraction"] = config["pairs"]["human_fraction"]
        else:
            description = f"{config['train']['method']}, {'LoRA' if config['train']['lora'] else 'all weights'}"
            has_own_seed = settings.get("seed", config["seed"]) != config["seed"]
            settings["training"] = description + (f", seed {config['seed']}" if has_own_seed else "")
            continue
        settings["seed"] = config["seed"]
    return {name: value for name, value in settings.items() if value not in (None, [])}


def _total_usage(stages: list[StageSummary]) -> Usage:
    names = [field.name for field in dataclasses.fields(Usage)]
    return Usage(**{name: sum(getattr(stage, name) for stage in stages) for name in names})


def list_iterations(run: Run) -> list[Iteration]:
    """Return this run and the runs it continues (``[iteration] previous_run``), the first one first."""
    from rlaif.config import loader
    from rlaif.errors import RlaifError

    iterations: list[Iteration] = []
    current, visited = run, set[Any]()
    while len(iterations) < MAX_ITERATIONS and current.path.resolve() not in visited and current.path.is_dir():
        visited.add(current.path.resolve())
        iterations.append(_iteration(current))
        try:
            previous = loader.load(current.path, {}, {}).iteration.previous_run
        except RlaifError:  # settings that were edited since end the list, not the report
            break
        if previous is None:
            break
        current = Run((current.path / previous).resolve())
    return iterations[::-1]


def _iteration(run: Run) -> Iteration:
    stages = run.manifest()["stages"]
    judge_stage = stages.get("judge", {})
    evaluation, _ = load_evaluation(run, load_training(run, stages))
    return Iteration(
        run=run.path.resolve().name,
        policies=requested_settings(stages).get("policies", []),
        train_pairs=judge_stage.get("pairs", {}).get("dataset", {}).get("train", 0),
        agreement=find_estimate(judge_stage.get("labels"), "agreement"),
        win_rate=find_estimate(evaluation, "win_rate"),
    )


def _labeled_samples(run: Run) -> list[dict[str, Any]]:
    """Return sampled pairs, each with its ``human_labels`` as text."""
    from rlaif.report import judge_stats

    reviews = run.reviews()
    labels_by_pair: dict[str, list[str]] = {}
    for review in reviews.sort("created_at").iter_rows(named=True) if reviews.height else ():
        label = f"{review['preferred']} is better" if review["preferred"] else review["choice"].replace("_", " ")
        labels_by_pair.setdefault(review["pair_id"], []).append(f"{review['annotator']}: {label}")
    return [{**row, "human_labels": labels_by_pair.get(row["pair_id"], [])} for row in judge_stats.sample_pairs(run)]


def _missing_reasons(facts: RunFacts, *, balance: object, exams: object) -> dict[str, str]:
    """Return the reason for each part of the report that has nothing to show."""
    path = facts.path
    reasons: dict[str, str] = {}
    if not find_estimate(facts.labels, "agreement"):
        if (facts.labels or {}).get("reviewed"):
            reasons["labels"] = (
                "the labels of pairs drawn at random represent less than half of the kept pairs; "
                f"label the rest of the queue with `rlaif review {path}`"
            )
        elif facts.status.reviews.answers:
            reasons["labels"] = f"the new labels are not merged yet; run `rlaif review {path} --merge`"
        else:
            reasons["labels"] = f"annotators have labeled no pair yet; run `rlaif review {path}`"
    if not balance:
        reasons["balance"] = "neither prompts nor answers have a refusal class"
    if not exams:
        reasons["exams"] = "no exam of these judges is recorded; run `rlaif judges exam NAME --gold FILE`"
    if facts.pairs is None:
        reasons["pairs"] = reasons["position_stats"] = f"nothing has been judged yet; run `rlaif judge {path}`"
    if facts.training is None:
        reasons["training"] = f"nothing has been trained yet; run `rlaif train {path}`"
    if facts.stale_evaluation:
        reasons["evaluation"] = (
            f"the stored evaluation is of an earlier training ({facts.stale_evaluation}); run `rlaif evaluate {path}`"
        )
    elif facts.evaluation is None:
        reasons["evaluation"] = (
            f"the trained model has not been compared with its reference yet; run `rlaif evaluate {path}`"
        )
    return reasons
