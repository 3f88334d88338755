"""Compute the result of an evaluation from its journals.

All metrics are over the same prompts: those that this evaluation asked for and that both models have answered
completely under its settings. The win rate is also over one panel: a prompt counts only if every judge compared its
answers in both orders, or if the prompt's checks decide. Otherwise a judge that fails on some prompts would change what
the mean is taken over. Records of earlier evaluations in the same journals are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import polars as pl

from rlaif.config.models import Config
from rlaif.errors import RlaifError
from rlaif.evaluate import answer_metrics, kl, win_rate
from rlaif.evaluate.evaluation_result import EvaluationResult, EvaluationSample
from rlaif.evaluate.trained_model import EvaluatedModels
from rlaif.judge import runner
from rlaif.labeling import judging
from rlaif.llm.reporter import Reporter
from rlaif.pair import aggregation, candidates, refusal_guard
from rlaif.records import hash_to_unit_interval
from rlaif.run.journal import iter_records
from rlaif.run.run import Run
from rlaif.serving import demo_model

MAX_SAMPLES = 12


def collect_results(
    run: Run,
    eval_run: Run,
    config: Config,
    models: EvaluatedModels,
    panel: list[runner.PanelJudge],
    prompts: pl.DataFrame,
    pairs: pl.DataFrame,
    verdict_keys: set[str],
    reporter: Reporter,
) -> EvaluationResult:
    """Compute all metrics, except on prompts that were trained on.

    ``prompts``: the prompts of this evaluation; ``pairs``: one row per prompt that both models have answered;
    ``verdict_keys``: keys of the verdicts on these answers.
    """
    trained_keys = {
        record["key"] for _, record in iter_records(run.journal_path("prompts")) if record["split"] == "train"
    }
    trained_ids = prompts.filter(pl.col("key").is_in(trained_keys))["prompt_id"]
    pairs = pairs.filter(~pl.col("prompt_id").is_in(trained_ids.implode()))
    incomplete = {role: int((~pairs[f"{role}_complete"]).sum()) for role in ("reference", "trained")}
    pairs, num_answered = pairs.filter("reference_complete", "trained_complete"), pairs.height
    verdicts = eval_run.verdicts()
    # A refusal label depends on the answer alone. Other verdicts also depend on the prompt's checks, its reference and
    # the settings.
    verdicts = verdicts.filter((pl.col("kind") == "classify") | pl.col("key").is_in(verdict_keys))
    members = judging.panel_members(panel)
    votes = _panel_votes(verdicts, members, pairs.select("a", "b"))
    judged = pairs.join(votes.select("a", "b", "p_ab", "p_ba"), on=["a", "b"], how="left")
    readable = judged.filter(pl.col("identical") | pl.col("p_ab").is_not_null())
    comparisons = dict(map(_comparison, readable.iter_rows(named=True)))
    outcome = win_rate.win_rate(list(comparisons.values()), seed=config.seed)
    warnings = _judge_warnings(run, models, panel)
    if trained_ids.len():
        warnings.append(f"{trained_ids.len():,} of the prompts were trained on and are ignored")
    if num_answered > pairs.height:
        warnings.append(
            f"{num_answered - pairs.height:,} prompts are not compared, because an answer is not complete "
            f"({incomplete['reference']:,} of the reference, {incomplete['trained']:,} of the trained model); "
            "a model that is cut off more often looks better than it is: raise sampler.max_tokens"
        )
    refusals, checks = _answer_metrics(prompts, pairs, verdicts, members)
    kl_estimate = _measure_kl(eval_run, config, models, pairs, reporter, warnings)
    return EvaluationResult(
        reference=models.reference,
        trained=models.trained,
        judges=[panel_judge.name for panel_judge in panel],
        source=", ".join(config.evaluate.sources) or "the held-out prompts",
        limit=config.evaluate.limit,
        temperature=config.sampler.temperature,
        top_p=config.sampler.top_p,
        max_tokens=config.sampler.max_tokens,
        seed=config.seed,
        prompts=pairs.height,
        wins=outcome.wins,
        ties=outcome.ties,
        losses=outcome.losses,
        identical_answers=int(pairs["identical"].sum()),
        incomplete_reference=incomplete["reference"],
        incomplete_trained=incomplete["trained"],
        unparsable_verdicts=judged.height - readable.height,
        win_rate=outcome.win_rate,
        length_controlled_win_rate=outcome.length_controlled,
        length_ratio=outcome.length_ratio,
        kl_per_answer=kl_estimate.per_answer if kl_estimate else None,
        kl_per_token=kl_estimate.per_token if kl_estimate else None,
        refusals=refusals,
        checks=checks,
        warnings=warnings,
        samples=_samples(eval_run, readable, comparisons, config.seed),
    )


def _panel_votes(verdicts: pl.DataFrame, panel: Sequence[candidates.PanelMember], pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the votes (:func:`rlaif.pair.aggregation.aggregate_votes`) on the ``pairs`` on which the whole panel, or
    the prompt's checks, voted."""
    votes = aggregation.aggregate_votes(verdicts, panel, pairs)
    complete = (
        aggregation.votes_by_judge(verdicts, panel, pairs)
        .group_by("a", "b")
        .agg(num_judges=pl.col("panel_judge").n_unique())
        .filter(pl.col("num_judges") == len({(member.judge, member.model) for member in panel}))
    )
    by_checks = votes.filter(pl.col("decided_by") == "check").select("a", "b")
    return votes.join(pl.concat([by_checks, complete.select("a", "b")]), on=["a", "b"], how="semi")


