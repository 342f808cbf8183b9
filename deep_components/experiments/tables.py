"""What runs' records hold, as tables: time and memory of each method, and the metrics of each day of a stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from deep_components.errors import InputError
from deep_components.runs.folder import RUN_FILE, STREAMING_FILE, read_json
from deep_components.text import aligned

_GIB = 1 << 30


def read_records(folders: Sequence[Path], name: str) -> list[dict[str, Any]]:
    """The files of that name in the folders, at any depth. InputError when there is none or one is damaged."""
    records = []
    for folder in folders:
        inside = [read_json(path) for path in sorted(folder.rglob(name))]
        if not inside:
            raise InputError(f"{folder}: no {name}; the scripts of two_stage/, three_stage/ and paper/ write it")
        records += [record for record in inside if record is not None]
    return records


def costs_table(folders: Sequence[Path]) -> str:
    """A row per method: requests trained on, seconds, and the peak memory of the process and of the GPU."""
    records = [record for record in read_records(folders, RUN_FILE) if record.get("steps") and record.get("seconds")]
    rows = [["method", "setting", "seeds", "requests", "seconds", "requests/s", "memory", "GPU memory"]]
    rows[0] += ["device", "threads"]
    for (method, setting, device, threads), group in _grouped(records, _title, "setting", "device", "threads"):
        seconds = mean(record["seconds"] for record in group)
        requests = mean(record["steps"] * record["identity"]["batch_size"] for record in group)
        rows.append(
            [method, setting, str(len(group)), f"{requests:.0f}", f"{seconds:.1f}", f"{requests / seconds:.0f}",
             _memory(group, "peak_memory_bytes"), _memory(group, "peak_gpu_memory_bytes"), device, threads]
        )  # fmt: skip
    origins = ", ".join(sorted({record["data"] for record in records}))
    return f"training time and peak memory, data: {origins}; means over seeds\n\n{_table(rows)}"


def streaming_table(folders: Sequence[Path]) -> str:
    """A row per test day, a column per method: joint recall of what was trained on all days before, mean over seeds."""
    streams = read_records(folders, STREAMING_FILE)
    metric = next(
        (name for stream in streams for day in stream["days"] for name in day if name.startswith("joint_recall")), ""
    )
    days = sorted({day["test_day"] for stream in streams for day in stream["days"]})
    columns = _grouped(streams, lambda stream: stream["name"])
    rows = [["test day", *(name for (name,), _ in columns)]]
    for day in days:
        cells = []
        for _, group in columns:
            values = [entry[metric] for stream in group for entry in stream["days"] if entry["test_day"] == day]
            known = [value for value in values if value is not None]
            cells.append(f"{mean(known):.4f}" if known else "-")
        rows.append([day, *cells])
    about = sorted({(stream["setting"], stream["data"]) for stream in streams})
    head = "; ".join(f"{setting}, data: {data}" for setting, data in about)
    return f"{head}, {metric} of each day by what was trained on all days before it; means over seeds\n\n{_table(rows)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([*aligned(rows), ""])


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['name']} ({record['variant']})" if record["variant"] else str(record["name"])


def _grouped(records: Sequence[dict[str, Any]], *keys: Any) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """The records by the keys (fields, or functions of a record), in order of their first appearance."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        place = tuple(str(key(record) if callable(key) else record.get(key)) for key in keys)
        groups.setdefault(place, []).append(record)
    return list(groups.items())


def _memory(group: Sequence[Mapping[str, Any]], name: str) -> str:
    peaks = [record[name] for record in group if record.get(name) is not None]
    return f"{max(peaks) / _GIB:.2f} GiB" if peaks else "-"
