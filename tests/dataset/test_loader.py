"""Batches of a day: which requests, in which order, and what the thread that assembles them does."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deep_components.batch import CascadeBatch, Features, RowFeatures, SlotFeatures
from deep_components.cascade import TWO_STAGE
from deep_components.dataset import loader
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.loader import batches, steps_of, training_order
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from tests.dataset.synthetic import DAY, random_log, write_log
from tests.schemas import RECFLOW

CPU = torch.device("cpu")
REQUESTS = 23


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> DayCache:
    return open_log(write_log(tmp_path_factory.mktemp("log"), random_log(REQUESTS))).open_day(DAY, TWO_STAGE)


class Shift:
    """A stand-in for the tables: rows are the log's indices and 1, slots are rows and 1."""

    def __call__(self, batch: CascadeBatch[Features]) -> CascadeBatch[SlotFeatures]:
        return self.slots(self.rows(batch))

    def rows(self, batch: CascadeBatch[Features]) -> CascadeBatch[RowFeatures]:
        features = batch.features
        item = {name: ids + 1 for name, ids in features.item.items()}
        shifted = RowFeatures(features.request, features.history, item, features.history_mask)
        return CascadeBatch(batch.request_id, shifted, batch.targets)

    def slots(self, batch: CascadeBatch[RowFeatures]) -> CascadeBatch[SlotFeatures]:
        features = batch.features
        item = {name: ids + 1 for name, ids in features.item.items()}
        rows = {"video": torch.arange(3)}
        shifted = SlotFeatures(features.request, features.history, item, features.history_mask, rows)
        return CascadeBatch(batch.request_id, shifted, batch.targets)


PREPARE = Shift()


# ---------------------------------------------------------------------------------------------- order


def named(day: str, requests: int) -> DayCache:
    return DayCache(day, {"request_id": np.arange(requests)}, RECFLOW, np.zeros(0, np.int64), 0)


def test_without_shuffling_the_order_is_the_file_s() -> None:
    assert training_order(named(DAY, 5), seed=3, epoch=1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_the_order_is_a_permutation_that_seed_epoch_and_day_name() -> None:
    def order(seed: int = 30, epoch: int = 0, day: str = DAY) -> tuple[int, ...]:
        return tuple(training_order(named(day, 200), seed, epoch, shuffle=True).tolist())

    assert sorted(order()) == list(range(200))
    np.random.seed(5)  # noqa: NPY002 (a global generator must not matter)
    torch.manual_seed(5)
    assert order() == order()
    others = [order(seed=31), order(epoch=1), order(day="2024-01-16"), order(seed=0, epoch=30), order(seed=1, epoch=29)]
    assert len({order(), *others}) == 6
    assert order() != tuple(range(200))


def test_whole_batches_are_counted() -> None:
    assert [steps_of(named(DAY, requests), 10) for requests in (10, 19, 20, 29)] == [1, 1, 2, 2]
    for requests in (0, 9):
        with pytest.raises(InputError, match=rf"{DAY} has {requests} requests.*--batch_size=10"):
            steps_of(named(DAY, requests), 10)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [1, 4, REQUESTS - 1, REQUESTS, REQUESTS + 1])
def test_every_request_comes_once_and_the_last_batch_may_be_smaller(day: DayCache, batch_size: int) -> None:
    order = training_order(day, seed=1, epoch=0, shuffle=True)
    found = list(batches(day, order, batch_size, CPU, PREPARE))
    sizes = [len(batch.request_id) for batch in found]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1) and 0 < sizes[-1] <= batch_size and sum(sizes) == REQUESTS
    ids = torch.cat([batch.request_id for batch in found])
    np.testing.assert_array_equal(ids, day.columns["request_id"][order])
    assert len(set(ids.tolist())) == REQUESTS


