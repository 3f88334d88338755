"""``evaluate``: compare the trained model with its reference on prompts that it was not trained on.

RUN/evaluation is a run directory of its own: its prompts are the held-out ones, its completions are both models'
answers, and its verdicts compare them in both orders. So an evaluation resumes like any other run, and the reference's
answers are reused for the next trained model. The journals keep the records of every evaluation; each evaluation uses
only those that its own prompts and settings ask for. The result is in RUN/evaluation/evaluation.json.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from rlaif.config.models import Config, PanelMemberConfig, PolicyConfig
from rlaif.errors import UsageError
from rlaif.evaluate.evaluation_result import EvaluationResult
from rlaif.evaluate.results import collect_results
from rlaif.evaluate.trained_model import (
    EVALUATION_DIR,
    EVALUATION_FILE,
    EvaluatedModels,
    evaluated_models,
    nothing_held_out_error,
)
from rlaif.generate import ingest, sampling
from rlaif.judge import check_schema, rule_based, runner
from rlaif.labeling import judging
from rlaif.llm import dry_run
from rlaif.llm.backends import ModelBackends
from rlaif.llm.executor import require_known_prices
from rlaif.llm.reporter import Reporter
from rlaif.llm.stage_limits import StageLimits, new_meter, raise_if_too_many_failures
from rlaif.llm.usage import UsageMeter
from rlaif.pair import candidates
from rlaif.records import Prompt
from rlaif.run import frames
from rlaif.run.journal import JournalReader, iter_records
from rlaif.run.run import Run


def eval_judges(config: Config) -> list[runner.PanelJudge]:
    """Return the judges that will compare.

    Raises :class:`UsageError` if no judge compares, or if a judge does not support the configured output mode.
    """
    panel = [
        panel_judge
        for panel_judge in judging.load_panel(_eval_panel_config(config))
        if panel_judge.definition.file.kind == "compare"
    ]
    if not panel:
        raise UsageError("none of the judges compares two answers", hint="Pass `--judge NAME` of a judge that does.")
    for panel_judge in panel:
        runner.check_output_mode(panel_judge, config)
    return panel


def evaluate(
    run: Run,
    config: Config,
    reporter: Reporter,
    backends: ModelBackends,
    *,
    limits: StageLimits | None = None,
) -> EvaluationResult:
    """Sample answers, compare them, compute the metrics and write evaluation.json.

    ``config`` is the run's as judged: without judges under [evaluate], the judges that labeled also compare here.
    Raises :class:`TooManyFailuresError` after writing the result if too many requests failed.
    """
    models = evaluated_models(run, config)
    eval_config, panel = _eval_config(config, models), eval_judges(config)
    requested_prompts = _load_prompts(run, eval_config, reporter.log)
    backends.register_local_model(models.local)
    eval_run = Run(run.path / EVALUATION_DIR)
    usage = new_meter("evaluate", config, limits)
    if usage.budget_usd is not None:
        for panel_judge in panel:
            require_known_prices(panel_judge.member_config.model, panel_judge.member_config.base_url)
    with run.lock(), eval_run.lock():
        run.start_stage("evaluate", config)
        try:
            prompts = _journal_prompts(eval_run, requested_prompts)
            with reporter.progress(usage):
                _sample_answers(eval_run, eval_config, backends, prompts, usage)
                pairs, verdict_keys = _judge_answers(eval_run, eval_config, backends, panel, prompts, usage)
            backends.close()  # the KL divergence needs the memory of the servers
            stop_reason = usage.stop_reason()
            if stop_reason:  # the KL divergence takes minutes; the next start measures it, once everything is judged
                eval_config = eval_config.model_copy(
                    update={"evaluate": eval_config.evaluate.model_copy(update={"kl_samples": 0})}
                )
            result = collect_results(run, eval_run, eval_config, models, panel, prompts, pairs, verdict_keys, reporter)
            result.stopped = stop_reason
            result.write(eval_run.path / EVALUATION_FILE)
        finally:
            run.finish_stage("evaluate", **usage.summary())
    raise_if_too_many_failures(config, usage)
    return result


def _sample_answers(
    eval_run: Run, config: Config, backends: ModelBackends, prompts: pl.DataFrame, usage: UsageMeter
) -> None:
    """Sample the pending answers of both models to ``prompts``."""
    eval_run.start_stage("generate", config, restart=True)
    try:
        sampling.sample(eval_run, config, backends, usage, prompt_offsets=set(prompts["prompt_offset"]))
    finally:
        eval_run.finish_stage("generate", **usage.summary())


def _judge_answers(
    eval_run: Run,
    config: Config,
    backends: ModelBackends,
    panel: list[runner.PanelJudge],
    prompts: pl.DataFrame,
    usage: UsageMeter,
) -> tuple[pl.DataFrame, set[str]]:
    """Judge both models' answers. Returns the pairs (:func:`_pair_answers`) and the keys of their verdicts."""
    eval_run.start_stage("judge", config, restart=True)
    try:
        pairs = _pair_answers(eval_run, config, prompts)
        verdict_keys = _run_rule_based(eval_run, pairs, usage)
        for panel_judge in panel:
            verdict_keys |= _run_judge(eval_run, config, backends, panel_judge, pairs, usage)
    finally:
        eval_run.finish_stage("judge")
    return pairs, verdict_keys


