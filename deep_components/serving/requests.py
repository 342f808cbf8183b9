"""From raw requests, as a caller or a file has them, to the request and history fields that the models take.

A request is a dict of raw columns and ``"history"``, its events from the oldest to the latest. An event is a dict of
the history's raw columns, or an item's raw id alone; what it lacks is taken from the corpus. Every request is encoded
as it would be alone, whatever stands beside it.
"""

import json
import reprlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa

from deep_components.cli import nearest
from deep_components.dataset.encoding import TIME_UNITS, RawEncoding, aligned, first_line
from deep_components.errors import InputError

if TYPE_CHECKING:
    from deep_components.serving.corpus import Corpus

HISTORY = "history"
_NONE = type(None)
_SIMPLE = {str, int, float, bool}
_KINDS = ((bool, "truths"), (int | float, "numbers"), (str, "text"), (date, "dates"), (Decimal, "decimals"))

Requests: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | pa.Table | pa.RecordBatch | pd.DataFrame


@dataclass(frozen=True)
class EncodedRequests:
    """B requests as the models take them."""

    request: dict[str, np.ndarray]  # field -> [B], lists [B, G]
    history: dict[str, np.ndarray]  # field -> [B, L], lists [B, L, G]; "mask" [B, L] bool
    seen: list[np.ndarray]  # of each request the rows of the corpus that its events name, rising, int64

    def __len__(self) -> int:
        return len(self.seen)


@dataclass(frozen=True)
class _Request:
    """A request taken apart. A history column that is not there is filled from the corpus, and so is a None."""

    number: int
    columns: Mapping[str, Any]
    events: Mapping[str, Sequence[Any]]  # history column -> a value an event
    length: int  # events

    def values(self, column: str) -> Sequence[Any]:
        return self.events.get(column, (None,) * self.length)


