"""Several processes in one: threads that meet where processes would exchange."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tests.loss.methods import Batch

T = TypeVar("T")


@dataclass
class Thread:
    """One of ``count`` processes; counts its sums in ``calls``."""

    rank: int
    count: int
    tables: list[Tensor]
    barrier: threading.Barrier
    calls: int = 0

    def all_sum(self, tensor: Tensor) -> None:
        self.calls += 1
        self.tables[self.rank] = tensor.clone()
        self.barrier.wait()
        assert len({(values.shape, values.dtype) for values in self.tables}) == 1, "processes sum unlike tensors"
        total = torch.stack(self.tables).sum(dim=0, dtype=tensor.dtype)
        self.barrier.wait()
        tensor.copy_(total)


def on_each(count: int, function: Callable[[Thread], T]) -> list[T]:
    """``function(process)`` of each of ``count`` processes, by rank. The first error is raised; no other waits on."""
    barrier, tables = threading.Barrier(count, timeout=30), [torch.empty(0)] * count

    def run(rank: int) -> T:
        try:
            return function(Thread(rank, count, tables, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        running = [threads.submit(run, rank) for rank in range(count)]
    errors = [error for future in running if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in running]


def slice_of(batch: Batch, rank: int, count: int) -> Batch:
    """A process's part of a global batch, without the items that none of its requests has."""
    requests = len(batch.targets.mask)
    part = batch.take(slice(rank * requests // count, (rank + 1) * requests // count))
    there = part.targets.mask.any(dim=0).nonzero()
    return part.take(items=slice(0, int(there.max()) + 1 if len(there) else 0))
