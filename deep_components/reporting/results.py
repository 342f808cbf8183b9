"""What many runs say together: a row per method, mean and deviation per metric, and one method against the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from deep_components.errors import InputError
from deep_components.reporting.frame import Collected, arguments_of, comparable_rows, per_request
from deep_components.reporting.paper import follows_protocol, paper_number
from deep_components.reporting.remarks import Remarks, remarks_of
from deep_components.reporting.statistics import (
    SIGNIFICANCE,
    Test,
    bootstrap_intervals,
    holm,
    t_test,
    t_test_over_requests,
)

OUR_METHOD = "lcron"
DECIMALS = 4  # of the paper's tables

_TITLES = {"ndcg": "NDCG", "tau": "tau"}
_NUMBERS = [
    *("mean", "std", "paper_mean", "paper_std", "difference_to_paper"),
    *("difference", "interval_low", "interval_high", "p", "p_holm", "p_requests"),
]
_COLUMNS = [
    *("method", "untrained", "metric", "mean", "std", "seeds", "best"),
    *("paper_mean", "paper_std", "paper_table", "difference_to_paper"),
    *("ours", "difference", "interval_low", "interval_high", "p", "p_holm", "p_requests", "ours_is", "no_test"),
]


def metric_title(name: str) -> str:
    """A metric's name as a reader writes it: rank_ndcg@10 is Rank NDCG@10."""
    base, *cuts = name.split("@")
    words = [_TITLES.get(word, word.capitalize()) for word in base.split("_")]
    return "@".join([" ".join(words), *cuts])


@dataclass(frozen=True)
class Results:
    """The table of many runs.

    Args:
        runs: see :func:`~deep_components.reporting.frame.label_rows`; ``row`` names a run's method.
        cells: a record per method and metric: ``method``, ``untrained``, ``metric``, ``mean`` (NaN unless every run has
            a value), ``std`` (sample standard deviation over ``seeds`` runs), ``best``, ``paper_mean``, ``paper_std``,
            ``paper_table``, ``difference_to_paper``; and, where our method was compared with this one: ``ours`` (its
            name), ``difference`` (our mean minus this one's), ``interval_low`` and ``interval_high`` (bootstrap over
            requests), ``p`` and ``p_holm`` (t-test over seeds, the second corrected over all baselines of the metric),
            ``p_requests`` (t-test over requests of the means over seeds, not corrected), ``ours_is`` (better, worse, no
            difference shown, not tested) and ``no_test`` (why there is no p).
        ours: the row that is compared with the others; None when there is none.
        remarks: which code the rows ran, and what else a reader must know of them.
    """

    runs: pd.DataFrame
    cells: pd.DataFrame
    metrics: tuple[str, ...]
    about: dict[str, Any]
    ours: str | None
    test: Test
    warnings: list[str]
    notes: list[str]
    left_out: dict[str, str]
    remarks: Remarks

    @property
    def headline(self) -> str:
        """The metric the method is judged by: the first, joint recall."""
        return self.metrics[0]

    @property
    def rows(self) -> list[str]:
        return list(self.cells["method"].unique())

    @property
    def one_seed(self) -> bool:
        """Every row is a single run, so that nothing is a mean."""
        return len(self.runs) == len(self.rows)

    @property
    def compared(self) -> pd.DataFrame:
        """The records of the methods that ours was compared with."""
        return self.cells[self.cells["ours"].notna()]

    @property
    def with_paper(self) -> pd.DataFrame:
        """The records that have a number of the paper."""
        return self.cells[self.cells["paper_mean"].notna()]

    def of(self, metric: str) -> pd.DataFrame:
        """The metric's records by method."""
        return self.cells[self.cells["metric"] == metric].set_index("method")

    def by_score(self) -> "Results":
        """The same with the rows in order of the headline's mean, the highest first, untrained ones last."""
        first = self.of(self.headline).sort_values(["untrained", "mean"], ascending=[True, False], kind="stable")
        runs = self.runs.sort_values("row", key=first.index.get_indexer, kind="stable", ignore_index=True)
        cells = self.cells.sort_values("method", key=first.index.get_indexer, kind="stable", ignore_index=True)
        return replace(self, runs=runs, cells=cells)


