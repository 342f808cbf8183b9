"""Tables whose rows are shared out among processes, and the exchange of a batch's rows.

Row r of a table lies on process r % W, as its row r // W: a shard is a table compacted to every W-th of its ids, with
its optimizer, so stores, initial values and optimizers are those of one process. A step moves the distinct rows of its
batch: their numbers are exchanged ahead by the loader's thread, their values and gradients by the training's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deep_components.batch import CascadeBatch, Features, RowFeatures, SlotFeatures
from deep_components.distributed.processes import Processes
from deep_components.kernels import Kernels, TableUse
from deep_components.tables.id_set import IdSet
from deep_components.tables.lookup import NO_ROW, TableLookup, distinct
from deep_components.tables.store import EmbeddingStore

T = TypeVar("T")


def shard(ids: IdSet | None, size: int, processes: Processes) -> IdSet:
    """The ids whose rows lie on this process: of a table with these ``ids``, or of a whole one of ``size`` rows."""
    whole = IdSet.below(size) if ids is None else ids
    return whole.every(processes.count, processes.rank)


@dataclass(frozen=True)
class Route:
    """How the distinct rows [U] of a batch are fetched: where they lie, and what others fetch here."""

    order: Tensor  # [U] int64, what orders the rows by process; [0]: they stand so
    first: Tensor  # int64, the process of the first ones; the others follow in their order, round to the one before it
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
        features: Any = replace(found.features, rows=routes(found.features.rows, self.processes, by_process=True))
        return replace(found, features=features)


def routes(
    rows: Mapping[str, Tensor], processes: Processes, group: dist.ProcessGroup | None = None, by_process: bool = False
) -> dict[str, Route]:
    """Routes of the distinct rows [U] of each table; two exchanges for all tables together, over the loader's group
    unless another ``group`` of CPUs is given. ``by_process``: the rows stand by process, as :class:`TableLookup` lists
    them, and need not be ordered."""
    if not rows:
        return {}
    count, group, none = processes.count, group or processes.ahead, torch.empty(0, dtype=torch.int64)
    orders = {table: none if by_process else (of_table % count).argsort() for table, of_table in rows.items()}
    ordered = [of_table if by_process else of_table[orders[table]] for table, of_table in rows.items()]
    firsts = [int(of_table[0]) % count if by_process else 0 for of_table in ordered]
    sent = torch.stack([(of_table % count).bincount(minlength=count) for of_table in ordered], dim=1)  # [W, tables]
    received = processes.exchange(sent, [1] * count, [1] * count, group)
    asked = processes.exchange(
        _by_process([(of_table // count).to(torch.int32) for of_table in ordered], sent, firsts),
        sent.sum(1).tolist(), received.sum(1).tolist(), group,
    )  # fmt: skip
    found = {}
    of_tables = zip(rows, firsts, _by_table(asked, received, [0] * len(rows)), sent.T, received.T, strict=True)
    for table, first, of_table, out, back in of_tables:
        positions, slots = (torch.from_numpy(part) for part in distinct(of_table.numpy()))
        found[table] = Route(
            orders[table], torch.tensor(first), out.contiguous(), back.contiguous(), of_table[positions].long(), slots
        )
    return found


def fetch(
    stores: Mapping[str, EmbeddingStore], routes: Mapping[str, Route], processes: Processes, device: torch.device,
    look: bool = False,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Stage -> table -> the current values [U, d] of the batch's distinct rows, in one exchange of all stages and
    tables. ``look``: they are not about to be trained, and the tables stay as they are."""
    if not routes:
        return {stage: {} for stage in stores}
    parts = []
    for store in stores.values():
        for table, route in routes.items():
            values = store.peek(table, route.rows) if look else store.pull(table, route.rows)
            values = values.to(device, non_blocking=True)
            parts.append(values.index_select(0, route.slots.to(device, non_blocking=True)))
    received, sent, firsts = _counts(list(routes.values()) * len(stores))
    arrived = _exchanged(_by_process(parts, received, [0] * len(parts)), received, sent, processes)
    values_of = iter(_by_table(arrived, sent, firsts))
    return {stage: {table: _in_order(next(values_of), route) for table, route in routes.items()} for stage in stores}


def _in_order(values: Tensor, route: Route) -> Tensor:
    """Values [U, d] by process in the order of the rows that were asked for."""
    if not len(route.order):
        return values
    return torch.empty_like(values).index_copy_(0, route.order.to(values.device), values)


def send_gradients(
    gradients: Mapping[str, Mapping[str, Tensor]], routes: Mapping[str, Route], processes: Processes,
    kernels: Kernels | None = None,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Stage -> table -> the gradients [V, d] of ``route.rows``, added up in the order of the processes; ``gradients``
    [U, d] are those of the rows that :func:`fetch` gave, which stood by process. ``kernels`` for those on a CPU."""
    if not routes:
        return {stage: {} for stage in gradients}
    parts = [of_stage[table] for of_stage in gradients.values() for table in routes]
    received, sent, firsts = _counts(list(routes.values()) * len(gradients))
    arrived = _exchanged(_by_process(parts, sent, firsts), sent, received, processes)
    values_of = iter(_by_table(arrived, received, [0] * len(parts)))
    return {
        stage: {table: _total(next(values_of), route, kernels) for table, route in routes.items()}
        for stage in gradients
    }


def _total(values: Tensor, route: Route, kernels: Kernels | None) -> Tensor:
    """The sums [V, d] of the values [sum of received, d] of a row, in the order of the processes."""
    total = values.new_zeros(len(route.rows), values.shape[1])
    if kernels is not None:
        kernels.scatter_add([TableUse(total, route.slots, values, NO_ROW)])
        return total
    counts = route.received.tolist()
    slots = route.slots.to(values.device, non_blocking=True).split(counts)
    for of_process, part in zip(slots, values.split(counts), strict=True):
        total.index_add_(0, of_process, part)  # distinct rows: no two of a process meet
    return total


def _counts(routes: Sequence[Route]) -> tuple[Tensor, Tensor, list[int]]:
    """Of each route the rows [W, routes] that processes ask for here, those asked of them, and the first process."""
    received = torch.stack([route.received for route in routes], dim=1)
    sent = torch.stack([route.sent for route in routes], dim=1)
    return received, sent, [int(route.first) for route in routes]


def _exchanged(values: Tensor, sent: Tensor, received: Tensor, processes: Processes) -> Tensor:
    """Exchange values ordered by process, of which [W, parts] are sent and received."""
    return processes.exchange(values, sent.sum(1).tolist(), received.sum(1).tolist())


def _by_process(parts: Sequence[Tensor], counts: Tensor, firsts: Sequence[int]) -> Tensor:
    """Parts of ``counts`` [W, parts] rows, each ordered by process from its first one on, as one tensor: all parts'
    rows for process 0, then all for process 1, ..."""
    pieces = [
        _rolled(part.split(_rolled(count, first)), -first)
        for part, count, first in zip(parts, counts.T.tolist(), firsts, strict=True)
    ]
    return torch.cat([piece for of_process in zip(*pieces, strict=True) for piece in of_process])


def _by_table(arrived: Tensor, counts: Tensor, firsts: Sequence[int]) -> list[Tensor]:
    """The reverse: a tensor for each part, ordered by process from its first one on."""
    pieces = arrived.split(counts.flatten().tolist())
    return [torch.cat(_rolled(pieces[part :: len(firsts)], first)) for part, first in enumerate(firsts)]


def _rolled(items: Sequence[T], first: int) -> list[T]:
    """The items from the first one on, then those before it."""
    return [*items[first:], *items[:first]]
