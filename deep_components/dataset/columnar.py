"""The columnar cache: a day of a log, encoded once for one cascade, memory-mapped afterwards.

``cache_dir/<cascade>/<day>-<log>-<key>/`` holds one .npy file a column and ``meta.json``. The key is a digest of all
that the content depends on (the source files' sizes and modification times, the id counts, the cascade's groups, the
time zone and FORMAT_VERSION), so a stale cache is never opened. A folder is written under a temporary name and renamed;
the SHA-256 of meta.json and of every column is checked when it is opened, and a damaged folder is built anew.

Processes share caches: each holds a lock of the day, shared while it opens, exclusive while it builds or removes. So a
second process waits for the first one's cache, and a temporary folder whose day can be locked is one that a killed
process has left.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deep_components.batch import (
    HISTORY_FIELDS,
    ITEM_FIELDS,
    PADDING_INDEX,
    REQUEST_FIELDS,
    CascadeBatch,
    Features,
    Targets,
)
from deep_components.cascade import Cascade
from deep_components.dataset.clock import time_zone
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow import LOG_COLUMN, ColumnFiles, encode_day
from deep_components.dataset.manifest import verify
from deep_components.errors import InputError
from deep_components.files import locked, read_json, sha256_of, write_json
from deep_components.tables.id_set import IdSet

FORMAT_VERSION = 2
_META = "meta.json"
_ID_SETS = "ids."
_ROWS_PER_CHUNK = 1 << 14
DEFAULT_TIME_ZONE = "Asia/Shanghai"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DayCache:
    """One opened day. ``columns`` are memory maps whose first dimension is the request, in file order.

    ``repairs`` counts what was left out or repaired when the day was read (see data/README.md); ``checksum`` is the
    SHA-256 of what the day holds, the same wherever its cache lies.
    """

    day: str
    columns: Mapping[str, np.ndarray]
    group: np.ndarray  # [N] int64
    repairs: Mapping[str, int]
    checksum: str
    id_bits: Mapping[str, np.ndarray]
    history_length: int = recflow.HISTORY_LENGTH  # L: this many of the last history positions are handed out

    def __len__(self) -> int:
        return len(self.columns["request_id"])

    def ids(self, field: str) -> IdSet:
        """The encoded ids of a field of ID_FIELDS that the day names, its padding index and 0 included."""
        return IdSet(self.id_bits[field])

    def batch(self, requests: np.ndarray) -> CascadeBatch:
        """The requests at the given positions, all N items at once."""

        def column(name: str) -> torch.Tensor:
            return torch.from_numpy(self.columns[name][requests].astype(np.int64))

        def stacked(prefix: str, fields: Sequence[str], last: int) -> torch.Tensor:
            values = np.empty((len(requests), last, len(fields)), np.int64)
            for place, field in enumerate(fields):
                values[:, :, place] = self.columns[f"{prefix}.{field}"][requests][:, -last:]
            return torch.from_numpy(values)

        return CascadeBatch(
            request_id=column("request_id"),
            features=Features(
                **{field: column(f"request.{field}") for field in REQUEST_FIELDS},
                history=stacked("history", HISTORY_FIELDS, self.history_length),
                history_mask=torch.from_numpy(self.columns["history.mask"][requests][:, -self.history_length :].copy()),
                items=stacked("items", ITEM_FIELDS, len(self.group)),
            ),
            targets=Targets(
                labels=column("items.label"),
                mask=torch.from_numpy(self.columns["items.mask"][requests]),
                group=torch.from_numpy(self.group),
            ),
        )


def open_day(
    data_dir: Path,
    day: str,
    cascade: Cascade,
    cache_dir: Path | None = None,
    zone: str = DEFAULT_TIME_ZONE,
    history_length: int = recflow.HISTORY_LENGTH,
) -> DayCache:
    """The day's cache, built first when there is none, when its sources changed, or when it is damaged.

    Args:
        data_dir: a log in RecFlow's layout.
        day: the file name of the day, e.g. 2024-01-13.
        cascade: which item groups to take.
        cache_dir: where caches lie; by default :func:`default_cache_dir`.
        zone: the time zone of the log.
        history_length: how many of the last history positions batches have.

    Raises:
        InputError: a source file is missing or cannot be used, or the cache cannot be written.
    """
    counts = recflow.read_id_counts(data_dir)
    identity = _identity(data_dir, day, cascade, counts, zone)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    parent = (cache_dir or default_cache_dir(data_dir)) / cascade.name
    # The log is in the name too: logs that share a --cache_dir must not take each other's days for stale.
    log = hashlib.sha256(f"{data_dir.resolve()}|{zone}".encode()).hexdigest()[:8]
    folder = parent / f"{day}-{log}-{key}"
    with locked(_lock_path(parent, f"{day}-{log}"), shared=True):
        if folder.exists() and _damage(folder, identity) is None:
            return _open_folder(folder, day, cascade, history_length)
    try:
        with locked(_lock_path(parent, f"{day}-{log}")):
            damage = _damage(folder, identity) if folder.exists() else None
            if damage is not None:
                logger.warning("%s: the cache is damaged (%s) and is built anew", folder, damage)
                shutil.rmtree(folder)
            if not folder.exists():  # else another process has built it meanwhile
                _build_folder(folder, data_dir, day, cascade, counts, zone, identity)
                for stale in parent.glob(f"{day}-{log}-*"):
                    if stale != folder:
                        shutil.rmtree(stale)
            opened = _open_folder(folder, day, cascade, history_length)
        _remove_leftovers(parent)
    except OSError as error:
        raise InputError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); name another folder with --cache_dir"
        ) from error
    return opened


def _lock_path(parent: Path, day_and_log: str) -> Path:
    return parent.parent / ".locks" / f"{parent.name}-{day_and_log}"


def _remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of processes that were killed: of those at work, the day is locked."""
    for leftover in parent.glob(".*.tmp"):
        day_and_log = leftover.name[1:].partition(".")[0].rpartition("-")[0]
        with locked(_lock_path(parent, day_and_log), wait=False) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)


