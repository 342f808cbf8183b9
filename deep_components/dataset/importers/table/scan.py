"""First pass: every row of the table, checked on its own, into the scratch files of its day and bucket."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

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
from deep_components.dataset.importers.table.plan import Plan, Problem
from deep_components.dataset.importers.table.scratch import append
from deep_components.dataset.importers.table.source import Piece, batches
from deep_components.errors import InputError

_DATE = re.compile(r"(?:^|[=/_.-])(\d{4}-\d{2}-\d{2})(?=$|[/_.])")
_FLUSH_BYTES = 1 << 25
_SECONDS_PER_DAY = 86_400


@dataclass
class Scanned:
    """What a pass over a piece found; rows are in the scratch files."""

    rows: int = 0
    problems: Counter[Problem] = field(default_factory=Counter)  # -> rows
    unread: set[str] = field(default_factory=set)  # fields of the records that do not hold the table's values
    days: Counter[str] = field(default_factory=Counter)  # day -> rows
    other_days: Counter[str] = field(default_factory=Counter)  # file named by a date -> rows of other days


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
    types |= {rows.time: _time_type(rows.time_unit)} if rows.time else {}
    if groups.column:
        types[groups.column] = pa.string()
    types |= {name: pa.bool_() for name in groups.flags}
    types |= {groups.position: pa.int64()} if groups.position else {}
    return types | ({groups.order_column: pa.float64()} if groups.order_column else {})


def _time_type(unit: str | None) -> pa.DataType:
    return {None: pa.string(), "s": pa.float64()}.get(unit, pa.int64())


def typed(column: pa.Array, kind: pa.DataType | None) -> pa.Array:
    """A column of texts as the CSV reader reads it. ArrowException when it holds other values."""
    if kind is None or kind == column.type or not is_text(column.type):
        return column
    return pc.utf8_trim_whitespace(column).cast(kind)


def scan(plan: Plan, piece: Piece, columns: dict[str, pa.DataType | None]) -> Scanned:
    """Read a piece of the table. InputError for the first problem when the plan is strict; a file that cannot be read
    to its end is a problem too."""
    scanner = _Scanner(plan, piece, columns)
    if not plan.strict:  # a value that is not of its column's type must not end the reading of a CSV file
        columns = dict.fromkeys(columns, pa.string())
    try:
        for batch in batches(plan.mapping, piece, columns, plan.rows_per_batch):
            scanner.result.rows += _rows_of(batch)
            scanner.take(batch)
    except InputError as error:
        if plan.strict:
            raise
        what, _, remedy = str(error).removeprefix(f"{piece.file.path}: ").rpartition("; ")
        scanner.result.problems[Problem("", remedy, what, str(piece.file.path), what)] += 1
    scanner.flush()
    return scanner.result


def _rows_of(batch: dict[str, pa.Array]) -> int:
    return len(next(iter(batch.values())))


class _Scanner:
    def __init__(self, plan: Plan, piece: Piece, types: dict[str, pa.DataType | None]) -> None:
        self.plan, self.piece, self.mapping = plan, piece, plan.mapping
        self.result = Scanned()
        self._types = types if piece.file.format == "csv" else {}
        self._failed, self._stopped = set[str](), set[str]()  # columns, and fields of the records, that cannot be read
        self._zone = time_zone(self.mapping.rows.time_zone)
        dates = _DATE.findall(str(piece.file.path.relative_to(self.mapping.source.parent)))
        self._date = dates[-1] if dates else None
        self._kept: list[tuple[np.ndarray, ...]] = []  # (part, requests, items, items a request)
        self._kept_bytes = 0

    # ---- problems ----

    def problem(self, column: str, what: str, remedy: str, rows: int = 1, kind: str = "") -> None:
        problem = Problem(column, remedy, kind, str(self.piece.file.path), what)
        if self.plan.strict:
            raise InputError(problem.sentence())
        self.result.problems[problem] += rows

    def read(
        self, name: str, batch: dict[str, pa.Array], column: str | None, remedy: str, how: Callable[[pa.Array], Any]
    ) -> Any:
        """``how(column)``, for a field of the records. Once that cannot be done, which is noted, it is None."""
        if column is None or name in self._stopped:
            return None
        try:
            return how(typed(batch[column], self._types.get(column)))
        except (ValueError, pa.ArrowException) as error:
            if isinstance(error, InputError):
                raise
            if column not in self._failed:
                self.problem(column, first_line(error), remedy)
            self._failed.add(column)
            self._stopped.add(name)
            self.result.unread.add(name)
            return None

    def complete(self, column: str, missing: np.ndarray, what: str) -> np.ndarray:
        """Notes missing values; where there are none."""
        if missing.any():
            count = int(missing.sum())
            self.problem(column, f"has missing values; it is the {what}", "fill them in or leave the rows out", count)
        return ~missing

    def without(self, name: str, wrong: np.ndarray) -> np.ndarray:
        """The rows that further passes check: those that are not wrong; all, without the field, when all are."""
        if not wrong.all():
            return ~wrong
        self.result.unread.add(name)
        return np.ones(len(wrong), bool)

    # ---- a batch ----

    def take(self, batch: dict[str, pa.Array]) -> None:
        """Convert a batch's rows to records."""
        plan = self.plan
        starts = self._run_starts(batch)
        lengths = np.diff(starts, append=_rows_of(batch))
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
        names = {name for name in (rows.request, rows.time, rows.user) if name is not None}
        names |= {entry.column for entry in self.plan.side("request")} | {entry.column for entry in self.plan.listed}
        change = np.zeros(_rows_of(batch), bool)
        change[:1] = True
        for name in sorted(names):
            _note_changes(batch[name], change)
        return np.flatnonzero(change)

    def _requests(self, batch: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        """The records of requests, and which are sound. Rows whose request is not known are not."""
        plan, rows, zone = self.plan, self.mapping.rows, self.mapping.rows.time_zone
        made = np.zeros(_rows_of(batch), plan.request_record)
        sound = np.ones(len(made), bool)
        ids = "is a column of texts or whole numbers"
        keys = self.read(
            "request", batch, rows.request, f"request of [rows] {ids}", partial(keys_of, kind=plan.request_type)
        )
        if keys is None:
            sound[:] = False
        else:
            made["request"] = keys
            sound &= self.complete(rows.request, keys == MISSING, "request id")
            texts = plan.request_type == "string"
            made["raw"] = keys.view(np.int64) if texts else integers_of(typed(batch[rows.request], pa.int64()))[0]
        sound &= self._times(made, batch)
        user = self.read("user", batch, rows.user, f"user of [rows] {ids}", partial(keys_of, kind=plan.user_type))
        made["user"] = MISSING if user is None else user
        for entry in plan.side("request"):
            name, remedy = f"request.{entry.name}", f"check kind and type of field {entry.name}"
            values = self.read(name, batch, entry.column, remedy, partial(raw_values, entry, zone=zone))
            made[name] = entry.nothing if values is None else values
        self._listed(made, batch)
        return made, sound

    def _times(self, made: np.ndarray, batch: dict[str, pa.Array]) -> np.ndarray:
        """Set the times of requests; which are sound. Times that cannot be read are all the same."""
        rows = self.mapping.rows
        remedy = "check time, time_unit and time_zone of [rows]"
        times = self.read("time", batch, rows.time, remedy, partial(times_of, unit=rows.time_unit, zone=rows.time_zone))
        made["time"] = MIN_REQUEST_SECONDS * 1_000_000
        if times is None or rows.time is None:
            return np.ones(len(made), bool)
        sound = self.complete(rows.time, times == NO_TIME, "time of the request")
        early = sound & (times < MIN_REQUEST_SECONDS * 1_000_000)
        if early.any():
            what = f"holds {datetime.fromtimestamp(int(times[early][0]) / 1e6, UTC):%Y-%m-%d}, before 1990"
            self.problem(rows.time, what, "check time_unit of [rows]", int(early.sum()))
        sound &= ~early
        made["time"][sound] = times[sound]
        return self.without("time", ~sound)

    def _listed(self, made: np.ndarray, batch: dict[str, pa.Array]) -> None:
        """Set the histories that the table has."""
        length, zone = self.plan.length, self.mapping.rows.time_zone
        first: tuple[str, np.ndarray] | None = None
        for entry in self.plan.listed:
            name, remedy = f"history.{entry.name}", f"check kind, type and separator of field {entry.name}"
            found = self.read(name, batch, entry.column, remedy, partial(raw_history, entry, length=length, zone=zone))
            made[name] = entry.nothing
            if found is None:
                continue
            values, counts = found
            if first is None:
                first = entry.column, counts
                made["events"] = np.minimum(counts, length)
            if not np.array_equal(first[1], counts):
                what = f"has lists of other lengths than {first[0]}"
                self.problem(entry.column, what, "give each event all fields", int((first[1] != counts).sum()))
                self.result.unread.add(name)
            else:
                made[name] = values

    def _items(self, batch: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        """The records of rows, without their request, and which are sound. Items that are not known all differ."""
        plan, rows = self.plan, self.mapping.rows
        made = np.zeros(_rows_of(batch), plan.item_record)
        made["group"], sound = self._groups(batch)
        remedy = "item of [rows] is a column of texts or whole numbers"
        keys = self.read("item", batch, rows.item, remedy, partial(keys_of, kind=plan.item_type))
        made["item"] = np.arange(len(made)) if keys is None else keys
        self._orders(made, batch, sound)
        if keys is not None:
            sound &= self.without("item", ~self.complete(rows.item, keys == MISSING, "item id"))
        for entry in plan.side("item"):
            if (name := plan.stored(entry)) != "item":
                remedy = f"check kind, type and separator of field {entry.name}"
                values = self.read(name, batch, entry.column, remedy, partial(raw_values, entry, zone=rows.time_zone))
                made[name] = entry.nothing if values is None else values
        return made, sound

    def _orders(self, made: np.ndarray, batch: dict[str, pa.Array], sound: np.ndarray) -> None:
        """Set the true order of the ground truth; rows of it without one become unsound."""
        groups = self.mapping.groups
        remedy = "label, rating and rank of [groups] are columns of numbers"
        values = self.read("order", batch, groups.order_column, remedy, numbers_of)
        if values is None or groups.order_column is None:
            return
        truth = (made["group"] == 0) & sound
        sound &= self.complete(groups.order_column, truth & np.isnan(values), "order of the ground truth")
        truth &= sound
        made["order"][truth] = -values[truth] if groups.rank else values[truth]

    # ---- groups ----

    def _groups(self, batch: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Each row's group, and where there is one; the last group when groups cannot be told."""
        groups = self.mapping.groups
        if groups.column is not None:
            return self._named_groups(groups.column, batch)
        left = np.full(_rows_of(batch), max(len(groups.order) - 1, 0))
        sound = np.ones(len(left), bool)
        if groups.position is not None:
            remedy = "position of [groups] is a column of whole numbers from 1"
            found = self.read("group", batch, groups.position, remedy, integers_of)
            if found is None:
                return left, sound
            position, missing = found
            sound = self.complete(groups.position, missing, "position in the log's order")
            low = sound & (position < 1)
            if low.any():
                self.problem(groups.position, f"holds {position[low][0]}", "count positions from 1", int(low.sum()))
            return np.searchsorted(groups.cuts, position, side="left"), sound & ~low
        for number, name in reversed(list(enumerate(groups.flags))):
            remedy = "flags of [groups] are columns of true and false, or 0 and 1"
            flags = self.read(f"group.{name}", batch, name, remedy, numbers_of)
            if flags is None:
                self.result.unread.add("group")
                continue
            there = self.complete(name, np.isnan(flags), "flag of a group")
            odd = there & (flags != 0) & (flags != 1)
            if odd.any():
                self.problem(name, f"holds {flags[odd][0]:g}, not 0 or 1", "give true or false", int(odd.sum()))
            left[flags == 1] = number
            sound &= there & ~odd
        return left, sound

    def _named_groups(self, name: str, batch: dict[str, pa.Array]) -> tuple[np.ndarray, np.ndarray]:
        order = list(self.mapping.groups.order)

        def coded_of(column: pa.Array) -> pa.DictionaryArray:
            return (column if is_text(column.type) else column.cast(pa.string())).dictionary_encode()

        coded = self.read("group", batch, name, "column of [groups] holds the groups' names", coded_of)
        if coded is None:
            return np.full(_rows_of(batch), len(order) - 1), np.ones(_rows_of(batch), bool)
        known = coded.dictionary.to_pylist()
        group_of = np.array([*(order.index(value) if value in order else -1 for value in known), -2])
        codes = pc.fill_null(coded.indices, len(known)).to_numpy(zero_copy_only=False)
        found = group_of[codes]
        self.complete(name, found == -2, "group of the row")
        unknown = np.flatnonzero(group_of == -1)[:5].tolist()
        for number in unknown:
            value = known[number]
            text = repr(value if len(value) <= 100 else value[:100] + "...")
            what, rows = f"holds {text}, which order of [groups] does not name", int((codes == number).sum())
            self.problem(name, what, nearest(value, order), rows, kind=what)
        return np.where(found < 0, len(order) - 1, found), self.without("group", found < 0)

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
