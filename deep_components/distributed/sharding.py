"""Tables whose rows are shared out among processes, and the exchange of a batch's rows.

Row r of a table lies on process r % W, as its row r // W: a shard is a table compacted to every W-th of its ids, with
its optimizer, so stores, initial values and optimizers are those of one process. A step moves the distinct rows of its
batch: their numbers are exchanged ahead by the loader's thread, their values and gradients by the training's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deep_components.batch import CascadeBatch, Features, RowFeatures, SlotFeatures
from deep_components.distributed.processes import Processes
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import TableLookup
from deep_components.tables.store import EmbeddingStore


def shard(ids: IdSet | None, size: int, processes: Processes) -> IdSet:
    """The ids whose rows lie on this process: of a table with these ``ids``, or of a whole one of ``size`` rows."""
    known = np.arange(size) if ids is None else ids.ids()
    return IdSet.of([known[processes.rank :: processes.count]], size if ids is None else ids.size)


@dataclass(frozen=True)
class Route:
    """How the distinct rows [U] of a batch are fetched: where they lie, and what others fetch here."""

    order: Tensor  # [U] int64, the distinct rows by their process
    sent: Tensor  # [W] int64, how many are asked of each process
    received: Tensor  # [W] int64, how many each process asks for here
    rows: Tensor  # [V] int64, the distinct rows of this process that are asked for
    slots: Tensor  # [sum of received] int64, which of ``rows`` they are


class ShardedLookup:
    """Translates the ids of batches, as :class:`TableLookup` does, and agrees with the other processes on the routes of
    their distinct rows; ``features.rows`` then has a :class:`Route` for each table. All processes must call it in the
    same order."""

    def __init__(self, lookup: TableLookup, processes: Processes) -> None:
        self.lookup, self.processes = lookup, processes

    @property
    def ids(self) -> dict[str, IdSet]:
        """Those of the whole tables."""
        return self.lookup.ids

    def __call__(self, batch: CascadeBatch[Features]) -> CascadeBatch[SlotFeatures]:
        """Both steps."""
        return self.slots(self.rows(batch))

    def rows(self, batch: CascadeBatch[Features]) -> CascadeBatch[RowFeatures]:
        """Rows of the whole tables in place of a log's indices."""
        return self.lookup.rows(batch)

    def slots(self, batch: CascadeBatch[RowFeatures]) -> CascadeBatch[SlotFeatures]:
        """Slots in place of the rows, and the routes of these."""
        found = self.lookup.slots(batch)
        features: Any = replace(found.features, rows=routes(found.features.rows, self.processes))
        return replace(found, features=features)


def routes(rows: Mapping[str, Tensor], processes: Processes) -> dict[str, Route]:
    """Routes of the distinct rows [U] of each table; two exchanges over the loader's group for all tables together."""
    if not rows:
        return {}
    count = processes.count
    owners = {table: distinct % count for table, distinct in rows.items()}
    order = {table: owner.argsort(stable=True) for table, owner in owners.items()}
    sent = torch.stack([owner.bincount(minlength=count) for owner in owners.values()], dim=1)  # [W, tables]
    received = processes.exchange(sent, [1] * count, [1] * count, processes.ahead)
    wanted = {table: (distinct[order[table]] // count).to(torch.int32) for table, distinct in rows.items()}
    asked = processes.exchange(
        _by_process(wanted.values(), sent), sent.sum(1).tolist(), received.sum(1).tolist(), processes.ahead
    )
    found = {}
    for table, asked_rows, out, back in zip(rows, _by_table(asked, received), sent.T, received.T, strict=True):
        distinct, slots = asked_rows.long().unique(return_inverse=True)
        found[table] = Route(order[table], out.contiguous(), back.contiguous(), distinct, slots)
    return found


def fetch(
    stores: Mapping[str, EmbeddingStore], routes: Mapping[str, Route], processes: Processes, device: torch.device,
    look: bool = False,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Stage -> table -> the current values [U, d] of the batch's distinct rows, in one exchange of all stages and
    tables. ``look``: they are not about to be trained, and the tables stay as they are."""
    if not routes:
        return {stage: {} for stage in stores}
    parts, out, back = [], [], []
    for store in stores.values():
        for table, route in routes.items():
            values = store.peek(table, route.rows) if look else store.pull(table, route.rows)
            values = values.to(device, non_blocking=True)
            parts.append(values[route.slots.to(device, non_blocking=True)])
            out.append(route.received)
            back.append(route.sent)
    arrived = _exchanged(parts, out, back, processes)
    found: dict[str, dict[str, Tensor]] = {}
    for (stage, table), values in zip(((s, t) for s in stores for t in routes), arrived, strict=True):
        order = routes[table].order.to(device, non_blocking=True)
        found.setdefault(stage, {})[table] = torch.empty_like(values).index_copy_(0, order, values)
    return found


def send_gradients(
    gradients: Mapping[str, Mapping[str, Tensor]], routes: Mapping[str, Route], processes: Processes
) -> dict[str, dict[str, Tensor]]:
    """Stage -> table -> the gradients [V, d] of ``route.rows``, added up in the order of the processes; ``gradients``
    [U, d] are those of the rows that :func:`fetch` gave."""
    if not routes:
        return {stage: {} for stage in gradients}
    parts, out, back = [], [], []
    for of_stage in gradients.values():
        for table, route in routes.items():
            parts.append(of_stage[table][route.order.to(of_stage[table].device, non_blocking=True)])
            out.append(route.sent)
            back.append(route.received)
    arrived = _exchanged(parts, out, back, processes)
    found: dict[str, dict[str, Tensor]] = {}
    for (stage, table), values in zip(((s, t) for s in gradients for t in routes), arrived, strict=True):
        route = routes[table]
        total = values.new_zeros(len(route.rows), values.shape[1])
        slots = route.slots.to(values.device, non_blocking=True).split(route.received.tolist())
        for of_process, part in zip(slots, values.split(route.received.tolist()), strict=True):
            total.index_add_(0, of_process, part)  # distinct rows: no two of a process meet
        found.setdefault(stage, {})[table] = total
    return found


def _exchanged(parts: list[Tensor], out: list[Tensor], back: list[Tensor], processes: Processes) -> list[Tensor]:
    """Exchange parts [n, d], each ordered by process with ``out`` [W] rows for each, in one collective; the parts that
    arrive, with ``back`` [W] rows from each."""
    sent, received = torch.stack(out, dim=1), torch.stack(back, dim=1)  # [W, parts]
    arrived = processes.exchange(_by_process(parts, sent), sent.sum(1).tolist(), received.sum(1).tolist())
    return _by_table(arrived, received)


def _by_process(parts: Iterable[Tensor], counts: Tensor) -> Tensor:
    """Parts ordered by process, as one tensor: all parts' rows for process 0, then all for process 1, ..."""
    pieces = [part.split(count.tolist()) for part, count in zip(parts, counts.T, strict=True)]
    return torch.cat([piece for of_process in zip(*pieces, strict=True) for piece in of_process])


def _by_table(arrived: Tensor, counts: Tensor) -> list[Tensor]:
    """The reverse: a tensor for each part, ordered by process."""
    pieces = arrived.split(counts.flatten().tolist())
    return [torch.cat(pieces[part :: counts.shape[1]]) for part in range(counts.shape[1])]