def default_cache_dir(data_dir: Path) -> Path:
    """``data_dir/cache``; for a folder marked read-only, a folder of its own under the user's cache directory."""
    writable = os.access(data_dir, os.W_OK) and data_dir.stat().st_mode & 0o222
    if writable:
        return data_dir / "cache"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "lcron" / hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]


def _identity(data_dir: Path, day: str, cascade: Cascade, counts: Mapping[str, int], zone: str) -> dict[str, Any]:
    sources = {}
    for path in recflow.day_paths(data_dir, day):
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: no such file; see data/README.md for the files a day consists of") from error
        sources[path.parent.name] = [status.st_size, status.st_mtime_ns]
    return {
        "format": FORMAT_VERSION,
        "sources": sources,
        "id_counts": dict(counts),
        "groups": [asdict(group) for group in cascade.groups],
        "group_size": cascade.group_size,
        "time_zone": zone,
    }


def _build_folder(
    folder: Path,
    data_dir: Path,
    day: str,
    cascade: Cascade,
    counts: Mapping[str, int],
    zone: str,
    identity: Mapping[str, Any],
) -> None:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        verify(data_dir, recflow.day_paths(data_dir, day))
        repairs = encode_day(data_dir, day, cascade, counts, time_zone(zone), ColumnFiles(temporary))
        _write_id_sets(temporary, counts)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
        }
        write_json(temporary / _META, {"identity": identity, "repairs": repairs, "files": files})
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_id_sets(folder: Path, counts: Mapping[str, int]) -> None:
    """Beside the columns, which ids each field has in them: tables need no rows for others."""
    for field, column in LOG_COLUMN.items():
        names = [f"{part}.{field}.npy" for part in ("request", "history", "items")]
        columns = [np.load(folder / name, mmap_mode="r") for name in names if (folder / name).exists()]
        padding = np.array([0, PADDING_INDEX.get(field, 0)])
        chunks = (part[k : k + _ROWS_PER_CHUNK] for part in columns for k in range(0, len(part), _ROWS_PER_CHUNK))
        np.save(folder / f"{_ID_SETS}{field}.npy", IdSet.of((padding, *chunks), counts[column] + 2).bits)


def _open_folder(folder: Path, day: str, cascade: Cascade, history_length: int) -> DayCache:
    meta = read_json(folder / _META, must_have_checksum=True)
    columns = {name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r") for name in meta["files"]}
    id_bits = {name.removeprefix(_ID_SETS): columns.pop(name) for name in list(columns) if name.startswith(_ID_SETS)}
    group = np.repeat(np.arange(len(cascade.groups)), cascade.group_size)
    for repair, count in meta["repairs"].items():
        if count:
            logger.warning("%s: %s: %d", day, repair, count)
    contents = json.dumps({name: file["sha256"] for name, file in meta["files"].items()}, sort_keys=True)
    checksum = hashlib.sha256(contents.encode()).hexdigest()
    return DayCache(day, columns, group, meta["repairs"], checksum, id_bits, history_length)


def _damage(folder: Path, identity: Mapping[str, Any]) -> str | None:
    """What is wrong with the folder, or None."""
    try:
        meta = read_json(folder / _META, must_have_checksum=True)
        if meta["identity"] != json.loads(json.dumps(identity)) or not isinstance(meta["repairs"], dict):
            return f"{_META} is another cache's"
        if {*meta["files"], _META} != {path.name for path in folder.iterdir()}:
            return "its files are not those that were written"
        for name, expected in meta["files"].items():
            if (folder / name).stat().st_size != expected["size"]:
                return f"{name} has another size"
            if sha256_of(folder / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None
