"""A run's record, run.json, and what its folder holds: whether the run is finished, can go on, or is another run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_components.errors import InputError
from deep_components.runs.code import is_evaluation_current
from deep_components.runs.folder import (
    CONFIG_FILE,
    COST_FILE,
    METRICS_FILE,
    RUN_FILE,
    SCORES_FILE,
    STATE_FILE,
    STREAMING_FILE,
    read_config_if_any,
    read_json,
    write_json,
)
from deep_components.runs.identity import Difference, first_difference

_PEAKS = ("peak_memory_bytes", "peak_gpu_memory_bytes")


@dataclass(frozen=True)
class FolderContents:
    """What a run's folder holds; empty mappings for files that are not there."""

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    streamed: tuple[Mapping[str, Any], ...]  # the days of streaming.json

    def has(self, name: str) -> bool:
        """The file is there."""
        return (self.folder / name).exists()

    def trained(self, days: Sequence[str], epochs: int) -> bool:
        """A training of these days and passes is complete; for an untrained cascade the days do not matter."""
        same_days = not epochs or self.config.get("train_days") == list(days)
        return self.has(COST_FILE) and same_days and self.config.get("arguments", {}).get("epochs") == epochs

    def resumable(self, days: Sequence[str]) -> bool:
        """A training of these days, or of the first of them, can go on."""
        before = self.config.get("train_days") or []
        return self.has(STATE_FILE) and before == list(days[: len(before)])

    def evaluated(
        self, day: str, checksum: str, scores: bool, any_code: bool = False, random_items: int | None = None
    ) -> bool:
        """metrics.json is of that day and content with so many random items, and of the evaluation's code as it is now
        unless ``any_code`` will do, and, where asked for, the scores are there."""
        current = any_code or is_evaluation_current(self.metrics.get("code"))
        return current and _of_day(self.metrics, day, checksum, random_items) and (not scores or self.has(SCORES_FILE))

    def streamed_day(self, day: str, checksum: str, random_items: int | None = None) -> bool:
        """streaming.json has the metrics of that day and content with so many random items."""
        return any(_of_day(metrics, day, checksum, random_items) for metrics in self.streamed)


def _of_day(metrics: Mapping[str, Any], day: str, checksum: str, random_items: int | None) -> bool:
    found = tuple(metrics.get(name) for name in ("test_day", "test_day_checksum", "test_random_items"))
    return found == (day, checksum, random_items)


def read_folder(folder: Path) -> FolderContents:
    """What the folder holds. InputError when a file of it is damaged."""
    record, metrics, streaming = (read_json(folder / name) or {} for name in (RUN_FILE, METRICS_FILE, STREAMING_FILE))
    config = read_config_if_any(folder) or {}
    return FolderContents(folder, record, config, metrics, tuple(streaming.get("days", [])))


def check_same_run(
    held: FolderContents,
    wanted: Mapping[str, Any],
    streaming: bool,
    extend: bool = False,
    any_code: bool = False,
    random_items: int | None = None,
) -> None:
    """InputError when the folder holds results of another run, which a new one would replace.

    ``wanted`` is what the new run's config.json will say (runs/identity.py). A ``streaming`` run goes on with more
    days, tested with as many ``random_items``, with ``extend`` any run of fewer days or passes, with ``any_code`` one
    of other code.
    """
    if not any(held.has(name) for name in (COST_FILE, STATE_FILE, METRICS_FILE, STREAMING_FILE)):
        return
    remedy = "name another --output_dir, or --force to make it again"
    if not held.record:
        raise InputError(f"{held.folder}: holds a run without {RUN_FILE}, which other commands made; {remedy}")
    found: Any = first_difference(held.config, wanted, extend or streaming, more_epochs=extend, any_code=any_code)
    if held.record.get("streaming", False) != streaming:
        found = f"streaming={not streaming}, not {streaming}"
    elif found is None and (other := {day.get("test_random_items") for day in held.streamed} - {random_items}):
        found = Difference("test_random_items", other.pop(), random_items)  # the models of these days are gone
    elif found is None and not any_code and (days := _evaluated_before(held)):
        found = Difference("code", [f"the evaluation of {days[0]}"], None)
    if isinstance(found, Difference) and found.is_code:
        remedy = "--force makes it again, --any_code keeps it, and another --output_dir makes a second one"
    if found is not None:
        raise InputError(f"{held.folder}: holds a run with {found}; {remedy}")


def _evaluated_before(held: FolderContents) -> list[str]:
    """The days of a stream that other code has evaluated; their models are gone."""
    return [str(day.get("test_day")) for day in held.streamed if not is_evaluation_current(day.get("code"))]


def start_record(held: FolderContents, about: Mapping[str, Any], attempt: Mapping[str, Any]) -> dict[str, Any]:
    """Write and return the record of a run that starts or goes on: ``about`` it, and what earlier attempts took."""
    before = {name: held.record.get(name) for name in _PEAKS}
    attempts = [*held.record.get("attempts", []), dict(attempt) | {"status": "running"}]
    record = {**about, "status": "running", **before, "attempts": attempts}
    write_json(held.folder / RUN_FILE, record)
    return record


def end_record(folder: Path, record: dict[str, Any], attempt: Mapping[str, Any], status: str) -> None:
    """Complete the record and its last attempt, and write it."""
    record["attempts"][-1] |= {**attempt, "status": status}
    record["status"] = status
    config = read_json(folder / CONFIG_FILE) or {}
    record |= {name: config.get(name) for name in ("commit", "device", "device_name", "threads", "versions")}
    record["code"] = (config.get("code") or {}).get("total")
    write_json(folder / RUN_FILE, record)


def add_cost(folder: Path, record: dict[str, Any]) -> None:
    """Note the time of a complete training, interrupted parts included, and the highest memory of its processes."""
    cost = read_json(folder / COST_FILE) or {}
    record |= {name: cost.get(name) for name in ("steps", "skipped_steps", "seconds")}
    for name in _PEAKS:
        record[name] = max((peak for peak in (record.get(name), cost.get(name)) if peak is not None), default=None)
    write_json(folder / RUN_FILE, record)


def add_streamed_day(folder: Path, about: Mapping[str, Any], trained_days: int) -> None:
    """Add metrics.json, which the next day's training removes, to streaming.json."""
    held = read_folder(folder)
    days = [day for day in held.streamed if day["test_day"] != held.metrics["test_day"]]
    days.append({**held.metrics, "trained_days": trained_days})
    kept = {name: about[name] for name in ("name", "setting", "seed", "data")}
    write_json(folder / STREAMING_FILE, kept | {"days": days})
