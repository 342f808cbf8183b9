"""Third pass: vocabularies and scales, of the training days alone."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from sklearn.preprocessing import KBinsDiscretizer, StandardScaler

from deep_components.dataset.encoding import Encoding, FieldEncoding
from deep_components.dataset.importers.table.clean import COUNTED, Cleaned
from deep_components.dataset.importers.table.plan import Plan

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
    return Encoding(entries, vocabularies, plan.mapping.rows.time_zone, plan.length)


# ---- vocabularies ----------------------------------------------------------------------------------------------------


def vocabulary(plan: Plan, table: str, days: list[str], minimum: int) -> np.ndarray:
    """The rising keys that the days have ``minimum`` times at least."""
    kept = [counts["key"][counts["count"] >= minimum] for counts in counted_keys(plan, table, days)]
    return np.concatenate([np.zeros(0, np.uint64), *kept])


def counted_keys(plan: Plan, table: str, days: Iterable[str]) -> Iterable[np.ndarray]:
    """Distinct keys of a table on the days and how often each is there, rising, some at a time (COUNTED)."""
    wanted = set(days)
    paths = [path for path in plan.scratch.glob(f"*/*.{table}.keys.*") if path.name.partition(".")[0] in wanted]
    counts = [np.memmap(path, COUNTED, "r") for path in paths if path.stat().st_size]
    total = sum(map(len, counts))
    ranges = -(-total // _KEYS_AT_ONCE)
    bounds = [(2**64 * number // ranges) for number in range(1, ranges)]
    first = [0] * len(counts)
    for bound in [*bounds, None]:
        ends = [len(c) if bound is None else int(np.searchsorted(c["key"], np.uint64(bound))) for c in counts]
        part = np.concatenate([np.zeros(0, COUNTED), *(c[f:e] for c, f, e in zip(counts, first, ends, strict=True))])
        part = part[np.argsort(part["key"], kind="stable")]
        starts = np.flatnonzero(np.append(True, part["key"][1:] != part["key"][:-1])[: len(part)])
        made = part[starts]
        made["count"] = np.add.reduceat(part["count"], starts) if len(starts) else 0
        yield made
        first = ends


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
    fitted = StandardScaler().fit(known[:, None])
    return replace(entry, mean=float(fitted.mean_[0]), scale=float(fitted.scale_[0]), has_missing=missing)


def _edges(values: np.ndarray, buckets: int) -> tuple[float, ...]:
    """The values that divide the buckets: fewer where many values are equal."""
    if not len(values) or values.min() == values.max():
        return ()
    distinct = np.unique(values)
    if len(distinct) <= buckets:
        return tuple(float(value) for value in distinct[1:])
    fitted = KBinsDiscretizer(
        buckets, encode="ordinal", strategy="quantile", quantile_method="averaged_inverted_cdf", subsample=None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of buckets that are too small, and left out
        fitted.fit(values[:, None])
    return tuple(float(edge) for edge in fitted.bin_edges_[0][1:-1])
