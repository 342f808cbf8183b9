"""Tables of raw rows: Parquet, CSV or Feather files, read a piece at a time; and the items of a log as such a table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from deep_components.cascade import Cascade
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.encoding import first_line
from deep_components.dataset.importers.recflow import LOG_COLUMN, RecFlowLog, item_rows, raw_ids
from deep_components.dataset.importers.table.mapping import FORMATS, Groups, LogMapping, Rows
from deep_components.dataset.importers.table.source import Piece, Source, batches, open_source
from deep_components.dataset.log import Log
from deep_components.errors import InputError

ROWS_PER_PIECE = 1 << 16
_REQUESTS_PER_PIECE = 1 << 13


@dataclass(frozen=True)
class RawRows:
    """A table that can be read again and again.

    Attributes:
        name: of the file or folder, for errors.
        schema: its columns and their types.
        read: columns -> pieces of at most ROWS_PER_PIECE rows; InputError when a file is damaged.
    """

    name: str
    schema: pa.Schema
    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The columns (None: all), of the types of the schema. InputError where a value does not fit its column."""
        names = self.schema.names if columns is None else list(columns)
        wanted = pa.schema([self.schema.field(name) for name in names])
        for piece in self.read(names):
            try:
                yield piece.select(names).cast(wanted)
            except pa.ArrowException as error:
                raise InputError(
                    f"{self.name}: {first_line(error)}; write its columns with one type in all files"
                ) from error


def open_rows(path: Path, option: str, types: Mapping[str, pa.DataType | None] | None = None) -> RawRows:
    """The rows of a Parquet, CSV or Feather file, or of all such files of a folder, in the order of their names.

    Args:
        option: the command's option that names it, for errors.
        types: of columns of CSV files; other columns of them are text.

    Raises:
        InputError: it is not there, or holds no table.
    """
    if not path.exists():
        raise InputError(f"{option}={path}: no such file; name a file of {', '.join(FORMATS)}, or a folder of them")
    if path.is_file() and path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{option}={path}: its ending is none of {', '.join(FORMATS)}; write it in one of these formats"
        )
    mapping = LogMapping(Path(), Rows(str(path), "", "", ""), Groups(()), ())
    source = open_source(mapping, {})
    for problem in source.problems:
        raise InputError(problem)
    names = [name for name in source.files[0].types if all(name in file.types for file in source.files)]
    csv = {name: (types or {}).get(name) or pa.string() for name in names}

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for piece in source.pieces():
            yield from _batches(mapping, piece, {name: csv[name] for name in columns})

    return RawRows(str(path), _schema(path, mapping, source, csv), read)


def _batches(mapping: LogMapping, piece: Piece, columns: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    for batch in batches(mapping, piece, columns, ROWS_PER_PIECE):
        yield pa.record_batch(batch)


def _schema(path: Path, mapping: LogMapping, source: Source, columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """The types that hold what all files have, by the first rows of each."""
    firsts = (next(_batches(mapping, Piece(file, 0, 1), columns), None) for file in source.files if file.pieces)
    schemas = [batch.schema for batch in firsts if batch is not None]
    if not schemas:
        raise InputError(f"{path}: holds no row; write its rows into it")
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{path}: {first_line(error)}; write its columns with one type in all files") from error


def items_of_log(log: Log, cascade: Cascade) -> RawRows:
    """The items of all days of a log, an item as often as it is there: of RecFlow's layout as its files have them, of a
    log in the columnar format their indices. InputError when a file cannot be read, or the log's raw values are lost.
    """

    def pieces() -> Iterator[pa.RecordBatch]:
        if isinstance(log, RecFlowLog):
            yield from item_rows(log)
            return
        for name in log.days():
            yield from _items_of_day(log.open_day(name, cascade))

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return (piece.select(columns) for piece in pieces())

    _check_raw(log, "--corpus", "items")
    return RawRows(str(log.folder), next(pieces()).schema, read)


def requests_of_log(log: Log, cascade: Cascade, cache_dir: Path | None, zone: str) -> RawRows:
    """The requests of all days of a log, from the oldest to the latest, a row each: the request's raw columns but for
    its time, and "history", a list of events. Errors as of :func:`items_of_log`."""

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for name in log.days():
            for piece in _requests_of_day(log.open_day(name, cascade, cache_dir, zone), isinstance(log, RecFlowLog)):
                yield piece.select(columns)

    _check_raw(log, "--requests", "requests")
    first = _requests_of_day(log.open_day(log.days()[0], cascade, cache_dir, zone), isinstance(log, RecFlowLog))
    return RawRows(str(log.folder), next(first).schema, read)


def _check_raw(log: Log, option: str, rows: str) -> None:
    """InputError where the log has lost its raw values."""
    if log.encoding_checksum is not None:
        raise InputError(
            f"{log.folder}: holds indices that were made of raw values; give a table of the {rows} with {option}: the "
            "one that the log was imported from will do"
        )


def _requests_of_day(day: DayCache, recflow: bool) -> Iterator[pa.RecordBatch]:
    """In the order of their time, as far as the log's fields tell."""
    order = np.arange(len(day))
    if recflow:
        order = np.lexsort((day.columns["request.minute"], day.columns["request.hour"]))

    def columns(side: str, rows: np.ndarray, there: np.ndarray | None = None) -> dict[str, pa.Array]:
        made = {}
        for field in day.schema.side(side):
            values = day.columns[f"{side}.{field.name}"][rows]
            values = values if there is None else values[there]
            if not recflow:
                made[field.name] = _array(values, field.length)
            elif field.name in LOG_COLUMN:
                made[LOG_COLUMN[field.name]] = pa.array(raw_ids(field.name, values))
        return made

    for first in range(0, len(day), _REQUESTS_PER_PIECE):
        rows = order[first : first + _REQUESTS_PER_PIECE]
        made = columns("request", rows)
        if day.schema.side("history"):
            mask = day.columns["history.mask"][rows]
            events = columns("history", rows, mask)
            offsets = pa.array(np.concatenate([[0], np.cumsum(mask.sum(axis=1))]), pa.int32())
            structs = pa.StructArray.from_arrays(list(events.values()), list(events))
            made["history"] = pa.ListArray.from_arrays(offsets, structs)
        yield pa.record_batch(made)


def _items_of_day(day: DayCache) -> Iterator[pa.RecordBatch]:
    fields = {field.name: day.columns[f"item.{field.name}"] for field in day.schema.side("item")}
    mask = day.columns.get("item.mask")
    step = ROWS_PER_PIECE if mask is None else max(1, ROWS_PER_PIECE // max(mask.shape[1], 1))
    for first in range(0, len(next(iter(fields.values()))), step):
        rows = slice(first, first + step)
        there = slice(None) if mask is None else np.asarray(mask[rows])
        columns = {name: values[rows][there] for name, values in fields.items()}
        yield pa.record_batch(
            {field.name: _array(columns[field.name], field.length) for field in day.schema.side("item")}
        )


def _array(values: np.ndarray, length: int) -> pa.Array:
    flat = values if values.dtype == np.float32 else values.astype(np.int64)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), length) if length else pa.array(flat)
