"""The whole of rlaif in a few minutes on a CPU, and an example of its Python API:

    .venv/bin/python examples/demo/demo.py [RUN]          (default: demo)

Prompts are answered by a small model in a real vLLM, judged by it in both orders, paired, and trained on by TRL. The
first prompts are measured: a slow machine is asked for fewer of them, so that the demo ends near TARGET_S. It can be
stopped or killed at any point; the same command goes on from there. Each step names the command that does the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from rlaif import api
from rlaif.cli.console import INTERRUPTED_EXIT_CODE, Console
from rlaif.cli.console import run_and_exit as run_command
from rlaif.config import loader
from rlaif.format import format_duration
from rlaif.llm.backends import ModelBackends
from rlaif.orchestrator import check_sources
from rlaif.orchestrator.stages import JudgeResult
from rlaif.planning import run_estimate
from rlaif.report import html_report, report_data
from rlaif.run import atomic_write
from rlaif.run.run import Run

SETTINGS = Path(__file__).with_name("rlaif.toml")
TARGET_S = 360.0
PILOT_PROMPTS = 8
"""Prompts that are measured before it is decided how many there are to be."""
EXTRA_PROMPTS = 4
"""Prompts that are added at a time if there are too few pairs."""
MAX_PAIRS_SHOWN = 3
WIDTH = 100


def demo(path: Path, clock: Callable[[], float] = time.monotonic) -> None:
    began = clock()
    run = Run(path)
    if not (path / loader.CONFIG_FILE).exists():
        path.mkdir(parents=True, exist_ok=True)
        atomic_write.atomic_write_bytes(path / loader.CONFIG_FILE, SETTINGS.read_bytes())
    echo(f"Settings: {path / loader.CONFIG_FILE}")
    config = loader.load(path, {})
    reporter = Console()

    # One ModelBackends for all stages: a model that the next stage needs stays up.
    with ModelBackends(run.log, config.client, reporter.log, config.cluster) as backends:
        available = config.prompts.limit or check_sources.check_sources(config.prompts.sources, config).prompts
        prompts_before, is_decided = read_progress(run)
        count = min(max(PILOT_PROMPTS, prompts_before), available)
        judge_result = answer_and_judge(run, count, reporter, backends)
        if not is_decided:
            while (per_prompt := seconds_per_prompt(run, count)) is None and count < available:
                count = min(count + EXTRA_PROMPTS, available)  # a killed start left answers, but not what they took
                judge_result = answer_and_judge(run, count, reporter, backends)
            remaining_s = (TARGET_S - (clock() - began)) * (1 - config.run.train_fraction)
            target = affordable_prompts(count, available, remaining_s, per_prompt or 0.0)
            if count < available:
                echo(describe_estimate(count, target, available, per_prompt or 0.0))
            save_decision(run, target)
            if target > count:
                count, judge_result = target, answer_and_judge(run, target, reporter, backends)
        while not has_enough_pairs(judge_result) and count < available:
            echo(
                f"There is no pair for {'people to review' if judge_result.build.dataset_counts.train else 'training'} yet."
            )
            count = min(count + EXTRA_PROMPTS, available)
            judge_result = answer_and_judge(run, count, reporter, backends)

    print_step(f"rlaif train {path}", "A LoRA adapter, trained on the pairs by TRL's DPOTrainer")
    training = api.train(run, config, reporter, restart_if_dataset_changed=True)
    echo(f"Trained on {training.pairs} pairs in {training.steps} steps: {training.adapter or training.output}")

    print_step(f"rlaif report {path}", "What the run gave, as a page")
    report = html_report.write_report(run)
    echo(f"Done in {format_duration(clock() - began)}. To look at:")
    echo(f"  report      {report.resolve()}")
    echo(f"  dataset     {run.dataset / 'train.parquet'}, {judge_result.build.dataset_counts.train} pairs, among them:")
    for row in pl.read_parquet(run.dataset / "train.parquet").head(MAX_PAIRS_SHOWN).to_dicts():
        for side in ("prompt", "chosen", "rejected"):
            echo(f"    {side:<9} {shorten(row[side][-1]['content'])}")
        echo()
    echo(f"  queue       {count_queued(judge_result)} of the pairs are for people to label, blind: rlaif review {path}")
    echo(describe_label_quality(report_data.collect_report(run, samples=False)))


def answer_and_judge(run: Run, prompts: int, reporter: Console, backends: ModelBackends) -> JudgeResult:
    """Answer and judge the first ``prompts``. What an earlier call or start has done is not asked for again."""
    config = loader.load(run.path, {"prompts.limit": prompts})
    print_step(
        f"rlaif generate {run.path} --limit {prompts}", f"{config.sampler.n} answers to each of {prompts} prompts"
    )
    api.generate(run, config, reporter, backends)
    print_step(
        f"rlaif judge {run.path}", "Each answer rated, the best and the worst compared in both orders, pairs built"
    )
    judge_result = api.judge(run, config, reporter, backends)
    echo(
        f"{judge_result.build.dataset_counts.train} pairs to train on, {count_queued(judge_result)} for people to review"
    )
    return judge_result


def read_progress(run: Run) -> tuple[int, bool]:
    """How many prompts an earlier start asked, and whether it decided on their number."""
    stage: dict[str, Any] = run.manifest()["stages"].get("generate", {})
    limit = stage["config"]["prompts"]["limit"] or 0 if stage else 0
    return max(limit, stage.get("demo_prompts", 0)), "demo_prompts" in stage


def save_decision(run: Run, prompts: int) -> None:
    """Remember the number of prompts, so that a later start asks neither fewer nor more."""
    with run.lock():
        run.update_manifest("generate", demo_prompts=prompts)


def seconds_per_prompt(run: Run, prompts: int) -> float | None:
    """How long a prompt took to answer and to judge, by all starts together, without vLLM's start."""
    facts = run_estimate.pilot_facts(run, prompts, run_estimate.model_record_counts(run))
    if not facts["generate"]["requests"] or not facts["judge"]["requests"]:
        return None
    return float(facts["generate"]["request_wall_s"] + facts["judge"]["request_wall_s"]) / prompts


