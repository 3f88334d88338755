"""RUN/report.html: the morning page. One file, no script, nothing fetched; readable on a phone and in the dark.

``write_report`` draws what :func:`rlaif.report.report_data.gather` found. The page's text comes from models and from
files that strangers wrote: all of it passes :func:`rlaif.report.html.escape`, and the page's own policy allows neither
scripts nor requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from rlaif.format import format_duration
from rlaif.report import html
from rlaif.report.html import Html, concat, element
from rlaif.report.recommendation import find_estimate
from rlaif.report.report_data import collect_report
from rlaif.run.atomic_write import atomic_write_text
from rlaif.run.run import Run

MAX_TEXT_CHARS = 1_500
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
ROUTE_TITLES = {
    "audit": "drawn at random for people",
    "targeted": "sent to people as the likeliest to be wrong",
    "judge": "labelled by the judges",
    "dropped": "left out",
}
ESTIMATE_TITLES = {
    "agreement": "people agree with the judges",
    "kappa": "the same, beyond chance (kappa)",
    "human_agreement": "two people agree with each other",
    "alpha": "people, beyond chance (alpha)",
    "remaining_error": "the judges' labels that are wrong",
}


def write_report(run: Run) -> Path:
    """Write RUN/report.html (beside, then renamed) and return its path. Needs no lock."""
    path = run.path / "report.html"
    text = render_report(collect_report(run))
    atomic_write_text(path, text)
    return path


def render_report(report: Mapping[str, Any]) -> str:
    """The page for the facts ``report``."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_SECURITY_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{report['run']}: {report['recommendation']['status']}"),
        element("style", Html((Path(__file__).parent / "html_report.css").read_text(encoding="utf-8"))),
    )
    parts = [
        _header(report),
        _section("What was asked, and what it cost", *_cost(report)),
        _section("Can the labels be trusted?", *_labels(report)),
        _section("Pairs", *_pairs(report)),
        _section("Refusals", *_refusals(report)),
        _section("Training", *_training(report)),
        _section("Is the model better?", *_evaluation(report)),
        _section("Rounds", *_iterations(report)) if len(report["iterations"]) > 1 else None,
        _section(f"{len(report['samples'])} pairs, drawn at random", *map(_sample_pair, report["samples"]))
        if report["samples"]
        else None,
    ]
    foot = element(
        "footer", f"Made by rlaif {report['version']} at {report['created_at']}. The same facts: rlaif report --json"
    )
    body = element("body", element("main", *parts), foot)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(report: Mapping[str, Any]) -> Html:
    recommendation = report["recommendation"]
    next_step = element("p", "Next: ", element("code", recommendation["next"])) if recommendation["next"] else None
    reasons = element("ul", *(element("li", reason) for reason in recommendation["reasons"]))
    return element(
        "header",
        element("p", report["path"], class_="run"),
        element("h1", recommendation["status"][:1].upper() + recommendation["status"][1:]),
        reasons,
        next_step,
        class_=recommendation["severity"],
    )


def _section(title: str, *parts: object) -> Html:
    return element("section", element("h2", title), *parts)


def _not_measured(report: Mapping[str, Any], name: str) -> Html:
    return element("p", f"Not measured: {report['missing_reasons'][name]}.", class_="missing")


def _cost(report: Mapping[str, Any]) -> Iterable[Html]:
    status = report["status"]
    heldout = f", {status['heldout']:,} of them held out" if status["heldout"] else ""
    counts = f"{status['prompts']:,} prompts{heldout}; {status['completions']['answers']:,} answers"
    settings = {
        **report["settings"],
        "the run has": counts,
        **({"the last night": report["last_run"]} if report["last_run"] else {}),
    }
    yield element(
        "dl",
        *(
            concat((element("dt", name.replace("_", " ")), element("dd", _format_value(value))))
            for name, value in settings.items()
        ),
    )
    if not report["stages"]:
        yield element("p", "No stage has run yet.", class_="missing")
        return
    rows = [_stage_row(stage) for stage in report["stages"]]
    rows.append(("in all", *_usage_cells(report["cost"]), ""))
    head = ("Stage", "Time", "Requests", "Tokens in", "Tokens out", "Dollars", "Failures")
    yield html.html_table(head, rows, label="Cost by stage")


