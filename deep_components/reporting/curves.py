"""What runs did over time, from train.jsonl and streaming.json: mean, lowest and highest seed, short enough to draw."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from deep_components.cli import printable
from deep_components.errors import InputError
from deep_components.files import regular
from deep_components.reporting.frame import arguments_of, is_number
from deep_components.runs.folder import STEP_LOG_FILE, STREAMING_FILE, read_json

T = TypeVar("T")

POINTS = 100  # of a drawn curve; the steps between two of them are averaged
VALIDATION = "validation."  # begins the names of a validation's metrics in train.jsonl
LARGEST = 1e100  # values are cut to it, so that neither their sum nor an axis's scale overflows


def learning_curves(group: pd.DataFrame, problems: list[str]) -> dict[str, pd.DataFrame]:
    """The loss, its terms and weights of a method over the requests trained on.

    The steps are cut into at most POINTS equal parts; a point is the mean of a part, at its middle. Only the steps that
    all seeds made, and the terms that all have, count; a step that was left out has no value, and a part of such steps
    no point.

    ``problems`` gets a sentence for every damaged train.jsonl, which is left out. Returns term -> ``mean``, ``low`` and
    ``high`` over seeds by the number of requests; empty without a loss.
    """
    logs = [log for log in _read_each(group, read_steps, problems) if len(log)]
    if not logs:
        return {}
    length = min(len(log) for log in logs)
    edges = np.linspace(0, length, min(POINTS, length) + 1).astype(int)
    requests = (edges[:-1] + edges[1:] + 1) / 2 * _requests_a_step(group)
    part = np.repeat(requests, np.diff(edges))
    seeds = [log[:length].clip(-LARGEST, LARGEST).groupby(part).mean() for log in logs]
    names = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    curves = {str(name): _over_seeds(pd.concat([seed[name] for seed in seeds], axis=1)) for name in names}
    return {name: curve for name, curve in curves.items() if len(curve)} if len(curves["loss"]) else {}


def streaming_curves(runs: pd.DataFrame, metric: str, problems: list[str]) -> dict[str, pd.DataFrame]:
    """Row -> ``mean``, ``low`` and ``high`` over seeds of the metric by test day; without rows that did not stream.

    Only the days that all seeds of a row have count. ``problems`` gets a sentence for every damaged streaming.json.
    """
    curves = {}
    for name, group in runs.groupby("row", sort=False):
        seeds = [seed for seed in _read_each(group, read_streaming, problems) if seed]
        values = pd.DataFrame([{day: found.get(metric) for day, found in seed.items()} for seed in seeds]).T
        curves[str(name)] = _over_seeds(values.where(values.map(is_number)).astype("float64").sort_index())
    return {name: curve for name, curve in curves.items() if len(curve)}


def validation_curves(runs: pd.DataFrame, metric: str, problems: list[str]) -> dict[str, pd.DataFrame]:
    """Row -> ``mean``, ``low`` and ``high`` over seeds of the metric on the validation day, by the number of requests
    trained on; without rows that did not validate.

    Only the steps after which all seeds of a row validated count: an early stop ends the curve of the others too.
    ``problems`` gets a sentence for every damaged train.jsonl.
    """
    curves = {}
    for name, group in runs[~runs["untrained"]].groupby("row", sort=False):
        seeds = [pd.Series(seed, dtype="float64") for seed in _read_each(group, read_validations(metric), problems)]
        values = pd.concat(seeds, axis=1, join="inner") if seeds else pd.DataFrame()
        values.index = values.index * _requests_a_step(group)
        curves[str(name)] = _over_seeds(values.clip(-LARGEST, LARGEST).sort_index())
    return {name: curve for name, curve in curves.items() if len(curve)}


def read_validations(metric: str) -> Callable[[Path], dict[int, float]]:
    """A reader of a run's train.jsonl: step -> the metric on the validation day, of the steps that one followed.

    It raises InputError when such a line is damaged."""
    name = f"{VALIDATION}{metric}"

    def read(folder: Path) -> dict[int, float]:
        records = _lines_of(folder, json.dumps(name).encode())
        if not all(is_number(record.get(name)) and type(record.get("step")) is int for record in records):
            raise InputError(f"{folder / STEP_LOG_FILE}: a validation is damaged; its curve is left out")
        return {record["step"]: record[name] for record in records if abs(record["step"]) < LARGEST}

    return read


def read_steps(folder: Path) -> pd.DataFrame:
    """A row per step and a column per term of a run's train.jsonl; empty when there is none or it has no step.

    NaN stands for the values of a step that was left out: they were not finite and are null in the file.

    Raises InputError when a line is damaged.
    """
    records = _lines_of(folder)
    if not all(_logged(record, "loss") for record in records):
        raise InputError(f"{folder / STEP_LOG_FILE}: a line lacks the loss; its curves are left out")
    names = [name for name in (records[0] if records else {}) if name not in ("step", "seconds")]
    names = [name for name in names if not name.startswith(VALIDATION)]
    names = [name for name in names if all(_logged(record, name) for record in records)]
    return pd.DataFrame({printable(name): [r[name] for r in records] for name in names}, dtype="float64")


def read_streaming(folder: Path) -> dict[str, dict[str, Any]]:
    """Test day -> metrics, of a run's streaming.json; empty when there is none. InputError when it is damaged."""
    path = folder / STREAMING_FILE
    content = read_json(path)
    if content is None:
        return {}
    days = content.get("days")
    if not isinstance(days, list) or not all(isinstance(d, dict) and isinstance(d.get("test_day"), str) for d in days):
        raise InputError(f"{path}: field days is missing or damaged; its curve is left out")
    return {printable(day["test_day"]): day for day in days}


def _lines_of(folder: Path, word: bytes = b"") -> list[dict[str, Any]]:
    """The lines of a run's train.jsonl that hold the word; none without the file. InputError when one is damaged."""
    path = folder / STEP_LOG_FILE
    try:
        with open(path, "rb", opener=regular) as file:
            records = [json.loads(line) for line in file if word in line]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); its curves are left out") from error
    if not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path}: a line is no object; its curves are left out")
    return records


def _requests_a_step(group: pd.DataFrame) -> int:
    batch = arguments_of(group.iloc[0].to_dict()).get("batch_size")
    return batch if type(batch) is int and 0 < batch <= LARGEST else 1


def _read_each(group: pd.DataFrame, read: Callable[[Path], T], problems: list[str]) -> list[T]:
    contents = []
    for folder in group["folder"]:
        try:
            contents.append(read(folder))
        except InputError as error:
            problems.append(printable(str(error)))
    return contents


def _over_seeds(values: pd.DataFrame) -> pd.DataFrame:
    values = values.dropna()
    return pd.DataFrame({"mean": values.mean(axis=1), "low": values.min(axis=1), "high": values.max(axis=1)})


def _logged(record: dict[str, Any], name: str) -> bool:
    """A number, or null for one that was not finite."""
    return name in record and (record[name] is None or is_number(record[name]))
