"""What processes do beside the steps of a training: open days for one another, and evaluate a day together."""

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deep_components.dataset import columnar
from deep_components.dataset.columnar import DayCache, add_verified, verified_days
from deep_components.distributed.processes import Processes, agreed
from deep_components.evaluation.share import ALONE, Share

T = TypeVar("T")

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MEETING = 0.5  # seconds between two


@dataclass(frozen=True)
class _Together:
    """The :class:`Share` of one of several processes."""

    processes: Processes

    @property
    def is_first(self) -> bool:
        return self.processes.is_first

    def slice_of(self, total: int) -> slice:
        return self.processes.slice_of(total)

    def agreed(self, function: Callable[[], T]) -> T:
        return agreed(self.processes, function)

    def opened(self, names: Sequence[str], open_day: Callable[[str], DayCache]) -> dict[str, DayCache]:
        return open_days(names, open_day, self.processes)

    def gathered(self, columns: Mapping[str, Tensor], only_first: bool = False) -> dict[str, Tensor]:
        return _gathered(columns, self.processes, only_first)


def share_of(processes: Processes | None) -> Share:
    """What an evaluation takes for these processes; None: of one alone."""
    return ALONE if processes is None else _Together(processes)


def open_days(
    names: Sequence[str], open_day: Callable[[str], DayCache], processes: Processes | None
) -> dict[str, DayCache]:
    """``open_day(name)`` of each day, on every process. A day that must be built is built by one of them, while others
    build other days, and its columns are verified by one process of a machine. InputError of one is raised by all."""
    if processes is None:
        return {name: open_day(name) for name in names}
    rank, count = processes.rank, processes.count
    machines = processes.gather(_machine())
    near = [other for other in range(count) if machines[other] == machines[rank]]
    opened: dict[str, DayCache] = {}

    def opening(part: Sequence[str]) -> None:
        opened.update({name: open_day(name) for name in part if name not in opened})

    # Build, in a folder that may be shared; verify what other machines have built, or build it here too; open all.
    with _said_once(processes):
        for part in (names[rank::count], names[near.index(rank) :: len(near)], names):
            patiently(processes, partial(opening, part))
            verified = processes.gather(verified_days())
            add_verified(name for other in near for name in verified[other])
    return {name: opened[name] for name in names}


@contextmanager
def _said_once(processes: Processes) -> Iterator[None]:
    """What an opened day says of itself, the first process says for all."""
    said = logging.getLogger(columnar.__name__)
    before, said.disabled = said.disabled, said.disabled or not processes.is_first
    try:
        yield
    finally:
        said.disabled = before


def patiently(processes: Processes, function: Callable[[], T]) -> T:
    """:func:`agreed`, for what may take one process longer than a collective may: the others do not wait in one, but
    all meet now and then until each is done."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=work, daemon=True).start()  # a daemon: an interrupted process does not wait for it
    while True:
        wait([done], timeout=_MEETING)
        if all(processes.gather(done.done())):
            return agreed(processes, done.result)


def _machine() -> str:
    """This machine, as it runs; others, and containers with files of their own, have other names."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else str(os.getpid())
    return f"{platform.node()} {boot}"


def _gathered(columns: Mapping[str, Tensor], processes: Processes, only_first: bool) -> dict[str, Tensor]:
    """See :meth:`Share.gathered`; one exchange a column."""
    shapes = processes.gather({name: list(values.shape) for name, values in columns.items()})
    types = processes.gather({name: str(values.dtype).removeprefix("torch.") for name, values in columns.items()})
    kinds = {name: getattr(torch, kind) for of_process in types for name, kind in of_process.items()}
    found = {}
    for name, kind in kinds.items():
        there = [of_process[name] for of_process in shapes if name in of_process]
        width = max((shape[1] for shape in there if len(shape) > 1), default=None)
        empty = torch.empty((0,) if width is None else (0, width), dtype=kind)
        values = columns.get(name, empty)
        values = values if width is None else F.pad(values, (0, width - values.shape[1]))
        rows = [of_process.get(name, [0])[0] for of_process in shapes]
        whole = _of_all(values, rows, processes, only_first)
        if whole is not None:
            found[name] = whole
    return found


def _of_all(values: Tensor, rows: Sequence[int], processes: Processes, only_first: bool) -> Tensor | None:
    """The ``rows`` of each process; None where only the first gets them."""
    shape, count = values.shape[1:], processes.count
    size = values.element_size() * shape.numel()
    data = values.contiguous().flatten().view(torch.uint8)  # what collectives do not know, as truth values, too
    receivers = 1 if only_first else count
    sent = [len(data)] * receivers + [0] * (count - receivers)
    gets = not only_first or processes.is_first
    received = [number * size for number in rows] if gets else [0] * count
    arrived = processes.exchange(data.repeat(receivers), sent, received, processes.control)
    return arrived.view(values.dtype).view(sum(rows), *shape) if gets else None