def _stage_row(stage: Mapping[str, Any]) -> Sequence[object]:
    failures = ", ".join(f"{count:,} {kind}" for kind, count in stage["failures"].items()) or "none"
    state = failures if stage["ended"] else "did not end"
    return (
        stage["name"] + (f" ({stage['starts']} starts)" if stage["starts"] > 1 else ""),
        *_usage_cells(stage),
        state,
    )


def _usage_cells(usage: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (f"{int(usage[name]):,}" for name in ("requests", "prompt_tokens", "completion_tokens"))
    return (format_duration(usage["seconds"]), *counts, f"{usage['cost_usd']:,.4f}" if usage["cost_usd"] else "0")


def _labels(report: Mapping[str, Any]) -> Iterable[Html]:
    labels = report["labels"] or {}
    rows = [
        _estimate_row(title, labels[name]) for name, title in ESTIMATE_TITLES.items() if find_estimate(labels, name)
    ]
    for judge in report["position_stats"] or []:
        judge_name = f"{judge['judge']} by {judge['model']}"
        for name, title in (
            ("swap_consistency", "both orders agree"),
            ("first_position_rate", "first answer preferred (0.5: no bias)"),
        ):
            if judge[name]:
                rows.append(_estimate_row(f"{judge_name}: {title}", judge[name]))
    longer = (report["pairs"] or {}).get("longer_preferred")
    if longer:
        rows.append(_estimate_row("the preferred answer is the longer one", longer))
    if rows:
        yield html.html_table(("Measure", "", "Value [95 %]", "n"), rows, label="Label quality")
    if labels.get("reliability"):
        yield html.calibration_plot(labels["reliability"], label="How often people agree, by how sure the judges were")
    yield from _bullet_list(_human_label_notes(labels))
    for name in ("labels", "position_stats", "exams"):
        if name in report["missing_reasons"]:
            subject = {"labels": "Agreement with people", "position_stats": "Position bias", "exams": "Exams"}[name]
            yield element("p", f"{subject}. Not measured: {report['missing_reasons'][name]}.", class_="missing")
    if report["exams"]:
        yield _generic_table(report["exams"], "Exams of the judges")


def _estimate_row(title: str, estimate: Mapping[str, Any]) -> Sequence[object]:
    text = f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    in_unit_range = estimate["low"] >= 0 and estimate["high"] <= 1
    return (title, html.interval_plot(estimate) if in_unit_range else "", text, f"{estimate['n']:,}")


def _human_label_notes(labels: Mapping[str, Any]) -> Iterable[str]:
    """What people's labels are good for, besides saying how far to trust the others."""
    if not labels.get("reviewed"):
        return
    noise = labels.get("noise_rate")
    yield f"{labels['reviewed']:,} pairs were labelled by people" + (
        "" if noise is None else f"; of the dataset's labels, {noise:.1%} are estimated to be wrong"
    )
    if certificate := labels.get("certificate"):
        yield (
            f"for the surest {certificate['share']:.0%} of the pairs it is certified that judges agree with people at least "
            f"{certificate['agreement']:.0%} of the time (confidence {certificate['confidence']:.0%}, n = {certificate['n']:,})"
            if certificate["share"]
            else f"of no share of the pairs is it certified that judges agree with people {certificate['agreement']:.0%} of "
            "the time: too few labels, or too little agreement"
        )
    if calibration := labels.get("calibration"):
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in calibration["weights"].items())
        yield (
            f"{calibration['n']:,} of these labels put the panel right (weights: {weights}): {calibration['flipped']:,} labels "
            f"were turned round, {calibration['near_ties']:,} pairs left out as near-ties"
        )


