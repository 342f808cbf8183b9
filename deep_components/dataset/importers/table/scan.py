"""First pass: every row of the table, checked on its own, into the scratch files of its day and bucket."""

import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deep_components.dataset.clock import MIN_REQUEST_SECONDS, local_seconds, time_zone
from deep_components.dataset.encoding import (
    MISSING,
    NO_TIME,
    first_line,
    flattened,
    integers_of,
    is_text,
    keys_of,
    numbers_of,
    raw_history,
    raw_values,
    times_of,
)
from deep_components.dataset.importers.table.mapping import LogMapping, nearest
from deep_components.dataset.importers.table.plan import Plan
from deep_components.dataset.importers.table.source import Piece, batches
from deep_components.errors import InputError

_DATE = re.compile(r"(?:^|[=/_.-])(\d{4}-\d{2}-\d{2})(?=$|[/_.])")
_FLUSH_BYTES = 1 << 25
_SECONDS_PER_DAY = 86_400

T = TypeVar("T")


@dataclass
class Scanned:
    """What a pass over a piece found; rows are in the scratch files."""

    rows: int = 0
    problems: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what, remedy) -> rows
    days: Counter[str] = field(default_factory=Counter)  # day -> rows
    other_days: Counter[str] = field(default_factory=Counter)  # file named by a date -> rows of other days


class _UnusableError(Exception):
    """The batch cannot be used; its problem is noted."""


def csv_types(mapping: LogMapping) -> dict[str, pa.DataType]:
    """The types that the needed columns of a CSV file are read as."""
    rows, groups = mapping.rows, mapping.groups
    whole = {"string": pa.string(), "integer": pa.int64()}
    types: dict[str, pa.DataType] = {}
    for rule in mapping.fields:
        if rule.column is None:
            continue
        listed = rule.length or rule.side == "history"
        kind = {"id": whole[rule.type or "string"], "number": pa.float64(), "time": _time_type(rule.time_unit)}
        # A column that is an id in one field is text for all of them.
        read = pa.string() if listed else kind[rule.kind]
        types[rule.column] = read if types.get(rule.column, read) == read else pa.string()
    types |= {name: types.get(name, pa.string()) for name in (rows.request, rows.item, rows.user) if name}
    types[rows.time] = _time_type(rows.time_unit)
    if groups.column:
        types[groups.column] = pa.string()
    types |= {name: pa.bool_() for name in groups.flags}
    types |= {groups.position: pa.int64()} if groups.position else {}
    return types | ({groups.order_column: pa.float64()} if groups.order_column else {})


def _time_type(unit: str | None) -> pa.DataType:
    return {None: pa.string(), "s": pa.float64()}.get(unit, pa.int64())


def scan(plan: Plan, piece: Piece, columns: dict[str, pa.DataType | None]) -> Scanned:
    """Read a piece of the table. InputError for the first problem when the plan is strict; a file that cannot be read
    to its end is a problem too."""
    scanner = _Scanner(plan, piece)
    try:
        for batch in batches(plan.mapping, piece, columns, plan.rows_per_batch):
            scanner.result.rows += len(next(iter(batch.values())))
            try:
                scanner.take(batch)
            except _UnusableError:
                continue
    except InputError as error:
        if plan.strict:
            raise
        what, _, remedy = str(error).partition("; ")
        scanner.result.problems[what, remedy] += 1
    scanner.flush()
    return scanner.result


