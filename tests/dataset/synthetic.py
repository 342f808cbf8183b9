"""A small random log in RecFlow's layout for the tests of the data path, and ways to spoil it."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.feather

from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow_files import GROUP_NAMES, HISTORY_COLUMNS, ITEM_COLUMNS, DayLog

DAY = "2024-01-15"  # a Monday
MIDNIGHT = 1_705_248_000  # of DAY in Asia/Shanghai, in seconds
COUNTS = {  # on both sides of the limits of the unsigned types
    "user_id": 254,
    "device_id": 255,
    "age": 8,
    "gender": 2,
    "province": 34,
    "video_id": 65_535,
    "author_id": 65_534,
    "category_level_one": 40,
    "category_level_two": 300,
    "upload_type": 20,
}
GROUP_SIZE = 10


def random_log(requests: int = 12, seed: int = 0) -> DayLog:
    """Complete requests whose ids cover 0 .. count, both ends included; upload times from 1938 to 2024."""
    rng = np.random.default_rng(seed)

    def ids(field: str, *shape: int) -> np.ndarray:
        values = rng.integers(0, COUNTS[field] + 1, shape)
        values[0] = COUNTS[field]
        values[-1] = 0
        return values

    fields: dict[str, np.ndarray] = {
        "request_id": rng.choice(1 << 62, requests, replace=False),
        "request_timestamp": (MIDNIGHT + rng.integers(0, 86_400, requests)) * 1000 + rng.integers(0, 1000, requests),
    }
    fields |= {name: ids(name, requests) for name in ("user_id", "device_id", "age", "gender", "province")}
    size = GROUP_SIZE * len(GROUP_NAMES)

    def item_column(name: str) -> np.ndarray:
        if name == "upload_timestamp":
            return rng.integers(-1_000_000_000, MIDNIGHT, (requests, size))
        return ids(name, requests, size) if name in COUNTS else rng.integers(0, 2, (requests, size))

    def event_column(name: str) -> np.ndarray:
        shape = (requests, recflow.HISTORY_LENGTH)
        return ids(name, *shape) if name in COUNTS else rng.integers(1, MIDNIGHT, shape)

    items = np.stack([item_column(name) for name in ITEM_COLUMNS], axis=2)
    for row in items:
        row[:, 0] = rng.choice(np.arange(1, COUNTS["video_id"]), size, replace=False)
        row[GROUP_SIZE : GROUP_SIZE + 2, 0] = COUNTS["video_id"], 0  # of rank_neg, which both cascades have
    history = np.stack([event_column(name) for name in HISTORY_COLUMNS], axis=2)
    padding = rng.integers(0, recflow.HISTORY_LENGTH + 1, requests)
    padding[-1] = recflow.HISTORY_LENGTH
    padding[0] = 0
    history[np.arange(recflow.HISTORY_LENGTH) < padding[:, None]] = 0
    return DayLog(
        request=fields,
        groups={name: items[:, GROUP_SIZE * g : GROUP_SIZE * (g + 1)] for g, name in enumerate(GROUP_NAMES)},
        rank_index=rng.permuted(np.tile(np.arange(1, 11), (requests, 1)), axis=1),
        rerank_index=rng.permuted(np.tile(np.arange(1, 21), (requests, 1)), axis=1),
        history=history,
    )


def write_log(root: Path, log: DayLog | None = None, day: str = DAY, counts: Mapping[str, int] = COUNTS) -> Path:
    """Write the log (by default a random one) under ``root`` and return ``root``."""
    with mock.patch("os.fsync"):  # waiting for the disk would take most of the tests' time
        recflow.write_day(root, day, log or random_log())
        recflow.write_id_counts(root, counts)
    return root


def read_plain(path: Path) -> Any:
    """What is in a pickle that the test itself wrote."""
    with path.open("rb") as file:
        return pickle.load(file)


def write_plain(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, 4))


def edit_pickle(path: Path, edit: Callable[[Any], Any]) -> None:
    """Apply ``edit`` to what is in ``path``; it changes the content in place or returns a new one."""
    content = read_plain(path)
    changed = edit(content)
    write_plain(path, content if changed is None else changed)


def edit_table(path: Path, edit: Callable[[pa.Table], pa.Table], chunksize: int = 1 << 16, **options: Any) -> None:
    """Apply ``edit`` to the table in ``path`` and write it back in record batches of ``chunksize`` rows."""
    table = edit(pyarrow.feather.read_table(path, memory_map=False))
    pyarrow.feather.write_feather(table, path, chunksize=chunksize, **options)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with the column ``name`` replaced."""
    return table.set_column(table.column_names.index(name), name, pa.array(values))
