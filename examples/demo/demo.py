"""All of rlaif in a few minutes on a CPU, and an example of its Python API:

    .venv/bin/python examples/demo/demo.py [RUN]          (default: demo)

A small model, served by a real vLLM, answers prompts and judges the answers in both orders. rlaif builds pairs, and TRL
trains on them. The demo measures the first prompts and takes fewer on a slow machine, to finish in about TARGET_S. You
can stop or kill it at any time; the same command resumes. Each step prints the equivalent rlaif command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from rlaif import api
from rlaif.cli.console import INTERRUPTED_EXIT_CODE, Console, remember_run
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
"""Prompts that are measured before the demo decides on their total number."""
EXTRA_PROMPTS = 4
"""Prompts to add at a time if there are too few pairs."""
MAX_PAIRS_SHOWN = 3
WIDTH = 100


def demo(path: Path, clock: Callable[[], float] = time.monotonic) -> None:
    """Run all steps in the run directory ``path``."""
    began = clock()
    remember_run(path)
    run = Run(path)
    if not (path / loader.CONFIG_FILE).exists():
        path.mkdir(parents=True, exist_ok=True)
        atomic_write.atomic_write_bytes(path / loader.CONFIG_FILE, SETTINGS.read_bytes())
    echo(f"Settings: {path / loader.CONFIG_FILE}")
    config = loader.load(path, {})
    reporter = Console()

    # One ModelBackends for all stages keeps a model running if the next stage needs it.
    with ModelBackends(run.log, config.client, reporter.log, config.cluster) as backends:
        available = config.prompts.limit or check_sources.check_sources(config.prompts.sources, config).prompts
        prompts_before, is_decided = read_progress(run)
        count = min(max(PILOT_PROMPTS, prompts_before), available)
        judge_result = answer_and_judge(run, count, reporter, backends)
        if not is_decided:
            while (per_prompt := seconds_per_prompt(run, count)) is None and count < available:
                count = min(count + EXTRA_PROMPTS, available)  # a killed start leaves answers without their usage
                judge_result = answer_and_judge(run, count, reporter, backends)
            remaining_s = (TARGET_S - (clock() - began)) * (1 - config.run.train_fraction)
            target = affordable_prompts(count, available, remaining_s, per_prompt or 0.0)
            if count < available:
                echo(describe_estimate(count, target, available, per_prompt or 0.0))
            save_decision(run, target)
            if target > count:
                count, judge_result = target, answer_and_judge(run, target, reporter, backends)
        while not has_enough_pairs(judge_result) and count < available:
            missing = "human review" if judge_result.build.dataset_counts.train else "training"
            echo(f"No pair for {missing} yet: adding prompts.")
            count = min(count + EXTRA_PROMPTS, available)
            judge_result = answer_and_judge(run, count, reporter, backends)

    print_step(f"rlaif train {path}", "Train a LoRA adapter on the pairs with TRL's DPOTrainer")
    training = api.train(run, config, reporter, restart_if_dataset_changed=True)
    echo(f"Trained on {training.pairs} pairs in {training.steps} steps: {training.adapter or training.output}")

    print_step(f"rlaif report {path}", "The results as an HTML page")
    report = html_report.write_report(run)
    echo(f"Done in {format_duration(clock() - began)}. Results:")
    echo(f"  report      {report.resolve()}")
    echo(
        f"  dataset     {run.dataset / 'train.parquet'}, {judge_result.build.dataset_counts.train} pairs, for example:"
    )
    for row in pl.read_parquet(run.dataset / "train.parquet").head(MAX_PAIRS_SHOWN).to_dicts():
        for side in ("prompt", "chosen", "rejected"):
            echo(f"    {side:<9} {shorten(row[side][-1]['content'])}")
        echo()
    echo(f"  review      {count_queued(judge_result)} pairs await blind review by annotators: rlaif review {path}")
    echo(describe_label_quality(report_data.collect_report(run, samples=False)))


def answer_and_judge(run: Run, prompts: int, reporter: Console, backends: ModelBackends) -> JudgeResult:
    """Answer and judge the first ``prompts``. Sends no request that an earlier call or start already sent."""
    config = loader.load(run.path, {"prompts.limit": prompts})
    print_step(
        f"rlaif generate {run.path} --limit {prompts}",
        f"Sample {config.sampler.n} answers per prompt for {prompts} prompts",
    )
    api.generate(run, config, reporter, backends)
    print_step(
        f"rlaif judge {run.path}", "Rate each answer, compare the best and the worst in both orders, build pairs"
    )
    judge_result = api.judge(run, config, reporter, backends)
    echo(
        f"{judge_result.build.dataset_counts.train} training pairs, {count_queued(judge_result)} pairs for human review"
    )
    return judge_result


def read_progress(run: Run) -> tuple[int, bool]:
    """Return the number of prompts of an earlier start, and True if that start had decided on it."""
    stage: dict[str, Any] = run.manifest()["stages"].get("generate", {})
    limit = stage["config"]["prompts"]["limit"] or 0 if stage else 0
    return max(limit, stage.get("demo_prompts", 0)), "demo_prompts" in stage


def save_decision(run: Run, prompts: int) -> None:
    """Store the number of prompts, so that a later start uses the same."""
    with run.lock():
        run.update_manifest("generate", demo_prompts=prompts)


def seconds_per_prompt(run: Run, prompts: int) -> float | None:
    """Return the mean time to answer and judge one prompt, over all starts, without vLLM's startup. None if unknown."""
    facts = run_estimate.pilot_facts(run, prompts, run_estimate.model_record_counts(run))
    if not facts["generate"]["requests"] or not facts["judge"]["requests"]:
        return None
    return float(facts["generate"]["request_wall_s"] + facts["judge"]["request_wall_s"]) / prompts


def affordable_prompts(done: int, available: int, remaining_s: float, per_prompt: float) -> int:
    """Return the total number of prompts if the pending ones may take ``remaining_s`` seconds."""
    if not per_prompt:
        return available
    return min(available, done + max(0, int(remaining_s / per_prompt)))


def describe_estimate(done: int, target: int, available: int, per_prompt: float) -> str:
    took = f"{done} of {available} prompts took {format_duration(done * per_prompt)}"
    rest = format_duration((available - done) * per_prompt)
    if target == available:
        return f"{took}; the rest will take about {rest}."
    more = f"{target - done} more ({format_duration((target - done) * per_prompt)})" if target > done else "no more"
    return f"{took}, so the rest would take about {rest}. To finish soon, the demo takes {more}."


def has_enough_pairs(judge_result: JudgeResult) -> bool:
    """Return True if there is at least one pair for human review and one for training."""
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
        "A model of 135 million parameters is too weak to judge: the demo only shows the steps. Before you trust a "
        "judge, measure it: rlaif judges exam NAME --model MODEL"
    )
    return "\n".join(lines)


def print_step(command: str, title: str) -> None:
    echo(f"\n== {title}\n   $ {command}")


def echo(line: str = "") -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def shorten(text: str) -> str:
    """Return ``text`` as one short line. Control characters from a model are escaped."""
    line = " ".join(text.split())
    plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return plain if len(plain) <= WIDTH else f"{plain[: WIDTH - 3]}..."


def main() -> None:
    try:
        demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; all answers so far are kept. Rerun the same command to resume.\n")
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    run_command(main)
