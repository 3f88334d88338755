"""``evaluate``: the trained model against its reference, on prompts that were never trained on.

RUN/evaluation is a run of its own: its prompts are the held-out ones, its completions are both models' answers, its
verdicts compare them in both orders. So it is resumed like any other, and what the reference has answered once is not
asked again for the next model. What was measured stands in RUN/evaluation/evaluation.json.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
import polars as pl

from rlaif.config import Config, PolicyConfig
from rlaif.errors import RlaifError, UsageError
from rlaif.evaluate import answers, drift, winrate
from rlaif.generate import prompts as taking
from rlaif.generate import sample as sampling
from rlaif.judge import ask as asking
from rlaif.judge import without_model
from rlaif.llm import demo
from rlaif.llm.budget import Meter
from rlaif.llm.engines import Engines
from rlaif.pair import balance, select, settle
from rlaif.pipeline import commands, rounds
from rlaif.pipeline.trained import FOLDER, Models, models, nothing_held_out
from rlaif.records import Failure, Prompt, unit_interval
from rlaif.run import tables, whole
from rlaif.run.directory import Run
from rlaif.run.journal import Reader, read
from rlaif.stats import Estimate

SAMPLES = 12


def judges(config: Config) -> list[asking.Seat]:
    """Those that will compare. Raises :class:`UsageError` where none does."""
    seats = [seat for seat in rounds.panel(_judged_by(config)) if seat.judge.file.kind == "compare"]
    if not seats:
        raise UsageError("none of the judges compares two answers", mend="Give --judge NAME of a judge that does.")
    return seats


def evaluate(
    run: Run, config: Config, watch: commands.Watch, engines: Engines, *, limits: commands.Limits | None = None
) -> dict[str, Any]:
    """Answer, compare, measure; returns what it wrote to evaluation.json. Raises :class:`TooManyFailures` at the end.

    ``config`` is the run's as judged: without judges under [evaluate], those that labelled compare here too.
    """
    both = models(run, config)
    own, seats = _settings(config, both), judges(config)
    engines.know(both.local)
    inner = Run(run.path / FOLDER)
    meter = commands.meter_for("evaluate", config, limits)
    with run.writing(), inner.writing():
        run.begin("evaluate", config)
        try:
            _take(run, inner, own, watch)
            inner.begin("generate", own, restart=True)
            with watch.watch(meter):
                try:
                    sampling.sample(inner, own, engines, meter)
                finally:
                    inner.end("generate", **meter.facts())
                inner.begin("judge", own, restart=True)
                try:
                    paired = _paired(inner, both)
                    _without_a_model(inner, paired, meter)
                    for seat in seats:
                        _compare(inner, own, engines, seat, paired, meter)
                finally:
                    inner.end("judge")
            engines.close()  # its memory is needed for the drift
            stopped = meter.reason_to_stop()
            if stopped:  # the drift takes minutes, and is measured when the rest is there
                own = own.model_copy(update={"evaluate": own.evaluate.model_copy(update={"drift_samples": 0})})
            told = _measure(run, inner, own, both, seats, paired, watch)
            told["stopped"] = stopped
            kept = orjson.dumps(told, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
            whole.write(inner.path / "evaluation.json", kept)
        finally:
            run.end("evaluate", **meter.facts())
    commands._enforce(config, meter)
    return told


def _settings(config: Config, both: Models) -> Config:
    """The settings of the inner run: both models answer each prompt once; its judges are those of [evaluate]."""
    sampler = config.sampler.model_copy(update={"model": [], "base_url": [], "n": 2})
    policies = [PolicyConfig(model=both.reference), PolicyConfig(model=both.trained)]
    return _judged_by(config).model_copy(update={"sampler": sampler, "policies": policies})


def _judged_by(config: Config) -> Config:
    """``config`` with the judges of [evaluate] in the place of those that label, where it names any."""
    wanted = config.evaluate
    if not wanted.judges and not wanted.model:
        return config
    judge = config.judge.model_copy(
        update={
            "judges": wanted.judges or [seat.name for seat in config.panel()],
            "model": wanted.model or config.judge.model,
            "base_url": wanted.base_url,
        }
    )
    return config.model_copy(update={"judge": judge, "judges": []})


def _take(run: Run, inner: Run, config: Config, watch: commands.Watch) -> None:
    """Fill the inner run's prompts: those of ``evaluate.source``, else those that this run held out."""
    wanted = config.evaluate
    if wanted.source:
        given = config.prompts.model_copy(
            update={"source": wanted.source, "heldout_share": 0.0, "limit": wanted.limit, "decontaminate": []}
        )
        taking.take(inner, config.model_copy(update={"prompts": given}), watch.say)
        return
    taken = 0
    with inner.journal("prompts") as journal:
        for _, record in read(run.journal_path("prompts")):
            if record["split"] != "heldout" or (wanted.limit and taken >= wanted.limit):
                continue
            taken += 1
            if record["key"] not in journal:
                journal.append([Prompt.model_validate(record).model_copy(update={"split": "train"})])
    if not taken:
        raise nothing_held_out(run)


