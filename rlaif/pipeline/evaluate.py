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

from rlaif.config import Config, JudgeEntry, PolicyConfig
from rlaif.errors import UsageError
from rlaif.generate import prompts as taking
from rlaif.generate import sample as sampling
from rlaif.judge import ask as asking
from rlaif.judge import check, without_model
from rlaif.llm.ask import require_prices
from rlaif.llm.budget import Meter
from rlaif.llm.engines import Engines
from rlaif.pair import select
from rlaif.pipeline import commands, measures, rounds
from rlaif.pipeline import plan as planning
from rlaif.pipeline.trained import FOLDER, Models, models, nothing_held_out
from rlaif.records import Failure, Prompt
from rlaif.run import tables, whole
from rlaif.run.directory import Run
from rlaif.run.journal import Reader, read


def judges(config: Config) -> list[asking.Seat]:
    """Those that will compare. Raises :class:`UsageError` where none does, or one cannot be asked as is wanted."""
    seats = [seat for seat in rounds.panel(_judged_by(config)) if seat.judge.file.kind == "compare"]
    if not seats:
        raise UsageError("none of the judges compares two answers", mend="Give --judge NAME of a judge that does.")
    for seat in seats:
        asking.require_verdict(seat, config)
    return seats


def evaluate(
    run: Run, config: Config, watch: commands.Watch, engines: Engines, *, limits: commands.Limits | None = None
) -> dict[str, Any]:
    """Answer, compare, measure; returns what it wrote to evaluation.json. Raises :class:`TooManyFailures` at the end.

    ``config`` is the run's as judged: without judges under [evaluate], those that labelled compare here too.
    """
    both = models(run, config)
    own, seats = _settings(config, both), judges(config)
    wanted = _prompts(run, own, watch.say)
    engines.know(both.local)
    inner = Run(run.path / FOLDER)
    meter = commands.meter_for("evaluate", config, limits)
    if meter.budget_usd is not None:
        for seat in seats:
            require_prices(seat.entry.model, seat.entry.base_url)
    with run.writing(), inner.writing():
        run.begin("evaluate", config)
        try:
            prompts = _take(inner, wanted)
            inner.begin("generate", own, restart=True)
            with watch.watch(meter):
                try:
                    sampling.sample(inner, own, engines, meter, among=set(prompts["prompt_offset"]))
                finally:
                    inner.end("generate", **meter.facts())
                inner.begin("judge", own, restart=True)
                try:
                    paired = _paired(inner, own, prompts)
                    asked = _without_a_model(inner, paired, meter)
                    for seat in seats:
                        asked |= _compare(inner, own, engines, seat, paired, meter)
                finally:
                    inner.end("judge")
            engines.close()  # its memory is needed for the drift
            stopped = meter.reason_to_stop()
            if stopped:  # the drift takes minutes, and is measured when the rest is there
                own = own.model_copy(update={"evaluate": own.evaluate.model_copy(update={"drift_samples": 0})})
            told = measures.measure(run, inner, own, both, seats, prompts, paired, asked, watch)
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
    """``config`` with the seats of the evaluation: those that label, or those that [evaluate] names.

    A model that labels is asked where it labels, and with the same settings of vLLM's. ``evaluate.base_url`` goes over
    that for every seat.
    """
    wanted, seats = config.evaluate, list[JudgeEntry]()
    with contextlib.suppress(UsageError):  # who compares may be named without anybody who labels
        seats = config.panel()
    known = {seat.model: seat for seat in reversed(seats)}
    if wanted.judges or wanted.model or not seats:
        model = wanted.model or config.judge.model or (next(iter(known)) if len(known) == 1 else None)
        names = wanted.judges or list(dict.fromkeys(seat.name for seat in seats)) or config.judge.judges
        judge = config.judge.model_copy(update={"judges": names, "model": model, "base_url": []})
        seats = [
            seat.model_copy(update={"base_url": known[seat.model].base_url, "vllm": known[seat.model].vllm})
            if seat.model in known
            else seat
            for seat in config.model_copy(update={"judge": judge, "judges": []}).panel()
        ]
    if wanted.base_url:
        seats = [seat.model_copy(update={"base_url": wanted.base_url}) for seat in seats]
    return config.model_copy(update={"judges": seats})


