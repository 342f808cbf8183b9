"""RecFlow's files: their layout, and writing a log in exactly that layout.

``data_dir/``::

    all_stage/<day>.feather              a row per (request, item)
    request_id_dict/<day>.pkl            {request_id: {group: int64 array [n, 8]}}, columns ITEM_COLUMNS
    seq_effective_50_dict/<day>.pkl      {request_id: int64 array [50, 10]}, left-padded, columns HISTORY_COLUMNS
    others/id_cnt.pkl                    {field: number of distinct ids}

A request's rows in the feather file are its distinct (request, video) pairs; the flags rank_pos .. prerank_neg are 0 or
1 and say in which groups the video stands.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather

from deep_components.files import write_atomically

HISTORY_LENGTH = 50
GROUP_NAMES = ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg", "rerank_pos", "rerank_neg")
ITEM_COLUMNS = (
    "video_id",
    "author_id",
    "duration",
    "category_level_two",
    "upload_type",
    "upload_timestamp",
    "category_level_one",
    "effective_view",
)
HISTORY_COLUMNS = (
    "video_id",
    "author_id",
    "category_level_two",
    "category_level_one",
    "upload_type",
    "upload_timestamp",
    "duration",
    "request_timestamp",
    "playing_time",
    "request_id",
)
ID_COUNT_FIELDS = (
    "user_id",
    "device_id",
    "age",
    "gender",
    "province",
    "video_id",
    "author_id",
    "category_level_one",
    "category_level_two",
    "upload_type",
)
REQUEST_COLUMNS = ("request_id", "request_timestamp", "user_id", "device_id", "age", "gender", "province")
ORIGIN_FILE = "others/origin.json"

_FEATHER_ROWS_PER_BATCH = 1 << 16


def feather_path(root: Path, day: str) -> Path:
    return root / "all_stage" / f"{day}.feather"


def request_path(root: Path, day: str) -> Path:
    return root / "request_id_dict" / f"{day}.pkl"


def history_path(root: Path, day: str) -> Path:
    return root / "seq_effective_50_dict" / f"{day}.pkl"


def id_count_path(root: Path) -> Path:
    return root / "others" / "id_cnt.pkl"


@dataclass(frozen=True)
class DayLog:
    """One day of a log, complete requests only, in file order. R requests; all arrays int64.

    ``request`` has one [R] array for each of REQUEST_COLUMNS (request_timestamp in milliseconds). ``groups`` has one
    [R, 10, 8] array for each of GROUP_NAMES (columns ITEM_COLUMNS, upload_timestamp in seconds, best item first).
    ``rank_index`` [R, 10] belongs to the items of rank_pos, ``rerank_index`` [R, 20] to those of rerank_pos followed by
    rerank_neg; both count from 1. ``history`` is [R, 50, 10] (HISTORY_COLUMNS; padding rows, first, are all zero).
    """

    request: Mapping[str, np.ndarray]
    groups: Mapping[str, np.ndarray]
    rank_index: np.ndarray
    rerank_index: np.ndarray
    history: np.ndarray


def write_day(root: Path, day: str, log: DayLog) -> None:
    """Write the three files of ``day`` under ``root``, each to a temporary name first."""
    table = _all_stage_table(log)
    write_atomically(
        feather_path(root, day),
        lambda file: pa.feather.write_feather(table, file, chunksize=_FEATHER_ROWS_PER_BATCH),
    )
    ids = log.request["request_id"].tolist()
    group_rows = [list(log.groups[name]) for name in GROUP_NAMES]
    requests = {
        request_id: dict(zip(GROUP_NAMES, arrays, strict=True))
        for request_id, *arrays in zip(ids, *group_rows, strict=True)
    }
    write_atomically(request_path(root, day), lambda file: pickle.dump(requests, file, protocol=4))
    histories = dict(zip(ids, log.history, strict=True))
    write_atomically(history_path(root, day), lambda file: pickle.dump(histories, file, protocol=4))


def write_id_counts(root: Path, counts: Mapping[str, int]) -> None:
    """Write ``others/id_cnt.pkl``: for every field of ID_COUNT_FIELDS the number of distinct ids."""
    plain = {field: int(counts[field]) for field in ID_COUNT_FIELDS}
    write_atomically(id_count_path(root), lambda file: pickle.dump(plain, file, protocol=4))


def write_origin(root: Path, origin: Mapping[str, Any]) -> None:
    """Write ``others/origin.json``: what made this log. ``origin["data"]`` ("simulated", "movielens-1m") is copied into
    every result file; a folder without this file counts as data "recflow"."""
    text = json.dumps(dict(origin), indent=2, sort_keys=True) + "\n"
    write_atomically(root / ORIGIN_FILE, lambda file: file.write(text.encode()))


def _all_stage_table(log: DayLog) -> pa.Table:
    """One row per distinct (request, video): requests in order, videos in their order of first appearance."""
    num_requests = len(log.request["request_id"])
    names = [name for name in GROUP_NAMES if name != "rank_pos"] + ["rank_pos"]
    items = np.concatenate([log.groups[name] for name in names], axis=1)  # [R, 60, 8]
    per_request, size = items.shape[1], items.shape[1] // len(names)
    columns: dict[str, np.ndarray] = {name: np.zeros((num_requests, per_request), np.int64) for name in GROUP_NAMES}
    for place, name in enumerate(names):
        columns[name][:, place * size : (place + 1) * size] = 1
    columns["rank_index"] = np.zeros((num_requests, per_request), np.int64)
    columns["rank_index"][:, -size:] = log.rank_index
    columns["rerank_index"] = np.zeros((num_requests, per_request), np.int64)
    start = names.index("rerank_pos") * size
    columns["rerank_index"][:, start : start + 2 * size] = log.rerank_index

    request_of_row = np.repeat(np.arange(num_requests), per_request)
    rows = items.reshape(-1, len(ITEM_COLUMNS))
    order = np.lexsort((rows[:, 0], request_of_row))  # stable: equal pairs stay in order of appearance
    new_pair = np.ones(len(order), bool)
    new_pair[1:] = (np.diff(request_of_row[order]) != 0) | (np.diff(rows[order, 0]) != 0)
    starts = np.flatnonzero(new_pair)
    first = order[starts]  # the pair's first appearance
    keep = np.argsort(first, kind="stable")
    first = first[keep]

    data: dict[str, np.ndarray] = {field: log.request[field][request_of_row[first]] for field in REQUEST_COLUMNS}
    data |= {field: rows[first, place] for place, field in enumerate(ITEM_COLUMNS)}
    for field, values in columns.items():  # a video in several groups carries all their flags and indices
        data[field] = np.maximum.reduceat(values.reshape(-1)[order], starts)[keep]
    return pa.table(data)
