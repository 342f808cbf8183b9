"""RecFlow's files: their layout, reading them, and writing a log in exactly that layout.

``data_dir/``::

    all_stage/<day>.feather              a row per (request, item)
    request_id_dict/<day>.pkl            {request_id: {group: int64 array [n, 8]}}, columns ITEM_COLUMNS
    seq_effective_50_dict/<day>.pkl      {request_id: int64 array [50, 10]}, left-padded, columns HISTORY_COLUMNS
    others/id_cnt.pkl                    {field: number of distinct ids}

A request's rows in the feather file are its distinct (request, video) pairs; the flags rank_pos .. prerank_neg are 0 or
1 and say in which groups the video stands.
"""

import datetime
import json
import pickle
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather

from deep_components.cli import progress
from deep_components.dataset.clock import is_date
from deep_components.dataset.importers.safe_pickle import PickledArray, iterate_pickle, load_pickle
from deep_components.dataset.manifest import verify
from deep_components.errors import InputError
from deep_components.files import read_bytes, write_atomically

HISTORY_LENGTH = 50
CATEGORY_ONE_PADDING = 2  # readers do not shift category_level_one: 2 stands for a missing item, so no video has it
GROUP_NAMES = ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg", "rerank_pos", "rerank_neg")
ITEM_COLUMNS = (
    "video_id", "author_id", "duration", "category_level_two", "upload_type", "upload_timestamp", "category_level_one",
    "effective_view",
)  # fmt: skip
HISTORY_COLUMNS = (
    "video_id", "author_id", "category_level_two", "category_level_one", "upload_type", "upload_timestamp", "duration",
    "request_timestamp", "playing_time", "request_id",
)  # fmt: skip
ID_COUNT_FIELDS = (
    "user_id", "device_id", "age", "gender", "province", "video_id", "author_id", "category_level_one",
    "category_level_two", "upload_type",
)  # fmt: skip
REQUEST_COLUMNS = ("request_id", "request_timestamp", *ID_COUNT_FIELDS[:5])
ORIGIN_FILE = "others/origin.json"

PERIOD_1 = tuple(str(datetime.date(2024, 1, 13) + datetime.timedelta(days=offset)) for offset in range(23))

_FEATHER_ROWS_PER_BATCH = 1 << 16
_REQUESTS_PER_PIECE = 2000
_MAX_ORIGIN = 1 << 20  # bytes of a file that says what made a log
_COUNT_ALIASES = {"photo_id": "video_id"}  # the released id_cnt.pkl also has a blank before category_level_two
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def feather_path(root: Path, day: str) -> Path:
    return root / "all_stage" / f"{day}.feather"


def request_path(root: Path, day: str) -> Path:
    return root / "request_id_dict" / f"{day}.pkl"


def history_path(root: Path, day: str) -> Path:
    return root / "seq_effective_50_dict" / f"{day}.pkl"


def id_count_path(root: Path) -> Path:
    return root / "others" / "id_cnt.pkl"


def day_paths(root: Path, day: str) -> tuple[Path, Path, Path]:
    """The three files a day consists of."""
    return feather_path(root, day), request_path(root, day), history_path(root, day)


# ---- reading ---------------------------------------------------------------------------------------------------------


def available_days(root: Path, named: bool = False) -> list[str]:
    """The days of the log that have all three files, in order.

    Raises InputError when there is none; and when a day lacks a file, unless the user has ``named`` the days to use: a
    day that fell out silently would change what is trained and tested on.
    """
    complete, incomplete = days_of(root)
    if not complete:
        raise InputError(
            f"{root}: no day has its files in all_stage, request_id_dict and seq_effective_50_dict; "
            "see data/README.md for the tree expected"
        )
    if incomplete and not named:
        missing = next(path for path in day_paths(root, incomplete[0]) if not path.exists())
        raise InputError(f"{missing}: no such file; fetch it, remove that day's other files, or name the days to use")
    return complete


def days_of(root: Path) -> tuple[list[str], list[str]]:
    """Days with all, and days with only some of their three files. InputError for a day that is no date."""
    names = [
        {path.stem for path in example.parent.glob(f"*{example.suffix}") if _DAY.fullmatch(path.stem)}
        for example in day_paths(root, "any")
    ]
    for day in sorted(set.union(*names)):
        if not is_date(day):
            file = next(path for path in day_paths(root, day) if path.exists())
            raise InputError(f"{file}: {day} is no date; name the day's files by it, or remove them")
    complete = set.intersection(*names)
    return sorted(complete), sorted(set.union(*names) - complete)


def read_origin(root: Path) -> str:
    """What made the log: "simulated", "movielens-1m", ... as its origin.json says; without one "recflow" where all of
    Period 1 is there, else "unlabelled"."""
    path = root / ORIGIN_FILE
    if not path.exists():
        return "recflow" if set(PERIOD_1) <= set(days_of(root)[0]) else "unlabelled"
    origin = origin_in(path, "data")
    verify(root, [path])
    return origin


