"""The pilot of ``rlaif run``: the first prompts go through generate and judge, and the rest is estimated from them."""

from __future__ import annotations

from typing import Any

from rlaif.llm.backends import ModelBackends
from rlaif.orchestrator.stage_runner import StageRunner
from rlaif.planning import run_estimate
from rlaif.planning.run_estimate import RunEstimate


def estimate_from_pilot(stage_runner: StageRunner, backends: ModelBackends, warnings: list[str]) -> RunEstimate | None:
    """Estimate the pending work, log it, and reserve time and money for the evaluation.

    Reuses the pilot of an earlier start if the number of answers per prompt is the same. Adds to ``warnings`` if the
    disk is too small. Returns None if no pilot can be measured, so that the cost of judging is unknown.
    """
    run, config, limits = stage_runner.run, stage_runner.config, stage_runner.limits
    prompts = stage_runner.ingested.prompts - stage_runner.ingested.heldout
    pilot = run.manifest()["stages"]["run"].get("pilot")
    if pilot is None or pilot.get("n", config.sampler.n) != config.sampler.n:
        pilot = _run_pilot(stage_runner, backends, prompts)
    if pilot is None:
        return None
    estimate = run_estimate.estimate_remaining(
        pilot,
        prompts,
        run_estimate.model_record_counts(run),
        config.client.concurrency,
        comparisons=_count_comparisons(stage_runner) if config.run.evaluate else 0,
    )
    if pilot["prompts"] < prompts:
        for line in estimate.describe(limits.remaining_s(), limits.remaining_usd(), limits.train_fraction):
            stage_runner.run_log.log(line)
    limits.reserved_for_evaluation = estimate.evaluate
    if warning := run_estimate.disk_space_warning(run, estimate.disk_bytes):
        stage_runner.run_log.log(f"warning: {warning}")
        warnings.append(warning)
    return estimate


def _run_pilot(stage_runner: StageRunner, backends: ModelBackends, prompts: int) -> dict[str, Any] | None:
    """Answer and judge the first prompts, and store in the manifest what they took. None if that says nothing about
    the rest."""
    run, config = stage_runner.run, stage_runner.config
    size = _pilot_size(stage_runner, prompts)
    if not size or config.client.use_batch_api:
        return None  # by batch, a few prompts may take as long as all of them
    journal_rows = run_estimate.journal_rows_for(run, size)
    previous_judging = run.manifest()["stages"].get("judge")
    if previous_judging and not 0 < (previous_judging["config"]["judge"]["limit"] or 0) <= journal_rows:
        return None  # more prompts than a pilot's were already judged, and `judge.limit` cannot shrink
    stage_runner.run_log.log(f"pilot: the first {size:,} prompts go through generate and judge")
    generate_result = stage_runner.generate(backends, *stage_runner.limits.half_for_generating(), max_prompts=size)
    if generate_result is None or generate_result.stop_reason:
        return None
    if prompts <= size:
        stage_runner.run_log.log("the pilot covered all prompts, so there is nothing to estimate")
    limit = min(journal_rows, config.judge.limit or journal_rows)
    pilot_config = config.model_copy(update={"judge": config.judge.model_copy(update={"limit": limit})})
    judge_result = stage_runner.judge(backends, stage_runner.limits.deadline, pilot_config)
    if judge_result is None or judge_result.stop_reason:
        return None
    record_counts = {
        "generate": size * config.sampler.n,
        "judge": run_estimate.model_record_counts(run)["judge"],
    }
    pilot = {**run_estimate.pilot_facts(run, size, record_counts), "n": config.sampler.n}
    if not pilot["generate"]["requests"]:
        return None  # every answer is from a start that was killed before it stored its usage
    run.update_manifest("run", pilot=pilot)
    return pilot


def _pilot_size(stage_runner: StageRunner, prompts: int) -> int:
    """Number of prompts of the pilot: enough to keep the server busy, but at most ten times ``run.pilot_prompts``."""
    pilot_prompts, concurrency = stage_runner.config.run.pilot_prompts, stage_runner.config.client.concurrency
    return min(prompts, max(pilot_prompts, min(concurrency, 10 * pilot_prompts)))


def _count_comparisons(stage_runner: StageRunner) -> int:
    """Number of prompts on which the evaluation will compare two models. Of its own sources only the limit is known."""
    requested = stage_runner.config.evaluate
    if requested.sources and requested.limit is None:
        stage_runner.run_log.log("the estimate omits the evaluation: `evaluate.sources` are not read yet")
        return 0
    available = requested.limit if requested.sources else stage_runner.ingested.heldout
    return min(available or 0, requested.limit or available or 0)
