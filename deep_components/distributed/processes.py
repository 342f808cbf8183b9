"""The processes of one training, joined by torch.distributed as torchrun or Ray Train started them.

Three groups, because collectives of two threads must not mix: ``main`` moves tensors of the training thread on the
device, ``control`` its small JSON values on the CPU, ``ahead`` what the loader's thread exchanges for the next batch.

When a process ends, its connections do: the others' collectives fail, and each says one sentence and ends with
:class:`EndedError`. A sentence that several would say is said by the first of them.
"""

import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deep_components.errors import EndedError, InputError, StoppedError

T = TypeVar("T")

# Keys of the launcher's store, which outlives a restart of the processes.
_ADDRESS = "lcron/address"  # where the store of this start is
_BEGUN = "lcron/begun"  # the run's folder holds nothing of an earlier training any more
_REFUSED = "lcron/refused"  # the input was refused: a restart would change nothing
_NONCE = "lcron/nonce"  # of the store of a start
_SAID = "lcron/said"
_RETRY = 0.1  # seconds
_PATIENCE = 10.0  # seconds in which a process ends when others have, whatever its threads wait for
_CONNECT = 5.0  # seconds, to a store that is there
_LOST = 1  # the exit code of a process whose others have ended

logger = logging.getLogger(__name__)


@dataclass
class Processes:
    """This process among those of a training: its ``rank`` of ``count``. A method that waits for others raises
    EndedError when one of them has ended, or keeps silent for ``timeout`` seconds."""

    rank: int
    count: int
    main: dist.ProcessGroup
    control: dist.ProcessGroup
    ahead: dist.ProcessGroup
    timeout: float = 0.0
    launcher: dist.Store | None = None  # which outlives a restart; None when the groups are somebody else's
    step: int | None = None  # of a training, made so far; for messages
    is_restart: bool = False  # of a training that this launch has begun, and that therefore goes on
    _lost: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_first(self) -> bool:
        """Rank 0, which alone writes the run's files and speaks."""
        return self.rank == 0

    def slice_of(self, total: int) -> slice:
        """This process's part of ``total`` things, such as the requests of a global batch."""
        return slice(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; of the same bits in each."""
        with self._others():
            dist.all_reduce(values, group=self.main)
        return values

    def all_max(self, values: Tensor) -> Tensor:
        """The greatest over all processes, in place."""
        with self._others():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.main)
        return values

    def exchange(
        self, values: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Send the first ``sent[0]`` rows of ``values`` to process 0, the next ``sent[1]`` to process 1, and so on;
        what the others sent here, [sum(received), ...] in the order of their ranks."""
        result = values.new_empty(sum(received), *values.shape[1:])
        with self._others():
            dist.all_to_all_single(result, values.contiguous(), list(received), list(sent), group=group or self.main)
        return result

    def gather(self, value: Any) -> list[Any]:
        """The JSON value that each process gave, in the order of the ranks."""
        data = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with self._others():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self.control)
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes]
        with self._others():
            dist.all_gather(parts, padded, group=self.control)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def wait(self) -> None:
        """Until every process is here."""
        with self._others():
            dist.barrier(group=self.control)

    def begun(self) -> None:
        """From now on a restart of all processes goes on with what the run's folder holds."""
        if self.launcher is not None and self.is_first:
            self.launcher.set(_BEGUN, "")

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Around a collective: EndedError, said at once, when another process has ended or does not answer."""
        try:
            yield
        except RuntimeError as error:
            if not _is_of_others(error):
                raise
            if self._lost.acquire(blocking=False):  # once, whichever thread sees it first
                self._say(str(error))
            raise EndedError("", _LOST) from error

    def _say(self, reason: str) -> None:
        what = "ended; its own message says why"
        if "imed out" in reason:
            what = f"did not answer for {self.timeout:g} seconds (--timeout)"
        # Not when the exception arrives: the launcher, which has seen the other end too, may send SIGTERM before.
        remedy = "; start again with the same command"  # nothing was saved yet, or it is an evaluation
        if self.step is not None:
            remedy = f", after step {self.step}; go on with the same command and --resume"
        logger.error("process %d of %d: another process %s%s", self.rank, self.count, what, remedy)
        if self.launcher is not None:
            _end_soon(_LOST)


def _is_of_others(error: RuntimeError) -> bool:
    """Whether a collective failed for a process that is gone or silent; a mistake in its arguments is a defect."""
    text = str(error)
    return isinstance(error, dist.DistError) or ("gloo/transport/" in text and "enforce fail" not in text)


def _end_soon(code: int) -> None:
    """End this process in a while, though a thread of it may still wait for processes that are gone."""
    last = threading.Timer(_PATIENCE, os._exit, [code])
    last.daemon = True
    last.start()


def launched() -> bool:
    """Whether this is one of several processes that torchrun, or Ray Train, started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_initialized() and dist.get_world_size() > 1)


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Processes | None]:
    """This process among its training's; None when it is the only one. A collective that takes longer than ``timeout``
    seconds fails.

    EndedError, said by nobody else, in a process that need not say what another one says."""
    if not launched():
        yield None
    elif dist.is_initialized():
        yield _groups(timeout)
    else:
        limit = timedelta(seconds=timeout)
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            launcher, _, _ = next(iter(dist.rendezvous("env://", rank, count, timeout=limit)))
            if launcher.check([_REFUSED]):
                raise EndedError("", int(launcher.get(_REFUSED)))
            is_restart = _is_restart(launcher)
            store = _fresh_store(launcher, rank, count, limit)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
            processes = _groups(timeout)
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, dist.DistError) or _is_of_others(error):
                raise EndedError(
                    f"process {rank} of {count} could not reach the others at {os.environ['MASTER_ADDR']}: "
                    f"{str(error).splitlines()[0]}", _LOST
                ) from error  # fmt: skip
            raise
        processes.launcher, processes.is_restart = launcher, is_restart
        try:
            yield processes
        except BaseException as error:
            _on_sigterm(signal.SIG_IGN)
            if isinstance(error, (InputError, StoppedError)):
                _say_once(error, processes, store)
            raise
        finally:
            dist.destroy_process_group()


