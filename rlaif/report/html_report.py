"""RUN/report.html: one file without scripts or external resources, readable on a phone and in dark mode.

The page's text comes from models and from files by strangers. All of it passes :func:`rlaif.report.html.escape`, and
the page's content security policy allows neither scripts nor requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from rlaif.display_names import (
    ANSWER_LABELS,
    COMPLETION_DROP_REASONS,
    DATASET_DROP_REASONS,
    LABEL_DROP_REASONS,
    OUTCOMES,
    PAIR_DROP_REASONS,
    ROUTES,
    describe_calibration,
    describe_certificate,
    describe_unknown_answers,
    field_name,
)
from rlaif.format import format_duration
from rlaif.report import html
from rlaif.report.html import Html, concat, element
from rlaif.report.report_data import Report, Usage, collect_report
from rlaif.report.run_facts import StageSummary, find_estimate
from rlaif.run import atomic_write
from rlaif.run.run import Run
from rlaif.stats import Estimate

if TYPE_CHECKING:
    from rlaif.report.judge_stats import PairStats

MAX_TEXT_CHARS = 1_500
STYLE_SHEET = Path(__file__).parent / "html_report.css"
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LABEL_ESTIMATES = ("agreement", "tie_rate", "skip_rate", "kappa", "human_agreement", "alpha", "remaining_error")
TRAINING_ESTIMATES = ("accuracy_before", "accuracy_after", "moved")
TRAINING_CURVES = {
    "loss": "Loss",
    "margin": "Reward margin",
    "accuracy": "Reward accuracy",
    "reward": "Reward",
    "kl": "KL from the reference",
}
UNBOUNDED = ("length_ratio", "kl_per_answer", "kl_per_token")
"""Metrics that are not shares: an interval between 0 and 1 would mislead."""
HIDDEN_EVALUATION_FIELDS = ("stopped", "identical_answers")


def write_report(run: Run, report: Report | None = None) -> Path:
    """Write RUN/report.html and return its path. Needs no lock. ``report``: if it is already collected."""
    path = run.path / "report.html"
    atomic_write.atomic_write_text(path, render_report(report or collect_report(run)))
    return path


def render_report(report: Report) -> str:
    """Return the page for ``report``."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_SECURITY_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{report.run}: {report.recommendation.headline}"),
        element("style", Html(STYLE_SHEET.read_text(encoding="utf-8"))),
    )
    sections = [
        _header(report),
        _section("Settings and cost", _cost(report)),
        _section("Label quality", _labels(report)),
        _section("Pairs", _pairs(report)),
        _section("Refusals", _refusals(report)),
        _section("Training", _training(report)),
        _section("Evaluation", _evaluation(report)),
        _section("Iterations", _iterations(report)) if len(report.iterations) > 1 else None,
        _section(f"{len(report.samples)} random pairs", map(_sample_pair, report.samples)) if report.samples else None,
    ]
    created = f"Created by rlaif {report.version} at {report.created_at}. "
    foot = element("footer", created, "The same data as JSON: ", element("code", f"rlaif report {report.path} --json"))
    body = element("body", element("main", *sections), foot)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(report: Report) -> Html:
    recommendation = report.recommendation
    next_step = element("p", "Next: ", element("code", recommendation.command)) if recommendation.command else None
    return element(
        "header",
        element("p", report.path, class_="run"),
        element("h1", recommendation.headline),
        *_bullet_list(recommendation.reasons),
        next_step,
        class_=recommendation.severity,
    )


def _section(title: str, parts: Iterable[Html]) -> Html:
    return element("section", element("h2", title), *parts)


def _not_measured(report: Report, name: str, subject: str | None = None) -> Html:
    reason = f"Not measured: {report.missing_reasons[name]}."
    return element("p", html.with_code(f"{subject}. {reason}" if subject else reason), class_="missing")


def _cost(report: Report) -> Iterable[Html]:
    status = report.status
    heldout = f" ({status.heldout:,} held out)" if status.heldout else ""
    facts = {field_name(name): value for name, value in report.settings.items()}
    facts["size"] = f"{status.prompts:,} prompts{heldout}, {status.completions.answers:,} answers"
    if report.last_run:
        facts["last rlaif run"] = report.last_run
    yield _definition_list(facts)
    if not report.stages:
        yield element("p", "No stage has run yet.", class_="missing")
        return
    rows = [_stage_row(stage) for stage in report.stages]
    rows.append(("total", *_usage_cells(report.cost), ""))
    head = ("Stage", "Time", "Requests", "Tokens in", "Tokens out", "US dollars", "Failures")
    yield html.html_table(head, rows, label="Cost by stage")