def _prompts(run: Run, config: Config, say: Callable[[str], None]) -> list[Prompt]:
    """What is to be answered: the prompts of ``evaluate.source``, else those that this run held out. Writes nothing.

    Raises what stands in the way of them, checks that cannot be run among it, before anything is asked."""
    wanted = config.evaluate
    if wanted.source:
        given = config.prompts.model_copy(
            update={"source": wanted.source, "heldout_share": 0.0, "limit": wanted.limit, "decontaminate": []}
        )
        with tempfile.TemporaryDirectory() as folder:  # ids tell these prompts apart, not all that were ever given
            trial = Run(folder)
            taking.take(trial, config.model_copy(update={"prompts": given}), say)
            prompts = [Prompt.model_validate(record) for _, record in read(trial.journal_path("prompts"))]
    else:
        records = (record for _, record in read(run.journal_path("prompts")) if record["split"] == "heldout")
        prompts = [
            Prompt.model_validate(record | {"split": "train"}) for record in itertools.islice(records, wanted.limit)
        ]
        if not prompts:
            raise nothing_held_out(run)
    for prompt in prompts:
        if prompt.checks:
            check.prepare(prompt.checks, where=f"prompt {prompt.prompt_id} ({prompt.source})")
    return prompts


def _take(inner: Run, prompts: list[Prompt]) -> pl.DataFrame:
    """``prompts`` as the inner run has them, which is given what it lacks. A prompt that is asked for under another id,
    or with other checks, than before is journaled anew: the newest counts. Columns: key, prompt_id, tags,
    prompt_offset."""
    wanted = {prompt.key: prompt for prompt in prompts}
    there = {
        record["key"]: Prompt.model_validate(record)
        for _, record in read(inner.journal_path("prompts"))
        if record["key"] in wanted
    }
    with inner.journal("prompts") as journal:
        for key, prompt in wanted.items():
            if key not in there or there[key].model_copy(update={"source": prompt.source}) != prompt:
                journal.append([prompt])
    known = tables.scan(inner.journal_path("prompts"), tables.PROMPTS)
    known = known.filter(pl.col("key").is_in(set(wanted)))
    return known.select("key", "prompt_id", "tags", prompt_offset="offset")


def _answers_of(inner: Run, config: Config, among: set[int] | None = None) -> pl.DataFrame:
    """The answers that ``config`` asks for, one of each model to each prompt (at the byte offsets ``among``), whether
    they are there or not. Columns: prompt_id, key, of ("reference" or "trained")."""
    rows = [
        (request.prompt_id, request.keys[0], of)
        for position, of in enumerate(("reference", "trained"))
        for request in sampling.requests(inner, config, position, (), among=among)
    ]
    return pl.DataFrame(rows, schema={"prompt_id": pl.String, "key": pl.String, "of": pl.String}, orient="row")


