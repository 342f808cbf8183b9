"""What a feature store is filled with: each user's latest request, from a table of requests or from a log."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deep_components.cascade import Cascade
from deep_components.cli import nearest
from deep_components.dataset.encoding import RawEncoding, combined, first_line
from deep_components.dataset.log import load_encoding, open_log
from deep_components.dataset.rows import RawRows, open_rows, requests_of_log
from deep_components.errors import InputError
from deep_components.serving import bundle
from deep_components.serving.features import HISTORY, Record, User

_RECORDS_AT_A_TIME = 500


def latest_requests(
    folder: Path,
    requests: Path | None = None,
    data_dir: Path | None = None,
    user: str = "",
    cache_dir: Path | None = None,
) -> Iterator[dict[User, Record]]:
    """The latest request of each user, some users at a time: its raw fields but for the time, and its history.

    Args:
        folder: of the bundle whose models will be served, which says what the raw columns are.
        requests: a table of requests, Parquet, CSV or Feather. ``data_dir``: instead of it a log whose raw values can
            be made of its indices, of RecFlow's layout or one of indices.
        user: the column that names a user, where the encoding does not say.

    Raises:
        InputError: the bundle, the table or the log cannot be used: mostly before anything is given.
    """
    path = folder / bundle.VERSIONS / bundle.current_version(folder)
    manifest, encoding = bundle.read_manifest(path), load_encoding(path / bundle.ENCODING)
    if requests is not None:
        types = {**encoding.columns("request"), **encoding.columns("history")}
        return latest_of_rows(open_rows(requests, "--requests", types), encoding, user)
    assert data_dir is not None
    log = open_log(data_dir)
    if log.schema.checksum != encoding.schema.checksum:
        raise InputError(f"{data_dir}: its fields or id counts differ from those of the bundle; name the run's log")
    cascade = Cascade.from_json(manifest["cascade"], str(path / bundle.MANIFEST_FILE))
    return latest_of_rows(requests_of_log(log, cascade, cache_dir, manifest["zone"]), encoding, user)


def latest_of_rows(rows: RawRows, encoding: RawEncoding, user: str = "") -> Iterator[dict[User, Record]]:
    """The same of any table. Only its users and times are held in memory at once."""
    user = user or encoding.user
    if not user:
        raise InputError("no column is known to name a user; give it with --user")
    if user not in rows.schema.names:
        near = nearest(user, rows.schema.names)
        raise InputError(f"{rows.name}: has no column {user}, which names a user{near}; give it with --user")
    columns = _Columns(rows.schema, encoding, user)
    latest = _latest(rows, user, encoding.time if encoding.time in rows.schema.names else "")

    def records() -> Iterator[dict[User, Record]]:
        first = 0
        for piece in rows.pieces(columns.names):
            chosen = piece.filter(pa.array(latest[first : first + len(piece)]))
            first += len(piece)
            for start in range(0, len(chosen), _RECORDS_AT_A_TIME):
                some = chosen.slice(start, _RECORDS_AT_A_TIME).to_pylist()
                yield {row[user]: columns.record(rows.name, row) for row in some}

    return records()


class _Columns:
    """Which columns of a table make a record."""

    def __init__(self, schema: pa.Schema, encoding: RawEncoding, user: str) -> None:
        there = set(schema.names)
        # Not the request's time, as that of the next request is another one.
        self.fields = [name for name in {user: None, **encoding.columns("request")} if name in there - {encoding.time}]
        entries = getattr(encoding, "entries", ())
        self.separators = {e.column: e.separator for e in entries if e.side == "history" and not e.length}
        events = [name for name in encoding.columns("history") if name in there - {HISTORY, *self.fields}]
        self.events = [name for name in events if self._is_listed(name, schema.field(name).type)]
        self.whole = HISTORY in there  # one column of events
        self.names = [*self.fields, *([HISTORY] if self.whole else self.events)]

    def _is_listed(self, name: str, kind: pa.DataType) -> bool:
        """A column of candidates may have the name of one of events, where histories were derived from them."""
        return pa.types.is_list(kind) or pa.types.is_large_list(kind) or self.separators.get(name) is not None

    def record(self, source: str, row: Mapping[str, Any]) -> Record:
        """InputError where lists of events differ in length."""
        fields = {name: _without_nan(row[name]) for name in self.fields}
        if self.whole:
            return fields | {HISTORY: _without_nan(row[HISTORY] or [])}
        lists = {name: self._list(name, row[name]) for name in self.events}
        if len({len(values) for values in lists.values()}) > 1:
            listed = ", ".join(f"{len(values)} of {name}" for name, values in lists.items())
            raise InputError(f"{source}: the lists of events of {fields} differ in length ({listed}); give all of each")
        events = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        return fields | {HISTORY: _without_nan(events)}

    def _list(self, name: str, value: Any) -> Sequence[Any]:
        separator = self.separators.get(name)
        if isinstance(value, str) and separator is not None:
            return value.split(separator) if value else []
        return value or []


def _without_nan(value: Any) -> Any:
    """None for NaN, which JSON does not have and which is as good as missing."""
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and value != value else value


def _latest(rows: RawRows, user: str, time: str) -> np.ndarray:
    """[rows] bool: the latest row of each user, by ``time``, without one the last; rows without a user are none."""
    columns = [user, time] if time else [user]
    table = pa.Table.from_batches(rows.pieces(columns), pa.schema([rows.schema.field(name) for name in columns]))
    try:
        codes = pc.fill_null(combined(table.column(user)).dictionary_encode().indices, -1).to_numpy()
        order = np.arange(len(table))
        if time:
            table = table.append_column("", pa.array(order)).rename_columns(["user", "time", "row"])
            keys = [("time", "ascending", "at_start"), ("row", "ascending")]
            order = pc.sort_indices(table, sort_keys=keys).to_numpy()
    except (TypeError, pa.ArrowException) as error:
        raise InputError(f"{rows.name}: column {time or user}: {first_line(error)}; give ids, and times") from error
    last = np.full(codes.max(initial=-1) + 2, -1)
    last[codes[order]] = order  # of several rows of a user the last assignment stays
    chosen = np.zeros(len(table), bool)
    chosen[last[:-1]] = True  # the code -1 is last's last entry
    return chosen