def test_batches_are_those_of_the_day(day: DayCache) -> None:
    order = training_order(day, seed=2, epoch=0, shuffle=True)
    for number, batch in enumerate(batches(day, order, 5, CPU, PREPARE)):
        expected = PREPARE(day.batch(order[5 * number : 5 * number + 5]))
        for ours, theirs in zip(batch.tensors(), expected.tensors(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert number == 4


def test_batches_go_to_the_device_asked_for(day: DayCache) -> None:
    batch = next(batches(day, np.arange(3), 2, torch.device("meta"), PREPARE))
    assert {tensor.device.type for tensor in batch.features.item.values()} == {"meta"}


def test_no_requests_give_no_batches(day: DayCache) -> None:
    assert list(batches(day, np.zeros(0, np.int64), 4, CPU, PREPARE)) == []


def _smallest(value: int) -> np.dtype:
    """The smallest signed type that holds the value, and 1."""
    return np.result_type(np.int8, np.min_scalar_type(min(value, -value - 1)))


@pytest.mark.parametrize(
    "value", [0, 127, 128, -128, -129, 2**15 - 1, 2**15, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, -(2**63)]
)
def test_a_resident_day_loses_no_digit(value: int) -> None:
    """-2^63 is its own absolute value."""
    values = torch.tensor([1, value])
    assert torch.equal(loader._long(loader._short(values)), values)
    assert loader._short(values).dtype == torch.from_numpy(np.array([np.int64(value)]).astype(_smallest(value))).dtype


@pytest.mark.parametrize("rows_at_a_time", [4, 1 << 13])
def test_a_resident_day_gives_the_same_batches(
    day: DayCache, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_REQUESTS_PER_COPY", rows_at_a_time)
    order = training_order(day, seed=2, epoch=0, shuffle=True)[:17]
    pairs = zip(
        batches(day, order, 5, CPU, PREPARE), batches(day, order, 5, CPU, PREPARE, day_on_device=True), strict=True
    )
    for one, other in pairs:
        for ours, theirs in zip(one.tensors(), other.tensors(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------- the thread


class Watched:
    """Stands for a day: notes which requests are asked for, by which thread, and fails from one on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.fails_at = fails_at

    def batch(self, requests: np.ndarray) -> Any:
        first = int(requests[0])
        self.threads.add(threading.current_thread())
        if first == self.fails_at:
            raise OSError("the disk is gone")
        self.asked.append(first)
        return Assembled(first)

    def wait(self, asked: list[int]) -> None:
        """Until just these have been asked for; a moment more to see that nothing else is."""
        limit = time.monotonic() + 10
        while self.asked != asked and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(0.02)
        assert self.asked == asked

    def ended(self) -> bool:
        return bool(self.threads) and not any(thread.is_alive() for thread in self.threads)


class Assembled:
    def __init__(self, first: int) -> None:
        self.first = first

    def to(self, device: torch.device) -> int:
        assert device == CPU
        return self.first


def run(day: Watched, requests: int) -> Any:
    """The batches of one request each."""
    stand_in: Any = day
    unchanged: Any = lambda batch: batch  # noqa: E731
    return batches(stand_in, np.arange(requests), 1, CPU, unchanged)


def test_one_batch_is_assembled_ahead_of_its_use_by_another_thread() -> None:
    day = Watched()
    found = run(day, 5)
    day.wait([])
    for number in range(5):
        assert next(found) == number
        day.wait(list(range(min(number + 2, 5))))
    assert next(found, None) is None
    assert threading.current_thread() not in day.threads and day.ended()


def test_an_error_of_the_thread_comes_through_after_the_batches_before_it() -> None:
    day = Watched(fails_at=3)
    found = run(day, 6)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    assert day.ended() and day.asked == [0, 1, 2]
    assert next(found, None) is None


def test_the_thread_ends_with_a_loop_that_is_left_early() -> None:
    day = Watched()
    for number in run(day, 100):
        if number == 2:
            break
    else:
        raise AssertionError("the loop was not left")
    limit = time.monotonic() + 10
    while not day.ended() and time.monotonic() < limit:
        time.sleep(0.002)
    assert day.ended() and len(day.asked) <= 4


def test_an_error_of_the_user_ends_the_thread() -> None:
    day = Watched()
    found = run(day, 100)
    with pytest.raises(RuntimeError):
        for _ in found:
            raise RuntimeError
    found.close()
    assert day.ended()


def test_a_real_day_can_be_removed_while_it_is_read(tmp_path: Path) -> None:
    """Memory maps stay readable: a second run with other settings may remove the cache under the first."""
    opened = open_log(write_log(tmp_path, random_log(6))).open_day(DAY, TWO_STAGE)
    found = batches(opened, np.arange(6), 2, CPU, PREPARE)
    next(found)
    (folder,) = (tmp_path / "cache" / "two_stage").iterdir()
    for path in folder.iterdir():
        path.unlink()
    assert sum(len(batch.request_id) for batch in found) == 4
