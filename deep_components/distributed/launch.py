"""Several processes of a training on this machine: the command becomes torchrun's agent, which starts itself W times.
With --engine=ray they are started on a Ray cluster instead.

Each process here is ``python -m MODULE`` with the command's arguments, and ends with the agent: where that is killed
outright, Linux sends them SIGTERM, so that they save the state and stop.
"""

import argparse
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deep_components.arguments import choose_device
from deep_components.distributed.ray_train import train_on_ray
from deep_components.distributed.refusals import check_arguments
from deep_components.errors import EndedError, InputError

_SECONDS_TO_SAVE = 600  # a large state, when a signal has come
_OF_OTHERS = (1, -signal.SIGTERM, 130)  # exit codes of processes that end because one has
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(args: argparse.Namespace, module: str, argv: Sequence[str], trains: bool = True) -> bool:
    """Start the processes that --processes asks for and wait for them; False, at once, for work that is this process's
    own: --processes is 1 or not given, or this is one of several.

    Args:
        args: the command's, parsed.
        module: which has the command, as ``python -m`` takes it.
        argv: the command's.
        trains: whether it does, and may go on when it is given again.

    InputError for what the processes would refuse; EndedError with the exit code of the first one that failed.
    """
    started = _started()
    if started is not None and args.processes not in (None, started):
        raise InputError(f"--processes={args.processes}, but the launcher has started {started}; leave it out")
    count, on_ray = args.processes or 1, trains and args.engine == "ray"
    if trains and not args.epochs:
        count = 1  # an untrained cascade is quickly written
    if started is not None or (count == 1 and not on_ray):
        return False
    if trains:
        check_arguments(args, count)
    if on_ray:
        gpus = args.device != "cpu"
        train_on_ray(argv, module, args.output_dir, count, args.max_restarts, args.timeout, gpus)
        return True
    choose_device(args)
    command = ["-u", "-m", "deep_components.experiments.attached", str(os.getpid()), module, *argv]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=args.max_restarts, logs_specs=DefaultLogsSpecs(os.devnull),
        signals_to_handle=",".join(s.name for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN),
        shutdown_timeout=_SECONDS_TO_SAVE,
    )  # fmt: skip
    with _environment(_for_processes(count)), _silent("torch.distributed.elastic"), _signals_put_back():
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            raise _ended(error.failures, count, trains) from error
        except SignalException as error:  # the processes have said what it made them do
            raise EndedError("", 128 + error.sigval) from error
    return True


def _started() -> int | None:
    """How many processes a launcher has started, of which this is one; None without a launcher."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def _ended(failures: Mapping[int, ProcessFailure], count: int, trains: bool) -> EndedError:
    """The error of the process that failed first; the agent's clock counts whole seconds."""
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode in _OF_OTHERS, item[1].timestamp))
    if first.exitcode >= 0:
        return EndedError("", first.exitcode)  # it has said why
    memory = " (was there enough memory?)" if first.exitcode == -signal.SIGKILL else ""
    said = f"error: process {rank} of {count} was ended by {first.signal_name()}{memory}"
    how = "go on with the same command and --resume" if trains else "give the command again"
    return EndedError(f"{said}; {how}", 128 - first.exitcode)


def _for_processes(count: int) -> dict[str, str]:
    """Environment variables of the processes: they import what this one would, share out the cores unless the user
    says otherwise, and leave the library's words about connections away."""
    paths = [str(Path(__file__).parents[2]), *(path or str(Path.cwd()) for path in sys.path)]
    said = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    usual = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return said | {name: value for name, value in usual.items() if name not in os.environ}


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The agent's processes inherit this one's environment."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without what a library's logger says: the processes speak for themselves."""
    library, nobody = logging.getLogger(name), logging.NullHandler()
    before = library.propagate
    library.addHandler(nobody)
    library.propagate = False
    try:
        yield
    finally:
        library.propagate = before
        library.removeHandler(nobody)


@contextmanager
def _signals_put_back(signals: Iterable[signal.Signals] = _SIGNALS) -> Iterator[None]:
    """The agent's handlers end with it."""
    before = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
