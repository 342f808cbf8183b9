"""What runs did over time, from train.jsonl and streaming.json: curves over seeds, short enough to draw."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deep_components.errors import InputError
from deep_components.files import read_json
from deep_components.reporting.results import Row
from deep_components.reporting.runs import Run, printable
from deep_components.runs import checkpoint

T = TypeVar("T")

POINTS = 100  # of a drawn curve; what lies between two of them is averaged

_NO_TERMS = ("step", "seconds")


@dataclass(frozen=True)
class Curve:
    """The mean over seeds and the lowest and highest seed, over x: requests trained on, or places of days."""

    name: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


def learning_curves(row: Row, problems: list[str]) -> dict[str, Curve]:
    """The loss, its terms and weights of a method over the requests trained on.

    The steps are cut into at most POINTS equal parts; a point is the mean of a part, at its middle. Only the steps that
    all seeds made, and the terms that all have, count; a step that was skipped has no value, and a part of such steps
    no point. A damaged train.jsonl is left out and named in ``problems``.
    """
    logs = _read_each(row, read_steps, problems)
    if not logs:
        return {}
    length = min(len(log["loss"]) for log in logs)
    names = [name for name in logs[0] if all(name in log for log in logs)]
    batch = row.runs[0].config["arguments"].get("batch_size")
    requests_per_step = batch if isinstance(batch, int) else 1
    edges = np.linspace(0, length, min(POINTS, length) + 1).astype(int)
    x = [float(middle) for middle in (edges[:-1] + edges[1:] + 1) / 2 * requests_per_step]
    curves = {}
    for name in names:
        seeds = np.stack([_part_means(log[name][:length], edges) for log in logs])
        there = np.isfinite(seeds).all(axis=0)
        if there.any():
            curves[name] = _curve(name, [at for at, kept in zip(x, there, strict=True) if kept], seeds[:, there])
    return curves if "loss" in curves else {}


def read_steps(run: Run) -> dict[str, np.ndarray]:
    """Term -> value per step [S], of a run's train.jsonl; empty when there is none or it has no step.

    NaN stands for the values of a skipped step, which were not finite and are null in the file.

    Raises InputError when a line is damaged.
    """
    path = run.folder / checkpoint.STEP_LOG_FILE
    try:
        with path.open() as file:
            records = [json.loads(line) for line in file]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); its curves are left out") from error
    if not records:
        return {}
    if not all(isinstance(record, dict) and "loss" in record and _logged(record["loss"]) for record in records):
        raise InputError(f"{path}: a line lacks the loss; its curves are left out")
    names = [name for name in records[0] if name not in _NO_TERMS and _logged(records[0][name])]
    kept = [name for name in names if all(name in record and _logged(record[name]) for record in records)]
    return {printable(name): np.array([record[name] for record in records], dtype=np.float64) for name in kept}


def read_streaming(run: Run) -> dict[str, Mapping[str, Any]]:
    """Test day -> metrics, of a run's streaming.json; empty when there is none.

    Raises InputError when it is damaged.
    """
    path: Path = run.folder / checkpoint.STREAMING_FILE
    try:
        content: Any = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); its curve is left out") from error
    days = content.get("days") if isinstance(content, dict) else None
    if not isinstance(days, list) or not all(isinstance(d, dict) and isinstance(d.get("test_day"), str) for d in days):
        raise InputError(f"{path}: field days is missing or damaged; its curve is left out")
    return {printable(day["test_day"]): day for day in days}


def streaming_curves(rows: Sequence[Row], metric: str, problems: list[str]) -> tuple[list[str], list[Curve]]:
    """The test days, and a curve of the metric per method over their places; empty without streaming runs.

    Only the days that all seeds of a method have count. A damaged streaming.json is left out and named in ``problems``.
    """
    streamed = {row.name: _read_each(row, read_streaming, problems) for row in rows}
    days = sorted({day for seeds in streamed.values() for seed in seeds for day in seed})
    curves = []
    for name, seeds in streamed.items():
        common = [day for day in days if seeds and all(_finite(seed.get(day, {}).get(metric)) for seed in seeds)]
        if common:
            values = np.array([[seed[day][metric] for day in common] for seed in seeds], dtype=np.float64)
            curves.append(_curve(name, [float(days.index(day)) for day in common], values))
    return days, curves


def _read_each(row: Row, read: Callable[[Run], dict[str, T]], problems: list[str]) -> list[dict[str, T]]:
    """What ``read`` finds in each run that has something; a damaged one is named in ``problems``."""
    contents = []
    for run in row.runs:
        try:
            contents.append(read(run))
        except InputError as error:
            problems.append(str(error))
    return [content for content in contents if content]


def _curve(name: str, x: list[float], seeds: np.ndarray) -> Curve:
    """``seeds`` is [seeds, points]."""
    mean, low, high = (part.tolist() for part in (seeds.mean(axis=0), seeds.min(axis=0), seeds.max(axis=0)))
    return Curve(name, x, mean, low, high, len(seeds))


def _part_means(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of the finite values of each part; NaN for a part without any."""
    finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(finite, values, 0), edges[:-1])
    counts = np.add.reduceat(finite, edges[:-1], dtype=np.int64)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _logged(value: Any) -> bool:
    """A finite number, or null for one that was not."""
    return value is None or _finite(value)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
