"""What many runs say together: a row per method, mean and deviation per metric, and one method against the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from deep_components.errors import InputError
from deep_components.reporting.paper import PaperNumber, comparable, paper_number
from deep_components.reporting.runs import Collected, Run, printable, rows
from deep_components.reporting.statistics import SIGNIFICANCE, Test, bootstrap_intervals, holm, t_test

OUR_METHOD = "lcron"
DECIMALS = 4  # of the paper's tables

NO_TEST_SEEDS = "fewer than two seeds with a value"
NO_TEST_PAIRS = "fewer than two common seeds with a value"
NO_TEST_SPREAD = "no spread over seeds"


_TITLES = {"ndcg": "NDCG", "tau": "tau"}


def metric_title(name: str) -> str:
    """A metric's name as a reader writes it: rank_ndcg@10 is Rank NDCG@10."""
    base, *cuts = name.split("@")
    words = [_TITLES.get(word, word.capitalize()) for word in base.split("_")]
    return "@".join([" ".join(words), *cuts])


@dataclass(frozen=True)
class Cell:
    """A metric of a method: its value per run, in the order of the row's runs, and what they come to."""

    values: tuple[float, ...]
    best: bool = False
    paper: PaperNumber | None = None

    @property
    def mean(self) -> float | None:
        """None when the metric is undefined."""
        return mean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """The sample standard deviation; None for fewer than two runs."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def paper_difference(self) -> float | None:
        """Our mean less the paper's."""
        return None if self.paper is None or self.mean is None else self.mean - self.paper.mean


@dataclass(frozen=True)
class Row:
    """A method: its runs, one a seed, and its cells by metric."""

    name: str
    runs: list[Run]
    cells: dict[str, Cell]

    @property
    def untrained(self) -> bool:
        return self.runs[0].untrained


@dataclass(frozen=True)
class Comparison:
    """Our method against a baseline in one metric; the difference is our mean less the baseline's.

    ``p`` is the t-test's over seeds, ``p_holm`` corrected over all baselines of the metric; both None when there was no
    test, and ``no_test`` says why. ``interval`` is the bootstrap's over requests.
    """

    baseline: str
    metric: str
    difference: float | None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    no_test: str | None = None

    @property
    def verdict(self) -> str:
        """ "better", "worse" (ours, significantly), "no difference shown" or "not tested"."""
        if self.p_holm is None or self.difference is None:
            return "not tested"
        if self.p_holm > SIGNIFICANCE or self.difference == 0:
            return "no difference shown"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Results:
    """The table of many runs. ``ours`` is the method compared with the others, None when there is none."""

    about: dict[str, Any]
    metrics: tuple[str, ...]
    rows: list[Row]
    ours: str | None
    test: Test
    comparisons: list[Comparison]
    warnings: list[str]
    notes: list[str]
    left_out: dict[str, str]

    @property
    def headline(self) -> str:
        """The metric the method is judged by: the first, joint recall."""
        return self.metrics[0]

    @property
    def has_paper(self) -> bool:
        return any(cell.paper for row in self.rows for cell in row.cells.values())

    def compared(self, metric: str) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.metric == metric]

    def comparison(self, baseline: str, metric: str) -> Comparison | None:
        return next((found for found in self.compared(metric) if found.baseline == baseline), None)


def build_results(collected: Collected, compare: str | None = None, test: Test = "welch") -> Results:
    """The results of the runs.

    Args:
        collected: what :func:`~deep_components.reporting.runs.read_runs` found.
        compare: the row to hold against every other trained row; default: ``lcron``, if there is one.
        test: see :func:`~deep_components.reporting.statistics.t_test`.

    Raises InputError when there is no row ``compare``, or a seed of a method stands twice.
    """
    runs, first = collected.runs, collected.runs[0].results
    groups = rows(runs)
    table = _mark_best([_row(name, group, runs[0].metrics) for name, group in groups.items()], runs[0].metrics)
    trained = [row for row in table if not row.untrained]
    ours = _our_row(trained, compare)
    baselines = [row for row in trained if row is not ours]
    comparisons, notes = [], []
    if ours is not None and baselines:
        for metric in runs[0].metrics:
            comparisons += _compare(ours, baselines, metric, test)
        notes += _notes(comparisons)
    elif len(trained) > 1:
        notes.append(f"No row is called {OUR_METHOD}, so none is compared with the others; choose one with --compare.")
    return Results(
        about={name: first.get(name) for name in ("setting", "data", "test_day", "test_day_checksum", "num_requests")},
        metrics=runs[0].metrics,
        rows=table,
        ours=ours.name if ours and baselines else None,
        test=test,
        comparisons=comparisons,
        warnings=sorted(
            {printable(str(run.results[key])) for run in runs for key in run.results if key.startswith("warning")}
        ),
        notes=notes,
        left_out={str(folder): reason for folder, reason in collected.left_out.items()},
    )


