"""RUN/report.html: the morning page. One file, no script, nothing fetched; readable on a phone and in the dark.

``write`` draws what :func:`rlaif.report.gather.gather` found. The page's text comes from models and from files that
strangers wrote: all of it passes :func:`rlaif.report.draw.escape`, and the page's own policy allows neither scripts
nor requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from rlaif.report import draw
from rlaif.report.draw import Html, join, tag
from rlaif.report.gather import gather
from rlaif.report.verdict import estimate
from rlaif.run import whole
from rlaif.run.directory import Run

SHOWN_CHARACTERS = 1_500
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
ROUTES = {
    "audit": "drawn at random for people",
    "targeted": "sent to people as the likeliest to be wrong",
    "judge": "labelled by the judges",
    "dropped": "left out",
}
LABELS = {
    "agreement": "people agree with the judges",
    "kappa": "the same, beyond chance (kappa)",
    "people": "two people agree with each other",
    "alpha": "people, beyond chance (alpha)",
    "error_left": "the judges' labels that are wrong",
}


def write(run: Run) -> Path:
    """Write RUN/report.html (beside, then renamed) and return its path. Needs no lock."""
    path = run.path / "report.html"
    text = render(gather(run))
    whole.write(path, text.encode())
    return path


def render(told: Mapping[str, Any]) -> str:
    """The page for the facts ``told``."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{told['run']}: {told['verdict']['word']}"),
        tag("style", Html((Path(__file__).parent / "page.css").read_text(encoding="utf-8"))),
    )
    parts = [
        _top(told),
        _section("What was asked, and what it cost", *_cost(told)),
        _section("Can the labels be trusted?", *_labels(told)),
        _section("Pairs", *_pairs(told)),
        _section("Refusals", *_balance(told)),
        _section("Training", *_training(told)),
        _section("Is the model better?", *_evaluation(told)),
        _section("Rounds", *_rounds(told)) if len(told["rounds"]) > 1 else None,
        _section(f"{len(told['samples'])} pairs, drawn at random", *map(_sample, told["samples"]))
        if told["samples"]
        else None,
    ]
    foot = tag("footer", f"Made by rlaif {told['version']} at {told['made']}. The same facts: rlaif report --json")
    body = tag("body", tag("main", *parts), foot)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _top(told: Mapping[str, Any]) -> Html:
    verdict = told["verdict"]
    following = tag("p", "Next: ", tag("code", verdict["next"])) if verdict["next"] else None
    why = tag("ul", *(tag("li", reason) for reason in verdict["why"]))
    return tag(
        "header",
        tag("p", told["path"], class_="run"),
        tag("h1", verdict["word"][:1].upper() + verdict["word"][1:]),
        why,
        following,
        class_=verdict["tone"],
    )


def _section(title: str, *parts: object) -> Html:
    return tag("section", tag("h2", title), *parts)


def _missing(told: Mapping[str, Any], name: str) -> Html:
    return tag("p", f"Not measured: {told['unmeasured'][name]}.", class_="missing")


def _cost(told: Mapping[str, Any]) -> Iterable[Html]:
    status = told["status"]
    heldout = f", {status['heldout']:,} of them held out" if status["heldout"] else ""
    has = f"{status['prompts']:,} prompts{heldout}; {status['completions']['answers']:,} answers"
    asked = {**told["asked"], "the run has": has, **({"the last night": told["night"]} if told["night"] else {})}
    yield tag("dl", *(join((tag("dt", name), tag("dd", _words(value)))) for name, value in asked.items()))
    if not told["stages"]:
        yield tag("p", "No stage has run yet.", class_="missing")
        return
    rows = [_stage_row(stage) for stage in told["stages"]]
    rows.append(("in all", *_amounts(told["cost"]), ""))
    head = ("Stage", "Time", "Requests", "Tokens in", "Tokens out", "Dollars", "Failures")
    yield draw.table(head, rows, label="Cost by stage")


def _stage_row(stage: Mapping[str, Any]) -> Sequence[object]:
    failures = ", ".join(f"{count:,} {kind}" for kind, count in stage["failures"].items()) or "none"
    state = failures if stage["ended"] else "did not end"
    return (stage["name"] + (f" ({stage['starts']} starts)" if stage["starts"] > 1 else ""), *_amounts(stage), state)