def _answer_metrics(
    prompts: pl.DataFrame, pairs: pl.DataFrame, verdicts: pl.DataFrame, panel: Sequence[candidates.PanelMember]
) -> tuple[list[answer_metrics.RefusalRates], answer_metrics.CheckPassRates | None]:
    """Compute refusal rates per class of prompt, and check pass rates, of both models."""
    classified = refusal_guard.add_prompt_class(
        pairs, prompts.select("prompt_id", "tags"), judging.known_answer_labels(verdicts, panel)
    )
    check_scores = aggregation.check_scores(verdicts)
    classified = classified.join(check_scores.rename({"key": "a", "check": "check_a"}), on="a", how="left").join(
        check_scores.rename({"key": "b", "check": "check_b"}), on="b", how="left"
    )
    model_answers, check_pairs = [], []
    for row in classified.iter_rows(named=True):
        trained_side, reference_side = row["trained_side"], _other_side(row["trained_side"])
        prompt_class = row["prompt_class"] or "unknown"
        reference_label, trained_label = row[f"answer_label_{reference_side}"], row[f"answer_label_{trained_side}"]
        if reference_label is not None and trained_label is not None:  # both rates are over the same prompts
            model_answers += [
                answer_metrics.ModelAnswer("reference", prompt_class, reference_label),
                answer_metrics.ModelAnswer("trained", prompt_class, trained_label),
            ]
        if row["check_a"] is not None and row["check_b"] is not None:
            check_pairs.append((row[f"check_{reference_side}"], row[f"check_{trained_side}"]))
    return answer_metrics.refusal_rates(model_answers), answer_metrics.check_pass_rates(check_pairs)


def _other_side(side: str) -> str:
    return "b" if side == "a" else "a"


def _comparison(row: Mapping[str, Any]) -> tuple[str, win_rate.Comparison]:
    """Return the prompt id and the comparison from the trained model's point of view."""
    first = second = 0.5
    if not row["identical"]:
        first, second = (row["p_ab"], row["p_ba"]) if row["trained_side"] == "a" else (1 - row["p_ba"], 1 - row["p_ab"])
    return row["prompt_id"], win_rate.Comparison(first, second, row["trained_chars"], row["reference_chars"])


def _judge_warnings(run: Run, models: EvaluatedModels, panel: list[runner.PanelJudge]) -> list[str]:
    """Return warnings about judges that are biased towards one of the models."""
    labelers = {(judge["name"], judge["model"]) for judge in run.manifest()["stages"]["judge"].get("judges", [])}
    warnings = []
    if {(panel_judge.definition.name, panel_judge.member_config.model) for panel_judge in panel} <= labelers:
        warnings.append(
            "the judges that labeled the training data also decide here, and favor what they taught; "
            "use --judge and --model to name another"
        )
    if any(panel_judge.member_config.model == models.reference for panel_judge in panel):
        warnings.append(f"{models.reference} judges its own answers; a judge from another model family is safer")
    return warnings


def _measure_kl(
    eval_run: Run,
    config: Config,
    models: EvaluatedModels,
    pairs: pl.DataFrame,
    reporter: Reporter,
    warnings: list[str],
) -> kl.KlEstimate | None:
    """Estimate the KL divergence from a sample of the trained model's answers.

    An error becomes a warning, because it should not cost the other metrics: a chat template can raise any exception.
    """
    sample_size = min(config.evaluate.kl_samples, pairs.height)
    if not sample_size:
        return None
    reporter.log(f"measuring the KL divergence from the reference on {sample_size:,} answers")
    chosen = sorted(
        pairs.select("prompt_id", "prompt_offset", "a_offset", "b_offset", "trained_side").iter_rows(named=True),
        key=lambda row: hash_to_unit_interval(config.seed, "drift", row["prompt_id"]),
    )[:sample_size]
    try:
        with eval_run.open_readers() as (prompts, answers):
            sampled = [
                (prompts.read_at(row["prompt_offset"]), answers.read_at(row[f"{row['trained_side']}_offset"])["text"])
                for row in chosen
            ]
        with kl.silence_libraries():
            estimate = kl.estimate_kl(
                sampled,
                reference=demo_model.resolve_model(models.reference),
                trained=models.local.path,
                adapter=bool(models.local.base),
            )
    except Exception as error:
        reason = str(error) if isinstance(error, RlaifError) else f"{type(error).__name__}: {error}"
        warnings.append(f"the KL divergence was not measured: {reason.splitlines()[0]}")
        return None
    if estimate and (caveat := kl.kl_caveat(config.sampler.temperature, config.sampler.top_p)):
        warnings.append(caveat)
    return estimate


def _samples(
    eval_run: Run, readable: pl.DataFrame, comparisons: Mapping[str, win_rate.Comparison], seed: int
) -> list[EvaluationSample]:
    """Draw up to ``MAX_SAMPLES`` prompts and read their texts."""
    sampled = sorted(
        readable.iter_rows(named=True), key=lambda row: hash_to_unit_interval(seed, "sample", row["prompt_id"])
    )
    preferred: dict[float, Literal["trained", "reference", "tie"]] = {1.0: "trained", 0.0: "reference", 0.5: "tie"}
    with eval_run.open_readers() as (prompts, answers):
        return [
            EvaluationSample(
                prompt_id=row["prompt_id"],
                prompt=prompts.read_at(row["prompt_offset"])["messages"][-1].get("content") or "",
                reference=answers.read_at(row[f"{_other_side(row['trained_side'])}_offset"])["text"],
                trained=answers.read_at(row[f"{row['trained_side']}_offset"])["text"],
                preferred=preferred[comparisons[row["prompt_id"]].score],
            )
            for row in sampled[:MAX_SAMPLES]
        ]
