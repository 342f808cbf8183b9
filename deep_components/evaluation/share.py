"""One process's share of an evaluation. Who the others are, and how they talk, is known elsewhere
(distributed/spread.py)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from deep_components.dataset.columnar import DayCache

T = TypeVar("T")


class Share(Protocol):
    """Of processes that evaluate a day together, each a range of its requests. All call the methods in one order."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""

    def slice_of(self, total: int) -> slice:
        """This process's range of ``total`` things; those of all are theirs in order."""

    def agreed(self, function: Callable[[], T]) -> T:
        """``function()`` on every process; an InputError of one is raised by all."""

    def opened(self, names: Sequence[str], open_day: Callable[[str], DayCache]) -> dict[str, DayCache]:
        """The days, which the processes build and verify for one another. InputError as :meth:`agreed`."""

    def gathered(self, columns: Mapping[str, Tensor], only_first: bool = False) -> dict[str, Tensor]:
        """Name -> the rows [n, ...] of all processes in order, with the longest second dimension, 0 beyond one's own;
        ``columns`` are this one's, on the CPU, {} where it has none. ``only_first``: {} for the other processes."""


class Alone:
    """Of a process that does all itself."""

    is_first = True

    def slice_of(self, total: int) -> slice:
        return slice(0, total)

    def agreed(self, function: Callable[[], T]) -> T:
        return function()

    def opened(self, names: Sequence[str], open_day: Callable[[str], DayCache]) -> dict[str, DayCache]:
        return {name: open_day(name) for name in names}

    def gathered(self, columns: Mapping[str, Tensor], only_first: bool = False) -> dict[str, Tensor]:
        return dict(columns)


ALONE = Alone()


def requests_of(share: Share, requests: int, batch_size: int) -> slice:
    """The requests of a day that a process scores: whole batches of one process, so that none is cut otherwise."""
    batches = share.slice_of(-(-requests // batch_size))
    return slice(min(batches.start * batch_size, requests), min(batches.stop * batch_size, requests))
