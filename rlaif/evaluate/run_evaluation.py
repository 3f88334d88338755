"""``evaluate``: the trained model against its reference, on prompts that were never trained on.

RUN/evaluation is a run of its own: its prompts are the held-out ones, its completions are both models' answers, its
verdicts compare them in both orders. So it is resumed like any other, and what the reference has answered once is not
asked again for the next model. It holds what every evaluation asked for; each takes of it what its own prompts and
settings ask for, and no more. What was measured stands in RUN/evaluation/evaluation.json.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from rlaif.config.models import Config, PanelMemberConfig, PolicyConfig
from rlaif.errors import UsageError
from rlaif.evaluate import results as measures
from rlaif.evaluate.trained_model import EVALUATION_DIR, EvaluatedModels, evaluated_models, nothing_held_out_error
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
from rlaif.records import Failure, Prompt
from rlaif.run import frames
from rlaif.run.atomic_write import atomic_write_bytes
from rlaif.run.journal import JournalReader, iter_records
from rlaif.run.run import Run


def eval_judges(config: Config) -> list[runner.PanelJudge]:
    """Those that will compare. Raises :class:`UsageError` where none does, or one cannot be asked as is wanted."""
    panel = [
        panel_judge
        for panel_judge in judging.load_panel(_eval_panel_config(config))
        if panel_judge.definition.file.kind == "compare"
    ]
    if not panel:
        raise UsageError("none of the judges compares two answers", hint="Give --judge NAME of a judge that does.")
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
) -> dict[str, Any]:
    """Answer, compare, measure; returns what it wrote to evaluation.json. Raises :class:`TooManyFailuresError` at the
    end.

    ``config`` is the run's as judged: without judges under [evaluate], those that labelled compare here too.
    """
    models = evaluated_models(run, config)
    eval_config, panel = _eval_config(config, models), eval_judges(config)
    eval_prompts = _load_prompts(run, eval_config, reporter.log)
    backends.register_local_model(models.local)
    eval_run = Run(run.path / EVALUATION_DIR)
    usage = new_meter("evaluate", config, limits)
    if usage.budget_usd is not None:
        for panel_judge in panel:
            require_known_prices(panel_judge.member_config.model, panel_judge.member_config.base_url)
    with run.lock(), eval_run.lock():
        run.start_stage("evaluate", config)
        try:
            prompts = _journal_prompts(eval_run, eval_prompts)
            eval_run.start_stage("generate", eval_config, restart=True)
            with reporter.progress(usage):
                try:
                    sampling.sample(
                        eval_run, eval_config, backends, usage, prompt_offsets=set(prompts["prompt_offset"])
                    )
                finally:
                    eval_run.finish_stage("generate", **usage.summary())
                eval_run.start_stage("judge", eval_config, restart=True)
                try:
                    pairs = _pair_answers(eval_run, eval_config, prompts)
                    verdict_keys = _run_rule_based(eval_run, pairs, usage)
                    for panel_judge in panel:
                        verdict_keys |= _run_judge(eval_run, eval_config, backends, panel_judge, pairs, usage)
                finally:
                    eval_run.finish_stage("judge")
            backends.close()  # its memory is needed for the drift
            stop_reason = usage.stop_reason()
            if stop_reason:  # the drift takes minutes, and is measured when the rest is there
                eval_config = eval_config.model_copy(
                    update={"evaluate": eval_config.evaluate.model_copy(update={"kl_samples": 0})}
                )
            results = measures.collect_results(
                run, eval_run, eval_config, models, panel, prompts, pairs, verdict_keys, reporter
            )
            results["stopped"] = stop_reason
            encoded = orjson.dumps(results, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
            atomic_write_bytes(eval_run.path / "evaluation.json", encoded)
        finally:
            run.finish_stage("evaluate", **usage.summary())
    raise_if_too_many_failures(config, usage)
    return results


def _eval_config(config: Config, models: EvaluatedModels) -> Config:
    """The settings of the inner run: both models answer each prompt once; its judges are those of [evaluate]."""
    sampler = config.sampler.model_copy(update={"model": [], "base_url": [], "n": 2})
    policies = [PolicyConfig(model=models.reference), PolicyConfig(model=models.trained)]
    return _eval_panel_config(config).model_copy(update={"sampler": sampler, "policies": policies})


def _eval_panel_config(config: Config) -> Config:
    """``config`` with the seats of the evaluation: those that label, or those that [evaluate] names.

    A model that labels is asked where it labels, and with the same settings of vLLM's. ``evaluate.base_url`` goes over
    that for every seat.
    """
    requested, members = config.evaluate, list[PanelMemberConfig]()
    with contextlib.suppress(UsageError):  # who compares may be named without anybody who labels
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
    """What is to be answered: the prompts of ``evaluate.sources``, else those that this run held out. Writes nothing.

    Raises what stands in the way of them, checks that cannot be run among it, before anything is asked."""
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
        with tempfile.TemporaryDirectory() as folder:  # ids tell these prompts apart, not all that were ever given
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
    """``prompts`` as the inner run has them, which is given what it lacks. A prompt that is asked for under another id,
    or with other checks, than before is journaled anew: the newest counts. Columns: key, prompt_id, tags,
    prompt_offset."""
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
    """The answers that ``config`` asks for, one of each model to each prompt (at the byte offsets ``prompt_offsets``),
    whether they are there or not. Columns: prompt_id, key, role ("reference" or "trained")."""
    rows = [
        (request.prompt_id, request.keys[0], role)
        for policy_index, role in enumerate(("reference", "trained"))
        for request in sampling.pending_requests(eval_run, config, policy_index, (), prompt_offsets=prompt_offsets)
    ]
    return pl.DataFrame(rows, schema={"prompt_id": pl.String, "key": pl.String, "role": pl.String}, orient="row")


def _pair_answers(eval_run: Run, config: Config, prompts: pl.DataFrame) -> pl.DataFrame:
    """One row for each of ``prompts`` that both have answered. Columns: prompt_id, prompt_offset, a, b, a_offset,
    b_offset, trained_side ("a" or "b"), trained_chars, reference_chars, identical."""
    answers = frames.read_journal_frame(
        eval_run.journal_path("completions"), frames.COMPLETIONS, candidates.summarize_texts
    )
    answers = _requested_answers(eval_run, config, set(prompts["prompt_offset"])).join(
        answers.select("key", "offset", "chars", "text_hash"), on="key"
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
    ).sort("prompt_id")


def _run_rule_based(eval_run: Run, pairs: pl.DataFrame, usage: UsageMeter) -> set[str]:
    """Journal what the prompts' checks and the text classifier of refusals say of each answer. Returns the keys of what
    the checks say."""
    rows = pl.concat(
        [pairs.select("prompt_offset", answer=side, none=pl.lit(None, pl.Int64)) for side in ("a_offset", "b_offset")]
    ).sort("prompt_offset")
    prompts, texts = (
        JournalReader(eval_run.journal_path("prompts")),
        JournalReader(eval_run.journal_path("completions")),
    )
    try:
        with eval_run.journal("verdicts") as journal:
            records = rule_based.rule_based_verdicts(rows.iter_rows(), prompts.read_at, texts.read_at, journal)
            for batch in iter(lambda: list(itertools.islice(records, judging.RECORD_BATCH)), []):
                journal.append(batch)
                for record in batch:
                    if isinstance(record, Failure):  # counted, but no sign that a server fails
                        usage.failures[record.kind] += 1
                        usage.last_error = record.error
        prompt_answers = (
            (prompts.read_at(offset), answers)
            for offset, *answers in pairs.select("prompt_offset", "a", "b").iter_rows()
        )
        return {
            check_schema.check_key(prompt, key)
            for prompt, answers in prompt_answers
            if prompt["checks"]
            for key in answers
        }
    finally:
        prompts.close()
        texts.close()


def _run_judge(
    eval_run: Run,
    config: Config,
    backends: ModelBackends,
    panel_judge: runner.PanelJudge,
    pairs: pl.DataFrame,
    usage: UsageMeter,
) -> set[str]:
    """Ask one judge about every pair of answers that differ, in both orders. Returns the keys of its verdicts."""
    work = pairs.filter(~pl.col("identical")).select("prompt_offset", "a_offset", "b_offset")
    prompts, texts = (
        JournalReader(eval_run.journal_path("prompts")),
        JournalReader(eval_run.journal_path("completions")),
    )

    def judge_inputs() -> Iterator[runner.JudgeInput]:
        for row in work.iter_rows():
            yield runner.JudgeInput(*row)

    # Of vLLM's settings there are none for a server that somebody else keeps, though the run had one of its own.
    options = {} if panel_judge.member_config.base_url else panel_judge.vllm_settings(config)
    modes: dict[str, Any] = eval_run.manifest()["stages"]["judge"].get("output_modes", {})

    def on_mode_resolved(mode: str) -> None:
        modes[panel_judge.name] = mode
        eval_run.update_manifest("judge", output_modes=modes)

    try:
        if not usage.stop_reason():
            usage.description, usage.total = (
                f"evaluate: {panel_judge.name}",
                usage.answers + usage.skipped + 2 * work.height,
            )
            with eval_run.journal("verdicts") as journal:
                runner.run_judge(
                    panel_judge,
                    config,
                    judge_inputs,
                    prompts.read_at,
                    texts.read_at,
                    lambda: backends.client_for(
                        panel_judge.member_config.model, panel_judge.member_config.base_url, options, usage
                    ),
                    journal,
                    usage,
                    on_mode_resolved,
                )
        mode = modes.get(panel_judge.name)
        requests = (
            runner.judge_requests(panel_judge, mode, config, judge_inputs(), prompts.read_at, texts.read_at)
            if mode
            else ()
        )
        return {request.keys[0] for request in requests}
    finally:
        prompts.close()
        texts.close()


def plan_evaluate(run: Run, config: Config) -> dry_run.DryRun:
    """The plan of ``evaluate``: both models' answers, and each judge's verdicts on all of them that may differ. Answers
    that are still owed count at their allowed length."""
    models = evaluated_models(run, config)
    eval_config, panel = _eval_config(config, models), eval_judges(config)
    prompts = _load_prompts(run, eval_config, log=lambda _: None)
    eval_run = Run(run.path / EVALUATION_DIR)
    plan = dry_run.DryRun(None, 0, 0, 0, 0.0, at_most=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Run(Path(folder))
        with scratch.journal("prompts") as journal:
            journal.append(prompts)
        answered = dry_run.answered_keys(eval_run.journal_path("completions"))
        for policy_index, policy in enumerate(eval_config.policies_resolved()):
            requests = sampling.pending_requests(scratch, eval_config, policy_index, answered)
            dry_run.add_requests(plan, requests, policy.model, policy.base_url, eval_config.sampler.max_tokens)
        requested = _requested_answers(scratch, eval_config)
    answers, pairs = plan.calls, _pending_pairs(eval_run, requested)
    prompt_by_id = {prompt.prompt_id: prompt for prompt in prompts}
    modes, answered = (
        eval_run.manifest()["stages"].get("judge", {}).get("output_modes", {}),
        dry_run.answered_keys(eval_run.journal_path("verdicts")),
    )
    work = [runner.JudgeInput(index, 2 * index, 2 * index + 1) for index in range(len(pairs))]
    with contextlib.ExitStack() as stack:
        path = eval_run.journal_path("completions")
        texts = stack.enter_context(contextlib.closing(JournalReader(path))) if path.exists() else None

        def answer(index: int) -> dict[str, Any]:
            _, *sides = pairs[index // 2]
            key, offset = sides[index % 2]
            if texts is None or offset is None:
                return {"key": key, "text": "x" * (eval_config.sampler.max_tokens * dry_run.CHARS_PER_TOKEN)}
            return texts.read_at(offset)

        def prompt(index: int) -> dict[str, Any]:
            return prompt_by_id[pairs[index][0]].model_dump(mode="json", exclude_none=True)

        for panel_judge in panel:
            mode = modes.get(panel_judge.name) or runner.expected_output_mode(panel_judge, eval_config)
            requests = runner.judge_requests(panel_judge, mode, eval_config, work, prompt, answer)
            pending = (request for request in requests if request.keys[0] not in answered)
            dry_run.add_requests(
                plan,
                pending,
                panel_judge.member_config.model,
                panel_judge.member_config.base_url,
                eval_config.judge.max_tokens,
            )
    plan.description = f"{answers:,} answers and at most {plan.calls - answers:,} verdicts"
    return plan


AnswerRef = tuple[str, int | None]
"""Its key, and the byte offset at which it stands, if it does."""


def _pending_pairs(eval_run: Run, requested: pl.DataFrame) -> list[tuple[str, AnswerRef, AnswerRef]]:
    """The prompts (by id) and their two answers of those that ``requested`` (:func:`_requested_answers`) has, the
    smaller key first, without those that are known to be the same."""
    completions = frames.read_journal_frame(
        eval_run.journal_path("completions"), frames.COMPLETIONS, candidates.summarize_texts
    )
    answers = requested.join(completions.select("key", "offset", "text_hash"), on="key", how="left").sort(
        "prompt_id", "key"
    )
    return [
        (prompt_id, *pair.select("key", "offset").rows())
        for (prompt_id,), pair in answers.group_by("prompt_id", maintain_order=True)
        if pair["text_hash"].null_count() or pair["text_hash"].n_unique() > 1
    ]
