"""The data path: a day's first read into the cache, a later opening, and a batch, beside reading it item by item.

    python -m benchmarks.data [--requests=4096] [--videos=4000]

The baseline reads the day's files and encodes every request in Python, as the original's loader does.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.baseline import BaselineReader
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.columnar import open_day


def first_read(args: argparse.Namespace, data_dir: Path) -> Callable[[], None]:
    """The cache is built anew."""

    def work() -> None:
        cache = data_dir / "first"
        shutil.rmtree(cache, ignore_errors=True)
        open_day(data_dir, common.DAY, SETTINGS[args.setting], cache)

    return work


def later_read(args: argparse.Namespace, data_dir: Path) -> Callable[[], None]:
    """The cache is there: it is opened, its checksums are verified, and all its batches are assembled."""
    cache = data_dir / "later"
    open_day(data_dir, common.DAY, SETTINGS[args.setting], cache)

    def work() -> None:
        day = open_day(data_dir, common.DAY, SETTINGS[args.setting], cache)
        for first in range(0, len(day), args.batch_size):
            day.batch(np.arange(first, min(first + args.batch_size, len(day))))

    return work


def baseline(args: argparse.Namespace, data_dir: Path) -> Callable[[], None]:
    """The day's files are read, and all batches assembled."""

    def work() -> None:
        reader = BaselineReader(SETTINGS[args.setting], data_dir, common.DAY)
        for first in range(0, len(reader), args.batch_size):
            reader.batch(range(first, min(first + args.batch_size, len(reader))))

    return work


def main(argv: list[str]) -> None:
    args = common.parser(__doc__).parse_args(argv)
    with common.simulated_log(args) as data_dir:
        builders = {"ours": first_read, "later": later_read, "baseline": baseline}
        with common.contestants(builders, args, data_dir) as contestants:
            seconds, _ = common.turns(contestants, args.repeats)
            peaks = {name: contestant.peak() for name, contestant in contestants.items()}
    results = common.compared(seconds) | {"peak_bytes": peaks}
    results["milliseconds_per_request"] = {name: value / args.requests * 1e3 for name, value in seconds.items()}
    common.report(args, results)


if __name__ == "__main__":
    sys.exit(run_command(main))
