"""Second pass, a bucket at a time: requests from their rows, checked, with labels, and what is learnt from them.

A bucket holds all rows of its requests, of all days, so a request that is there twice is seen.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deep_components.dataset.encoding import MISSING, NO_VALUE
from deep_components.dataset.importers.table.plan import Plan, Problem
from deep_components.dataset.importers.table.scratch import append, load, remove

ASKING = np.dtype([("user", np.uint64), ("time", np.int64), ("request", np.uint64), ("day", "<M8[D]")])
SAMPLED = 1 << 17  # rows, about, of which the numbers' scales are learnt
NO_TRUTH, ONE_ITEM, TWICE = (
    "requests without ground truth, left out",
    "requests with fewer than two items, left out",
    "rows of an item that its request has already, left out",
)
COUNTED = np.dtype([("key", np.uint64), ("count", np.int64)])


@dataclass
class DayCounts:
    """What a bucket has of a day."""

    requests: int = 0
    rows: int = 0
    repairs: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # items of a request -> requests
    groups: Counter[int] = field(default_factory=Counter)  # group -> items


@dataclass
class Cleaned:
    """A bucket's days, problems, and samples of its records, by day."""

    days: dict[str, DayCounts] = field(default_factory=dict)
    problems: Counter[Problem] = field(default_factory=Counter)
    items: dict[str, np.ndarray] = field(default_factory=dict)
    requests: dict[str, np.ndarray] = field(default_factory=dict)


def clean_request_record(plan: Plan) -> np.dtype:
    """A request and the number of its items."""
    kept = [(name, *_shape(plan.request_record[name])) for name in plan.request_record.names or ()]
    return np.dtype([*kept, ("items", np.int64)])


def positive_record(plan: Plan) -> np.dtype:
    """A ground-truth item of a user, as derived histories take it."""
    base = [(name, plan.item_record[name]) for name in ("request", "item", "order")]
    fields = {plan.stored(entry): plan.item_record[plan.stored(entry)] for entry in plan.derived}
    kept = [(name, *_shape(kind)) for name, kind in fields.items() if name != "item"]
    return np.dtype([("user", np.uint64), ("time", np.int64), *base, *kept])


def _shape(kind: np.dtype) -> tuple[np.dtype, tuple[int, ...]]:
    return kind.base, kind.shape


def clean(plan: Plan, bucket: int, days: list[str], rows: int, unread: Collection[str] = ()) -> Cleaned:
    """Clean one bucket of a table of so many ``rows``; fields of the records in ``unread`` may have any values."""
    result = Cleaned()
    seen = np.zeros(0, np.uint64)
    for day in days:
        requests = load(plan, bucket, f"{day}.requests", plan.request_record)
        items = load(plan, bucket, f"{day}.items", plan.item_record)
        for name in ("requests", "items"):
            remove(plan, bucket, f"{day}.{name}")
        if len(requests):
            _Day(plan, bucket, day, rows, unread, result).clean(requests, items, seen)
            seen = np.union1d(seen, requests["request"])
    return result


