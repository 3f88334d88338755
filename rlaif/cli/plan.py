"""``rlaif plan``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli import console
from rlaif.errors import UsageError

if TYPE_CHECKING:
    from rlaif.config import Config
    from rlaif.pipeline.forecast import Forecast, Part
    from rlaif.pipeline.workload import Figures


def _flag(text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=text, show_default=False, **options)


def plan(
    prompts: Annotated[str, _flag("How many to answer: 10000, 10k, 1M.", metavar="N")],
    from_: Annotated[
        Path | None, _flag("A pilot run: its settings, and all that it measured.", "--from", metavar="RUN")
    ] = None,
    pilot_gpus: Annotated[int | None, _flag("GPUs that the pilot had.  [default: 1]", min=1)] = None,
    n: Annotated[int | None, _flag("Answers to each prompt.", "-n")] = None,
    prompt_tokens: Annotated[float | None, _flag("Of a prompt, on average.", min=1)] = None,
    answer_tokens: Annotated[float | None, _flag("Of an answer, on average.", min=1)] = None,
    model: Annotated[list[str] | None, _flag("The policy.", "--model", "-m", metavar="M")] = None,
    base_url: Annotated[list[str] | None, _flag("Its endpoint, if it has a list price.", metavar="URL")] = None,
    judge: Annotated[list[str] | None, _flag("As for rlaif judge.", metavar="NAME[@MODEL]")] = None,
    judge_model: Annotated[str | None, _flag("The model that judges.", metavar="J")] = None,
    judge_base_url: Annotated[list[str] | None, _flag("Its endpoint.", metavar="URL")] = None,
    strategy: Annotated[str | None, _flag("As for rlaif judge.")] = None,
    kept: Annotated[float | None, _flag("Pairs that are kept, for each prompt.", min=0)] = None,
    gpus: Annotated[int | None, _flag("GPUs that sample, then judge, then train.", min=1)] = None,
    judge_gpus: Annotated[int | None, _flag("Where another number judges.", min=1)] = None,
    train_gpus: Annotated[int | None, _flag("Where another number trains.", min=1)] = None,
    tokens_per_second: Annotated[
        float | None, _flag("Answer tokens a second of one GPU under full load.", min=0.001)
    ] = None,
    judge_tokens_per_second: Annotated[
        float | None, _flag("Tokens a second that one GPU reads (not cached) and writes as judge.", min=0.001)
    ] = None,
    train_pairs_per_second: Annotated[float | None, _flag("Pairs a second that one GPU trains on.", min=1e-6)] = None,
    requests_per_minute: Annotated[float | None, _flag("That an endpoint takes.")] = None,
    usd_per_gpu_hour: Annotated[float | None, _flag("Rent.", min=0)] = None,
    human_share: Annotated[float | None, _flag("Share of pairs for people.")] = None,
    reviews: Annotated[str | None, _flag("Labels at most: a quota instead of the share.", metavar="N")] = None,
    seconds_a_review: Annotated[float | None, _flag("Of a person.", min=0.1)] = None,
    people: Annotated[int | None, _flag("Who label.", min=1)] = None,
    hours_a_day: Annotated[float | None, _flag("That each of them has for it.", min=0.01, max=24)] = None,
    usd_per_person_hour: Annotated[float | None, _flag("Pay.", min=0)] = None,
    runs: Annotated[int | None, _flag("Runs side by side, each with a part of the prompts.", min=1)] = None,
    memory_gb: Annotated[float | None, _flag("Of the machine that a run is on.", min=0.1)] = None,
    requests_per_second: Annotated[float | None, _flag("That one run asks and journals.", min=0.1)] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """What a number of prompts takes: tokens, GPU hours, dollars, people, disk, and what gives way first."""
    from rlaif import settings
    from rlaif.pipeline import forecast, workload
    from rlaif.run.directory import open_run

    pilot = open_run(from_) if from_ else None
    known = settings.read(pilot.path / settings.FILE_NAME) | workload.as_run(pilot) if pilot else {}
    policy = known.get("policies") or known.get("sampler", {}).get("model")
    seats = known.get("judges") or known.get("judge", {}).get("model")
    config = settings.over(
        known,
        {
            "sampler.n": n,
            "sampler.model": model or (None if policy else ["the policy"]),
            "sampler.base_url": base_url,
            "judge.judges": judge,
            "judge.model": judge_model or (None if seats else "the judge"),
            "judge.base_url": judge_base_url,
            "judge.strategy": strategy,
            "pairs.human_share": human_share,
            "client.requests_per_minute": requests_per_minute,
        },
    )
    given = {
        "n": n, "panel": judge or strategy, "policy": model or base_url,
        "judge": judge_model or judge_base_url or ([name for name in judge or [] if "@" in name] or None),
        "kept": kept, "gpus": gpus,
        "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens,
        "judge_gpus": judge_gpus, "train_gpus": train_gpus, "pilot_gpus": pilot_gpus,
        "tokens_per_second": tokens_per_second, "judge_tokens_per_second": judge_tokens_per_second,
        "train_pairs_per_second": train_pairs_per_second, "usd_per_gpu_hour": usd_per_gpu_hour,
        "reviews": None if reviews is None else count(reviews), "seconds_a_review": seconds_a_review, "people": people,
        "hours_a_day": hours_a_day, "usd_per_person_hour": usd_per_person_hour, "runs": runs, "memory_gb": memory_gb,
        "requests_per_second": requests_per_second,
    }  # fmt: skip
    work, figures = workload.workload(config, count(prompts), given, pilot)
    seen = forecast.forecast(work)
    if json:
        console.put_json(seen.as_json() | {"sources": figures.sources})
        return
    for line in [*_head(config, seen), "", *_table(seen), "", *_limits(seen), "", *_sources(figures, from_)]:
        console.put(line.rstrip())


def count(text: str) -> int:
    """``10000``, ``10k``, ``1M``, ``1.5M``."""
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        number = float((text[:-1] if scale else text).replace(",", "")) * (scale or 1)
        if not 1 <= number < 1e15:
            raise ValueError
    except ValueError:
        raise UsageError(f"{text!r} is no number", mend="Write it like 10000, 10k or 1M.") from None
    return round(number)


def short(number: float) -> str:
    """Three digits and a letter; nothing for 0."""
    limit, sign = next(((limit, sign) for limit, sign in SIGNS if number >= limit), (1.0, ""))
    digits = 0 if not sign or number >= 100 * limit else 1 if number >= 10 * limit else 2
    return f"{number / limit:,.{digits}f}{sign}" if number else ""


SIGNS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def time(part: Part) -> str:
    """By the clock; of people in days, of which each has its hours."""
    return days(part.hours) if part.name == "people" and part.hours else clock(part.hours)


def clock(hours: float) -> str:
    from rlaif.llm.budget import duration

    return duration(hours * 3600) if hours < 48 else days(hours)


def days(hours: float) -> str:
    return f"{hours / 24:,.{1 if hours < 240 else 0}f} days"


def usd(dollars: float) -> str:
    return f"${dollars:,.2f}" if 0 < dollars < 10 else f"${dollars:,.0f}" if dollars else ""


def _head(config: Config, seen: Forecast) -> list[str]:
    work = seen.workload
    policies = ", ".join(policy.model for policy in config.pool())
    seats = ", ".join(f"{seat.name}@{seat.model}" for seat in config.panel()) or "the prompts' checks"
    split = f" in {work.runs} runs" if work.runs > 1 else ""
    quota = work.reviews is not None and seen.pairs
    share = f" (human_share = {seen.reviews / seen.pairs / work.labels_a_pair:.2g})" if quota else ""
    kept = f"{seen.pairs:,.0f} pairs kept, {seen.reviews:,.0f} labels by people"
    return [
        f"{work.prompts:,} prompts{split}, {work.sampling.records:.3g} answers each by {policies}",
        f"judged by {seats}",
        f"{kept}{share}, {seen.records:,.0f} records",
    ]


COLUMNS = ("", "requests", "tokens in", "cached", "tokens out", "GPU hours", "time", "dollars")


def _table(seen: Forecast) -> list[str]:
    runs, rows = seen.workload.runs, [COLUMNS]
    names = {"asking": "asking *", "people": f"people ({seen.people_hours:,.0f} h of work)"}
    for part in seen.parts:
        read = part.cost.prompt_tokens
        cells = (short(part.requests), short(read), f"{part.cached_tokens / read:.0%}" if read else "",
                 short(part.cost.completion_tokens), f"{part.gpu_hours:,.1f}" if part.gpu_hours else "",
                 time(part) if part.hours else "", usd(part.cost.usd))  # fmt: skip
        rows.append((names.get(part.name, part.name), *cells))
    whole = seen.cost
    rows.append(("machines, in all", "", short(whole.prompt_tokens), "", short(whole.completion_tokens),
                 f"{seen.gpu_hours:,.1f}", clock(seen.machine_hours),
                 usd(whole.usd - seen.part("people").cost.usd)))  # fmt: skip
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    lines.insert(-1, "-" * len(lines[0]))
    who = "one process asks and journals" if runs == 1 else f"{runs} processes ask and journal, one a run"
    return [*lines, f"* {who}: sampling and judging together take no less than that"]


HELP = {
    "sampling": "More GPUs (--gpus), fewer or shorter answers (-n, --answer-tokens).",
    "judging": "More GPUs (--judge-gpus), a smaller judge, fewer seats or aspects, --strategy rate-only.",
    "asking": "Split the prompts into several runs (--runs).",
    "pairing": "Split the prompts into several runs (--runs).",
    "taking in": "Split the prompts into several runs (--runs).",
    "training": "More GPUs (--train-gpus), or fewer pairs: the surest of them.",
}


def _limits(seen: Forecast) -> list[str]:
    work = seen.workload
    which = "the run" if work.runs == 1 else "each run"
    lines = [f"Disk: {seen.bytes / 1e9:,.1f} GB. Memory of {which}: {seen.memory_bytes / 1e9:,.1f} GB."]
    if seen.runs_needed > work.runs:
        lines.append(
            f"{work.memory_gb:g} GB cannot hold that: split the prompts into {seen.runs_needed} runs (--runs)."
        )
    first, *others = seen.bottlenecks()
    lines.append(f"First bottleneck: {first.name}, {time(first)}.")
    lines.append("  " + (_people(seen) if first.name == "people" else HELP[first.name]))
    lines.append("Then: " + ", ".join(f"{part.name} {time(part)}" for part in others[:3]) + ".")
    if any(not engine.gpus and not engine.requests_per_second for engine in (work.policy, work.judge)):
        lines.append("How fast an endpoint answers is not in it: --requests-per-minute.")
    if work.train_pairs_per_second is None:
        lines.append("Training is not in it: --train-pairs-per-second N, or --from a run that was trained.")
    return lines


def _people(seen: Forecast) -> str:
    """How sure labels make one depends on how many there are, not on which share of the pairs they are."""
    work = seen.workload
    a_day = work.people * work.hours_a_day * 3600 / work.seconds_a_review
    return (
        f"{work.people} people at {work.hours_a_day:g} h a day label {a_day:,.0f} pairs a day. More people (--people), "
        "or a\n  quota instead of a share (--reviews): what labels say of the rest grows sure by their number."
    )


def _sources(figures: Figures, pilot: Path | None) -> list[str]:
    lines = []
    for source, head in (("measured", f"Measured in {pilot}"), ("computed", "Computed from the judge files"),
                         ("given", "Given"), ("assumed", "Assumed")):  # fmt: skip
        told = [f"{name.replace('_', ' ')} {figures.told(name)}".rstrip()
                for name, found in figures.sources.items() if found == source]  # fmt: skip
        if told:
            lines.append(f"{head}: {', '.join(told)}.")
    return [line for text in lines for line in textwrap.wrap(text, 110, subsequent_indent="  ")]