def origin_in(path: Path, key: str) -> str:
    """The name of what made a log, in a JSON file. InputError when it cannot be read or is no name."""
    try:
        origin = json.loads(read_bytes(path, _MAX_ORIGIN))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not readable ({error}); make the log again") from error
    if not isinstance(origin, str) or not origin.isprintable() or not 0 < len(origin) <= 100:
        raise InputError(f"{path}: field {key} is {reprlib.repr(origin)}, not a name; make the log again")
    return origin


def read_id_counts(root: Path) -> dict[str, int]:
    """``others/id_cnt.pkl``: number of distinct ids of every field of ID_COUNT_FIELDS.

    Raises InputError when the file is missing or damaged, or lacks a field.
    """
    path = id_count_path(root)
    content = load_pickle(path)
    verify(root, [path])
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of counts; fetch the file again")
    counts: dict[str, Any] = {}
    for key, value in content.items():
        field = _COUNT_ALIASES.get(str(key).strip(), str(key).strip())
        if field in counts and field in ID_COUNT_FIELDS and counts[field] != value:
            raise InputError(f"{path}: field {field} is there twice, with different counts; fetch the file again")
        counts[field] = value
    for field in ID_COUNT_FIELDS:
        count = counts.get(field)
        if type(count) is not int or not 0 < count < 1 << 32:
            raise InputError(
                f"{path}: field {field} is {reprlib.repr(count)}, not a count of ids; fetch the file again"
            )
    return {field: counts[field] for field in ID_COUNT_FIELDS}


Groups = dict[str, PickledArray]


def read_request_dict(path: Path) -> Iterator[list[tuple[int, Groups]]]:
    """``request_id_dict/<day>.pkl``: (request_id, {group: rows}) of all requests, some thousand at a time.

    InputError, when it comes to that, where the file has not that form.
    """

    def sound(groups: Any) -> bool:
        return isinstance(groups, dict) and all(isinstance(rows, PickledArray) for rows in groups.values())

    return _keyed_by_request(path, sound, "request {} is not a dict of arrays by group")


def read_history_dict(path: Path) -> Iterator[list[tuple[int, PickledArray]]]:
    """``seq_effective_50_dict/<day>.pkl``: (request_id, rows); as :func:`read_request_dict`."""
    return _keyed_by_request(
        path, lambda rows: isinstance(rows, PickledArray), "the history of request {} is not an array"
    )


def _keyed_by_request(path: Path, sound: Callable[[Any], bool], problem: str) -> Iterator[list[tuple[int, Any]]]:
    waiting: list[tuple[int, Any]] = []
    for items in iterate_pickle(path):
        for key, value in items:
            if type(key) is not int:
                raise InputError(f"{path}: not a dict keyed by request ids; fetch the file again")
            if not sound(value):
                raise InputError(f"{path}: {problem.format(key)}; fetch the file again")
        waiting += items
        if len(waiting) >= _REQUESTS_PER_PIECE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


@dataclass(frozen=True)
class Requests:
    """The request side of a day: one [R] int64 array for each of REQUEST_COLUMNS, in order of first appearance, and
    the true positions of the ground-truth items, one entry per row flagged so. ``disagreeing`` counts the requests
    whose rows differ in one of their fields; the first row counts."""

    fields: Mapping[str, np.ndarray]
    truth_request_id: np.ndarray
    truth_video_id: np.ndarray
    truth_index: np.ndarray
    disagreeing: int = 0


def read_requests(path: Path, truth_flag: str, truth_index: str | None) -> Requests:
    """Read ``all_stage/<day>.feather`` by record batches, one column at a time; without ``truth_index`` no positions.

    A day has some 50 million rows; what is kept is one row a request and the rows flagged ``truth_flag``, so the memory
    needed is that of one column of one record batch and of the result.

    Raises InputError when the file is missing or damaged, a column is missing or not of integers, or the flag is
    neither 0 nor 1.
    """
    kept: dict[str, list[np.ndarray]] = {name: [] for name in REQUEST_COLUMNS}
    truths, disagreeing = [], []
    for batch in _record_batches(path, _columns_read(truth_flag, truth_index)):
        ids = batch("request_id")
        starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
        _, first, run = np.unique(ids[starts], return_index=True, return_inverse=True)
        first_row = starts[first][np.repeat(run, np.diff(starts, append=len(ids)))]  # of each row's request
        disagree = np.zeros(len(ids), bool)
        for name, parts in kept.items():
            values = ids if name == "request_id" else batch(name)
            parts.append(values[np.sort(starts[first])])
            disagree |= values != values[first_row]
        disagreeing.append(np.unique(ids[disagree]))
        if truth_index is not None:
            flags = batch(truth_flag)
            if (wrong := flags[(flags < 0) | (flags > 1)]).size:
                raise InputError(f"{path}: column {truth_flag} holds {wrong[0]}, not 0 or 1; fetch the file again")
            rows = np.flatnonzero(flags)
            truths.append(np.stack([ids[rows], batch("video_id")[rows], batch(truth_index)[rows]]))
    joined = {name: np.concatenate([np.zeros(0, np.int64), *parts]) for name, parts in kept.items()}
    ids = joined["request_id"]
    if not len(ids):
        raise InputError(f"{path}: holds no request; fetch the file again")
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    disagreeing += [ids[values != values[first[inverse]]] for values in joined.values()]  # of several record batches
    fields = {name: values[np.sort(first)] for name, values in joined.items()}
    request_id, video_id, index = np.concatenate([np.zeros((3, 0), np.int64), *truths], axis=1)
    return Requests(fields, request_id, video_id, index, len(np.unique(np.concatenate(disagreeing))))