def _eval_config(config: Config, models: EvaluatedModels) -> Config:
    """Return the settings of the evaluation's run: both models answer each prompt once, judged as [evaluate] says."""
    sampler = config.sampler.model_copy(update={"model": [], "base_url": [], "n": 2})
    policies = [PolicyConfig(model=models.reference), PolicyConfig(model=models.trained)]
    return _eval_panel_config(config).model_copy(update={"sampler": sampler, "policies": policies})


def _eval_panel_config(config: Config) -> Config:
    """Return ``config`` with the judges of the evaluation: those that [evaluate] names, else those that label.

    A model that also labels keeps its endpoint and its vLLM settings. ``evaluate.base_url`` overrides the endpoint of
    every judge.
    """
    requested, members = config.evaluate, list[PanelMemberConfig]()
    with contextlib.suppress(UsageError):  # [evaluate] may name judges although none is configured for labeling
        members = config.panel_members()
    member_by_model = {member.model: member for member in reversed(members)}
    if requested.judges or requested.model or not members:
        model = (
            requested.model
            or config.judge.model
            or (next(iter(member_by_model)) if len(member_by_model) == 1 else None)
        )
        names = requested.judges or list(dict.fromkeys(member.name for member in members)) or config.judge.panel
        judge = config.judge.model_copy(update={"panel": names, "model": model, "base_url": []})
        members = [
            member.model_copy(
                update={"base_url": member_by_model[member.model].base_url, "vllm": member_by_model[member.model].vllm}
            )
            if member.model in member_by_model
            else member
            for member in config.model_copy(update={"judge": judge, "panel": []}).panel_members()
        ]
    if requested.base_url:
        members = [member.model_copy(update={"base_url": requested.base_url}) for member in members]
    return config.model_copy(update={"panel": members})


def _load_prompts(run: Run, config: Config, log: Callable[[str], None]) -> list[Prompt]:
    """Return the prompts of ``evaluate.sources`` or, without sources, those that the run held out. Writes nothing.

    Raises :class:`UsageError` if no prompt is found, or if a prompt's checks cannot be evaluated.
    """
    requested = config.evaluate
    if requested.sources:
        prompts_config = config.prompts.model_copy(
            update={
                "sources": requested.sources,
                "heldout_fraction": 0.0,
                "limit": requested.limit,
                "decontaminate_against": [],
            }
        )
        # In a scratch run, as ids must be unique among these prompts, not among those of all evaluations.
        with tempfile.TemporaryDirectory() as folder:
            scratch = Run(folder)
            ingest.ingest_prompts(scratch, config.model_copy(update={"prompts": prompts_config}), log)
            prompts = [Prompt.model_validate(record) for _, record in iter_records(scratch.journal_path("prompts"))]
    else:
        records = (record for _, record in iter_records(run.journal_path("prompts")) if record["split"] == "heldout")
        prompts = [
            Prompt.model_validate(record | {"split": "train"}) for record in itertools.islice(records, requested.limit)
        ]
        if not prompts:
            raise nothing_held_out_error(run)
    for prompt in prompts:
        if prompt.checks:
            check_schema.compile_checks(prompt.checks, location=f"prompt {prompt.prompt_id} ({prompt.source})")
    return prompts


def _journal_prompts(eval_run: Run, prompts: list[Prompt]) -> pl.DataFrame:
    """Add the new ones of ``prompts`` to the evaluation's journal and return them all as it has them.

    A prompt that has another id or other checks than before is journaled again; the last record counts. Columns: key,
    prompt_id, tags, prompt_offset.
    """
    requested = {prompt.key: prompt for prompt in prompts}
    existing = {
        record["key"]: Prompt.model_validate(record)
        for _, record in iter_records(eval_run.journal_path("prompts"))
        if record["key"] in requested
    }
    with eval_run.journal("prompts") as journal:
        for key, prompt in requested.items():
            if key not in existing or existing[key].model_copy(update={"source": prompt.source}) != prompt:
                journal.append([prompt])
    frame = frames.read_journal_frame(eval_run.journal_path("prompts"), frames.PROMPTS)
    frame = frame.filter(pl.col("key").is_in(set(requested)))
    return frame.select("key", "prompt_id", "tags", prompt_offset="offset")