def _stage_row(stage: StageSummary) -> Sequence[object]:
    starts = f" ({stage.starts} starts)" if stage.starts > 1 else ""
    state = ", ".join(f"{count:,} {kind}" for kind, count in stage.failures.items()) or "none"
    if stage.refusal or not stage.ended:
        state = "refused" if stage.refusal else "not finished"
    return (stage.name + starts, *_usage_cells(stage), state)


def _usage_cells(usage: Usage | StageSummary) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (usage.requests, usage.prompt_tokens, usage.completion_tokens))
    return (format_duration(usage.seconds), *counts, f"{usage.cost_usd:,.4f}" if usage.cost_usd else "0")


def _labels(report: Report) -> Iterable[Html]:
    labels = report.labels or {}
    rows = _estimate_rows(labels, LABEL_ESTIMATES)
    for stats in report.position_stats or []:
        for name in ("swap_consistency", "first_position_rate"):
            if estimate := getattr(stats, name):
                rows.append(_estimate_row(f"{stats.judge} with {stats.model}: {field_name(name)}", estimate))
    if report.pairs and report.pairs.longer_preferred:
        rows.append(_estimate_row(field_name("longer_preferred"), report.pairs.longer_preferred))
    yield from _estimate_table(rows, "Label quality")
    if labels.get("reliability"):
        yield html.calibration_plot(labels["reliability"], label="Agreement of annotators, by the judges' confidence")
    yield from _bullet_list(_human_label_notes(labels))
    subjects = {"labels": "Agreement with annotators", "position_stats": "Position bias", "exams": "Exams"}
    for name, subject in subjects.items():
        if name in report.missing_reasons:
            yield _not_measured(report, name, subject)
    if report.exams:
        yield element("h3", "Exams of the judges")
        yield _generic_table([_flatten(exam) for exam in report.exams], "Exams of the judges", text_columns=2)


def _human_label_notes(labels: Mapping[str, Any]) -> Iterable[str]:
    """Yield the conclusions from the human labels about the other labels."""
    if not labels.get("reviewed"):
        return
    noise_rate = labels.get("noise_rate")
    noise = "" if noise_rate is None else f" An estimated {noise_rate:.1%} of the dataset's labels are wrong."
    yield f"Annotators labeled {labels['reviewed']:,} pairs.{noise}"
    if labels.get("certificate"):
        yield describe_certificate(labels["certificate"])
    for calibration in labels.get("calibration", ()):
        yield describe_calibration(calibration)


def _pairs(report: Report) -> Iterable[Html]:
    counts, stats = report.status.pairs, report.pairs
    if counts is None or stats is None:
        yield element("p", "Nothing has been judged yet.", class_="missing")
        return
    rows = [
        (name, counts["routes"].get(route, 0))
        for route, name in ROUTES.items()
        if route != "carried" or counts["routes"].get(route)
    ]
    yield html.html_table(("Route", "Pairs"), _count_rows(rows), label="Routes")
    if carried := counts.get("carried_labels"):
        yield element(
            "p", f"{carried:,} pairs of the dataset have a human label from outside the current review queue."
        )
    if stats.kept:
        yield _charts(_pair_charts(stats))
    dropped = _named_counts("pairs: ", PAIR_DROP_REASONS, stats.drop_reasons)
    dropped += _named_counts("answers: ", COMPLETION_DROP_REASONS, counts["dropped_completions"])
    in_table = {reason: count for reason, count in counts["dropped_from_dataset"].items() if reason != "dropped"}
    dropped += _named_counts("not in the dataset: ", DATASET_DROP_REASONS, in_table)
    dropped += _named_counts("human labels: ", LABEL_DROP_REASONS, counts.get("dropped_labels", {}))
    if counts["prompts_without_pair"]:
        dropped.append(("prompts without a pair to compare", counts["prompts_without_pair"]))
    if dropped:
        yield html.html_table(("Dropped", "Count"), _count_rows(dropped), label="Dropped")


def _pair_charts(stats: PairStats) -> Iterable[Html]:
    yield html.histogram(stats.confidence, label="Judges' confidence in kept pairs", unit="probability")
    if stats.rating_margin:
        yield html.histogram(
            stats.rating_margin, label="Rating, preferred minus other answer", unit="scale of 5", mark=0.0
        )
    yield html.histogram(
        stats.log2_length_ratio,
        label="Length, preferred over other answer",
        unit="log2",
        mark=0.0,
    )


