"""Charts as data: what is drawn and what it is called. The page draws them as SVG, papers get PNG; both from here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median

from deep_components.reporting.results import Results, Row, metric_title
from deep_components.reporting.series import Curve, learning_curves, streaming_curves

SURVIVAL = "survival_after_"
WEIGHT = "weight."
_LOG_FROM = 8


@dataclass(frozen=True)
class Dot:
    """A mean with an interval around it, and the values it is the mean of."""

    name: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()
    emphasis: bool = False


@dataclass(frozen=True)
class DotChart:
    """A row a method. ``zero``: the differences are to be held against 0."""

    key: str
    title: str
    x_label: str
    dots: tuple[Dot, ...]
    zero: bool = False


@dataclass(frozen=True)
class StackChart:
    """Shares that add up to 1, a row a method: ``shares`` [rows][parts]."""

    key: str
    title: str
    x_label: str
    parts: tuple[str, ...]
    names: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LineChart:
    """Curves with a band from the lowest to the highest seed. ``places``: names of x = 0, 1, ... instead of numbers."""

    key: str
    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    places: tuple[str, ...] = ()

    @property
    def log(self) -> bool:
        """Whether the height is logarithmic: a few high values would press the rest onto the axis."""
        lowest, highest = min(min(curve.low) for curve in self.curves), max(max(curve.high) for curve in self.curves)
        return lowest > 0 and highest > _LOG_FROM * max(median(curve.mean) for curve in self.curves)


Chart = DotChart | StackChart | LineChart


@dataclass(frozen=True)
class Charts:
    """All charts of a report, and sentences about what could not be read."""

    metric: DotChart | None
    differences: DotChart | None
    survival: StackChart | None
    losses: list[LineChart]
    weights: list[LineChart]
    streaming: LineChart | None
    problems: list[str]

    @property
    def all(self) -> list[Chart]:
        single = (self.metric, self.differences, self.survival, self.streaming)
        return [*(chart for chart in single if chart is not None), *self.losses, *self.weights]


def build_charts(results: Results) -> Charts:
    """The charts of the results; what is damaged is named and left out."""
    problems: list[str] = []
    learned = {row.name: learning_curves(row, problems) for row in results.rows if not row.untrained}
    learned = {name: curves for name, curves in learned.items() if curves}
    days, streamed = streaming_curves(results.rows, results.headline, problems)
    return Charts(
        metric=_metric_chart(results),
        differences=_difference_chart(results),
        survival=_survival_chart(results),
        losses=[
            LineChart(f"loss_{place}", name, "requests trained on", "loss", (curves["loss"],))
            for place, (name, curves) in enumerate(learned.items())
        ],
        weights=_weight_charts(learned),
        streaming=_streaming_chart(results, days, streamed),
        problems=problems,
    )


def _metric_chart(results: Results) -> DotChart | None:
    """Mean and deviation over seeds of the headline metric, and every seed; of trained methods, which lie close."""
    dots = []
    for row in results.rows:
        cell = row.cells[results.headline]
        if cell.mean is not None and not row.untrained:
            std = cell.std or 0.0
            emphasis = row.name == results.ours
            dots.append(Dot(row.name, cell.mean, cell.mean - std, cell.mean + std, cell.values, emphasis))
    title = metric_title(results.headline)
    return DotChart("metric", title, title, tuple(dots)) if dots else None


def _difference_chart(results: Results) -> DotChart | None:
    """Our method less each baseline, with the interval over requests."""
    dots = [
        Dot(made.baseline, sum(made.interval) / 2 if made.difference is None else made.difference, *made.interval)
        for made in results.compared(results.headline)
        if made.interval is not None
    ]
    if not dots:
        return None
    title = f"{results.ours} less each baseline"
    label = f"difference in {metric_title(results.headline)}"
    return DotChart("differences", title, label, tuple(dots), zero=True)


def stages(results: Results) -> list[str]:
    """The stages in serving order, as the results name them; empty when a run does not say what is left after them."""
    runs = [run for row in results.rows for run in row.runs]
    names = [name.removeprefix(SURVIVAL) for name in runs[0].results if name.startswith(SURVIVAL)]
    complete = all(isinstance(run.results.get(SURVIVAL + name), float) for run in runs for name in names)
    return names if complete else []


def left_after(row: Row, stage: str) -> float:
    """The share of the ground truth left after a stage, mean over seeds."""
    return mean(run.results[SURVIVAL + stage] for run in row.runs)


def _survival_chart(results: Results) -> StackChart | None:
    """Where the ground truth is lost: what survives, and what each stage loses, the last one first."""
    names = stages(results)
    if not names:
        return None
    shares = []
    for row in results.rows:
        left = [1.0, *(left_after(row, stage) for stage in names)]
        lost = [before - after for before, after in pairwise(left)]
        shares.append((left[-1], *reversed(lost)))
    parts = ("survives", *(f"lost at {stage}" for stage in reversed(names)))
    rows = tuple(row.name for row in results.rows)
    return StackChart("survival", "Ground truth", "share of the ground-truth items", parts, rows, tuple(shares))


def _weight_charts(learned: Mapping[str, Mapping[str, Curve]]) -> list[LineChart]:
    charts = []
    for place, (name, curves) in enumerate(learned.items()):
        found = {key.removeprefix(WEIGHT): curve for key, curve in curves.items() if key.startswith(WEIGHT)}
        if found:
            lines = tuple(replace(curve, name=stage) for stage, curve in found.items())
            charts.append(LineChart(f"weights_{place}", name, "requests trained on", "weight w", lines))
    return charts


def _streaming_chart(results: Results, days: Sequence[str], curves: Sequence[Curve]) -> LineChart | None:
    if not curves:
        return None
    title = metric_title(results.headline)
    return LineChart("streaming", f"{title} day by day", "test day", title, tuple(curves), tuple(days))