def _requested_answers(eval_run: Run, config: Config, prompt_offsets: set[int] | None = None) -> pl.DataFrame:
    """Return the answers that ``config`` asks for, sampled or pending: one of each model per prompt.

    ``prompt_offsets``: byte offsets of the prompts. Columns: prompt_id, key, role ("reference" or "trained").
    """
    rows = [
        (request.prompt_id, request.keys[0], role)
        for policy_index, role in enumerate(("reference", "trained"))
        for request in sampling.pending_requests(eval_run, config, policy_index, (), prompt_offsets=prompt_offsets)
    ]
    return pl.DataFrame(rows, schema={"prompt_id": pl.String, "key": pl.String, "role": pl.String}, orient="row")


def _pair_answers(eval_run: Run, config: Config, prompts: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each of ``prompts`` that both models have answered.

    Columns: prompt_id, prompt_offset, a, b, a_offset, b_offset, trained_side ("a" or "b"), trained_chars,
    reference_chars, identical, trained_complete, reference_complete. Only pairs of complete answers are judged.
    """
    answers = frames.read_journal_frame(
        eval_run.journal_path("completions"), frames.COMPLETIONS, candidates.summarize_texts
    )
    answers = _requested_answers(eval_run, config, set(prompts["prompt_offset"])).join(
        answers.select("key", "offset", "chars", "text_hash", complete=candidates.is_complete()), on="key"
    )
    reference, trained = (answers.filter(pl.col("role") == role).drop("role") for role in ("reference", "trained"))
    joined = trained.join(reference, on="prompt_id", suffix="_reference").join(
        prompts.select("prompt_id", "prompt_offset"), on="prompt_id"
    )
    trained_first = pl.col("key") < pl.col("key_reference")
    return joined.select(
        "prompt_id",
        "prompt_offset",
        a=pl.when(trained_first).then("key").otherwise("key_reference"),
        b=pl.when(trained_first).then("key_reference").otherwise("key"),
        a_offset=pl.when(trained_first).then("offset").otherwise("offset_reference"),
        b_offset=pl.when(trained_first).then("offset_reference").otherwise("offset"),
        trained_side=pl.when(trained_first).then(pl.lit("a")).otherwise(pl.lit("b")),
        trained_chars="chars",
        reference_chars="chars_reference",
        identical=pl.col("text_hash") == pl.col("text_hash_reference"),
        trained_complete="complete",
        reference_complete="complete_reference",
    ).sort("prompt_id")


def _run_rule_based(eval_run: Run, pairs: pl.DataFrame, usage: UsageMeter) -> set[str]:
    """Journal the verdicts of the prompts' checks and of the text classifier of refusals on each answer.

    Returns the keys of the checks' verdicts.
    """
    inputs = pl.concat(
        [pairs.select("prompt_offset", answer=side, none=pl.lit(None, pl.Int64)) for side in ("a_offset", "b_offset")]
    ).sort("prompt_offset")
    with eval_run.open_readers() as (prompts, answers):
        with eval_run.journal("verdicts") as journal:
            rule_based.run_rule_based(inputs.iter_rows(), prompts.read_at, answers.read_at, journal, usage)
        keys = set()
        for prompt_offset, *answer_keys in pairs.select("prompt_offset", "a", "b").iter_rows():
            prompt = prompts.read_at(prompt_offset)
            if prompt["checks"]:
                keys |= {check_schema.check_key(prompt, key) for key in answer_keys}
        return keys


def _run_judge(
    eval_run: Run,
    config: Config,
    backends: ModelBackends,
    judge: runner.PanelJudge,
    pairs: pl.DataFrame,
    usage: UsageMeter,
) -> set[str]:
    """Ask one judge about every pair of different, complete answers, in both orders.

    Returns the keys of its verdicts.
    """
    member = judge.member_config
    # An external server takes no vLLM settings, even if the run had some for a server of its own.
    vllm_settings = {} if member.base_url else judge.vllm_settings(config)
    to_judge = ~pl.col("identical") & pl.col("trained_complete") & pl.col("reference_complete")
    offsets = pairs.filter(to_judge).select("prompt_offset", "a_offset", "b_offset")
    inputs = [runner.JudgeInput(*row) for row in offsets.iter_rows()]
    modes: dict[str, Any] = eval_run.manifest()["stages"]["judge"].get("output_modes", {})
    mode = modes.get(judge.name)

    def save_mode(resolved: str) -> None:
        eval_run.update_manifest("judge", output_modes={**modes, judge.name: resolved})

    with eval_run.open_readers() as (prompts, answers):
        if not usage.stop_reason():
            usage.description, usage.total = f"evaluate: {judge.name}", usage.answers + usage.skipped
            with eval_run.journal("verdicts") as journal:
                mode = (
                    runner.run_judge(
                        judge,
                        config,
                        lambda: inputs,
                        prompts.read_at,
                        answers.read_at,
                        lambda: backends.client_for(member.model, member.base_url, vllm_settings, usage),
                        journal,
                        usage,
                        save_mode,
                    )
                    or mode
                )
        if not mode:
            return set()
        requests = runner.judge_requests(judge, mode, config, inputs, prompts.read_at, answers.read_at)
        return {request.keys[0] for request in requests}


def plan_evaluate(run: Run, config: Config) -> dry_run.DryRun:
    """Estimate the requests of ``evaluate``: both models' answers, and verdicts on all pairs that may differ.

    Pending answers count with their maximum length.
    """
    models = evaluated_models(run, config)
    eval_config, panel = _eval_config(config, models), eval_judges(config)
    prompts = _load_prompts(run, eval_config, log=lambda _: None)
    eval_run = Run(run.path / EVALUATION_DIR)
    plan = dry_run.DryRun(None, 0, 0, 0, 0.0, at_most=True)
    requested = _plan_answers(plan, eval_run, eval_config, prompts)
    num_answers = plan.calls
    _plan_verdicts(plan, eval_run, eval_config, panel, prompts, requested)
    plan.description = f"{num_answers:,} answers and at most {plan.calls - num_answers:,} verdicts"
    return plan


def _plan_answers(plan: dry_run.DryRun, eval_run: Run, config: Config, prompts: list[Prompt]) -> pl.DataFrame:
    """Add the requests for pending answers to ``plan``; return all requested answers (:func:`_requested_answers`)."""
    answered = dry_run.answered_keys(eval_run.journal_path("completions"))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Run(Path(folder))
        with scratch.journal("prompts") as journal:
            journal.append(prompts)
        for policy_index, policy in enumerate(config.policies_resolved()):
            requests = sampling.pending_requests(scratch, config, policy_index, answered)
            dry_run.add_requests(plan, requests, policy.model, policy.base_url, config.sampler.max_tokens)
        return _requested_answers(scratch, config)


def _plan_verdicts(
    plan: dry_run.DryRun,
    eval_run: Run,
    config: Config,
    panel: list[runner.PanelJudge],
    prompts: list[Prompt],
    requested: pl.DataFrame,
) -> None:
    """Add the requests for pending verdicts to ``plan``. A pending answer is replaced by a text of maximum length."""
    pairs = _pairs_to_judge(eval_run, requested)
    prompt_by_id = {prompt.prompt_id: prompt.model_dump(mode="json", exclude_none=True) for prompt in prompts}
    modes = eval_run.manifest()["stages"].get("judge", {}).get("output_modes", {})
    answered = dry_run.answered_keys(eval_run.journal_path("verdicts"))
    inputs = [runner.JudgeInput(index, 2 * index, 2 * index + 1) for index in range(len(pairs))]
    placeholder = "x" * (config.sampler.max_tokens * dry_run.CHARS_PER_TOKEN)
    path = eval_run.journal_path("completions")
    with JournalReader(path) if path.exists() else contextlib.nullcontext() as answers:

        def fetch_answer(index: int) -> dict[str, Any]:
            key, offset = pairs[index // 2].answers[index % 2]
            if answers is None or offset is None:
                return {"key": key, "text": placeholder}
            return answers.read_at(offset)

        def fetch_prompt(index: int) -> dict[str, Any]:
            return prompt_by_id[pairs[index].prompt_id]

        for judge in panel:
            mode = modes.get(judge.name) or runner.expected_output_mode(judge, config)
            requests = runner.judge_requests(judge, mode, config, inputs, fetch_prompt, fetch_answer)
            pending = (request for request in requests if request.keys[0] not in answered)
            member = judge.member_config
            dry_run.add_requests(plan, pending, member.model, member.base_url, config.judge.max_tokens)


@dataclass(frozen=True)
class _PairToJudge:
    """A prompt and its two answers: key, and byte offset or None if the answer is pending."""

    prompt_id: str
    answers: tuple[tuple[str, int | None], tuple[str, int | None]]


def _pairs_to_judge(eval_run: Run, requested: pl.DataFrame) -> list[_PairToJudge]:
    """Return the pairs of ``requested`` answers, the smaller key first, without those known to be identical or not to
    be complete."""
    completions = frames.read_journal_frame(
        eval_run.journal_path("completions"), frames.COMPLETIONS, candidates.summarize_texts
    )
    known = completions.select("key", "offset", "text_hash", complete=candidates.is_complete())
    answers = requested.join(known, on="key", how="left").sort("prompt_id", "key")
    return [
        _PairToJudge(str(prompt_id), tuple(pair.select("key", "offset").rows()))  # type: ignore[arg-type]
        for (prompt_id,), pair in answers.group_by("prompt_id", maintain_order=True)
        if pair["complete"].fill_null(True).all()
        and (pair["text_hash"].null_count() or pair["text_hash"].n_unique() > 1)
    ]