def affordable_prompts(done: int, available: int, remaining_s: float, per_prompt: float) -> int:
    """How many prompts there are to be, if the rest of them may take ``remaining_s`` seconds."""
    if not per_prompt:
        return available
    return min(available, done + max(0, int(remaining_s / per_prompt)))


def describe_estimate(done: int, target: int, available: int, per_prompt: float) -> str:
    took = f"{done} of {available} prompts took {format_duration(done * per_prompt)}"
    rest = format_duration((available - done) * per_prompt)
    if target == available:
        return f"{took}; the rest will take about {rest}."
    more = f"{target - done} more ({format_duration((target - done) * per_prompt)})" if target > done else "no more"
    return f"{took}, so the rest would take about {rest}. To end soon, this machine is asked for {more}."


def has_enough_pairs(judge_result: JudgeResult) -> bool:
    """Whether there is a pair for people and one to train on."""
    return count_queued(judge_result) > 0 and judge_result.build.dataset_counts.train > 0


def count_queued(judge_result: JudgeResult) -> int:
    return judge_result.build.routes["audit"] + judge_result.build.routes["targeted"]


def describe_label_quality(report: report_data.Report) -> str:
    """Describe the position bias of the judges, as measured in this run."""
    lines = []
    for judge in report.position_stats or []:
        if consistency := judge.swap_consistency:
            by_position = round(consistency.n * (1 - consistency.value))
            lines.append(
                f"Label quality: in {by_position} of {consistency.n} pairs {judge.judge} with {judge.model} chose by "
                "position, not by content."
            )
    lines.append(
        "A model of 135 million parameters is no judge: this shows the parts at work. `rlaif judges exam NAME --model "
        "MODEL` measures one before you trust it."
    )
    return "\n".join(lines)


def print_step(command: str, title: str) -> None:
    echo(f"\n== {title}\n   $ {command}")


def echo(line: str = "") -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def shorten(text: str) -> str:
    """One line for the terminal. What a model wrote may hold control characters: they are shown, not obeyed."""
    line = " ".join(text.split())
    plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return plain if len(plain) <= WIDTH else f"{plain[: WIDTH - 3]}..."


def main() -> None:
    try:
        demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; what came in is kept, and the same command goes on from here\n")
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    run_command(main)