def build_results(
    collected: Collected, compare: str | None = None, test: Test = "welch", any_code: bool = False,
    required: bool = True,
) -> Results:  # fmt: skip
    """The results of the runs; ``compare`` names the row to compare with every other trained one, else ``lcron`` is.

    InputError when there is no row ``compare`` and it is ``required``, a row has a seed twice, or the runs are not
    :func:`~deep_components.reporting.frame.comparable_rows`.
    """
    runs = comparable_rows(collected.runs, any_code)
    first, metrics = runs.iloc[0], collected.runs["metrics"].iloc[0]
    groups = {str(name): group for name, group in runs.groupby("row", sort=False)}
    cells = pd.DataFrame([_cell(name, group, metric) for name, group in groups.items() for metric in metrics])
    cells["best"] = _best(cells)
    trained = {name: group for name, group in groups.items() if not group["untrained"].all()}
    if required and compare is not None and compare not in trained:
        names = ", ".join(trained) or "none is trained"
        raise InputError(f"--compare={compare}: no such row; the trained rows are: {names}")
    ours: str | None = compare or OUR_METHOD
    notes = []
    if len(trained) < 2:
        ours = None
    elif ours in trained:
        made = [record for metric in metrics for record in _compare(trained, ours, metric, test)]
        cells = cells.merge(pd.DataFrame(made), on=["method", "metric"], how="left", sort=False)
        notes = notes_of(made)
    else:
        ours, notes = (
            None,
            [f"No row is called {ours}, so none is compared with the others; choose one with --compare."],
        )
    return Results(
        runs=runs,
        cells=cells.reindex(columns=_COLUMNS).astype(dict.fromkeys(_NUMBERS, "float64")),
        metrics=metrics,
        about={name: first[name] for name in ("setting", "data", "test_day", "test_day_checksum")}
        | {name: int(first[name]) for name in ("num_requests", "test_random_items")},
        ours=ours,
        test=test,
        warnings=sorted({warning for found in runs["warnings"] for warning in found}),
        notes=notes,
        left_out={str(folder): reason for folder, reason in collected.left_out.items()},
        remarks=remarks_of(runs),
    )


def _cell(name: str, group: pd.DataFrame, metric: str) -> dict[str, Any]:
    values, runs = group[metric], group.to_dict("records")
    mean, paper = float(values.mean(skipna=False)), None
    if all(follows_protocol(run, arguments_of(run)) for run in runs):
        paper = paper_number(runs[0]["setting"], runs[0]["method"], arguments_of(runs[0]), metric)
    return {
        "method": name,
        "untrained": bool(group["untrained"].all()),
        "metric": metric,
        "mean": mean,
        "std": float(values.std(skipna=False)),
        "seeds": len(values),
        "paper_mean": paper.mean if paper else None,
        "paper_std": paper.std if paper else None,
        "paper_table": paper.table if paper else None,
        "difference_to_paper": mean - paper.mean if paper else None,
    }


def _best(cells: pd.DataFrame) -> pd.Series:
    """Whether a trained row's mean is the highest of its metric, as printed; with one trained row there is no best."""
    printed = cells["mean"].round(DECIMALS).mask(cells["untrained"])
    several = cells.loc[~cells["untrained"], "method"].nunique() > 1
    return several & (printed == printed.groupby(cells["metric"]).transform("max"))


