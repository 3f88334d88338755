"""Everything that the morning page says, as one JSON value: what ``rlaif report --json`` prints and page.py draws.

Reads the run and writes nothing. What was not measured is null, and ``unmeasured`` says why, so that a page never
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
from rlaif.identity import trained_name
from rlaif.report import facts, verdict
from rlaif.run.directory import Run
from rlaif.stats import Estimate

ROUNDS = 20
NIGHT = "run"
"""The stage of a whole night: its time and dollars are those of the stages inside it."""
METER = ("requests", "answers", "retries", "prompt_tokens", "cached_tokens", "completion_tokens", "usd")


def gather(run: Run, *, samples: bool = True) -> dict[str, Any]:
    """The report's facts. Raises :class:`rlaif.errors.RunError` for a manifest or journal that cannot be read."""
    manifest = run.manifest()
    stages: dict[str, Any] = manifest["stages"]
    status = facts.of(run)
    told: dict[str, Any] = {
        "run": run.path.resolve().name,
        "path": str(run.path),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": rlaif.__version__,
        "status": status,
        "asked": _asked(stages),
        "stages": [_stage(name, stage) for name, stage in stages.items() if name != NIGHT],
        "night": (stages.get(NIGHT, {}).get("history") or [{}])[-1].get("how"),
        "owed": _owed(stages, status),
        "labels": None,
        "balance": None,
        "exams": None,
        "pairs": None,
        "orders": None,
        "training": training(run, stages),
        "evaluation": None,
        "outdated": None,
        "rounds": rounds(run),
        "samples": [],
        "unmeasured": {},
    }
    told["cost"] = _cost(told["stages"])
    told["evaluation"], told["outdated"] = _evaluation(run, told["training"])
    judged = stages.get("judge", {})
    for name in ("labels", "balance", "exams"):
        told[name] = judged.get(name) or None
    if run.pairs_path.exists():
        from rlaif.report import quality

        told["pairs"] = _plain(quality.pairs(run))
        seats = [(judge["hash"], judge["model"]) for judge in judged.get("judges", [])]
        told["orders"] = _plain(quality.orders(run, seats)) if run.journal_path("verdicts").exists() else []
        if samples:
            told["samples"] = _samples(run, quality.samples(run))
    told["unmeasured"] = _unmeasured(told)
    told["verdict"] = verdict.of(told)
    return told


