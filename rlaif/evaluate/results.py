"""What an evaluation found, from its journals: win rate, lengths, refusals, checks, drift, and a few samples to read.

All of it over the same prompts: those that this evaluation asked for, with the one answer to each of either model that
these settings ask for. What earlier evaluations left in the journals counts for nothing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import polars as pl

from rlaif.config.models import Config
from rlaif.errors import RlaifError
from rlaif.evaluate import answer_metrics, kl, win_rate
from rlaif.evaluate.trained_model import EvaluatedModels
from rlaif.judge import runner
from rlaif.labeling import judging
from rlaif.llm.reporter import Reporter
from rlaif.pair import aggregation, refusal_guard
from rlaif.records import hash_to_unit_interval
from rlaif.run.journal import JournalReader, iter_records
from rlaif.run.run import Run
from rlaif.serving import demo_model
from rlaif.stats import Estimate

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
) -> dict[str, Any]:
    """What evaluation.json says. ``prompts`` and ``pairs``: the prompts of this evaluation, and the rows of those that
    both models have answered; ``verdict_keys``: the keys of the verdicts on them."""
    trained_keys = {
        record["key"] for _, record in iter_records(run.journal_path("prompts")) if record["split"] == "train"
    }
    trained_ids = prompts.filter(pl.col("key").is_in(trained_keys))["prompt_id"]
    pairs = pairs.filter(~pl.col("prompt_id").is_in(trained_ids.implode()))
    verdicts = eval_run.verdicts()
    # A refusal hangs on the answer alone; the others on the prompt's checks and reference too, and on the settings.
    verdicts = verdicts.filter((pl.col("kind") == "classify") | pl.col("key").is_in(verdict_keys))
    votes = aggregation.aggregate_votes(verdicts, judging.panel_members(panel), pairs.select("a", "b"))
    judged = pairs.join(votes.select("a", "b", "p_ab", "p_ba"), on=["a", "b"], how="left")
    readable = judged.filter(pl.col("identical") | pl.col("p_ab").is_not_null())
    rows = list(map(_comparison, readable.iter_rows(named=True)))
    outcome = win_rate.win_rate([comparison for _, comparison in rows], seed=config.seed)
    warnings = _warnings(run, models, panel)
    if trained_ids.len():
        warnings.append(f"{trained_ids.len():,} of the prompts were trained on and are left out")
    refusals, checks = _answer_metrics(prompts, pairs, verdicts)
    kl_estimates = _measure_kl(eval_run, config, models, pairs, reporter, warnings)
    return {
        "reference": models.reference,
        "trained": models.trained,
        "judges": [panel_judge.name for panel_judge in panel],
        "source": ", ".join(config.evaluate.sources) or "the prompts that were held out",
        "limit": config.evaluate.limit,
        "temperature": config.sampler.temperature,
        "top_p": config.sampler.top_p,
        "max_tokens": config.sampler.max_tokens,
        "seed": config.seed,
        "prompts": pairs.height,
        "wins": outcome.wins,
        "ties": outcome.ties,
        "losses": outcome.losses,
        "identical_answers": int(pairs["identical"].sum()),
        "unparsable_verdicts": judged.height - readable.height,
        "win_rate": _to_json(outcome.win_rate),
        "length_controlled_win_rate": _to_json(outcome.length_controlled),
        "length_ratio": _to_json(outcome.length_ratio),
        "kl_per_answer": _to_json(kl_estimates and kl_estimates["answer"]),
        "kl_per_token": _to_json(kl_estimates and kl_estimates["token"]),
        "refusals": [
            {name: _to_json(value) if isinstance(value, Estimate) else value for name, value in row.items()}
            for row in refusals
        ],
        "checks": checks and [{"model": name, "pass_rate": _to_json(value)} for name, value in checks.items()],
        "warnings": warnings,
        "samples": _samples(eval_run, readable, dict(rows), config.seed),
    }


def _answer_metrics(
    prompts: pl.DataFrame, pairs: pl.DataFrame, verdicts: pl.DataFrame
) -> tuple[list[dict[str, Any]], dict[str, Estimate] | None]:
    """Refusals by kind of prompt, and the checks met, of the reference and the trained model."""
    classified = refusal_guard.add_prompt_class(
        pairs, prompts.select("prompt_id", "tags"), refusal_guard.answer_labels(verdicts)
    )
    check_scores = aggregation.check_scores(verdicts)
    classified = classified.join(check_scores.rename({"key": "a", "check": "check_a"}), on="a", how="left").join(
        check_scores.rename({"key": "b", "check": "check_b"}), on="b", how="left"
    )
    model_answers, pass_rates = [], []
    for row in classified.iter_rows(named=True):
        trained_side = row["trained_side"]
        reference_side = "b" if trained_side == "a" else "a"
        prompt_class = row["prompt_class"] or "unknown"
        model_answers += [answer_metrics.ModelAnswer("reference", prompt_class, row[f"answer_label_{reference_side}"]),
                 answer_metrics.ModelAnswer("trained", prompt_class, row[f"answer_label_{trained_side}"])]  # fmt: skip
        if row["check_a"] is not None and row["check_b"] is not None:
            pass_rates.append((row[f"check_{reference_side}"], row[f"check_{trained_side}"]))
    return answer_metrics.refusal_rates(model_answers), answer_metrics.check_pass_rates(pass_rates)


def _comparison(row: Mapping[str, Any]) -> tuple[str, win_rate.Comparison]:
    """One prompt's comparison, seen from the trained model."""
    first = second = 0.5
    if not row["identical"]:
        first, second = (row["p_ab"], row["p_ba"]) if row["trained_side"] == "a" else (1 - row["p_ba"], 1 - row["p_ab"])
    return row["prompt_id"], win_rate.Comparison(first, second, row["trained_chars"], row["reference_chars"])


