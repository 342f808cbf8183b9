"""Every method in both settings on one log, with several seeds; beside expected numbers where there are some.

    python -m benchmarks.methods --data_dir=LOG --output_dir=RUNS [--expected=movielens_expected.csv]

LOG lies in RecFlow's layout. The runs are those of ``two_stage/<method>.sh``, at --batch_size=64 by default, which
suits a log of ten thousand requests. Finished ones are kept, so the command can be stopped and started again.

The file of expected numbers has the columns setting, method, metric, mean, std, runs. A method agrees when its mean
joint recall differs by at most 0.01 or three standard errors (icc and rankflow, which are unstable: 0.03).
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.commands import table
from deep_components.errors import InputError
from deep_components.runs.folder import METRICS_FILE

METHODS = "bce,icc,rankflow,fs_ranknet,fs_lambdaloss,arf,arf_v2,lcron"
JOINT = "joint_recall@10@20"
WIDE = {"icc": 0.03, "rankflow": 0.03}
ROOT = Path(__file__).parents[1]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--settings", default="two_stage,three_stage")
    parser.add_argument("--methods", default=METHODS, help="names of scripts, e.g. lcron,lcron_tau_20")
    parser.add_argument("--seeds", default="30,31,32,33,34")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, sharing the cores")
    return parser.parse_args(argv)


def make_runs(setting: str, args: argparse.Namespace) -> dict[str, list[Path]]:
    """Make the runs of a setting as its scripts state them, without the untrained cascade; method -> their folders.

    Raises InputError when there is no such script, or a run failed.
    """
    stated = []
    for method in args.methods.split(","):
        script = ROOT / setting / f"{method}.sh"
        if not script.exists():
            raise InputError(f"{script}: no such script; name scripts of {setting}/ with --methods")
        printed = subprocess.run(["bash", script, "--print_method"], capture_output=True, text=True, check=True)
        stated += printed.stdout.splitlines()
    number = len(SETTINGS[setting].stages)
    plan = [f"--train=deep_components.run_train{number}", f"--evaluate=deep_components.run_test{number}"]
    plan += [f"--setting={setting}", "--no-untrained", "--by_setting", *stated]  # what follows a method is its own
    user = [f"--{name}={getattr(args, name)}" for name in ("seeds", "batch_size", "jobs")] + ["--device=cpu"]
    user += [f"--{name}={getattr(args, name).resolve()}" for name in ("data_dir", "output_dir")]
    runner = [sys.executable, "-m", "deep_components.run_experiments", *plan, "--", *user]
    if subprocess.run(runner, cwd=ROOT, check=False).returncode:
        raise InputError(f"{setting}: not all runs could be made, see above")
    return {
        method: [args.output_dir / setting / method / f"seed{seed}" for seed in args.seeds.split(",")]
        for method in args.methods.split(",")
    }


def agrees(method: str, values: list[float], expected: dict[str, str]) -> bool:
    """Print how the mean of the values stands to the expected one; whether the difference is allowed."""
    difference = mean(values) - float(expected["mean"])
    errors = [stdev(values) / math.sqrt(len(values))] if len(values) > 1 else []
    errors.append(float(expected["std"]) / math.sqrt(int(expected["runs"])))
    allowed = max(WIDE.get(method, 0.01), 3 * math.hypot(*errors))
    verdict = "agrees" if abs(difference) <= allowed else "DIFFERS"
    print(f"  {method:<14} {mean(values):.4f}, difference {difference:+.4f}, allowed {allowed:.4f}: {verdict}")
    return abs(difference) <= allowed


def compare(setting: str, args: argparse.Namespace) -> bool:
    """Make a setting's runs, print their table, and how they stand to the expected numbers; False when one differs."""
    runs = make_runs(setting, args)
    table.main([str(folder) for folders in runs.values() for folder in folders])
    expected: dict[str, dict[str, str]] = {}
    if args.expected:
        with args.expected.open() as file:
            rows = [row for row in csv.DictReader(file) if (row["setting"], row["metric"]) == (setting, JOINT)]
        expected = {row["method"]: row for row in rows if row["method"] in runs}
    values = {name: [json.loads((run / METRICS_FILE).read_text())[JOINT] for run in runs[name]] for name in expected}
    verdicts = [agrees(name, values[name], expected[name]) for name in expected]
    return all(verdicts)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    settings = args.settings.split(",")
    if set(settings) - SETTINGS.keys() or args.jobs < 1:
        raise InputError(f"--settings={args.settings} --jobs={args.jobs}: use {', '.join(SETTINGS)}; jobs from 1")
    verdicts = [compare(setting, args) for setting in settings]
    if not all(verdicts):
        raise InputError("a method differs from the expected numbers by more than allowed, see above")


if __name__ == "__main__":
    sys.exit(run_command(main))
