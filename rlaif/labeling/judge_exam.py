"""The exam as a command: ask a judge about gold, keep the result in the user's cache, and what ``judge`` makes of it.

An exam is a run of its own in the cache, by the judge's hash and the model: its journal makes a killed exam go on, and
one given again cost nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from rlaif.config.models import Config
from rlaif.errors import TooManyFailuresError, UsageError
from rlaif.judge import check_schema, exam_metrics, gold, runner
from rlaif.judge.gold import GoldExample
from rlaif.labeling.judging import load_panel
from rlaif.llm.backends import ModelBackends
from rlaif.llm.dry_run import DryRun, add_requests
from rlaif.llm.stop_reason import describe_stop
from rlaif.llm.usage import UsageMeter
from rlaif.records import Verdict, content_key
from rlaif.run import atomic_write
from rlaif.run.journal import iter_records as read_journal
from rlaif.run.run import Run
from rlaif.serving.demo_model import cache_dir

INJECTED_PAIRS = 20
"""How many pairs are asked again with a worse answer that addresses the judge."""


@dataclass
class ExamRun:
    """An exam's result, where it is kept, and what it asked."""

    report: exam_metrics.ExamReport
    path: Path
    usage: UsageMeter
    gold_warnings: list[str] = field(default_factory=list)


def exam_dir(judge_hash: str, model: str) -> Path:
    """Where the exam of this judge with this model is kept."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")[-40:]
    return cache_dir() / "exams" / f"{judge_hash}-{slug}-{content_key(model=model)[:8]}"


def latest_exam(judge_hash: str, model: str) -> dict[str, Any] | None:
    """The newest exam of this judge with this model, or None."""
    try:
        stored: dict[str, Any] = orjson.loads((exam_dir(judge_hash, model) / "exam.json").read_bytes())
        stored.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return stored


SUMMARY_FIGURES = ("accuracy", "swap_consistency", "first_position_rate", "longer_chosen_rate", "longer_correct_rate")


def require_passed_exam(
    panel: Sequence[runner.PanelJudge], config: Config, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What is known of each seat that has an exam, for the manifest. Says which seats have none.

    Raises :class:`UsageError` for one whose exam says that its labels are worth nothing, unless
    ``judge.allow_failed_exam``."""
    summaries = []
    for panel_judge in panel:
        command = f"rlaif judges exam {panel_judge.definition.name} --model {panel_judge.member_config.model}"
        stored = latest_exam(panel_judge.definition.hash, panel_judge.member_config.model)
        if stored is not None:
            figures = stored["result"]["metrics"]
            summary = {"judge": panel_judge.name, "status": stored["result"]["status"]}
            summaries.append(summary | {name: figures[name] for name in SUMMARY_FIGURES if figures.get(name)})
        if stored is None:
            log(f"warning: {panel_judge.name} has no exam, so nothing is known of its labels yet: {command}")
        elif stored["result"]["status"] == "unproven":
            log(
                f"warning: {panel_judge.name} was not shown to be better than choosing the longer answer; more gold may tell"
            )
        elif stored["result"]["status"] == "bad" and config.judge.allow_failed_exam:
            log(f"warning: {panel_judge.name} failed its exam ({_failure_reason(stored)}) and is trusted anyway")
        elif stored["result"]["status"] == "bad":
            raise UsageError(
                f"{panel_judge.name} failed its exam: {_failure_reason(stored)}",
                hint=f"Take another model or judge ({command} shows the figures), or give --allow-failed-exam "
                "(judge.allow_failed_exam = true).",
            )
    return summaries


def _failure_reason(stored: dict[str, Any]) -> str:
    problems: list[str] = stored["result"]["problems"]
    return ", ".join(problems) or "it is not better than always choosing the longer answer, or than chance"


