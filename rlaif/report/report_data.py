"""Everything that the morning page says, as one JSON value: what ``rlaif report --json`` prints and page.py draws.

Reads the run and writes nothing. What was not measured is null, and ``missing_reasons`` says why, so that a page never
shows a gap as a zero. Other stages leave their facts where this reads them:

    manifest stages.judge.labels, .balance      agreement, error left over, calibration; refusals by kind of prompt
    manifest stages.judge.exams                 exams of the judges
    OUTPUT/training.json                        settings, results and history of a training
    RUN/evaluation/evaluation.json              what ``rlaif evaluate`` measured
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

import rlaif
from rlaif.report import recommendation, run_status
from rlaif.run.run import Run
from rlaif.run.training_output import trained_model_name
from rlaif.stats import Estimate

MAX_ITERATIONS = 20
WHOLE_RUN_STAGE = "run"
"""The stage of a whole night: its time and dollars are those of the stages inside it."""
USAGE_FIELDS = ("requests", "answers", "retries", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd")


def collect_report(run: Run, *, samples: bool = True) -> dict[str, Any]:
    """The report's facts. Raises :class:`rlaif.errors.RunError` for a manifest or journal that cannot be read."""
    manifest = run.manifest()
    stages: dict[str, Any] = manifest["stages"]
    current_status = run_status.run_status(run)
    report: dict[str, Any] = {
        "run": run.path.resolve().name,
        "path": str(run.path),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": rlaif.__version__,
        "status": current_status,
        "settings": _requested_settings(stages),
        "stages": [_stage_summary(name, stage) for name, stage in stages.items() if name != WHOLE_RUN_STAGE],
        "last_run": (stages.get(WHOLE_RUN_STAGE, {}).get("history") or [{}])[-1].get("status"),
        "missing_answers": _missing_answers(stages, current_status),
        "labels": None,
        "balance": None,
        "exams": None,
        "pairs": None,
        "position_stats": None,
        "training": load_training(run, stages),
        "evaluation": None,
        "stale_evaluation": None,
        "iterations": list_iterations(run),
        "samples": [],
        "missing_reasons": {},
    }
    report["cost"] = _total_usage(report["stages"])
    report["evaluation"], report["stale_evaluation"] = _current_evaluation(run, report["training"])
    judge_stage = stages.get("judge", {})
    for name in ("labels", "balance", "exams"):
        report[name] = judge_stage.get(name) or None
    if run.pairs_path.exists():
        from rlaif.report import judge_stats

        report["pairs"] = _to_json(judge_stats.pair_stats(run))
        judges = [(judge["hash"], judge["model"]) for judge in judge_stage.get("judges", [])]
        report["position_stats"] = (
            _to_json(judge_stats.position_stats(run, judges)) if run.journal_path("verdicts").exists() else []
        )
        if samples:
            report["samples"] = _with_human_labels(run, judge_stats.sample_pairs(run))
    report["missing_reasons"] = _why_missing(report)
    report["recommendation"] = recommendation.recommend(report)
    return report


