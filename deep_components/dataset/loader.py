"""Batches of a day, in a seeded order, assembled one ahead of their use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from deep_components.batch import CascadeBatch
from deep_components.dataset.columnar import DayCache
from deep_components.errors import InputError
from deep_components.tables.rows import BatchRows

_REQUESTS_PER_COPY = 8192


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
    prepare: BatchRows | None = None,
    day_on_device: bool = False,
) -> Iterator[CascadeBatch]:
    """The day's requests in the given order, ``batch_size`` at a time (the last batch may be smaller), on ``device``.

    The next batch is assembled, and its ids rewritten as ``prepare`` says, by a thread while the current one is used;
    for a GPU in pinned memory, so that its copy does not hold up the computation. With ``day_on_device`` the whole day
    is copied to the device first and batches are taken from there.
    """
    prepare = prepare or BatchRows({}, {}, {})
    if not len(order):
        return
    if day_on_device:
        yield from _resident_batches(day, order, batch_size, device, prepare)
        return
    pieces = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def assemble(requests: np.ndarray) -> CascadeBatch:
        batch = prepare(day.batch(requests))
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(assemble, pieces[0])
        for following in [*pieces[1:], None]:
            batch = pending.result()
            if following is not None:
                pending = pool.submit(assemble, following)
            yield batch.to(device)


def _resident_batches(
    day: DayCache, order: np.ndarray, batch_size: int, device: torch.device, prepare: BatchRows
) -> Iterator[CascadeBatch]:
    """Batches of a day that lies on the device, in the smallest types that hold its values."""
    group = torch.from_numpy(day.group).to(device)
    chunks: list[list[torch.Tensor]] = []
    for first in range(0, len(day), _REQUESTS_PER_COPY):
        batch = prepare.table_rows(day.batch(np.arange(first, min(first + _REQUESTS_PER_COPY, len(day)))))
        # The items' groups are the same for all requests: something that has a row per request stands in for them.
        batch = replace(batch, targets=replace(batch.targets, group=batch.request_id))
        chunks.append(batch.apply(_short).to(device).tensors())
    whole = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    chunks.clear()
    places = torch.from_numpy(order).to(device)
    for first in range(0, len(order), batch_size):
        chosen = places[first : first + batch_size]
        columns = iter(whole)
        taken = batch.apply(lambda _: _long(next(columns)[chosen]))  # noqa: B023
        yield prepare.distinct_rows(replace(taken, targets=replace(taken.targets, group=group)))


def _short(values: torch.Tensor) -> torch.Tensor:
    """int64 as int32 where all values fit."""
    limits = torch.iinfo(torch.int32)
    fits = values.dtype == torch.int64 and (
        not values.numel() or (int(values.min()) >= limits.min and int(values.max()) <= limits.max)
    )
    return values.int() if fits else values


def _long(values: torch.Tensor) -> torch.Tensor:
    return values.long() if values.dtype == torch.int32 else values
