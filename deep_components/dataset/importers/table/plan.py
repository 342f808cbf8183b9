"""What every pass of an import knows: the fields and how raw values are stored between the passes.

Between the passes rows lie in scratch files of fixed-size records, one file for each day and bucket (the leading bits
of the request's key), so that a bucket can be sorted in memory whatever the size of the table. A request's own values
are stored once for each run of neighbouring rows that share them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from deep_components.dataset.encoding import FieldEncoding
from deep_components.dataset.importers.table.mapping import FieldRule, LogMapping
from deep_components.dataset.importers.table.source import Source

BYTES_PER_BUCKET = 1 << 26
MAX_BUCKETS = 1 << 13
_BYTES_PER_BATCH = 1 << 23
_ROWS_PER_BATCH = range(1 << 8, (1 << 16) + 1)


@dataclass(frozen=True, order=True)
class Problem:
    """What the import refuses in rows; those with one column, kind and remedy are one problem."""

    column: str  # "" for a file as a whole
    remedy: str
    kind: str
    file: str
    what: str  # {request} stands for the id of ``request``
    request: int | None = None  # the key of a request that has it

    def sentence(self, rows: int = 1, request: str = "") -> str:
        column = f"column {self.column} " if self.column else ""
        what = self.what if self.request is None else self.what.replace("{request}", request)
        return f"{self.file}: {column}{what}{f' ({rows:,} rows)' if rows > 1 else ''}; {self.remedy}"


@dataclass(frozen=True)
class Plan:
    """An import. ``entries`` say how raw values are read; what is learnt of them comes later."""

    mapping: LogMapping
    entries: tuple[FieldEncoding, ...]
    request_type: str  # of ids: "string" or "integer"
    item_type: str
    user_type: str
    scratch: Path
    buckets: int  # a power of two
    strict: bool = True  # stop at the first problem; else note it and leave its rows, or all of the column, out

    def side(self, side: str) -> tuple[FieldEncoding, ...]:
        return tuple(entry for entry in self.entries if entry.side == side)

    @property
    def derived(self) -> tuple[FieldEncoding, ...]:
        """The item fields that make the histories, under side "history"; empty where the table has histories."""
        return self.side("history") if self.mapping.history.derive else ()

    @property
    def listed(self) -> tuple[FieldEncoding, ...]:
        """The fields whose histories the table has."""
        return () if self.mapping.history.derive else self.side("history")

    @property
    def length(self) -> int:
        return self.mapping.history.length

    @cached_property
    def item_record(self) -> np.dtype:
        """A row of the table, without what its request has."""
        base = [("request", np.uint64), ("item", np.uint64), ("group", np.uint8), ("order", np.float64)]
        stored = {self.stored(entry): _stored_type(entry, ()) for entry in self.side("item")}
        return np.dtype(base + [(name, *kind) for name, kind in stored.items() if name != "item"])

    @cached_property
    def request_record(self) -> np.dtype:
        """A request, as one of its rows has it."""
        base = [("request", np.uint64), ("raw", np.int64), ("time", np.int64), ("user", np.uint64)]
        fields = [(f"request.{entry.name}", *_stored_type(entry, ())) for entry in self.side("request")]
        lists = [(f"history.{entry.name}", *_stored_type(entry, (self.length,))) for entry in self.listed]
        return np.dtype(base + fields + [("events", np.int32), *lists])

    @cached_property
    def history_record(self) -> np.dtype:
        """The derived history of a request."""
        lists = [(f"history.{entry.name}", *_stored_type(entry, (self.length,))) for entry in self.derived]
        return np.dtype([("request", np.uint64), ("events", np.int32), *lists])

    def stored(self, entry: FieldEncoding) -> str:
        """Where an item record has the field; that of the item's own id is there already."""
        same = entry.kind == "id" and entry.column == self.mapping.rows.item and entry.type == self.item_type
        return "item" if same and not entry.length else f"item.{entry.name}"

    def bucket_of(self, keys: np.ndarray) -> np.ndarray:
        """The bucket of 64-bit keys; a higher key is never in a lower bucket."""
        bits = self.buckets.bit_length() - 1
        return (keys >> np.uint64(64 - bits) if bits else np.zeros_like(keys)).astype(np.int64)

    @property
    def rows_per_batch(self) -> int:
        width = self.item_record.itemsize + self.request_record.itemsize
        return int(np.clip(_BYTES_PER_BATCH // width, _ROWS_PER_BATCH[0], _ROWS_PER_BATCH[-1]))


def _stored_type(entry: FieldEncoding, shape: tuple[int, ...]) -> tuple[np.dtype, tuple[int, ...]]:
    return entry.dtype, (*shape, entry.length) if entry.length else shape


def make_plan(mapping: LogMapping, source: Source, scratch: Path, strict: bool) -> Plan:
    """The plan for a table of such columns and so many rows."""
    rows = mapping.rows
    types = {rule.column: rule.type for rule in mapping.fields if rule.type}

    def type_of(column: str | None) -> str:
        if column is None:
            return "string"
        numbers = source.kind(column).removeprefix("lists of ") == "numbers"
        return types.get(column) or ("integer" if numbers else "string")

    listed = [rule for side in ("request", "history", "item") for rule in mapping.side(side)]
    entries = tuple(_entry(mapping, rule, type_of(rule.column)) for rule in listed)
    ids = (type_of(rows.request), type_of(rows.item), type_of(rows.user))
    plan = Plan(mapping, entries, *ids, scratch, 1, strict)
    size = source.rows * plan.item_record.itemsize
    buckets = 1
    while buckets < MAX_BUCKETS and buckets * BYTES_PER_BUCKET < size:
        buckets *= 2
    return Plan(mapping, entries, *ids, scratch, buckets, strict)


def _entry(mapping: LogMapping, rule: FieldRule, kind: str) -> FieldEncoding:
    own_time = rule.column is None
    return FieldEncoding(
        rule.name,
        rule.side,
        rule.kind,
        column=rule.column or mapping.rows.time,
        type=kind if rule.kind == "id" else "",
        table=(rule.table or rule.name) if rule.tables and rule.kind != "time" else "",
        length=rule.length,
        separator=rule.separator,
        time_unit=mapping.rows.time_unit if own_time else rule.time_unit,
        parts=rule.parts if rule.kind == "time" else (),
    )


def needed_columns(mapping: LogMapping) -> dict[str, str]:
    """The columns that an import reads, and what the mapping calls each."""
    rows, groups = mapping.rows, mapping.groups
    named: dict[str, str] = {}
    for column, what in (
        (rows.request, "request of [rows]"),
        (rows.item, "item of [rows]"),
        (rows.time, "time of [rows]"),
        (rows.user, "user of [rows]"),
        *((name, "of [groups]") for name in groups.columns),
        *((rule.column, f"of field {rule.name}") for rule in mapping.fields),
    ):
        if column is not None:
            named.setdefault(column, what)
    return named
