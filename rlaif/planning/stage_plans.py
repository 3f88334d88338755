"""Dry runs of ``rlaif generate`` and ``rlaif judge``: the requests that they would send."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlaif.config.models import Config
from rlaif.generate import ingest, sampling
from rlaif.judge import runner
from rlaif.labeling.judging import JudgingRounds, load_panel, resolve_strategy
from rlaif.llm.dry_run import DryRun, add_requests, answered_keys
from rlaif.llm.request import Request
from rlaif.llm.usage import UsageMeter
from rlaif.run.run import Run, require_completions


def plan_generate(run: Run, config: Config) -> DryRun:
    """Return the dry run of ``generate``. Ingests the prompts into a temporary directory."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Run(Path(folder))
        ingest.ingest_prompts(scratch, config, log=lambda _: None)
        answered = answered_keys(run.journal_path("completions"))
        plan, prompt_ids = DryRun(None, 0, 0, 0, 0.0), set[str]()
        for policy_index, policy in enumerate(config.policies_resolved()):
            requests = _collect_prompt_ids(
                prompt_ids, sampling.pending_requests(scratch, config, policy_index, answered)
            )
            add_requests(plan, requests, policy.model, policy.base_url, config.sampler.max_tokens)
        plan.prompts = len(prompt_ids)
        return plan


def _collect_prompt_ids(prompt_ids: set[str], requests: Iterable[Request]) -> Iterator[Request]:
    for request in requests:
        prompt_ids.add(request.prompt_id)
        yield request


def plan_judge(run: Run, config: Config) -> DryRun:
    """Return the dry run of ``judge``: all ratings, and every comparison that may become necessary."""
    require_completions(run)
    panel = load_panel(config)
    strategy = resolve_strategy(config, panel)
    rounds = JudgingRounds(run, config, None, panel, strategy, None, UsageMeter())
    answered = answered_keys(run.journal_path("verdicts"))
    modes = run.manifest()["stages"].get("judge", {}).get("output_modes", {})  # found by earlier starts
    plan = DryRun(None, 0, 0, 0, 0.0, at_most=True)
    with run.open_readers() as (prompts, answers):
        for panel_judge in panel:
            kind = panel_judge.definition.file.kind
            if (kind, strategy) in (("rate", "round-robin"), ("compare", "rate-only")):
                continue
            mode = (
                modes.get(panel_judge.name) if config.judge.output_mode == "auto" else None
            ) or runner.expected_output_mode(panel_judge, config)
            work = [runner.JudgeInput(*row) for row in rounds.possible_inputs(kind).rows()]
            requests = (
                request
                for request in runner.judge_requests(panel_judge, mode, config, work, prompts.read_at, answers.read_at)
                if request.keys[0] not in answered
            )
            add_requests(
                plan,
                requests,
                panel_judge.member_config.model,
                panel_judge.member_config.base_url,
                config.judge.max_tokens,
            )
    return plan