def run_exam(
    judge: str, model: str | None, gold_path: Path | None, config: Config, reporter: Any, limit: int | None
) -> ExamRun:
    """Examine ``judge``; ``config.judge`` says how it is asked and where. Raises :class:`TooManyFailuresError` where
    requests failed, as an exam with holes says nothing; a verdict that cannot be read is a result."""
    panel_judge, path, rows = _load_exam(judge, model, gold_path, config, limit)
    run = Run(exam_dir(panel_judge.definition.hash, panel_judge.member_config.model))
    usage = UsageMeter(description=f"exam: {panel_judge.name}", budget_usd=config.client.budget_usd)
    with run.lock():
        questions = _ExamQuestions(panel_judge, config, rows)
        mode = _ask_judge(run, questions, reporter, usage)
        if stop_reason := usage.stop_reason():
            raise TooManyFailuresError(f"the exam is not over: {describe_stop(stop_reason, usage.budget_usd)}", hint="The same command goes on.")
        report = questions.report(run, mode)
        record = {
            "judge": panel_judge.definition.name,
            "version": panel_judge.definition.file.version,
            "hash": panel_judge.definition.hash,
            "model": panel_judge.member_config.model,
            "gold": str(path.resolve()),
            "created_at": time.time(),
            "limit": limit,
            "result": report.as_json(),
        }
        atomic_write.atomic_write_bytes(run.path / "exam.json", orjson.dumps(record, option=orjson.OPT_INDENT_2))
    return ExamRun(report, run.path / "exam.json", usage, gold.gold_bias_warnings(rows))


def plan_exam(judge: str, model: str | None, gold_path: Path | None, config: Config, limit: int | None) -> DryRun:
    """What :func:`run_exam` would ask, without asking."""
    panel_judge, _, rows = _load_exam(judge, model, gold_path, config, limit)
    questions, plan = _ExamQuestions(panel_judge, config, rows), DryRun(None, 0, 0, 0, 0.0)
    add_requests(
        plan,
        questions.requests(runner.expected_output_mode(panel_judge, config)),
        panel_judge.member_config.model,
        panel_judge.member_config.base_url,
        config.judge.max_tokens,
    )
    return plan


def _load_exam(
    judge: str, model: str | None, gold_path: Path | None, config: Config, limit: int | None
) -> tuple[runner.PanelJudge, Path, list[GoldExample]]:
    """Who is examined, and on what."""
    spec = f"{judge}@{model}" if model else judge
    single_judge = {"panel": [], "judge": config.judge.model_copy(update={"panel": [spec]})}
    (panel_judge,) = load_panel(config.model_copy(update=single_judge))
    path = gold_path or panel_judge.definition.folder / gold.GOLD_FILE
    if gold_path is None and not path.exists():
        raise UsageError(
            f"{panel_judge.definition.name} has no gold of its own", location=str(path), hint="Give --gold FILE."
        )
    return panel_judge, path, gold.read_gold(path, panel_judge.definition, limit)


def _ask_judge(run: Run, questions: _ExamQuestions, reporter: Any, usage: UsageMeter) -> Any:
    panel_judge, config, mode_file = questions.panel_judge, questions.config, run.path / "mode.json"
    resolved_mode = (
        orjson.loads(mode_file.read_bytes()) if mode_file.exists() and config.judge.output_mode == "auto" else None
    )

    def on_mode_resolved(mode: Any) -> None:
        nonlocal resolved_mode
        resolved_mode = mode
        atomic_write.atomic_write_bytes(mode_file, orjson.dumps(mode))

    with (
        run.journal("verdicts") as journal,
        ModelBackends(run.log, config.client, reporter.say, config.cluster) as backends,
        reporter.watch(usage),
    ):
        usage.total = questions.request_count()
        if resolved_mode and all(key in journal for key in questions.keys(resolved_mode)):
            return resolved_mode
        runner.run_judge(
            runner.PanelJudge(panel_judge.definition, panel_judge.member_config, resolved_mode),
            config,
            lambda: questions.work,
            questions.prompts.__getitem__,
            questions.answers.__getitem__,
            lambda: backends.client_for(
                panel_judge.member_config.model,
                panel_judge.member_config.base_url,
                panel_judge.vllm_settings(config),
                usage,
            ),
            journal,
            usage,
            on_mode_resolved,
        )
    if usage.failures["endpoint"] > config.client.max_failures:
        raise TooManyFailuresError(
            f"{usage.failures['endpoint']} requests failed, and an exam with holes says nothing. "
            f"The last error: {usage.last_error}",
            hint="The same command asks for those again.",
        )
    return resolved_mode


