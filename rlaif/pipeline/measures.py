"""What an evaluation found, from its journals: win rate, lengths, refusals, checks, drift, and a few samples to read.

All of it over the same prompts: those that this evaluation asked for, with the one answer to each of either model that
these settings ask for. What earlier evaluations left in the journals counts for nothing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import polars as pl

from rlaif.config import Config
from rlaif.errors import RlaifError
from rlaif.evaluate import answers, drift, winrate
from rlaif.judge import ask as asking
from rlaif.llm import demo
from rlaif.pair import balance, settle
from rlaif.pipeline import commands, rounds
from rlaif.pipeline.trained import Models
from rlaif.records import unit_interval
from rlaif.run.directory import Run
from rlaif.run.journal import Reader, read
from rlaif.stats import Estimate

SAMPLES = 12


def measure(
    run: Run,
    inner: Run,
    config: Config,
    both: Models,
    seats: list[asking.Seat],
    prompts: pl.DataFrame,
    paired: pl.DataFrame,
    asked: set[str],
    watch: commands.Watch,
) -> dict[str, Any]:
    """What evaluation.json says. ``prompts`` and ``paired``: the prompts of this evaluation, and the rows of those that
    both models have answered; ``asked``: the keys of the verdicts on them."""
    trained_on = {record["key"] for _, record in read(run.journal_path("prompts")) if record["split"] == "train"}
    seen = prompts.filter(pl.col("key").is_in(trained_on))["prompt_id"]
    paired = paired.filter(~pl.col("prompt_id").is_in(seen.implode()))
    verdicts = inner.verdicts()
    # A refusal hangs on the answer alone; the others on the prompt's checks and reference too, and on the settings.
    verdicts = verdicts.filter((pl.col("kind") == "classify") | pl.col("key").is_in(asked))
    said = settle.comparisons(verdicts, rounds._as_frames_know(seats), paired.select("a", "b"))
    judged = paired.join(said.select("a", "b", "p_ab", "p_ba"), on=["a", "b"], how="left")
    readable = judged.filter(pl.col("same") | pl.col("p_ab").is_not_null())
    rows = list(map(_row, readable.iter_rows(named=True)))
    found = winrate.win_rate([compared for _, compared in rows], seed=config.seed)
    warnings = _warnings(run, both, seats)
    if seen.len():
        warnings.append(f"{seen.len():,} of the prompts were trained on and are left out")
    refusing, checks = _answers(prompts, paired, verdicts)
    far = _drift(inner, config, both, paired, watch, warnings)
    return {
        "reference": both.reference,
        "trained": both.trained,
        "judges": [seat.name for seat in seats],
        "source": ", ".join(config.evaluate.source) or "the prompts that were held out",
        "limit": config.evaluate.limit,
        "temperature": config.sampler.temperature,
        "top_p": config.sampler.top_p,
        "max_tokens": config.sampler.max_tokens,
        "seed": config.seed,
        "prompts": paired.height,
        "wins": found.wins,
        "ties": found.ties,
        "losses": found.losses,
        "the same answer": int(paired["same"].sum()),
        "without a readable verdict": judged.height - readable.height,
        "win_rate": _facts(found.win_rate),
        "length_controlled_win_rate": _facts(found.length_controlled),
        "length_ratio": _facts(found.length_ratio),
        "kl_per_answer": _facts(far and far["answer"]),
        "kl_per_token": _facts(far and far["token"]),
        "refusals": [
            {name: _facts(value) if isinstance(value, Estimate) else value for name, value in row.items()}
            for row in refusing
        ],
        "checks": checks and [{"the share of checks met": name, "": _facts(value)} for name, value in checks.items()],
        "warnings": warnings,
        "samples": _samples(inner, readable, dict(rows), config.seed),
    }


def _answers(
    prompts: pl.DataFrame, paired: pl.DataFrame, verdicts: pl.DataFrame
) -> tuple[list[dict[str, Any]], dict[str, Estimate] | None]:
    """Refusals by kind of prompt, and the checks met, of the reference and the trained model."""
    known = balance.with_classes(paired, prompts.select("prompt_id", "tags"), balance.classes(verdicts))
    met = settle.checked(verdicts)
    known = known.join(met.rename({"key": "a", "check": "check_a"}), on="a", how="left").join(
        met.rename({"key": "b", "check": "check_b"}), on="b", how="left"
    )
    told, shares = [], []
    for row in known.iter_rows(named=True):
        own = row["trained_is"]
        other = "b" if own == "a" else "a"
        kind = row["prompt_class"] or "of no known kind"
        told += [answers.Answered("reference", kind, row[f"answers_{other}"]),
                 answers.Answered("trained", kind, row[f"answers_{own}"])]  # fmt: skip
        if row["check_a"] is not None and row["check_b"] is not None:
            shares.append((row[f"check_{other}"], row[f"check_{own}"]))
    return answers.refusals(told), answers.checks(shares)


def _row(row: Mapping[str, Any]) -> tuple[str, winrate.Compared]:
    """One prompt's comparison, seen from the trained model."""
    first = second = 0.5
    if not row["same"]:
        first, second = (row["p_ab"], row["p_ba"]) if row["trained_is"] == "a" else (1 - row["p_ba"], 1 - row["p_ab"])
    return row["prompt_id"], winrate.Compared(first, second, row["trained_chars"], row["reference_chars"])


