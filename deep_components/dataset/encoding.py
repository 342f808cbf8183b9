"""From raw values, as a company's tables and requests have them, to what models take: indices and scaled numbers.

An :class:`Encoding` is learnt by an importer from the training days, saved beside the data and with every run, and
knows no training: a service encodes raw values with it just as the importer did. Logs that have none are encoded by an
:class:`IndexEncoding`, or importers/recflow.py's, which have the same interface, :class:`RawEncoding`.

An id is known by a 64-bit key of its value in the field's type: SplitMix64's finalizer of an integer, and of a text's
SipHash-2-4 (of its UTF-8 bytes, under the key ``0123456789123456``); pandas calls this ``hash_array``. Integers do not
collide; of n texts some two do with a probability of about n^2 / 2^65, 3 in 10^6 for ten million. The vocabulary of a
table is its sorted keys; the row of the i-th is i + 2. Row 0 is padding, row 1 stands for values that are missing, rare
in the training days, or not there.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

from deep_components.dataset.clock import MAX_SECONDS, MIN_SECONDS, local_seconds, time_zone, utc_seconds
from deep_components.errors import InputError
from deep_components.files import make_folder, read_json, sha256_of, write_json
from deep_components.schema import SIDES, Field, Schema

ENCODING_FILE = "encoding.json"
TYPES = ("string", "integer")
SCALES = ("standard", "quantile")
TIME_UNITS = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 0.001}  # in microseconds
PARTS = {"month": 12, "day": 31, "weekday": 7, "hour": 24, "minute": 60}  # part of a time -> its values
PADDING, UNKNOWN = 0, 1  # rows of every table
FIRST = 2  # the first known value's row

NO_VALUE = np.uint64(2**64 - 2)  # a key, where a list has no value
MISSING = np.uint64(2**64 - 1)  # a key, where the value is missing
NO_TIME = np.iinfo(np.int64).min

_KEY = "0123456789123456"
_VERSION = 1
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_WHOLE = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null, *_TEXT)
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)


@dataclass(frozen=True)
class FieldEncoding:
    """What becomes of one raw column; the fields of the schema that it makes are :attr:`outputs`."""

    name: str
    side: str  # "request", "history" (a list of events a request) or "item"
    kind: str  # "id", "number" or "time"
    column: str  # in the log
    type: str = ""  # of ids: "string" or "integer"
    table: str = ""
    length: int = 0  # above 0: a list of at most so many values
    separator: str | None = None  # splits text into a list
    time_unit: str | None = None  # of numbers that are times
    parts: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0
    has_missing: bool = False  # in the training days: a second field says where
    edges: tuple[float, ...] | None = None  # between the buckets; None: scaled by (value - mean) / scale

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.kind == "time":
            return tuple(f"{self.name}_{part}" for part in self.parts)
        return (self.name, f"{self.name}_missing") if self.has_missing and self.edges is None else (self.name,)

    @property
    def csv_type(self) -> pa.DataType:
        """What a column of CSV is read as."""
        if self.kind == "id":
            return pa.int64() if self.type == "integer" and not self.length else pa.string()
        if self.kind == "number":
            return pa.float64()
        return {None: pa.string(), "s": pa.float64()}.get(self.time_unit, pa.int64())

    @property
    def dtype(self) -> np.dtype:
        """Of its raw values: keys, numbers, or microseconds since 1970."""
        return np.dtype({"id": np.uint64, "number": np.float64, "time": np.int64}[self.kind])

    @property
    def nothing(self) -> Any:
        """The raw value where a list has none."""
        return {"id": NO_VALUE, "number": np.nan, "time": NO_TIME}[self.kind]


class RawEncoding(Protocol):
    """What turns raw columns into the fields of a schema.

    ``item``, ``user`` and ``time`` are the raw columns that name an item, a user, and a request's time; "" where none
    does. ``history_length`` is L: of an event list the latest so many count.
    """

    history_length: int
    item: str
    user: str
    time: str

    @property
    def schema(self) -> Schema:
        """The fields that models see."""

    @property
    def item_field(self) -> str:
        """The field of the schema that names an item; "" where none does."""

    def columns(self, side: str) -> dict[str, pa.DataType | None]:
        """The raw columns of a side, each once, and the type that CSV files are read with; None: any."""

    def encode(self, side: str, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """The fields of a side from raw columns of n values each: [n], lists [n, G], ids and times integers below
        their table's size, numbers float32.

        Columns of side "history" hold a list of events a value, the latest last: [n, L], and under "mask" where there
        is an event; elsewhere stands 0. An id that no table has a row for becomes the unknown row, or padding where the
        table has none. InputError for a column that is missing or holds what its field cannot.
        """

    def save(self, folder: Path) -> None:
        """Write the encoding to a folder. InputError when that cannot be done."""


class Encoding:
    """How a log's raw values become indices and numbers, learnt from a table (:class:`RawEncoding`).

    Args:
        entries: the log's fields.
        vocabularies: table -> its sorted uint64 keys, for tables of ids.
        zone: the log's time zone.
        history_length: L, events of a history.
        item, user, time: columns, see :class:`RawEncoding`.
    """

    def __init__(
        self,
        entries: Sequence[FieldEncoding],
        vocabularies: Mapping[str, np.ndarray],
        zone: str = "UTC",
        history_length: int = 0,
        item: str = "",
        user: str = "",
        time: str = "",
    ) -> None:
        self.entries, self.vocabularies = tuple(entries), dict(vocabularies)
        self.zone, self.history_length = zone, history_length
        self.item, self.user, self.time = item, user, time

    def side(self, side: str) -> tuple[FieldEncoding, ...]:
        return tuple(entry for entry in self.entries if entry.side == side)

    @property
    def item_field(self) -> str:
        """See :class:`RawEncoding`."""
        named = (e.name for e in self.side("item") if e.column == self.item and e.kind == "id" and not e.length)
        return next(named, "")

    def columns(self, side: str) -> dict[str, pa.DataType | None]:
        """See :class:`RawEncoding`."""
        types: dict[str, pa.DataType | None] = {}
        for entry in self.side(side):
            kind = entry.csv_type
            types[entry.column] = kind if types.get(entry.column, kind) == kind else pa.string()
        return types

    @cached_property
    def schema(self) -> Schema:
        """The fields that models see."""
        made = (self._field(e, name) for side in SIDES for e in self.side(side) for name in e.outputs)
        return Schema(tuple(made))

    def _field(self, entry: FieldEncoding, name: str) -> Field:
        if entry.kind == "number" and entry.edges is None:
            return Field(name, entry.side, "number")
        if entry.kind == "time":
            known = PARTS[entry.parts[entry.outputs.index(name)]]
        else:
            known = len(self.vocabularies[entry.table]) if entry.edges is None else len(entry.edges) + 1
        kind, table = ("time", name) if entry.kind == "time" else ("id", entry.table)
        return Field(name, entry.side, kind, FIRST + known, PADDING, UNKNOWN, table, length=entry.length)

    def encode(self, side: str, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """See :class:`RawEncoding`."""
        made: dict[str, np.ndarray] = {}
        for entry in self.side(side):
            with column_of(columns, entry.column, entry.name, side) as column:
                if side == "history":
                    raw, counts = raw_history(entry, column, self.history_length, self.zone)
                else:
                    raw = raw_values(entry, column, self.zone)
            fields = self.finished(entry, raw)
            if side == "history":
                made["mask"] = np.arange(self.history_length, 0, -1) <= counts[:, None]
                for values in fields.values():  # as the importer leaves it: what is no event is 0, not unknown
                    values[~made["mask"]] = 0
            made |= fields
        return made

    def finished(self, entry: FieldEncoding, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Schema field -> indices or numbers, of the shape of ``raw``."""
        if entry.kind == "id":
            return {entry.name: indices_of(self.vocabularies[entry.table], raw)}
        if entry.kind == "time":
            return dict(zip(entry.outputs, parts_of(raw, entry.parts, self.zone), strict=True))
        missing = np.isnan(raw)
        if entry.edges is not None:
            buckets = FIRST + np.searchsorted(np.array(entry.edges), raw, side="right")
            return {entry.name: np.where(missing, UNKNOWN, buckets)}
        # A value far outside the training days' range must not become infinite in float32.
        scaled = np.clip((raw - entry.mean) / entry.scale, -1e6, 1e6)
        numbers = {entry.name: np.where(missing, 0, scaled).astype(np.float32)}
        return numbers | ({entry.outputs[1]: missing.astype(np.float32)} if entry.has_missing else {})

    # ---- files ----

    def save(self, folder: Path) -> None:
        """Write encoding.json and a .npy file for each table of ids. InputError when that cannot be done."""
        make_folder(folder)
        tables = {}
        try:
            for table, keys in self.vocabularies.items():
                path = folder / f"{table}.npy"
                np.save(path, keys)
                tables[table] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error
        content: dict[str, Any] = {"version": _VERSION, "time_zone": self.zone, "history_length": self.history_length}
        content |= {"item": self.item, "user": self.user, "time": self.time}
        content |= {"fields": [asdict(entry) for entry in self.entries], "tables": tables}
        write_json(folder / ENCODING_FILE, content)

    @classmethod
    def load(cls, folder: Path) -> "Encoding":
        """What :meth:`save` wrote; vocabularies are mapped. InputError when a file is missing or damaged."""
        path = folder / ENCODING_FILE
        try:
            content = read_json(path, must_have_checksum=True)
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']!r}, not {_VERSION}")
            time_zone(content["time_zone"])
            entries = [_entry(listed) for listed in content["fields"]]
            tables = {table: (entry["size"], entry["sha256"]) for table, entry in content["tables"].items()}
            length = content["history_length"]
            named = {name: content.get(name, "") for name in ("item", "user", "time")}  # files of 0.2.0 name none
            if not all(isinstance(column, str) for column in named.values()):
                raise ValueError("item, user or time is no column's name")
            if type(length) is not int or not all(table.isidentifier() for table in tables):
                raise ValueError("history_length is no number, or a table no identifier")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = first_line(error)
            raise InputError(f"{path}: not a readable encoding ({reason}); import the log again") from error
        vocabularies = {table: _vocabulary(folder / f"{table}.npy", *sums) for table, sums in tables.items()}
        encoding = cls(entries, vocabularies, content["time_zone"], length, **named)
        try:
            encoding.schema  # noqa: B018  that the fields fit together
        except (KeyError, ValueError) as error:
            reason = first_line(error)
            raise InputError(f"{path}: its fields contradict each other ({reason}); import the log again") from error
        return encoding


