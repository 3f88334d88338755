"""The next step: every command names the same one, and a refused training does not hide it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.config.loader import load
from rlaif.errors import UsageError
from rlaif.orchestrator import stages
from rlaif.report.html_report import render_report
from rlaif.report.next_step import NextStep, Step, decide, next_step
from rlaif.report.report_data import collect_report
from rlaif.review import import_export
from rlaif.train import trainer
from tests.fake_judge import judge_by, verdict_words
from tests.fake_server import ScriptedServer, with_probabilities
from tests.labeling.test_judging import QuietReporter, goodness, import_and_judge
from tests.report.facts import make_estimate, make_facts, make_pair_stats

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]
ROWS = [
    {"prompt": f"Question {i}", "responses": [f"short [{i / 40}]", f"a good deal longer [{1 - i / 40}]"]}
    for i in range(30)
]


def choose_by_position(body: dict[str, Any]) -> dict[str, Any]:
    """Answer as a judge that rates by content, and always prefers the answer shown first."""
    if verdict_words(body) == ["A", "B"]:
        return with_probabilities({"A": 1.0, "B": 0.0})
    return judge_by(goodness)(body)


def next_line(text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith("Next: "))
    return line.removeprefix("Next: ")


def test_every_command_names_the_same_step_for_labels_by_position(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    run, _ = import_and_judge(tmp_path, ROWS, url := serve(choose_by_position).url)
    step = next_step(run)
    assert step.step is Step.FIX_LABELS
    judge = rlaif("judge", run.path, "--judge", "helpful", "--model", "m", "--base-url", url)
    assert next_line(judge.stdout) == str(step)
    assert f"next         {step}" in rlaif("status", run.path).stdout
    assert next_line(rlaif("report", run.path).stdout) == str(step)
    assert step.command is not None
    assert f"<code>{step.command}</code>" in (run.path / "report.html").read_text(encoding="utf-8")
    refused = rlaif("train", run.path, "--model", "m", code=2).stderr
    assert f"rlaif status {run.path}" in refused
    assert next_step(run) == step


def test_a_refused_training_does_not_hide_the_next_step(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"pairs.human_fraction": 0.0}
    run, _ = import_and_judge(tmp_path, ROWS, serve(judge_by(goodness)).url, **settings)
    assert next_step(run).step is Step.TRAIN

    def refuse(*_args: Any, **_options: Any) -> None:
        raise UsageError("the tokenizer has no chat template")

    monkeypatch.setattr(trainer, "train", refuse)
    config = load(run.path, {"judge.panel": ["helpful"], "judge.model": "m", **settings})
    with pytest.raises(UsageError):
        stages.train(run, config, QuietReporter())
    step = next_step(run)
    assert step.step is Step.TRAIN
    assert "the last `rlaif train` was refused: the tokenizer has no chat template" in step.reasons
    report = collect_report(run)
    assert report.recommendation.step is Step.TRAIN
    assert "refused" in render_report(report)


def test_an_interrupted_training_is_resumed(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = import_and_judge(tmp_path, ROWS, serve(judge_by(goodness)).url)

    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stages.train(run, load(run.path, {"judge.panel": ["helpful"], "judge.model": "m"}), QuietReporter())
    assert next_step(run) == NextStep(Step.FINISH, f"rlaif train {run.path}", ["train started and did not end"])


def test_labels_given_since_the_pairs_were_built_count_as_reviewed(serve: Serve, tmp_path: Path, rlaif: Cli) -> None:
    run, _ = import_and_judge(tmp_path, ROWS, serve(judge_by(goodness)).url)
    step = next_step(run)
    assert step.step is Step.REVIEW
    assert step.alternative == f"rlaif train {run.path}"
    queue = tmp_path / "queue.jsonl"
    rlaif("review", run.path, "--export", queue, "--annotator", "ada")
    lines = queue.read_text(encoding="utf-8").replace('"choice":null', '"choice":"left"')
    queue.write_text(lines.replace('"choice":""', '"choice":"left"'), encoding="utf-8")
    import_export.import_reviews(run, queue, annotator="ada", seed=0)
    step = next_step(run)
    assert (step.step, step.command) == (Step.MERGE, f"rlaif review {run.path} --merge")
    rlaif("review", run.path, "--merge")
    assert next_step(run).step is Step.TRAIN


@pytest.mark.parametrize(
    ("overrides", "step", "command"),
    [
        ({}, Step.TRAIN, "rlaif train RUN"),
        ({"answers": 0}, Step.FINISH, "rlaif generate RUN"),
        ({"pairs": None}, Step.FINISH, "rlaif judge RUN"),
        ({"unfinished": "judge"}, Step.FINISH, "rlaif judge RUN"),
        ({"unfinished": "judge", "busy": True}, Step.FINISH, None),
        ({"awaiting_review": {"audit": 4}}, Step.REVIEW, "rlaif review RUN"),
        ({"labels": {"noise_rate": 0.46}}, Step.FIX_LABELS, "rlaif judge RUN --judge NAME@MODEL --restart"),
        ({"train_pairs": 0}, Step.FIX_LABELS, "rlaif judge RUN --judge NAME@MODEL --restart"),
        ({"training": {"result": {"pairs": 9, "steps": 1}}}, Step.EVALUATE, "rlaif evaluate RUN"),
        ({"evaluation": {"win_rate": None}}, Step.EVALUATE, "rlaif evaluate RUN"),
        ({"evaluation": {"win_rate": make_estimate(0.6, 0.55, 0.65)}}, Step.ITERATE, "rlaif init NEXT --from RUN"),
        ({"evaluation": {"win_rate": make_estimate(0.5, 0.45, 0.55)}}, Step.EXTEND, None),
        ({"evaluation": {"win_rate": make_estimate(0.3, 0.25, 0.35)}}, Step.DISCARD, None),
    ],
)
def test_the_first_rule_that_holds_decides(overrides: dict[str, Any], step: Step, command: str | None) -> None:
    result = decide(make_facts(**overrides))
    assert (result.step, result.command) == (step, command)
    assert result.reasons


def test_a_dataset_from_elsewhere_can_be_trained_on_and_evaluated() -> None:
    training = {"output": "RUN/model", "result": {"pairs": 9, "steps": 1}}
    assert decide(make_facts(answers=0, pairs=None, training=training)).step is Step.EVALUATE


def test_a_reward_model_is_what_a_policy_is_trained_against() -> None:
    training = {"output": "out", "identity": {"method": "reward"}, "result": {"pairs": 9, "steps": 1, "merged": "o/m"}}
    step = decide(make_facts(training=training))
    assert (step.step, step.command) == (
        Step.TRAIN,
        "rlaif train RUN --method rloo --reward-model o/m --output RUN/rloo",
    )


def test_an_old_refusal_is_forgotten_after_judging_again() -> None:
    refused = {"refusal": "no chat template", "train_ended": "2026-01-02"}
    assert len(decide(make_facts(**refused, judge_ended="2026-01-01")).reasons) == 2
    assert len(decide(make_facts(**refused, judge_ended="2026-01-03")).reasons) == 1


def test_no_pair_kept_is_a_problem_of_the_labels() -> None:
    assert decide(make_facts(pairs=make_pair_stats(kept=0))).step is Step.FIX_LABELS
