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
from deep_components.files import read_json

# Arguments in which runs of one method may differ.
_NOT_THE_METHOD = ("seed", "output_dir", "cache_dir", "device", "cuda", "print_freq", "resume", "loss_type")
# Arguments that an untrained cascade depends on.
_UNTRAINED = ("emb_dim", "nn_units", "seq_len", "dtype", "time_zone", "init_from", "data_dir")


@dataclass(frozen=True)
class Run:
    """One evaluated run."""

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes the method: the arguments but the seed and where things lie."""
        arguments = self.config["arguments"]
        if self.results["epochs"] == 0:
            return {key: arguments.get(key) for key in _UNTRAINED}
        return {key: value for key, value in arguments.items() if key not in _NOT_THE_METHOD}


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
    paths: dict[Path, Path] = {}
    for folder in folders:
        inside = {path.resolve(): path for path in sorted(folder.rglob(checkpoint.METRICS_FILE))}
        if not inside:
            raise InputError(f"{folder}: no {checkpoint.METRICS_FILE}; evaluate the runs first")
        paths |= inside
    runs = [_read_run(path) for path in paths.values()]
    for field in ("setting", "data", "test_day"):
        values = {run.results.get(field): run.folder for run in runs}
        if len(values) > 1:
            found = "; ".join(f"{value} in {folder}" for value, folder in values.items())
            raise InputError(f"the runs differ in {field}, so their numbers cannot stand in one table: {found}")
    return runs


def _read_run(path: Path) -> Run:
    try:
        results, config = read_json(path), checkpoint.read_config(path.parent)
    except (OSError, ValueError, RecursionError) as error:  # an InputError is a ValueError
        raise InputError(f"{path}: not readable ({error}); evaluate the run again") from error
    needed = {"setting", "data", "test_day", "loss_type", "epochs", "seed", "num_requests"}
    if not results.keys() >= needed or not isinstance(config.get("arguments"), dict):
        raise InputError(f"{path}: not the results of a run; evaluate the run again")
    return Run(path.parent, config, results)


def methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by method; untrained cascades come last. Runs of one loss whose arguments differ are told apart by those
    arguments."""
    by_loss: dict[str, list[Run]] = {}
    for run in runs:
        by_loss.setdefault("untrained" if run.results["epochs"] == 0 else run.results["loss_type"], []).append(run)
    named: dict[str, list[Run]] = {}
    for loss, group in sorted(by_loss.items(), key=lambda item: item[0] == "untrained"):
        differing = sorted(
            key for key in group[0].arguments if len({json.dumps(run.arguments.get(key)) for run in group}) > 1
        )
        for run in group:
            details = ", ".join(f"{key}={run.arguments.get(key)}" for key in differing)
            method = named.setdefault(f"{loss} ({details})" if details else loss, [])
            if loss == "untrained" and run.results["seed"] in [other.results["seed"] for other in method]:
                continue  # the same cascade, evaluated beside several methods
            method.append(run)
    for name, members in named.items():
        seeds = [run.results["seed"] for run in members if run.results["seed"] is not None]  # imported models have none
        if len(set(seeds)) < len(seeds):
            folders = ", ".join(str(run.folder) for run in members)
            raise InputError(f"{name}: a seed stands twice in {folders}; name each run once")
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
    return "\n".join(
        [
            head,
            *sorted({run.results[key] for run in runs for key in run.results if key.startswith("warning")}),
            "",
            *lines,
            "",
        ]
    )


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
