"""Reading many runs: what an evaluated run says, which runs belong together, and what their rows are called.

A damaged run is left out and named. Runs that do not belong in one table are refused.
"""

import json
import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deep_components.arguments import UNTRAINED_ARGUMENTS, WHEREABOUTS
from deep_components.errors import InputError
from deep_components.files import read_json
from deep_components.runs import checkpoint

UNTRAINED = "untrained"

# Arguments in which runs of one method may differ. Checksums see to it that the data are the same wherever they lie.
_NOT_THE_METHOD = (*WHEREABOUTS, "seed", "loss_type", "compact_from", "on_nonfinite")
_NEEDED = {"setting": str, "data": str, "test_day": str, "loss_type": str, "epochs": int, "num_requests": int}
_FOLDERS_NAMED = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One evaluated run: its folder, config.json, metrics.json, and the name its script gave it, if any."""

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    given_name: str | None = None

    @property
    def seed(self) -> int | None:
        """None for imported models."""
        return self.results.get("seed")

    @property
    def untrained(self) -> bool:
        return self.results["epochs"] == 0

    @property
    def name(self) -> str:
        """The script's name, else the loss."""
        return UNTRAINED if self.untrained else self.given_name or self.results["loss_type"]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the paper's tables."""
        return tuple(name for name in self.results if "@" in name)

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes the method: the arguments but the seed and where things lie."""
        arguments = self.config["arguments"]
        if self.untrained:
            return {key: arguments.get(key) for key in UNTRAINED_ARGUMENTS}
        return {key: value for key, value in arguments.items() if key not in _NOT_THE_METHOD}

    def per_request(self, name: str) -> np.ndarray | None:
        """A metric per request [R], or "request_id"; None where the evaluation did not write it."""
        try:
            path = self.folder / checkpoint.PER_REQUEST_FILE
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return arrays.get(name)
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class Collected:
    """The runs that could be read, all of one setting, log and test day; and folder -> why it was left out."""

    runs: list[Run]
    left_out: dict[Path, str] = field(default_factory=dict)


def read_runs(folders: Sequence[Path]) -> Collected:
    """The evaluated runs in the folders, at any depth. A damaged or unevaluated one is named in a warning and left out.

    Raises InputError when a folder holds no run, none is left, or they differ in setting, data or test day.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        inside = {path.parent.resolve(): path.parent for path in sorted(folder.rglob(checkpoint.METRICS_FILE))}
        if not inside:
            raise InputError(f"{folder}: no {checkpoint.METRICS_FILE}; evaluate the runs first")
        inside |= {path.parent.resolve(): path.parent for path in sorted(folder.rglob(checkpoint.CONFIG_FILE))}
        found |= {place: named for place, named in inside.items() if place not in found}
    runs, left_out = [], {}
    for folder in found.values():
        try:
            runs.append(_read_run(folder))
        except InputError as error:
            left_out[folder] = str(error)
    if not runs:
        raise InputError("; ".join(left_out.values()))
    for reason in left_out.values():
        logger.warning("left out: %s", reason)
    _check_belong_together(runs)
    return Collected(runs, left_out)


