"""Batches of a day, in a seeded order, assembled one ahead of their use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from deep_components.batch import CascadeBatch
from deep_components.dataset.columnar import DayCache
from deep_components.errors import InputError


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


def batches(day: DayCache, order: np.ndarray, batch_size: int, device: torch.device) -> Iterator[CascadeBatch]:
    """The day's requests in the given order, ``batch_size`` at a time (the last batch may be smaller), on ``device``.

    The next batch is assembled by a thread while the current one is used; for a GPU in pinned memory, so that its copy
    does not hold up the computation.
    """
    if not len(order):
        return
    pieces = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def assemble(requests: np.ndarray) -> CascadeBatch:
        batch = day.batch(requests)
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(assemble, pieces[0])
        for following in [*pieces[1:], None]:
            batch = pending.result()
            if following is not None:
                pending = pool.submit(assemble, following)
            yield batch.to(device)
