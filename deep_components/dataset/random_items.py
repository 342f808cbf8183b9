"""Random items: items of other requests that join a request's own, as easy negatives.

They come after the request's own items, in a group after the last. Their label is 0, and the own items' labels are one
higher, so that they are below all of them. None of them equals an item of the request, or another of them, in every
field; where there are too few such items, what is left is masked.

Which items these are is a function of a key, the request, and the pool of items that they are drawn from: no generator
keeps a state, so threads, devices and interruptions do not matter. A request walks through the pool from its own start
in steps of its own, which meets every item slot once before it comes back, and takes what is new to it. An item that
many requests have is met more often.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from deep_components.batch import CascadeBatch, Features, RowFeatures, Targets
from deep_components.dataset.columnar import ABSENT, DayCache

F = TypeVar("F", Features, RowFeatures)

_NUMBERS_AT_A_TIME = 1 << 22
_EVALUATION = 0x4C434153  # in the place of a training's seed, epoch and day


def with_items_of_batch(
    batch: CascadeBatch[F], day: DayCache, requests: np.ndarray, whole: np.ndarray, count: int, group: int, seed: int,
    epoch: int,
) -> CascadeBatch[F]:  # fmt: skip
    """The batch, of the ``requests`` of the day, with up to ``count`` items of the other requests of the ``whole``
    batch, of which it is a part, for each.

    They depend on (seed, epoch, day), the request, and the whole batch's requests in their order."""
    own = day.item_digests(requests)
    everyone = len(requests) == len(whole)
    of_whole = (own if everyone else day.item_digests(whole)).ravel()
    there = batch.features.item if everyone else day.batch(whole).features.item
    pool = np.flatnonzero(of_whole != ABSENT)
    digests = of_whole[pool]
    start = _hash((seed, epoch, int(day.day.replace("-", ""))), requests)
    chosen, found = _draw(own, start, count, len(pool), lambda positions: digests[positions])
    slots = torch.from_numpy(pool[chosen] if len(pool) else chosen)
    items = {name: values.flatten(0, 1)[slots.to(values.device)] for name, values in there.items()}
    return _joined(batch, items, torch.from_numpy(found), group)


def with_items_of_day(
    batch: CascadeBatch[Features], day: DayCache, requests: np.ndarray, count: int, group: int
) -> CascadeBatch[Features]:
    """The batch, of the ``requests`` of the day, with up to ``count`` items of the day's other requests for each.

    They depend on the request's id and on the day, not on the batch."""
    start = _hash((_EVALUATION,), batch.request_id.numpy())
    chosen, there = _draw(day.item_digests(requests), start, count, day.num_item_rows, day.row_digests)
    return _joined(batch, day.items(chosen), torch.from_numpy(there), group)


def _joined(batch: CascadeBatch[F], items: dict[str, Tensor], there: Tensor, group: int) -> CascadeBatch[F]:
    own, there = batch.targets, there.to(batch.targets.mask.device)
    zeros = torch.zeros_like(there, dtype=torch.int64)
    targets = Targets(
        labels=torch.cat([own.labels + 1, zeros], dim=1),
        mask=torch.cat([own.mask, there], dim=1),
        group=torch.cat([own.group, zeros + group], dim=1),
    )
    item = {name: torch.cat([values, items[name]], dim=1) for name, values in batch.features.item.items()}
    features: Any = replace(batch.features, item=item)
    return replace(batch, features=features, targets=targets)


def _draw(
    own: np.ndarray, start: np.ndarray, count: int, total: int, digests: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions 0 .. total - 1 of up to ``count`` items of a pool for each request, and which there are. [B, n] each,
    n <= count.

    Args:
        own: [B, N] uint64, the digests of the requests' own items.
        start: [B] uint64, from which a request's walk follows.
        digests: those of the items at any positions.
    """
    found, there = np.zeros((len(own), count), np.int64), np.zeros((len(own), count), bool)
    width, wanting = min(total, 2 * count + 64), np.arange(len(own))
    while total and len(wanting):
        pieces = -(-len(wanting) * (own.shape[1] + width) // _NUMBERS_AT_A_TIME)
        for rows in np.array_split(wanting, pieces):
            positions = _walk(start[rows], width, total)
            new = _new(own[rows], digests(positions))
            rank = new.cumsum(axis=1)
            request, step = np.nonzero(new & (rank <= count))
            index = rows[request], rank[request, step] - 1
            found[index], there[index] = positions[request, step], True
        wanting = wanting[~there[wanting, -1]] if width < total else wanting[:0]
        width = min(total, 4 * width)  # the beginning of a longer walk is the shorter one
    most = int(there.sum(axis=1).max(initial=0))
    return found[:, :most], there[:, :most]


def _walk(start: np.ndarray, width: int, total: int) -> np.ndarray:
    """The first ``width`` of 0 .. total - 1 that each request meets, all different. [B, width] int64."""
    first = (start % np.uint64(total)).astype(np.int64)
    step = 1 + total // 4 + (_hash((1,), start) % np.uint64(max(1, total // 2))).astype(np.int64)
    while (shared := np.gcd(step, total) != 1).any():
        step += shared
    return (first[:, None] + np.arange(width) * step[:, None]) % total


def _new(own: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Which of the ``drawn`` items [B, W] are there, and equal none of the request's own and none before them."""
    both = np.concatenate([own, drawn], axis=1)
    order = both.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(both, order, axis=1)
    again = np.zeros(both.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return ~again[:, own.shape[1] :] & (drawn != ABSENT)


def _hash(key: Sequence[int], values: np.ndarray) -> np.ndarray:
    """64 bits for each value that depend on the key too (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    state, own = np.zeros(values.shape, np.uint64), values.astype(np.uint64)
    for part in (*(np.full_like(own, number) for number in key), own):
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