def _entry(content: Any) -> FieldEncoding:
    """The reverse of asdict. ValueError or TypeError when it is no field."""
    plain = {field.name: type(field.default) for field in fields(FieldEncoding) if field.default not in (None, ())}
    lists = {"parts": str, "edges": float}
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    entry = FieldEncoding(**made)
    for name, kind in plain.items():
        if kind in (str, int, float, bool) and type(getattr(entry, name)) is not kind:
            raise ValueError(f"{name} of a field is {getattr(entry, name)!r}")
    for name, kind in lists.items():
        if not all(type(value) is kind for value in getattr(entry, name) or ()):
            raise ValueError(f"{name} of a field holds what is no {kind.__name__}")
    sound = math.isfinite(entry.mean) and math.isfinite(entry.scale) and entry.scale > 0 and entry.length >= 0
    if entry.kind not in ("id", "number", "time") or not sound or not set(entry.parts) <= set(PARTS):
        raise ValueError(f"field {entry.name!r} is of no known kind, or its numbers are out of range")
    return entry


def _vocabulary(path: Path, size: int, sha256: str) -> np.ndarray:
    try:
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != sha256:
            raise ValueError(f"it does not match its checksum in {ENCODING_FILE}")
        keys = np.load(path, mmap_mode="r")
        if keys.dtype != np.uint64 or keys.ndim != 1 or (keys[1:] <= keys[:-1]).any():
            raise ValueError("not rising 64-bit keys")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable vocabulary ({first_line(error)}); import the log again") from error
    return keys


