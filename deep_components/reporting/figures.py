"""The charts of many runs, drawn once by matplotlib: as SVG for the page, as PNG of 300 dpi for a paper."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import pandas as pd

from deep_components.files import atomic_path, make_folder
from deep_components.reporting.curves import learning_curves, streaming_curves, validation_curves
from deep_components.reporting.frame import BOUND, UNTRAINED
from deep_components.reporting.paper import paper_name
from deep_components.reporting.results import Results, metric_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
COLUMN = 3.5  # inches: a column of a two-column paper
PAGE = 4.8  # inches: so that text drawn at 9 points can be read on a phone

# The page's style sheet has these as variables, for light and dark; the PNG has them as they are.
PALETTE = {
    "ink": "#16191d", "soft": "#555d68", "rule": "#d5dae1", "paper": "#ffffff",
    "c0": "#0b62b0", "c1": "#c2500a", "c2": "#7d4fa3", "c3": "#0d7f63",
    "c4": "#a8326e", "c5": "#8a6a00", "c6": "#2b8ab8", "c7": "#545b67",
}  # fmt: skip
INK, SOFT, RULE, PAPER, *COLOURS = PALETTE.values()
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^v"
SURVIVAL = "survival_after_"
WEIGHT = "weight."
BOUND_MARKS = {
    "bound_product": "product of shares", "bound_product_at_quotas": "product at the quotas",
    "bound_sampled": "survival with noise", "bound_hard": "survival",
}  # fmt: skip

_LOG_FROM = 8  # times the median: higher values would press the rest of a curve onto the axis
_LONGEST_NAME = 30
_STYLE: dict[Any, Any] = {
    "font.size": 8, "legend.fontsize": 7.5, "legend.frameon": False, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.axisbelow": True,
    "axes.facecolor": "none", "savefig.facecolor": "none", "svg.fonttype": "none",
    "grid.color": RULE, "grid.linewidth": 0.5, "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK,
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A chart that can be drawn at any width."""

    key: str  # its file's name, and what its ids in the page begin with
    kind: str  # score, differences, survival, bound, streaming, validation, loss or weights
    title: str  # the method's name, or what it shows
    description: str  # for readers who do not see it
    height: float  # inches
    draw: Callable[["Figure"], None]

    @contextmanager
    def figure(self, width: float = COLUMN) -> Iterator["Figure"]:
        """The chart as a matplotlib figure, ``width`` inches wide, within the style it is drawn and saved with."""
        with chdir(Path(__file__).parent):  # the current folder, maybe a log's, may hold a matplotlibrc that is read
            import matplotlib as mpl  # slow to import, and only needed here
        from matplotlib.figure import Figure

        sizes = {"font.size": 9, "legend.fontsize": 8.5} if width > COLUMN else {}
        with mpl.rc_context(_STYLE | sizes | {"svg.hashsalt": self.key}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a name's letters, drawn as boxes
            figure = Figure(figsize=(width, self.height), layout="constrained")  # no window, no state others could see
            self.draw(figure)
            yield figure

    def png(self, path: Path) -> None:
        """Write the chart for a paper. InputError when the file cannot be written."""
        with self.figure() as figure, atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, facecolor="white")

    def svg(self) -> str:
        """An SVG element for a page: the same bytes for the same runs; colours are the page's variables."""
        file = io.StringIO()
        with self.figure(PAGE) as figure:
            figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        drawn = file.getvalue()
        drawn = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
        drawn = re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", drawn)  # names of parts, the same in every chart
        drawn = re.sub(r"font-family: [^;\"]*; ", "", drawn)
        drawn = re.sub(r'd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), drawn)
        for name, colour in PALETTE.items():
            drawn = drawn.replace(colour, f"var(--{name})")
        box = re.search(r'viewBox="[^"]*"', drawn)
        assert box is not None
        inside = re.sub(r"\s*\n\s*", "\n", drawn[drawn.index(">") + 1 :])
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        title = escape(f"{self.title}. {self.description}")
        return f'<svg {names} class="chart" role="img" {box[0]}><title>{title}</title>{inside}'


def charts_of(results: Results, problems: list[str]) -> list[Chart]:
    """All charts that the results give; ``problems`` gets a sentence for every file that could not be read."""
    charts = [*_score(results), *_differences(results), *_survival(results), *_bound(results)]
    charts += _streaming(results, problems)
    charts += _validation(results)
    groups = results.runs[~results.runs["untrained"]].groupby("row", sort=False)
    for index, (row, group) in enumerate(groups):
        curves, name = learning_curves(group, problems), paper_name(str(row))
        if not curves:
            continue
        weights = {key.removeprefix(WEIGHT): curve for key, curve in curves.items() if key.startswith(WEIGHT)}
        charts += [_lines("loss", index, name, "loss", {name: curves["loss"]})]
        charts += [_lines("weights", index, name, "weight w", weights)] if weights else []
    return charts


def write_figures(charts: list[Chart], folder: Path) -> list[Path]:
    """Write ``<key>.png`` for every chart; the paths. InputError when the folder cannot be written."""
    make_folder(folder)
    paths = [folder / f"{chart.key}.png" for chart in charts]
    for chart, path in zip(charts, paths, strict=True):
        chart.png(path)
    return paths


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the index-th line; no two of the first 32 have the same, even without markers."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[(index + turn) % len(DASHES)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
    }