def rows(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by method, in order of seeds; untrained cascades come last. Runs of one name whose arguments differ are
    told apart by those arguments.

    Raises InputError when a seed of a method stands twice.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    named: dict[str, list[Run]] = {}
    for name, group in sorted(by_name.items(), key=lambda item: item[0] == UNTRAINED):
        keys = sorted({key for run in group for key in run.arguments})
        differing = [key for key in keys if len({json.dumps(run.arguments.get(key)) for run in group}) > 1]
        for run in group:
            details = ", ".join(f"{key}={run.arguments.get(key)}" for key in differing)
            method = named.setdefault(printable(f"{name} ({details})" if details else name), [])
            if name == UNTRAINED and run.seed in [other.seed for other in method]:
                continue  # the same cascade, evaluated beside several methods
            method.append(run)
    for name, members in named.items():
        seeds = [run.seed for run in members if run.seed is not None]
        if len(set(seeds)) < len(seeds):
            folders = ", ".join(str(run.folder) for run in members)
            raise InputError(f"{name}: a seed stands twice in {folders}; name each run once")
        members.sort(key=lambda run: run.seed if run.seed is not None else -1)
    return named


def printable(text: str) -> str:
    """The text without what would steer a terminal or cannot be written: names come from files."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _read_run(folder: Path) -> Run:
    path = folder / checkpoint.METRICS_FILE
    try:
        results, config = read_json(path), checkpoint.read_config(folder)
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not evaluated (no {path.name}); finish the run or remove it") from error
    except (OSError, ValueError, RecursionError) as error:  # an InputError is a ValueError
        raise InputError(f"{path}: not readable ({error}); evaluate the run again") from error
    if not isinstance(results, dict) or not isinstance(config.get("arguments"), dict) or "seed" not in results:
        raise InputError(f"{path}: not the results of a run; evaluate the run again")
    for name, kind in _NEEDED.items():
        if not isinstance(results.get(name), kind):
            raise InputError(f"{path}: field {name} is missing or damaged; evaluate the run again")
    run = Run(folder, config, results, _given_name(folder))
    for name in run.metrics:
        if results[name] is not None and not _is_number(results[name]):
            raise InputError(f"{path}: {name} is {results[name]!r}, not a number; evaluate the run again")
    if not run.metrics:
        raise InputError(f"{path}: holds no metric; evaluate the run again")
    _check_per_request(run)
    return run


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _given_name(folder: Path) -> str | None:
    path = folder / checkpoint.RUN_FILE
    try:
        content: Any = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); make the run again") from error
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: field name is missing or damaged; make the run again")
    return name


def _check_per_request(run: Run) -> None:
    """InputError when per_request.npz is damaged or says other things than metrics.json."""
    path = run.folder / checkpoint.PER_REQUEST_FILE
    try:
        for name in ("request_id", *run.metrics):
            values = run.per_request(name)
            if values is None:
                if path.exists():
                    raise ValueError(f"{name} is missing")
                return
            if values.shape != (run.results["num_requests"],) or values.dtype.kind not in "if":
                raise ValueError(f"{name} is no number per request")
            defined = values[~np.isnan(values)]
            mean = run.results.get(name)
            if name != "request_id" and (mean is None) != (len(defined) == 0):
                raise ValueError(f"{name} is not that of metrics.json")
            if name != "request_id" and mean is not None and not math.isclose(defined.mean(), mean, abs_tol=1e-6):
                raise ValueError(f"{name} has the mean {defined.mean():.6f}, not {mean:.6f} as in metrics.json")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path}: not readable ({error}); evaluate the run again") from error


def _check_belong_together(runs: Sequence[Run]) -> None:
    for name in ("setting", "data", "test_day", "test_day_checksum", "num_requests"):
        _check_alike(name, {run.folder: run.results.get(name) for run in runs})
    _check_alike("metrics", {run.folder: ", ".join(sorted(run.metrics)) for run in runs})
    checksums = {run.folder: run.config.get("data_checksums") for run in runs if not run.untrained}
    known = {folder: days for folder, days in checksums.items() if isinstance(days, dict)}
    for day in sorted({day for days in known.values() for day in days}):
        name = f"the checksum of training day {day}"
        _check_alike(name, {folder: days[day] for folder, days in known.items() if day in days})


def _check_alike(name: str, values: Mapping[Path, Any]) -> None:
    """InputError that names the folders by their value, the rarest first, unless all values are equal."""
    folders: dict[Any, list[Path]] = {}
    for folder, value in values.items():
        folders.setdefault(value, []).append(folder)
    if len(folders) < 2:
        return
    parts = []
    for value, group in sorted(folders.items(), key=lambda item: len(item[1])):
        more = f" and {len(group) - _FOLDERS_NAMED} more" if len(group) > _FOLDERS_NAMED else ""
        parts.append(f"{value} in {', '.join(str(folder) for folder in group[:_FOLDERS_NAMED])}{more}")
    raise InputError(
        f"the runs differ in {name}, so their numbers cannot stand in one table: {'; '.join(parts)}; leave out those "
        "that do not belong"
    )