def _warnings(run: Run, both: Models, seats: list[asking.Seat]) -> list[str]:
    labelled = {(judge["name"], judge["model"]) for judge in run.manifest()["stages"]["judge"].get("judges", [])}
    warnings = []
    if {(seat.judge.name, seat.entry.model) for seat in seats} <= labelled:
        warnings.append(
            "the judges that labelled decide here too, and favour what they taught: give --judge and --model of another"
        )
    if any(seat.entry.model == both.reference for seat in seats):
        warnings.append(f"{both.reference} judges its own answers; a judge of another family is safer")
    return warnings


def _drift(
    inner: Run, config: Config, both: Models, paired: pl.DataFrame, watch: commands.Watch, warnings: list[str]
) -> dict[str, Any] | None:
    """The KL divergence of a sample of the trained model's answers, where the parts for it are there."""
    wanted = min(config.evaluate.drift_samples, paired.height)
    if not wanted:
        return None
    watch.say(f"measuring the drift from the reference on {wanted:,} answers")
    chosen = sorted(
        paired.select("prompt_id", "prompt_offset", "a_offset", "b_offset", "trained_is").iter_rows(named=True),
        key=lambda row: unit_interval(config.seed, "drift", row["prompt_id"]),
    )[:wanted]
    prompts, texts = Reader(inner.journal_path("prompts")), Reader(inner.journal_path("completions"))
    try:
        sampled = [
            (prompts.at(row["prompt_offset"]), texts.at(row[f"{row['trained_is']}_offset"])["text"]) for row in chosen
        ]
        with drift.quiet():
            found = drift.kl(
                sampled, reference=demo.resolve(both.reference), trained=both.local.path, adapter=bool(both.local.base)
            )
    # A figure less is no reason to lose the others, and a model's chat template may raise whatever it likes.
    except Exception as error:
        why = str(error) if isinstance(error, RlaifError) else f"{type(error).__name__}: {error}"
        warnings.append(f"the drift is not measured: {why.splitlines()[0]}")
        return None
    finally:
        prompts.close()
        texts.close()
    if found and (doubt := drift.doubt(config.sampler.temperature, config.sampler.top_p)):
        warnings.append(doubt)
    return found


def _samples(
    inner: Run, readable: pl.DataFrame, compared: Mapping[str, winrate.Compared], seed: int
) -> list[dict[str, Any]]:
    drawn = sorted(readable.iter_rows(named=True), key=lambda row: unit_interval(seed, "sample", row["prompt_id"]))
    prompts, texts = Reader(inner.journal_path("prompts")), Reader(inner.journal_path("completions"))
    words = {1.0: "trained", 0.0: "reference", 0.5: "tie"}
    try:
        return [
            {
                "prompt_id": row["prompt_id"],
                "prompt": prompts.at(row["prompt_offset"])["messages"][-1].get("content") or "",
                "reference": texts.at(row["b_offset" if row["trained_is"] == "a" else "a_offset"])["text"],
                "trained": texts.at(row[f"{row['trained_is']}_offset"])["text"],
                "preferred": words[compared[row["prompt_id"]].score],
            }
            for row in drawn[:SAMPLES]
        ]
    finally:
        prompts.close()
        texts.close()


def _facts(found: Any) -> dict[str, Any] | None:
    return dataclasses.asdict(found) if found else None