def _paired(inner: Run, config: Config, prompts: pl.DataFrame) -> pl.DataFrame:
    """One row for each of ``prompts`` that both have answered. Columns: prompt_id, prompt_offset, a, b, a_offset,
    b_offset, trained_is ("a" or "b"), trained_chars, reference_chars, same."""
    known = tables.scan(inner.journal_path("completions"), tables.COMPLETIONS, select.shorten)
    known = _answers_of(inner, config, set(prompts["prompt_offset"])).join(
        known.select("key", "offset", "chars", "same"), on="key"
    )
    reference, trained = (known.filter(pl.col("of") == of).drop("of") for of in ("reference", "trained"))
    joined = trained.join(reference, on="prompt_id", suffix="_reference").join(
        prompts.select("prompt_id", "prompt_offset"), on="prompt_id"
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


def _without_a_model(inner: Run, paired: pl.DataFrame, meter: Meter) -> set[str]:
    """Journal what the prompts' checks and the text classifier of refusals say of each answer. Returns the keys of what
    the checks say."""
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
                    if isinstance(record, Failure):  # counted, but no sign that a server fails
                        meter.failures[record.kind] += 1
                        meter.last_error = record.error
        checked = (
            (prompts.at(offset), answers) for offset, *answers in paired.select("prompt_offset", "a", "b").iter_rows()
        )
        return {check.key_for(prompt, key) for prompt, answers in checked if prompt["checks"] for key in answers}
    finally:
        prompts.close()
        texts.close()


def _compare(
    inner: Run, config: Config, engines: Engines, seat: asking.Seat, paired: pl.DataFrame, meter: Meter
) -> set[str]:
    """Ask one judge about every pair of answers that differ, in both orders. Returns the keys of its verdicts."""
    work = paired.filter(~pl.col("same")).select("prompt_offset", "a_offset", "b_offset")
    prompts, texts = Reader(inner.journal_path("prompts")), Reader(inner.journal_path("completions"))

    def material() -> Iterator[asking.Material]:
        for row in work.iter_rows():
            yield asking.Material(*row)

    # Of vLLM's settings there are none for a server that somebody else keeps, though the run had one of its own.
    options = {} if seat.entry.base_url else seat.vllm(config)
    modes: dict[str, Any] = inner.manifest()["stages"]["judge"].get("modes", {})

    def settled(mode: str) -> None:
        modes[seat.name] = mode
        inner.update_manifest("judge", modes=modes)

    try:
        if not meter.reason_to_stop():
            meter.what, meter.total = f"evaluate: {seat.name}", meter.answers + meter.skipped + 2 * work.height
            with inner.journal("verdicts") as journal:
                asking.ask_seat(
                    seat,
                    config,
                    material,
                    prompts.at,
                    texts.at,
                    lambda: engines.client(seat.entry.model, seat.entry.base_url, options, meter),
                    journal,
                    meter,
                    settled,
                )
        mode = modes.get(seat.name)
        asked = asking.requests(seat, mode, config, material(), prompts.at, texts.at) if mode else ()
        return {request.keys[0] for request in asked}
    finally:
        prompts.close()
        texts.close()


def plan_evaluate(run: Run, config: Config) -> planning.Plan:
    """The plan of ``evaluate``: both models' answers, and each judge's verdicts on all of them that may differ. Answers
    that are still owed count at their allowed length."""
    both = models(run, config)
    own, seats = _settings(config, both), judges(config)
    prompts = _prompts(run, own, say=lambda _: None)
    inner = Run(run.path / FOLDER)
    plan = planning.Plan(None, 0, 0, 0, 0.0, at_most=True)
    with tempfile.TemporaryDirectory() as folder:
        trial = Run(Path(folder))
        with trial.journal("prompts") as taken:
            taken.append(prompts)
        done = planning.answered(inner.journal_path("completions"))
        for position, policy in enumerate(own.pool()):
            requests = sampling.requests(trial, own, position, done)
            planning.add(plan, requests, policy.model, policy.base_url, own.sampler.max_tokens)
        wanted = _answers_of(trial, own)
    answers, pairs = plan.calls, _compared(inner, wanted)
    asked = {prompt.prompt_id: prompt for prompt in prompts}
    modes, done = (
        inner.manifest()["stages"].get("judge", {}).get("modes", {}),
        planning.answered(inner.journal_path("verdicts")),
    )
    work = [asking.Material(place, 2 * place, 2 * place + 1) for place in range(len(pairs))]
    with contextlib.ExitStack() as stack:
        path = inner.journal_path("completions")
        texts = stack.enter_context(contextlib.closing(Reader(path))) if path.exists() else None

        def answer(place: int) -> dict[str, Any]:
            _, *both = pairs[place // 2]
            key, offset = both[place % 2]
            if texts is None or offset is None:
                return {"key": key, "text": "x" * (own.sampler.max_tokens * planning.CHARS_PER_TOKEN)}
            return texts.at(offset)

        def prompt(place: int) -> dict[str, Any]:
            return asked[pairs[place][0]].model_dump(mode="json", exclude_none=True)

        for seat in seats:
            mode = modes.get(seat.name) or planning.likely_mode(seat, own)
            requests = asking.requests(seat, mode, own, work, prompt, answer)
            owed = (request for request in requests if request.keys[0] not in done)
            planning.add(plan, owed, seat.entry.model, seat.entry.base_url, own.judge.max_tokens)
    plan.what = f"{answers:,} answers and at most {plan.calls - answers:,} verdicts"
    return plan


Answer = tuple[str, int | None]
"""Its key, and the byte offset at which it stands, if it does."""


def _compared(inner: Run, wanted: pl.DataFrame) -> list[tuple[str, Answer, Answer]]:
    """The prompts (by id) and their two answers of those that ``wanted`` (:func:`_answers_of`) has, the smaller
    key first, without those that are known to be the same."""
    known = tables.scan(inner.journal_path("completions"), tables.COMPLETIONS, select.shorten)
    found = wanted.join(known.select("key", "offset", "same"), on="key", how="left").sort("prompt_id", "key")
    return [
        (prompt_id, *pair.select("key", "offset").rows())
        for (prompt_id,), pair in found.group_by("prompt_id", maintain_order=True)
        if pair["same"].null_count() or pair["same"].n_unique() > 1
    ]