def _on_sigterm(action: signal.Handlers) -> None:
    """What is said last is not to be cut off by the launcher, which sends SIGTERM when one process has ended."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, action)


def _groups(timeout: float) -> Processes:
    # new_group does not take the default group's timeout.
    control, ahead = (dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2))
    assert dist.group.WORLD is not None
    return Processes(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, control, ahead, timeout)


def _is_restart(launcher: dist.Store) -> bool:
    """Whether the launcher has started all processes again after they had begun. A store that is none of torchrun's
    agent is new in each start."""
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return launcher.check([_BEGUN]) or (own and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)


def _say_once(error: InputError | StoppedError, processes: Processes, store: dist.Store) -> NoReturn:
    """Raise the error again in the first process that has it, and in the others EndedError once that one has ended:
    the launcher ends all others with the first, which must have said its sentence then."""
    code = 128 + error.signal_number if isinstance(error, StoppedError) else 2
    first = True
    with suppress(dist.DistError):  # without the process that has the store
        if code == 2 and processes.launcher is not None:
            processes.launcher.set(_REFUSED, str(code))
        first = store.add(f"{_SAID}/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) == 1
    if first and isinstance(error, InputError) and not isinstance(error, _AgreedError):
        raise InputError(f"process {processes.rank} of {processes.count}: {error}") from error
    if first:
        raise error
    _on_sigterm(signal.SIG_DFL)
    with suppress(dist.DistError):
        store.wait(["lcron/never"], timedelta(seconds=_PATIENCE))
    raise EndedError("", code)


def _fresh_store(launcher: dist.Store, rank: int, count: int, timeout: timedelta) -> dist.Store:
    """A store of this start alone: the launcher's outlives a restart, and keeps the addresses of processes that died
    (https://github.com/pytorch/pytorch/issues/135712). Process 0 says in it where the new one is."""
    if rank == 0:
        host, nonce = _own_address(), secrets.token_hex(8)
        store = dist.TCPStore(host, 0, count, is_master=True, timeout=timeout, wait_for_workers=False)
        store.set(_NONCE, nonce)
        launcher.set(_ADDRESS, f"{host} {store.port} {nonce}")
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:  # what stands there may be of an earlier start: process 0 has not said the new one yet
        host, port, nonce = launcher.get(_ADDRESS).decode().split()
        with suppress(OSError, dist.DistError):
            socket.create_connection((host, int(port)), _CONNECT).close()
            short = timedelta(seconds=_CONNECT)
            store = dist.TCPStore(host, int(port), count, is_master=False, timeout=short, wait_for_workers=False)
            if store.check([_NONCE]) and store.get(_NONCE).decode() == nonce:
                store.set_timeout(timeout)
                return store
        if time.monotonic() > end:
            raise EndedError(f"process {rank} of {count}: process 0 was not there for {timeout.total_seconds():g} "
                             "seconds (--timeout)", _LOST)  # fmt: skip
        time.sleep(_RETRY)


def _own_address() -> str:
    """This machine's address on the way to the launcher's store."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        address: str = way.getsockname()[0]
        return address


class _AgreedError(InputError):
    """An InputError that every process raises."""


def agreed(processes: Processes | None, function: Callable[[], T]) -> T:
    """``function()`` on every process; an InputError of one is raised by all."""
    if processes is None:
        return function()
    result, problem = None, ""
    try:
        result = function()
    except InputError as error:
        problem = str(error)
    first = next((said for said in processes.gather(problem) if said), None)
    if first is not None:
        raise _AgreedError(first)
    return result  # type: ignore[return-value]
