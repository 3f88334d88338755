"""Judge exams: ask a judge about gold pairs, store the result in the user's cache, and check it before judging.

An exam is a run directory of its own in the cache, one per judge hash and model. Its journal lets an interrupted exam
resume, and repeating an exam costs nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from rlaif.config.models import Config
from rlaif.errors import TooManyFailuresError, UsageError
from rlaif.judge import check_schema, exam_metrics, gold, judge_file, runner
from rlaif.judge.exam_metrics import ExamReport, GoldPairResult
from rlaif.judge.gold import GoldExample
from rlaif.judge.reply_parser import OutputMode
from rlaif.labeling.judging import load_panel
from rlaif.llm.backends import ModelBackends
from rlaif.llm.dry_run import DryRun, add_requests
from rlaif.llm.reporter import Reporter
from rlaif.llm.request import Request
from rlaif.llm.stop_reason import describe_stop
from rlaif.llm.usage import UsageMeter
from rlaif.records import Label, Verdict, content_key
from rlaif.run.atomic_write import atomic_write_bytes
from rlaif.run.journal import iter_records
from rlaif.run.run import Run
from rlaif.serving.demo_model import cache_dir
from rlaif.stats import Estimate

INJECTED_PAIRS = 20
"""Number of gold pairs that are asked again with a worse answer that addresses the judge."""
RESULT_FILE = "exam.json"
SUMMARY_FIGURES = ("accuracy", "swap_consistency", "first_position_rate", "longer_chosen_rate", "longer_correct_rate")
"""Metrics of an exam that the manifest and the report repeat."""


@dataclass
class ExamRun:
    """An exam's report, the path of its result file, and the usage of its requests."""

    report: ExamReport
    path: Path
    usage: UsageMeter
    gold_warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoredExam:
    """A result file: the exam of one judge with one model."""

    judge: str
    version: str
    hash: str
    model: str
    gold: str
    """Path of the gold file."""
    created_at: float
    """Seconds since the epoch."""
    limit: int | None
    """Number of gold rows asked for, or None for all."""
    result: ExamReport

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> StoredExam:
        """Rebuild the exam from :meth:`as_json`. Raises KeyError or TypeError for other values."""
        return cls(**{**stored, "result": ExamReport.from_json(stored["result"])})


