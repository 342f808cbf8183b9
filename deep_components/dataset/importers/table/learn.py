"""Third pass: vocabularies and scales, of the training days alone."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from deep_components.dataset.encoding import Encoding, FieldEncoding
from deep_components.dataset.importers.table.clean import COUNTED, Cleaned
from deep_components.dataset.importers.table.plan import Plan
from deep_components.dataset.importers.table.scratch import load

_KEYS_AT_ONCE = 1 << 22


def learn(plan: Plan, sample: "Sample", days: list[str]) -> Encoding:
    """The encoding that the training days give."""
    minimum = {table: rule.min_count for rule in plan.mapping.fields if rule.kind == "id" for table in rule.tables}
    vocabularies = {table: vocabulary(plan, table, days, count) for table, count in minimum.items()}
    # A history that is derived is scaled as the items it is made of.
    learnt = {entry.name: _scaled(plan, entry, sample) for entry in plan.entries if entry.side == "item"}
    entries = [
        replace(learnt[entry.name], side="history") if entry in plan.derived
        else learnt[entry.name] if entry.side == "item"
        else _scaled(plan, entry, sample)
        for entry in plan.entries
    ]  # fmt: skip
    rows = plan.mapping.rows
    return Encoding(entries, vocabularies, rows.time_zone, plan.length, rows.item, rows.user or "", rows.time or "")


# ---- vocabularies ----------------------------------------------------------------------------------------------------


def vocabulary(plan: Plan, table: str, days: list[str], minimum: int) -> np.ndarray:
    """The rising keys that the days have ``minimum`` times at least."""
    counts = counted_keys(plan, table, days)
    return counts["key"][counts["count"] >= minimum].copy()


def counted_keys(plan: Plan, table: str, days: Iterable[str]) -> np.ndarray:
    """Distinct keys of a table on the days and how often each is there, rising (COUNTED).

    What waits to be merged is as large as what was merged before, so that memory is some 100 bytes a distinct id.
    """
    known = np.zeros(0, COUNTED)
    waiting: list[np.ndarray] = []
    for day in days:
        for bucket in range(plan.buckets):
            waiting.append(load(plan, bucket, f"{day}.{table}.keys", COUNTED))
            if sum(map(len, waiting)) > max(_KEYS_AT_ONCE, len(known)):
                known, waiting = _merged([known, *waiting]), []
    return _merged([known, *waiting])


def _merged(parts: list[np.ndarray]) -> np.ndarray:
    counts = np.concatenate(parts)
    counts = counts[np.argsort(counts["key"], kind="stable")]
    starts = np.flatnonzero(np.append(True, counts["key"][1:] != counts["key"][:-1])[: len(counts)])
    made = counts[starts]
    if len(made):
        made["count"] = np.add.reduceat(counts["count"], starts)
    return made


# ---- scales ----------------------------------------------------------------------------------------------------------


class Samples:
    """The sampled records of all buckets, by day."""

    def __init__(self) -> None:
        self.items = dict[str, list[np.ndarray]]()
        self.requests = dict[str, list[np.ndarray]]()

    def add(self, cleaned: Cleaned) -> None:
        for ours, theirs in ((self.items, cleaned.items), (self.requests, cleaned.requests)):
            for day, records in theirs.items():
                ours.setdefault(day, []).append(records)

    def of_days(self, days: list[str]) -> "Sample":
        return Sample(*(_joined([part for day in days for part in by[day]]) for by in (self.items, self.requests)))


@dataclass(frozen=True)
class Sample:
    """Sampled rows and requests, by rising hash."""

    items: np.ndarray
    requests: np.ndarray


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    records = np.concatenate(parts)
    return records[np.argsort(records["hash"], kind="stable")]


def sampled_values(plan: Plan, entry: FieldEncoding, sample: Sample) -> np.ndarray:
    """The sampled raw values of a field, in an order that depends on the data alone."""
    if entry.side == "item":
        return sample.items[plan.stored(entry)].ravel()
    requests = sample.requests
    values = requests[f"{entry.side}.{entry.name}"]
    if entry.side == "request":
        return values.ravel()
    there = np.arange(plan.length, 0, -1) <= requests["events"][:, None]
    return values[there].ravel()


def _scaled(plan: Plan, entry: FieldEncoding, sample: Sample) -> FieldEncoding:
    """The entry with what its numbers' scale says."""
    rule = next(r for r in plan.mapping.side(entry.side) if r.name == entry.name)
    if entry.kind != "number":
        return entry
    values = sampled_values(plan, entry, sample)
    known = values[~np.isnan(values)]
    if rule.scale == "quantile":
        return replace(entry, edges=_edges(known, rule.buckets), table=rule.name)
    missing = len(known) < len(values)
    if not len(known):
        return replace(entry, has_missing=missing)
    from sklearn.preprocessing import StandardScaler  # not above: importing it changes the environment

    fitted = StandardScaler().fit(known[:, None])
    return replace(entry, mean=float(fitted.mean_[0]), scale=float(fitted.scale_[0]), has_missing=missing)


def _edges(values: np.ndarray, buckets: int) -> tuple[float, ...]:
    """The values that divide the buckets: fewer where many values are equal."""
    if not len(values) or values.min() == values.max():
        return ()
    distinct = np.unique(values)
    if len(distinct) <= buckets:
        return tuple(float(value) for value in distinct[1:])
    from sklearn.preprocessing import KBinsDiscretizer  # not above: importing it changes the environment

    fitted = KBinsDiscretizer(
        buckets, encode="ordinal", strategy="quantile", quantile_method="averaged_inverted_cdf", subsample=None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of buckets that are too small, and left out
        fitted.fit(values[:, None])
    return tuple(float(edge) for edge in fitted.bin_edges_[0][1:-1])