class _Day:
    """A day's part of a bucket."""

    def __init__(self, plan: Plan, bucket: int, day: str, rows: int, unread: Collection[str], result: Cleaned) -> None:
        self.plan, self.bucket, self.day, self.rows, self.result = plan, bucket, day, rows, result
        self.unread = unread
        self.counts = result.days.setdefault(day, DayCounts())

    def clean(self, requests: np.ndarray, items: np.ndarray, seen: np.ndarray) -> None:
        """Write the day's sound requests and items, by rising key of the request."""
        requests = self._one_a_request(requests, seen)
        items = self._one_an_item(items)
        first = np.searchsorted(items["request"], requests["request"])
        lengths = np.diff(first, append=len(items))
        owner = np.repeat(np.arange(len(requests)), lengths)
        truth = items["group"] == 0
        if self.plan.derived:
            self._note_positives(requests[owner[truth]], items[truth])
        has_truth = np.bincount(owner[truth], minlength=len(requests)) > 0
        kept = has_truth & (lengths > 1)
        self.counts.repairs[NO_TRUTH] += int((~has_truth).sum())
        self.counts.repairs[ONE_ITEM] += int((has_truth & ~kept).sum())
        items, requests, lengths = items[kept[owner]], requests[kept], lengths[kept]
        if len(requests):
            self._write(requests, items, lengths)

    def _write(self, requests: np.ndarray, items: np.ndarray, lengths: np.ndarray) -> None:
        plan, counts = self.plan, self.counts
        counts.requests, counts.rows = len(requests), len(items)
        counts.lengths.update(dict(zip(*map(np.ndarray.tolist, np.unique(lengths, return_counts=True)), strict=True)))
        counts.groups.update(dict(enumerate(np.bincount(items["group"]).tolist())))
        whole = _extended(requests, clean_request_record(plan), {"items": lengths})
        items["order"] = labels_of(items, len(plan.mapping.groups.order))  # rather than a copy with another field
        if plan.derived:
            asking = _extended(requests, ASKING, {"day": np.datetime64(self.day)})
            for bucket, some in _by_bucket(plan, asking):
                append(plan, bucket, "asking", some)
        for table, keys in keys_of_tables(plan, whole, items).items():
            append(plan, self.bucket, f"{self.day}.{table}.keys", counted(keys))
        hashes = _mixed(items["request"], items["item"])
        self.result.items[self.day] = _sample(items, item_sample(plan), hashes, SAMPLED, self.rows)
        hashes = _mixed(requests["request"], requests["request"])
        self.result.requests[self.day] = _sample(whole, request_sample(plan), hashes, 16 * SAMPLED, self.rows)
        append(plan, self.bucket, f"{self.day}.clean_requests", whole)
        append(plan, self.bucket, f"{self.day}.clean_items", items)

    def _one_a_request(self, requests: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """The requests by rising key, each once; notes those whose rows disagree."""
        requests = requests[np.argsort(requests["request"], kind="stable")]
        keys = requests["request"]
        new = np.append(True, keys[1:] != keys[:-1])
        first = np.flatnonzero(new)[np.cumsum(new) - 1]
        for column, bad in self._differing(requests, first).items():
            remedy = "give all rows of a request one value, or each request an id of its own"
            what = "differs between rows of the request {request}"
            self._problem(column, what, remedy, requests[bad], int(bad.sum()))
        again = np.isin(keys[new], seen)
        if again.any() and "time" not in self.unread:
            what = "differs between rows of the request {request}, which is on an earlier day too"
            remedy = "give each request an id of its own"
            self._problem(self.plan.mapping.rows.time, what, remedy, requests[new][again], int(again.sum()))
        return requests[new]

    def _differing(self, requests: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
        """Column -> where its value is not that of the row ``first`` says, for columns with such rows."""
        lists = {f"history.{entry.name}" for entry in self.plan.listed}
        ignored = {*self.unread, *({"events"} if lists & set(self.unread) else ())}
        found: dict[str, np.ndarray] = {}
        for name in requests.dtype.names or ():
            if name in ignored:
                continue
            values = requests[name]
            differs = values != values[first]
            if values.dtype.kind == "f":
                differs &= ~(np.isnan(values) & np.isnan(values[first]))
            if (bad := differs.reshape(len(values), -1).any(axis=1)).any():
                column = self._column(name)
                found[column] = found.get(column, False) | bad
        return found

    def _one_an_item(self, items: np.ndarray) -> np.ndarray:
        """The items by request, each once with its best group; notes items with two different true orders."""
        rough = _rough_order(items["request"], items["item"])
        order = np.argsort(rough)
        items, rough = items[order], rough[order]
        same = rough[1:] == rough[:-1]
        if not same.any():
            return items
        repeated = np.append(same, False) | np.append(False, same)
        some = items[repeated]  # which of equal rows is kept must not depend on the files' order
        _, rank = np.unique(some.view(f"V{some.dtype.itemsize}"), return_inverse=True)
        items[repeated] = some[np.lexsort((rank, some["group"], some["item"], some["request"]))]
        same = (items["request"][1:] == items["request"][:-1]) & (items["item"][1:] == items["item"][:-1])
        both = same & (items["group"][1:] == 0) & (items["order"][1:] != items["order"][:-1])
        if both.any() and not {"item", "order"} & set(self.unread):
            what = "has two values for one ground-truth item of the request {request}"
            column, remedy = str(self.plan.mapping.groups.order_column), "leave one of the rows out"
            self._problem(column, what, remedy, items[1:][both], int(both.sum()))
        self.counts.repairs[TWICE] += int(same.sum())
        return items[np.append(True, ~same)]

    def _note_positives(self, requests: np.ndarray, items: np.ndarray) -> None:
        """Keep the ground-truth items for their users' later histories."""
        known = requests["user"] != MISSING
        extra = {name: requests[name][known] for name in ("user", "time")}
        positives = _extended(items[known], positive_record(self.plan), extra)
        for bucket, some in _by_bucket(self.plan, positives):
            append(self.plan, bucket, "positives", some)

    def _column(self, name: str) -> str:
        """The table's column that a record's field is read from."""
        rows = self.plan.mapping.rows
        if name in ("raw", "request", "time", "user", "events"):
            first = self.plan.listed[0].column if self.plan.listed else None
            columns = {"raw": rows.request, "request": rows.request, "time": rows.time, "user": rows.user}
            return str((columns | {"events": first})[name])
        return next(entry.column for entry in self.plan.entries if f"{entry.side}.{entry.name}" == name)

    def _problem(self, column: str, what: str, remedy: str, records: np.ndarray, rows: int) -> None:
        """Notes a problem of so many rows; the request with the least key stands for all."""
        request, file = int(records["request"].min()), str(self.plan.mapping.source)
        self.result.problems[Problem(column, remedy, "", file, what, request)] += rows


def _rough_order(request: np.ndarray, item: np.ndarray) -> np.ndarray:
    """One uint64 a row that rises with (request, item) but for the item's last bits; rows of a request are neighbours
    as a rule, so that few are sorted to rank them."""
    new = np.append(True, request[1:] != request[:-1])[: len(request)]
    distinct, rank = np.unique(request[new], return_inverse=True)
    bits = np.uint64(max(1, len(distinct).bit_length()))
    return (rank.astype(np.uint64)[np.cumsum(new) - 1] << (np.uint64(64) - bits)) | (item >> bits)


def _extended(records: np.ndarray, kind: np.dtype, extra: dict[str, Any]) -> np.ndarray:
    """The records as another kind, whose fields they have or ``extra`` gives."""
    made = np.empty(len(records), kind)
    for name in kind.names or ():
        made[name] = extra[name] if name in extra else records[name]
    return made


def _by_bucket(plan: Plan, records: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The records by the bucket of their user."""
    buckets = plan.bucket_of(records["user"])
    return [(number, records[buckets == number]) for number in np.unique(buckets).tolist()]


def labels_of(items: np.ndarray, groups: int) -> np.ndarray:
    """Labels of items sorted by request: G - 1 - group; of the ground truth G - 1 + the dense rank of its order within
    the request, from the worst, 0. int32."""
    labels = (groups - 1 - items["group"].astype(np.int32)).astype(np.int32)
    truth = np.flatnonzero(items["group"] == 0)
    truth = truth[np.lexsort((items["order"][truth], items["request"][truth]))]
    request, order = items["request"][truth], items["order"][truth]
    other = np.append(True, request[1:] != request[:-1])[: len(truth)]
    step = np.cumsum(~other & np.append(True, order[1:] != order[:-1])[: len(truth)])
    labels[truth] += (step - step[np.flatnonzero(other)][np.cumsum(other) - 1]).astype(np.int32)
    return labels


# ---- what is learnt --------------------------------------------------------------------------------------------------


def keys_of_tables(plan: Plan, requests: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    """Table -> the keys of all ids that requests and items have. Histories that are derived are not counted: their
    items were counted where they were candidates."""
    listed: dict[str, list[np.ndarray]] = {}
    stored = [(entry, requests[f"{entry.side}.{entry.name}"]) for entry in (*plan.side("request"), *plan.listed)]
    stored += [(entry, items[plan.stored(entry)]) for entry in plan.side("item")]
    for entry, keys in stored:
        if entry.kind == "id":
            listed.setdefault(entry.table, []).append(keys.ravel())
    return {table: np.concatenate(keys) for table, keys in listed.items()}


def counted(keys: np.ndarray) -> np.ndarray:
    """Distinct keys, rising, and how often each is there; without what stands for no value."""
    distinct, counts = np.unique(keys, return_counts=True)
    made = np.empty(len(distinct), COUNTED)
    made["key"], made["count"] = distinct, counts
    return made[distinct < min(NO_VALUE, MISSING)]


def _mixed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A hash of two keys."""
    mixed = one ^ (other * np.uint64(0x9E3779B97F4A7C15))
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


def item_sample(plan: Plan) -> np.dtype:
    """What is kept of a sampled row: its numbers; all of it for a report."""
    numbers = [plan.stored(entry) for entry in plan.side("item") if entry.kind == "number"]
    return _sampled(plan.item_record, numbers if plan.strict else plan.item_record.names or ())


def request_sample(plan: Plan) -> np.dtype:
    """What is kept of a sampled request."""
    entries = [*plan.side("request"), *plan.listed]
    names = [f"{e.side}.{e.name}" for e in entries if e.kind == "number" or not plan.strict]
    return _sampled(plan.request_record, ["events", *names])


def _sampled(record: np.dtype, names: Iterable[str]) -> np.dtype:
    return np.dtype([("hash", np.uint64), *((name, *_shape(record[name])) for name in names)])


def _sample(records: np.ndarray, kind: np.dtype, hashes: np.ndarray, wanted: int, rows: int) -> np.ndarray:
    """Some ``wanted`` of a table's ``rows`` records: those with small hashes, so that the sample depends on the data
    alone, whatever the order or the buckets it comes in."""
    if wanted < rows:
        kept = hashes < np.uint64(2**64 * wanted // rows)
        records, hashes = records[kept], hashes[kept]
    return _extended(records, kind, {"hash": hashes})