def _score(results: Results) -> list[Chart]:
    """The headline metric of every trained method, and the untrained cascade, which is chance, as a line."""
    cells = results.of(results.headline)
    trained = cells[~cells["untrained"] & cells["mean"].notna()]
    if trained.empty:
        return []
    chance = cells[cells["untrained"]]["mean"].dropna()
    runs = results.runs.groupby("row")[results.headline]
    dots = [
        (name, cell["mean"], cell["mean"] - cell["std"], cell["mean"] + cell["std"], runs.get_group(name).to_list())
        for name, cell in trained.iterrows()
    ]
    title, line = metric_title(results.headline), (UNTRAINED, chance.iloc[0]) if len(chance) else None
    described = [f"{paper_name(name)} {mean:.4f}" for name, mean, *_ in dots]
    described += [f"{name} {mean:.4f}" for name, mean in chance.items()]
    draw = partial(_dots, dots=dots, ours=results.ours, line=line, label=title)
    return [Chart("metric", "score", title, "; ".join(described), _rows_height(len(dots)), draw)]


def _differences(results: Results) -> list[Chart]:
    """Our method minus each baseline, with the interval over requests."""
    made = results.compared[results.compared["metric"] == results.headline]
    made = made[made["interval_low"].notna()]
    if made.empty:
        return []
    lows, highs = made["interval_low"], made["interval_high"]
    middles = made["difference"].fillna((lows + highs) / 2)
    dots: list[Any] = [(*found, []) for found in zip(made["method"], middles, lows, highs, strict=True)]
    title, label = f"{paper_name(str(results.ours))} minus each baseline", metric_title(results.headline)
    described = "; ".join(
        f"{paper_name(name)} {mean:+.4f} ({low:+.4f} to {high:+.4f})" for name, mean, low, high, _ in dots
    )
    draw = partial(_dots, dots=dots, ours=None, line=("", 0.0), label=f"difference in {label}")
    return [Chart("differences", "differences", title, described, _rows_height(len(dots)), draw)]


def _dots(figure: "Figure", dots: list[Any], ours: str | None, line: tuple[str, float] | None, label: str) -> None:
    """A row per method: (name, mean, low, high, values); the values are the rings below the mean."""
    axes = figure.subplots()
    axes.grid(axis="x")
    if line is not None:
        axes.axvline(line[1], color=SOFT, linestyle=(0, (3, 2)), linewidth=0.9)
        axes.text(line[1], 1, line[0], transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=SOFT)
    for index, (name, mean, low, high, values) in enumerate(dots):
        colour = COLOURS[0] if name == ours else SOFT
        axes.plot([low, high], [index, index], color=colour)
        axes.plot(mean, index, "o", color=colour, markersize=4)
        if len(values) > 1:
            axes.plot(values, [index + 0.32] * len(values), "o", mec=colour, mfc="none", ms=2, mew=0.5)
    axes.set_xlabel(label)
    _method_axis(axes, [name for name, *_ in dots], ours)


def survival(results: Results) -> pd.DataFrame:
    """Where the ground truth is lost: the share that survives by row, and what each stage loses, the last one first.

    Empty when a run does not say what is left after the stages, which the metrics name in serving order.
    """
    columns = [name for name in results.runs if name.startswith(SURVIVAL)]
    if not columns or results.runs[columns].isna().any(axis=None):
        return pd.DataFrame()
    left = results.runs.groupby("row", sort=False)[columns].mean()
    lost = -left.diff(axis=1).fillna(left[columns[:1]] - 1)
    shares = {f"lost at {name.removeprefix(SURVIVAL)}": lost[name] for name in reversed(columns)}
    return pd.DataFrame({"survives": left[columns[-1]]} | shares)


def _survival(results: Results) -> list[Chart]:
    shares = survival(results)
    described = "; ".join(
        f"{paper_name(str(row))}: {', '.join(f'{part} {share:.1%}' for part, share in found.items())}"
        for row, found in shares.iterrows()
    )
    draw, height = partial(_stack, shares=shares), _rows_height(len(shares)) + 0.2
    return [Chart("survival", "survival", "Ground truth", described, height, draw)] if len(shares) else []


def _stack(figure: "Figure", shares: pd.DataFrame) -> None:
    axes, rows, left = figure.subplots(), range(len(shares)), np.zeros(len(shares))
    for part, name in enumerate(shares):
        widths = shares[name].clip(lower=0)
        axes.barh(rows, widths, left=left, color=COLOURS[part % len(COLOURS)], height=0.75, label=name, edgecolor=PAPER)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.12:
                words: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": PAPER, "size": 7}
                axes.text(start + width / 2, row, f"{width:.0%}", **words)
        left = left + widths.to_numpy()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the ground-truth items")
    figure.legend(loc="outside upper center", ncols=3, handlelength=1)
    _method_axis(axes, list(shares.index))


