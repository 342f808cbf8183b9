"""One pass over a day from its files to trained models, beside the baseline: the whole command against its plain way.

    python -m benchmarks.epoch [--setting=two_stage] [--requests=8192] [--videos=4000]

Ours is what ``python -m deep_components.run_train2`` does, checkpoints included, with a cache that is there; the
baseline reads the files, encodes request by request, and steps.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.step import build_baseline
from deep_components.cli import run_command


def ours(args: argparse.Namespace, data_dir: Path) -> common.Work:
    return lambda: common.COMMANDS[args.setting].main(common.training_flags(args, data_dir))


def baseline(args: argparse.Namespace, data_dir: Path) -> common.Work:
    def work() -> None:
        trainer, reader = build_baseline(args, data_dir)
        for batch in reader.batches(args.batch_size, whole=True):
            trainer.step(batch.to(torch.device(args.device)))

    return work


def main(argv: list[str]) -> None:
    args = common.parser(__doc__, requests=8192, repeats=3).parse_args(argv)
    with common.simulated_log(args) as data_dir:
        common.open_day(args, data_dir)  # the cache is there before anybody's turn
        measured = common.compete({"ours": ours, "baseline": baseline}, args, data_dir)
    common.report(args, common.compared(measured, args.requests))


if __name__ == "__main__":
    sys.exit(run_command(main))
