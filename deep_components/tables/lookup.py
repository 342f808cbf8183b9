"""From a log's indices to the rows of the tables, and to slots among the distinct rows of a batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deep_components.batch import CascadeBatch, Features, RowFeatures, SlotFeatures
from deep_components.errors import InputError
from deep_components.schema import SIDES, Schema
from deep_components.tables.id_set import IdSet

NO_ROW = -1


class TableLookup:
    """Translates the ids of batches; belongs to the thread that assembles them.

    ``ids``: table -> the log's indices that it has rows for, in their order; other tables have a row per index.
    ``pulled``: table -> its number of rows; for these tables the distinct rows of a batch are listed: in the order of
    their first use, which takes 4 bytes for each row of the table, or with ``parts`` by (row - padding row) % parts,
    which takes none.
    """

    def __init__(self, schema: Schema, ids: Mapping[str, IdSet], pulled: Mapping[str, int], parts: int = 0) -> None:
        self.ids, self._tables, self._uses = dict(ids), schema.tables, table_uses(schema)
        self._padding = {table: padding_row(schema, self.ids, table) for table in schema.tables}
        self._pulled, self._parts = dict(pulled), parts
        self._first_use = {} if parts else {table: np.empty(rows, np.int32) for table, rows in pulled.items()}

    def __call__(self, batch: CascadeBatch[Features]) -> CascadeBatch[SlotFeatures]:
        """Both steps."""
        return self.slots(self.rows(batch))

    def rows(self, batch: CascadeBatch[Features]) -> CascadeBatch[RowFeatures]:
        """Rows in place of a log's indices. InputError when a table without an unknown row lacks an id."""
        new = {table: self._rows_of(table, _concatenated(batch.features, self._uses[table])) for table in self.ids}
        return CascadeBatch(batch.request_id, RowFeatures(**self._replaced(batch.features, new)), batch.targets)

    def slots(self, batch: CascadeBatch[RowFeatures]) -> CascadeBatch[SlotFeatures]:
        """Slots in place of the rows of the pulled tables; their distinct rows are listed after the padding row.
        IndexError when a table lacks a row."""
        rows, new = dict[str, Tensor](), dict[str, Tensor]()
        for table in self._pulled:
            used = _concatenated(batch.features, self._uses[table])
            find = self._distinct_by_part if self._parts else self._distinct_sorted if used.is_cuda else self._distinct
            rows[table], new[table] = find(table, used)
        features = SlotFeatures(**self._replaced(batch.features, new), rows=rows)
        return CascadeBatch(batch.request_id, features, batch.targets)

    def _rows_of(self, table: str, used: Tensor) -> Tensor:
        ids, unknown = used.numpy(), self._tables[table].unknown
        if unknown is not None:
            ids = np.where(self.ids[table].contains(ids), ids, unknown)
        try:
            return torch.from_numpy(self.ids[table].rows(ids))
        except KeyError as error:
            raise InputError(f"ids.{table}.npy of a day lacks an id that the day uses; make the day again") from error

    def _replaced(self, features: Features | RowFeatures, new: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields of the features with other ids for some tables, given in the order of their uses."""
        sides: dict[str, dict[str, Tensor]] = {side: dict(getattr(features, side)) for side in SIDES}
        for table, ids in new.items():
            old = [sides[side][name] for side, name in self._uses[table]]
            for (side, name), part in zip(self._uses[table], ids.split([ids.numel() for ids in old]), strict=True):
                sides[side][name] = part.view(sides[side][name].shape)
        return {**sides, "history_mask": features.history_mask}

    def _distinct(self, table: str, used: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct rows, and the slot of each used row among them, without sorting: every row notes its first use."""
        first_use = self._first_use[table]
        rows = np.concatenate([[self._padding[table]], used.numpy()])
        if rows.min() < 0:  # numpy would count from the end, compiled loops read what lies before the table
            raise IndexError(f"{rows.min()} is not a row of the table {table}")
        order = np.arange(len(rows), dtype=np.int32)
        first_use[rows[::-1]] = order[::-1]  # of several equal rows the last assignment stays: the first use
        first = first_use[rows]
        is_first = first == order
        slots = (np.cumsum(is_first) - 1)[first][1:]
        return torch.from_numpy(rows[is_first]), torch.from_numpy(slots)

    def _distinct_sorted(self, table: str, used: Tensor) -> tuple[Tensor, Tensor]:
        """The same on the ids' own device, by sorting; it is waited for, as nobody knows how many rows there are."""
        rows, slots = torch.cat([used.new_tensor([self._padding[table]]), used]).unique(return_inverse=True)
        padding = slots[0].clone()
        rows = torch.cat([rows[padding : padding + 1], rows[:padding], rows[padding + 1 :]])
        slots = torch.where(slots == padding, 0, slots + (slots < padding))
        return rows, slots[1:]

    def _distinct_by_part(self, table: str, used: Tensor) -> tuple[Tensor, Tensor]:
        """The same by sorting, those of a part together, the padding row's part first."""
        size, parts = -(-self._pulled[table] // self._parts), self._parts
        rows = np.concatenate([[self._padding[table]], used.numpy()])
        if not 0 <= (low := rows.min()) <= (high := rows.max()) < self._pulled[table]:
            raise IndexError(f"{low} or {high} is not a row of the table {table}")
        shifted = rows - rows[0]
        shifted[shifted < 0] += parts * size  # the padding row is 0 then, and the parts are still those of the rows
        in_part = shifted // parts
        first, slots = distinct((shifted - in_part * parts) * size + in_part)
        return torch.from_numpy(rows[first]), torch.from_numpy(slots[1:])


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of the distinct ones among keys [n] >= 0 is first, by key, and which of them every key is.

    As np.unique, in half its time: key and position are sorted as one number."""
    bits = len(keys).bit_length()
    packed = (keys.astype(np.int64) << bits) | np.arange(len(keys))
    packed.sort()
    positions, slots = packed & ((1 << bits) - 1), np.empty(len(keys), np.int64)
    is_first = np.diff(packed >> bits, prepend=-1) > 0
    slots[positions] = np.cumsum(is_first) - 1
    return positions[is_first], slots


def table_uses(schema: Schema) -> dict[str, list[tuple[str, str]]]:
    """Table -> the (side, field)s that look it up: of the requests, then the histories, then the items."""
    uses: dict[str, list[tuple[str, str]]] = {table: [] for table in schema.tables}
    for side in SIDES:
        for field in schema.side(side):
            if field.table:
                uses[field.table].append((side, field.name))
    return uses


def padding_row(schema: Schema, ids: Mapping[str, IdSet], table: str) -> int:
    """The row of a table that belongs to its padding index; NO_ROW where a shard of the table lacks it."""
    padding = np.array([schema.tables[table].padding])
    if table not in ids:
        return int(padding[0])
    return int(ids[table].rows(padding)[0]) if ids[table].contains(padding).all() else NO_ROW


def _concatenated(features: Features | RowFeatures, uses: list[tuple[str, str]]) -> Tensor:
    parts = [getattr(features, side)[name].flatten() for side, name in uses]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
