"""Evaluating a day, scores and all metrics, beside the baseline: groups one by one, metrics request by request.

    python -m benchmarks.evaluation [--setting=two_stage] [--requests=4096]

Both evaluate the same untrained cascade; their joint recall must be the same.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.baseline import day_metrics
from benchmarks.step import build_baseline, build_run
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.evaluation.day import score_day, summary


def ours(args: argparse.Namespace, data_dir: Path) -> common.Work:
    run = build_run(args, data_dir)

    def work() -> float:
        scored = score_day(run.trainer.models, run.trainer.stores, run.days[0], args.batch_size, run.device)
        _, results = summary(SETTINGS[args.setting], scored)
        return float(next(value for name, value in results.items() if name.startswith("joint_recall")))

    return work


def baseline(args: argparse.Namespace, data_dir: Path) -> common.Work:
    trainer, reader = build_baseline(args, data_dir)

    @torch.no_grad()
    def work() -> float:
        parts: list[dict[str, np.ndarray]] = []
        for batch in reader.batches(args.batch_size):
            found = trainer.scores(batch.to(torch.device(args.device)).features) | {"labels": batch.targets.labels}
            parts.append({name: values.cpu().numpy() for name, values in found.items()})
        scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        labels = scores.pop("labels")
        return day_metrics(trainer.cascade, scores, labels)["joint_recall"]

    return work


def main(argv: list[str]) -> None:
    args = common.parser(__doc__).parse_args(argv)
    with common.simulated_log(args) as data_dir:
        common.open_day(args, data_dir)  # the cache is there before anybody's turn
        measured = common.compete({"ours": ours, "baseline": baseline}, args, data_dir)
    common.check_same(measured, "joint recalls", 1e-4)
    recalls = {name: one.first_result for name, one in measured.items()}
    common.report(args, common.compared(measured, args.requests) | {"joint_recall": recalls})


if __name__ == "__main__":
    sys.exit(run_command(main))