class RequestEncoder:
    """Encodes raw requests for the models of a bundle.

    Args:
        encoding: the bundle's.
        corpus: fills what events lack, by their item's id.
    """

    def __init__(self, encoding: RawEncoding, corpus: "Corpus") -> None:
        self.encoding, self.corpus = encoding, corpus
        self.request_columns = tuple(encoding.columns("request"))
        self.history_columns = tuple(encoding.columns("history"))
        self._item_columns = _item_columns(encoding)
        named = [column for column, item in self._item_columns.items() if item == encoding.item]
        self.id_column = named[0] if named else encoding.item  # of an event
        self._separators = {entry.column: entry.separator for entry in _entries(encoding, HISTORY) if not entry.length}
        self._event_keys = {item: column for column, item in self._item_columns.items()}
        self._event_keys |= {column: column for column in (*self.history_columns, self.id_column)}
        self._item_fields = _item_fields(encoding, self._item_columns)
        self._history_fields = {f.name: np.int64 if f.table else np.float32 for f in encoding.schema.side(HISTORY)}
        self.known = {*self.request_columns, HISTORY, *self.history_columns, encoding.user, encoding.time} - {""}

    # ---- any form of requests -> dicts ----

    def rows_of(self, requests: Requests) -> list[Mapping[str, Any]]:
        """The requests one by one. Columns of a table that no field needs are left out; a dict must not have any.

        InputError for what is no request, naming its number, from 0.
        """
        if isinstance(requests, Mapping):
            requests = [requests]
        if isinstance(requests, pd.DataFrame | pa.Table | pa.RecordBatch):
            return self._rows_of_table(requests)
        if isinstance(requests, str | bytes) or not isinstance(requests, Sequence):
            raise InputError(
                f"requests: {type(requests).__name__}, not a list of dicts, a pyarrow table or a DataFrame"
            )
        for number, row in enumerate(requests):
            if not isinstance(row, Mapping):
                raise InputError(f"requests[{number}]: {reprlib.repr(row)}, not a dict of raw columns")
            for key in row:
                if key not in self.known:
                    raise InputError(f"requests[{number}]: {_unknown(key, self.known)}")
        return list(requests)

    def _rows_of_table(self, table: pa.Table | pa.RecordBatch | pd.DataFrame) -> list[Mapping[str, Any]]:
        names = list(table.columns) if isinstance(table, pd.DataFrame) else table.schema.names
        wanted = [name for name in names if name in self.known]
        if twice := [name for name in wanted if wanted.count(name) > 1]:
            raise InputError(f"requests: column {twice[0]} is there twice; give one of them another name")
        columns = {name: _values(table[name]) for name in wanted}
        columns = {name: values for name, values in columns.items() if self._is_wanted(name, values)}
        if HISTORY in columns:
            columns[HISTORY] = [self._known_parts(events) for events in columns[HISTORY]]
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows] if columns else [{} for _ in range(len(table))]

    def _is_wanted(self, name: str, values: Sequence[Any]) -> bool:
        """Whether a column of a table is one of the request, rather than of an item that stands beside it."""
        if name in self.history_columns and name not in {*self.request_columns, HISTORY}:
            return self._separators.get(name) is not None or any(map(_is_list, values))
        return True

    def _known_parts(self, events: Any) -> Any:
        """The events without what no field needs."""
        if not _is_list(events):
            return events
        known = self._event_keys
        return [{k: v for k, v in e.items() if k in known} if isinstance(e, Mapping) else e for e in events]

    # ---- dicts -> fields ----

    def encode(self, rows: Sequence[Mapping[str, Any]], first: int = 0, now: float | None = None) -> EncodedRequests:
        """The fields of requests that :meth:`rows_of` gave; the first has the number ``first`` in errors.

        ``now`` is the time, in seconds since 1970, of requests that have none; by default the clock's. InputError for a
        value that its field cannot take, naming the request and the column.
        """
        now = time.time() if now is None else now
        return self._encode([self._taken_apart(first + n, row, now) for n, row in enumerate(rows)])

    def _encode(self, some: list[_Request]) -> EncodedRequests:
        """As one block, or where that cannot be, as two: values of several types do not go into one column, and what is
        wrong with one request is found."""
        try:
            return self._block(some)
        except InputError as error:
            if len(some) == 1:
                raise InputError(f"requests[{some[0].number}]: {error}") from error
            half = len(some) // 2
            return _joined(self._encode(some[:half]), self._encode(some[half:]))

    def _taken_apart(self, number: int, row: Mapping[str, Any], now: float) -> _Request:
        columns = {name: row.get(name) for name in self.request_columns}
        if self.encoding.time in columns and _missing(columns[self.encoding.time]):
            columns[self.encoding.time] = _raw_time(self.encoding, now)
        try:
            events = self._events(row)
        except InputError as error:
            raise InputError(f"requests[{number}]: {error}") from error
        lengths = {name: len(values) for name, values in events.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{count} of {name}" for name, count in lengths.items())
            raise InputError(f"requests[{number}]: its lists of events differ in length ({listed}); give all of each")
        return _Request(number, columns, events, next(iter(lengths.values()), 0))

    def _events(self, row: Mapping[str, Any]) -> Mapping[str, Sequence[Any]]:
        """History column -> a value an event; from "history", or from lists at the top of the request."""
        listed = {name: row[name] for name in self.history_columns if row.get(name) is not None and name != HISTORY}
        history = row.get(HISTORY)
        if history is None:
            return {name: _list(name, value, self._separators.get(name)) for name, value in listed.items()}
        top = [name for name in listed if name not in self.request_columns]
        if top:
            raise InputError(f"column {top[0]}: the events stand in {HISTORY} already; give them once")
        events = _list(HISTORY, history, self._separators.get(HISTORY))
        if not any(issubclass(kind, Mapping) for kind in set(map(type, events))):
            return {self.id_column: events}
        made: dict[str, list[Any]] = {}
        for number, event in enumerate(events):
            if not isinstance(event, Mapping):
                event = {self.id_column: event}
            for key, value in event.items():
                if key not in self._event_keys:
                    raise InputError(f"{HISTORY}[{number}]: {_unknown(key, self._event_keys)}")
                made.setdefault(self._event_keys[key], [None] * len(events))[number] = value
        return made or {self.id_column: [None] * len(events)}

    def _block(self, some: Sequence[_Request]) -> EncodedRequests:
        columns = {name: _array(name, [request.columns[name] for request in some]) for name in self.request_columns}
        fields = self.encoding.encode("request", columns)
        ids = _array(self.id_column, [value for request in some for value in request.values(self.id_column)])
        rows = self.corpus.rows_of(ids)
        lengths = np.array([request.length for request in some], np.int64)
        parts = np.split(rows, np.cumsum(lengths)[:-1])
        seen = [np.unique(part[part >= 0]) for part in parts]
        return EncodedRequests(fields, self._history(some, ids, rows, lengths), seen)

    def _history(
        self, some: Sequence[_Request], ids: pa.Array, rows: np.ndarray, lengths: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The history fields of the latest L events of each request. What is a corpus' item and nothing else has its
        fields there already."""
        length = self.encoding.history_length
        counts = np.minimum(lengths, length)
        mask = np.arange(length, 0, -1) <= counts[:, None]
        if not self.history_columns or not length:
            return {"mask": np.zeros_like(mask)}
        if (lengths > length).any():
            latest = np.concatenate(
                [np.arange(end - n, end) for end, n in zip(np.cumsum(lengths), counts, strict=True)]
            )
            ids, rows = ids.take(pa.array(latest)), rows[latest]
        given = {name for request in some for name in request.events} - {self.id_column}
        values = {name: [value for request in some for value in request.values(name)[-length:]] for name in given}
        raw = np.full(len(rows), True) if self._item_fields is None else rows < 0
        for listed in values.values():
            raw |= np.array([not _missing(value) for value in listed], bool)
        chosen = np.flatnonzero(raw)
        encoded = self._raw_events(chosen, values, ids, rows) if len(chosen) or self._item_fields is None else {}
        made = {"mask": mask}
        for name, kind in self._history_fields.items():
            if self._item_fields is None:
                flat = encoded[name]
            else:
                flat = self.corpus.features[self._item_fields[name]][np.where(raw, 0, rows)].astype(kind)
                flat[chosen] = encoded.get(name, 0)
            made[name] = aligned(flat, counts, length, 0, latest=True)
        return made

    def _raw_events(
        self, chosen: np.ndarray, values: Mapping[str, Sequence[Any]], ids: pa.Array, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The history fields of some events, [n] or [n, G], encoded as if they were histories of L events."""
        length = self.encoding.history_length
        offsets = pa.array([*range(0, len(chosen), length), len(chosen)], pa.int32())
        columns = {}
        for name in self.history_columns:
            given = [values[name][event] for event in chosen] if name in values else [None] * len(chosen)
            column = ids.take(pa.array(chosen)) if name == self.id_column else self._filled(name, given, rows[chosen])
            columns[name] = pa.ListArray.from_arrays(offsets, column)
        encoded = self.encoding.encode(HISTORY, columns)
        return {name: encoded[name][encoded["mask"]] for name in self._history_fields}

    def _filled(self, name: str, given: Sequence[Any], rows: np.ndarray) -> pa.Array:
        """The values of a history column, those that are missing from the items' column of the corpus."""
        column = self._item_columns.get(name)
        if column is not None and column in self.corpus.table.schema.names and (rows >= 0).any():
            filled = self.corpus.values(column, rows)
            given = [other if _missing(value) else value for value, other in zip(given, filled, strict=True)]
        return _array(name, given)


def _entries(encoding: RawEncoding, side: str) -> Sequence[Any]:
    """The entries of an encoding that the importer of tables made; others have none."""
    return tuple(entry for entry in getattr(encoding, "entries", ()) if entry.side == side)


def _item_columns(encoding: RawEncoding) -> dict[str, str]:
    """History column -> the items' column that says the same of an item: the one of its name, or of the field with the
    same name, or with the same table."""
    items, found = set(encoding.columns("item")), {}
    for column in encoding.columns(HISTORY):
        if column in items:
            found[column] = column
    for wanted in ("name", "table"):
        for entry in _entries(encoding, HISTORY):
            for item in _entries(encoding, "item"):
                alike = all(
                    getattr(entry, name) == getattr(item, name) for name in ("kind", "type", "time_unit", wanted)
                )
                if alike and getattr(entry, wanted):
                    found.setdefault(entry.column, item.column)
    return found


def _item_fields(encoding: RawEncoding, item_columns: Mapping[str, str]) -> dict[str, str] | None:
    """History field -> the items' field that is made the same way of the same values; None unless all have one."""
    found: dict[str, str] = {}
    if entries := _entries(encoding, HISTORY):
        for entry in entries:
            for item in _entries(encoding, "item"):
                alike = replace(entry, side="item", name=item.name, column=item.column) == item
                if alike and item.column == item_columns.get(entry.column):
                    found |= zip(entry.outputs, item.outputs, strict=True)
    else:
        items = {replace(field, side=HISTORY) for field in encoding.schema.side("item")}
        found = {field.name: field.name for field in encoding.schema.side(HISTORY) if field in items}
    return found if all(field.name in found for field in encoding.schema.side(HISTORY)) else None


def _raw_time(encoding: RawEncoding, now: float) -> Any:
    """A time, in seconds since 1970, as the log's requests have it."""
    entries = [entry for entry in _entries(encoding, "request") if entry.column == encoding.time]
    unit = next((entry.time_unit for entry in entries if entry.kind == "time"), "ms")
    if unit is None:
        return datetime.fromtimestamp(now, UTC)
    return int(round(now * 1e6) / TIME_UNITS[unit])


def _list(name: str, value: Any, separator: str | None) -> Sequence[Any]:
    if isinstance(value, str) and separator is not None:
        return value.split(separator) if value else []
    if isinstance(value, str) and name == HISTORY and value.startswith("["):  # of a CSV file
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"column {name}: {reprlib.repr(value)}, not a list of events as JSON") from error
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not _is_list(value):
        raise InputError(f"column {name}: {reprlib.repr(value)}, not a list of events")
    return value


def _array(column: str, values: Sequence[Any]) -> pa.Array:
    """The values as Arrow's, missing ones as null. InputError where they are of several types, which Arrow would make
    one of, or of none that a log can have."""
    types = set(map(type, values)) - {_NONE}
    try:
        if not types <= _SIMPLE or len(types) > 1:
            values = [_plain(value) for value in values]
            kinds = {_kind(value) for value in values if value is not None}
            if len(kinds) > 1:
                raise ValueError("holds values of several types")
        elif float in types:
            values = [None if value != value else value for value in values]
        return pa.array(values)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise InputError(f"column {column}: {first_line(error)}; give what the log has") from error


def _missing(value: Any) -> bool:
    return value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and value != value)


