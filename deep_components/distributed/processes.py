"""The processes of one training, joined by torch.distributed as torchrun or Ray Train started them.

Three groups, because collectives of two threads must not mix: ``main`` moves tensors of the training thread on the
device, ``control`` its small JSON values on the CPU, ``ahead`` what the loader's thread exchanges for the next batch.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deep_components.errors import InputError

T = TypeVar("T")

_ADDRESS = "lcron/address"  # key of the launcher's store: where the store of this start is
_RETRY = 0.1  # seconds


@dataclass(frozen=True)
class Processes:
    """This process among those of a training: its ``rank`` of ``count``."""

    rank: int
    count: int
    main: dist.ProcessGroup
    control: dist.ProcessGroup
    ahead: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """Rank 0, which alone writes the run's files and speaks."""
        return self.rank == 0

    def slice_of(self, total: int) -> slice:
        """This process's part of ``total`` things, such as the requests of a global batch."""
        return slice(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; of the same bits in each."""
        dist.all_reduce(values, group=self.main)
        return values

    def all_max(self, values: Tensor) -> Tensor:
        """The greatest over all processes, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.main)
        return values

    def exchange(
        self, values: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Send the first ``sent[0]`` rows of ``values`` to process 0, the next ``sent[1]`` to process 1, and so on;
        what the others sent here, [sum(received), ...] in the order of their ranks."""
        result = values.new_empty(sum(received), *values.shape[1:])
        dist.all_to_all_single(result, values.contiguous(), list(received), list(sent), group=group or self.main)
        return result

    def gather(self, value: Any) -> list[Any]:
        """The JSON value that each process gave, in the order of the ranks."""
        data = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.control)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.control)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def wait(self) -> None:
        """Until every process is here."""
        dist.barrier(group=self.control)


def launched() -> bool:
    """Whether this is one of several processes that torchrun, or Ray Train, started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_initialized() and dist.get_world_size() > 1)


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Processes | None]:
    """This process among its training's; None when it is the only one. A collective that takes longer than ``timeout``
    seconds fails."""
    if not launched():
        yield None
        return
    limit, own = timedelta(seconds=timeout), not dist.is_initialized()
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            backend, store=_fresh_store(rank, count, limit), rank=rank, world_size=count, timeout=limit
        )
    # new_group does not take the default group's timeout.
    control, ahead = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
    assert dist.group.WORLD is not None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, control, ahead)
    finally:
        if own:
            dist.destroy_process_group()


def _fresh_store(rank: int, count: int, timeout: timedelta) -> dist.Store:
    """A store of this start alone: the launcher's outlives a restart, and keeps the addresses of processes that died
    (https://github.com/pytorch/pytorch/issues/135712). Process 0 says in it where the new one is."""
    launcher, _, _ = next(iter(dist.rendezvous("env://", rank, count, timeout=timeout)))
    if rank == 0:
        host = _own_address()
        store = dist.TCPStore(host, 0, count, is_master=True, timeout=timeout, wait_for_workers=False)
        launcher.set(_ADDRESS, f"{host} {store.port}")
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:
        host, port = launcher.get(_ADDRESS).decode().split()
        try:
            return dist.TCPStore(host, int(port), count, is_master=False, timeout=timeout, wait_for_workers=False)
        except dist.DistError:  # that of an earlier start; process 0 has not said the new one yet
            if time.monotonic() > end:
                raise
            time.sleep(_RETRY)


def _own_address() -> str:
    """This machine's address on the way to the launcher's store."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        address: str = way.getsockname()[0]
        return address


def agreed(processes: Processes | None, function: Callable[[], T]) -> T:
    """``function()`` on every process; an InputError of one is raised by all."""
    if processes is None:
        return function()
    result, problem = None, ""
    try:
        result = function()
    except InputError as error:
        problem = str(error)
    first = next((said for said in processes.gather(problem) if said), None)
    if first is not None:
        raise InputError(first)
    return result  # type: ignore[return-value]
