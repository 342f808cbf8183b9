"""The corpus: all items that can be recommended, as given and as models take them, found by their ids.

Everything lies in files that are mapped: the raw table in record batches (items.arrow), each encoded field in a .npy
file, and the sorted keys of the ids with the row of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deep_components.dataset.encoding import MISSING, Encoding, RawEncoding, combined, first_line, keys_of
from deep_components.dataset.rows import RawRows
from deep_components.errors import InputError
from deep_components.files import NpyWriter, map_npy
from deep_components.schema import Field, Schema

ITEMS_FILE, KEYS_FILE, KEY_ROWS_FILE = "items.arrow", "keys.npy", "key_rows.npy"

_WAITING = 1 << 22  # keys that are merged at a time
_PAGE = 1 << 16  # rows that are checked at a time


def field_file(field: str) -> str:
    return f"item.{field}.npy"


class Corpus:
    """M items.

    Attributes:
        item: the raw column that names an item, and ``id_type`` how: "string" or "integer".
        table: the raw columns as given, mapped.
        features: schema field -> encoded values [M], of a list field [M, G], mapped.
    """

    def __init__(
        self, item: str, id_type: str, table: pa.Table, features: Mapping[str, np.ndarray], keys: np.ndarray,
        key_rows: np.ndarray,
    ) -> None:  # fmt: skip
        self.item, self.id_type, self.table, self.features = item, id_type, table, dict(features)
        self._keys, self._key_rows = keys, key_rows
        self._starts = np.concatenate([[0], np.cumsum([len(batch) for batch in table.column(item).chunks])])

    def __len__(self) -> int:
        return len(self._keys)

    def rows_of(self, ids: pa.Array) -> np.ndarray:
        """The row of each raw id, -1 for those that are not there: [n] int64. InputError for ids of another type."""
        try:
            keys = keys_of(combined(ids), self.id_type)
        except (ValueError, pa.ArrowException) as error:
            raise InputError(
                f"column {self.item}: {first_line(error)}; the ids of the corpus are of type {self.id_type}"
            ) from error
        found = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return np.where(self._keys[found] == keys, self._key_rows[found], -1)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """The raw ids of rows."""
        return self.values(self.item, rows)

    def values(self, column: str, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """The values of a raw column in these rows, as Python's; None for row -1."""
        chunks, wanted = self.table.column(column).chunks, np.asarray(rows, np.int64)
        parts = np.searchsorted(self._starts, wanted, side="right") - 1
        offsets = (wanted - self._starts[parts]).tolist()
        return [
            None if part < 0 else chunks[part][offset].as_py()
            for part, offset in zip(parts.tolist(), offsets, strict=True)
        ]

    def fields(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The encoded fields of rows, of any shape, from 0."""
        return {name: values[rows] for name, values in self.features.items()}

    @classmethod
    def load(cls, folder: Path, item: str, id_type: str, schema: Schema) -> "Corpus":
        """What :func:`write_corpus` wrote; files' checksums are the bundle's affair. InputError when they do not fit
        together."""
        try:
            with pa.memory_map(str(folder / ITEMS_FILE)) as source:
                table = pa.ipc.open_file(source).read_all()
            names = {field.name: folder / field_file(field.name) for field in schema.side("item")}
            features = {name: map_npy(path) for name, path in names.items()}
            keys, key_rows = map_npy(folder / KEYS_FILE), map_npy(folder / KEY_ROWS_FILE)
            _check(table, item, id_type, schema, features, keys, key_rows)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{folder}: not a readable corpus ({first_line(error)}); export the run again") from error
        return cls(item, id_type, table, features, keys, key_rows)


def _check(
    table: pa.Table, item: str, id_type: str, schema: Schema, features: Mapping[str, np.ndarray], keys: np.ndarray,
    key_rows: np.ndarray,
) -> None:  # fmt: skip
    """ValueError unless the parts are of one length, and all indices within their tables."""
    table.validate(full=True)  # or offsets in it could point anywhere
    if item not in table.schema.names or id_type not in ("string", "integer"):
        raise ValueError(f"no column {item} of type {id_type}")
    if keys.dtype != np.uint64 or key_rows.dtype != np.int64 or {len(table)} != {len(keys), len(key_rows)}:
        raise ValueError("keys of other items")
    if len(keys) == 0 or (keys[1:] <= keys[:-1]).any() or key_rows.min() < 0 or key_rows.max() >= len(keys):
        raise ValueError("keys that are not in order")
    for field in schema.side("item"):
        values = features[field.name]
        if values.shape != ((len(keys), field.length) if field.length else (len(keys),)):
            raise ValueError(f"field {field.name} of shape {values.shape}")
        if values.dtype.kind != ("u" if field.table else "f"):
            raise ValueError(f"field {field.name} of type {values.dtype}")
        if field.table and any(part.max() >= field.size for part in _pages(values)):
            raise ValueError(f"field {field.name} with an index beyond its table")


def _pages(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[first : first + _PAGE] for first in range(0, len(values), _PAGE))


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, rows: RawRows, encoding: RawEncoding) -> dict[str, Any]:
    """Write the corpus' files: of rows with the same id the last one counts.

    The rows are read twice, a piece at a time; memory is some 50 bytes an item. Returns what the manifest keeps:
    ``items`` their number, ``item`` and ``id_type``, ``repeated`` rows left out. InputError for a column that is
    missing, a missing id, or a value that its field cannot hold.
    """
    needed = [encoding.item, *encoding.columns("item")]
    for column in needed:
        if column not in rows.schema.names:
            raise InputError(f"{rows.name}: column {column} is missing, which the items' fields are made of; add it")
    id_type = _id_type(encoding, rows.schema.field(encoding.item).type)
    keys, last, total = _last_rows(_keys(rows, encoding.item, id_type))
    if not total:
        raise InputError(f"{rows.name}: holds no item; write the items into it")
    order = np.argsort(last)
    key_rows = np.empty(len(order), np.int64)
    key_rows[order] = np.arange(len(order))
    np.save(folder / KEYS_FILE, keys)
    np.save(folder / KEY_ROWS_FILE, key_rows)
    _write_items(folder, rows, encoding, last[order])
    return {"items": len(keys), "item": encoding.item, "id_type": id_type, "repeated": total - len(keys)}


def _id_type(encoding: RawEncoding, kind: pa.DataType) -> str:
    """How ids are keyed: as the models' field of that column does it, else by the column's type."""
    entries = encoding.side("item") if isinstance(encoding, Encoding) else ()
    known = [e.type for e in entries if e.column == encoding.item and e.kind == "id" and not e.length]
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return known[0] if known else "integer" if pa.types.is_integer(value) else "string"


def _keys(rows: RawRows, item: str, id_type: str) -> Iterator[np.ndarray]:
    for piece in rows.pieces([item]):
        try:
            keys = keys_of(combined(piece.column(item)), id_type)
        except (ValueError, pa.ArrowException) as error:
            raise InputError(
                f"{rows.name}: column {item}: {first_line(error)}; give the ids that the log has"
            ) from error
        if (keys == MISSING).any():
            raise InputError(f"{rows.name}: column {item} has a missing value; give every item its id")
        yield keys


def _last_rows(pieces: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    """The distinct keys, rising, the last row of each, and how many rows there are."""
    known, rows = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    total = merged = 0

    def merge() -> tuple[np.ndarray, np.ndarray]:
        keys = np.concatenate([known, *waiting])
        numbers = np.concatenate([rows, np.arange(merged, total)])
        order = np.argsort(keys, kind="stable")  # of equal keys the last row stays last
        keys, numbers = keys[order], numbers[order]
        last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
        return keys[last], numbers[last]

    for piece in pieces:
        waiting.append(piece)
        total += len(piece)
        if total - merged > max(_WAITING, len(known)):
            known, rows = merge()
            waiting, merged = [], total
    known, rows = merge()
    return known, rows, total


def _write_items(folder: Path, rows: RawRows, encoding: RawEncoding, chosen: np.ndarray) -> None:
    """Write the rows at ``chosen``, rising, raw and encoded."""
    first = done = 0
    with ExitStack() as stack:
        table = stack.enter_context(pa.ipc.new_file(folder / ITEMS_FILE, rows.schema))
        writers = {
            field.name: stack.enter_context(_writer(folder, field, len(chosen)))
            for field in encoding.schema.side("item")
        }
        for piece in rows.pieces():
            stop = int(np.searchsorted(chosen, first + len(piece)))
            kept = piece.take(pa.array(chosen[done:stop] - first))
            first, done = first + len(piece), stop
            if len(kept):
                table.write_batch(kept)
                for name, values in _encoded(rows.name, encoding, kept).items():
                    writers[name].write(values)
        if done < len(chosen):
            raise InputError(f"{rows.name}: changed while it was read; give the command again")


def _writer(folder: Path, field: Field, items: int) -> NpyWriter:
    shape = (items, field.length) if field.length else (items,)
    return NpyWriter(
        folder / field_file(field.name),
        np.min_scalar_type(field.size - 1) if field.table else np.dtype(np.float32),
        shape,
    )


def _encoded(name: str, encoding: RawEncoding, rows: pa.RecordBatch) -> dict[str, np.ndarray]:
    try:
        return encoding.encode("item", dict(zip(rows.schema.names, rows.columns, strict=True)))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