@dataclass(frozen=True)
class ExamSummary:
    """The status and some metrics of an exam, as the manifest stores them."""

    judge: str
    status: str
    metrics: dict[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        figures = {name: estimate.as_dict() for name, estimate in self.metrics.items()}
        return {"judge": self.judge, "status": self.status, **figures}


def exam_dir(judge_hash: str, model: str) -> Path:
    """Return the directory of the exam of this judge with this model."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")[-40:]
    return cache_dir() / "exams" / f"{judge_hash}-{slug}-{content_key(model=model)[:8]}"


def latest_exam(judge_hash: str, model: str) -> StoredExam | None:
    """Return the last exam of this judge with this model, or None if there is none that can be read."""
    try:
        return StoredExam.from_json(orjson.loads((exam_dir(judge_hash, model) / RESULT_FILE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def require_passed_exam(
    panel: Sequence[runner.PanelJudge], config: Config, log: Callable[[str], None]
) -> list[ExamSummary]:
    """Return the exam summaries of the judges that have an exam; log a warning for those that have none.

    Raises :class:`UsageError` for a judge that failed its exam, unless ``judge.allow_failed_exam`` is set.
    """
    summaries = []
    for judge in panel:
        command = f"rlaif judges exam {judge.definition.name} --model {judge.member_config.model}"
        exam = latest_exam(judge.definition.hash, judge.member_config.model)
        if exam is None:
            log(f"warning: {judge.name} has no exam, so the quality of its labels is unknown: {command}")
            continue
        metrics = {name: value for name in SUMMARY_FIGURES if (value := exam.result.metrics.get(name))}
        summaries.append(ExamSummary(judge.name, exam.result.status, metrics))
        if exam.result.status == "unproven":
            log(
                f"warning: {judge.name} was not shown to be better than choosing the longer answer; "
                "more gold could decide it"
            )
        elif exam.result.status == "bad":
            reason = (
                ", ".join(exam.result.problems) or "not better than always choosing the longer answer, or than chance"
            )
            if not config.judge.allow_failed_exam:
                raise UsageError(
                    f"{judge.name} failed its exam: {reason}",
                    hint=f"Use another model or judge (`{command}` shows the figures), or pass `--allow-failed-exam`.",
                )
            log(f"warning: {judge.name} failed its exam ({reason}) and is used anyway")
    return summaries


def run_exam(
    judge: str, model: str | None, gold_path: Path | None, config: Config, reporter: Reporter, limit: int | None
) -> ExamRun:
    """Ask ``judge`` about gold and store the result. ``limit``: only the first gold rows.

    An unparsable verdict is a result. Raises :class:`TooManyFailuresError` if a limit stopped the exam or if more
    requests failed than ``client.max_failures`` allows.
    """
    panel_judge, path, examples = _load_exam(judge, model, gold_path, config, limit)
    run = Run(exam_dir(panel_judge.definition.hash, panel_judge.member_config.model))
    usage = UsageMeter(description=f"exam: {panel_judge.name}", budget_usd=config.client.budget_usd)
    with run.lock():
        questions = _ExamQuestions(panel_judge, config, examples)
        mode = _ask_judge(run, questions, reporter, usage)
        stop_reason = usage.stop_reason()
        if stop_reason or mode is None:
            reason = describe_stop(stop_reason, usage.budget_usd) if stop_reason else "no request was sent"
            raise TooManyFailuresError(
                f"the exam is incomplete: {reason}", hint="Run the same command again; it resumes."
            )
        report = _ExamVerdicts(questions, mode, run).report()
        stored = StoredExam(
            judge=panel_judge.definition.name,
            version=panel_judge.definition.file.version,
            hash=panel_judge.definition.hash,
            model=panel_judge.member_config.model,
            gold=str(path.resolve()),
            created_at=time.time(),
            limit=limit,
            result=report,
        )
        atomic_write_bytes(run.path / RESULT_FILE, orjson.dumps(stored.as_json(), option=orjson.OPT_INDENT_2))
    return ExamRun(report, run.path / RESULT_FILE, usage, gold.gold_bias_warnings(examples))


def plan_exam(judge: str, model: str | None, gold_path: Path | None, config: Config, limit: int | None) -> DryRun:
    """Return the requests that :func:`run_exam` would send, without sending any."""
    panel_judge, _, examples = _load_exam(judge, model, gold_path, config, limit)
    questions, plan = _ExamQuestions(panel_judge, config, examples), DryRun(None, 0, 0, 0, 0.0)
    add_requests(
        plan,
        questions.requests(runner.expected_output_mode(panel_judge, config)),
        panel_judge.member_config.model,
        panel_judge.member_config.base_url,
        config.judge.max_tokens,
    )
    return plan


def run_check_exam(gold_path: Path) -> ExamReport:
    """Examine the programmatic checks on gold pairs whose prompts have ``checks``. Asks no model.

    Raises :class:`UsageError` if no row has checks.
    """
    rows = gold.read_gold(gold_path, judge_file.find_judge("helpful"))
    with_checks = [row for row in rows if row.prompt["checks"]]
    if not with_checks:
        raise UsageError("no row has checks", location=str(gold_path), hint="Add `checks` to the rows.")
    pairs = []
    for row in with_checks:
        scores = [getattr(check_schema.run_checks(row.prompt, answer), "score", None) for answer in row.answers]
        p = _higher_score(*scores)
        pairs.append(GoldPairResult(int(row.correct), p, p, _lengths(row.answers)))
    report = exam_metrics.pair_report("check", pairs, [], orders=False, probabilities=False)
    exam_metrics.add_costs(report, len(pairs), sum(pair.p is None for pair in pairs), [])
    return report


def _load_exam(
    judge: str, model: str | None, gold_path: Path | None, config: Config, limit: int | None
) -> tuple[runner.PanelJudge, Path, list[GoldExample]]:
    """Return the judge, the path of its gold, and the gold. Raises :class:`UsageError` if gold is missing."""
    spec = f"{judge}@{model}" if model else judge
    single_judge = {"panel": [], "judge": config.judge.model_copy(update={"panel": [spec]})}
    (panel_judge,) = load_panel(config.model_copy(update=single_judge))
    path = gold_path or panel_judge.definition.folder / gold.GOLD_FILE
    if gold_path is None and not path.exists():
        raise UsageError(
            f"judge {panel_judge.definition.name!r} has no gold file", location=str(path), hint="Pass `--gold FILE`."
        )
    return panel_judge, path, gold.read_gold(path, panel_judge.definition, limit)


def _ask_judge(run: Run, questions: _ExamQuestions, reporter: Reporter, usage: UsageMeter) -> OutputMode | None:
    """Ask the pending questions and return the output mode used. The mode is kept beside the journal, so that a resumed
    exam asks in the same way."""
    judge, config, mode_file = questions.judge, questions.config, run.path / "mode.json"
    saved_mode: OutputMode | None = None
    if config.judge.output_mode == "auto" and mode_file.exists():
        saved_mode = orjson.loads(mode_file.read_bytes())

    def save_mode(mode: OutputMode) -> None:
        atomic_write_bytes(mode_file, orjson.dumps(mode))

    with (
        run.journal("verdicts") as journal,
        ModelBackends(run.log, config.client, reporter.log, config.cluster) as backends,
        reporter.progress(usage),
    ):
        mode = runner.run_judge(
            runner.PanelJudge(judge.definition, judge.member_config, saved_mode),
            config,
            lambda: questions.inputs,
            questions.prompts.__getitem__,
            questions.answers.__getitem__,
            lambda: judge.open_client(backends, config, usage),
            journal,
            usage,
            save_mode,
        )
    if usage.failures["endpoint"] > config.client.max_failures:
        raise TooManyFailuresError(
            f"{usage.failures['endpoint']} requests failed, so the exam is incomplete. Last error: {usage.last_error}",
            hint="Run the same command again; it retries them.",
        )
    return mode


class _ExamQuestions:
    """The questions of an exam. ``inputs`` refer to ``prompts`` and ``answers`` by index.

    ``gold_answers`` and ``injected_answers``: the answers asked about, per gold row.
    """

    def __init__(self, judge: runner.PanelJudge, config: Config, examples: list[GoldExample]) -> None:
        self.judge, self.config, self.examples = judge, config, examples
        self.prompts = [example.prompt for example in examples]
        self.answers: list[dict[str, Any]] = []
        self.inputs: list[runner.JudgeInput] = []
        self.gold_answers = [self._add(index, example.answers) for index, example in enumerate(examples)]
        self.injected_answers = [
            self._add(index, _inject(example, index))
            for index, example in enumerate(examples[:INJECTED_PAIRS])
            if len(example.answers) == 2
        ]

    def _add(self, prompt_index: int, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = len(self.answers)
        self.answers += answers
        if self.judge.definition.file.kind == "compare":
            self.inputs.append(runner.JudgeInput(prompt_index, start, start + 1))
        else:
            self.inputs += [runner.JudgeInput(prompt_index, start + i) for i in range(len(answers))]
        return answers

    def requests(self, mode: OutputMode) -> Iterator[Request]:
        return runner.judge_requests(
            self.judge, mode, self.config, self.inputs, self.prompts.__getitem__, self.answers.__getitem__
        )


class _ExamVerdicts:
    """The verdicts on an exam's questions, read from the journal of ``run``."""

    def __init__(self, questions: _ExamQuestions, mode: OutputMode, run: Run) -> None:
        self.questions = questions
        self.file = questions.judge.definition.file
        requested = {request.keys[0] for request in questions.requests(mode)}
        by_key: dict[str, Verdict] = {}
        for _, record in iter_records(run.journal_path("verdicts")):
            if record["key"] in requested and "error" not in record:
                by_key[record["key"]] = Verdict.model_validate(record)
        self.num_requested, self.num_answered = len(requested), len(by_key)
        self._by_answers: dict[tuple[str, str | None], list[Verdict]] = {}
        for verdict in by_key.values():
            self._by_answers.setdefault((verdict.a, verdict.b), []).append(verdict)

    def report(self) -> ExamReport:
        """Compute the metrics."""
        kind, questions = self.file.kind, self.questions
        if kind == "classify":
            labels = [(example.correct, self._label(example)) for example in questions.examples]
            report = exam_metrics.classifier_report(kind, labels)  # type: ignore[arg-type]
        else:
            pairs = [
                self._pair(example, answers)
                for example, answers in zip(questions.examples, questions.gold_answers, strict=True)
            ]
            pairs_after_injection = [
                self._pair(example, answers)
                for example, answers in zip(questions.examples, questions.injected_answers, strict=False)
            ]
            report = exam_metrics.pair_report(
                kind,
                pairs,
                list(zip(pairs, pairs_after_injection, strict=False)),
                orders=kind == "compare",
                probabilities=kind in ("compare", "reward"),
            )
        costs = [self._cost(example) for example in questions.examples]
        exam_metrics.add_costs(report, self.num_requested, self.num_requested - self.num_answered, costs)
        return report

    def _verdicts(self, a: str, b: str | None = None) -> list[Verdict]:
        return self._by_answers.get((a, b), [])

    def _label(self, example: GoldExample) -> Label | None:
        verdicts = self._verdicts(example.answers[0]["key"])
        return verdicts[0].label if verdicts else None

    def _pair(self, example: GoldExample, answers: list[dict[str, Any]]) -> GoldPairResult:
        first, second = (answer["key"] for answer in answers)
        if self.file.kind == "compare":
            verdicts = self._verdicts(first, second)
            ab, ba = (
                _mean([verdict.prob_a for verdict in verdicts if verdict.order == order]) for order in ("ab", "ba")
            )
        else:
            first_score, second_score = (self._score(key, example.aspect) for key in (first, second))
            ab = ba = self._prob_first(first_score, second_score)
        return GoldPairResult(int(example.correct), ab, ba, _lengths(answers))

    def _score(self, answer_key: str, aspect: str | None) -> float | None:
        """Return the reward or the mean rating of an answer, or None if an aspect is missing.

        ``aspect``: the only aspect that counts, if the gold row names one.
        """
        verdicts = [verdict for verdict in self._verdicts(answer_key) if aspect in (None, verdict.aspect)]
        needed = 1 if aspect else len(self.file.aspects) or 1
        if len({verdict.aspect for verdict in verdicts}) < needed:
            return None
        return _mean([verdict.score for verdict in verdicts])

    def _prob_first(self, first: float | None, second: float | None) -> float | None:
        """Return the probability that the first score's answer is better: Bradley-Terry for rewards. Two ratings only
        show which one is higher."""
        if self.file.kind == "reward" and first is not None and second is not None:
            return float(1 / (1 + np.exp(second - first)))
        return _higher_score(first, second)

    def _cost(self, example: GoldExample) -> tuple[float, float, float]:
        """Return the prompt tokens, completion tokens and US dollars of the verdicts on one gold row."""
        keys = [answer["key"] for answer in example.answers]
        pairs = [tuple(keys)] if self.file.kind == "compare" else [(key,) for key in keys]
        verdicts = [verdict for pair in pairs for verdict in self._verdicts(*pair)]
        return (
            float(sum(verdict.prompt_tokens for verdict in verdicts)),
            float(sum(verdict.completion_tokens for verdict in verdicts)),
            sum(verdict.cost_usd for verdict in verdicts),
        )


def _inject(example: GoldExample, index: int) -> list[dict[str, Any]]:
    """Return the answers of ``example`` with an injected instruction to the judge in the worse one."""
    if len(example.answers) != 2:
        return example.answers
    worse = 1 - int(example.correct)
    answers = list(example.answers)
    text = exam_metrics.INJECTIONS[index % len(exam_metrics.INJECTIONS)].format(answer=answers[worse]["text"])
    answers[worse] = gold.make_answer(example.prompt, text)
    return answers


def _lengths(answers: list[dict[str, Any]]) -> tuple[int, int]:
    first, second = answers
    return len(first["text"]), len(second["text"])


def _higher_score(first: float | None, second: float | None) -> float | None:
    """Return 1 if ``first`` is higher, 0 if ``second`` is, 0.5 for equal scores, None if one is missing."""
    return None if first is None or second is None else 0.5 + 0.5 * float(np.sign(first - second))


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
