"""Charts as PNG for a paper: 300 dpi, a column wide, no title."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deep_components.files import atomic_path, make_folder
from deep_components.reporting.charts import Chart, Charts, DotChart, LineChart, StackChart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
WIDTH = 3.5  # inches: a column of two
# Those of the page in its light form.
COLOURS = ("#0b62b0", "#c2500a", "#7d4fa3", "#0d7f63", "#a8326e", "#8a6a00", "#2b8ab8", "#545b66")

_MARKERS, _DASHES = "osD^", ("-", (0, (5, 2)), ":", (0, (6, 2, 1, 2)))
_GREY, _RULE = "#545b66", "#d5dae1"
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "axes.grid.axis": "both",
    "grid.color": _RULE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
}


def write_figures(charts: Charts, folder: Path) -> list[Path]:
    """Write ``<name>.png`` for every chart; the paths. InputError when the folder cannot be written."""
    make_folder(folder)
    paths = []
    for chart in charts.all:
        path = folder / f"{file_name(chart)}.png"
        with _figure(chart) as figure:
            _draw(figure.subplots(), chart)
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=DPI)
        paths.append(path)
    return paths


def file_name(chart: Chart) -> str:
    """The chart's key, with the method's name where there is a chart for each."""
    kind, _, place = chart.key.partition("_")
    return f"{kind}_{place}_{re.sub(r'[^A-Za-z0-9.=-]+', '_', chart.title)[:60].strip('_.')}" if place else kind


@contextmanager
def _figure(chart: Chart) -> Iterator["Figure"]:
    import matplotlib as mpl  # slow to import, and only needed here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(chart.dots) if isinstance(chart, DotChart) else len(chart.names) if isinstance(chart, StackChart) else 0
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.2 * rows if rows else 2.3), layout="constrained")
        FigureCanvasAgg(figure)  # no window, no state that others could see
        yield figure


def _draw(axes: "Axes", chart: Chart) -> None:
    if isinstance(chart, DotChart):
        _dots(axes, chart)
    elif isinstance(chart, StackChart):
        _stack(axes, chart)
    else:
        _lines(axes, chart)
    axes.set_xlabel(chart.x_label)


def _dots(axes: "Axes", chart: DotChart) -> None:
    axes.grid(axis="x")
    if chart.zero:
        axes.axvline(0, color="black", linewidth=0.6)
    for place, dot in enumerate(chart.dots):
        colour = COLOURS[0] if dot.emphasis else _GREY
        axes.plot([dot.low, dot.high], [place, place], color=colour)
        axes.plot(dot.mean, place, "o", color=colour)
        axes.plot(dot.values, [place + 0.3] * len(dot.values), "o", mec=colour, mfc="none", ms=2, mew=0.5)
    _method_axis(axes, [dot.name for dot in chart.dots])


def _stack(axes: "Axes", chart: StackChart) -> None:
    places, left = range(len(chart.names)), [0.0] * len(chart.names)
    for part, name in enumerate(chart.parts):
        widths = [shares[part] for shares in chart.shares]
        colour = COLOURS[part % len(COLOURS)]
        axes.barh(places, widths, left=left, color=colour, height=0.75, label=name, edgecolor="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlim(0, 1)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    _method_axis(axes, list(chart.names))


def _method_axis(axes: "Axes", names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.tick_params(axis="y", length=0)


def _lines(axes: "Axes", chart: LineChart) -> None:
    axes.grid(axis="y")
    for place, curve in enumerate(chart.curves):
        colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[place % 4] if chart.places else ""
        style, label = _DASHES[place % 4], _plain(curve.name)
        axes.plot(curve.x, curve.mean, color=colour, linestyle=style, marker=marker, label=label)
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
    if chart.places:
        every = -(-len(chart.places) // 6)
        shown = range(0, len(chart.places), every)
        axes.set_xticks(shown, [chart.places[place].removeprefix("20") for place in shown])
    if chart.log:
        axes.set_yscale("log")
    if len(chart.curves) > 1:
        axes.legend(ncols=2 if len(chart.curves) > 4 else 1)
    axes.set_ylabel(_plain(chart.y_label))


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula, and takes into a legend."""
    return text.replace("$", r"\$").lstrip("_") or "?"
