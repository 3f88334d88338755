"""The report: its numbers against the journals, its headline, and hostile text that must not become markup."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlaif.records import Verdict, content_key
from rlaif.report import html, html_report, judge_stats, recommendation
from rlaif.report.next_step import Step
from rlaif.report.report_data import collect_report, requested_settings
from rlaif.report.run_facts import find_estimate
from rlaif.run.run import Run
from rlaif.run.training_output import trained_model_name
from tests.conftest import read_jsonl
from tests.fake_judge import judge_by
from tests.fake_server import ScriptedServer
from tests.labeling.test_judging import goodness, import_and_judge
from tests.report.facts import make_estimate, make_facts, make_pair_stats, position_bias

Serve = Callable[..., ScriptedServer]
HOSTILE = '</details></main><script>alert(1)</script><img src=x onerror="alert(2)"> \x00\ud800'


class Elements(HTMLParser):
    """Collects the elements of a page, and those that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def judged(serve: Serve, tmp_path: Path) -> Run:
    """A judged run with a tenth of its pairs in the review queue."""
    rows = [
        {
            "prompt": f"Question {i} {HOSTILE[:-2] if i % 4 == 0 else ''}",
            "responses": [f"short [{(i % 7) / 7}]", f"a good deal longer [{(i % 5) / 5 + 0.05}]"],
        }
        for i in range(60)
    ]
    run, _ = import_and_judge(tmp_path, rows, serve(judge_by(goodness)).url)
    return run