def _row(name: str, group: list[Run], metrics: Sequence[str]) -> Row:
    cells = {}
    for metric in metrics:
        values = [run.results[metric] for run in group]
        paper = None
        if all(comparable(run.results, run.config) for run in group):
            paper = paper_number(group[0].results["setting"], group[0].name, group[0].config["arguments"], metric)
        cells[metric] = Cell(() if None in values else tuple(map(float, values)), paper=paper)
    return Row(name, group, cells)


def _mark_best(table: list[Row], metrics: Sequence[str]) -> list[Row]:
    """Marks, per metric, the trained rows whose mean is the best as printed; with one trained row there is no best."""
    best: dict[str, float] = {}
    if sum(not row.untrained for row in table) > 1:
        for metric in metrics:
            means = [row.cells[metric].mean for row in table if not row.untrained]
            best |= {metric: max((round(value, DECIMALS) for value in means if value is not None), default=np.nan)}
    return [
        Row(
            row.name,
            row.runs,
            {
                metric: Cell(cell.values, _is_best(cell, best.get(metric)) and not row.untrained, cell.paper)
                for metric, cell in row.cells.items()
            },
        )
        for row in table
    ]


def _is_best(cell: Cell, best: float | None) -> bool:
    return cell.mean is not None and round(cell.mean, DECIMALS) == best


def _our_row(trained: Sequence[Row], compare: str | None) -> Row | None:
    found = next((row for row in trained if row.name == (compare or OUR_METHOD)), None)
    if found is None and compare is not None:
        names = ", ".join(row.name for row in trained) or "none is trained"
        raise InputError(f"--compare={compare}: no such row; the trained rows are: {names}")
    return found


def _compare(ours: Row, baselines: Sequence[Row], metric: str, test: Test) -> list[Comparison]:
    """Our method against every baseline in a metric; Holm's correction runs over them."""
    samples = [_samples(ours, baseline, metric, test) for baseline in baselines]
    tests = [_test(a, b, test) for a, b in samples]
    adjusted = iter(holm([p for p, _ in tests if p is not None]))
    intervals = _intervals(ours, baselines, metric)
    comparisons = []
    for baseline, (a, b), (p, no_test), interval in zip(baselines, samples, tests, intervals, strict=True):
        difference = mean(a) - mean(b) if a and b else None
        p_holm = None if p is None else next(adjusted)
        comparisons.append(Comparison(baseline.name, metric, difference, interval, p, p_holm, no_test))
    return comparisons


def _samples(ours: Row, theirs: Row, metric: str, test: Test) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The values to compare: all, or for the paired test those of the seeds that both have, in one order."""
    one, other = ours.cells[metric].values, theirs.cells[metric].values
    if test == "welch" or not one or not other:
        return one, other
    own, their = (
        dict(zip([run.seed for run in row.runs], row.cells[metric].values, strict=True)) for row in (ours, theirs)
    )
    common = [seed for seed in own if seed is not None and seed in their]
    return tuple(own[seed] for seed in common), tuple(their[seed] for seed in common)


def _test(ours: Sequence[float], theirs: Sequence[float], test: Test) -> tuple[float | None, str | None]:
    """The p-value, or why there is none."""
    if min(len(ours), len(theirs)) < 2:
        return None, NO_TEST_PAIRS if test == "paired" else NO_TEST_SEEDS
    p = t_test(ours, theirs, test)
    return p, NO_TEST_SPREAD if p is None else None


def _intervals(ours: Row, baselines: Sequence[Row], metric: str) -> list[tuple[float, float] | None]:
    """Bootstrap intervals over requests of the difference of the means over seeds; None where a run lacks them."""
    own = _mean_per_request(ours, metric)
    theirs = [_mean_per_request(baseline, metric) for baseline in baselines]
    pairs = {
        place: own[1] - other[1]
        for place, other in enumerate(theirs)
        if own is not None and other is not None and np.array_equal(own[0], other[0])
    }
    if not pairs:
        return [None] * len(baselines)
    found = dict(zip(pairs, bootstrap_intervals(np.stack(list(pairs.values()))), strict=True))
    return [found.get(place) for place in range(len(baselines))]


def _mean_per_request(row: Row, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """request_id [R] and the metric's mean over the row's seeds [R]; None unless all runs have the same requests."""
    requests, total = None, None
    for run in row.runs:
        ids, values = run.per_request("request_id"), run.per_request(metric)
        if ids is None or values is None or (requests is not None and not np.array_equal(ids, requests)):
            return None
        requests, total = ids, values if total is None else total + values
    return None if requests is None or total is None else (requests, total / len(row.runs))


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What is missing of the comparisons, and why."""
    notes = []
    untested: dict[str, list[str]] = {}
    for comparison in comparisons:
        if comparison.no_test:
            names = untested.setdefault(comparison.no_test, [])
            names += [comparison.baseline] if comparison.baseline not in names else []
    for reason, names in untested.items():
        notes.append(f"No t-test of some metrics against {', '.join(names)}: {reason}.")
    lacking = sorted({made.baseline for made in comparisons if made.interval is None and made.difference is not None})
    if lacking:
        notes.append(
            f"No interval over requests against {', '.join(lacking)}: per_request.npz is missing or has other requests "
            "there; evaluate those runs again."
        )
    return notes
