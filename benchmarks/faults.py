"""Kills processes of trainings on several, at random moments, and compares what they end in with trainings left alone.

    python -m benchmarks.faults [--kills=50] [--seed=0] [--processes=2]

A training of a small simulated log, its state saved after every step, loses one of its processes by SIGKILL: half of
the times at a chosen point (in the middle of writing a file, before opening, renaming or removing one, before a step),
else whenever a random time is over. In half of the runs the agent starts all again by itself (--max_restarts), in the
others the command is given again with --resume. All processes must have ended within 30 seconds of a kill that is not
followed by a restart, each survivor with one sentence, and the run must hold the bytes of one that was not disturbed.
Printed is one JSON object with the counts; the exit code is 1 when a training ended differently.

Agents and processes are forked from one process that has imported everything, so that a start costs a fraction of a
second. That process never computes: it must have no threads when it forks. With --serve it starts what it is asked to
on its standard input; tests use that.
"""

import argparse
import ctypes
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from benchmarks.soak import ARGUMENTS, DAYS, EVERY_STEP, CrashPoints, results
from deep_components import run_train2
from deep_components.cli import run_command
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.simulate import SimulationSettings, simulate
from deep_components.errors import InputError
from deep_components.kernels import load_kernels
from deep_components.runs.folder import STATE_FILE
from deep_components.tables import deferred_adam
from deep_components.training.step import Trainer

SHARDED = (*ARGUMENTS, EVERY_STEP, "--pull_from=1", "--compact_from=1")
SECONDS_TO_END = 30.0
SECONDS_TO_FINISH = 120
RESTARTS = 3
SURVIVOR = "another process ended; its own message says why"


@dataclass(frozen=True)
class Fault:
    """What happens to one process: SIGKILL at its ``point``-th crash point in ``folder``, or ``action`` before its
    ``step``-th step, counted from 1; ``in_loader``: before its loader's thread reads that step's batch."""

    rank: int
    step: int = 0
    action: str = ""
    in_loader: bool = False
    point: int = 0
    folder: str = ""

    def plan(self) -> None:
        """Have it happen in this process, if it is the one; once, whatever is restarted."""
        if os.environ.get("RANK") != str(self.rank) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if self.point:
            _Marked(Path(self.folder), self.point)
            return
        owner, name = (DayCache, "batch") if self.in_loader else (Trainer, "step")
        function, made = getattr(owner, name), 0

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made == self.step:
                ACTIONS[self.action]()
            return function(*arguments, **named)

        setattr(owner, name, counted)


class _Marked(CrashPoints):
    """Leaves a file when it kills."""

    def reach(self, point: str, before_dying: Callable[[], None] = lambda: None) -> None:
        if len(self.passed) + 1 == self.die_at:
            Path(self.folder[:-1]).with_suffix(".killed").touch()
        super().reach(point, before_dying)


def _refuse() -> None:
    raise InputError("day 2024-01-14: told to be damaged; import it again")


def _full_disk() -> None:
    """Writing beyond fails as on a full disk, with another error number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


ACTIONS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "refuse": _refuse,
    "defect": lambda: 1 // 0,
    "full disk": _full_disk,
    "slow": lambda: time.sleep(2),
}


def start(
    argv: Sequence[str], output: Path, environment: dict[str, str] | None = None, fault: Fault | None = None,
    namespace: str = "",
) -> int:  # fmt: skip
    """Fork a training with these arguments; its process id. What it says is appended to ``output``; the process ids of
    ranks, this one or those that it starts, stand in ``output`` with the suffix ``.<rank>``. ``namespace``: the file of
    a network namespace to train in."""

    def command() -> int:
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment or {})
        if namespace:
            with Path(namespace).open() as file:
                ctypes.CDLL(None).setns(file.fileno(), 0)
        agent: Any = SubprocessHandler
        agent._popen = lambda _, words, environment: _Forked(words, environment, output, fault)
        return _train(argv, output, fault)

    child = os.fork()
    return child if child else _exit_with(command)


def _exit_with(command: Callable[[], int]) -> NoReturn:
    """End this child with the command's exit code."""
    code = 99
    try:
        code = command()
    except BaseException as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _train(argv: Sequence[str], output: Path, fault: Fault | None) -> int:
    if "RANK" in os.environ:
        output.with_suffix(f".{os.environ['RANK']}").write_text(str(os.getpid()))
    if fault is not None:
        fault.plan()
    return run_command(run_train2.main, list(argv))