def _amounts(found: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (f"{int(found[name]):,}" for name in ("requests", "prompt_tokens", "completion_tokens"))
    return (duration(found["seconds"]), *counts, f"{found['usd']:,.4f}" if found["usd"] else "0")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def _labels(told: Mapping[str, Any]) -> Iterable[Html]:
    labels = told["labels"] or {}
    rows = [_estimate_row(title, labels[name]) for name, title in LABELS.items() if estimate(labels, name)]
    for judge in told["orders"] or []:
        who = f"{judge['judge']} by {judge['model']}"
        for name, title in (("consistent", "both orders agree"), ("first", "first answer preferred (0.5: no bias)")):
            if judge[name]:
                rows.append(_estimate_row(f"{who}: {title}", judge[name]))
    longer = (told["pairs"] or {}).get("longer")
    if longer:
        rows.append(_estimate_row("the preferred answer is the longer one", longer))
    if rows:
        yield draw.table(("Measure", "", "Value [95 %]", "n"), rows, label="Label quality")
    if labels.get("reliability"):
        yield draw.calibration(labels["reliability"], label="How often people agree, by how sure the judges were")
    yield from _list(_people_gave(labels))
    for name in ("labels", "orders", "exams"):
        if name in told["unmeasured"]:
            what = {"labels": "Agreement with people", "orders": "Position bias", "exams": "Exams"}[name]
            yield tag("p", f"{what}. Not measured: {told['unmeasured'][name]}.", class_="missing")
    if told["exams"]:
        yield _any_table(told["exams"], "Exams of the judges")


def _estimate_row(title: str, found: Mapping[str, Any]) -> Sequence[object]:
    said = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    inside = found["low"] >= 0 and found["high"] <= 1
    return (title, draw.interval(found) if inside else "", said, f"{found['n']:,}")


def _people_gave(labels: Mapping[str, Any]) -> Iterable[str]:
    """What people's labels are good for, besides saying how far to trust the others."""
    if not labels.get("reviewed"):
        return
    noise = labels.get("noise_rate")
    yield f"{labels['reviewed']:,} pairs were labelled by people" + (
        "" if noise is None else f"; of the dataset's labels, {noise:.1%} are estimated to be wrong"
    )
    if sure := labels.get("certificate"):
        yield (
            f"for the surest {sure['share']:.0%} of the pairs it is certified that judges agree with people at least "
            f"{sure['agreement']:.0%} of the time (confidence {sure['confidence']:.0%}, n = {sure['n']:,})"
            if sure["share"]
            else f"of no share of the pairs is it certified that judges agree with people {sure['agreement']:.0%} of "
            "the time: too few labels, or too little agreement"
        )
    if right := labels.get("calibration"):
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in right["weights"].items())
        yield (
            f"{right['n']:,} of these labels put the panel right (weights: {weights}): {right['flipped']:,} labels "
            f"were turned round, {right['near_ties']:,} pairs left out as near-ties"
        )


def _pairs(told: Mapping[str, Any]) -> Iterable[Html]:
    if told["pairs"] is None:
        yield _missing(told, "pairs")
        return
    counted, found = told["status"]["pairs"], told["pairs"]
    rows: list[Sequence[object]] = [
        (f"{name}: {ROUTES.get(name, '')}", f"{count:,}") for name, count in counted["routes"].items()
    ]
    yield draw.table(("Route", "Pairs"), rows, label="Routes")
    yield draw.histogram(found["confidence"], label="How sure the judges are of kept pairs", unit="probability")
    if found["margin"]:
        yield draw.histogram(found["margin"], label="Rated score, preferred less other", unit="points of 5", mark=0.0)
    yield draw.histogram(
        found["length"], label="Length, preferred over other", unit="log2 of the ratio of characters", mark=0.0
    )
    why = [(reason, f"{count:,}") for reason, count in found["dropped"].items()]
    why += [(f"answers left out: {reason}", f"{n:,}") for reason, n in counted["completions_left_out"].items()]
    why += [(f"not in the dataset: {reason}", f"{n:,}") for reason, n in counted["dataset_left_out"].items()
            if reason != "dropped by the judges"]  # fmt: skip
    if counted["prompts_without_pair"]:
        why.append(("prompts that gave no pair worth comparing", f"{counted['prompts_without_pair']:,}"))
    if why:
        yield draw.table(("Left out, and why", "Count"), why, label="Left out")


def _balance(told: Mapping[str, Any]) -> Iterable[Html]:
    yield _any_table(told["balance"], "Refusals by kind of prompt") if told["balance"] else _missing(told, "balance")


def _training(told: Mapping[str, Any]) -> Iterable[Html]:
    training = told["training"]
    if training is None:
        yield _missing(told, "training")
        return
    result, identity = training["result"], training.get("identity", {})
    what = f"{identity.get('method', '')} of {identity.get('model', '')}: {result['pairs']:,} pairs, "
    yield tag("p", what, f"{result['steps']:,} steps, {duration(result['seconds'])}. In {training['output']}")
    findings = training.get("preflight", [])
    yield from _list(
        ". ".join(filter(None, (each["message"], each["mend"]))) for each in findings if each["level"] != "pass"
    )
    if findings:
        passed = sum(each["level"] == "pass" for each in findings)
        each_of_them = _list(f"{each['level']}: {each['message']}" for each in findings)
        yield tag("details", tag("summary", f"Preflight: {passed} of {len(findings)} checks passed"), *each_of_them)
    names = {"accuracy_before": "held-out accuracy before", "accuracy_after": "held-out accuracy after",
             "moved": "moved towards the chosen answer (chance is 0.5)"}  # fmt: skip
    rows = [_estimate_row(title, result[name]) for name, title in names.items() if result.get(name)]
    if rows:
        yield draw.table(("On held-out pairs", "", "Value [95 %]", "n"), rows, label="Held-out accuracy")
    history = training.get("history", [])
    for name, title in (("loss", "Loss"), ("margin", "Reward margin"), ("accuracy", "Reward accuracy"),
                        ("reward", "Reward"), ("kl", "KL from the reference")):  # fmt: skip
        points = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
        if len(points) > 1:
            yield draw.curve({title: points}, label=title)


