"""Random items: which ones join a request, and of what that depends."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deep_components.batch import CascadeBatch, Features
from deep_components.cascade import Cascade, Group, Stage
from deep_components.dataset.columnar import DayCache, read_day, write_day
from deep_components.dataset.loader import batches
from deep_components.dataset.random_items import with_items_of_batch, with_items_of_day
from deep_components.schema import Field, Schema
from deep_components.tables.lookup import TableLookup

CPU = torch.device("cpu")
REQUESTS, ITEMS, LONGEST, GROUP = 30, 6, 9, 2
DAY = "2026-03-01"
SCHEMA = Schema(
    (
        Field("user", "request", size=9),
        Field("video", "history", size=60, unknown=1),
        Field("video", "item", size=60, unknown=1),
        Field("price", "item", "number"),
        Field("genres", "item", size=5, length=2),
    )
)
STAGES = (Stage("retrieval", 3, "dssm"), Stage("rank", 2, "din", exposed_groups=1))
CASCADE = Cascade(STAGES, (Group("clicked"), Group("shown")), num_relevant=2)


def write(folder: Path, ragged: bool, videos: int = 60) -> DayCache:
    """A day of which many requests have the same items; of a rectangular one some are missing."""
    rng = np.random.default_rng(3)
    counts = rng.integers(1, LONGEST + 1, REQUESTS) if ragged else np.full(REQUESTS, ITEMS)
    video = np.concatenate([rng.choice(np.arange(1, videos), count, replace=False) for count in counts])
    mask = rng.random((REQUESTS, ITEMS)) < 0.8
    columns = {
        "request_id": rng.permutation(1000)[:REQUESTS],
        "request.user": rng.integers(0, 9, REQUESTS),
        "history.video": rng.integers(0, 60, (REQUESTS, 2)),
        "history.mask": np.ones((REQUESTS, 2), bool),
        "item.video": video,
        "item.price": (video % 3).astype(np.float32),  # of the video, but for some: these are other items
        "item.genres": np.stack([video % 5, video % 4], axis=-1),
        "item.label": rng.integers(0, 3, len(video)),
        "item.group": rng.integers(0, 2, len(video)),
    }
    columns["item.price"][::7] = 9
    offset = np.concatenate([[0], counts.cumsum()]) if ragged else None
    with write_day(folder / DAY, SCHEMA, REQUESTS, offset=offset) as files:
        for name, values in columns.items():
            whole = not ragged and name.startswith("item.")
            files.write(name, values.reshape(REQUESTS, ITEMS, *values.shape[1:]) if whole else values)
        if not ragged:
            files.write("item.mask", mask)
    return read_day(folder / DAY, DAY, CASCADE)


@pytest.fixture(scope="module", params=["ragged", "rectangular"])
def day(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DayCache:
    return write(tmp_path_factory.mktemp(request.param), request.param == "ragged")


Item = tuple[Any, ...]


def items(batch: CascadeBatch[Features], first: int | None = None, last: int | None = None) -> list[list[Item]]:
    """Of each request its present items, those of some slots, as tuples of all their fields."""
    fields = [batch.features.item[name][:, first:last].tolist() for name in ("video", "price", "genres")]
    there = batch.targets.mask[:, first:last].tolist()
    return [
        [(video, price, *genres) for video, price, genres, is_there in zip(*row, strict=True) if is_there]
        for row in zip(*fields, there, strict=True)
    ]


def of_batch(day: DayCache, requests: np.ndarray, count: int, seed: int = 30, epoch: int = 0) -> CascadeBatch[Features]:
    return with_items_of_batch(day.batch(requests), day, requests, requests, count, GROUP, seed, epoch)


def of_day(day: DayCache, requests: np.ndarray, count: int) -> CascadeBatch[Features]:
    return with_items_of_day(day.batch(requests), day, requests, count, GROUP)


Draw = Callable[[DayCache, np.ndarray, int], CascadeBatch[Features]]
either = pytest.mark.parametrize("draw", [of_batch, of_day])


@either
@pytest.mark.parametrize("count", [1, 5, 20, 500])
def test_items_of_other_requests_each_once(day: DayCache, draw: Draw, count: int) -> None:
    requests = np.random.default_rng(0).permutation(REQUESTS)[:8]
    alone, joined = day.batch(requests), draw(day, requests, count)
    width, pool = alone.targets.mask.shape[1], np.arange(REQUESTS) if draw is of_day else requests
    possible = {item for request in items(day.batch(pool)) for item in request}
    drawn = items(joined, first=width)
    for own, found in zip(items(alone), drawn, strict=True):
        assert len(set(found)) == len(found)
        assert set(found) <= possible - set(own)
        assert len(found) == min(count, len(possible - set(own)))  # all there are, where they are too few
    most = max(map(len, drawn))
    assert joined.targets.mask.shape == (8, width + most)  # no slot that nobody uses


@either
def test_they_come_after_the_own_items_and_below_them(day: DayCache, draw: Draw) -> None:
    requests = np.arange(9)
    alone, joined = day.batch(requests), draw(day, requests, 4)
    width = alone.targets.mask.shape[1]
    assert items(joined, last=width) == items(alone)
    assert torch.equal(joined.targets.mask[:, :width], alone.targets.mask)
    assert torch.equal(joined.targets.group[:, :width], alone.targets.group)
    assert torch.equal(joined.targets.labels[:, :width], alone.targets.labels + 1)
    assert alone.targets.labels[alone.targets.mask].min() == 0
    assert (joined.targets.labels[:, width:] == 0).all()
    assert (joined.targets.group[:, width:] == GROUP).all()
    for side in ("request", "history"):
        for name, values in getattr(alone.features, side).items():
            assert torch.equal(getattr(joined.features, side)[name], values)
    assert torch.equal(joined.request_id, alone.request_id)


def test_one_request_alone_gets_none_of_its_batch(day: DayCache) -> None:
    joined = of_batch(day, np.array([4]), 10)
    assert joined.targets.mask.shape[1] == day.batch(np.array([4])).targets.mask.shape[1]


def same(one: CascadeBatch[Any], other: CascadeBatch[Any]) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_seed_epoch_and_day_name_the_items_of_a_batch(day: DayCache) -> None:
    requests = np.arange(12)
    first = of_batch(day, requests, 5)
    np.random.seed(3)  # noqa: NPY002 (the process's generators must not matter)
    torch.manual_seed(3)
    assert same(of_batch(day, requests, 5), first)
    later = DayCache("2026-03-02", day.columns, day.schema, day.group, day.history_length)
    others = [of_batch(day, requests, 5, seed=31), of_batch(day, requests, 5, epoch=1), of_batch(later, requests, 5)]
    others += [of_batch(day, requests, 5, seed=0, epoch=30)]
    found = [str(items(batch)) for batch in (first, *others)]
    assert len(set(found)) == 5


def test_threads_and_their_order_do_not_matter(day: DayCache) -> None:
    parts = [np.arange(first, first + 5) for first in range(0, REQUESTS, 5)]
    expected = [of_batch(day, part, 5) for part in parts]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda part: of_batch(day, part, 5), reversed(parts)))
    assert all(map(same, reversed(found), expected))


@pytest.mark.parametrize("size", [1, 7, REQUESTS])
def test_those_of_the_day_do_not_depend_on_the_batch(day: DayCache, size: int) -> None:
    whole = items(of_day(day, np.arange(REQUESTS), 12))
    parts = [np.arange(REQUESTS)[first : first + size] for first in range(0, REQUESTS, size)]
    assert [request for part in parts for request in items(of_day(day, part, 12))] == whole


@pytest.mark.parametrize("join", [with_items_of_batch, with_items_of_day])
def test_the_loader_joins_them_before_it_looks_up_rows(day: DayCache, join: Callable[..., Any]) -> None:
    ids = {name: day.ids(name) for name in SCHEMA.tables}
    lookup = TableLookup(SCHEMA, ids, {"video": len(ids["video"])})

    def more(batch: Any, day: DayCache, requests: np.ndarray, whole: np.ndarray) -> Any:
        if join is with_items_of_day:
            return with_items_of_day(batch, day, requests, 6, GROUP)
        return with_items_of_batch(batch, day, requests, whole, 6, GROUP, seed=1, epoch=2)

    order = np.random.default_rng(1).permutation(REQUESTS)
    found = list(batches(day, order, 7, CPU, lookup, join=more))
    for batch, first in zip(found, range(0, REQUESTS, 7), strict=True):
        requests = order[first : first + 7]
        assert same(batch, lookup(more(day.batch(requests), day, requests, requests)))
    if join is with_items_of_batch:
        resident = list(batches(day, order, 7, CPU, lookup, day_on_device=True, join=more))
        assert all(map(same, found, resident))


def test_every_item_is_drawn_about_as_often_as_requests_have_it(tmp_path: Path) -> None:
    """So that no position of a list is preferred."""
    day, everyone = write(tmp_path, ragged=False), np.arange(REQUESTS)
    there = Counter(item for request in items(day.batch(everyone)) for item in request)
    drawn = Counter(
        item for seed in range(60) for found in items(of_batch(day, everyone, 3, seed), ITEMS) for item in found
    )
    usual = drawn.total() / there.total()
    once = [drawn[item] / usual for item, count in there.items() if count == 1]
    assert 0.7 < np.mean(once) < 1.4  # of one slot in 150: chance leaves a tenth
    assert min(once) > 0.3
    assert max(once) < 3
