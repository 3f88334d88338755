"""``rlaif plan``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli import console
from rlaif.errors import UsageError
from rlaif.format import format_days, format_duration

if TYPE_CHECKING:
    from rlaif.config.models import Config
    from rlaif.planning.capacity import CapacityPlan, PlanStage
    from rlaif.planning.workload import PlanInputs


def _option(text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=text, show_default=False, **options)


def plan(
    prompts: Annotated[str, _option("How many to answer: 10000, 10k, 1M.", metavar="N")],
    from_: Annotated[
        Path | None, _option("A pilot run: its settings, and all that it measured.", "--from", metavar="RUN")
    ] = None,
    pilot_gpus: Annotated[int | None, _option("GPUs that the pilot had.  [default: 1]", min=1)] = None,
    n: Annotated[int | None, _option("Answers to each prompt.", "-n")] = None,
    prompt_tokens: Annotated[float | None, _option("Of a prompt, on average.", min=1)] = None,
    answer_tokens: Annotated[float | None, _option("Of an answer, on average.", min=1)] = None,
    model: Annotated[list[str] | None, _option("The policy.", "--model", "-m", metavar="M")] = None,
    base_url: Annotated[list[str] | None, _option("Its endpoint, if it has a list price.", metavar="URL")] = None,
    judge: Annotated[list[str] | None, _option("As for rlaif judge.", metavar="NAME[@MODEL]")] = None,
    judge_model: Annotated[str | None, _option("The model that judges.", metavar="J")] = None,
    judge_base_url: Annotated[list[str] | None, _option("Its endpoint.", metavar="URL")] = None,
    strategy: Annotated[str | None, _option("As for rlaif judge.")] = None,
    pairs_per_prompt: Annotated[float | None, _option("Pairs that are kept, for each prompt.", min=0)] = None,
    gpus: Annotated[int | None, _option("GPUs that sample, then judge, then train.", min=1)] = None,
    judge_gpus: Annotated[int | None, _option("Where another number judges.", min=1)] = None,
    train_gpus: Annotated[int | None, _option("Where another number trains.", min=1)] = None,
    tokens_per_second: Annotated[
        float | None, _option("Answer tokens a second of one GPU under full load.", min=0.001)
    ] = None,
    judge_tokens_per_second: Annotated[
        float | None, _option("Tokens a second that one GPU reads (not cached) and writes as judge.", min=0.001)
    ] = None,
    train_pairs_per_second: Annotated[float | None, _option("Pairs a second that one GPU trains on.", min=1e-6)] = None,
    requests_per_minute: Annotated[float | None, _option("That an endpoint takes.")] = None,
    usd_per_gpu_hour: Annotated[float | None, _option("Rent.", min=0)] = None,
    human_fraction: Annotated[float | None, _option("Share of pairs for people.")] = None,
    max_reviews: Annotated[str | None, _option("Labels at most: a quota instead of the share.", metavar="N")] = None,
    review_seconds: Annotated[float | None, _option("Of a person.", min=0.1)] = None,
    annotators: Annotated[int | None, _option("Who label.", min=1)] = None,
    hours_per_day: Annotated[float | None, _option("That each of them has for it.", min=0.01, max=24)] = None,
    usd_per_annotator_hour: Annotated[float | None, _option("Pay.", min=0)] = None,
    runs: Annotated[int | None, _option("Runs side by side, each with a part of the prompts.", min=1)] = None,
    memory_gb: Annotated[float | None, _option("Of the machine that a run is on.", min=0.1)] = None,
    requests_per_second: Annotated[float | None, _option("That one run asks and journals.", min=0.1)] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """What a number of prompts takes: tokens, GPU hours, dollars, people, disk, and what gives way first."""
    from rlaif.config import loader
    from rlaif.planning import capacity, workload
    from rlaif.run.run import open_run

    pilot = open_run(from_) if from_ else None
    values = loader.read_file(pilot.path / loader.CONFIG_FILE) | workload.config_of_run(pilot) if pilot else {}
    policy = values.get("policies") or values.get("sampler", {}).get("model")
    panel = values.get("panel") or values.get("judge", {}).get("model")
    config = loader.merge(
        values,
        {
            "sampler.n": n,
            "sampler.model": model or (None if policy else ["the policy"]),
            "sampler.base_url": base_url,
            "judge.panel": judge,
            "judge.model": judge_model or (None if panel else "the judge"),
            "judge.base_url": judge_base_url,
            "judge.strategy": strategy,
            "pairs.human_fraction": human_fraction,
            "client.requests_per_minute": requests_per_minute,
        },
    )
    overrides = {
        "n": n,
        "panel": judge or strategy,
        "policy": model or base_url,
        "judge": judge_model or judge_base_url or ([name for name in judge or [] if "@" in name] or None),
        "pairs_per_prompt": pairs_per_prompt,
        "gpus": gpus,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "judge_gpus": judge_gpus,
        "train_gpus": train_gpus,
        "pilot_gpus": pilot_gpus,
        "tokens_per_second": tokens_per_second,
        "judge_tokens_per_second": judge_tokens_per_second,
        "train_pairs_per_second": train_pairs_per_second,
        "usd_per_gpu_hour": usd_per_gpu_hour,
        "max_reviews": None if max_reviews is None else parse_count(max_reviews),
        "review_seconds": review_seconds,
        "annotators": annotators,
        "hours_per_day": hours_per_day,
        "usd_per_annotator_hour": usd_per_annotator_hour,
        "runs": runs,
        "memory_gb": memory_gb,
        "requests_per_second": requests_per_second,
    }
    work, figures = workload.build_workload(config, parse_count(prompts), overrides, pilot)
    estimate = capacity.plan_capacity(work)
    if json:
        console.echo_json(estimate.as_json() | {"sources": figures.sources})
        return
    for line in [
        *_header_lines(config, estimate),
        "",
        *_table_lines(estimate),
        "",
        *_limit_lines(estimate),
        "",
        *_source_lines(figures, from_),
    ]:
        console.echo(line.rstrip())


def parse_count(text: str) -> int:
    """``10000``, ``10k``, ``1M``, ``1.5M``."""
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        number = float((text[:-1] if scale else text).replace(",", "")) * (scale or 1)
        if not 1 <= number < 1e15:
            raise ValueError
    except ValueError:
        raise UsageError(f"{text!r} is no number", hint="Write it like 10000, 10k or 1M.") from None
    return round(number)


def format_count(number: float) -> str:
    """Three digits and a letter; nothing for 0."""
    limit, suffix = next(((limit, suffix) for limit, suffix in SUFFIXES if number >= limit), (1.0, ""))
    digits = 0 if not suffix or number >= 100 * limit else 1 if number >= 10 * limit else 2
    return f"{number / limit:,.{digits}f}{suffix}" if number else ""


SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_stage_time(part: PlanStage) -> str:
    """By the clock; of people in days, of which each has its hours."""
    return format_days(part.hours) if part.name == "human review" and part.hours else format_duration(part.hours * 3600)


def format_usd(dollars: float) -> str:
    return f"${dollars:,.2f}" if 0 < dollars < 10 else f"${dollars:,.0f}" if dollars else ""


def _header_lines(config: Config, estimate: CapacityPlan) -> list[str]:
    work = estimate.workload
    policies = ", ".join(policy.model for policy in config.policies_resolved())
    panel = ", ".join(f"{member.name}@{member.model}" for member in config.panel_members()) or "the prompts' checks"
    split = f" in {work.runs} runs" if work.runs > 1 else ""
    quota = work.max_reviews is not None and estimate.pairs
    share = f" (human_fraction = {estimate.reviews / estimate.pairs / work.labels_per_pair:.2g})" if quota else ""
    kept_text = f"{estimate.pairs:,.0f} pairs kept, {estimate.reviews:,.0f} labels by people"
    return [
        f"{work.prompts:,} prompts{split}, {work.sampling.records:.3g} answers each by {policies}",
        f"judged by {panel}",
        f"{kept_text}{share}, {estimate.records:,.0f} records",
    ]


TABLE_HEADER = ("", "requests", "tokens in", "cached", "tokens out", "GPU hours", "time", "dollars")


def _table_lines(estimate: CapacityPlan) -> list[str]:
    runs, rows = estimate.workload.runs, [TABLE_HEADER]
    names = {"dispatch": "dispatch *", "human review": f"human review ({estimate.annotator_hours:,.0f} h of work)"}
    for part in estimate.stages:
        read = part.cost.prompt_tokens
        cells = (format_count(part.requests), format_count(read), f"{part.cached_tokens / read:.0%}" if read else "",
                 format_count(part.cost.completion_tokens), f"{part.gpu_hours:,.1f}" if part.gpu_hours else "",
                 format_stage_time(part) if part.hours else "", format_usd(part.cost.cost_usd))  # fmt: skip
        rows.append((names.get(part.name, part.name), *cells))
    total = estimate.cost
    rows.append(("machines, in all", "", format_count(total.prompt_tokens), "", format_count(total.completion_tokens),
                 f"{estimate.gpu_hours:,.1f}", format_duration(estimate.machine_hours * 3600),
                 format_usd(total.cost_usd - estimate.stage("human review").cost.cost_usd)))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(TABLE_HEADER))]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    lines.insert(-1, "-" * len(lines[0]))
    caption = "one process asks and journals" if runs == 1 else f"{runs} processes ask and journal, one a run"
    return [*lines, f"* {caption}: sampling and judging together take no less than that"]


BOTTLENECK_HINTS = {
    "sampling": "More GPUs (--gpus), fewer or shorter answers (-n, --answer-tokens).",
    "judging": "More GPUs (--judge-gpus), a smaller judge, fewer seats or aspects, --strategy rate-only.",
    "dispatch": "Split the prompts into several runs (--runs).",
    "pairing": "Split the prompts into several runs (--runs).",
    "ingest": "Split the prompts into several runs (--runs).",
    "training": "More GPUs (--train-gpus), or fewer pairs: the surest of them.",
}


def _limit_lines(estimate: CapacityPlan) -> list[str]:
    work = estimate.workload
    which = "the run" if work.runs == 1 else "each run"
    lines = [f"Disk: {estimate.bytes / 1e9:,.1f} GB. Memory of {which}: {estimate.memory_bytes / 1e9:,.1f} GB."]
    if estimate.runs_needed > work.runs:
        lines.append(
            f"{work.memory_gb:g} GB cannot hold that: split the prompts into {estimate.runs_needed} runs (--runs)."
        )
    first, *others = estimate.bottlenecks()
    lines.append(f"First bottleneck: {first.name}, {format_stage_time(first)}.")
    lines.append("  " + (_annotator_hint(estimate) if first.name == "human review" else BOTTLENECK_HINTS[first.name]))
    lines.append("Then: " + ", ".join(f"{part.name} {format_stage_time(part)}" for part in others[:3]) + ".")
    if any(not engine.gpus and not engine.requests_per_second for engine in (work.policy, work.judge)):
        lines.append("How fast an endpoint answers is not in it: --requests-per-minute.")
    if work.train_pairs_per_second is None:
        lines.append("Training is not in it: --train-pairs-per-second N, or --from a run that was trained.")
    return lines


def _annotator_hint(estimate: CapacityPlan) -> str:
    """How sure labels make one depends on how many there are, not on which share of the pairs they are."""
    work = estimate.workload
    labels_per_day = work.annotators * work.hours_per_day * 3600 / work.review_seconds
    return (
        f"{work.annotators} people at {work.hours_per_day:g} h a day label {labels_per_day:,.0f} pairs a day. More people (--annotators), "
        "or a\n  quota instead of a share (--max-reviews): what labels say of the rest grows sure by their number."
    )


def _source_lines(figures: PlanInputs, pilot: Path | None) -> list[str]:
    lines = []
    for source, head in (("measured", f"Measured in {pilot}"), ("computed", "Computed from the judge files"),
                         ("given", "Given"), ("assumed", "Assumed")):  # fmt: skip
        entries = [f"{name.replace('_', ' ')} {figures.display(name)}".rstrip()
                for name, origin in figures.sources.items() if origin == source]  # fmt: skip
        if entries:
            lines.append(f"{head}: {', '.join(entries)}.")
    return [line for text in lines for line in textwrap.wrap(text, 110, subsequent_indent="  ")]
