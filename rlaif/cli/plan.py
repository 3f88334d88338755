"""``rlaif plan``."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli import console
from rlaif.errors import UsageError
from rlaif.format import format_days, format_duration
from rlaif.planning.plan_settings import PLAN_SETTINGS, parse_settings

if TYPE_CHECKING:
    from rlaif.config.models import Config
    from rlaif.planning.capacity import CapacityPlan, PlanStage
    from rlaif.planning.workload import PlanInputs

FLAGS = (
    "n", "model", "base_url", "judge", "judge_model", "gpus", "tokens_per_second", "judge_tokens_per_second",
    "usd_per_gpu_hour", "max_reviews", "annotators",
)  # fmt: skip
"""Names that `--set` does not take, because they have a flag."""


def _option(text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=text, show_default=False, **options)


def plan(
    prompts: Annotated[str, _option("Number of prompts, like 10000, 10k or 1M", metavar="N")],
    from_: Annotated[
        Path | None, _option("Pilot run: its settings and measurements [default: none]", "--from", metavar="RUN")
    ] = None,
    n: Annotated[int | None, _option("Answers per prompt [default: pilot, or 4]", "-n", metavar="N", min=1)] = None,
    model: Annotated[list[str] | None, _option("Policy; repeat for several", "--model", "-m", metavar="M")] = None,
    base_url: Annotated[list[str] | None, _option("Endpoint URL of the policy, for its price", metavar="URL")] = None,
    judge: Annotated[
        list[str] | None, _option("Judge; repeat for a panel [default: helpful and quality]", metavar="NAME[@MODEL]")
    ] = None,
    judge_model: Annotated[str | None, _option("Model of the judges", metavar="M")] = None,
    gpus: Annotated[int | None, _option("GPUs for each stage [default: 1]", metavar="N", min=1)] = None,
    tokens_per_second: Annotated[
        float | None, _option("Answer tokens per second per GPU [default: pilot]", metavar="N", min=0.001)
    ] = None,
    judge_tokens_per_second: Annotated[
        float | None,
        _option("Uncached tokens per second per GPU of the judges [default: pilot]", metavar="N", min=0.001),
    ] = None,
    usd_per_gpu_hour: Annotated[
        float | None, _option("GPU price per hour in US dollars [default: 0]", metavar="N", min=0)
    ] = None,
    max_reviews: Annotated[
        str | None, _option("Maximum number of human labels [default: 10% of the pairs]", metavar="N")
    ] = None,
    annotators: Annotated[int | None, _option("Number of annotators [default: 2]", metavar="N", min=1)] = None,
    assignments: Annotated[
        list[str] | None, _option("Another setting, see above; repeatable", "--set", metavar="KEY=VALUE")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text")] = False,
) -> None:
    """Estimate the resources that a number of prompts needs

    Tokens, GPU hours, cost, annotator time, disk and memory, and the first bottleneck.
    """
    from rlaif.config import loader
    from rlaif.planning import capacity, workload
    from rlaif.run.run import open_run

    settings = parse_settings(assignments or [], FLAGS)
    judge_base_url = [settings.pop("judge_base_url")] if "judge_base_url" in settings else None
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
            "judge.strategy": settings.get("strategy"),
            "pairs.human_fraction": settings.get("human_fraction"),
            "client.requests_per_minute": settings.get("requests_per_minute"),
        },
    )
    given = {
        **settings,
        "n": n,
        "panel": judge or settings.get("strategy"),
        "policy": model or base_url,
        "judge": judge_model or judge_base_url or ([name for name in judge or [] if "@" in name] or None),
        "gpus": gpus,
        "tokens_per_second": tokens_per_second,
        "judge_tokens_per_second": judge_tokens_per_second,
        "usd_per_gpu_hour": usd_per_gpu_hour,
        "max_reviews": None if max_reviews is None else parse_count("--max-reviews", max_reviews),
        "annotators": annotators,
    }
    work, inputs = workload.build_workload(config, parse_count("--prompts", prompts), given, pilot)
    estimate = capacity.plan_capacity(work)
    if json:
        console.echo_json(estimate.as_json() | {"sources": inputs.sources})
        return
    for line in [
        *_header_lines(config, estimate),
        "",
        *_table_lines(estimate),
        "",
        *_limit_lines(estimate),
        "",
        *_source_lines(inputs, from_),
    ]:
        console.echo(line.rstrip())


plan.__doc__ = f"{inspect.getdoc(plan)}\n\n\b\nSettings for --set, with their defaults:\n" + "\n".join(
    f"  {name:<24}{setting.text}" for name, setting in PLAN_SETTINGS.items()
)


def parse_count(flag: str, text: str) -> int:
    """Convert ``10000``, ``10k``, ``1M`` or ``1.5M``. Raises :class:`UsageError` that names ``flag``."""
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        number = float((text[:-1] if scale else text).replace(",", "")) * (scale or 1)
        if not 1 <= number < 1e15:
            raise ValueError
    except ValueError:
        raise UsageError(f"`{flag}` expects a number like 10000, 10k or 1M, got {text!r}") from None
    return round(number)


def format_large_count(number: float) -> str:
    """Return three digits and a letter; empty for 0."""
    limit, suffix = next(((limit, suffix) for limit, suffix in SUFFIXES if number >= limit), (1.0, ""))
    digits = 0 if not suffix or number >= 100 * limit else 1 if number >= 10 * limit else 2
    return f"{number / limit:,.{digits}f}{suffix}" if number else ""


SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_stage_time(stage: PlanStage) -> str:
    """Return the wall-clock time of a stage. Human review is in days, because annotators work a few hours per day."""
    if stage.name == "human review" and stage.hours:
        return format_days(stage.hours)
    return format_duration(stage.hours * 3600)


def format_usd(dollars: float) -> str:
    return f"${dollars:,.2f}" if 0 < dollars < 10 else f"${dollars:,.0f}" if dollars else ""


def _header_lines(config: Config, estimate: CapacityPlan) -> list[str]:
    work = estimate.workload
    policies = ", ".join(policy.model for policy in config.policies_resolved())
    panel = ", ".join(f"{member.name}@{member.model}" for member in config.panel_members()) or "the prompts' checks"
    split = f" in {work.runs} runs" if work.runs > 1 else ""
    pairs_and_labels = f"{estimate.pairs:,.0f} pairs kept, {estimate.reviews:,.0f} human labels"
    has_quota = work.max_reviews is not None and estimate.pairs
    fraction = (
        f" (human_fraction = {estimate.reviews / estimate.pairs / work.labels_per_pair:.2g})" if has_quota else ""
    )
    return [
        f"{work.prompts:,} prompts{split}, {work.sampling.records:.3g} answers each by {policies}",
        f"judged by {panel}",
        f"{pairs_and_labels}{fraction}, {estimate.records:,.0f} records",
    ]


TABLE_HEADER = ("", "requests", "tokens in", "cached", "tokens out", "GPU hours", "time", "cost")


def _table_lines(estimate: CapacityPlan) -> list[str]:
    runs, rows = estimate.workload.runs, [TABLE_HEADER]
    names = {"dispatch": "dispatch *", "human review": f"human review ({estimate.annotator_hours:,.0f} h of work)"}
    for stage in estimate.stages:
        tokens_in = stage.cost.prompt_tokens
        cells = (
            format_large_count(stage.requests),
            format_large_count(tokens_in),
            f"{stage.cached_tokens / tokens_in:.0%}" if tokens_in else "",
            format_large_count(stage.cost.completion_tokens),
            f"{stage.gpu_hours:,.1f}" if stage.gpu_hours else "",
            format_stage_time(stage) if stage.hours else "",
            format_usd(stage.cost.cost_usd),
        )
        rows.append((names.get(stage.name, stage.name), *cells))
    total = estimate.cost
    rows.append(
        (
            "total without review",
            "",
            format_large_count(total.prompt_tokens),
            "",
            format_large_count(total.completion_tokens),
            f"{estimate.gpu_hours:,.1f}",
            format_duration(estimate.machine_hours * 3600),
            format_usd(total.cost_usd - estimate.stage("human review").cost.cost_usd),
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(TABLE_HEADER))]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    lines.insert(-1, "-" * len(lines[0]))
    sender = "one process sends all requests and writes all records"
    if runs > 1:
        sender = f"{runs} processes, one per run, send all requests and write all records"
    return [*lines, f"* {sender}: a lower bound for sampling plus judging"]


BOTTLENECK_HINTS = {
    "sampling": "More GPUs (--gpus), or fewer or shorter answers (-n, --set answer_tokens=N).",
    "judging": "More GPUs (--set judge_gpus=N), a smaller model, fewer judges or aspects, or --set strategy=rate-only.",
    "dispatch": "Split the prompts into several runs (--set runs=N).",
    "pairing": "Split the prompts into several runs (--set runs=N).",
    "ingest": "Split the prompts into several runs (--set runs=N).",
    "training": "More GPUs (--set train_gpus=N), or fewer pairs: keep the most confident ones.",
}


def _limit_lines(estimate: CapacityPlan) -> list[str]:
    work = estimate.workload
    per_run = "" if work.runs == 1 else " per run"
    lines = [f"Disk: {estimate.bytes / 1e9:,.1f} GB. Memory{per_run}: {estimate.memory_bytes / 1e9:,.1f} GB."]
    if estimate.runs_needed > work.runs:
        lines.append(
            f"{work.memory_gb:g} GB of memory is too little: split the prompts into {estimate.runs_needed} runs "
            f"(--set runs={estimate.runs_needed})."
        )
    first, *others = estimate.bottlenecks()
    lines.append(f"First bottleneck: {first.name}, {format_stage_time(first)}.")
    lines.append("  " + (_annotator_hint(estimate) if first.name == "human review" else BOTTLENECK_HINTS[first.name]))
    lines.append("Then: " + ", ".join(f"{stage.name} {format_stage_time(stage)}" for stage in others[:3]) + ".")
    if any(not servers.gpus and not servers.requests_per_second for servers in (work.policy, work.judge)):
        lines.append("The plan assumes endpoints without a rate limit (--set requests_per_minute=N).")
    if work.train_pairs_per_second is None:
        lines.append("The plan omits training (--set train_pairs_per_second=N, or --from a run that was trained).")
    return lines


def _annotator_hint(estimate: CapacityPlan) -> str:
    work = estimate.workload
    labels_per_day = work.annotators * work.hours_per_day * 3600 / work.review_seconds
    return (
        f"{work.annotators} annotators at {work.hours_per_day:g} h per day label {labels_per_day:,.0f} pairs per day. "
        "Add annotators (--annotators), or set\n  a quota (--max-reviews): the precision of what labels say about the "
        "other pairs depends on\n  the number of labels, not on their fraction."
    )


def _source_lines(inputs: PlanInputs, pilot: Path | None) -> list[str]:
    headings = {
        "measured": f"Measured in {pilot}",
        "computed": "Computed from the judge files",
        "given": "Given",
        "assumed": "Assumed",
    }
    lines = []
    for source, heading in headings.items():
        names = [name for name, origin in inputs.sources.items() if origin == source]
        if names:
            lines.append(f"{heading}: {', '.join(f'{name}={inputs.display(name)}'.rstrip('=') for name in names)}.")
    return [line for text in lines for line in textwrap.wrap(text, 110, subsequent_indent="  ")]