def _requested_settings(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say what was asked for, from the newest stage that has them."""
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
            has_own_seed = (
                settings.get("seed", config["seed"]) != config["seed"]
            )  # a training may have a seed of its own
            settings["training"] = description + (f", seed {config['seed']}" if has_own_seed else "")
            continue
        settings["seed"] = config["seed"]
    return {name: value for name, value in settings.items() if value not in (None, [])}


def _missing_answers(stages: Mapping[str, Any], status: Mapping[str, Any]) -> int:
    """How many sampled answers are missing of those that were asked for."""
    config = stages.get("generate", {}).get("config")
    if not config or "import" in stages:
        return 0
    requested: int = (status["prompts"] - status["heldout"]) * config["sampler"]["n"]
    return max(0, requested - int(status["completions"]["answers"]))


def _stage_summary(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    starts = stage.get("history", [])
    summed = {field: sum(start.get(field) or 0 for start in starts) for field in USAGE_FIELDS}
    failures: dict[str, int] = {}
    for start in starts[-1:]:  # earlier failures were owed to, and asked by, later starts
        failures = dict(start.get("failures", {}))
    return {
        "name": name,
        "started": (starts or [stage])[0].get("started"),
        "ended": stage.get("ended"),
        "starts": len(starts) + (stage.get("ended") is None),
        "seconds": round(sum(_wall_seconds(start) for start in starts), 1),
        "failures": failures,
        **summed,
    }


def _wall_seconds(start: Mapping[str, Any]) -> float:
    """How long a start took by the clock, which counts the server's start too."""
    try:
        began, ended = (datetime.datetime.fromisoformat(start[name]) for name in ("started", "ended"))
    except (KeyError, TypeError, ValueError):
        return float(start.get("seconds", 0.0))
    return max((ended - began).total_seconds(), float(start.get("seconds", 0.0)))


def _total_usage(stages: list[dict[str, Any]]) -> dict[str, Any]:
    return {field: sum(stage[field] for stage in stages) for field in (*USAGE_FIELDS, "seconds")}


def load_training(run: Run, stages: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest training's settings, results and history; None where nothing was trained."""
    config = stages.get("train", {}).get("config", {}).get("train", {})
    output = Path(config["output"]) if config.get("output") else run.model
    stored = _read_json(output / "training.json")
    if stored is None:
        return None
    return {"output": str(output), **stored}


def _current_evaluation(run: Run, training: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
    """What was measured of the newest training; or None, and the name of the earlier model that was measured."""
    evaluation = _read_json(run.path / "evaluation" / "evaluation.json")
    if evaluation is None or training is None:
        return evaluation, None
    is_current = evaluation.get("trained") == trained_model_name(Path(training["output"]), training)
    return (evaluation, None) if is_current else (None, str(evaluation.get("trained")))


def list_iterations(run: Run) -> list[dict[str, Any]]:
    """This run and those that it goes on from (``[iteration] previous_run``), the first one first."""
    from rlaif.config import loader
    from rlaif.errors import RlaifError

    iterations: list[dict[str, Any]] = []
    current, visited = run, set[Path]()
    while len(iterations) < MAX_ITERATIONS and current.path.resolve() not in visited and current.path.is_dir():
        visited.add(current.path.resolve())
        stages = current.manifest()["stages"]
        evaluation, _ = _current_evaluation(current, load_training(current, stages))
        iterations.append(
            {
                "run": current.path.resolve().name,
                "policies": _requested_settings(stages).get("policies", []),
                "dataset": stages.get("judge", {}).get("pairs", {}).get("dataset", {}),
                "agreement": (stages.get("judge", {}).get("labels") or {}).get("agreement"),
                "win_rate": (evaluation or {}).get("win_rate"),
            }
        )
        try:
            previous = loader.load(current.path, {}, {}).iteration.previous_run
        except RlaifError:  # a settings file that was edited since: the history ends here, the report does not
            break
        if previous is None:
            break
        current = Run((current.path / previous).resolve())
    return iterations[::-1]


def _with_human_labels(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of the page, with what people said of them."""
    reviews = run.reviews()
    labels_by_pair: dict[str, list[str]] = {}
    for review in reviews.sort("created_at").iter_rows(named=True) if reviews.height else ():
        label = f"{review['preferred']} is better" if review["preferred"] else review["choice"].replace("_", " ")
        labels_by_pair.setdefault(review["pair_id"], []).append(f"{review['annotator']}: {label}")
    return [{**row, "human_labels": labels_by_pair.get(row["pair_id"], [])} for row in rows]


def _why_missing(report: Mapping[str, Any]) -> dict[str, str]:
    """Why a part of the page has nothing to show."""
    path = report["path"]
    reviewed = report["status"]["reviews"]["answers"]
    reasons = {
        "labels": f"people have labelled no pair yet: rlaif review {path}"
        if not reviewed
        else f"build the tables anew: rlaif judge {path}",
        "balance": "the judge stage did not sort prompts and answers by refusal",
        "exams": "no exam of these judges was recorded: rlaif judges exam NAME --gold FILE",
        "pairs": f"nothing was judged yet: rlaif judge {path}",
        "position_stats": f"nothing was judged yet: rlaif judge {path}",
        "training": f"nothing was trained yet: rlaif train {path}",
        "evaluation": f"the trained model was not compared with its reference yet: rlaif evaluate {path}",
    }
    if report["stale_evaluation"]:
        reasons["evaluation"] = (
            f"what was measured is of an earlier training ({report['stale_evaluation']}): rlaif evaluate {path}"
        )
    absent = {name for name in reasons if report[name] is None}
    if not recommendation.find_estimate(report["labels"], "agreement"):
        absent.add("labels")
    return {name: reason for name, reason in reasons.items() if name in absent}


def _to_json(value: Any) -> Any:
    """``value`` as JSON takes it."""
    if isinstance(value, Estimate):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
