"""HTML and SVG as values: text is escaped when it becomes one, so an answer can never be markup.

``tag`` is the only way to make an element, and everything that is not :class:`Html` already is escaped by it. The
charts are inline SVG in the page's own colours; each carries its numbers as text for whoever cannot see it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

VOID_ELEMENTS = {"meta", "br", "rect", "line", "circle", "polyline"}
WIDTH, HEIGHT = 640, 200
LEFT, BOTTOM, TOP = 64, 26, 10


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(value: object) -> Html:
    """``value`` as text of the page. Control characters that no page may hold become U+FFFD."""
    if isinstance(value, Html):
        return value
    text = "".join(char if char >= " " or char in "\n\t" else "\ufffd" for char in str(value))
    return Html(html.escape(text.encode("utf-8", "replace").decode()))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """One element. ``class_`` is class, other underscores are hyphens; None leaves an attribute or a child out."""
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID_ELEMENTS:
        return Html(f"<{name}{attribute_text}>" if name in ("meta", "br") else f"<{name}{attribute_text}/>")
    return Html(f"<{name}{attribute_text}>{concat(children)}</{name}>")


def concat(children: Iterable[object]) -> Html:
    return Html("".join(escape(child) for child in children if child is not None))


def html_table(head: Sequence[object], rows: Iterable[Sequence[object]], *, label: str) -> Html:
    """A table that scrolls by itself where the page is narrow. Cells after the first stand to the right."""
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", "–" if cell is None else cell) for cell in row[1:]),
        )
        for row in rows
    ]
    header = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    inner = element("table", header, element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def histogram(bins: Sequence[Mapping[str, float]], *, label: str, unit: str, mark: float | None = None) -> Html:
    """Bars over bins of {low, high, count}; ``mark`` draws a line at a value worth seeing."""
    max_count = max((bin_["count"] for bin_ in bins), default=0) or 1
    low, high = bins[0]["low"], bins[-1]["high"]
    across, up = _scale(low, high, LEFT, WIDTH - 8), _scale(0, max_count, HEIGHT - BOTTOM, TOP)
    bars = [
        element("rect", class_="bar", x=_coordinate(across(bin_["low"]) + 1), y=_coordinate(up(bin_["count"])),
            width=_coordinate(max(across(bin_["high"]) - across(bin_["low"]) - 2, 1)),
            height=_coordinate(HEIGHT - BOTTOM - up(bin_["count"])))
        for bin_ in bins if bin_["count"]
    ]  # fmt: skip
    line = None if mark is None else _line(across(mark), TOP, across(mark), HEIGHT - BOTTOM, "mark")
    tick_step = max(1, len(bins) // 6)
    ticks = [_text(across(bin_["low"]), HEIGHT - 8, f"{bin_['low']:g}", "middle") for bin_ in bins[::tick_step]]
    description = ", ".join(f"{b['low']:g} to {b['high']:g}: {b['count']:,}" for b in bins if b["count"])
    frame = [_text(LEFT - 6, TOP + 9, f"{max_count:,}", "end"), _text(LEFT - 6, HEIGHT - BOTTOM, "0", "end")]
    return _figure([*bars, line, _baseline(), *ticks, *frame], f"{label} ({unit})", description or "no values")


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str, across_label: str = "step") -> Html:
    """Lines over a common axis: by name, points of (x, y)."""
    points = [point for line in series.values() for point in line]
    lows, highs = [min(axis) for axis in zip(*points, strict=True)], [max(axis) for axis in zip(*points, strict=True)]
    across = _scale(lows[0], highs[0], LEFT, WIDTH - 8)
    up = _scale(lows[1], highs[1], HEIGHT - BOTTOM, TOP)
    lines = [
        element("polyline", class_=f"curve c{index}", fill="none",
            points=" ".join(f"{_coordinate(across(x))},{_coordinate(up(y))}" for x, y in line))
        for index, line in enumerate(series.values())
    ]  # fmt: skip
    ticks = [
        _text(LEFT, HEIGHT - 8, f"{across_label} {lows[0]:g}", "start"),
        _text(WIDTH - 8, HEIGHT - 8, f"{highs[0]:g}", "end"),
        _text(LEFT - 6, TOP + 9, f"{highs[1]:.3g}", "end"),
        _text(LEFT - 6, HEIGHT - BOTTOM, f"{lows[1]:.3g}", "end"),
    ]
    description = "; ".join(
        f"{name}: from {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in series.items() if line
    )
    return _figure([*lines, _baseline(), *ticks], label, description)


def interval_plot(estimate: Mapping[str, Any], *, mark: float = 0.5) -> Html:
    """An estimate between 0 and 1 as a point on its interval, with a line at ``mark``."""
    across = _scale(0, 1, 6, 194)
    parts = [
        _line(6, 10, 194, 10, "axis"),
        _line(across(mark), 2, across(mark), 18, "mark"),
        _line(across(estimate["low"]), 10, across(estimate["high"]), 10, "range"),
        element("circle", cx=_coordinate(across(estimate["value"])), cy="10", r="4", class_="point"),
    ]
    return element("svg", *parts, viewBox="0 0 200 20", class_="interval", aria_hidden="true")


def calibration_plot(points: Sequence[Mapping[str, Any]], *, label: str) -> Html:
    """How often people agreed (y) where the judges were so sure (x), with intervals; on the diagonal they are right.
    Points are {p, value, low, high, n}."""
    across, up = _scale(0.5, 1, LEFT, WIDTH - 8), _scale(0, 1, HEIGHT - BOTTOM, TOP)
    parts: list[Html | None] = [_line(across(0.5), up(0.5), across(1), up(1), "mark")]
    for point in points:
        x = across(point["p"])
        parts += [
            _line(x, up(point["low"]), x, up(point["high"]), "range"),
            element("circle", cx=_coordinate(x), cy=_coordinate(up(point["value"])), r="5", class_="point"),
        ]
    ticks = [
        _text(across(x), HEIGHT - 8, f"{x:.1f}", "middle" if x < 1 else "end") for x in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]
    ticks += [_text(LEFT - 6, up(y) + 4, f"{y:.1f}", "end") for y in (0.0, 0.5, 1.0)]
    description = "; ".join(
        f"at {point['p']:.2f} people agree in {point['value']:.2f} of {point['n']}" for point in points
    )
    return _figure([*parts, _baseline(), *ticks], label, description)


def _figure(parts: Sequence[Html | None], label: str, description: str) -> Html:
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{label}: {description}")
    return element("figure", element("figcaption", label), drawing)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return element("line", x1=_coordinate(x1), y1=_coordinate(y1), x2=_coordinate(x2), y2=_coordinate(y2), class_=kind)


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=_coordinate(x), y=_coordinate(y), text_anchor=anchor)


def _baseline() -> Html:
    return _line(LEFT, HEIGHT - BOTTOM, WIDTH - 8, HEIGHT - BOTTOM, "axis")


def _coordinate(value: float) -> str:
    return f"{value:.1f}"
