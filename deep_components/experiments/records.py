"""A run's record, run.json, and what its folder holds: whether the run is finished, can go on, or is another run."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_components import files
from deep_components.errors import InputError
from deep_components.experiments.plan import Part, Run, optional
from deep_components.files import make_folder
from deep_components.runs import checkpoint
from deep_components.runs.checkpoint import RUN_FILE, STREAMING_FILE

LOG_FILE = "run.log"
LOCK_FILE = ".runner.lock"
PATIENCE = 60.0  # seconds that the commands of a killed runner may need to save a large state and end

_RESULTS = (checkpoint.COST_FILE, checkpoint.STATE_FILE, checkpoint.METRICS_FILE, STREAMING_FILE)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder for one runner; yields the lock's descriptor, which the commands of the run inherit, so that the
    lock lasts as long as any of them. InputError when another process holds it."""
    make_folder(folder)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise InputError(
                    f"{folder}: another process is making this run; wait for it, or name another --output_dir"
                ) from error
        time.sleep(0.1)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None without the file. InputError when it is damaged."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); --force makes the run again") from error


@dataclass(frozen=True)
class Holding:
    """What a run's folder holds."""

    folder: Path
    record: Mapping[str, Any] | None
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    streamed: tuple[Mapping[str, Any], ...]  # the days of streaming.json

    @property
    def empty(self) -> bool:
        """No result of a training is there that could be lost."""
        return not any((self.folder / name).exists() for name in _RESULTS)

    def trained(self, run: Run, part: Part) -> bool:
        """The training of the part is complete."""
        if not (self.folder / checkpoint.COST_FILE).exists():
            return False
        epochs = run.identity["epochs"]
        same_days = not epochs or self.config.get("train_days") == list(part.train_days)
        return same_days and self.config.get("arguments", {}).get("epochs") == epochs

    def can_resume(self, run: Run, part: Part) -> bool:
        """A training of the part's days, or of the first of them, can go on."""
        days = self.config.get("train_days") or []
        return (
            bool(run.identity["epochs"])
            and (self.folder / checkpoint.STATE_FILE).exists()
            and days == list(part.train_days[: len(days)])
        )

    def evaluated(self, run: Run, part: Part) -> bool:
        """metrics.json is of the part's test day and, where asked for, the scores are there."""
        wanted = {"test_day": part.test_day, "test_day_checksum": run.data.checksums[part.test_day]}
        scores = "--save_scores" not in run.evaluation or (self.folder / checkpoint.SCORES_FILE).exists()
        return scores and all(self.metrics.get(name) == value for name, value in wanted.items())

    def done(self, run: Run, part: Part) -> bool:
        """Nothing is left to do for the part."""
        if not run.streaming:
            return self.trained(run, part) and self.evaluated(run, part)
        checksum = run.data.checksums[part.test_day]
        return any((day["test_day"], day["test_day_checksum"]) == (part.test_day, checksum) for day in self.streamed)


def holding(folder: Path) -> Holding:
    """What the folder holds. InputError when a file of it is damaged."""
    record = read_json(folder / RUN_FILE)
    config = read_json(folder / checkpoint.CONFIG_FILE) or {}
    metrics = read_json(folder / checkpoint.METRICS_FILE) or {}
    streamed = (read_json(folder / STREAMING_FILE) or {}).get("days", [])
    return Holding(folder, record, config, metrics, tuple(streamed))


def clear(folder: Path) -> None:
    """Remove the results of a run, and its record."""
    checkpoint.remove_results(folder)
    for name in (checkpoint.STATE_FILE, checkpoint.CONFIG_FILE, checkpoint.STEP_LOG_FILE, STREAMING_FILE, RUN_FILE):
        (folder / name).unlink(missing_ok=True)


def check_same_run(run: Run, held: Holding, extend: bool = False) -> None:
    """InputError when the folder holds results of another run, which this one would replace.

    Args:
        extend: a run of fewer days or passes may be there; it goes on.
    """
    if held.empty:
        return
    remedy = "name another --output_dir, or --force to make it again"
    if held.record is None:
        raise InputError(f"{run.folder}: holds a run without {RUN_FILE}, which other commands made; {remedy}")
    for name, wanted, found in _compared(run, held):
        if wanted != found and not (extend and name == "epochs" and (found or 0) <= wanted):
            raise InputError(f"{run.folder}: holds a run with {name}={found}, not {wanted}; {remedy}")
    _check_data(run, held, extend, remedy)