def _compare(trained: dict[str, pd.DataFrame], ours: str, metric: str, test: Test) -> list[dict[str, Any]]:
    """A record per baseline: ours against it in a metric; Holm's correction runs over the baselines."""
    baselines = {name: group for name, group in trained.items() if name != ours}
    pairs = [_compared(trained[ours], group, test) for group in baselines.values()]
    records = []
    for name, pair, over_requests in zip(baselines, pairs, _over_requests(pairs, metric), strict=True):
        a, b = _samples(*pair, metric)
        p, reason = t_test(a, b, test), "the values do not vary over seeds"
        if min(len(a), len(b)) < 2:
            reason = f"fewer than two {'common ' if test == 'paired' else ''}seeds with a value"
        record: dict[str, Any] = {"method": name, "metric": metric, "ours": ours, "p": p}
        record |= {"no_test": reason if p is None else None, **over_requests}
        records.append(record | {"difference": float(a.mean() - b.mean()) if len(a) and len(b) else None})
    adjusted = iter(holm([record["p"] for record in records if record["p"] is not None]))
    for record in records:
        record["p_holm"] = None if record["p"] is None else next(adjusted)
        record["ours_is"] = _verdict(record["difference"], record["p_holm"])
    return records


def _verdict(difference: float | None, p_holm: float | None) -> str:
    if difference is None or p_holm is None:
        return "not tested"
    if p_holm > SIGNIFICANCE or difference == 0:
        return "no difference shown"
    return "better" if difference > 0 else "worse"


def _compared(ours: pd.DataFrame, theirs: pd.DataFrame, test: Test) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs to compare: all, or for the paired test those of the seeds that both have, in one order."""
    if test == "welch":
        return ours, theirs
    known = [runs[runs["seed"].notna()].sort_values("seed") for runs in (ours, theirs)]
    return known[0][known[0]["seed"].isin(known[1]["seed"])], known[1][known[1]["seed"].isin(known[0]["seed"])]


def _samples(ours: pd.DataFrame, theirs: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The values to compare; none where one has none."""
    if ours[metric].isna().any() or theirs[metric].isna().any():
        return np.empty(0), np.empty(0)
    return ours[metric].to_numpy(), theirs[metric].to_numpy()


def _over_requests(pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]], metric: str) -> list[dict[str, float | None]]:
    """What requests say of the difference of the means over seeds: bootstrap interval and t-test; None where a run
    lacks them."""
    groups = {tuple(group["folder"]): group for pair in pairs for group in pair}
    means = {folders: _mean_per_request(group, metric) for folders, group in groups.items()}
    differences = list[np.ndarray | None]()
    for pair in pairs:
        own, other = (means[tuple(group["folder"])] for group in pair)
        if own is None or other is None or not own.index.equals(other.index):
            differences.append(None)
        else:
            differences.append((own - other).to_numpy())
    known = [difference for difference in differences if difference is not None]
    made = iter(bootstrap_intervals(np.stack(known)) if known else [])
    found = list[dict[str, float | None]]()
    for difference in differences:
        low, high = (None if difference is None else next(made)) or (None, None)
        p = None if difference is None else t_test_over_requests(difference)
        found.append({"interval_low": low, "interval_high": high, "p_requests": p})
    return found


def _mean_per_request(group: pd.DataFrame, metric: str) -> pd.Series | None:
    """The metric's mean over the runs by request_id; None unless there are runs, all with the same requests."""
    seeds: list[pd.Series] = []
    for folder in group["folder"]:
        ids, values = per_request(folder, "request_id"), per_request(folder, metric)
        if ids is None or values is None or (seeds and not np.array_equal(ids, seeds[0].index)):
            return None
        seeds.append(pd.Series(values, ids))
    return sum(seeds[1:], seeds[0]) / len(seeds) if seeds else None


def notes_of(records: Sequence[Mapping[Any, Any]], name: Callable[[str], str] = str) -> list[str]:
    """What is missing of the comparisons, and why; ``name`` says how a row is called."""
    untested: dict[str, dict[str, None]] = {}
    for record in records:
        if record["no_test"]:
            untested.setdefault(record["no_test"], {})[name(record["method"])] = None
    notes = [f"No t-test of some metrics against {', '.join(names)}: {reason}." for reason, names in untested.items()]
    lacking = {name(r["method"]) for r in records if r["interval_low"] is None and r["difference"] is not None}
    if lacking:
        notes.append(
            f"No interval over requests against {', '.join(sorted(lacking))}: per_request.npz is missing or has other "
            "requests there; evaluate those runs again."
        )
    return notes
