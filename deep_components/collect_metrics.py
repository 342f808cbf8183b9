"""metrics.json of many runs -> one table: a row per method, mean +- standard deviation over its seeds."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from deep_components import checkpoint
from deep_components.cli import run_command
from deep_components.errors import InputError

# Arguments in which runs of one method may differ.
_NOT_THE_METHOD = ("seed", "output_dir", "cache_dir", "device", "cuda", "print_freq", "resume", "epochs", "loss_type")


@dataclass(frozen=True)
class Run:
    """One evaluated run."""

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes the method: the arguments but the seed and where things lie."""
        return {key: value for key, value in self.config["arguments"].items() if key not in _NOT_THE_METHOD}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The runs to collect."""
    parser = argparse.ArgumentParser(description="Print one table of many runs.", allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders that hold metrics.json, at any depth"
    )
    return parser.parse_args(argv)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The evaluated runs in the folders, at any depth.

    Raises InputError when there is none, one is damaged, or they differ in setting, data or test day.
    """
    paths = {path.resolve(): path for folder in folders for path in sorted(folder.rglob(checkpoint.METRICS_FILE))}
    if not paths:
        raise InputError(f"{', '.join(map(str, folders))}: no {checkpoint.METRICS_FILE}; evaluate the runs first")
    runs = []
    for path in paths.values():
        try:
            results = json.loads(path.read_text())
            runs.append(Run(path.parent, checkpoint.read_config(path.parent), results))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not readable ({error}); evaluate the run again") from error
    for field in ("setting", "data", "test_day"):
        values = {run.results.get(field): run.folder for run in runs}
        if len(values) > 1:
            found = "; ".join(f"{value} in {folder}" for value, folder in values.items())
            raise InputError(f"the runs differ in {field}, so their numbers cannot stand in one table: {found}")
    return runs


def methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by method; untrained cascades come last. Runs of one loss whose arguments differ are told apart by those
    arguments."""
    by_loss: dict[str, list[Run]] = {}
    for run in runs:
        by_loss.setdefault(run.results["loss_type"] if run.results["epochs"] else "untrained", []).append(run)
    named: dict[str, list[Run]] = {}
    for loss, group in sorted(by_loss.items(), key=lambda item: item[0] == "untrained"):
        differing = sorted(
            key for key in group[0].arguments if len({json.dumps(run.arguments.get(key)) for run in group}) > 1
        )
        for run in group:
            details = ", ".join(f"{key}={run.arguments.get(key)}" for key in differing)
            named.setdefault(f"{loss} ({details})" if details else loss, []).append(run)
    return named


def table(runs: Sequence[Run]) -> str:
    """The table as aligned text, headed by what the numbers are."""
    names = [name for name in runs[0].results if "@" in name]
    rows = [["method", *names, "seeds"]]
    for method, group in methods(runs).items():
        rows.append([method, *(_mean_and_std(group, name) for name in names), str(len(group))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    results = runs[0].results
    head = f"{results['setting']}, data: {results['data']}, test day {results['test_day']}, "
    head += f"{results['num_requests']} requests; mean +- standard deviation over seeds"
    return "\n".join([head, *([results["warning"]] if "warning" in results else []), "", *lines, ""])


def _mean_and_std(group: Sequence[Run], name: str) -> str:
    values = [run.results[name] for run in group]
    if any(value is None for value in values):
        return "undefined"
    return f"{mean(values):.4f} +- {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    sys.stdout.write(table(read_runs(args.runs)))


if __name__ == "__main__":
    sys.exit(run_command(main))
