"""The data path: a day's first read into the cache, a later opening, and a batch, beside reading it item by item.

    python -m benchmarks.data [--requests=4096] [--videos=4000]

The baseline reads the day's files and encodes every request in Python, as the original's loader does.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.baseline import BaselineReader
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset import columnar


def first_read(args: argparse.Namespace, data_dir: Path) -> common.Work:
    """The cache is built anew."""

    def work() -> None:
        cache = data_dir / "first"
        shutil.rmtree(cache, ignore_errors=True)
        common.open_day(args, data_dir, cache)

    return work


def later_read(args: argparse.Namespace, data_dir: Path) -> common.Work:
    """The cache is there: it is opened, its checksums are verified, and all its batches are assembled."""
    cache = data_dir / "later"
    common.open_day(args, data_dir, cache)

    def work() -> None:
        os.environ.pop(columnar.VERIFIED, None)  # as a process does that nobody has verified the day for
        day = common.open_day(args, data_dir, cache)
        for first in range(0, len(day), args.batch_size):
            day.batch(np.arange(first, min(first + args.batch_size, len(day))))

    return work


def baseline(args: argparse.Namespace, data_dir: Path) -> common.Work:
    """The day's files are read, and all batches assembled."""

    def work() -> None:
        for _ in BaselineReader(SETTINGS[args.setting], data_dir, common.DAY).batches(args.batch_size):
            pass

    return work


def main(argv: list[str]) -> None:
    args = common.parser(__doc__).parse_args(argv)
    with common.simulated_log(args) as data_dir:
        builders = {"ours": first_read, "later": later_read, "baseline": baseline}
        measured = common.compete(builders, args, data_dir)
    milliseconds = {name: one.seconds / args.requests * 1e3 for name, one in measured.items()}
    common.report(args, common.compared(measured, args.requests) | {"milliseconds_per_request": milliseconds})


if __name__ == "__main__":
    sys.exit(run_command(main))