def test_the_report_matches_the_journals(judged: Run, rlaif: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    report = json.loads(rlaif("report", judged.path, "--json").stdout)
    pairs = judged.pairs()
    kept = pairs.filter(pairs["route"] != "dropped")
    awaiting_review = pairs.filter(pairs["route"].is_in(["audit", "targeted"])).height
    assert report["recommendation"]["step"] == "review"
    assert f"{awaiting_review} pairs await review" in report["recommendation"]["reasons"][0]
    assert report["pairs"]["kept"] == kept.height == sum(bin_["count"] for bin_ in report["pairs"]["confidence"])
    longer = [
        (len(row["response_a"]) > len(row["response_b"])) == (row["preferred"] == "a")
        for row in kept.iter_rows(named=True)
    ]
    assert report["pairs"]["longer_preferred"]["n"] == len(longer)
    assert report["pairs"]["longer_preferred"]["value"] == pytest.approx(sum(longer) / len(longer))
    (stats,) = report["position_stats"]
    assert stats["swap_consistency"]["value"] == 1.0
    assert stats["first_position_rate"]["value"] == pytest.approx(0.5)
    answered = [record for record in read_jsonl(judged.journal_path("verdicts")) if record["model"]]
    assert report["cost"]["requests"] == len(answered)
    assert len(report["samples"]) == 20
    assert {sample["route"] for sample in report["samples"]} == set(pairs["route"])
    assert find_estimate(report["labels"], "agreement") is None
    assert "rlaif review" in report["missing_reasons"]["labels"]

    rlaif("report", judged.path)
    text = (judged.path / "report.html").read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    assert text.count("<details>") == 20
    assert f"{awaiting_review} pairs await review" in text
    assert "Needs review" in text
    assert "queued for review (random audit)" in text
    assert not re.findall(r">[a-z]+_[a-z_]+<", text)


def test_answers_never_become_markup(judged: Run) -> None:
    text = html_report.write_report(judged).read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(text)
    assert "script" not in elements.names
    assert "img" not in elements.names
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name in ("src", "href")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert html.element("p", HOSTILE, title=HOSTILE) == html.element(
        "p", html.escape(HOSTILE), title=html.escape(HOSTILE)
    )
    html.escape(HOSTILE).encode()


def test_the_report_of_a_new_run(tmp_path: Path, rlaif: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = tmp_path / "run"
    rlaif("init", run)
    report = json.loads(rlaif("report", run, "--json").stdout)
    assert report["recommendation"]["step"] == "finish"
    assert set(report["missing_reasons"]) == {
        "labels",
        "balance",
        "exams",
        "pairs",
        "position_stats",
        "training",
        "evaluation",
    }
    rlaif("report", run)
    assert "Not finished" in (run / "report.html").read_text()
    assert "no such run" in rlaif("report", tmp_path / "absent", code=1).stderr


def journal_verdicts(run: Run, probabilities: list[tuple[float, float]]) -> None:
    """Journal comparisons: of each pair the probability of a when shown first, and when shown second."""
    with run.lock(), run.journal("verdicts") as journal:
        for pair, pair_probabilities in enumerate(probabilities):
            journal.append(
                Verdict(
                    key=content_key(pair=pair, order=order),
                    kind="compare",
                    judge="j",
                    judge_hash="h",
                    model="m",
                    prompt_id="p",
                    a=f"a{pair}",
                    b=f"b{pair}",
                    order=order,
                    prob_a=p,
                )
                for order, p in zip(("ab", "ba"), pair_probabilities, strict=True)
            )


def test_position_bias_is_counted_by_pair(tmp_path: Path) -> None:
    run = Run(tmp_path)
    # Two consistent, one that prefers the first answer, one undecided in one order, one judged in one order only.
    journal_verdicts(run, [(0.9, 0.8), (0.2, 0.1), (0.9, 0.3), (0.5, 0.6)])
    with run.lock(), run.journal("verdicts") as journal:
        journal.append(
            [
                Verdict(
                    key=content_key(x=1),
                    kind="compare",
                    judge="j",
                    judge_hash="h",
                    model="m",
                    prompt_id="p",
                    a="x",
                    b="y",
                    order="ab",
                    prob_a=1.0,
                )
            ]
        )
    (stats,) = judge_stats.position_stats(run)
    assert (stats.swap_consistency.value, stats.swap_consistency.n) == (pytest.approx(2 / 3), 3)
    assert stats.first_position_rate.n == 4
    assert stats.first_position_rate.value == pytest.approx(0.5 + (0.05 + 0.05 + 0.3 - 0.05) / 4)
    assert judge_stats.position_stats(run, [("another version", "m")]) == []
    assert judge_stats.position_stats(run, [("h", "another model")]) == []
    (matching,) = judge_stats.position_stats(run, [("another version", "m"), ("h", "m")])
    assert matching.swap_consistency == stats.swap_consistency


def test_verdicts_of_a_replaced_judge_do_not_count(judged: Run) -> None:
    """After `rlaif judge --model ANOTHER --restart`, the journal keeps the verdicts of the earlier judge."""
    (judge,) = judged.manifest()["stages"]["judge"]["judges"]
    with judged.lock(), judged.journal("verdicts") as journal:
        journal.append(
            Verdict(
                key=content_key(pair=pair, order=order),
                kind="compare",
                judge=judge["name"],
                judge_hash=judge["hash"],
                model="small",
                prompt_id="p",
                a=f"a{pair}",
                b=f"b{pair}",
                order=order,
                prob_a=p,
            )
            for pair in range(50)
            for order, p in (("ab", 1.0), ("ba", 0.0))
        )
    report = collect_report(judged)
    assert [stats.model for stats in report.position_stats or []] == [judge["model"]]
    assert report.recommendation.step is Step.REVIEW


TRAINED = {"output": "o", "result": {"pairs": 85, "steps": 11}}
BETTER = {"win_rate": make_estimate(0.6, 0.52, 0.68)}


@pytest.mark.parametrize(
    ("overrides", "step", "reason"),
    [
        ({}, Step.TRAIN, "85 pairs"),
        ({"unfinished": "judge"}, Step.FINISH, "did not end"),
        ({"awaiting_review": {"audit": 5, "targeted": 4}}, Step.REVIEW, "5 audit, 4 targeted"),
        ({"pairs": make_pair_stats(kept=0)}, Step.FIX_LABELS, "none of 100 candidate pairs was kept"),
        ({"position_stats": [position_bias()]}, Step.FIX_LABELS, "chooses by position"),
        (
            {"labels": {"agreement": make_estimate(0.55, 0.45, 0.64)}},
            Step.FIX_LABELS,
            "annotators agree with the judges on only 55%",
        ),
        ({"labels": {"agreement": make_estimate(0.2, 0.1, 0.4)}}, Step.FIX_LABELS, "annotators contradict the judges"),
        ({"labels": {"agreement": make_estimate(0.8, 0.7, 0.9)}}, Step.TRAIN, "80.0% [70.0%, 90.0%] (n = 100)"),
        ({"labels": {"noise_rate": 0.47}}, Step.FIX_LABELS, "47.0% of the labels are wrong"),
        ({"missing_answers": 7}, Step.TRAIN, "7 requested answers are missing"),
        ({"training": TRAINED}, Step.EVALUATE, "11 steps"),
        ({"training": TRAINED, "stale_evaluation": "model-1"}, Step.EVALUATE, "an earlier training (model-1)"),
        (
            {"training": {**TRAINED, "reversed": make_estimate(0.1, 0.05, 0.2)}},
            Step.FIX_LABELS,
            "in only 10.0% [5.0%, 20.0%]",
        ),
        ({"training": {**TRAINED, "identity": {"method": "reward"}}}, Step.TRAIN, "reward model"),
        ({"evaluation": BETTER}, Step.ITERATE, "wins 60.0%"),
        (
            {"evaluation": {**BETTER, "length_controlled_win_rate": make_estimate(0.5, 0.4, 0.6)}},
            Step.ITERATE,
            "at equal length it would win 50.0%",
        ),
        (
            {
                "evaluation": {
                    **BETTER,
                    "refusals": [
                        {
                            "prompt_class": "benign",
                            "reference": make_estimate(0.01, 0, 0.03),
                            "trained": make_estimate(0.05, 0.02, 0.1),
                        }
                    ],
                }
            },
            Step.ITERATE,
            "it refuses 5.0% [2.0%, 10.0%] (n = 100) of benign prompts, its reference 1.0%",
        ),
        (
            {"evaluation": {**BETTER, "checks": [{"model": "gain", "pass_rate": make_estimate(-0.1, -0.2, -0.05)}]}},
            Step.ITERATE,
            "it meets fewer",
        ),
        ({"evaluation": {"win_rate": make_estimate(0.5, 0.42, 0.58)}}, Step.EXTEND, "wins 50.0%"),
        ({"evaluation": {"win_rate": make_estimate(0.3, 0.2, 0.4)}}, Step.DISCARD, "wins 30.0%"),
    ],
)
def test_the_recommendation_and_its_reasons(overrides: dict[str, Any], step: Step, reason: str) -> None:
    result = recommendation.recommend(make_facts(**overrides))
    assert result.step is step
    assert reason in " ".join(result.reasons)


def test_every_section_is_rendered(judged: Run) -> None:
    """The report shows what other stages left in the manifest and beside it, with the columns that they have."""
    run = judged
    agreement = make_estimate(0.8, 0.7, 0.9)
    run.update_manifest(
        "judge",
        labels={
            "reviewed": 40,
            "noise_rate": 0.12,
            "agreement": agreement,
            "kappa": make_estimate(0.61, 0.5, 0.7),
            "reliability": [{"p": 0.72, **make_estimate(0.64, 0.5, 0.7)}],
            "certificate": {"agreement": 0.85, "confidence": 0.9, "share": 0.4, "threshold": 0.9, "n": 30},
            "calibration": [
                {
                    "group": "decided",
                    "weights": {"helpful@m": 1.2},
                    "n": 38,
                    "applied": True,
                    "reason": "",
                    "tested": 20,
                    "flipped": 3,
                    "labeled": 0,
                    "near_ties": 2,
                    "low_ratings": 0,
                },
                {"group": "undecided", "n": 31, "applied": False, "reason": "too few labels"},
            ],
        },
        balance=[{"prompt": "benign", "chosen": "refuse", "pairs": 3}],
        exams=[{"judge": "helpful", "status": "good", "metrics": {"accuracy": make_estimate(0.7, 0.6, 0.8)}}],
    )
    run.model.mkdir()
    history = [{"step": step, "loss": 1 / step, "accuracy": 0.5} for step in range(1, 5)]
    result = {"pairs": 9, "steps": 4, "seconds": 100.0, "accuracy_after": agreement}
    preflight = [
        {"name": "count", "level": "warn", "message": "only 9 pairs", "hint": "Sample more."},
        {"name": "leak", "level": "pass", "message": "0 of 2 test prompts", "hint": None},
    ]
    trained = {"identity": {"beta": 0.1}, "result": result, "history": history, "preflight": preflight}
    (run.model / "training.json").write_text(json.dumps(trained))
    (run.path / "evaluation").mkdir()
    sample = {"prompt": HOSTILE[:-2], "reference": "<i>old</i>", "trained": "new", "preferred": "trained"}
    evaluation = {
        "trained": trained_model_name(run.model, trained),
        "win_rate": make_estimate(0.6, 0.55, 0.65),
        "refusals": [{"prompt_class": "benign", "reference": 0.1}],
        "warnings": ["m judges its own answers"],
        "samples": [sample],
    }
    (run.path / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    report = collect_report(run)
    assert report.recommendation.step is Step.ITERATE
    text = html_report.render_report(report)
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    for part in (
        "0.800 [0.700, 0.900]", "0.610 [0.500, 0.700]", "at 0.72 annotators agree in 0.64 of 100", "benign", "refuses",
        "An estimated 12.0% of the dataset&#x27;s labels are wrong", "The most confident 40% of the pairs",
        "flipped 3 labels",
        "not applied: too few labels",
        "0.700 [0.600, 0.800] (n = 100)", "Loss", "win rate", "&lt;i&gt;old&lt;/i&gt;", "only 9 pairs. Sample more.",
        "1 of 2 checks passed", "pass: 0 of 2 test prompts", "m judges its own answers",
    ):  # fmt: skip
        assert part in text

    (run.model / "training.json").write_text(json.dumps({**trained, "identity": {"beta": 0.5}}))
    report = collect_report(run)
    assert report.recommendation.step is Step.EVALUATE
    assert report.recommendation.command == f"rlaif evaluate {run.path}"
    assert report.evaluation is None
    assert report.iterations[-1].win_rate is None
    assert f"an earlier training ({evaluation['trained']})" in report.missing_reasons["evaluation"]


def test_a_report_that_cannot_be_written_is_an_error(judged: Run) -> None:
    from rlaif.errors import RunError

    (judged.path / "report.html").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        html_report.write_report(judged)


def test_a_seed_of_the_training_is_shown_beside_that_of_the_run() -> None:
    sampled = {"policies": [], "sampler": {"model": ["m"], "n": 4, "temperature": 1.0}, "prompts": {"sources": ["p"]}}
    trained = {"seed": 7, "train": {"method": "dpo", "lora": True}}
    stages = {"generate": {"config": sampled | {"seed": 0}}, "train": {"config": trained}}
    settings = requested_settings(stages)
    assert (settings["seed"], settings["training"]) == (0, "dpo, LoRA, seed 7")
    trained["seed"] = 0
    assert requested_settings(stages)["training"] == "dpo, LoRA"
