"""Every method in both settings on one log, with several seeds; beside expected numbers where there are some.

    python -m benchmarks.methods --data_dir=LOG --output_dir=RUNS [--expected=movielens_expected.csv]

LOG lies in RecFlow's layout. Finished runs are kept, so the command can be stopped and started again. A run is what
``two_stage/<method>.sh`` does, at --batch_size=64 by default, which suits a log of ten thousand requests.

The file of expected numbers has the columns setting, method, metric, mean, std, runs. A method agrees when its mean
joint recall differs by at most 0.01 or three standard errors (icc and rankflow, which are unstable: 0.03).
"""

import argparse
import csv
import importlib
import math
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch

from deep_components import collect_metrics
from deep_components.cascade import SETTINGS
from deep_components.checkpoint import METRICS_FILE
from deep_components.cli import run_command
from deep_components.dataset.columnar import open_day
from deep_components.dataset.days import test_day, training_days

METHODS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron")
JOINT = "joint_recall@10@20"
WIDE = {"icc": 0.03, "rankflow": 0.03}
ROOT = Path(__file__).parents[1]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--settings", default="two_stage,three_stage")
    parser.add_argument("--methods", default=",".join(METHODS), help="names of scripts, e.g. lcron,lcron_tau_20")
    parser.add_argument("--seeds", default="30,31,32,33,34")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, sharing the cores")
    return parser.parse_args(argv)


def script_arguments(setting: str, method: str) -> list[str]:
    """The hyper-parameters in the method's script: what stands between its name and the --."""
    text = (ROOT / setting / f"{method}.sh").read_text().replace("\\\n", " ")
    found = re.search(rf'run\.sh" {re.escape(method)}(.*?) -- "\$@"', text)
    assert found is not None
    return found.group(1).split()


def run(setting: str, method: str, seed: int, args: argparse.Namespace, threads: int) -> Path:
    """Train and evaluate one run unless it is there; its folder."""
    folder: Path = args.output_dir / setting / method / f"seed{seed}"
    if (folder / METRICS_FILE).exists():
        return folder
    torch.set_num_threads(threads)
    number = len(SETTINGS[setting].stages)
    train = importlib.import_module(f"deep_components.run_train{number}")
    evaluate = importlib.import_module(f"deep_components.run_test{number}")
    where = [f"--data_dir={args.data_dir}", f"--output_dir={folder}", "--device=cpu"]
    if not (folder / "rank.safetensors").exists():  # written when the training has ended
        train.main([*script_arguments(setting, method), *where, f"--batch_size={args.batch_size}", f"--seed={seed}"])
    evaluate.main(where)
    return folder


def verdict(method: str, values: list[float], expected: dict[str, str]) -> str:
    difference = mean(values) - float(expected["mean"])
    errors = [stdev(values) / math.sqrt(len(values))] if len(values) > 1 else [0.0]
    errors.append(float(expected["std"]) / math.sqrt(int(expected["runs"])))
    allowed = max(WIDE.get(method, 0.01), 3 * math.hypot(*errors))
    agrees = "agrees" if abs(difference) <= allowed else "DIFFERS"
    return f"expected {float(expected['mean']):.4f}, difference {difference:+.4f}, allowed {allowed:.4f}: {agrees}"


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    settings, methods = args.settings.split(","), args.methods.split(",")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for setting in settings:  # once, before several processes want the same cache
        for day in {*training_days(args.data_dir, None), test_day(args.data_dir, None)}:
            open_day(args.data_dir, day, SETTINGS[setting])
    work = [(setting, method, seed) for seed in seeds for setting in settings for method in methods]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, *item, args, threads) for item in work]
        for done, future in enumerate(as_completed(futures), start=1):
            print(f"[{done}/{len(futures)}] {future.result()}", file=sys.stderr, flush=True)
    expected = {}
    if args.expected:
        with args.expected.open() as file:
            expected = {(row["setting"], row["method"]): row for row in csv.DictReader(file) if row["metric"] == JOINT}
    for setting in settings:
        runs = collect_metrics.read_runs([args.output_dir / setting / method for method in methods])
        print(collect_metrics.table(runs))
        for method in methods:
            values = [run.results[JOINT] for run in runs if run.folder.parent.name == method]
            if (setting, method) in expected and values:
                print(f"  {method:<14} {mean(values):.4f}, {verdict(method, values, expected[setting, method])}")
        print()


if __name__ == "__main__":
    sys.exit(run_command(main))
