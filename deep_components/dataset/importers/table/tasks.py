"""Work in several processes of this machine, or as tasks of a Ray cluster."""

import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deep_components.dataset.importers.table.scratch import once
from deep_components.errors import InputError
from deep_components.ray_cluster import RETRIES, ray_cluster

ENGINES = ("process", "ray")

# run(function, tasks): function(*task) of each, as they end. A worker finds the function by its name in its module.
Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def workers(jobs: int, scratch: Path, engine: str = "process") -> Iterator[Run]:
    """A way to do tasks, ``jobs`` at a time; when the block ends, however it does, no worker is left."""
    if engine == "ray":
        with _on_ray(jobs, scratch) as run:
            yield run
    elif jobs == 1:
        yield lambda function, tasks: (function(*task) for task in tasks)
    else:
        with _processes(jobs) as run:
            yield run


@contextmanager
def _processes(jobs: int) -> Iterator[Run]:
    # Spawned: a fork of a process that has threads may hang.
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _leave_signals_to_the_parent)

    def run(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        waiting: set[Future[Any]] = {pool.submit(function, *task) for task in tasks}
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()

    try:
        yield run
        pool.shutdown()
    except BrokenProcessPool as error:
        raise InputError(
            f"--jobs={jobs}: a worker process ended, most often for lack of memory; give a smaller number"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()
        pool.shutdown(wait=False, cancel_futures=True)


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _on_ray(jobs: int, scratch: Path) -> Iterator[Run]:
    """Tasks of a Ray cluster; one whose worker was killed is done again, as if it had not been begun."""
    with ray_cluster() as ray:

        def run(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            task = ray.remote(num_cpus=1, max_retries=RETRIES)(once)
            left, journals = list(tasks)[::-1], dict[Any, Path]()
            while left or journals:
                while left and len(journals) < jobs:
                    journal = scratch / f"{uuid.uuid4().hex}.journal"
                    journals[task.remote(function, journal, *left.pop())] = journal
                (ended,), _ = ray.wait(list(journals), num_returns=1)
                result, unneeded = _result(ray, ended)
                for path in (*unneeded, journals.pop(ended)):
                    path.unlink(missing_ok=True)
                yield result

        yield run


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise InputError(f"--engine=ray: a worker ended ({str(error).splitlines()[0]}); see Ray's logs") from error