def _values(column: pd.Series | pa.Array | pa.ChunkedArray) -> list[Any]:
    values: list[Any] = column.tolist() if isinstance(column, pd.Series) else column.to_pylist()
    return values


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _plain(value: Any) -> Any:
    """Numpy's values as Python's, and of a list its parts; None for all that stand for a missing one."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [None if _missing(part) else part.item() if isinstance(part, np.generic) else part for part in value]
    return None if _missing(value) else value


def _kind(value: Any) -> str:
    """Values of one kind go into one column. ValueError for what is none that a log can have, which Arrow might not
    survive."""
    if isinstance(value, list):
        if any(isinstance(part, list | tuple) for part in value):
            raise ValueError("holds lists of lists")
        for part in value:
            _kind("" if part is None else part)
        return "lists"
    if isinstance(value, datetime):
        return "times" if value.tzinfo else "wall-clock times"
    for kind, name in _KINDS:
        if isinstance(value, kind):
            return name
    raise ValueError(f"holds {type(value).__name__}, no value that a log can have")


def _unknown(key: Any, known: Any) -> str:
    return f"{reprlib.repr(key)} is no column of its log{nearest(str(key), known)}; it takes {', '.join(sorted(known))}"


def _joined(one: EncodedRequests, other: EncodedRequests) -> EncodedRequests:
    request, history = (
        {name: np.concatenate([ours[name], theirs[name]]) for name in ours}
        for ours, theirs in ((one.request, other.request), (one.history, other.history))
    )
    return EncodedRequests(request, history, one.seen + other.seen)
