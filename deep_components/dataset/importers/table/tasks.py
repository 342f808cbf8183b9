"""Work in several processes of this machine, or as tasks of a Ray cluster."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from deep_components.errors import InputError

ENGINES = ("process", "ray")

# run(function, tasks): function(*task) of each, as they end. A worker finds the function by its name in its module.
Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def workers(jobs: int, engine: str = "process") -> Iterator[Run]:
    """A way to do tasks, ``jobs`` at a time; when the block ends, however it does, no worker is left."""
    if engine == "ray":
        with _on_ray(jobs) as run:
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
def _on_ray(jobs: int) -> Iterator[Run]:
    """Tasks of the Ray cluster that RAY_ADDRESS names, else of one on this machine. Its nodes need the project, its
    packages, the table and the output folder under the same paths."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"--engine=ray: {sys.executable} lacks ray; run: {sys.executable} -m pip install -r requirements-ray.txt"
        ) from error
    known = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    ray.init(runtime_env={"env_vars": known}, include_dashboard=False, log_to_driver=False, logging_level="error")

    def run(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        # A task that is done twice would write its rows twice, so none is tried again.
        task = ray.remote(num_cpus=1, max_retries=0)(function)
        left = list(tasks)
        waiting = [task.remote(*arguments) for arguments in left[:jobs]]
        del left[:jobs]
        while waiting:
            ended, waiting = ray.wait(waiting, num_returns=1)
            if left:
                waiting.append(task.remote(*left.pop(0)))
            yield _result(ray, ended[0])

    try:
        yield run
    finally:
        ray.shutdown()


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise InputError(f"--engine=ray: a worker ended ({str(error).splitlines()[0]}); see Ray's logs") from error
