"""Kills trainings at random points, goes on with --resume, and compares what they end in with trainings left alone.

    python -m benchmarks.soak [--kills=500] [--seed=0] [--each_point] [--variant=NAME]

A training of a small simulated log dies by SIGKILL, again and again, until it happens to reach its end: half of the
times at a chosen point (in the middle of writing a file, before opening, renaming or removing one, before a step), else
whenever a random time is over. Then the SHA-256 of its models and its state must be those of a training that was not
killed, its step log the same but for the seconds, and nothing else may lie in its folder. Printed is one JSON object
with the counts; the exit code is 1 when a training ended differently.

Trainings are forked from one process that has imported everything, so that a kill costs a fraction of a second. That
process never computes: it must have no threads when it forks.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deep_components import run_train2
from deep_components.cli import run_command
from deep_components.dataset.simulate import SimulationSettings, simulate
from deep_components.kernels import load_kernels
from deep_components.runs.folder import COST_FILE, LOCK_FILE, STATE_FILE, STEP_LOG_FILE
from deep_components.training.step import Trainer

DAYS = ("2024-01-13", "2024-01-14", "2024-01-15")
ARGUMENTS = ("--loss_type=lcron", "--batch_size=16", "--emb_dim=4", "--nn_units=16", "--seq_len=5", "--device=cpu",
             "--epochs=2", "--print_freq=3")  # fmt: skip
EVERY_STEP = "--save_minutes=1e-9"
KILLS_OF_ONE_RUN = 20
SECONDS_TO_FINISH = 120


class Variant(NamedTuple):
    """One way of training."""

    flags: tuple[str, ...] = ()
    own_cache: bool = False  # encodes the log anew: it may be killed there too


VARIANTS = {
    "saved after each day": Variant(),
    "saved after each step": Variant((EVERY_STEP,)),
    "compacted and deferred": Variant((EVERY_STEP, "--compact_from=1", "--pull_from=1")),
    "sparse_adam": Variant(("--optimizer=sparse_adam", EVERY_STEP)),
    "pytorch's operators": Variant(("--no-compile", EVERY_STEP, "--pull_from=1")),
    "the best models kept": Variant(
        (EVERY_STEP, "--validate_every=1", "--keep=best", "--compact_from=1", "--pull_from=1")
    ),
    "stopped early": Variant(("--validate_every=1", "--keep=best", "--patience=1")),
    "cold cache": Variant(own_cache=True),
}


class Outcome(NamedTuple):
    """How a child ended, and the crash points it passed."""

    code: int  # negative: the signal that killed it
    points: list[str]
    seconds: float


class CrashPoints:
    """Counts the points at which this process may die while it trains in ``folder``, and kills it at one of them."""

    def __init__(self, folder: Path, die_at: int | None) -> None:
        self.folder, self.die_at, self.passed = f"{folder}/", die_at, list[str]()
        sys.addaudithook(self._file_operation)
        fsync, step = os.fsync, Trainer.step

        def fsync_(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            size = os.fstat(descriptor).st_size
            left = size // 2 if path.suffix == ".tmp" else max(size - 7, 0)  # else lines were appended
            if path.is_relative_to(folder):
                self.reach(f"writing {_plain(path)}", lambda: os.ftruncate(descriptor, left))
            fsync(descriptor)

        def step_(trainer: Trainer, batch: Any) -> Any:
            self.reach("step")
            return step(trainer, batch)

        # For good: the process was forked for this training.
        os.fsync, Trainer.step = fsync_, step_  # type: ignore[assignment, method-assign]

    def reach(self, point: str, before_dying: Callable[[], None] = lambda: None) -> None:
        self.passed.append(point)
        if len(self.passed) == self.die_at:
            before_dying()
            os.kill(os.getpid(), signal.SIGKILL)

    def _file_operation(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Before a file is opened for writing, renamed or removed."""
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and str(arguments[0]).startswith(self.folder):
            self.reach(f"{event} {_plain(Path(arguments[0]))}")


def _plain(path: Path) -> str:
    """The file's name without what makes a temporary one unique."""
    name = path.name
    return name[1:].rsplit(".", 2)[0] if name.startswith(".") and name.endswith(".tmp") else name