def _named_counts(prefix: str, names: Mapping[Any, str], counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(prefix + names.get(code, code), count) for code, count in counts.items()]


def _count_rows(rows: Iterable[tuple[str, int]]) -> list[Sequence[object]]:
    return [(name, f"{count:,}") for name, count in rows]


def _refusals(report: Report) -> Iterable[Html]:
    if report.unknown_answers and report.unknown_answers["unknown"]:
        sentence = describe_unknown_answers(report.unknown_answers)
        yield element("p", f"{sentence[0].upper()}{sentence[1:]}.")
    if not report.balance:
        yield _not_measured(report, "balance")
        return
    rows = [
        (row["prompt"], ANSWER_LABELS.get(row["chosen"], row["chosen"]), f"{row['pairs']:,}") for row in report.balance
    ]
    yield html.html_table(
        ("Prompt", "Chosen answer", "Pairs"), rows, label="Refusals by class of prompt", text_columns=2
    )


def _training(report: Report) -> Iterable[Html]:
    training = report.training
    if training is None:
        yield _not_measured(report, "training")
        return
    result, identity = training["result"], training.get("identity", {})
    yield _definition_list(
        {
            "method": identity.get("method"),
            "model": identity.get("model"),
            "pairs": result["pairs"],
            "steps": result["steps"],
            "time": format_duration(result["seconds"]),
            "output": training["output"],
        }
    )
    yield from _preflight(training.get("preflight", []))
    yield from _estimate_table(_estimate_rows(result, TRAINING_ESTIMATES), "Held-out pairs")
    history = training.get("history", [])
    curves = {
        title: [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
        for name, title in TRAINING_CURVES.items()
    }
    yield _charts(html.line_chart({title: points}, label=title) for title, points in curves.items() if len(points) > 1)


def _preflight(findings: Sequence[Mapping[str, Any]]) -> Iterable[Html]:
    """Yield the warnings of the preflight, and all its findings folded."""
    problems = [finding for finding in findings if finding["level"] != "pass"]
    yield from _bullet_list(". ".join(filter(None, (finding["message"], finding["hint"]))) for finding in problems)
    if findings:
        passed = len(findings) - len(problems)
        summary = element("summary", f"Preflight: {passed} of {len(findings)} checks passed")
        yield element(
            "details", summary, *_bullet_list(f"{finding['level']}: {finding['message']}" for finding in findings)
        )


def _evaluation(report: Report) -> Iterable[Html]:
    evaluation = report.evaluation
    if evaluation is None:
        yield _not_measured(report, "evaluation")
        return
    yield from _estimate_table(_estimate_rows(evaluation, evaluation), "Evaluation")
    yield from _bullet_list(evaluation.get("warnings") or [])
    yield _definition_list(
        {
            field_name(name): value
            for name, value in evaluation.items()
            if not isinstance(value, dict | list) and name not in HIDDEN_EVALUATION_FIELDS
        }
    )
    checks = [{**row, "model": field_name(row["model"])} for row in evaluation.get("checks") or []]
    for title, rows in (("Checks met", checks), ("Refusals by class of prompt", evaluation.get("refusals"))):
        if rows:
            yield element("h3", title)
            yield _generic_table(rows, title)
    if evaluation.get("samples"):
        yield element("h3", "Samples")
        yield from map(_sample_comparison, evaluation["samples"])


def _sample_comparison(sample: Mapping[str, Any]) -> Html:
    preferred = sample.get("preferred") or ""
    boxes = [_answer_box(name, sample[name], preferred=preferred == name) for name in ("reference", "trained")]
    summary = element("summary", element("span", preferred, class_="route"), " ", _first_line(sample["prompt"]))
    return element("details", summary, element("div", *boxes, class_="sides"))


def _iterations(report: Report) -> Iterable[Html]:
    rows = [
        (
            iteration.run,
            _format_value(iteration.policies),
            f"{iteration.train_pairs:,}",
            iteration.agreement and _format_estimate(iteration.agreement),
            iteration.win_rate and _format_estimate(iteration.win_rate),
        )
        for iteration in report.iterations
    ]
    head = ("Iteration", "Policy", "Pairs", "Agreement", "Win rate")
    yield html.html_table(head, rows, label="Iterations", text_columns=2)


def _sample_pair(row: Mapping[str, Any]) -> Html:
    turns = [(message["role"], message.get("content") or "(tool calls)") for message in orjson.loads(row["prompt"])]
    prompt = [
        element("p", element("b", role), " ", element("span", _truncate(text), class_="text")) for role, text in turns
    ]
    sides = [
        _answer_box(f"answer {side}", row[f"response_{side}"], preferred=row["preferred"] == side) for side in "ab"
    ]
    return element(
        "details",
        element(
            "summary", element("span", row["route"], class_=f"route {row['route']}"), " ", _first_line(turns[-1][1])
        ),
        *prompt,
        element("div", *sides, class_="sides"),
        *_bullet_list(_pair_facts(row)),
        element("p", f"pair {row['pair_id']}", class_="missing"),
    )


def _pair_facts(row: Mapping[str, Any]) -> Iterable[str]:
    yield f"Route: {ROUTES[row['route']]}: {row['route_reason']}"
    rating = "" if row["rating_margin"] is None else f"; rating of a minus b: {row['rating_margin']:+.1f}"
    yield f"Judges: {_verdict(row)}{rating}"
    if row["human_labels"]:
        yield f"Annotators: {'; '.join(row['human_labels'])}"
    elif row["route"] in ("audit", "targeted"):
        yield "Annotators: awaiting review"


def _verdict(row: Mapping[str, Any]) -> str:
    prob_a = row["prob_a"]
    if row["outcome"] == "win" and row["preferred"]:
        return f"{row['preferred']} is better with probability {max(prob_a, 1 - prob_a):.2f}"
    outcome = OUTCOMES[row["outcome"]]
    return outcome if prob_a is None else f"{outcome} (a is better with probability {prob_a:.2f})"


# Parts


def _charts(figures: Iterable[Html]) -> Html:
    """Return figures side by side, as far as the page is wide enough."""
    return element("div", *figures, class_="charts")


def _bullet_list(items: Iterable[str]) -> Iterable[Html]:
    lines = [element("li", html.with_code(item)) for item in items]
    if lines:
        yield element("ul", *lines)


def _definition_list(facts: Mapping[str, Any]) -> Html:
    """Return names and values, without those that are None."""
    entries = (
        concat((element("dt", name), element("dd", _format_value(value))))
        for name, value in facts.items()
        if value is not None
    )
    return element("dl", *entries)


def _estimate_rows(group: Mapping[str, Any], names: Iterable[str]) -> list[Sequence[object]]:
    return [
        _estimate_row(field_name(name), estimate, is_share=name not in UNBOUNDED)
        for name in names
        if (estimate := find_estimate(group, name))
    ]


def _estimate_row(title: str, estimate: Estimate, *, is_share: bool = True) -> Sequence[object]:
    is_share = is_share and estimate.low >= 0 and estimate.high <= 1
    plot = html.interval_plot(estimate) if is_share else ""
    return (title, plot, _format_estimate(estimate), f"{estimate.n:,}")


def _estimate_table(rows: list[Sequence[object]], label: str) -> Iterable[Html]:
    if rows:
        yield html.html_table(("Measure", "", "Value [95 %]", "n"), rows, label=label)


def _generic_table(rows: Sequence[Mapping[str, Any]], label: str, *, text_columns: int = 1) -> Html:
    """Return a table of rows that another stage left, with the columns that they have."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [tuple(_format_cell(row, column) for column in columns) for row in rows]
    head = [field_name(column) for column in columns]
    return html.html_table(head, cells, label=label, text_columns=text_columns)


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``row`` with the entries of its objects, other than estimates, as columns of their own."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and "low" not in value:
            flat.update(value)
        else:
            flat[name] = value
    return flat


def _format_cell(row: Mapping[str, Any], column: str) -> str | None:
    if estimate := find_estimate(row, column):
        return f"{_format_estimate(estimate)} (n = {estimate.n:,})"
    return None if row.get(column) is None else _format_value(row[column])


def _format_estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _format_value(value: Any) -> str:
    """Return a setting or fact as readable text."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_format_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{field_name(name)} {_format_value(item)}" for name, item in value.items())
    formats: dict[type, Callable[[Any], str]] = {float: "{:g}".format, int: "{:,}".format}
    return formats.get(type(value), str)(value)


def _answer_box(title: str, text: str, *, preferred: bool) -> Html:
    heading = element("h3", title + (" (preferred)" if preferred else ""))
    return element("div", heading, element("div", _truncate(text), class_="text"))


def _truncate(text: str) -> str:
    more = len(text) - MAX_TEXT_CHARS
    return text if more <= 0 else f"{text[:MAX_TEXT_CHARS]} [... {more:,} more characters]"


def _first_line(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "(empty)")
    return line if len(line) <= 100 else line[:99] + "…"