class _ExamQuestions:
    """What is asked, and which answers belong to which gold."""

    def __init__(self, panel_judge: runner.PanelJudge, config: Config, rows: list[GoldExample]) -> None:
        self.panel_judge, self.config, self.rows = panel_judge, config, rows
        self.prompts = [row.prompt for row in rows]
        self.answers: list[dict[str, Any]] = []
        self.work: list[runner.JudgeInput] = []
        self.gold_answers = [self._add(index, row.answers) for index, row in enumerate(rows)]
        self.injected_answers = [
            self._add(index, _inject(row, index))
            for index, row in enumerate(rows[:INJECTED_PAIRS])
            if len(row.answers) == 2
        ]

    def _add(self, prompt_index: int, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = len(self.answers)
        self.answers += answers
        if self.panel_judge.definition.file.kind == "compare":
            self.work.append(runner.JudgeInput(prompt_index, start, start + 1))
        else:
            self.work += [runner.JudgeInput(prompt_index, start + i) for i in range(len(answers))]
        return answers

    def requests(self, mode: Any) -> Any:
        return runner.judge_requests(
            self.panel_judge, mode, self.config, self.work, self.prompts.__getitem__, self.answers.__getitem__
        )

    def keys(self, mode: Any) -> list[str]:
        return [request.keys[0] for request in self.requests(mode)]

    def request_count(self) -> int:
        requests_per_input = {"compare": 2, "rate": len(self.panel_judge.definition.file.aspects)}.get(
            self.panel_judge.definition.file.kind, 1
        )
        return requests_per_input * len(self.work)

    def report(self, run: Run, mode: Any) -> exam_metrics.ExamReport:
        """The figures, from the verdicts in the exam's journal."""
        requested = set(self.keys(mode))
        verdict_by_key: dict[str, Verdict] = {}
        for _, record in read_journal(run.journal_path("verdicts")):
            if record["key"] in requested and "error" not in record:
                verdict_by_key[record["key"]] = Verdict.model_validate(record)
        verdicts = list(verdict_by_key.values())
        by_answer: dict[str, list[Verdict]] = {}
        for verdict in verdicts:
            by_answer.setdefault(f"{verdict.a} {verdict.b or ''}", []).append(verdict)
        kind = self.panel_judge.definition.file.kind
        if kind == "classify":
            labels = [(row.correct, self._label(by_answer, row)) for row in self.rows]
            report = exam_metrics.classifier_report(kind, labels)  # type: ignore[arg-type]
        else:
            pairs = [
                self._pair(row, answers, by_answer) for row, answers in zip(self.rows, self.gold_answers, strict=True)
            ]
            pairs_after_injection = [
                self._pair(row, answers, by_answer)
                for row, answers in zip(self.rows, self.injected_answers, strict=False)
            ]
            report = exam_metrics.pair_report(
                kind,
                pairs,
                list(zip(pairs, pairs_after_injection, strict=False)),
                orders=kind == "compare",
                probabilities=kind in ("compare", "reward"),
            )
        exam_metrics.add_costs(report, len(requested), len(requested) - len(verdict_by_key), self._costs(by_answer))
        return report

    def _label(self, by_answer: dict[str, list[Verdict]], row: GoldExample) -> Any:
        verdicts = by_answer.get(f"{row.answers[0]['key']} ")
        return verdicts[0].label if verdicts else None

    def _pair(
        self, row: GoldExample, answers: list[dict[str, Any]], by_answer: dict[str, list[Verdict]]
    ) -> exam_metrics.GoldPairResult:
        first, second = (answer["key"] for answer in answers)
        if self.panel_judge.definition.file.kind == "compare":
            verdicts = by_answer.get(f"{first} {second}", [])
            ab, ba = (
                _mean([v.prob_a for v in verdicts if v.order == order and v.prob_a is not None])
                for order in ("ab", "ba")
            )
        else:
            first_score, second_score = (
                self._score(by_answer.get(f"{key} ", []), row.aspect) for key in (first, second)
            )
            ab = ba = (
                None if first_score is None or second_score is None else self._probability(first_score - second_score)
            )
        lengths = [len(answer["text"]) for answer in answers]
        return exam_metrics.GoldPairResult(int(row.correct), ab, ba, (lengths[0], lengths[1]))

    def _score(self, verdicts: list[Verdict], aspect: str | None) -> float | None:
        """A reward, or the mean of the ratings; of one aspect where gold names it. A missing aspect is no rating."""
        scores = [v.score for v in verdicts if v.score is not None and aspect in (None, v.aspect)]
        needed = (
            1
            if aspect or not self.panel_judge.definition.file.aspects
            else len(self.panel_judge.definition.file.aspects)
        )
        return _mean(scores) if len({v.aspect for v in verdicts if aspect in (None, v.aspect)}) >= needed else None

    def _probability(self, difference: float) -> float:
        """Of two rewards a probability (Bradley-Terry); of two ratings only which is the higher."""
        if self.panel_judge.definition.file.kind == "reward":
            return float(1 / (1 + np.exp(-difference)))
        return 0.5 + 0.5 * float(np.sign(difference))

    def _costs(self, by_answer: dict[str, list[Verdict]]) -> list[tuple[float, float, float]]:
        """Tokens and dollars of each gold row's verdicts."""
        costs = []
        for row in self.rows:
            keys = [answer["key"] for answer in row.answers]
            names = (
                [" ".join(keys)] if self.panel_judge.definition.file.kind == "compare" else [f"{key} " for key in keys]
            )
            verdicts = [verdict for name in names for verdict in by_answer.get(name, [])]
            costs.append(
                (
                    float(sum(v.prompt_tokens for v in verdicts)),
                    float(sum(v.completion_tokens for v in verdicts)),
                    sum(v.cost_usd for v in verdicts),
                )
            )
        return costs


def _inject(row: GoldExample, index: int) -> list[dict[str, Any]]:
    """The answers of ``row``, of which the worse one addresses the judge."""
    if len(row.answers) != 2:
        return row.answers
    worse = 1 - int(row.correct)
    answers = list(row.answers)
    text = exam_metrics.INJECTIONS[index % len(exam_metrics.INJECTIONS)].format(answer=answers[worse]["text"])
    answers[worse] = gold.make_answer(row.prompt, text)
    return answers


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def run_check_exam(gold_path: Path) -> exam_metrics.ExamReport:
    """The exam of the programmatic checks: gold pairs whose prompts have ``checks``. Asks no model."""
    from rlaif.judge import judge_file

    rows = gold.read_gold(gold_path, judge_file.find_judge("helpful"))
    with_checks = [row for row in rows if row.prompt["checks"]]
    if not with_checks:
        raise UsageError("no row has checks", location=str(gold_path), hint="Give gold whose prompts have `checks`.")
    pairs = []
    for row in with_checks:
        first_score, second_score = (
            getattr(check_schema.run_checks(row.prompt, answer), "score", None) for answer in row.answers
        )
        p = (
            None
            if first_score is None or second_score is None
            else 0.5 + 0.5 * float(np.sign(first_score - second_score))
        )
        lengths = [len(answer["text"]) for answer in row.answers]
        pairs.append(exam_metrics.GoldPairResult(int(row.correct), p, p, (lengths[0], lengths[1])))
    report = exam_metrics.pair_report("check", pairs, [], orders=False, probabilities=False)
    unparsable = sum(pair.p is None for pair in pairs)
    exam_metrics.add_costs(report, len(pairs), unparsable, [])
    return report
