"""Training steps on long lists: seconds, and peak memory of the whole process, for each operator and pairwise loss.

    python -m benchmarks.long_lists [--items=40,200,1000,4000] [--methods=lcron_lml,bce] [--batch_size=64] [--steps=2]
        [--output=steps.json]      which lcron table --kind=choices --steps=steps.json shows beside what was chosen

Each length and method has a process of its own. Requests are those of a simulated log with random items of the same
day beside their own, up to so many in all. Seconds are the median of the steps but the first; the peak includes Python,
PyTorch, the compiled kernels and the assembled batch.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import common
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.random_items import with_items_of_day
from deep_components.errors import InputError
from deep_components.kernels import keep_freed_memory
from deep_components.loss.selection import SELECTION_OPERATORS
from deep_components.training.loop import prepare

OTHERS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "sorting")
METHODS = {
    f"{loss}_{name}": (f"--loss_type={loss}", f"--topk_op={name}")
    for loss in ("lcron", "arf_v2")
    for name in SELECTION_OPERATORS
} | {name: (f"--loss_type={name}",) for name in OTHERS}
DEFAULT = [name for name in METHODS if not name.startswith("arf_v2_")]


def measure(method: str, items: int, args: argparse.Namespace, data_dir: Path) -> dict[str, float]:
    """Seconds of a step on one batch, and the bytes that the process took at the most."""
    cascade, command = SETTINGS[args.setting], common.COMMANDS[args.setting]
    namespace = common.training_arguments(args, data_dir, *METHODS[method])
    run = prepare(cascade, namespace, command.build_loss(namespace))
    day, requests, more = run.days[0], np.arange(args.batch_size), items - cascade.num_items
    batch = day.batch(requests)
    if more:
        batch = with_items_of_day(batch, day, requests, more, len(cascade.groups))
    keep_freed_memory(args.batch_size * items**2)  # as for a log with such lists
    prepared = run.trainer.prepare(batch).to(run.device)
    seconds = list[float]()
    for _ in range(args.steps):
        started = time.perf_counter()
        run.trainer.step(prepared)
        common.synchronise()
        seconds.append(time.perf_counter() - started)
    measured = {"items": batch.targets.mask.shape[1], "random_items": more, "seconds": median(seconds[1:] or seconds)}
    return measured | common.peak_bytes()


def main(argv: list[str]) -> None:
    parser = common.parser(__doc__, batch_size=64, requests=2048, videos=50_000)
    parser.add_argument("--items", default="40,200,1000,4000")
    parser.add_argument("--methods", default=",".join(DEFAULT))
    parser.add_argument("--steps", type=int, default=2, help="the first one does not count")
    args = parser.parse_args(argv)
    lengths, methods = [int(items) for items in args.items.split(",")], args.methods.split(",")
    if set(methods) - METHODS.keys() or min(lengths) < SETTINGS[args.setting].num_items or args.steps < 1:
        raise InputError(
            f"--methods are of {', '.join(METHODS)}; --items at least those of the setting; --steps from 1"
        )
    results: dict[str, dict[str, Any]] = {method: {} for method in methods}
    with common.simulated_log(args) as data_dir:
        common.open_day(args, data_dir)
        for items in lengths:
            for method in methods:
                with common.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    results[method][str(items)] = pool.submit(measure, method, items, args, data_dir).result()
                sys.stderr.write(f"{method} {items}: {results[method][str(items)]}\n")
    common.report(args, {"results": results})


if __name__ == "__main__":
    sys.exit(run_command(main))
