"""One training on a Ray cluster: Ray Train starts its processes, joins them, and starts them again when one ended.

What is written, and what a training goes on from, is the run folder's alone; Ray's checkpoints are not used.
"""

import contextlib
import importlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deep_components.errors import InputError, StoppedError
from deep_components.ray_cluster import ray_cluster
from deep_components.training.signals import ask_to_stop, stop_signals

_TICK = 0.5  # seconds between looks at what the processes say
_SECONDS_TO_END = 30.0  # that processes get when one of them has refused its input

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """How a process ended other than by being done: with an InputError's sentence, or that of a StoppedError."""

    sentence: str
    signal_number: int = 0


class Desk:
    """An actor: where the processes and the command that started them leave notes for one another."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}
        self._lines: list[tuple[int, str]] = []
        self._ended: Said | None = None
        self._signal = 0

    def begin(self, rank: int) -> int:
        """How often this rank has begun before."""
        self._starts[rank] = self._starts.get(rank, -1) + 1
        return self._starts[rank]

    def say(self, level: int, line: str) -> None:
        self._lines.append((level, line))

    def end(self, said: Said) -> None:
        self._ended = self._ended or said

    def wish(self, signal_number: int) -> None:
        self._signal = signal_number

    def wished(self) -> int:
        """The number of the signal that the command got; 0 before."""
        return self._signal

    def look(self) -> tuple[list[tuple[int, str]], Said | None]:
        """The lines said since the last look, and how the first process ended."""
        lines, self._lines = self._lines, []
        return lines, self._ended


def train_on_ray(
    argv: Sequence[str], module: str, folder: Path, processes: int, max_restarts: int, timeout: float, gpus: bool
) -> None:
    """Run ``main(argv)`` of a module, which trains into ``folder``, in so many processes of a Ray cluster
    (:func:`deep_components.ray_cluster.ray_cluster`). Each takes as many CPUs as OMP_NUM_THREADS says, one by default,
    and with ``gpus`` a GPU where the cluster has one for each. When a process ends they all start again from the saved
    state, up to ``max_restarts`` times. SIGINT and SIGTERM stop them with their state saved.

    Raises InputError and StoppedError as the processes do, and InputError when a process was killed once too often.
    """
    with ray_cluster(RAY_CHDIR_TO_TRIAL_DIR="0") as ray, _storage(folder) as storage:
        desk = ray.remote(num_cpus=0)(Desk).remote()
        task = {"argv": [*argv], "module": module, "folder": str(Path.cwd()), "desk": desk}
        trainer = _trainer(ray, task, storage, processes, max_restarts, timeout, gpus)
        fit = _Fit(trainer)
        fit.start()
        _attend(ray, desk, fit)
        ended = _look(ray, desk)
    if ended is not None and ended.signal_number:
        raise StoppedError(ended.sentence, ended.signal_number)
    if ended is not None:
        raise InputError(ended.sentence)
    if fit.error is not None:
        raise _reason(fit.error, max_restarts) from fit.error


class _Fit(threading.Thread):
    """The trainer's work, in a thread: in the main one it would take SIGINT for itself."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # raised in the main thread
            self.error = error


def _trainer(
    ray: Any, task: dict[str, Any], storage: Path, processes: int, max_restarts: int, timeout: float, gpus: bool
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    threads = os.environ.get("OMP_NUM_THREADS", "")
    each, there = int(threads) if threads.isdecimal() and int(threads) else 1, ray.cluster_resources()
    if there.get("CPU", 0) < processes * each:
        logger.warning(
            "the Ray cluster has %d CPUs, and %d processes of %d threads take %d: they wait until nodes join",
            there.get("CPU", 0), processes, each, processes * each,
        )  # fmt: skip
    use_gpu = gpus and there.get("GPU", 0) >= processes
    return TorchTrainer(
        _work,
        train_loop_config=task,
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=int(timeout)),
        scaling_config=ScalingConfig(num_workers=processes, use_gpu=use_gpu, resources_per_worker={"CPU": each}),
        run_config=RunConfig(
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_restarts),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _attend(ray: Any, desk: Any, fit: _Fit) -> None:
    """Say what the first process says, and pass signals on, until the processes have ended."""
    passed, limit = False, float("inf")
    with stop_signals() as stops:
        while fit.is_alive() and time.monotonic() < limit:
            fit.join(_TICK)
            if stops and not passed:
                ray.get(desk.wish.remote(stops[0]))
                passed = True
            ended = _look(ray, desk)
            if ended is not None and limit == float("inf"):
                limit = time.monotonic() + _SECONDS_TO_END


def _look(ray: Any, desk: Any) -> Said | None:
    lines, ended = ray.get(desk.look.remote())
    for level, line in lines:
        logger.log(level, "%s", line)
    return ended


def _reason(error: Exception, max_restarts: int) -> Exception:
    """InputError when a process was killed; another error, with its traceback there, is a defect of ours."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
    from ray.train.v2.api.exceptions import WorkerGroupError

    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for rank, failure in sorted(failures.items()):
        if isinstance(failure, (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)):
            return InputError(
                f"--engine=ray: the process of rank {rank} was killed, most often for lack of memory, after "
                f"{max_restarts} restarts; the same command with --resume goes on from the saved state, and "
                f"--max_restarts={max_restarts + 1} starts it once more by itself"
            )
    return failures[min(failures)] if failures else error


@contextlib.contextmanager
def _storage(folder: Path) -> Iterator[Path]:
    """A temporary folder that all nodes see, which Ray Train asks for, beside the run's."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".ray", dir=there, ignore_cleanup_errors=True) as made:
            yield Path(made)
    except PermissionError as error:
        raise InputError(f"--output_dir={folder}: cannot be written ({error.strerror}); name another folder") from error


# ---- in each process -------------------------------------------------------------------------------------------------


def _work(task: dict[str, Any]) -> None:
    """Train; what the user is to know goes to the desk."""
    import ray

    desk, argv = task["desk"], task["argv"]
    again = torch.tensor([ray.get(desk.begin.remote(dist.get_rank()))])
    dist.all_reduce(again, dist.ReduceOp.MAX)  # one may have been killed before it began
    with contextlib.chdir(task["folder"]), _reporting(ray, desk), _stopping(ray, desk):
        try:
            importlib.import_module(task["module"]).main([*argv, *(["--resume"] if int(again) else [])])
        except InputError as error:
            ray.get(desk.end.remote(Said(str(error))))
        except StoppedError as error:
            ray.get(desk.end.remote(Said(str(error), error.signal_number)))


@contextlib.contextmanager
def _reporting(ray: Any, desk: Any) -> Iterator[None]:
    """What the first process logs goes to the desk."""
    ours, handler = logging.getLogger("deep_components"), _ToDesk(ray, desk)
    if dist.get_rank() == 0:
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)


class _ToDesk(logging.Handler):
    def __init__(self, ray: Any, desk: Any) -> None:
        super().__init__()
        self._ray, self._desk = ray, desk

    def emit(self, record: logging.LogRecord) -> None:
        self._ray.get(self._desk.say.remote(record.levelno, record.getMessage()))


@contextlib.contextmanager
def _stopping(ray: Any, desk: Any) -> Iterator[None]:
    """Stop the training when the command that started it got a signal."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_TICK):
            if number := ray.get(desk.wished.remote()):
                ask_to_stop(number)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
