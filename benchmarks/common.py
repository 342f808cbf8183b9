"""What the benchmarks share: a simulated log, turns of two contestants, the machine's ceilings, results as JSON."""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from deep_components import run_train2, run_train3
from deep_components.cascade import SETTINGS
from deep_components.dataset.columnar import DayCache, open_day
from deep_components.dataset.importers.recflow_files import read_id_counts
from deep_components.dataset.simulate import SimulationSettings, simulate

COMMANDS = {"two_stage": run_train2, "three_stage": run_train3}
DAY = "2024-01-13"
_SHORTEST_TURN = 1.0  # seconds

Builder = Callable[[argparse.Namespace, Path], Callable[[], Any]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("--setting", choices=sorted(SETTINGS), default="two_stage")
    result.add_argument("--loss_type", default="lcron")
    result.add_argument("--batch_size", type=int, default=1024)
    result.add_argument("--videos", type=int, default=4000, help="video ids in the vocabulary")
    result.add_argument("--authors", type=int, default=400)
    result.add_argument("--requests", type=int, default=4096, help="of the simulated day")
    result.add_argument("--repeats", type=int, default=7, help="turns of each contestant; medians are reported")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    result.add_argument("--output", type=Path, help="also write the results to this JSON file")
    return result


@contextmanager
def simulated_log(args: argparse.Namespace) -> Iterator[Path]:
    """A log of one day with the wanted vocabulary, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SimulationSettings(
            days=(DAY,), requests_per_day=args.requests, videos=args.videos, authors=args.authors
        )
        simulate(Path(folder), settings)
        yield Path(folder)


def training_namespace(args: argparse.Namespace, data_dir: Path, *flags: str) -> argparse.Namespace:
    """The arguments of the training command for this benchmark, and the method's own filled in."""
    command = COMMANDS[args.setting]
    return command.parse_args(
        [
            *(f"--loss_type={args.loss_type}", f"--data_dir={data_dir}", f"--output_dir={data_dir / 'run'}"),
            *(f"--batch_size={args.batch_size}", f"--device={args.device}", f"--train_days={DAY}", *flags),
        ]
    )


def open_log(args: argparse.Namespace, data_dir: Path) -> tuple[DayCache, Mapping[str, int]]:
    """The day's cache and the log's id counts."""
    return open_day(data_dir, DAY, SETTINGS[args.setting]), read_id_counts(data_dir)


class Contestant:
    """Work that takes turns with another's, in a process of its own, out of the way of its memory and threads.

    Args:
        build: a function of a module, called as build(args, data_dir) in the new process; gives the work, a function
            whose result, a number or None, comes back.
        args: the benchmark's arguments.
        data_dir: the log.
    """

    def __init__(self, build: Builder, args: argparse.Namespace, data_dir: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, args, data_dir), daemon=True)
        self._process.start()
        other.close()

    def turn(self) -> tuple[float, float | None]:
        """Mean seconds of the work in one turn of a second or more, and the first result."""
        return self._ask("turn")

    def parts(self, turns: int) -> dict[str, float]:
        """Mean seconds of the named parts of a turn."""
        return self._ask(turns)

    def peak(self) -> dict[str, int]:
        """Peak memory in bytes of the process, and of the GPU."""
        return self._ask("peak")

    def _ask(self, question: str | int) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, build: Builder, args: argparse.Namespace, data_dir: Path) -> None:
    work = build(args, data_dir)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        if question == "peak":
            gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            pipe.send({"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "gpu": gpu})
        elif question == "turn":
            pipe.send(_turn(work))
        else:
            pipe.send(_seconds_per_part(work, question))


def _turn(work: Callable[[], Any]) -> tuple[float, float | None]:
    """Mean seconds of the work, done again for a second at least, and its first result."""
    started, done, first = time.perf_counter(), 0, None
    while not done or time.perf_counter() - started < _SHORTEST_TURN:
        result = work()
        synchronise()
        first, done = (result if not done else first), done + 1
    return (time.perf_counter() - started) / done, None if first is None else float(first)


def _seconds_per_part(work: Callable[[], Any], turns: int) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(turns):
            work()
            synchronise()
    return {
        event.key.removeprefix("step."): event.cpu_time_total / 1e6 / turns
        for event in profiler.key_averages()
        if event.key.startswith("step.")
    }


@contextmanager
def contestants(
    builders: Mapping[str, Builder], args: argparse.Namespace, data_dir: Path
) -> Iterator[dict[str, Contestant]]:
    """A process for each builder; without --baseline for "ours" alone."""
    names = [name for name in builders if name != "baseline" or args.baseline]
    started = {name: Contestant(builders[name], args, data_dir) for name in names}
    try:
        yield started
    finally:
        for contestant in started.values():
            contestant.close()


def turns(
    contestants: Mapping[str, Contestant], repeats: int, warm_up: int = 1
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Median seconds of each contestant's turns, and the result of its first.

    They take turns, so that a slow moment of the machine meets all of them; the first ``warm_up`` do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    first: dict[str, float | None] = {}
    for turn in range(warm_up + repeats):
        for name, contestant in contestants.items():
            duration, result = contestant.turn()
            first.setdefault(name, result)
            if turn >= warm_up:
                seconds[name].append(duration)
    return {name: median(values) for name, values in seconds.items()}, first


def compared(seconds: Mapping[str, float]) -> dict[str, Any]:
    """The medians and, where there is a baseline, how many times longer it takes."""
    results: dict[str, Any] = {"seconds": dict(seconds)}
    if "baseline" in seconds:
        results["ratio"] = seconds["baseline"] / seconds["ours"]
    return results


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches now: in a large float32 matrix product, and in copying 256 MB."""
    left, right = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    product, copy = _median_seconds(lambda: left @ right), _median_seconds(lambda: target.copy_(source))
    return {"gflops": 2 * 2048**3 / product / 1e9, "gigabytes_per_second": 2 * source.nbytes / copy / 1e9}


def _median_seconds(work: Callable[[], Any], repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def report(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Print the results as JSON, with what they were measured on, and write them to --output."""
    machine = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    text = json.dumps({"arguments": arguments, "machine": machine, **_rounded(dict(results))}, indent=2)
    sys.stdout.write(f"{text}\n")
    if args.output is not None:
        args.output.write_text(f"{text}\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