class _Scanner:
    def __init__(self, plan: Plan, piece: Piece) -> None:
        self.plan, self.piece, self.mapping = plan, piece, plan.mapping
        self.result = Scanned()
        self._zone = time_zone(self.mapping.rows.time_zone)
        dates = _DATE.findall(str(piece.file.path.relative_to(self.mapping.source.parent)))
        self._date = dates[-1] if dates else None
        self._kept: list[tuple[np.ndarray, ...]] = []  # (part, requests, items, items a request)
        self._kept_bytes = 0

    # ---- problems ----

    def problem(self, column: str, what: str, remedy: str, rows: int = 1) -> None:
        text = f"{self.piece.file.path}: column {column} {what}"
        if self.plan.strict:
            raise InputError(f"{text}; {remedy}")
        self.result.problems[text, remedy] += rows

    @contextmanager
    def reading(self, column: str, remedy: str) -> Iterator[None]:
        """Notes what a column's values cannot be."""
        try:
            yield
        except (ValueError, pa.ArrowException) as error:
            if isinstance(error, InputError):
                raise
            self.problem(column, first_line(error), remedy)
            raise _UnusableError from error

    def complete(self, column: str, missing: np.ndarray, what: str) -> np.ndarray:
        """Notes missing values; where there are none."""
        if missing.any():
            count = int(missing.sum())
            self.problem(column, f"has missing values; it is the {what}", "fill them in or leave the rows out", count)
        return ~missing

    # ---- a batch ----

    def take(self, batch: dict[str, pa.Array]) -> None:
        """Convert a batch's rows to records."""
        plan, rows = self.plan, self.mapping.rows
        starts = self._run_starts(batch)
        lengths = np.diff(starts, append=len(batch[rows.request]))
        requests, sound = self._requests({name: column.take(starts) for name, column in batch.items()})
        items, sound_items = self._items(batch)
        run = np.repeat(np.arange(len(starts)), lengths)
        items["request"] = requests["request"][run]
        sound_items &= sound[run]
        if not sound_items.all():
            items, run = items[sound_items], run[sound_items]
            kept, run = np.unique(run, return_inverse=True)
            requests = requests[kept]
        if not len(requests):
            return
        day = local_seconds(requests["time"] // 1_000_000, self._zone) // _SECONDS_PER_DAY
        counts = np.bincount(run, minlength=len(requests))
        self._note_days(day, counts)
        part = day * plan.buckets + plan.bucket_of(requests["request"])
        self._kept.append((part, requests, items, counts))
        self._kept_bytes += requests.nbytes + items.nbytes
        if self._kept_bytes > _FLUSH_BYTES:
            self.flush()

    def _run_starts(self, batch: dict[str, pa.Array]) -> np.ndarray:
        """The first rows of neighbours that agree in all that a request has."""
        rows = self.mapping.rows
        names = {rows.request, rows.time, *([rows.user] if rows.user else [])}
        names |= {entry.column for entry in self.plan.side("request")} | {entry.column for entry in self.plan.listed}
        change = np.zeros(len(batch[rows.request]), bool)
        change[:1] = True
        for name in sorted(names):
            _note_changes(batch[name], change)
        return np.flatnonzero(change)

    def _requests(self, columns: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        """The records of requests, and which are sound."""
        plan, rows, zone = self.plan, self.mapping.rows, self.mapping.rows.time_zone
        made = np.zeros(len(columns[rows.request]), plan.request_record)
        with self.reading(rows.request, "request of [rows] is a column of texts or whole numbers"):
            made["request"] = keys_of(columns[rows.request], plan.request_type)
            texts = plan.request_type == "string"
            made["raw"] = made["request"].view(np.int64) if texts else integers_of(columns[rows.request])[0]
        sound = self.complete(rows.request, made["request"] == MISSING, "request id")
        with self.reading(rows.time, "check time, time_unit and time_zone of [rows]"):
            made["time"] = times_of(columns[rows.time], rows.time_unit, zone)
        sound &= self.complete(rows.time, made["time"] == NO_TIME, "time of the request")
        early = sound & (made["time"] < MIN_REQUEST_SECONDS * 1_000_000)
        if early.any():
            when = datetime.fromtimestamp(int(made["time"][early][0]) / 1e6, UTC)
            self.problem(
                rows.time, f"holds {when:%Y-%m-%d}, before 1990", "check time_unit of [rows]", int(early.sum())
            )
            sound &= ~early
        if rows.user is not None:
            with self.reading(rows.user, "user of [rows] is a column of texts or whole numbers"):
                made["user"] = keys_of(columns[rows.user], plan.user_type)
        for entry in plan.side("request"):
            with self.reading(entry.column, f"check kind and type of field {entry.name}"):
                made[f"request.{entry.name}"] = raw_values(entry, columns[entry.column], zone)
        events: np.ndarray | None = None
        for entry in plan.listed:
            with self.reading(entry.column, f"check kind, type and separator of field {entry.name}"):
                made[f"history.{entry.name}"], counts = raw_history(entry, columns[entry.column], plan.length, zone)
            if events is not None and not np.array_equal(events, counts):
                first = plan.listed[0].column
                self.problem(entry.column, f"has lists of other lengths than {first}", "give each event all fields")
                raise _UnusableError
            events = counts
            made["events"] = np.minimum(counts, plan.length)
        return made, sound

    def _items(self, batch: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        """The records of rows, without their request, and which are sound."""
        plan, rows = self.plan, self.mapping.rows
        made = np.empty(len(batch[rows.item]), plan.item_record)
        with self.reading(rows.item, "item of [rows] is a column of texts or whole numbers"):
            made["item"] = keys_of(batch[rows.item], plan.item_type)
        sound = self.complete(rows.item, made["item"] == MISSING, "item id")
        made["group"], grouped = self._groups(batch)
        sound &= grouped
        made["order"] = 0.0
        groups = self.mapping.groups
        if (order := groups.order_column) is not None:
            with self.reading(order, "label, rating and rank of [groups] are columns of numbers"):
                values = numbers_of(batch[order])
            missing = (made["group"] == 0) & np.isnan(values) & sound
            sound &= self.complete(order, missing, "order of the ground truth")
            truth = (made["group"] == 0) & sound
            made["order"][truth] = -values[truth] if groups.rank else values[truth]
        for entry in plan.side("item"):
            name = plan.stored(entry)
            if name != "item":
                with self.reading(entry.column, f"check kind, type and separator of field {entry.name}"):
                    made[name] = raw_values(entry, batch[entry.column], rows.time_zone)
        return made, sound

    # ---- groups ----

    def _groups(self, batch: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Each row's group, and where there is one."""
        groups = self.mapping.groups
        if groups.column is not None:
            return self._named_groups(groups.column, batch[groups.column])
        if groups.position is not None:
            with self.reading(groups.position, "position of [groups] is a column of whole numbers from 1"):
                position, missing = integers_of(batch[groups.position])
            sound = self.complete(groups.position, missing, "position in the log's order")
            low = sound & (position < 1)
            if low.any():
                self.problem(groups.position, f"holds {position[low][0]}", "count positions from 1", int(low.sum()))
            return np.searchsorted(groups.cuts, position, side="left"), sound & ~low
        left = np.full(len(next(iter(batch.values()))), len(groups.order) - 1)
        sound = np.ones(len(left), bool)
        for number, name in reversed(list(enumerate(groups.flags))):
            with self.reading(name, "flags of [groups] are columns of true and false, or 0 and 1"):
                flags = numbers_of(batch[name])
            sound &= self.complete(name, np.isnan(flags), "flag of a group")
            odd = sound & (flags != 0) & (flags != 1)
            if odd.any():
                self.problem(name, f"holds {flags[odd][0]:g}, not 0 or 1", "give true or false", int(odd.sum()))
            left[flags == 1] = number
            sound &= ~odd
        return left, sound

    def _named_groups(self, name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        order = list(self.mapping.groups.order)
        with self.reading(name, "column of [groups] holds the groups' names"):
            coded = (column if is_text(column.type) else column.cast(pa.string())).dictionary_encode()
            known = coded.dictionary.to_pylist()
        group_of = np.array([*(order.index(value) if value in order else -1 for value in known), -2])
        found = group_of[pc.fill_null(coded.indices, len(known)).to_numpy(zero_copy_only=False)]
        self.complete(name, found == -2, "group of the row")
        unknown = found == -1
        if unknown.any():
            values = [value for value in known if value not in order]
            for value in values[:5]:
                text = repr(value if len(value) <= 100 else value[:100] + "...")
                self.problem(name, f"holds {text}, which order of [groups] does not name", nearest(value, order))
        return np.maximum(found, 0), found >= 0

    # ---- scratch files ----

    def _note_days(self, days: np.ndarray, counts: np.ndarray) -> None:
        for day in np.unique(days).tolist():
            rows = int(counts[days == day].sum())
            self.result.days[name := str(np.datetime64(day, "D"))] += rows
            if self._date is not None and name != self._date:
                self.result.other_days[str(self.piece.file.path)] += rows

    def flush(self) -> None:
        """Append what was taken to the scratch files."""
        for part, requests, items, counts in self._kept:
            order = np.argsort(part, kind="stable")
            starts, counts = (np.cumsum(counts) - counts)[order], counts[order]
            stops = np.cumsum(counts)
            items = items[np.repeat(starts - (stops - counts), counts) + np.arange(len(items))]
            part, requests = part[order], requests[order]
            lows = np.flatnonzero(np.diff(part, prepend=-1))
            for low, high in zip(lows, np.append(lows[1:], len(part)), strict=True):
                day, bucket = divmod(int(part[low]), self.plan.buckets)
                name = str(np.datetime64(day, "D"))
                append(self.plan, bucket, f"{name}.requests", requests[low:high])
                append(self.plan, bucket, f"{name}.items", items[stops[low] - counts[low] : stops[high - 1]])
        self._kept, self._kept_bytes = [], 0


def append(plan: Plan, bucket: int, name: str, records: np.ndarray) -> None:
    """Add records to a scratch file that this process alone writes."""
    path = plan.scratch / str(bucket) / f"{name}.{platform.node()}-{os.getpid()}"
    with path.open("ab") as file:
        file.write(records.tobytes())


def load(plan: Plan, bucket: int, name: str, kind: np.dtype) -> np.ndarray:
    """The records of all processes under a name, in any order."""
    paths = (plan.scratch / str(bucket)).glob(f"{name}.*")
    return np.concatenate([np.zeros(0, kind), *(np.fromfile(path, kind) for path in paths)])


def remove(plan: Plan, bucket: int, name: str) -> None:
    for path in (plan.scratch / str(bucket)).glob(f"{name}.*"):
        path.unlink()


def _note_changes(column: pa.Array, change: np.ndarray) -> None:
    """Set ``change`` [n] where a row's value is not that of the row before it."""
    counts = None
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column, counts = flattened(column)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            change[:] = True  # lists of lists: every row is a run of its own
            return
    codes = _codes(column)
    if counts is None:
        change[1:] |= codes[1:] != codes[:-1]
        return
    change[1:] |= counts[1:] != counts[:-1]
    owner = np.repeat(np.arange(len(counts)), counts)
    before = np.maximum(np.arange(len(codes)) - counts[owner], 0)
    change[owner[codes != codes[before]]] = True


def _codes(column: pa.Array) -> np.ndarray:
    """Integers that are equal where the values are; missing values are equal."""
    if is_text(column.type) or not (pa.types.is_primitive(column.type)):
        return pc.fill_null(column.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.float64())
    values = column.cast(pa.int64()) if pa.types.is_temporal(column.type) else column
    missing = values.is_null().to_numpy(zero_copy_only=False)
    plain = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
    if plain.dtype.kind == "f":
        plain = plain.astype(np.float64).view(np.int64)
    # A missing value must differ from 0: two columns in one would do, but no id is likely to be this one.
    return np.where(missing, np.int64(-7_046_029_254_386_353_131), plain.astype(np.int64))
