"""What the benchmarks share: a simulated log, contestants that take turns, the machine's ceilings, results as JSON."""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from deep_components import run_train2, run_train3
from deep_components.cascade import SETTINGS
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.log import open_log
from deep_components.dataset.simulate import SimulationSettings, simulate
from deep_components.errors import InputError
from deep_components.threads import short_waits
from deep_components.training import memory

COMMANDS = {"two_stage": run_train2, "three_stage": run_train3}
DAY = "2024-01-13"
SHORTEST_TURN = 1.0  # seconds

Work = Callable[[], Any]
Builder = Callable[[argparse.Namespace, Path], Work]


# ---- arguments and data ----------------------------------------------------------------------------------------------


def parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
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
    result.set_defaults(**defaults)
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


def training_flags(args: argparse.Namespace, data_dir: Path, *flags: str) -> list[str]:
    """The command line of the training that a benchmark measures."""
    given = {"data_dir": data_dir, "output_dir": data_dir / "run", "train_days": DAY}
    given |= {name: getattr(args, name) for name in ("loss_type", "batch_size", "device")}
    return [*(f"--{name}={value}" for name, value in given.items()), *flags]


def training_arguments(args: argparse.Namespace, data_dir: Path, *flags: str) -> argparse.Namespace:
    """The same, parsed by the training command."""
    return COMMANDS[args.setting].parse_args(training_flags(args, data_dir, *flags))


def open_day(args: argparse.Namespace, data_dir: Path, cache_dir: Path | None = None) -> DayCache:
    """The log's day, from its cache, which is built when it is not there."""
    return open_log(data_dir).open_day(DAY, SETTINGS[args.setting], cache_dir)


# ---- turns -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was measured of one contestant.

    Args:
        seconds: of one piece of work, the median of its turns' means.
        first_result: of the first piece of work; None when it gives none.
        first_seconds: of the first piece of work, in which a model may be compiled.
        peak_bytes: memory of the process, and of the GPU.
        parts: part of the work -> its seconds.
    """

    seconds: float
    first_result: float | None
    first_seconds: float
    peak_bytes: dict[str, int]
    parts: dict[str, float]


def compete(
    builders: Mapping[str, Builder],
    args: argparse.Namespace,
    data_dir: Path,
    profiled: int = 0,
    environments: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Measured]:
    """Measure several ways to do the same work.

    Each has a process of its own, out of the way of the others' memory and threads. They take turns of a second or
    more, so that a slow moment of the machine meets all of them; the first turn does not count.

    Args:
        builders: name -> function of a module, called as build(args, data_dir) in the new process; gives the work, a
            function whose result is a number or None. "baseline" is left out with --no-baseline.
        args: the benchmark's arguments.
        data_dir: the log.
        profiled: how often the work is done once more to measure its parts.
        environments: name -> environment variables of its process; by default as those of the training command.
    """
    names = [name for name in builders if name != "baseline" or args.baseline]
    turns: dict[str, list[tuple[float, float, float | None]]] = {name: [] for name in names}
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in names}
        variables = environments or {}
        started = [
            _start(pools[name], variables.get(name, {}), _build, name, builders[name], args, data_dir) for name in names
        ]
        for built in started:
            built.result()
        for _ in range(1 + args.repeats):
            for name in names:
                turns[name].append(pools[name].submit(_turn, name, SHORTEST_TURN).result())
        peaks = {name: pools[name].submit(peak_bytes).result() for name in names}
        parts = {name: pools[name].submit(_seconds_per_part, name, profiled).result() for name in names}
    return {
        name: Measured(
            median(seconds for seconds, _, _ in turns[name][1:]),
            first_result=turns[name][0][2],
            first_seconds=turns[name][0][1],
            peak_bytes=peaks[name],
            parts=parts[name],
        )
        for name in names
    }


def _start(pool: ProcessPoolExecutor, environment: Mapping[str, str], *call: Any) -> Future[None]:
    """Submit the first call to a pool, which starts its process with the environment."""
    before = dict(os.environ)
    os.environ.update(short_waits() | dict(environment))
    try:
        return pool.submit(*call)
    finally:
        os.environ.clear()
        os.environ.update(before)


_works: dict[str, Work] = {}  # of a contestant's process


def _build(name: str, build: Builder, args: argparse.Namespace, data_dir: Path) -> None:
    _works[name] = build(args, data_dir)


def _turn(name: str, shortest: float) -> tuple[float, float, float | None]:
    """Mean seconds of the work, done again for ``shortest`` seconds at least; seconds and result of its first time."""
    started, ends, first = time.perf_counter(), list[float](), None
    while not ends or ends[-1] - started < shortest:
        result = _works[name]()
        synchronise()
        first = result if not ends else first
        ends.append(time.perf_counter())
    return (ends[-1] - started) / len(ends), ends[0] - started, None if first is None else float(first)


def peak_bytes() -> dict[str, int]:
    """Of this process at the most so far: its memory, and the GPU's."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"process": memory.peak(), "gpu": gpu}


def _seconds_per_part(name: str, times: int) -> dict[str, float]:
    parts: dict[str, float] = {}
    if times:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(times):
                _works[name]()
                synchronise()
        for event in profiler.profiler.kineto_results.events():  # key_averages() takes minutes
            if event.name().startswith("step."):
                part = event.name().removeprefix("step.")
                parts[part] = parts.get(part, 0.0) + event.duration_ns() / 1e9 / times
    return parts


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- results ---------------------------------------------------------------------------------------------------------


def check_same(measured: Mapping[str, Measured], what: str, tolerance: float, **other: float) -> None:
    """InputError when a contestant's first result differs from the first one's by more than the relative tolerance;
    ``other`` are those of single contestants."""
    results = {name: one.first_result or 0.0 for name, one in measured.items()}
    first = next(iter(results.values()))
    if any(abs(result - first) > other.get(name, tolerance) * abs(first) for name, result in results.items()):
        raise InputError(f"the {what} differ: {results}")


def compared(measured: Mapping[str, Measured], requests: int) -> dict[str, Any]:
    """Seconds and memory for so many requests; with a baseline, how many times longer than the first one it takes."""
    results: dict[str, Any] = {
        "seconds": {name: one.seconds for name, one in measured.items()},
        "requests_per_second": {name: requests / one.seconds for name, one in measured.items()},
        "peak_bytes": {name: one.peak_bytes for name, one in measured.items()},
    }
    if "baseline" in measured:
        results["ratio"] = measured["baseline"].seconds / next(iter(measured.values())).seconds
    return results


def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches now: in a large float32 matrix product, and in copying 256 MB."""
    left, right = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    product, copy = (
        Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).blocked_autorange().median
        for work in (lambda: left @ right, lambda: target.copy_(source))
    )
    return {"gflops": 2 * 2048**3 / product / 1e9, "gigabytes_per_second": 2 * source.nbytes / copy / 1e9}


def report(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Print the results as JSON, with what they were measured on, and write them to --output."""
    machine = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    text = json.dumps({"arguments": vars(args), "machine": machine, **_rounded(results)}, indent=2, default=str) + "\n"
    sys.stdout.write(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)  # else the work was for nothing
        args.output.write_text(text)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(entry) for name, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
