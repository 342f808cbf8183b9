"""Every method in both settings on one log, with several seeds; beside expected numbers where there are some.

    python -m benchmarks.methods --data_dir=LOG --output_dir=RUNS [--expected=movielens_expected.csv]

LOG lies in RecFlow's layout. The runs are those of ``two_stage/<method>.sh``, at --batch_size=64 by default, which
suits a log of ten thousand requests. Finished ones are kept, so the command can be stopped and started again.

The file of expected numbers has the columns setting, method, metric, mean, std, runs. A method agrees when its mean
joint recall differs by at most 0.01 or three standard errors (icc and rankflow, which are unstable: 0.03).
"""

import argparse
import csv
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.errors import InputError
from deep_components.reporting.frame import read_runs
from deep_components.reporting.results import build_results
from deep_components.reporting.tables import metrics_document, text

METHODS = ("bce", "icc", "rankflow", "fs_ranknet", "fs_lambdaloss", "arf", "arf_v2", "lcron")
DIFFERS = "DIFFERS"
JOINT = "joint_recall@10@20"
WIDE = {"icc": 0.03, "rankflow": 0.03}
ROOT = Path(__file__).parents[1]


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--settings", default="two_stage,three_stage")
    parser.add_argument("--methods", default=",".join(METHODS), help="names of scripts, e.g. lcron,lcron_tau_20")
    parser.add_argument("--seeds", type=_seeds, default=[30, 31, 32, 33, 34], help="30,31,...")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, sharing the cores")
    return parser.parse_args(argv)


def make_runs(setting: str, methods: list[str], args: argparse.Namespace) -> list[Path]:
    """Make the runs of a setting as its scripts state them, without the untrained cascade; their folders.

    Raises InputError when there is no such script, or a run failed.
    """
    stated = []
    for method in methods:
        script = ROOT / setting / f"{method}.sh"
        if not script.exists():
            raise InputError(f"{script}: no such script; name scripts of {setting}/ with --methods")
        printed = subprocess.run(
            ["bash", str(script)], env=os.environ | {"PRINT_METHOD": "yes"}, capture_output=True, text=True, check=True
        )
        stated += printed.stdout.splitlines()
    number = len(SETTINGS[setting].stages)
    commands = [f"--train=deep_components.run_train{number}", f"--evaluate=deep_components.run_test{number}"]
    user = [f"--{name}={getattr(args, name)}" for name in ("data_dir", "output_dir", "batch_size", "jobs")]
    user += [f"--seeds={','.join(map(str, args.seeds))}", "--device=cpu"]
    runner = [sys.executable, "-m", "deep_components.run_experiments", f"--setting={setting}", *commands]
    done = subprocess.run([*runner, "--no-untrained", "--by_setting", *stated, "--", *user], cwd=ROOT, check=False)
    if done.returncode:
        raise InputError(f"{setting}: not all runs could be made, see above")
    return [args.output_dir / setting / method / f"seed{seed}" for seed in args.seeds for method in methods]


def verdict(method: str, values: list[float], expected: dict[str, str]) -> str:
    """How the mean of the values stands to the expected one."""
    difference = mean(values) - float(expected["mean"])
    errors = [stdev(values) / math.sqrt(len(values))] if len(values) > 1 else [0.0]
    errors.append(float(expected["std"]) / math.sqrt(int(expected["runs"])))
    allowed = max(WIDE.get(method, 0.01), 3 * math.hypot(*errors))
    agrees = "agrees" if abs(difference) <= allowed else DIFFERS
    return f"expected {float(expected['mean']):.4f}, difference {difference:+.4f}, allowed {allowed:.4f}: {agrees}"


def report(args: argparse.Namespace, setting: str, methods: list[str], folders: list[Path]) -> bool:
    """Print the setting's table and verdicts; False when one differs."""
    collected = read_runs(folders)
    print(text(partial(metrics_document, build_results(collected))))
    expected: dict[str, dict[str, str]] = {}
    if args.expected:
        with args.expected.open() as file:
            rows = [row for row in csv.DictReader(file) if (row["setting"], row["metric"]) == (setting, JOINT)]
        expected = {row["method"]: row for row in rows}
    verdicts = {}
    for method in methods:
        values = [run[JOINT] for _, run in collected.runs.iterrows() if run["folder"].parent.name == method]
        if method in expected:
            verdicts[method] = verdict(method, values, expected[method])
            print(f"  {method:<14} {mean(values):.4f}, {verdicts[method]}")
    print()
    return not any(text.endswith(DIFFERS) for text in verdicts.values())


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    args.data_dir, args.output_dir = args.data_dir.resolve(), args.output_dir.resolve()
    settings, methods = args.settings.split(","), args.methods.split(",")
    unknown = set(settings) - SETTINGS.keys()
    if unknown or args.jobs < 1:
        raise InputError(f"--settings={args.settings} --jobs={args.jobs}: use {', '.join(SETTINGS)}; jobs from 1")
    agree = [report(args, setting, methods, make_runs(setting, methods, args)) for setting in settings]
    if not all(agree):
        raise InputError("a method differs from the expected numbers by more than allowed, see above")


if __name__ == "__main__":
    sys.exit(run_command(main))