def _warnings(run: Run, models: EvaluatedModels, panel: list[runner.PanelJudge]) -> list[str]:
    labelers = {(judge["name"], judge["model"]) for judge in run.manifest()["stages"]["judge"].get("judges", [])}
    warnings = []
    if {(panel_judge.definition.name, panel_judge.member_config.model) for panel_judge in panel} <= labelers:
        warnings.append(
            "the judges that labelled decide here too, and favour what they taught: give --judge and --model of another"
        )
    if any(panel_judge.member_config.model == models.reference for panel_judge in panel):
        warnings.append(f"{models.reference} judges its own answers; a judge of another family is safer")
    return warnings


def _measure_kl(
    eval_run: Run,
    config: Config,
    models: EvaluatedModels,
    pairs: pl.DataFrame,
    reporter: Reporter,
    warnings: list[str],
) -> dict[str, Any] | None:
    """The KL divergence of a sample of the trained model's answers, where the parts for it are there."""
    sample_size = min(config.evaluate.kl_samples, pairs.height)
    if not sample_size:
        return None
    reporter.log(f"measuring the drift from the reference on {sample_size:,} answers")
    chosen = sorted(
        pairs.select("prompt_id", "prompt_offset", "a_offset", "b_offset", "trained_side").iter_rows(named=True),
        key=lambda row: hash_to_unit_interval(config.seed, "drift", row["prompt_id"]),
    )[:sample_size]
    prompts, texts = (
        JournalReader(eval_run.journal_path("prompts")),
        JournalReader(eval_run.journal_path("completions")),
    )
    try:
        sampled = [
            (prompts.read_at(row["prompt_offset"]), texts.read_at(row[f"{row['trained_side']}_offset"])["text"])
            for row in chosen
        ]
        with kl.silence_libraries():
            estimates = kl.estimate_kl(
                sampled,
                reference=demo_model.resolve_model(models.reference),
                trained=models.local.path,
                adapter=bool(models.local.base),
            )
    # A figure less is no reason to lose the others, and a model's chat template may raise whatever it likes.
    except Exception as error:
        reason = str(error) if isinstance(error, RlaifError) else f"{type(error).__name__}: {error}"
        warnings.append(f"the drift is not measured: {reason.splitlines()[0]}")
        return None
    finally:
        prompts.close()
        texts.close()
    if estimates and (caveat := kl.kl_caveat(config.sampler.temperature, config.sampler.top_p)):
        warnings.append(caveat)
    return estimates


def _samples(
    eval_run: Run, readable: pl.DataFrame, comparisons: Mapping[str, win_rate.Comparison], seed: int
) -> list[dict[str, Any]]:
    sampled = sorted(
        readable.iter_rows(named=True), key=lambda row: hash_to_unit_interval(seed, "sample", row["prompt_id"])
    )
    prompts, texts = (
        JournalReader(eval_run.journal_path("prompts")),
        JournalReader(eval_run.journal_path("completions")),
    )
    preferred = {1.0: "trained", 0.0: "reference", 0.5: "tie"}
    try:
        return [
            {
                "prompt_id": row["prompt_id"],
                "prompt": prompts.read_at(row["prompt_offset"])["messages"][-1].get("content") or "",
                "reference": texts.read_at(row["b_offset" if row["trained_side"] == "a" else "a_offset"])["text"],
                "trained": texts.read_at(row[f"{row['trained_side']}_offset"])["text"],
                "preferred": preferred[comparisons[row["prompt_id"]].score],
            }
            for row in sampled[:MAX_SAMPLES]
        ]
    finally:
        prompts.close()
        texts.close()


def _to_json(estimate: Any) -> dict[str, Any] | None:
    return dataclasses.asdict(estimate) if estimate else None