def _asked(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say what was asked for, from the newest stage that has them."""
    asked: dict[str, Any] = {}
    for stage in ("generate", "judge", "train"):
        config = stages.get(stage, {}).get("config")
        if not config:
            continue
        if stage == "generate":
            names = [policy["model"] for policy in config["policies"]] or config["sampler"]["model"]
            asked["policies"] = names
            asked["prompts"] = config["prompts"]["source"]
            asked["answers a prompt"] = config["sampler"]["n"]
            asked["temperature"] = config["sampler"]["temperature"]
        elif stage == "judge":
            judges = stages[stage].get("judges", [])
            asked["judges"] = [f"{judge['name']} version {judge['version']}, {judge['model']}" for judge in judges]
            asked["strategy"] = stages[stage].get("strategy")
            asked["share for people"] = config["pairs"]["human_share"]
        else:
            how = f"{config['train']['method']}, {'LoRA' if config['train']['lora'] else 'all weights'}"
            own = asked.get("seed", config["seed"]) != config["seed"]  # a training may have a seed of its own
            asked["training"] = how + (f", seed {config['seed']}" if own else "")
            continue
        asked["seed"] = config["seed"]
    return {name: value for name, value in asked.items() if value not in (None, [])}


def _owed(stages: Mapping[str, Any], status: Mapping[str, Any]) -> int:
    """How many sampled answers are missing of those that were asked for."""
    config = stages.get("generate", {}).get("config")
    if not config or "import" in stages:
        return 0
    asked: int = (status["prompts"] - status["heldout"]) * config["sampler"]["n"]
    return max(0, asked - int(status["completions"]["answers"]))


def _stage(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    starts = stage.get("history", [])
    summed = {field: sum(start.get(field) or 0 for start in starts) for field in METER}
    failures: dict[str, int] = {}
    for start in starts[-1:]:  # earlier failures were owed to, and asked by, later starts
        failures = dict(start.get("failures", {}))
    return {
        "name": name,
        "started": (starts or [stage])[0].get("started"),
        "ended": stage.get("ended"),
        "starts": len(starts) + (stage.get("ended") is None),
        "seconds": round(sum(_seconds(start) for start in starts), 1),
        "failures": failures,
        **summed,
    }


def _seconds(start: Mapping[str, Any]) -> float:
    """How long a start took by the clock, which counts the server's start too."""
    try:
        began, ended = (datetime.datetime.fromisoformat(start[name]) for name in ("started", "ended"))
    except (KeyError, TypeError, ValueError):
        return float(start.get("seconds", 0.0))
    return max((ended - began).total_seconds(), float(start.get("seconds", 0.0)))


def _cost(stages: list[dict[str, Any]]) -> dict[str, Any]:
    return {field: sum(stage[field] for stage in stages) for field in (*METER, "seconds")}


def training(run: Run, stages: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest training's settings, results and history; None where nothing was trained."""
    config = stages.get("train", {}).get("config", {}).get("train", {})
    output = Path(config["output"]) if config.get("output") else run.model
    stored = _read(output / "training.json")
    if stored is None:
        return None
    return {"output": str(output), **stored}


def _evaluation(run: Run, training: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
    """What was measured of the newest training; or None, and the name of the earlier model that was measured."""
    found = _read(run.path / "evaluation" / "evaluation.json")
    if found is None or training is None:
        return found, None
    same = found.get("trained") == trained_name(Path(training["output"]), training)
    return (found, None) if same else (None, str(found.get("trained")))


def rounds(run: Run) -> list[dict[str, Any]]:
    """This run and those that it goes on from (``[round] previous``), the first one first."""
    from rlaif import settings
    from rlaif.errors import RlaifError

    found: list[dict[str, Any]] = []
    at, seen = run, set[Path]()
    while len(found) < ROUNDS and at.path.resolve() not in seen and at.path.is_dir():
        seen.add(at.path.resolve())
        stages = at.manifest()["stages"]
        evaluation, _ = _evaluation(at, training(at, stages))
        found.append(
            {
                "run": at.path.resolve().name,
                "policies": _asked(stages).get("policies", []),
                "dataset": stages.get("judge", {}).get("pairs", {}).get("dataset", {}),
                "agreement": (stages.get("judge", {}).get("labels") or {}).get("agreement"),
                "win_rate": (evaluation or {}).get("win_rate"),
            }
        )
        try:
            previous = settings.load(at.path, {}, {}).round.previous
        except RlaifError:  # a settings file that was edited since: the history ends here, the report does not
            break
        if previous is None:
            break
        at = Run((at.path / previous).resolve())
    return found[::-1]


def _samples(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of the page, with what people said of them."""
    reviews = run.reviews()
    said: dict[str, list[str]] = {}
    for review in reviews.sort("at").iter_rows(named=True) if reviews.height else ():
        what = f"{review['preferred']} is better" if review["preferred"] else review["choice"].replace("_", " ")
        said.setdefault(review["pair_id"], []).append(f"{review['annotator']}: {what}")
    return [{**row, "people": said.get(row["pair_id"], [])} for row in rows]


def _unmeasured(told: Mapping[str, Any]) -> dict[str, str]:
    """Why a part of the page has nothing to show."""
    path = told["path"]
    reviewed = told["status"]["reviews"]["answers"]
    why = {
        "labels": f"people have labelled no pair yet: rlaif review {path}"
        if not reviewed
        else f"build the tables anew: rlaif judge {path}",
        "balance": "the judge stage did not sort prompts and answers by refusal",
        "exams": "no exam of these judges was recorded: rlaif judges exam NAME --gold FILE",
        "pairs": f"nothing was judged yet: rlaif judge {path}",
        "orders": f"nothing was judged yet: rlaif judge {path}",
        "training": f"nothing was trained yet: rlaif train {path}",
        "evaluation": f"the trained model was not compared with its reference yet: rlaif evaluate {path}",
    }
    if told["outdated"]:
        why["evaluation"] = f"what was measured is of an earlier training ({told['outdated']}): rlaif evaluate {path}"
    absent = {name for name in why if told[name] is None}
    if not verdict.estimate(told["labels"], "agreement"):
        absent.add("labels")
    return {name: reason for name, reason in why.items() if name in absent}


def _plain(value: Any) -> Any:
    """``value`` as JSON takes it."""
    if isinstance(value, Estimate):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
