"""HTML and SVG as values. Text is escaped when it becomes HTML, so an answer can never be markup.

:func:`element` is the only way to make an element, and it escapes everything that is not :class:`Html` yet. Charts are
inline SVG in the page's colors. Each carries its numbers as text for screen readers.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlaif.report.judge_stats import HistogramBin
    from rlaif.stats import Estimate

VOID_ELEMENTS = {"meta", "br", "rect", "line", "circle", "polyline"}
WIDTH, HEIGHT = 640, 200
LEFT, BOTTOM, TOP = 64, 26, 10
MAX_TICKS = 6


class Html(str):
    """Text that is already markup."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Escape ``value`` as text. Control characters that HTML does not allow become U+FFFD."""
    if isinstance(value, Html):
        return value
    text = "".join(char if char >= " " or char in "\n\t" else "\ufffd" for char in str(value))
    return Html(html.escape(text.encode("utf-8", "replace").decode()))


def with_code(text: str) -> Html:
    """Escape ``text``, with the parts between backticks as code."""
    return concat(element("code", part) if index % 2 else part for index, part in enumerate(text.split("`")))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return one element, without the attributes and children that are None.

    ``class_`` is class; other underscores become hyphens.
    """
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID_ELEMENTS:
        return Html(f"<{name}{attribute_text}>" if name in ("meta", "br") else f"<{name}{attribute_text}/>")
    return Html(f"<{name}{attribute_text}>{concat(children)}</{name}>")


def concat(children: Iterable[object]) -> Html:
    """Join ``children``, without those that are None."""
    return Html("".join(escape(child) for child in children if child is not None))


def html_table(head: Sequence[object], rows: Iterable[Sequence[object]], *, label: str, text_columns: int = 1) -> Html:
    """Return a table that scrolls horizontally on a narrow page. A cell that is None is a dash.

    ``text_columns``: number of leading columns that are text and aligned left.
    """

    def css_class(column: int) -> str | None:
        return "left" if column < text_columns else None

    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(
                element("td", "–" if cell is None else cell, class_=css_class(column))
                for column, cell in enumerate(row[1:], 1)
            ),
        )
        for row in rows
    ]
    header = element(
        "thead",
        element(
            "tr", *(element("th", cell, scope="col", class_=css_class(column)) for column, cell in enumerate(head))
        ),
    )
    inner = element("table", header, element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def histogram(bins: Sequence[HistogramBin], *, label: str, unit: str, mark: float | None = None) -> Html:
    """Return a bar chart of ``bins`` (at least one). ``mark``: value at which to draw a line."""
    max_count = max(bin_.count for bin_ in bins) or 1
    across = _scale(bins[0].low, bins[-1].high, LEFT, WIDTH - 8)
    up = _scale(0, max_count, HEIGHT - BOTTOM, TOP)
    bars = [
        element(
            "rect",
            class_="bar",
            x=_coordinate(across(bin_.low) + 1),
            y=_coordinate(up(bin_.count)),
            width=_coordinate(max(across(bin_.high) - across(bin_.low) - 2, 1)),
            height=_coordinate(HEIGHT - BOTTOM - up(bin_.count)),
        )
        for bin_ in bins
        if bin_.count
    ]
    line = None if mark is None else _line(across(mark), TOP, across(mark), HEIGHT - BOTTOM, "mark")
    tick_step = next(
        step for step in range(1, len(bins) + 1) if len(bins) % step == 0 and len(bins) // step <= MAX_TICKS
    )
    edges = [*(bin_.low for bin_ in bins[::tick_step]), bins[-1].high]
    ticks = [_text(across(x), HEIGHT - 8, f"{x:g}", "middle" if x < bins[-1].high else "end") for x in edges]
    description = ", ".join(f"{bin_.low:g} to {bin_.high:g}: {bin_.count:,}" for bin_ in bins if bin_.count)
    frame = [_text(LEFT - 6, TOP + 9, f"{max_count:,}", "end"), _text(LEFT - 6, HEIGHT - BOTTOM, "0", "end")]
    return _figure([*bars, line, _baseline(), *ticks, *frame], f"{label} ({unit})", description or "no values")


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str, across_label: str = "step") -> Html:
    """Return a chart of lines, each given as points (x, y) by its name."""
    points = [point for line in series.values() for point in line]
    lows, highs = [min(axis) for axis in zip(*points, strict=True)], [max(axis) for axis in zip(*points, strict=True)]
    across = _scale(lows[0], highs[0], LEFT, WIDTH - 8)
    up = _scale(lows[1], highs[1], HEIGHT - BOTTOM, TOP)
    lines = [
        element(
            "polyline",
            class_=f"curve c{index}",
            fill="none",
            points=" ".join(f"{_coordinate(across(x))},{_coordinate(up(y))}" for x, y in line),
        )
        for index, line in enumerate(series.values())
    ]
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


def interval_plot(estimate: Estimate, *, mark: float = 0.5) -> Html:
    """Return an estimate between 0 and 1 as a point on its interval, with a line at ``mark``."""
    across = _scale(0, 1, 6, 194)
    parts = [
        _line(6, 10, 194, 10, "axis"),
        _line(across(mark), 2, across(mark), 18, "mark"),
        _line(across(estimate.low), 10, across(estimate.high), 10, "range"),
        element("circle", cx=_coordinate(across(estimate.value)), cy="10", r="4", class_="point"),
    ]
    return element("svg", *parts, viewBox="0 0 200 20", class_="interval", aria_hidden="true")


def calibration_plot(points: Sequence[Mapping[str, Any]], *, label: str) -> Html:
    """Return a plot of how often annotators agreed (y) by the judges' confidence (x), with intervals.

    Points on the diagonal are calibrated. ``points``: {p, value, low, high, n}.
    """
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
        f"at {point['p']:.2f} annotators agree in {point['value']:.2f} of {point['n']}" for point in points
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
