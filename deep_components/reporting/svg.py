"""Charts as SVG for the page: drawn small, so that their text stays readable on a phone; colours come from the page's
style sheet (classes ``c0``, ``c1``, ...), so that they follow dark mode and print."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from xml.etree import ElementTree

from deep_components.reporting.charts import Chart, DotChart, LineChart, StackChart
from deep_components.reporting.series import Curve

WIDTH = 380  # of a chart, in its own units; about that many pixels on a phone
COLOURS = 8  # c0 .. c7; markers and dashes tell further lines, and lines without colour, apart

_ROW, _MARGIN, _AXIS = 20, 8, 34
_LETTER = 6.1  # width of a letter in the chart's text, an upper bound for most
_LONGEST_LABEL = 24
_LINE_HEIGHT = 190
_SHAPES = "circle", "square", "diamond", "triangle"


@dataclass(frozen=True)
class _Scale:
    """From values to places; both ends are ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


@dataclass(frozen=True)
class _LogScale(_Scale):
    """The same for values above 0, equal factors apart."""

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 2)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose the range, both above 0."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` round values (1, 2 or 5 times a power of ten apart) that enclose the range."""
    if not high > low:
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    exponent = math.floor(math.log10((high - low) / most))
    for step in (10.0**power * unit for power in range(exponent, exponent + 3) for unit in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= most:
            return [round(place * step, 12) for place in range(first, last + 1)]
    raise AssertionError("some power of ten is wide enough")


def number(value: float) -> str:
    """A tick's label."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and value % (size / 1000) == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def draw(chart: Chart) -> str:
    """The chart as an SVG element."""
    if isinstance(chart, DotChart):
        root = _dots(chart)
    elif isinstance(chart, StackChart):
        root = _stack(chart)
    else:
        root = _lines(chart)
    return ElementTree.tostring(root, encoding="unicode")


def error_bar(value: float, low: float, high: float, limits: tuple[float, float]) -> str:
    """A small mean with its interval for a table's cell; ``limits`` are those of its column."""
    scale = _Scale(*limits, 3.0, 93.0) if limits[1] > limits[0] else _Scale(limits[0] - 1, limits[0] + 1, 3.0, 93.0)
    root = ElementTree.Element("svg", {"viewBox": "0 0 96 8", "class": "bar", "aria-hidden": "true"})
    _add(root, "line", "grid", x1=0, x2=96, y1=4, y2=4)
    _add(root, "line", "whisker", x1=scale(low), x2=scale(high), y1=4, y2=4)
    _add(root, "circle", "dot", cx=scale(value), cy=4, r=2.5)
    return ElementTree.tostring(root, encoding="unicode")


def swatch(place: int) -> str:
    """The sign of the place-th line or part in a legend."""
    root = ElementTree.Element("svg", {"viewBox": "0 0 26 10", "class": "swatch", "aria-hidden": "true"})
    _add(root, "line", f"line {_colour(place)} {_dash(place)}", x1=0, x2=26, y1=5, y2=5)
    _marker(root, place, 13, 5)
    return ElementTree.tostring(root, encoding="unicode")


# ---- dots with intervals ---------------------------------------------------------------------------------------------


def _dots(chart: DotChart) -> ElementTree.Element:
    left = _label_width([dot.name for dot in chart.dots])
    bottom = _MARGIN + _ROW * len(chart.dots)
    root = _root(chart, bottom + _AXIS, _describe_dots(chart))
    values = [value for dot in chart.dots for value in (dot.low, dot.high, *dot.values)]
    scale = _x_axis(root, chart.x_label, values + [0.0] * chart.zero, left, bottom)
    if chart.zero:
        _add(root, "line", "zero", x1=scale(0), x2=scale(0), y1=_MARGIN, y2=bottom)
    for place, dot in enumerate(chart.dots):
        y = _MARGIN + _ROW * (place + 0.5)
        _row_label(root, dot.name, left, y, dot.emphasis)
        group = _add(root, "g", "emphasis" if dot.emphasis else "plain")
        for value in dot.values:
            _add(group, "circle", "seed", cx=scale(value), cy=y + 6, r=1.8)
        _add(group, "line", "whisker", x1=scale(dot.low), x2=scale(dot.high), y1=y, y2=y)
        _add(group, "circle", "dot", cx=scale(dot.mean), cy=y, r=3.2)
    return root


def _describe_dots(chart: DotChart) -> str:
    return "; ".join(f"{dot.name} {dot.mean:.4f} ({dot.low:.4f} to {dot.high:.4f})" for dot in chart.dots)


# ---- shares ----------------------------------------------------------------------------------------------------------


def _stack(chart: StackChart) -> ElementTree.Element:
    left = _label_width(chart.names)
    bottom = _MARGIN + _ROW * len(chart.names)
    root = _root(chart, bottom + _AXIS, _describe_shares(chart))
    scale = _x_axis(root, chart.x_label, [0.0, 1.0], left, bottom)
    for place, (name, shares) in enumerate(zip(chart.names, chart.shares, strict=True)):
        top = _MARGIN + _ROW * place + 2
        _row_label(root, name, left, top + _ROW / 2 - 2)
        for part, (end, share) in enumerate(zip(accumulate(shares), shares, strict=True)):
            x, width = scale(end - share), scale(end) - scale(end - share)
            _add(root, "rect", f"part {_colour(part)}", x=x, y=top, width=round(max(width, 0), 2), height=_ROW - 4)
            if width > 30:
                label = f"part-label on-{_colour(part)}"
                _text(root, f"{share:.0%}", x + width / 2, top + _ROW / 2 + 1.5, label, "middle")
    return root


def _describe_shares(chart: StackChart) -> str:
    rows = []
    for name, shares in zip(chart.names, chart.shares, strict=True):
        parts = [f"{part} {share:.1%}" for part, share in zip(chart.parts, shares, strict=True)]
        rows.append(f"{name}: {', '.join(parts)}")
    return "; ".join(rows)


# ---- curves ----------------------------------------------------------------------------------------------------------


def _lines(chart: LineChart) -> ElementTree.Element:
    top, bottom = 20, 20 + _LINE_HEIGHT
    root = _root(chart, bottom + _AXIS, _describe_curves(chart))
    low, high = min(min(curve.low) for curve in chart.curves), max(max(curve.high) for curve in chart.curves)
    y_ticks = log_ticks(low, high) if chart.log else ticks(low, high)
    left = 10 + _LETTER * max(len(number(tick)) for tick in y_ticks)
    y = (_LogScale if chart.log else _Scale)(y_ticks[0], y_ticks[-1], bottom, top)
    for tick in y_ticks:
        _add(root, "line", "grid", x1=left, x2=WIDTH - _MARGIN, y1=y(tick), y2=y(tick))
        _text(root, number(tick), left - 5, y(tick) + 3.5, "tick", "end")
    _text(root, f"{chart.y_label} (log scale)" if chart.log else chart.y_label, 2, 10, "axis-label", "start")
    x = _places_axis(root, chart, left, bottom) if chart.places else _numbers_axis(root, chart, left, bottom)
    for place, curve in enumerate(chart.curves):
        _curve(root, curve, place, x, y, markers=bool(chart.places))
    return root


def _numbers_axis(root: ElementTree.Element, chart: LineChart, left: float, bottom: float) -> Callable[[float], float]:
    values = [0.0, *(value for curve in chart.curves for value in curve.x)]
    return _x_axis(root, chart.x_label, values, left, bottom, grid=False)


def _places_axis(root: ElementTree.Element, chart: LineChart, left: float, bottom: float) -> Callable[[float], float]:
    """Days, labelled where there is room for it: the first and the last always."""
    last = len(chart.places) - 1
    scale = _Scale(0, max(last, 1), left + 14, WIDTH - _MARGIN - 18)
    room = int((scale.end - scale.start) / (_LETTER * 7)) or 1
    every = max(1, math.ceil(last / room))
    shown = [place for place in range(0, last + 1, every) if last - place >= every] + [last]
    short = _without_year(chart.places)
    for place in shown:
        _add(root, "line", "axis", x1=scale(place), x2=scale(place), y1=bottom, y2=bottom + 3)
        _text(root, short[place], scale(place), bottom + 15, "tick", "middle")
    _add(root, "line", "axis", x1=left, x2=WIDTH - _MARGIN, y1=bottom, y2=bottom)
    _text(root, chart.x_label, WIDTH - _MARGIN, bottom + 29, "axis-label", "end")
    return scale


def _without_year(days: Sequence[str]) -> list[str]:
    """2024-02-04 as 02-04 where all days are of one year."""
    years = {day[:5] for day in days}
    return [day[5:] or day for day in days] if len(years) == 1 else list(days)


def _curve(
    root: ElementTree.Element,
    curve: Curve,
    place: int,
    x: Callable[[float], float],
    y: Callable[[float], float],
    markers: bool,
) -> None:
    points = [(x(at), y(value)) for at, value in zip(curve.x, curve.mean, strict=True)]
    if curve.seeds > 1:
        upper = [(x(at), y(value)) for at, value in zip(curve.x, curve.high, strict=True)]
        lower = [(x(at), y(value)) for at, value in zip(curve.x, curve.low, strict=True)]
        _add(root, "polygon", f"band {_colour(place)}", points=_points([*upper, *reversed(lower)]))
    _add(root, "polyline", f"line {_colour(place)} {_dash(place)}", points=_points(points))
    if markers or len(points) == 1:
        for across, down in points:
            _marker(root, place, across, down)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{across:g},{down:g}" for across, down in points)


def _describe_curves(chart: LineChart) -> str:
    return "; ".join(f"{c.name}: from {c.mean[0]:.4g} to {c.mean[-1]:.4g}" for c in chart.curves)


# ---- what they share -------------------------------------------------------------------------------------------------


def _root(chart: Chart, height: float, description: str) -> ElementTree.Element:
    box = {"viewBox": f"0 0 {WIDTH} {height:g}", "class": "chart", "role": "img"}
    root = ElementTree.Element("svg", box)
    title = ElementTree.SubElement(root, "title")
    title.text = f"{chart.title}. {description}"
    return root


def _x_axis(
    root: ElementTree.Element, label: str, values: Sequence[float], left: float, bottom: float, grid: bool = True
) -> _Scale:
    """Ticks, their labels and the axis's own; the scale of the values, with a little room to both sides if gridded."""
    room = (max(values) - min(values)) / 25 or 1e-3
    low, high = (
        (min(values) - room, max(values) + room)
        if grid and (min(values), max(values)) != (0, 1)
        else (min(values), max(values))
    )
    scale = _Scale(low, high, left, WIDTH - _MARGIN - 12)
    for tick in [tick for tick in ticks(low, high, 7) if low <= tick <= high]:
        top = _MARGIN if grid else bottom
        _add(root, "line", "grid" if grid else "axis", x1=scale(tick), x2=scale(tick), y1=top, y2=bottom + 3)
        _text(root, number(tick), scale(tick), bottom + 15, "tick", "middle")
    if not grid:
        _add(root, "line", "axis", x1=left, x2=WIDTH - _MARGIN, y1=bottom, y2=bottom)
    _text(root, label, WIDTH - _MARGIN, bottom + 29, "axis-label", "end")
    return scale


def _label_width(names: Sequence[str]) -> float:
    return 10 + _LETTER * min(_LONGEST_LABEL, max(len(name) for name in names))


def _row_label(root: ElementTree.Element, name: str, left: float, y: float, emphasis: bool = False) -> None:
    shown = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    text = _text(root, shown, left - 8, y + 3.5, "row-label strong" if emphasis else "row-label", "end")
    if shown != name:
        ElementTree.SubElement(text, "title").text = name


def _marker(root: ElementTree.Element, place: int, x: float, y: float) -> None:
    """A sign of the place-th line: shapes go round slower than colours repeat."""
    shape, of = _SHAPES[place % len(_SHAPES)], f"marker {_colour(place)}"
    if shape == "circle":
        _add(root, "circle", of, cx=x, cy=y, r=3)
    elif shape == "square":
        _add(root, "rect", of, x=round(x - 2.7, 2), y=round(y - 2.7, 2), width=5.4, height=5.4)
    else:
        below = [(x, y + 3.8)] if shape == "diamond" else []
        side = 0 if shape == "diamond" else 2.8
        corners = [(x - 3.6, y + side), (x, y - 3.8), (x + 3.6, y + side), *below]
        _add(root, "polygon", of, points=_points([(round(a, 2), round(d, 2)) for a, d in corners]))


def _colour(place: int) -> str:
    return f"c{place % COLOURS}"


def _dash(place: int) -> str:
    return f"d{place % 4}"


def _text(root: ElementTree.Element, words: str, x: float, y: float, kind: str, anchor: str) -> ElementTree.Element:
    element = _add(root, "text", kind, x=round(x, 2), y=round(y, 2))
    element.set("text-anchor", anchor)
    element.text = words
    return element


def _add(parent: ElementTree.Element, tag: str, kind: str, **attributes: float | str) -> ElementTree.Element:
    named = {name: value if isinstance(value, str) else f"{value:g}" for name, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, {"class": kind, **named})