def _pairs(report: Mapping[str, Any]) -> Iterable[Html]:
    if report["pairs"] is None:
        yield _not_measured(report, "pairs")
        return
    counts, stats = report["status"]["pairs"], report["pairs"]
    rows: list[Sequence[object]] = [
        (f"{name}: {ROUTE_TITLES.get(name, '')}", f"{count:,}") for name, count in counts["routes"].items()
    ]
    yield html.html_table(("Route", "Pairs"), rows, label="Routes")
    yield html.histogram(stats["confidence"], label="How sure the judges are of kept pairs", unit="probability")
    if stats["rating_margin"]:
        yield html.histogram(
            stats["rating_margin"], label="Rated score, preferred less other", unit="points of 5", mark=0.0
        )
    yield html.histogram(
        stats["log2_length_ratio"],
        label="Length, preferred over other",
        unit="log2 of the ratio of characters",
        mark=0.0,
    )
    reasons = [(reason, f"{count:,}") for reason, count in stats["dropped"].items()]
    reasons += [(f"answers left out: {reason}", f"{n:,}") for reason, n in counts["completions_left_out"].items()]
    reasons += [
        (f"not in the dataset: {reason.replace('_', ' ')}", f"{n:,}")
        for reason, n in counts["dataset_left_out"].items()
        if reason != "dropped"
    ]
    if counts["prompts_without_pair"]:
        reasons.append(("prompts that gave no pair worth comparing", f"{counts['prompts_without_pair']:,}"))
    if reasons:
        yield html.html_table(("Left out, and why", "Count"), reasons, label="Left out")


def _refusals(report: Mapping[str, Any]) -> Iterable[Html]:
    yield (
        _generic_table(report["balance"], "Refusals by kind of prompt")
        if report["balance"]
        else _not_measured(report, "balance")
    )


def _training(report: Mapping[str, Any]) -> Iterable[Html]:
    training = report["training"]
    if training is None:
        yield _not_measured(report, "training")
        return
    result, identity = training["result"], training.get("identity", {})
    summary = f"{identity.get('method', '')} of {identity.get('model', '')}: {result['pairs']:,} pairs, "
    yield element(
        "p", summary, f"{result['steps']:,} steps, {format_duration(result['seconds'])}. In {training['output']}"
    )
    findings = training.get("preflight", [])
    yield from _bullet_list(
        ". ".join(filter(None, (finding["message"], finding["hint"])))
        for finding in findings
        if finding["level"] != "pass"
    )
    if findings:
        passed = sum(finding["level"] == "pass" for finding in findings)
        finding_list = _bullet_list(f"{finding['level']}: {finding['message']}" for finding in findings)
        yield element(
            "details", element("summary", f"Preflight: {passed} of {len(findings)} checks passed"), *finding_list
        )
    names = {"accuracy_before": "held-out accuracy before", "accuracy_after": "held-out accuracy after",
             "moved": "moved towards the chosen answer (chance is 0.5)"}  # fmt: skip
    rows = [_estimate_row(title, result[name]) for name, title in names.items() if result.get(name)]
    if rows:
        yield html.html_table(("On held-out pairs", "", "Value [95 %]", "n"), rows, label="Held-out accuracy")
    history = training.get("history", [])
    for name, title in (("loss", "Loss"), ("margin", "Reward margin"), ("accuracy", "Reward accuracy"),
                        ("reward", "Reward"), ("kl", "KL from the reference")):  # fmt: skip
        points = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
        if len(points) > 1:
            yield html.line_chart({title: points}, label=title)


def _evaluation(report: Mapping[str, Any]) -> Iterable[Html]:
    evaluation = report["evaluation"]
    if evaluation is None:
        yield _not_measured(report, "evaluation")
        return
    rows = [
        _estimate_row(name.replace("_", " "), value)
        for name, value in evaluation.items()
        if find_estimate(evaluation, name)
    ]
    if rows:
        yield html.html_table(("Measure", "", "Value [95 %]", "n"), rows, label="Evaluation")
    yield from _bullet_list(evaluation.get("warnings") or [])
    plain = {name: value for name, value in evaluation.items()
             if not isinstance(value, dict | list) and value is not None}  # fmt: skip
    if plain:
        yield element(
            "dl",
            *(concat((element("dt", k.replace("_", " ")), element("dd", _format_value(v)))) for k, v in plain.items()),
        )
    for name, title in (("checks", "Checks met"), ("refusals", "Answers that refuse, by kind of prompt")):
        if evaluation.get(name):
            yield element("h3", title)
            yield _generic_table(evaluation[name], title)
    for sample in evaluation.get("samples", []):
        winner = sample.get("preferred") or ""
        sides = [_answer_box(f"{name}{' (preferred)' if sample.get('preferred') == name else ''}", sample[name])
                 for name in ("reference", "trained")]  # fmt: skip
        summary = element("summary", element("span", winner, class_="route"), " ", _first_line(sample["prompt"]))
        yield element("details", summary, element("div", *sides, class_="sides"))