class Soak:
    """Runs in a temporary folder; see the module."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.log = folder / "log"
        self.counts: Counter[str] = Counter()
        self.killed_at: Counter[str] = Counter()
        self.different: list[str] = []
        self.references: dict[str, tuple[Outcome, dict[str, Any]]] = {}
        settings = SimulationSettings(days=DAYS, requests_per_day=40, users=30, videos=200, authors=20, seed=seed)
        self._forked(lambda: simulate(self.log, settings), folder / "simulate.txt")

    def reference(self, name: str) -> tuple[Outcome, dict[str, Any]]:
        """A training that nobody kills, and its results."""
        if name not in self.references:
            run = self.folder / f"reference-{len(self.references)}"
            outcome = self.train(name, run)
            if outcome.code:
                raise RuntimeError(f"{name}: exit code {outcome.code}\n{self._said(run)}")
            self.references[name] = outcome, results(run)
        return self.references[name]

    def train(
        self, name: str, run: Path, *flags: str, die_at: int | None = None, after: float | None = None
    ) -> Outcome:
        """Train in a process of its own, which dies at its ``die_at``-th crash point or ``after`` so many seconds."""
        variant, report = VARIANTS[name], run.with_suffix(".json")
        cache = run.with_suffix(".cache") if variant.own_cache else self.log / "cache"
        argv = [*ARGUMENTS, *variant.flags, f"--data_dir={self.log}", f"--output_dir={run}", f"--cache_dir={cache}"]

        def command() -> int:
            points = CrashPoints(self.folder if variant.own_cache else run, die_at)
            code = run_command(run_train2.main, [*argv, *flags])
            report.write_text(json.dumps(points.passed))
            return code

        report.unlink(missing_ok=True)
        began = time.perf_counter()
        code = self._forked(command, run.with_suffix(".txt"), after)
        points = json.loads(report.read_text()) if report.exists() else []
        return Outcome(code, points, time.perf_counter() - began)

    def kill_until_done(self, name: str, first: int | None = None) -> None:
        """Train one run to its end through kills, the first of them at crash point ``first``, and compare."""
        undisturbed, expected = self.reference(name)
        run = self.folder / "run"
        flags: tuple[str, ...] = () if self.random.random() < 0.5 else ("--resume",)
        for kills in range(KILLS_OF_ONE_RUN + 1):
            die_at, after = first, None
            if first is None and kills < KILLS_OF_ONE_RUN:
                if self.random.random() < 0.5:
                    die_at = self._crash_point(undisturbed.points)
                else:
                    after = self.random.uniform(0, undisturbed.seconds)
            self.counts["resumed"] += bool(flags) and (run / STATE_FILE).exists()
            outcome = self.train(name, run, *flags, die_at=die_at, after=after)
            if outcome.code != -signal.SIGKILL:
                break
            self.counts["kills"] += 1
            what = undisturbed.points[die_at - 1].split()[0] if die_at is not None else "at a random time"
            self.killed_at[what if first is None else "at each point"] += 1
            first, flags = None, ("--resume",)
        self.counts["runs"] += 1
        found = {} if outcome.code else results(run)
        if outcome.code:
            self.different.append(f"{name}: exit code {outcome.code}: {self._said(run)[-500:]}")
        elif found != expected:
            parts = [part for part in found.keys() | expected.keys() if found.get(part) != expected.get(part)]
            self.different.append(f"{name}: {', '.join(sorted(parts))}")
        for path in self.folder.glob("run*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _crash_point(self, points: list[str]) -> int:
        """The number of a point, of each kind as often: a training opens many more files than it removes."""
        kind = self.random.choice(sorted({point.split()[0] for point in points}))
        return self.random.choice([number for number, point in enumerate(points, 1) if point.split()[0] == kind])

    def _forked(self, command: Callable[[], int | None], output: Path, after: float | None = None) -> int:
        """Run ``command`` in a child; its exit code, negative when a signal ended it."""
        child = os.fork()
        if not child:
            code: int | None = 99
            try:
                with output.open("a") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                code = command()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code or 0)
        if after is not None:
            time.sleep(after)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        signal.alarm(SECONDS_TO_FINISH)  # ends all when a child hangs
        status = os.waitpid(child, 0)[1]
        signal.alarm(0)
        return os.waitstatus_to_exitcode(status)

    def _said(self, run: Path) -> str:
        return run.with_suffix(".txt").read_text()


def results(run: Path) -> dict[str, Any]:
    """What two trainings must agree in."""
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("*.safetensors")
    }
    steps = [json.loads(line) for line in (run / STEP_LOG_FILE).read_text().splitlines()]
    cost = json.loads((run / COST_FILE).read_text())
    return found | {
        "step log": [{name: value for name, value in step.items() if name != "seconds"} for step in steps],
        "steps and requests": (cost["steps"], cost["requests"]),
        "seconds": abs(cost["seconds"] - sum(step["seconds"] for step in steps)) < 1e-3,
        "files": sorted(path.name for path in run.iterdir() if path.name != LOCK_FILE),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each_point", action="store_true", help="first kill a training at every kind of point")
    parser.add_argument("--variant", choices=VARIANTS, help="train in this way alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    load_kernels(torch.float32)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # has PyTorch import what it imports late
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), args.seed)
        if args.each_point:
            name = args.variant or "saved after each step"
            points = soak.reference(name)[0].points
            for point in dict.fromkeys(points):
                soak.kill_until_done(name, first=points.index(point) + 1)
        while soak.counts["kills"] < args.kills and not soak.different:
            soak.kill_until_done(args.variant or soak.random.choice(list(VARIANTS)))
    report = {**soak.counts, "killed": dict(soak.killed_at), "different": soak.different}
    print(json.dumps(report | {"seconds": round(time.perf_counter() - began)}, indent=1))
    if soak.different:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
