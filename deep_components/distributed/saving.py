"""A training's files from several processes: each saves its rows, the first one what all share and the final models."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deep_components.checkpoint import as_array
from deep_components.distributed.processes import Processes, agreed
from deep_components.errors import InputError
from deep_components.runs.checked import Blocks, written_order
from deep_components.runs.folder import STATE_FILE
from deep_components.runs.shards import SavedState, save_shard
from deep_components.runs.state import IDS, TABLE, save_models, save_state
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import EmbeddingStore

_ROWS_AT_A_TIME = 1 << 16  # of each process
_IDS, _TABLE, _OWN, _STEP = "ids/", "/embedding.", "generator/", "step/"


def save_together(
    run: Path, arrays: Mapping[str, np.ndarray], sharded: Mapping[str, bool], position: Mapping[str, int],
    note: Mapping[str, Any], processes: Processes,
) -> None:  # fmt: skip
    """Save a state: every process a shard, the first one then STATE_FILE, which commits them.

    ``sharded``: table -> whether the ids of its rows are saved, which a whole table's need not be. InputError, in all
    processes, when one cannot write, or what should be alike in all is not."""
    own, shared = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for name, values in arrays.items():
        table = name.removeprefix(_IDS) if name.startswith(_IDS) else name.rpartition(_TABLE)[2]
        is_own = (table in sharded and not name.startswith(_STEP)) or name.startswith(_OWN)
        if not (name.startswith(_IDS) and not sharded.get(table, True)):
            (own if is_own else shared)[name] = values
    _check_alike(shared, processes)
    step, rank, count = position["step"], processes.rank, processes.count
    checksums = processes.gather(agreed(processes, lambda: save_shard(run, step, rank, count, own, note)))
    agreed(
        processes,
        lambda: save_state(run / STATE_FILE, shared, position, note, checksums) if processes.is_first else None,
    )


def _check_alike(shared: Mapping[str, np.ndarray], processes: Processes) -> None:
    """InputError unless all processes have the same values, to the bit."""
    digests = {name: hashlib.sha256(np.ascontiguousarray(values).data).hexdigest() for name, values in shared.items()}
    found = processes.gather(digests)
    for name in digests:
        if len({of_process.get(name) for of_process in found}) > 1:
            raise InputError(
                f"{name} is not the same in all processes: it depends on more than the batch's sums, as running "
                "statistics of a model or a faulty machine do; leave such a layer out, or train in one process"
            )


class OwnState(Mapping[str, Tensor]):
    """A saved state as one process restores it: of the tables whose ``ids`` it holds rows of, these rows alone, as far
    as they were saved. Its own generators' states are absent where there was no such process."""

    def __init__(self, saved: SavedState, ids: Mapping[str, IdSet], rank: int) -> None:
        self.state, self._rank = saved, rank
        self._found: dict[str, np.ndarray] = {}
        self._ids = {table: known.ids() for table, known in ids.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and name.startswith(_OWN):
            return name in self.state and self.state.of_rank(name, self._rank) is not None
        return name in self.state or (isinstance(name, str) and name.removeprefix(_IDS) in self._ids)

    def __getitem__(self, name: str) -> Tensor:
        table = name.rpartition(_TABLE)[2]
        if name.startswith(_OWN):
            values = self.state.of_rank(name, self._rank)
            if values is None:
                raise KeyError(name)
        elif name.removeprefix(_IDS) in self._ids:
            table = name.removeprefix(_IDS)
            values = self._ids[table][self._known(table)]
        elif table in self._ids and _TABLE in name and not name.startswith(_STEP):
            values = self._rows(name, self._ids[table][self._known(table)])
        else:
            values = self.state[name]
        return torch.from_numpy(values)

    def unknown(self, processes: Processes) -> str | None:
        """A table of which rows were saved that no process has; None when there is none."""
        found = processes.gather({table: int(known.sum()) for table, known in self._found.items()})
        for table in self._found:
            if sum(of_process[table] for of_process in found) != self.state.rows(self._parameter(table)):
                return table
        return None

    def _parameter(self, table: str) -> str:
        return next(name for name in self.state if name.startswith("parameter/") and name.endswith(f"{_TABLE}{table}"))

    def _known(self, table: str) -> np.ndarray:
        """Which of the process's ids were saved."""
        if table not in self._found:
            name, ids = self._parameter(table), self._ids[table]
            like = self.state.like(name)
            self._found[table] = self.state.copy_rows(name, ids, np.empty((len(ids), *like.shape[1:]), like.dtype))
        return self._found[table]

    def _rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        like = self.state.like(name)
        values = np.empty((len(ids), *like.shape[1:]), like.dtype)
        self.state.copy_rows(name, ids, values)
        return values


def save_trained_together(
    run: Path, models: Mapping[str, nn.Module], stores: Mapping[str, EmbeddingStore], note: Mapping[str, Any],
    ids: Mapping[str, IdSet], rows: Mapping[str, int], processes: Processes,
) -> None:  # fmt: skip
    """Write ``<stage>.safetensors`` as one process would: the first one writes, and gets the rows of sharded tables
    from the others block by block. ``ids`` and ``rows`` are those of the whole tables."""
    for stage, model in models.items():
        store = stores[stage]
        arrays: dict[str, Any] = {name: as_array(values) for name, values in model.state_dict().items()}
        for table, values in store.tables.items():
            sharded = table in store.optimizers
            arrays[f"{TABLE}{table}"] = (
                Blocks(
                    (rows[table], store.dim), as_array(values[:0]).dtype, _blocks(store, table, rows[table], processes)
                )
                if sharded
                else as_array(store.values(table))
            )
        # The others need the ids' names and type alone, which give the order of the arrays.
        known = {table: of.ids() if processes.is_first else np.empty(0, np.int64) for table, of in ids.items()}
        if processes.is_first:
            save_models(run, {stage: arrays}, note, known)
            continue
        for name in written_order(arrays | {f"{IDS}{table}": values for table, values in known.items()}):
            for _ in arrays[name].blocks if isinstance(arrays.get(name), Blocks) else ():
                pass  # it sends them


def _blocks(store: EmbeddingStore, table: str, rows: int, processes: Processes) -> Iterator[np.ndarray]:
    """The rows of a sharded table in their order, in the first process; the others give it theirs."""
    count = processes.count
    for first in range(0, rows, _ROWS_AT_A_TIME * count):
        total = min(_ROWS_AT_A_TIME * count, rows - first)
        sizes = [len(range(rank, total, count)) for rank in range(count)]
        start = first // count
        mine = store.peek(table, torch.arange(start, start + sizes[processes.rank]))
        sent = [len(mine) if rank == 0 else 0 for rank in range(count)]
        arrived = processes.exchange(mine, sent, sizes if processes.is_first else [0] * count)
        block = arrived.new_empty(total if processes.is_first else 0, store.dim)
        for rank, part in enumerate(arrived.split(sizes) if processes.is_first else ()):
            block[rank::count] = part
        yield as_array(block)
