"""From a log's ids to the rows of the tables, and to the distinct rows of a batch."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from deep_components.batch import CascadeBatch, table_ids, with_table_ids
from deep_components.tables.id_set import IdSet


class BatchRows:
    """Rewrites the ids of a batch; belongs to the thread that assembles batches.

    Args:
        ids: of the compacted tables: a log's ids become rows.
        distinct: field -> rows of its table; for these fields the distinct rows of a batch are listed.
        paddings: field -> its table's padding row.
    """

    def __init__(self, ids: Mapping[str, IdSet], distinct: Mapping[str, int], paddings: Mapping[str, int]) -> None:
        self.ids, self.paddings = ids, paddings
        self._place = {field: np.empty(rows, np.int32) for field, rows in distinct.items()}

    def __call__(self, batch: CascadeBatch) -> CascadeBatch:
        """The batch as training uses it: a log's ids -> rows -> places among the batch's distinct rows."""
        return self.distinct_rows(self.table_rows(batch))

    def table_rows(self, batch: CascadeBatch) -> CascadeBatch:
        """The batch with rows of the compacted tables in place of ids. KeyError when a table lacks an id."""
        if not self.ids:
            return batch
        rows = {
            field: torch.from_numpy(known.rows(table_ids(batch.features, field).numpy()))
            for field, known in self.ids.items()
        }
        return replace(batch, features=with_table_ids(batch.features, rows))

    def distinct_rows(self, batch: CascadeBatch) -> CascadeBatch:
        """The batch with its distinct rows listed, in the order of their first use after the padding row. IndexError
        when a table lacks a row."""
        if not self._place:
            return batch
        distinct, places = {}, {}
        for field in self._place:
            ids = table_ids(batch.features, field)
            distinct[field], places[field] = (
                self._distinct_there(field, ids) if ids.is_cuda else self._distinct(field, ids)
            )
        return replace(batch, features=with_table_ids(batch.features, places), distinct=distinct)

    def _distinct(self, field: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct rows, and the place of each used row among them, without sorting: every row notes where it is first
        used."""
        place = self._place[field]
        rows = np.concatenate([[self.paddings[field]], ids.numpy()])
        if rows.min() < 0:  # numpy would count from the end, compiled loops read what lies before the table
            raise IndexError(f"{rows.min()} is not a row of the table {field}")
        order = np.arange(len(rows), dtype=np.int32)
        place[rows[::-1]] = order[::-1]  # of several equal rows the last assignment stays: the first use
        first = place[rows]
        is_first = first == order
        places = (np.cumsum(is_first) - 1)[first][1:]
        return torch.from_numpy(rows[is_first]), torch.from_numpy(places)

    def _distinct_there(self, field: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same on the ids' own device, by sorting; it is waited for, as nobody knows how many rows there are."""
        rows, places = torch.cat([ids.new_tensor([self.paddings[field]]), ids]).unique(return_inverse=True)
        padding = places[0].clone()
        rows = torch.cat([rows[padding : padding + 1], rows[:padding], rows[padding + 1 :]])
        places = torch.where(places == padding, 0, places + (places < padding))
        return rows, places[1:]
