"""Every method in both settings on one log, with several seeds; beside expected numbers where there are some.

    python -m benchmarks.methods --data_dir=LOG --output_dir=RUNS [--expected=movielens_expected.csv]

LOG lies in RecFlow's layout. Finished runs are kept, so the command can be stopped and started again. A run is what
``two_stage/<method>.sh`` does, at --batch_size=64 by default, which suits a log of ten thousand requests.

The file of expected numbers has the columns setting, method, metric, mean, std, runs. A method agrees when its mean
joint recall differs by at most 0.01 or three standard errors (icc and rankflow, which are unstable: 0.03).
"""

import argparse
import csv
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

from deep_components.cascade import SETTINGS
from deep_components.checkpoint import METRICS_FILE, read_training
from deep_components.cli import run_command
from deep_components.dataset.columnar import open_day
from deep_components.dataset.days import test_day, training_days
from deep_components.errors import InputError
from deep_components.reporting.results import build_results
from deep_components.reporting.runs import read_runs
from deep_components.reporting.tables import text

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


def script_arguments(setting: str, method: str) -> list[str]:
    """The hyper-parameters in the method's script: what stands between its name and the --."""
    path = ROOT / setting / f"{method}.sh"
    try:
        text = path.read_text().replace("\\\n", " ")
    except OSError as error:
        raise InputError(f"{path}: no such script; name scripts of {setting}/ with --methods") from error
    found = re.search(rf'run\.sh" {re.escape(method)}(.*?) -- "\$@"', text)
    assert found is not None
    return found.group(1).split()


def run(setting: str, method: str, seed: int, args: argparse.Namespace) -> Path:
    """Train and evaluate one run unless a finished one is there; its folder.

    Raises InputError when the folder holds a run on other data or of another batch size, or a command fails.
    """
    folder: Path = args.output_dir / setting / method / f"seed{seed}"
    if (folder / METRICS_FILE).exists():
        before = read_training(folder)["arguments"]
        if (before["data_dir"], before["batch_size"]) != (str(args.data_dir), args.batch_size):
            raise InputError(
                f"{folder}: holds a run on {before['data_dir']} with batch size {before['batch_size']}; "
                "name another --output_dir"
            )
        return folder
    number = len(SETTINGS[setting].stages)
    where = [f"--data_dir={args.data_dir}", f"--output_dir={folder}", "--device=cpu"]
    training = [*script_arguments(setting, method), *where, f"--batch_size={args.batch_size}", f"--seed={seed}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    for command in ([f"run_train{number}", *training], [f"run_test{number}", *where]):
        done = subprocess.run(
            [sys.executable, "-m", f"deep_components.{command[0]}", *command[1:]],
            cwd=ROOT,
            env=os.environ | threads,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise InputError(f"{folder}: {command[0]} failed: {done.stderr.strip()}")
    return folder


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
    print(text(build_results(collected)))
    expected: dict[str, dict[str, str]] = {}
    if args.expected:
        with args.expected.open() as file:
            rows = [row for row in csv.DictReader(file) if (row["setting"], row["metric"]) == (setting, JOINT)]
        expected = {row["method"]: row for row in rows}
    verdicts = {}
    for method in methods:
        values = [run.results[JOINT] for run in collected.runs if run.folder.parent.name == method]
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
    for setting in settings:
        for method in methods:
            script_arguments(setting, method)
        for day in {*training_days(args.data_dir, None), test_day(args.data_dir, None)}:
            open_day(args.data_dir, day, SETTINGS[setting])  # once, before several processes want the same cache
    work = [(setting, method, seed) for seed in args.seeds for setting in settings for method in methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run, *item, args): item for item in work}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                print(f"[{done}/{len(futures)}] {future.result()}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    agree = [
        report(args, setting, methods, [future.result() for future, item in futures.items() if item[0] == setting])
        for setting in settings
    ]
    if not all(agree):
        raise InputError("a method differs from the expected numbers by more than allowed, see above")


if __name__ == "__main__":
    sys.exit(run_command(main))
