"""The public input format: a day of a log as one .npy file a column, memory-mapped when read (docs/format.md).

A day is a folder of columns and ``meta.json``, which holds the schema, and size and SHA-256 of every file. Importers,
a user's own script among them, write days with :func:`write_day`; nothing here knows where data came from. Files are
untrusted: :func:`read_day` compares shapes, types, checksums and the range of every value with the schema, so that no
index it hands out lies outside its table.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deep_components.batch import CascadeBatch, Features, Targets
from deep_components.cascade import Cascade
from deep_components.errors import InputError
from deep_components.files import npy_header, read_json, regular, sha256_of, write_json
from deep_components.schema import SIDES, Schema
from deep_components.tables.id_set import IdSet

FORMAT_VERSION = 3
META_FILE = "meta.json"
VERIFIED = "LCRON_VERIFIED_DAYS"  # environment variable: the days that this process or a parent of it has verified
_ID_SETS = "ids."
_LABEL, _OPTIONAL, _OFFSET = "item.label", "item.group", "item.offset"
REPEATED = "items that equal another of their request in every field, kept"  # in ``repairs``
ABSENT = np.uint64((1 << 64) - 1)  # the digest of a missing item
_MAX_SIZE = 1 << 32  # rows of a table
_MAX_LABEL = 1 << 24  # float32, in which losses take labels for gains, has all whole numbers up to it
_ROWS_PER_PIECE = 1 << 13
_BYTES_PER_READ = 1 << 20
_JUST_WRITTEN = 100_000_000  # nanoseconds: a file system's clock may not tell apart what is written within them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """What a column consists of: one value, or a list of ``length``, for each element of its side, below ``limit``
    where there is one."""

    side: str  # "request" [R], "history" [R, L], "item" [R, N], in a ragged day [T], or "offset" [R + 1]
    dtypes: tuple[np.dtype, ...]  # any of these; a writer converts to the first
    limit: int | None = None
    length: int = 0


def columns_of(schema: Schema, ragged: bool = False) -> dict[str, Column]:
    """Name -> column, of all columns of a day; item.group may be absent, but not in a ragged day, whose requests have
    lists of items of varying length."""
    columns = {"request_id": Column("request", (np.dtype(np.int64),))}
    for entry in schema.fields:
        if entry.size > _MAX_SIZE:
            raise InputError(f"field {entry.name} of side {entry.side}: size {entry.size} is above {_MAX_SIZE}")
        kind = np.min_scalar_type(entry.size - 1) if entry.table else np.dtype(np.float32)
        limit = entry.size if entry.table else None
        columns[f"{entry.side}.{entry.name}"] = Column(entry.side, (kind,), limit, entry.length)
    columns |= {f"{side}.mask": Column(side, (np.dtype(np.bool_),), 2) for side in ("history", "item")}
    if ragged:
        del columns["item.mask"]
        columns[_OFFSET] = Column("offset", (np.dtype(np.int64),))
    columns[_LABEL] = Column("item", (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.int16)))
    columns[_OPTIONAL] = Column("item", (np.dtype(np.uint8),))
    return columns


@dataclass(frozen=True)
class DayCache:
    """One opened day. ``columns`` are memory maps whose first dimension is the request, in file order; those of the
    items of a ragged day have the items of all requests, one after another, as ``item.offset`` divides them.

    ``repairs`` counts what its importer left out or repaired; ``checksum`` is the SHA-256 of what the day holds, the
    same wherever it lies.
    """

    day: str
    columns: Mapping[str, np.ndarray]
    schema: Schema
    group: np.ndarray  # [N] int64: the group of each item slot, where there is no column of groups
    history_length: int  # this many of the last history positions are handed out
    repairs: Mapping[str, int] = field(default_factory=dict)
    checksum: str = ""
    id_bits: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["request_id"])

    @property
    def num_items(self) -> int:
        """The most items that a request of the day has, masked ones included."""
        return self.longest(np.arange(len(self)))

    def longest(self, requests: np.ndarray) -> int:
        """N of a batch of these requests: all have as many items, or it is the longest of their lists, at least 1."""
        if _OFFSET in self.columns:
            return int(_counts(self.columns[_OFFSET], requests).max(initial=1))
        return int(self.columns["item.mask"].shape[1])

    def ids(self, table: str, requests: slice | None = None) -> IdSet:
        """The indices of a table that the day uses, or a range of its ``requests``, and its padding index, that of
        unknown ids, and 0."""
        bits = self.id_bits.get(table) if requests is None else None
        return _used_ids(self.schema, table, self.columns, requests) if bits is None else IdSet(bits)

    def with_history(self, length: int | None) -> "DayCache":
        """The same day with the last ``length`` history positions, None = all; InputError when it has fewer."""
        there = self.columns["history.mask"].shape[1]
        if length is not None and length > there:
            raise InputError(f"--seq_len={length}: the histories of the log have {there} positions")
        return replace(self, history_length=there if length is None else length)

    def batch(self, requests: np.ndarray, num_items: int | None = None) -> CascadeBatch[Features]:
        """The requests at the given positions, all N items at once. Lists of varying length are padded to the longest
        of them, or to ``num_items``; an item that is padding is masked, and its fields are the padding index or 0."""
        if _OFFSET in self.columns:
            rows, mask = self._lists(requests, num_items)
            sides = {side: self._side(side, requests) for side in ("request", "history")}
            padding = {entry.name: entry.padding for entry in self.schema.side("item")}
            item = self._side("item", rows)
            sides["item"] = {name: _padded(values, mask, padding[name]) for name, values in item.items()}
            labels, group = (_padded(self._values(name, rows), mask, 0) for name in (_LABEL, _OPTIONAL))
        else:
            sides = {side: self._side(side, requests) for side in SIDES}
            labels, mask = self._values(_LABEL, requests), self._values("item.mask", requests)
            group = (
                self._values(_OPTIONAL, requests)
                if _OPTIONAL in self.columns
                else torch.from_numpy(self.group).expand(len(requests), -1)
            )
        features = Features(**sides, history_mask=self._values("history.mask", requests))
        return CascadeBatch(self._values("request_id", requests), features, Targets(labels, mask, group))

    @property
    def num_item_rows(self) -> int:
        """Of the items of all requests, missing ones included, one request after another."""
        return len(self._item_column(_LABEL))

    def item_digests(self, requests: np.ndarray) -> np.ndarray:
        """:meth:`row_digests` of the items of the requests. [B, N] uint64."""
        slots = np.arange(self.longest(requests))
        if _OFFSET not in self.columns:
            return self.row_digests(requests[:, None] * len(slots) + slots)
        offset = self.columns[_OFFSET]
        rows = np.minimum(offset[requests][:, None] + slots, self.num_item_rows - 1)
        return np.where(slots < _counts(offset, requests)[:, None], self.row_digests(rows), ABSENT)

    def row_digests(self, rows: np.ndarray) -> np.ndarray:
        """64 bits for each of these item rows, the same for items that are equal in every field, ``ABSENT`` for missing
        ones. uint64, of the shape of ``rows``."""
        columns = {name: self._item_column(name) for name in self.columns if name.startswith("item.")}
        digest, _ = _item_digests(self.schema, columns, rows)
        return np.where(columns["item.mask"][rows], digest, ABSENT) if "item.mask" in columns else digest

    def items(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Field -> its values of these item rows, of the shape of ``rows``; of a list field with one more axis."""
        names = [entry.name for entry in self.schema.side("item")]
        return {name: _as_tensor(self._item_column(f"item.{name}")[rows]) for name in names}

    def _item_column(self, name: str) -> np.ndarray:
        """A column of the items with a row an item."""
        column = self.columns[name]
        return column if _OFFSET in self.columns else column.reshape(-1, *column.shape[2:])

    def _lists(self, requests: np.ndarray, num_items: int | None) -> tuple[np.ndarray, torch.Tensor]:
        """Of a ragged day, the rows of the requests' items, one request after another, and the mask [B, N]."""
        offset = self.columns[_OFFSET]
        slots = np.arange(self.longest(requests) if num_items is None else num_items)
        return _item_rows(offset, requests), torch.from_numpy(slots < _counts(offset, requests)[:, None])

    def _side(self, side: str, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {entry.name: self._values(f"{side}.{entry.name}", rows) for entry in self.schema.side(side)}

    def _values(self, name: str, rows: np.ndarray) -> torch.Tensor:
        column = self.columns[name]
        values = column[rows]
        if name.startswith("history."):
            values = values[:, column.shape[1] - self.history_length :]
        return _as_tensor(values)


def _as_tensor(values: np.ndarray) -> torch.Tensor:
    """Truth values and numbers as they are, all else as int64."""
    kept = values.dtype if values.dtype in (np.bool_, np.float32) else np.int64
    return torch.from_numpy(np.ascontiguousarray(values, kept))


def _counts(offset: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """How many items each of the requests has."""
    return offset[requests + 1] - offset[requests]


def _item_rows(offset: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """The rows of the items of these requests, one request after another."""
    counts = _counts(offset, requests)
    before = np.cumsum(counts) - counts
    return np.repeat(offset[requests] - before, counts) + np.arange(counts.sum())


def _padded(values: torch.Tensor, mask: torch.Tensor, padding: int) -> torch.Tensor:
    """[B, N, ...] with ``values`` [items present, ...] where ``mask`` [B, N] is True, in their order, else padding."""
    whole = values.new_full((*mask.shape, *values.shape[1:]), padding)
    whole[mask] = values
    return whole


def _used_ids(schema: Schema, name: str, columns: Mapping[str, np.ndarray], requests: slice | None = None) -> IdSet:
    """The indices of table ``name`` in the columns, or in those of some ``requests``, its padding index, that of
    unknown ids, and 0."""
    table = schema.tables[name]
    always = np.array([0, table.padding, table.padding if table.unknown is None else table.unknown])
    rows = dict.fromkeys(SIDES, requests or slice(None))
    if requests is not None and _OFFSET in columns:
        rows["item"] = slice(*(int(columns[_OFFSET][at]) for at in (requests.start, requests.stop)))
    used = [columns[f"{entry.side}.{entry.name}"][rows[entry.side]] for entry in schema.fields if entry.table == name]
    pieces = (part[k : k + _ROWS_PER_PIECE] for part in used for k in range(0, len(part), _ROWS_PER_PIECE))
    return IdSet.of((always, *pieces), table.size)


def repeated_items(schema: Schema, columns: Mapping[str, np.ndarray]) -> int:
    """How many items of the day equal one before them in their request, in every field: no model tells them apart.

    Items with an id that stands for unknown ones do not count: they may well be different.
    """
    offset, total = columns.get(_OFFSET), 0
    requests = len(columns["request_id"])
    for first in range(0, requests, _ROWS_PER_PIECE):
        last = min(first + _ROWS_PER_PIECE, requests)
        rows = slice(first, last) if offset is None else slice(int(offset[first]), int(offset[last]))
        digest, known = _item_digests(schema, columns, rows)
        if offset is None:
            known &= columns["item.mask"][rows]
            request = np.broadcast_to(np.arange(first, last)[:, None], known.shape)
        else:
            request = np.repeat(np.arange(first, last), np.diff(offset[first : last + 1]))
        digest, request = digest[known], request[known]
        order = np.lexsort((digest, request))
        digest, request = digest[order], request[order]
        total += int(((digest[1:] == digest[:-1]) & (request[1:] == request[:-1])).sum())
    return total


def _item_digests(
    schema: Schema, columns: Mapping[str, np.ndarray], rows: slice | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit digest of all fields of each item in the rows, and whether none of its ids stands for unknown ones."""
    shape = columns[_LABEL][rows].shape
    digest, known = np.zeros(shape, np.uint64), np.ones(shape, bool)
    for entry in schema.side("item"):
        values = columns[f"item.{entry.name}"][rows].reshape(*shape, -1)
        if entry.unknown is not None:
            known &= (values != entry.unknown).all(axis=-1)
        values = values.view(np.uint32) if values.dtype.kind == "f" else values
        for one in np.moveaxis(values, -1, 0):  # a list field has several
            digest = (digest ^ (digest >> np.uint64(29)) ^ one.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    return digest, known


# ---- writing ---------------------------------------------------------------------------------------------------------


class ColumnFiles:
    """The columns of one day, written whole or piece by piece; made by :func:`write_day`.

    A file is mapped only while a piece is written, so that the pages of the whole day never count as memory; its space
    on the disk is reserved first, so that a full disk is an OSError and not a SIGBUS. ``requests`` is R, the rows of
    every column, but for the items' columns in a ragged day, whose rows ``offset`` [R + 1] divides among the requests;
    ``repairs`` counts what the importer left out or repaired, which a user sees on each opening.
    """

    def __init__(self, folder: Path, schema: Schema, requests: int, offset: np.ndarray | None = None) -> None:
        self.folder, self.schema, self.requests = folder, schema, requests
        self.repairs: dict[str, int] = {}
        self._columns = columns_of(schema, ragged=offset is not None)
        self._offset = None if offset is None else self._converted(_OFFSET, np.asarray(offset))
        if self._offset is not None:
            _check_offset(folder, self._offset, requests)
        self._layouts: dict[str, dict[str, Any]] = {}  # column -> where in its file what lies, as np.memmap takes it

    def write(self, name: str, values: np.ndarray, rows: np.ndarray | slice = slice(None)) -> None:
        """Put ``values`` at the ``rows`` of column ``name``; rows never written are zero.

        Raises InputError when the schema has no such column or it cannot hold the values, OSError on a full disk.
        """
        values = self._converted(name, values)
        path = self.folder / f"{name}.npy"
        if name not in self._layouts:
            shape = (self._rows(name), *values.shape[1:])
            new = np.lib.format.open_memmap(path, mode="w+", dtype=values.dtype, shape=shape)
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            self._layouts[name] = {"offset": new.offset, "shape": new.shape, "dtype": new.dtype}
        np.memmap(path, mode="r+", **self._layouts[name])[rows] = values

    def _rows(self, name: str) -> int:
        if self._offset is None or not name.startswith("item."):
            return self.requests
        return len(self._offset) if name == _OFFSET else int(self._offset[-1])

    def _converted(self, name: str, values: np.ndarray) -> np.ndarray:
        """The values in the column's type. InputError when that would change them."""
        column = self._columns.get(name)
        if column is None:
            raise InputError(f"column {name}: not in the schema, whose columns are {', '.join(self._columns)}")
        if values.dtype in column.dtypes:
            return values
        dtype = column.dtypes[0]
        if values.dtype.kind not in ("iuf" if dtype.kind == "f" else "iub"):
            raise InputError(f"column {name}: values of type {values.dtype}, not {dtype}; convert them first")
        if dtype.kind != "f" and values.size:
            low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            wrong = values[(values < low) | (values > high)]
            if wrong.size:
                raise InputError(f"column {name}: holds {wrong[0]}, outside the {low} .. {high} that it can")
        return values.astype(dtype)

    def keep(self, rows: np.ndarray) -> None:
        """Leave only these requests (positions, rising) in every column written so far."""
        before, self._layouts, self.requests = self._layouts, {}, len(rows)
        offset = self._offset
        if offset is not None:
            self._offset = np.concatenate([[0], np.cumsum(np.diff(offset)[rows])])
        for name, layout in before.items():
            path, done = self.folder / f"{name}.npy", 0
            old = path.rename(path.with_suffix(".old"))
            for first in range(0, len(rows), _ROWS_PER_PIECE):
                chosen = rows[first : first + _ROWS_PER_PIECE]
                if offset is not None and name.startswith("item."):
                    chosen = _item_rows(offset, chosen)
                values = np.memmap(old, mode="r", **layout)[chosen]
                self.write(name, values, slice(done, done + len(values)))
                done += len(values)
            old.unlink()

    def finish(self, made_from: Mapping[str, Any]) -> None:
        """Check the columns, and write beside them which ids they use and meta.json."""
        if self._offset is not None:
            self.write(_OFFSET, self._offset)
        optional = {_OPTIONAL} if self._offset is None else set()
        missing = sorted(self._columns.keys() - self._layouts.keys() - optional)
        if missing:
            raise InputError(f"column {missing[0]}: not written; a day needs every column of its schema")
        columns = {name: _mapped(self.folder, name) for name in self._layouts}
        _check_shapes(self.folder, self.schema, columns)
        files = {}
        for name, column in columns.items():
            sha256 = _check_values(self.folder, name, column, self._columns[name])
            files[f"{name}.npy"] = {"size": (self.folder / f"{name}.npy").stat().st_size, "sha256": sha256}
        # Tables need no rows for other ids; a reader need not look for them in all columns.
        for table in {entry.table: None for entry in self.schema.fields if entry.kind == "id"}:
            path = self.folder / f"{_ID_SETS}{table}.npy"
            np.save(path, _used_ids(self.schema, table, columns).bits)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        if repeated := repeated_items(self.schema, columns):
            self.repairs[REPEATED] = repeated
        meta = {"format": FORMAT_VERSION, "schema": self.schema.to_json(), "made_from": made_from}
        write_json(self.folder / META_FILE, meta | {"repairs": self.repairs, "files": files})


@contextmanager
def write_day(
    folder: Path,
    schema: Schema,
    requests: int,
    made_from: Mapping[str, Any] | None = None,
    offset: np.ndarray | None = None,
) -> Iterator[ColumnFiles]:
    """Write a day: the block fills every column of ``schema``, and the finished day is renamed to ``folder``::

        with write_day(Path("log/2024-01-13"), schema, requests=1000) as day:
            day.write("item.video", videos)  # [1000, N]

    With ``offset`` [requests + 1], rising from 0 to T, the day is ragged: request r has the rows offset[r] ..
    offset[r + 1] of the T rows of every column of the items.

    When the block fails, nothing is left. Raises InputError when the folder is there already, or a column is missing or
    does not fit the schema; OSError when the folder cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder}: is there already; remove it or write the day elsewhere")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        files = ColumnFiles(temporary, schema, requests, offset)
        yield files
        files.finish(made_from or {})
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _note_verified(folder)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_day(folder: Path, day: str, cascade: Cascade, made_from: Mapping[str, Any] | None = None) -> DayCache:
    """Open the day in ``folder``, as :func:`write_day` leaves it; its columns are mapped, and keep no file open.

    The content is verified once a tree of processes: a day that this process or a parent has verified, and whose files
    still have the same inodes, sizes and times, is not read through again. A request must have the cascade's N items
    (in a ragged day at most N), any number where its groups have no sizes; and the day must say that it was made from
    ``made_from`` (None = anything).

    Raises InputError when a file is missing, damaged, or does not fit the schema or the cascade.
    """
    meta = _read_meta(folder)
    schema = Schema.from_json(meta["schema"], str(folder / META_FILE))
    if made_from is not None and meta["made_from"] != json.loads(json.dumps(made_from)):
        raise InputError(f"{folder / META_FILE}: was made from something else; make the day again")
    columns, id_bits = _open_columns(folder, schema, meta["files"])
    _check_shapes(folder, schema, columns, cascade)
    _verify(folder, schema, columns, id_bits, meta["files"])
    for repair, count in meta["repairs"].items():
        if count:
            logger.warning("%s: %s: %d", day, repair, count)
    checksum, length = _checksum(meta), columns["history.mask"].shape[1]
    return DayCache(day, columns, schema, cascade.group_of_item, length, meta["repairs"], checksum, id_bits)


def checksum_of(folder: Path) -> str:
    """``checksum`` of the day in ``folder`` by its meta.json alone. InputError as in :func:`read_day`."""
    return _checksum(_read_meta(folder))


def _checksum(meta: Mapping[str, Any]) -> str:
    contents = json.dumps({name: file["sha256"] for name, file in meta["files"].items()}, sort_keys=True)
    return hashlib.sha256(contents.encode()).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, with the keys that it must have."""
    path = folder / META_FILE
    try:
        meta = read_json(path, must_have_checksum=True)
        if meta["format"] != FORMAT_VERSION:
            raise InputError(f"{path}: format {meta['format']!r}, not {FORMAT_VERSION}; make the day again")
        if not all(type(count) is int for count in meta["repairs"].values()):
            raise ValueError("repairs holds what is no count")
        sums = all((type(file["size"]), type(file["sha256"])) == (int, str) for file in meta["files"].values())
        if not sums or "made_from" not in meta or "schema" not in meta:
            raise ValueError("made_from, schema, or size and sha256 of a file are missing")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); make the day again, see docs/format.md") from error
    return meta


def schema_of(folder: Path) -> Schema:
    """The schema of the day in ``folder``. InputError as in :func:`read_day`."""
    return Schema.from_json(_read_meta(folder)["schema"], str(folder / META_FILE))


def history_length_of(folder: Path) -> int:
    """L of the day in ``folder``. InputError as in :func:`read_day`."""
    return int((*_mapped(folder, "history.mask").shape, 0, 0)[1])


def _open_columns(
    folder: Path, schema: Schema, files: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(columns, sets of ids) of a day whose files are just those that it must and may have."""
    ragged = f"{_OFFSET}.npy" in files
    names = list(columns_of(schema, ragged))
    id_sets = [f"{_ID_SETS}{table}" for table in schema.tables]
    must = {f"{name}.npy" for name in names if ragged or name != _OPTIONAL}
    may = must | {f"{name}.npy" for name in (_OPTIONAL, *id_sets)}
    there = {path.name for path in folder.iterdir()}
    for name in sorted((must - there) | (set(files) - there)):
        raise InputError(f"{folder / name}: no such file; make the day again, see docs/format.md")
    for name in sorted((there - {META_FILE}) ^ set(files) | (set(files) - may)):
        raise InputError(f"{folder / name}: not a file that {META_FILE} and its schema name; make the day again")
    columns = {name: _mapped(folder, name) for name in names if f"{name}.npy" in files}
    id_bits = {name.removeprefix(_ID_SETS): _mapped(folder, name) for name in id_sets if f"{name}.npy" in files}
    return columns, id_bits


def _mapped(folder: Path, name: str) -> np.ndarray:
    """The array in a .npy file, mapped read-only. np.load's own map would keep the file open: 35 a day."""
    path = folder / f"{name}.npy"
    try:
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            dtype, shape, start = npy_header(file.read(1 << 10), size)
            # By the descriptor: PyTorch takes names in UTF-8 only.
            whole = torch.from_file(f"/proc/self/fd/{file.fileno()}", size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError, ValueError) as error:
        said = isinstance(error, OSError) and error.strerror
        reason = (said or str(error)).partition("\n")[0][:200]
        raise InputError(f"{path}: not a readable .npy file ({reason}); make the day again") from error
    column = whole[start:].view(dtype).reshape(shape)
    column.flags.writeable = False
    return column


def _check_shapes(
    folder: Path, schema: Schema, columns: Mapping[str, np.ndarray], cascade: Cascade | None = None
) -> None:
    """InputError for a column of another type or shape than the schema, the other columns and the cascade say."""
    ragged = _OFFSET in columns
    axes = {"request_id": 0, "history.mask": 1, "item.label": 0 if ragged else 1}
    requests, length, items = ((*columns[name].shape, 0, 0)[axis] for name, axis in axes.items())
    sizes = {"request": (requests,), "history": (requests, length), "item": (requests, items)}
    if ragged:
        sizes |= {"item": (items,), "offset": (requests + 1,)}
    known = columns_of(schema, ragged)
    for name, column in columns.items():
        path, expected = folder / f"{name}.npy", known[name]
        if column.dtype not in expected.dtypes:
            raise InputError(f"{path}: type {column.dtype}, not {expected.dtypes[0]}; make the day again")
        shape = (*sizes[expected.side], expected.length) if expected.length else sizes[expected.side]
        if column.shape != shape:
            raise InputError(f"{path}: shape {column.shape}, not {shape}; make the day again")
    if not requests:
        raise InputError(f"{folder}: holds no request; make the day again")
    if ragged:
        _check_offset(folder, columns[_OFFSET], requests, items)
    if cascade is not None:
        _check_cascade(folder, columns, cascade)


def _check_offset(folder: Path, offset: np.ndarray, requests: int, items: int | None = None) -> None:
    """InputError unless ``offset`` divides rows, ``items`` if that is known, among the requests."""
    path = folder / f"{_OFFSET}.npy"
    if offset.shape != (requests + 1,):
        raise InputError(f"{path}: shape {offset.shape}, not {(requests + 1,)}; make the day again")
    if offset[0] != 0 or (offset[1:] < offset[:-1]).any():
        raise InputError(f"{path}: does not rise from 0, so it divides no rows among requests; make the day again")
    if items is not None and offset[-1] != items:
        raise InputError(f"{path}: ends at {offset[-1]}, but item.label has {items} rows; make the day again")
    if not offset[-1]:
        raise InputError(f"{path}: no request has an item; make the day again")


def _check_cascade(folder: Path, columns: Mapping[str, np.ndarray], cascade: Cascade) -> None:
    """InputError when the requests have other numbers of items, or other groups, than the cascade."""
    ragged, grouped = _OFFSET in columns, _OPTIONAL in columns
    items = int(np.diff(columns[_OFFSET]).max()) if ragged else columns["item.label"].shape[1]
    wanted, known = cascade.num_items, cascade.has_sizes or not grouped
    if known and (items > wanted if ragged else items != wanted):
        raise InputError(
            f"{folder}: its requests have {'up to ' if ragged else ''}{items} items, the cascade {cascade.name} has "
            f"{wanted}; give the groups of --cascade the log's sizes{', or none' if grouped else ''}"
        )
    first = cascade.stages[0]
    if not cascade.has_sizes and not ragged and first.keep > items:
        raise InputError(
            f"{folder}: its requests have {items} items, and stage {first.name} of the cascade {cascade.name} keeps "
            f"{first.keep}; give it a keep of at most {items}"
        )
    if grouped and columns[_OPTIONAL].max(initial=0) >= len(cascade.groups):
        raise InputError(
            f"{folder / _OPTIONAL}.npy: holds {columns[_OPTIONAL].max()}, and the cascade {cascade.name} has "
            f"{len(cascade.groups)} groups, from 0; name all groups in --cascade"
        )


def _check_values(folder: Path, name: str, array: np.ndarray, column: Column) -> str:
    """The SHA-256 of a column's file. InputError when a value is not below the column's limit, or no finite number.

    The file is read, not mapped: mapped pages would count as memory. One pass serves both.
    """
    path = folder / f"{name}.npy"
    kind = np.dtype(np.uint8) if array.dtype == np.bool_ else array.dtype  # a byte of a mask can hold more than 0 and 1
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(path.stat().st_size - array.nbytes))
        while piece := file.read(_BYTES_PER_READ):
            digest.update(piece)
            values = np.frombuffer(piece, kind)
            if column.limit is not None and values.max() >= column.limit:
                raise InputError(f"{path}: holds {values.max()}, outside the 0 .. {column.limit - 1} of its schema")
            if name == _LABEL and values.min() < 0:
                raise InputError(f"{path}: holds {values.min()}; labels are gains, so add a constant that makes the "
                                 "lowest of all days 0")  # fmt: skip
            if name == _LABEL and values.max() > _MAX_LABEL:
                raise InputError(f"{path}: holds {values.max()}; labels are whole numbers from 0 to {_MAX_LABEL}, so "
                                 "write the ranks of larger ones")  # fmt: skip
            if kind.kind == "f" and not np.isfinite(values).all():
                raise InputError(f"{path}: holds a value that is no finite number; say in the importer what it becomes")
    return digest.hexdigest()


def _verify(
    folder: Path,
    schema: Schema,
    columns: Mapping[str, np.ndarray],
    id_bits: Mapping[str, np.ndarray],
    files: Mapping[str, Any],
) -> None:
    """InputError when a file is not what meta.json says, or holds what its schema does not allow."""
    if _fingerprint(folder) in verified_days():
        return
    known = columns_of(schema, ragged=_OFFSET in columns)
    try:
        found = {name: _check_values(folder, name, column, known[name]) for name, column in columns.items()}
        found |= {f"{_ID_SETS}{table}": sha256_of(folder / f"{_ID_SETS}{table}.npy") for table in id_bits}
        sizes = {name: (folder / name).stat().st_size for name in files}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); make the day again") from error
    for name, sha256 in found.items():
        if files[f"{name}.npy"] != {"size": sizes[f"{name}.npy"], "sha256": sha256}:
            raise InputError(f"{folder / name}.npy: does not match its checksum in {META_FILE}; make the day again")
    for table, bits in id_bits.items():
        size = schema.tables[table].size
        if bits.dtype != np.uint64 or bits.shape != (-(-size // 64),) or int(bits[-1]) >> ((size - 1) % 64 + 1):
            raise InputError(f"{folder / _ID_SETS}{table}.npy: not a set of ids below {size}; make the day again")
    _note_verified(folder)


def _note_verified(folder: Path) -> None:
    """Let this process and those that it starts know that the day's content is what it should be."""
    fingerprint = _fingerprint(folder)
    add_verified([] if fingerprint is None else [fingerprint])


def verified_days() -> list[str]:
    """Fingerprints of the days that this process takes for verified."""
    return os.environ.get(VERIFIED, "").split()


def add_verified(fingerprints: Iterable[str]) -> None:
    """Take the days that another process of this machine has verified for verified."""
    noted = verified_days()
    if new := [fingerprint for fingerprint in dict.fromkeys(fingerprints) if fingerprint not in noted]:
        os.environ[VERIFIED] = " ".join([*noted, *new])


def _fingerprint(folder: Path) -> str | None:
    """A digest of where the day's files lie, and of their names, sizes, times and inodes; None while they are so young
    that a change could leave their times as they are."""
    status = {path.name: path.stat() for path in sorted(folder.iterdir())}
    if time.time_ns() - max(entry.st_mtime_ns for entry in status.values()) < _JUST_WRITTEN:
        return None
    files = [(name, entry.st_size, entry.st_mtime_ns, entry.st_ino) for name, entry in status.items()]
    return hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:32]