def _evaluation(told: Mapping[str, Any]) -> Iterable[Html]:
    found = told["evaluation"]
    if found is None:
        yield _missing(told, "evaluation")
        return
    rows = [_estimate_row(name.replace("_", " "), value) for name, value in found.items() if estimate(found, name)]
    if rows:
        yield draw.table(("Measure", "", "Value [95 %]", "n"), rows, label="Evaluation")
    yield from _list(found.get("warnings") or [])
    plain = {name: value for name, value in found.items()
             if not isinstance(value, dict | list) and value is not None}  # fmt: skip
    if plain:
        yield tag("dl", *(join((tag("dt", k.replace("_", " ")), tag("dd", _words(v)))) for k, v in plain.items()))
    for name, title in (("checks", "Checks met"), ("refusals", "Answers that refuse, by kind of prompt")):
        if found.get(name):
            yield tag("h3", title)
            yield _any_table(found[name], title)
    for sample in found.get("samples", []):
        won = sample.get("preferred") or ""
        sides = [_answer(f"{name}{' (preferred)' if sample.get('preferred') == name else ''}", sample[name])
                 for name in ("reference", "trained")]  # fmt: skip
        summary = tag("summary", tag("span", won, class_="route"), " ", _first_line(sample["prompt"]))
        yield tag("details", summary, tag("div", *sides, class_="sides"))


def _list(said: Iterable[str]) -> Iterable[Html]:
    lines = [tag("li", line) for line in said]
    if lines:
        yield tag("ul", *lines)


def _rounds(told: Mapping[str, Any]) -> Iterable[Html]:
    rows = [
        (
            each["run"],
            _words(each["policies"]),
            f"{each['dataset'].get('train', 0):,}",
            _short(estimate(each, "agreement")),
            _short(estimate(each, "win_rate")),
        )
        for each in told["rounds"]
    ]
    yield draw.table(("Round", "Policy", "Pairs", "Agreement", "Win rate"), rows, label="Rounds")


def _short(found: Mapping[str, Any] | None) -> str | None:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else None


def _sample(row: Mapping[str, Any]) -> Html:
    p_a = row["p_a"]
    facts = [
        f"route: {row['route']} ({ROUTES[row['route']]}), because: {row['route_reason']}",
        f"the judges: {'no readable verdict' if p_a is None else f'a is better with probability {p_a:.2f}'}, "
        f"outcome {row['outcome']}" + (f", rated {row['margin']:+.1f} for a" if row["margin"] is not None else ""),
        "people: " + ("; ".join(row["people"]) or "not asked" * (row["route"] not in ("audit", "targeted")) or "waits"),
    ]
    sides = [_answer(f"{side}{' (preferred)' if row['preferred'] == side else ''}", row[f"response_{side}"])
             for side in ("a", "b")]  # fmt: skip
    turns = _turns(row["prompt"])
    shown = tag("div", *(tag("p", tag("b", role), " ", tag("span", _cut(text), class_="text")) for role, text in turns))
    return tag(
        "details",
        tag("summary", tag("span", row["route"], class_=f"route {row['route']}"), " ", _first_line(turns[-1][1])),
        shown,
        tag("div", *sides, class_="sides"),
        tag("ul", *(tag("li", fact) for fact in facts)),
        tag("p", f"pair {row['pair_id']}", class_="missing"),
    )


def _turns(prompt: str) -> list[tuple[str, str]]:
    return [(message["role"], message.get("content") or "(tool calls)") for message in orjson.loads(prompt)]


def _answer(title: str, text: str) -> Html:
    return tag("div", tag("h3", title), tag("div", _cut(text), class_="text"))


def _cut(text: str) -> str:
    more = len(text) - SHOWN_CHARACTERS
    return text if more <= 0 else f"{text[:SHOWN_CHARACTERS]} [... {more:,} more characters]"


def _first_line(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "(empty)")
    return line if len(line) <= 100 else line[:99] + "…"


def _words(value: Any) -> str:
    """A setting or fact as a person reads it."""
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_words(item)}" for name, item in value.items())
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _any_table(value: Any, label: str) -> Html:
    """Rows that another stage left, whatever their columns: a mapping of mappings, or a list of them."""
    if isinstance(value, Mapping) and all(isinstance(item, Mapping) for item in value.values()):
        value = [{"": name.replace("_", " "), **item} for name, item in value.items()]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return tag("p", _words(value))
    columns = list(dict.fromkeys(name for item in value for name in item))
    rows = [tuple(_cell(item.get(column)) for column in columns) for item in value]
    return draw.table([column.replace("_", " ") for column in columns], rows, label=label)


def _cell(value: Any) -> str | None:
    found = estimate({"it": value}, "it")
    return None if value is None else f"{_short(found)} (n = {found['n']:,})" if found else _words(value)
