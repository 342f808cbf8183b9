"""Batches of a day, in a seeded order, assembled one ahead of their use."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from deep_components.batch import CascadeBatch, Features, RowFeatures, SlotFeatures
from deep_components.dataset.columnar import DayCache
from deep_components.errors import InputError

_REQUESTS_PER_COPY = 8192
_SHORT = (torch.int8, torch.int16, torch.int32)

# (batch, day, its requests, those of the whole batch of which it is a part) -> the batch with more items
# (dataset/random_items.py)
Join = Callable[[CascadeBatch[Any], DayCache, np.ndarray, np.ndarray], CascadeBatch[Any]]


class Prepare(Protocol):
    """Translates the ids of a batch: the log's indices to rows of tables, these to slots (``tables/lookup.py``)."""

    def __call__(self, batch: CascadeBatch[Features], /) -> CascadeBatch[SlotFeatures]:
        """Both steps."""

    def rows(self, batch: CascadeBatch[Features], /) -> CascadeBatch[RowFeatures]:
        """The first step; may be taken once for the whole day."""

    def slots(self, batch: CascadeBatch[RowFeatures], /) -> CascadeBatch[SlotFeatures]:
        """The second step, of one batch, on the device where it lies."""


def training_order(day: DayCache, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Positions of the day's requests in the order they are trained on: file order, or a permutation that depends on
    (seed, epoch, day) alone."""
    if not shuffle:
        return np.arange(len(day))
    return np.random.default_rng([seed, epoch, int(day.day.replace("-", ""))]).permutation(len(day))


def steps_of(day: DayCache, batch_size: int) -> int:
    """Training steps in a day: whole batches, the last partial one is dropped.

    Raises InputError when the day holds fewer requests than a batch.
    """
    if len(day) < batch_size:
        raise InputError(
            f"day {day.day} has {len(day)} requests, fewer than --batch_size={batch_size}, so it would be skipped; "
            f"choose a batch size of at most {len(day)}"
        )
    return len(day) // batch_size


def batches(
    day: DayCache,
    order: np.ndarray,
    batch_size: int,
    device: torch.device,
    prepare: Prepare,
    day_on_device: bool = False,
    join: Join | None = None,
    part: slice = slice(None),
) -> Iterator[CascadeBatch[SlotFeatures]]:
    """The day's requests in the given order, ``batch_size`` at a time (the last batch may be smaller), on ``device``.

    The next batch is assembled and prepared by a thread while the current one is used; for a GPU in pinned memory, so
    that its copy does not hold up the computation. With ``day_on_device`` the whole day is copied to the device first
    and batches are taken from there. ``join`` adds items to a batch before it is prepared.
    """
    if not len(order):
        return
    if day_on_device:
        yield from _resident_batches(day, order, batch_size, device, prepare, join)
        return
    pieces = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def assemble(whole: np.ndarray) -> CascadeBatch[SlotFeatures]:
        requests = whole[part]
        read = day.batch(requests)
        batch = prepare(join(read, day, requests, whole) if join is not None else read)
        return batch.pin_memory() if device.type == "cuda" else batch  # no views of a row

    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(assemble, pieces[0])
        for following in [*pieces[1:], None]:
            batch = pending.result()
            if following is not None:
                pending = pool.submit(assemble, following)
            yield batch.to(device)


def _resident_batches(
    day: DayCache, order: np.ndarray, batch_size: int, device: torch.device, prepare: Prepare, join: Join | None
) -> Iterator[CascadeBatch[SlotFeatures]]:
    """Batches of a day that lies on the device, in the smallest types that hold its values, lists of varying length
    padded to the day's longest."""
    chunks: list[list[torch.Tensor]] = []
    for first in range(0, len(day), _REQUESTS_PER_COPY):
        batch = prepare.rows(day.batch(np.arange(first, min(first + _REQUESTS_PER_COPY, len(day))), day.num_items))
        chunks.append(batch.apply(_short).to(device).tensors())
    whole = [torch.cat(parts) for parts in zip(*chunks, strict=True)]  # in the widest of its chunks' types
    chunks.clear()
    positions = torch.from_numpy(order).to(device)
    for first in range(0, len(order), batch_size):
        requests, columns = order[first : first + batch_size], iter(whole)
        chosen = positions[first : first + batch_size]
        taken = batch.apply(lambda _: _long(next(columns)[chosen])).first_items(day.longest(requests))  # noqa: B023
        yield prepare.slots(join(taken, day, requests, requests) if join is not None else taken)


def _short(values: torch.Tensor) -> torch.Tensor:
    """int64 in the smallest type that holds all values."""
    if values.dtype != torch.int64 or not values.numel():
        return values
    low, high = int(values.min()), int(values.max())
    fitting = (kind for kind in _SHORT if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max)
    return values.to(next(fitting, torch.int64))


def _long(values: torch.Tensor) -> torch.Tensor:
    return values.long() if values.dtype in _SHORT else values