def check_feather(path: Path, truth_flag: str, truth_index: str | None) -> int:
    """Read what :func:`read_requests` would of the first record batch, and return its number of rows. InputError when
    that, or the columns, are not as they should be."""
    columns = _columns_read(truth_flag, truth_index)
    for batch in _record_batches(path, columns):
        return min(len(batch(name)) for name in columns)
    raise InputError(f"{path}: holds no request; fetch the file again")


def _columns_read(truth_flag: str, truth_index: str | None) -> tuple[str, ...]:
    return REQUEST_COLUMNS if truth_index is None else (*REQUEST_COLUMNS, "video_id", truth_flag, truth_index)


def _record_batches(path: Path, columns: tuple[str, ...]) -> Iterator[Callable[[str], np.ndarray]]:
    """For each record batch a function that reads one of its columns as int64."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file; fetch the file again")
    with _readable(path), pa.OSFile(str(path)) as source:  # read, not mapped: mapped pages would count as memory too
        schema = pa.ipc.open_file(source).schema
        readers = {}
        for name in columns:
            if schema.names.count(name) != 1:
                problem = "there twice" if name in schema.names else "missing"
                raise InputError(f"{path}: column {name} is {problem}; fetch the file again")
            if not pa.types.is_integer(kind := schema.field(name).type):
                raise InputError(f"{path}: column {name} holds {kind}, not integers; fetch the file again")
            options = pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name)])
            readers[name] = pa.ipc.open_file(source, options=options)
        for index in progress(range(readers[columns[0]].num_record_batches), f"reading {path.name}", "batch"):
            yield partial(_integers, path, readers, index)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in one sentence why ``path`` cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; see data/README.md for the files expected") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{path}: not a readable Feather (Arrow IPC) file ({reason}); fetch the file again") from error


def _integers(path: Path, readers: Mapping[str, Any], index: int, name: str) -> np.ndarray:
    with _readable(path):
        batch = readers[name].get_batch(index)
        batch.validate()  # that its buffers hold as many rows as it declares: else memory behind them would be read
        column = batch.column(0)
    if column.null_count:
        raise InputError(f"{path}: column {name} has {column.null_count} missing values; fetch the file again")
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype == np.uint64 and len(values) and values.max() > np.iinfo(np.int64).max:
        raise InputError(f"{path}: column {name} holds {values.max()}, no signed 64-bit integer; fetch it again")
    return values.astype(np.int64, copy=False)


# ---- writing ---------------------------------------------------------------------------------------------------------


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
        feather_path(root, day), lambda file: pa.feather.write_feather(table, file, chunksize=_FEATHER_ROWS_PER_BATCH)
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
    """Write ``others/origin.json``; ``origin["data"]``, what made this log, is copied into every result file."""
    text = json.dumps(dict(origin), indent=2, sort_keys=True) + "\n"
    write_atomically(root / ORIGIN_FILE, lambda file: file.write(text.encode()))


def _all_stage_table(log: DayLog) -> pa.Table:
    """One row per distinct (request, video): requests in order, videos in their order of first appearance."""
    names = [name for name in GROUP_NAMES if name != "rank_pos"] + ["rank_pos"]
    items = np.concatenate([log.groups[name] for name in names], axis=1)  # [R, 60, 8]
    requests, per_request = items.shape[:2]
    size = per_request // len(names)
    merged = {
        name: np.zeros((requests, per_request), np.int64) for name in (*GROUP_NAMES, "rank_index", "rerank_index")
    }
    for number, name in enumerate(names):
        merged[name][:, number * size : (number + 1) * size] = 1
    merged["rank_index"][:, -size:] = log.rank_index
    start = names.index("rerank_pos") * size
    merged["rerank_index"][:, start : start + 2 * size] = log.rerank_index

    # Rows of one pair next to each other, the pair's first appearance in front (lexsort is stable).
    request, rows = np.repeat(np.arange(requests), per_request), items.reshape(-1, len(ITEM_COLUMNS))
    order = np.lexsort((rows[:, 0], request))
    pairs = np.stack([request[order], rows[order, 0]])
    starts = np.flatnonzero(np.append(True, (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)))
    keep = np.argsort(order[starts])
    first = order[starts][keep]

    data: dict[str, np.ndarray] = {field: log.request[field][request[first]] for field in REQUEST_COLUMNS}
    data |= {field: rows[first, number] for number, field in enumerate(ITEM_COLUMNS)}
    for field, values in merged.items():  # a video in several groups carries all their flags and indices
        data[field] = np.maximum.reduceat(values.reshape(-1)[order], starts)[keep]
    return pa.table(data)
