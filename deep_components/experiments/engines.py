"""Where runs are made: a pool of processes on this machine, or a Ray cluster."""

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from deep_components.experiments.execution import Commands, Options, Outcome, Slot, execute
from deep_components.experiments.plan import Run
from deep_components.ray_cluster import RETRIES, ray_cluster

_TICK = 1.0  # seconds after which an engine lets its caller look at the progress


def slots(
    jobs: int, devices: int, cores: int, device_named: bool = False, threads: int | None = None, processes: int = 1
) -> list[Slot]:
    """One slot for each of ``jobs`` runs at a time, of ``processes`` each, spread evenly over the CUDA devices unless
    the user's arguments name one, or a run takes several; the cores are shared out unless the user names the
    ``threads`` of a process. A single run is left to PyTorch's own choice of threads and device.
    """
    if jobs == 1:
        return [Slot(threads=threads, processes=processes)]
    each = threads or max(1, cores // (jobs * processes))
    several = devices and not device_named and processes == 1
    return [Slot(f"cuda:{job % devices}" if several else None, each, processes) for job in range(jobs)]


def run_locally(runs: Sequence[Run], slots: Sequence[Slot], options: Options) -> Iterator[list[Outcome]]:
    """Make the runs in order, one in each slot at a time; yields what ended, at least once a second.

    When the caller stops (an interruption), running commands are interrupted and waited for.
    """
    free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    commands = Commands()

    def make(run: Run) -> Outcome:
        slot = free.get()
        try:
            return execute(run, slot, options, commands)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        pending: set[Future[Outcome]] = {pool.submit(make, run) for run in runs}
        try:
            while pending:
                ended, pending = wait(pending, timeout=_TICK, return_when=FIRST_COMPLETED)
                yield [future.result() for future in ended]
        except BaseException:
            for future in pending:
                future.cancel()
            commands.stop()
            raise


def run_on_ray(runs: Sequence[Run], slot: Slot, gpus: bool, options: Options) -> Iterator[list[Outcome]]:
    """Make the runs as tasks of a Ray cluster (:func:`deep_components.ray_cluster.ray_cluster`). A run takes,
    for each of its processes, ``slot.threads`` CPUs and, where the cluster has them and ``gpus`` is true, a GPU. One
    whose worker was killed goes on from its saved state in another."""
    with ray_cluster() as ray:
        one_gpu = 1 if gpus and ray.cluster_resources().get("GPU") else 0
        cpus = (slot.threads or 1) * slot.processes
        task = ray.remote(num_cpus=cpus, num_gpus=one_gpu * slot.processes, max_retries=RETRIES)(execute)
        waiting: dict[Any, Run] = {task.remote(run, slot, options): run for run in runs}
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=_TICK)
            yield [_outcome(ray, reference, waiting.pop(reference)) for reference in ended]


def _outcome(ray: Any, reference: Any, run: Run) -> Outcome:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Outcome(run, "failed", error=f"its Ray worker ended: {reason}", code=1)