class _Forked:
    """A process as the agent knows it, forked from it instead of being started anew."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], output: Path, fault: Fault | None) -> None:
        self.returncode: int | None = None
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of threads beside a fork
            self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        logging.getLogger().handlers.clear()  # the agent's
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as experiments/attached.py does
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        os.environ.update(environment)
        _exit_with(lambda: _train(command[command.index("deep_components.run_train2") + 1 :], output, fault))

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float) -> int | None:
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("", timeout)
        return self.returncode


@contextmanager
def imported() -> Iterator[None]:
    """All that a training imports late is there, and rules are for few steps."""
    torch.set_num_threads(1)
    load_kernels(torch.float32)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    before, deferred_adam._STEPS_AT_A_TIME = deferred_adam._STEPS_AT_A_TIME, 64
    yield
    deferred_adam._STEPS_AT_A_TIME = before


def serve() -> None:
    """Start what lines of JSON on the standard input say: the arguments of :func:`start`; each is answered by the
    process id. A line {"wait": pid, "seconds": s} is answered by the exit code; null when the time is over."""
    for line in sys.stdin:
        wanted = json.loads(line)
        if "wait" in wanted:
            answer = ended(wanted["wait"], wanted["seconds"])
        else:
            fault = Fault(**wanted["fault"]) if wanted["fault"] else None
            answer = start(wanted["argv"], Path(wanted["output"]), wanted["environment"], fault, wanted["namespace"])
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a child, negative when a signal ended it; None when it has not ended after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def gone(pids: Sequence[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


class Soak:
    """Runs in a temporary folder; see the module."""

    def __init__(self, folder: Path, seed: int, processes: int) -> None:
        self.folder, self.random, self.count = folder, random.Random(seed), processes
        self.log, self.output = folder / "log", folder / "said.txt"
        self.counts: Counter[str] = Counter()
        self.different: list[str] = []
        self.slowest = 0.0
        settings = SimulationSettings(days=DAYS, requests_per_day=40, users=30, videos=200, authors=20, seed=seed)
        child = os.fork()
        if not child:
            simulate(self.log, settings)
            os._exit(0)
        os.waitpid(child, 0)
        began = time.monotonic()
        code = self.train(folder / "reference")
        if code:
            raise RuntimeError(f"exit code {code}\n{self.output.read_text()}")
        self.seconds, self.expected = time.monotonic() - began, results(folder / "reference")

    def train(self, run: Path, *flags: str, fault: Fault | None = None, after: float | None = None) -> int:
        """Train on all processes; kill a random one ``after`` so many seconds. The agent's exit code."""
        self.output.write_text("")
        argv = [*SHARDED, f"--processes={self.count}", f"--data_dir={self.log}", f"--output_dir={run}", *flags]
        agent = start(argv, self.output, fault=fault)
        if after is not None:
            time.sleep(after)
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(self.pid(self.random.randrange(self.count)), signal.SIGKILL)
                self.folder.joinpath("run.killed").touch()
        killed = time.monotonic()
        code = ended(agent, SECONDS_TO_FINISH)
        if code is None:
            os.kill(agent, signal.SIGKILL)
            raise RuntimeError(f"a training hangs\n{self.output.read_text()}")
        if after is not None and code:
            self.slowest = max(self.slowest, time.monotonic() - killed)
        return code

    def pid(self, rank: int) -> int:
        return int(self.output.with_suffix(f".{rank}").read_text())

    def kill_and_compare(self) -> None:
        """One training through a kill to its end."""
        run = self.folder / "run"
        restarts = self.random.random() < 0.5
        flags = [f"--max_restarts={RESTARTS}"] if restarts else []
        fault, after = None, None
        if self.random.random() < 0.5:
            fault = Fault(self.random.randrange(self.count), point=self.random.randrange(1, 60), folder=str(run))
        else:
            after = self.random.uniform(0, self.seconds)
        code = self.train(run, *flags, fault=fault, after=after)
        said = self.output.read_text()
        killed = self.folder / "run.killed"
        self.counts["kills"] += killed.exists()
        self.counts["kills at a random time"] += killed.exists() and after is not None
        self.counts["ended by themselves" if restarts else "resumed by hand"] += killed.exists()
        killed.unlink(missing_ok=True)
        self.counts["with a saved state"] += (run / STATE_FILE).exists()
        if restarts and code:
            self.different.append(f"--max_restarts: exit code {code}: {said[-2000:]}")
        elif code:
            survivors = [line for line in said.splitlines() if SURVIVOR in line]
            if len(survivors) != len(set(survivors)) or "Traceback" in said or code != 128 + signal.SIGKILL:
                self.different.append(f"exit code {code}, survivors said: {said}")
            code = self.train(run, "--resume")
        found = {} if code else results(run)
        if found != self.expected:
            parts = [p for p in found.keys() | self.expected.keys() if found.get(p) != self.expected.get(p)]
            said += self.output.read_text()
            self.different.append(f"{fault or after}: exit code {code}: {', '.join(sorted(parts))}: {said[-2000:]}")
        self.counts["runs"] += 1
        shutil.rmtree(run, ignore_errors=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help="start what the standard input says")
    args = parser.parse_args(argv)
    with imported():
        if args.serve:
            serve()
            return
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            soak = Soak(Path(folder), args.seed, args.processes)
            while soak.counts["kills"] < args.kills and not soak.different:
                soak.kill_and_compare()
    report = {**soak.counts, "slowest end, seconds": round(soak.slowest, 1), "different": soak.different}
    print(json.dumps(report | {"seconds": round(time.perf_counter() - began)}, indent=1))
    if soak.different or soak.slowest > SECONDS_TO_END:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
