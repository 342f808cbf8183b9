"""Answers in batches: what waits is computed together, in one thread, so that throughput grows with concurrency."""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Question = TypeVar("Question")
Result = TypeVar("Result")


class FullError(Exception):
    """As many wait as may wait."""


@dataclass(eq=False)  # two that ask the same are two
class _Waiting(Generic[Key, Question, Result]):
    key: Key
    question: Question
    size: int
    result: "asyncio.Future[Result]"


class Batches(Generic[Key, Question, Result]):
    """A queue of questions. Lives in an event loop; ``compute(key, questions)`` alone runs in the thread.

    Args:
        compute: the results of questions that have one key, in their order; an exception may be one. When it raises for
            several questions, they are computed again one by one, as one of them may be the reason.
        max_waiting: the sum of sizes that may wait; a single question of any size always may.
        max_batch: the sum of sizes computed together; a single question may be larger.
    """

    def __init__(
        self,
        compute: Callable[[Key, Sequence[Question]], Sequence[Result | Exception]],
        max_waiting: int,
        max_batch: int,
    ) -> None:
        self._compute, self._max_waiting, self._max_batch = compute, max_waiting, max_batch
        self._queue: deque[_Waiting[Key, Question, Result]] = deque()
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """The sum of sizes that wait."""
        return sum(one.size for one in self._queue)

    async def ask(self, key: Key, question: Question, size: int, seconds: float) -> Result:
        """The result, or the exception that computing it raised.

        FullError at once where no more may wait; TimeoutError after ``seconds``: a question that still waits then is
        never computed.
        """
        if self._queue and self.waiting + size > self._max_waiting:
            raise FullError
        one = _Waiting(key, question, size, asyncio.get_running_loop().create_future())
        self._queue.append(one)
        self._arrived.set()
        try:
            async with asyncio.timeout(seconds):
                return await one.result
        finally:
            if one in self._queue:
                self._queue.remove(one)

    async def work(self) -> None:
        """Compute what arrives, until this is cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                await self._arrived.wait()
                if batch := self._next():
                    results = await loop.run_in_executor(thread, self._results, batch)
                    for one, result in zip(batch, results, strict=True):
                        _hand_over(one.result, result)
                else:
                    self._arrived.clear()

    def _next(self) -> list[_Waiting[Key, Question, Result]]:
        """The first that waits and those that can be computed with it; they wait no longer."""
        batch: list[_Waiting[Key, Question, Result]] = []
        size = 0
        for one in self._queue:
            if not batch or (one.key == batch[0].key and size + one.size <= self._max_batch):
                batch.append(one)
                size += one.size
        for one in batch:
            self._queue.remove(one)
        return batch

    def _results(self, batch: Sequence[_Waiting[Key, Question, Result]]) -> Sequence[Result | Exception]:
        """In the thread. Exceptions are results too: whoever asked gets them."""
        try:
            return self._compute(batch[0].key, [one.question for one in batch])
        except Exception as error:
            return [error] if len(batch) == 1 else [self._results([one])[0] for one in batch]


def _hand_over(future: "asyncio.Future[Result]", result: Result | Exception) -> None:
    if future.done():  # nobody waits for it any more
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