class IndexEncoding:
    """The encoding of days that were written as indices (docs/format.md): a raw column is a field of the schema, and
    holds its indices or numbers (:class:`RawEncoding`).

    Args:
        schema: the fields.
        history_length: L.
        item: the field that names an item; by default the one of kind id with the largest table.
    """

    time = ""

    def __init__(self, schema: Schema, history_length: int = 0, item: str | None = None) -> None:
        self.schema, self.history_length = schema, history_length
        self.item = _largest(schema, "item") if item is None else item
        self.user = _largest(schema, "request")

    @property
    def item_field(self) -> str:
        """See :class:`RawEncoding`."""
        return self.item

    def columns(self, side: str) -> dict[str, pa.DataType | None]:
        """See :class:`RawEncoding`."""
        return {f.name: pa.int64() if f.table else pa.float64() for f in self.schema.side(side)}

    def encode(self, side: str, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """See :class:`RawEncoding`."""
        made: dict[str, np.ndarray] = {}
        for field in self.schema.side(side):
            with column_of(columns, field.name, field.name, side) as column:
                if side == "history":
                    flat, counts = flattened(column)
                    values = aligned(_indices(field, flat), counts, self.history_length, 0, latest=True)
                    made["mask"] = np.arange(self.history_length, 0, -1) <= counts[:, None]
                else:
                    values = _indices(field, column)
            made[field.name] = values
        return made

    def save(self, folder: Path) -> None:
        """See :class:`RawEncoding`."""
        content = {"version": _VERSION, "kind": "index", "schema": self.schema.to_json()}
        write_json(folder / ENCODING_FILE, content | {"history_length": self.history_length, "item": self.item})

    @classmethod
    def load(cls, folder: Path) -> "IndexEncoding":
        """What :meth:`save` wrote. InputError when it is damaged."""
        content, schema = plain_encoding(folder, "index", item=str, history_length=int)
        return cls(schema, content["history_length"], content["item"])


def plain_encoding(folder: Path, kind: str, **fields: type) -> tuple[dict[str, Any], Schema]:
    """The content of an encoding.json of this kind that has a schema and these fields. InputError when it has not."""
    path = folder / ENCODING_FILE
    try:
        content = read_json(path, must_have_checksum=True)
        if (content["version"], content["kind"]) != (_VERSION, kind):
            raise ValueError(f"version {content['version']!r} of kind {content['kind']!r}")
        for name, wanted in fields.items():
            if type(content[name]) is not wanted:
                raise ValueError(f"{name} is {content[name]!r}")
        return content, Schema.from_json(content["schema"], str(path))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not a readable encoding ({first_line(error)}); export the run again") from error


def encoding_kind(folder: Path) -> str:
    """The kind of encoding that a folder holds: "learnt", or what plain_encoding's file says. InputError when it is not
    readable."""
    path = folder / ENCODING_FILE
    try:
        return str(read_json(path, must_have_checksum=True).get("kind", "learnt"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable encoding ({first_line(error)}); make it again") from error


def _largest(schema: Schema, side: str) -> str:
    """The field of kind id with the largest table; "" where the side has none."""
    ids = [field for field in schema.side(side) if field.kind == "id" and not field.length]
    return max(ids, key=lambda field: field.size).name if ids else ""


def _indices(field: Field, column: pa.Array) -> np.ndarray:
    """A column of indices or numbers: [n], of a list field [n, G]."""
    if not field.table:
        numbers = numbers_of(column)
        return np.where(np.isnan(numbers), 0, numbers).astype(np.float32)
    if field.length:
        flat, counts = flattened(column)
        return aligned(in_table(field, *integers_of(flat)), counts, field.length, field.padding)
    return in_table(field, *integers_of(column))


def in_table(field: Field, ids: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Indices, int64: those that are missing or beyond the field's table become the unknown one, or padding."""
    other = field.padding if field.unknown is None else field.unknown
    return np.where(missing | (ids < 0) | (ids >= field.size), other, ids)


# ---- raw columns -----------------------------------------------------------------------------------------------------


@contextmanager
def column_of(columns: Mapping[str, pa.Array], name: str, field: str, side: str) -> Iterator[pa.Array]:
    """One of the raw columns, as one array. InputError when it is missing, or the block finds values that its field
    cannot hold."""
    if name not in columns:
        raise InputError(f"column {name}: missing; field {field} of side {side} needs it")
    try:
        yield combined(columns[name])
    except (ValueError, pa.ArrowException) as error:
        raise InputError(f"column {name}: {first_line(error)}; give what the log has") from error


def raw_values(entry: FieldEncoding, column: pa.Array, zone: str) -> np.ndarray:
    """Keys, numbers or times of a column: [n], of a list field [n, G]. ValueError or ArrowException for what its values
    cannot be."""
    if not entry.length:
        return _raw(entry, column, zone)
    flat, counts = flattened(column, entry.separator)
    return aligned(_raw(entry, flat, zone), counts, entry.length, entry.nothing)


def raw_history(entry: FieldEncoding, column: pa.Array, length: int, zone: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a column of lists of events the latest, which stand last: [n, L] or [n, L, G], and how many there were [n]."""
    flat, counts = flattened(column, None if entry.length else entry.separator)
    return aligned(raw_values(entry, flat, zone), counts, length, entry.nothing, latest=True), counts


def _raw(entry: FieldEncoding, column: pa.Array, zone: str) -> np.ndarray:
    if entry.kind == "id":
        return keys_of(column, entry.type)
    return numbers_of(column) if entry.kind == "number" else times_of(column, entry.time_unit, zone)


def combined(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array, and its dictionary, if it has one, looked up."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def flattened(column: pa.Array, separator: str | None = None) -> tuple[pa.Array, np.ndarray]:
    """The values of a column of lists, and how many each has: [n] int64; a missing list is empty."""
    if separator is not None and is_text(column.type):
        empty = pc.fill_null(pc.equal(column, ""), False)
        column = pc.split_pattern(pc.if_else(empty, pa.scalar(None, column.type), column), separator)
    if pa.types.is_null(column.type):
        return column[:0], np.zeros(len(column), np.int64)
    if not any(check(column.type) for check in _LISTS):
        raise ValueError(f"holds {column.type}, not lists (text needs a separator)")
    counts = pc.fill_null(pc.list_value_length(column), 0)
    return combined(column.flatten()), counts.to_numpy(zero_copy_only=False).astype(np.int64)


def aligned(values: np.ndarray, counts: np.ndarray, length: int, nothing: Any, latest: bool = False) -> np.ndarray:
    """Lists of ``counts`` [n] of the values as rows of ``length``: the first values on the left, or the latest, which
    are the last, on the right; ``nothing`` elsewhere."""
    ends = np.cumsum(counts)
    starts = (ends - counts)[:, None]
    wanted = ends[:, None] - np.arange(length, 0, -1) if latest else starts + np.arange(length)
    there = wanted >= starts if latest else wanted < ends[:, None]
    rows = np.full((len(counts), length, *values.shape[1:]), nothing, values.dtype)
    rows[there] = values[wanted[there]]
    return rows


def is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in _TEXT)


def keys_of(column: pa.Array, kind: str) -> np.ndarray:
    """The uint64 keys of a column of "string" or "integer" ids, MISSING where there is none."""
    if pa.types.is_null(column.type):
        return np.full(len(column), MISSING)
    if kind == "string":
        if not is_text(column.type):
            if not pa.types.is_integer(column.type):
                raise ValueError(f"holds {column.type}, not text")
            column = column.cast(pa.string())
        coded = column.dictionary_encode()
        texts = coded.dictionary.to_numpy(zero_copy_only=False).astype(object)
        hashed = hash_array(texts, "utf8", _KEY, categorize=False) if len(texts) else np.zeros(0, np.uint64)
        codes = pc.fill_null(coded.indices, len(texts)).to_numpy(zero_copy_only=False)
        return np.append(_not_reserved(hashed), MISSING)[codes]
    numbers, missing = integers_of(column)
    keys = _not_reserved(hash_array(numbers, categorize=False))
    keys[missing] = MISSING
    return keys


def _not_reserved(keys: np.ndarray) -> np.ndarray:
    return np.minimum(keys, NO_VALUE - np.uint64(1))


def integers_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """int64 values, 0 where there is none, and where that is."""
    if pa.types.is_floating(column.type):  # what pandas makes of integers with gaps
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    elif not any(check(column.type) for check in _WHOLE):
        raise ValueError(f"holds {column.type}, not integers")
    whole = column.cast(pa.int64())
    missing = whole.is_null().to_numpy(zero_copy_only=False)
    return pc.fill_null(whole, 0).to_numpy(zero_copy_only=False), missing


def numbers_of(column: pa.Array) -> np.ndarray:
    """float64, NaN where there is none. ValueError for what is no number, or infinite."""
    kind = column.type
    if not any(check(kind) for check in _NUMBERS):
        raise ValueError(f"holds {kind}, not numbers")
    numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).copy()
    if np.isinf(numbers).any():
        raise ValueError("holds an infinite number")
    numbers[np.isnan(numbers)] = np.nan  # one of the many NaNs
    return numbers + 0.0  # and no negative zero


def times_of(column: pa.Array, unit: str | None, zone: str) -> np.ndarray:
    """int64 microseconds since 1970 UTC, NO_TIME where there is none.

    Numbers are in ``unit`` since 1970; timestamps and ISO texts without a zone of their own are what clocks of ``zone``
    show. ValueError or ArrowException for what is no time of the years 1900 .. 2200.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), NO_TIME)
    if unit is not None:
        times = _times_of_numbers(column, unit)
    elif is_text(kind):
        coded = column.dictionary_encode()
        distinct = times_of(_parsed(coded.dictionary), None, zone)
        codes = pc.fill_null(coded.indices, len(distinct)).to_numpy(zero_copy_only=False)
        return np.append(distinct, NO_TIME)[codes]
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        local = pa.types.is_date(kind) or kind.tz is None
        # Arrow's own conversions need a data base of zones, which not every machine has.
        plain = column.cast(pa.timestamp("ms" if pa.types.is_date(kind) else kind.unit))
        whole, missing = integers_of(plain.cast(pa.int64()))
        times = _microseconds(whole, "ms" if pa.types.is_date(kind) else kind.unit)
        _check_range(times[~missing])
        if local:
            seconds, rest = np.divmod(np.where(missing, 0, times), 1_000_000)
            times = utc_seconds(seconds, time_zone(zone)) * 1_000_000 + rest
        times[missing] = NO_TIME
    else:
        raise ValueError(f"holds {kind}, not times (numbers need a time_unit)")
    _check_range(times[times != NO_TIME])
    return times


def _times_of_numbers(column: pa.Array, unit: str) -> np.ndarray:
    if pa.types.is_floating(column.type):
        numbers = numbers_of(column)
        missing = np.isnan(numbers)
        limit = MAX_SECONDS * 1e6 / TIME_UNITS[unit] + 1
        times = np.rint(np.clip(np.where(missing, 0, numbers), -limit, limit) * TIME_UNITS[unit]).astype(np.int64)
    elif pa.types.is_integer(column.type):
        whole, missing = integers_of(column)
        times = _microseconds(whole, unit)
    else:
        raise ValueError(f"holds {column.type}, not numbers (time_unit is for numbers only)")
    times[missing] = NO_TIME
    return times


def _microseconds(whole: np.ndarray, unit: str) -> np.ndarray:
    if unit == "ns":
        return whole // 1000
    limit = np.iinfo(np.int64).max // int(TIME_UNITS[unit])
    return np.clip(whole, -limit, limit) * int(TIME_UNITS[unit])


def _parsed(texts: pa.Array) -> pa.Array:
    """ISO texts as timestamps: all with an offset, or all without."""
    try:
        return texts.cast(pa.timestamp("ns", "UTC"))
    except pa.ArrowInvalid:
        return texts.cast(pa.timestamp("ns"))


def _check_range(times: np.ndarray) -> None:
    seconds = times // 1_000_000
    if seconds.size and (seconds.min() < MIN_SECONDS or seconds.max() >= MAX_SECONDS):
        raise ValueError("holds a time outside the years 1900 to 2200")


# ---- what models take ------------------------------------------------------------------------------------------------


def indices_of(vocabulary: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The table's rows of keys, of any shape: int64."""
    if not len(vocabulary):
        return np.where(keys == NO_VALUE, PADDING, UNKNOWN)
    found = np.searchsorted(vocabulary, keys)
    known = vocabulary[np.minimum(found, len(vocabulary) - 1)] == keys
    rows = np.where(known, found + FIRST, UNKNOWN)
    rows[keys == NO_VALUE] = PADDING
    return rows


def parts_of(times: np.ndarray, parts: Sequence[str], zone: str) -> list[np.ndarray]:
    """The rows, int64, of parts of a time in the zone: FIRST + the part, counted from 0 (Monday is 0)."""
    missing = times == NO_TIME
    local = local_seconds(np.where(missing, 0, times // 1_000_000), time_zone(zone))
    months = local.astype("datetime64[s]").astype("datetime64[M]")
    values: dict[str, Callable[[], np.ndarray]] = {
        "month": lambda: months.astype(np.int64) % 12,
        "day": lambda: local // 86_400 - months.astype("datetime64[D]").astype(np.int64),
        "weekday": lambda: (local // 86_400 + 3) % 7,  # 1970-01-01 was a Thursday
        "hour": lambda: local // 3600 % 24,
        "minute": lambda: local // 60 % 60,
    }
    return [np.where(missing, UNKNOWN, FIRST + values[part]()) for part in parts]


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence."""
    return str(error).partition("\n")[0][:300]