def _bullet_list(items: Iterable[str]) -> Iterable[Html]:
    lines = [element("li", line) for line in items]
    if lines:
        yield element("ul", *lines)


def _iterations(report: Mapping[str, Any]) -> Iterable[Html]:
    rows = [
        (
            iteration["run"],
            _format_value(iteration["policies"]),
            f"{iteration['dataset'].get('train', 0):,}",
            _format_estimate(find_estimate(iteration, "agreement")),
            _format_estimate(find_estimate(iteration, "win_rate")),
        )
        for iteration in report["iterations"]
    ]
    yield html.html_table(("Round", "Policy", "Pairs", "Agreement", "Win rate"), rows, label="Rounds")


def _format_estimate(estimate: Mapping[str, Any] | None) -> str | None:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate else None


def _sample_pair(row: Mapping[str, Any]) -> Html:
    prob_a = row["prob_a"]
    facts = [
        f"route: {row['route']} ({ROUTE_TITLES[row['route']]}), because: {row['route_reason']}",
        f"the judges: {'no readable verdict' if prob_a is None else f'a is better with probability {prob_a:.2f}'}, "
        f"outcome {row['outcome']}"
        + (f", rated {row['rating_margin']:+.1f} for a" if row["rating_margin"] is not None else ""),
        "people: "
        + ("; ".join(row["human_labels"]) or "not asked" * (row["route"] not in ("audit", "targeted")) or "waits"),
    ]
    sides = [_answer_box(f"{side}{' (preferred)' if row['preferred'] == side else ''}", row[f"response_{side}"])
             for side in ("a", "b")]  # fmt: skip
    turns = _turns(row["prompt"])
    prompt = element(
        "div",
        *(
            element("p", element("b", role), " ", element("span", _truncate(text), class_="text"))
            for role, text in turns
        ),
    )
    return element(
        "details",
        element(
            "summary", element("span", row["route"], class_=f"route {row['route']}"), " ", _first_line(turns[-1][1])
        ),
        prompt,
        element("div", *sides, class_="sides"),
        element("ul", *(element("li", fact) for fact in facts)),
        element("p", f"pair {row['pair_id']}", class_="missing"),
    )


def _turns(prompt: str) -> list[tuple[str, str]]:
    return [(message["role"], message.get("content") or "(tool calls)") for message in orjson.loads(prompt)]


def _answer_box(title: str, text: str) -> Html:
    return element("div", element("h3", title), element("div", _truncate(text), class_="text"))


def _truncate(text: str) -> str:
    more = len(text) - MAX_TEXT_CHARS
    return text if more <= 0 else f"{text[:MAX_TEXT_CHARS]} [... {more:,} more characters]"


def _first_line(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "(empty)")
    return line if len(line) <= 100 else line[:99] + "…"


def _format_value(value: Any) -> str:
    """A setting or fact as a person reads it."""
    if isinstance(value, list):
        return ", ".join(map(_format_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_format_value(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _generic_table(value: Any, label: str) -> Html:
    """Rows that another stage left, whatever their columns: a mapping of mappings, or a list of them."""
    if isinstance(value, Mapping) and all(isinstance(item, Mapping) for item in value.values()):
        value = [{"": name.replace("_", " "), **item} for name, item in value.items()]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return element("p", _format_value(value))
    columns = list(dict.fromkeys(name for item in value for name in item))
    rows = [tuple(_format_cell(item.get(column)) for column in columns) for item in value]
    return html.html_table([column.replace("_", " ") for column in columns], rows, label=label)


def _format_cell(value: Any) -> str | None:
    cell_estimate = find_estimate({"it": value}, "it")
    return (
        None
        if value is None
        else f"{_format_estimate(cell_estimate)} (n = {cell_estimate['n']:,})"
        if cell_estimate
        else _format_value(value)
    )