def bound(results: Results) -> pd.DataFrame:
    """How tight the bound of each trained row's loss is, means over its runs; without rows whose runs do not all say
    so."""
    runs = results.runs[~results.runs["untrained"]].reindex(columns=["row", *BOUND])
    means = runs.groupby("row", sort=False).agg(lambda values: values.mean(skipna=False))
    return means.dropna(subset=list(BOUND_MARKS))


def _bound(results: Results) -> list[Chart]:
    found = bound(results)
    described = "; ".join(
        f"{paper_name(str(row))}: {', '.join(f'{words} {means[name]:.4f}' for name, words in BOUND_MARKS.items())}"
        for row, means in found.iterrows()
    )
    draw, height = partial(_marks, found=found), _rows_height(len(found)) + 0.35
    return [Chart("bound", "bound", "The bound", described, height, draw)] if len(found) else []


def _marks(figure: "Figure", found: pd.DataFrame) -> None:
    """A row per method, and on it a mark for each of BOUND_MARKS."""
    axes, rows = figure.subplots(), range(len(found))
    axes.grid(axis="x")
    axes.hlines(rows, found[list(BOUND_MARKS)].min(axis=1), found[list(BOUND_MARKS)].max(axis=1), color=RULE)
    for index, (name, words) in enumerate(BOUND_MARKS.items()):
        axes.plot(found[name], rows, linestyle="", color=COLOURS[index], marker=MARKERS[index], label=words)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of the ground truth")
    figure.legend(loc="outside upper center", ncols=2, handlelength=1)
    _method_axis(axes, list(found.index))


def _method_axis(axes: "Axes", names: list[str], ours: str | None = None) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == ours else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.tick_params(axis="y", length=0)


def _rows_height(rows: int) -> float:
    return 0.75 + 0.22 * rows


def _streaming(results: Results, problems: list[str]) -> list[Chart]:
    curves = streaming_curves(results.runs, results.headline, problems)
    title = metric_title(results.headline)
    return [_lines("streaming", None, f"{title} day by day", title, curves, "test day")] if curves else []


def _validation(results: Results) -> list[Chart]:
    curves = validation_curves(results.runs, results.headline, [])  # damaged step logs are named by their losses
    title = metric_title(results.headline)
    return [_lines("validation", None, f"{title} on the validation day", title, curves)] if curves else []


def _lines(
    kind: str, index: int | None, title: str, y_label: str, curves: dict[str, pd.DataFrame], x_label: str = ""
) -> Chart:
    file = re.sub(r"[^A-Za-z0-9.=-]+", "_", title)[:60].strip("_.")
    described = "; ".join(
        f"{paper_name(name)}: from {curve['mean'].iloc[0]:.4g} to {curve['mean'].iloc[-1]:.4g}"
        for name, curve in curves.items()
    )
    draw = partial(_draw_lines, curves=curves, x_label=x_label or "requests trained on", y_label=y_label)
    height = 2.1 + (0.14 * -(-len(curves) // 3) if len(curves) > 1 else 0)
    return Chart(kind if index is None else f"{kind}_{index}_{file}", kind, title, described, height, draw)


def _draw_lines(figure: "Figure", curves: dict[str, pd.DataFrame], x_label: str, y_label: str) -> None:
    """Means with a band from the lowest to the highest seed; the index is numbers, or names of days."""
    from matplotlib.ticker import EngFormatter

    axes = figure.subplots()
    axes.grid(axis="y")
    days = sorted({x for curve in curves.values() for x in curve.index if isinstance(x, str)})
    for index, (name, curve) in enumerate(curves.items()):
        x = [days.index(day) for day in curve.index] if days else curve.index.to_numpy()
        style = line_style(index)
        plain = {"marker": ""} if len(curves) == 1 and len(curve) > 1 else {}
        axes.plot(x, curve["mean"], label=_short(name), markevery=max(1, len(curve) // 8), **style | plain)
        axes.fill_between(x, curve["low"], curve["high"], color=style["color"], alpha=0.18, linewidth=0)
    values = pd.concat(list(curves.values()))
    log = values["low"].min() > 0 and values["high"].max() > _LOG_FROM * values["mean"].median()
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    elif values["high"].max() - values["low"].min() <= 1e-9 * values.abs().max(axis=None):  # a constant
        middle, room = values["mean"].mean(), values.abs().max(axis=None) / 10 or 1.0
        axes.set_ylim(middle - room, middle + room)
    if days:
        shown, one_year = range(0, len(days), -(-len(days) // 5)), len({day[:5] for day in days}) == 1
        axes.set_xticks(shown, [days[index][5:] if one_year else days[index] for index in shown])
    else:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=3, handlelength=2.6, columnspacing=1.2)
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"{y_label} (log scale)" if log else y_label)


def _short(name: str) -> str:
    """A method's name for a chart; matplotlib leaves names that begin with _ out of a legend."""
    shown = paper_name(name).lstrip("_") or "?"
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"
