"""One pass over a day from its files to trained models, beside the baseline: the whole command against its plain way.

    python -m benchmarks.epoch [--setting=two_stage] [--requests=8192] [--videos=4000]

Ours is what ``python -m deep_components.run_train2`` does, checkpoints included, with a cache that is there; the
baseline reads the files, encodes request by request, and steps.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.baseline import BaselineReader
from benchmarks.step import build_baseline
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.columnar import open_day
from deep_components.training.loop import train_cascade


def ours(args: argparse.Namespace, data_dir: Path) -> Callable[[], None]:
    def work() -> None:
        namespace = common.training_namespace(args, data_dir)
        train_cascade(SETTINGS[args.setting], namespace, common.COMMANDS[args.setting].build_loss(namespace))

    return work


def baseline(args: argparse.Namespace, data_dir: Path) -> Callable[[], None]:
    day = open_day(data_dir, common.DAY, SETTINGS[args.setting])

    def work() -> None:
        reader, trainer = BaselineReader(SETTINGS[args.setting], data_dir, common.DAY), build_baseline(args, data_dir)
        for first in range(0, len(day) // args.batch_size * args.batch_size, args.batch_size):
            places = range(first, first + args.batch_size)
            reader.batch(places)  # the work of it; what it makes equals what the cache holds
            trainer.step(day.batch(np.array(places)).to(torch.device(args.device)))

    return work


def main(argv: list[str]) -> None:
    parser = common.parser(__doc__)
    parser.set_defaults(requests=8192, repeats=3)
    args = parser.parse_args(argv)
    with common.simulated_log(args) as data_dir:
        open_day(data_dir, common.DAY, SETTINGS[args.setting])  # the cache is there before anybody's turn
        with common.contestants({"ours": ours, "baseline": baseline}, args, data_dir) as both:
            seconds, _ = common.turns(both, args.repeats)
            peaks = {name: contestant.peak() for name, contestant in both.items()}
    results = common.compared(seconds) | {"peak_bytes": peaks}
    results["requests_per_second"] = {name: args.requests / value for name, value in seconds.items()}
    common.report(args, results)


if __name__ == "__main__":
    sys.exit(run_command(main))