def _paired(inner: Run, both: Models) -> pl.DataFrame:
    """One row a prompt that both have answered. Columns: prompt_id, prompt_offset, a, b, a_offset, b_offset, trained_is
    ("a" or "b"), trained_chars, reference_chars, same."""
    known = tables.scan(inner.journal_path("completions"), tables.COMPLETIONS, select.shorten)
    prompts = tables.scan(inner.journal_path("prompts"), tables.PROMPTS)
    columns = ("prompt_id", "key", "offset", "chars", "same")
    reference = known.filter(pl.col("model") == both.reference).select(columns)
    trained = known.filter(pl.col("model") == both.trained).select(columns)
    joined = trained.join(reference, on="prompt_id", suffix="_reference").join(
        prompts.select("prompt_id", prompt_offset="offset"), on="prompt_id"
    )
    first = pl.col("key") < pl.col("key_reference")
    return joined.select(
        "prompt_id",
        "prompt_offset",
        a=pl.when(first).then("key").otherwise("key_reference"),
        b=pl.when(first).then("key_reference").otherwise("key"),
        a_offset=pl.when(first).then("offset").otherwise("offset_reference"),
        b_offset=pl.when(first).then("offset_reference").otherwise("offset"),
        trained_is=pl.when(first).then(pl.lit("a")).otherwise(pl.lit("b")),
        trained_chars="chars",
        reference_chars="chars_reference",
        same=pl.col("same") == pl.col("same_reference"),
    ).sort("prompt_id")


def _without_a_model(inner: Run, paired: pl.DataFrame, meter: Meter) -> None:
    """Journal what the prompts' checks and the text classifier of refusals say of each answer."""
    without_model.require_checks(inner.journal_path("prompts"))
    each = pl.concat(
        [paired.select("prompt_offset", answer=side, none=pl.lit(None, pl.Int64)) for side in ("a_offset", "b_offset")]
    ).sort("prompt_offset")
    prompts, texts = Reader(inner.journal_path("prompts")), Reader(inner.journal_path("completions"))
    try:
        with inner.journal("verdicts") as journal:
            found = without_model.verdicts(each.iter_rows(), prompts.at, texts.at, journal)
            for block in iter(lambda: list(itertools.islice(found, rounds.BLOCK)), []):
                journal.append(block)
                for record in block:
                    if isinstance(record, Failure):
                        meter.failed_with(record.kind, record.error)
    finally:
        prompts.close()
        texts.close()


def _compare(
    inner: Run, config: Config, engines: Engines, seat: asking.Seat, paired: pl.DataFrame, meter: Meter
) -> None:
    """Ask one judge about every pair of answers that differ, in both orders."""
    if meter.reason_to_stop():
        return
    work = paired.filter(~pl.col("same")).select("prompt_offset", "a_offset", "b_offset")
    meter.what, meter.total = f"evaluate: {seat.name}", meter.answers + meter.skipped + 2 * work.height
    prompts, texts = Reader(inner.journal_path("prompts")), Reader(inner.journal_path("completions"))

    def material() -> Iterator[asking.Material]:
        for row in work.iter_rows():
            yield asking.Material(*row)

    modes: dict[str, Any] = inner.manifest()["stages"]["judge"].get("modes", {})

    def settled(mode: str) -> None:
        inner.update_manifest("judge", modes={**modes, seat.name: mode})

    try:
        with inner.journal("verdicts") as journal:
            asking.ask_seat(
                seat,
                config,
                material,
                prompts.at,
                texts.at,
                lambda: engines.client(seat.entry.model, seat.entry.base_url, config.judge.vllm, meter),
                journal,
                meter,
                settled,
            )
    finally:
        prompts.close()
        texts.close()


def _measure(
    run: Run,
    inner: Run,
    config: Config,
    both: Models,
    seats: list[asking.Seat],
    paired: pl.DataFrame,
    watch: commands.Watch,
) -> dict[str, Any]:
    trained_on = {record["key"] for _, record in read(run.journal_path("prompts")) if record["split"] == "train"}
    seen = {record["prompt_id"] for _, record in read(inner.journal_path("prompts")) if record["key"] in trained_on}
    paired = paired.filter(~pl.col("prompt_id").is_in(list(seen)))
    verdicts = inner.verdicts()
    said = settle.comparisons(verdicts, rounds._as_frames_know(seats), paired.select("a", "b"))
    judged = paired.join(said.select("a", "b", "p_ab", "p_ba"), on=["a", "b"], how="left")
    readable = judged.filter(pl.col("same") | pl.col("p_ab").is_not_null())
    rows = list(map(_row, readable.iter_rows(named=True)))
    found = winrate.win_rate([compared for _, compared in rows], seed=config.seed)
    warnings = _warnings(run, both, seats)
    if seen:
        warnings.append(f"{len(seen):,} of the prompts were trained on and are left out")
    refusing, checks = _answers(inner, paired, verdicts)
    far = _drift(inner, config, both, paired, watch, warnings)
    return {
        "reference": both.reference,
        "trained": both.trained,
        "judges": [seat.name for seat in seats],
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
    inner: Run, paired: pl.DataFrame, verdicts: pl.DataFrame
) -> tuple[list[dict[str, Any]], dict[str, Estimate] | None]:
    """Refusals by kind of prompt, and the checks met, of the reference and the trained model."""
    tags = tables.scan(inner.journal_path("prompts"), tables.PROMPTS).select("prompt_id", "tags")
    known = balance.with_classes(paired, tags, balance.classes(verdicts))
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
            (prompts.at(row["prompt_offset"])["messages"], texts.at(row[f"{row['trained_is']}_offset"])["text"])
            for row in chosen
        ]
        with drift.quiet():
            return drift.kl(
                sampled, reference=demo.resolve(both.reference), trained=both.local.path, adapter=bool(both.local.base)
            )
    except (ImportError, OSError, RuntimeError, RlaifError) as error:  # a figure less is no reason to lose the others
        warnings.append(f"the drift is not measured: {str(error).splitlines()[0]}")
        return None
    finally:
        prompts.close()
        texts.close()


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