def _compared(run: Run, held: Holding) -> Iterator[tuple[str, Any, Any]]:
    """Name, wanted and found value of all that makes a run; found in run.json, and in config.json in case that the
    training was started by hand since."""
    assert held.record is not None
    recorded = held.record.get("identity", {})
    yield "setting", run.setting, held.record.get("setting")
    for name in sorted(run.identity.keys() | recorded.keys()):
        yield name, run.identity.get(name), recorded.get(name)
    arguments = held.config.get("arguments", {})
    for name, wanted in run.identity.items():
        if name in arguments and not (wanted is None and optional(name)):
            yield name, wanted, arguments[name]


def _check_data(run: Run, held: Holding, extend: bool, remedy: str) -> None:
    assert held.record is not None
    if held.record.get("data") != run.data.origin:
        raise InputError(
            f"{run.folder}: holds a run on {held.record.get('data')} data, not {run.data.origin}; {remedy}"
        )
    checksums = {**held.record.get("data_checksums", {}), **held.config.get("data_checksums", {})}
    for day in sorted(checksums.keys() & run.data.checksums.keys()):
        if checksums[day] != run.data.checksums[day]:
            raise InputError(f"{run.folder}: holds a run on another {day} (its checksum differs); {remedy}")
    before, days = held.record.get("train_days", []), list(run.parts[-1].train_days)
    longer = (extend or run.streaming) and before == days[: len(before)]
    if run.identity["epochs"] and before != days and not longer:
        raise InputError(f"{run.folder}: holds a run trained on {', '.join(before)}, not {', '.join(days)}; {remedy}")


def new_record(run: Run, held: Holding) -> dict[str, Any]:
    """The record of a run that is about to start or go on; earlier attempts are kept."""
    before = held.record or {}
    return {
        "name": run.name,
        "variant": run.variant,
        "setting": run.setting,
        "seed": run.seed,
        "status": "running",
        "streaming": run.streaming,
        "data": run.data.origin,
        "data_dir": str(run.data.folder),
        "train_days": list(run.parts[-1].train_days),
        "test_day": run.parts[-1].test_day,
        "data_checksums": {day: run.data.checksums[day] for day in _days(run)},
        "identity": dict(run.identity),
        "peak_memory_bytes": before.get("peak_memory_bytes"),
        "peak_gpu_memory_bytes": before.get("peak_gpu_memory_bytes"),
        "attempts": list(before.get("attempts", [])),
    }


def _days(run: Run) -> list[str]:
    return sorted({*run.parts[-1].train_days, *(part.test_day for part in run.parts)})


def add_cost(record: dict[str, Any], folder: Path) -> None:
    """Note the time and memory of a training that is complete.

    ``seconds`` are of all its steps, also those made before an interruption; memory is the highest of its processes.
    """
    cost = read_json(folder / checkpoint.COST_FILE) or {}
    try:
        steps = [json.loads(line) for line in (folder / checkpoint.STEP_LOG_FILE).read_text().splitlines()]
    except (OSError, ValueError):
        steps = []
    whole = len(steps) == cost.get("steps")
    record["steps"] = len(steps)
    record["seconds"] = cost.get("seconds") if whole else sum(step["seconds"] for step in steps)
    for name in ("peak_memory_bytes", "peak_gpu_memory_bytes"):
        record[name] = max((value for value in (record.get(name), cost.get(name)) if value is not None), default=None)


def add_streamed(run: Run, part: Part) -> None:
    """Add the metrics of the part's test day, which the next day's training removes, to streaming.json."""
    held = holding(run.folder)
    days = [day for day in held.streamed if day["test_day"] != part.test_day]
    days.append({**held.metrics, "trained_days": len(part.train_days)})
    content = {"name": run.name, "setting": run.setting, "seed": run.seed, "data": run.data.origin, "days": days}
    checkpoint.write_json(run.folder / STREAMING_FILE, content)
