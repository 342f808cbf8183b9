"""Evaluating a day, scores and all metrics, beside the baseline: groups one by one, metrics request by request.

    python -m benchmarks.evaluation [--setting=two_stage] [--requests=4096]

Both evaluate the same untrained cascade; their joint recall must be the same.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.baseline import BaselineReader, all_scores, day_metrics
from benchmarks.step import build_baseline, build_trainer
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.columnar import open_day
from deep_components.errors import InputError
from deep_components.evaluation.day import score_day, summary


def ours(args: argparse.Namespace, data_dir: Path) -> Callable[[], float]:
    cascade = SETTINGS[args.setting]
    day = open_day(data_dir, common.DAY, cascade)
    trainer = build_trainer(args, data_dir, day)

    def work() -> float:
        scored = score_day(trainer.models, day, args.batch_size, torch.device(args.device), trainer.prepare)
        _, results = summary(cascade, scored, torch.from_numpy(day.group))
        return float(next(value for name, value in results.items() if name.startswith("joint_recall")))

    return work


def baseline(args: argparse.Namespace, data_dir: Path) -> Callable[[], float]:
    cascade, device = SETTINGS[args.setting], torch.device(args.device)
    day = open_day(data_dir, common.DAY, cascade)
    reader, models = BaselineReader(cascade, data_dir, common.DAY), build_baseline(args, data_dir).models

    @torch.no_grad()
    def work() -> float:
        parts: list[dict[str, np.ndarray]] = []
        for first in range(0, len(day), args.batch_size):
            places = range(first, min(first + args.batch_size, len(day)))
            reader.batch(places)  # the work of it; what it makes equals what the cache holds
            batch = day.batch(np.array(places)).to(device)
            scores = [values.cpu().numpy() for values in all_scores(cascade, models, batch.features)]
            parts.append(dict(zip(models, scores, strict=True)) | {"labels": batch.targets.labels.cpu().numpy()})
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        labels = whole.pop("labels")
        return day_metrics(cascade, whole, labels)["joint_recall"]

    return work


def main(argv: list[str]) -> None:
    args = common.parser(__doc__).parse_args(argv)
    with common.simulated_log(args) as data_dir:
        open_day(data_dir, common.DAY, SETTINGS[args.setting])  # the cache is there before anybody's turn
        with common.contestants({"ours": ours, "baseline": baseline}, args, data_dir) as both:
            seconds, recalls = common.turns(both, args.repeats)
    if args.baseline and not math.isclose(recalls["ours"] or 0, recalls["baseline"] or 0, rel_tol=1e-4):
        raise InputError(f"the joint recalls differ: {recalls}")
    results = common.compared(seconds) | {"joint_recall": recalls}
    results["requests_per_second"] = {name: args.requests / value for name, value in seconds.items()}
    common.report(args, results)


if __name__ == "__main__":
    sys.exit(run_command(main))
